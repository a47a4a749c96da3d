"""Tensors of weight files, and which of them are dictionaries: by name, for every library, complete SAE or not.

======================  ==================================  ===================================
library                 decoder                             encoder
======================  ==================================  ===================================
e2e_sae, ours           ``….decoder.weight`` [d, n]         ``….encoder.0.weight`` [n, d]
dictionary_learning,    ``decoder.weight`` [d, n]           ``encoder.weight`` [n, d]
openai
sparsify                ``W_dec`` [n, d]                    ``encoder.weight`` [n, d]
SAELens                 ``W_dec`` [n, d]                    ``W_enc`` [d, n]
llamascopium            ``W_D`` [n, d]                      ``W_E`` [d, n]
======================  ==================================  ===================================

Nothing in a ``.pt`` file is executed.

>>> import torch
>>> found = decoders({"W_dec": torch.zeros(6, 4), "W_enc": torch.zeros(4, 6)})
>>> {prefix: matrix.shape for prefix, matrix in found.items()}
{'': torch.Size([6, 4])}
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# (name's ending, whether the stored matrix is [d, n])
_DECODERS = (("W_dec", False), ("W_D", False), ("decoder.weight", True))
_ENCODERS = (("W_enc", True), ("W_E", True), ("encoder.0.weight", False), ("encoder.weight", False))
_WRAPPERS = ("state_dict", "model_state_dict", "model")
FOLDER_FILES = ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "final.safetensors", "model.safetensors")
SUMMARY = "summary.json"
"""What a finished run of ours says of itself, beside its weights."""
ALIVE = "sparsity/alive_dict_elements_indices_final/"
"""Prefix of its keys under which the alive features of a position are listed: e2e_sae's name."""
SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")


def split_name(source: str | Path) -> tuple[Path, str | None]:
    """The path and the SAE's name of ``path::name``; no name: None."""
    path, _, name = str(source).partition("::")
    return Path(os.path.expanduser(path)), name or None  # Path's own fails where there is no such user


def file_in(path: Path) -> Path:
    """The weight file that a path means: itself, or the one of a folder.

    Raises FileNotFoundError where there is nothing, ValueError where there is no such file, or more than one.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_file():
        return path
    known = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if known:
        return known[0]
    # e2e_sae's folders: samples_N.pt or .safetensors, the largest N is the last.
    samples = [p for p in path.glob("samples_*") if p.suffix in SUFFIXES]
    samples.sort(key=lambda p: int("0" + p.stem.removeprefix("samples_")))
    files = samples[-1:] or [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES]
    if len(files) != 1:
        raise ValueError(f"{path} must hold one file of weights, found {[p.name for p in files]}")
    return files[0]


def load(path: Path) -> dict[str, Any]:
    """All tensors (or arrays) of a ``.npy``, ``.npz``, ``.pt``, ``.pth`` or ``.safetensors`` file by name, on the CPU.

    A file that is one bare tensor gives it under "". Raises ValueError for another kind of file, and for a damaged one.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    try:
        return _load(path)
    except Exception as error:  # every reader has errors of its own: of safetensors, zip files, pickles and NumPy
        raise ValueError(f"{path} is no readable file of tensors: {error}") from error


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".npy":
        return {"": np.load(path, allow_pickle=False)}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(content, dict) and (key := next((w for w in _WRAPPERS if isinstance(content.get(w), dict)), None)):
        content = content[key]
    return dict(content) if isinstance(content, dict) else {"": content}


def as_tensor(x: Any) -> Tensor:
    """A tensor or array as a tensor, sharing its memory where that can be: any strides and byte order, read-only too.

    Raises ValueError for what holds no numbers.
    """
    try:
        if isinstance(x, np.ndarray):
            x = np.require(x, x.dtype.newbyteorder("="), ["C", "W"])
        return torch.as_tensor(x).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected a tensor or an array of numbers, got {type(x).__name__}: {error}") from error


def part(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The settings under a key, {} where there are none. Raises ValueError when something else is there."""
    content = settings.get(key) or {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{key} must hold settings of its own, got {content!r}")
    return dict(content)


def decoders(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Decoders [n, d] by what precedes ``W_dec``, ``decoder.weight`` … in their name (usually nothing)."""
    return _find(tensors, _DECODERS)


def encoders(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encoders [n, d], as `decoders`."""
    return _find(tensors, _ENCODERS)


def _find(tensors: Mapping[str, Any], endings: tuple[tuple[str, bool], ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for ending, transposed in endings:
            prefix = key.removesuffix(ending)
            if key.endswith(ending) and (not prefix or prefix.endswith(".")) and prefix not in found:
                if getattr(value, "ndim", 0) == 2:
                    matrix = as_tensor(value)
                    found[prefix] = matrix.T if transposed else matrix
                break
    return found
