"""Files of tensors and of settings: written whole or not at all, read without running what is in them.

>>> import tempfile
>>> path = save_tensors(Path(tempfile.mkdtemp()) / "a.safetensors", {"w": torch.zeros(3)}, metadata={"step": 1})
>>> load_tensors(path), load_metadata(path)
({'w': tensor([0., 0., 0.])}, {'step': 1})
"""

import contextlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file."""


def write_atomically(path: Path, data: bytes) -> Path:
    """Writes bytes beside ``path``, flushes them to disk, then renames: the old file stays until the new one is whole.

    Raises CheckpointError when the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # tempfile's would be the owner's alone, whatever the umask says
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; older checkpoints are intact"
        ) from error
    return path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Path:
    """A safetensors file (or, for the suffix ``.pt``, torch's format); ``metadata`` is stored as JSON."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    if path.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        return write_atomically(path, buffer.getvalue())
    from safetensors.torch import save

    header = {"json": json.dumps(metadata)} if metadata is not None else None
    return write_atomically(path, save(tensors, header))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pt`` or ``.pth`` file, on the CPU; pickled code is never run.

    Raises FileNotFoundError, and CheckpointError for a damaged file or one that holds no tensors.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no readable weight file: {error}") from error
    except Exception as error:  # pickle.UnpicklingError and what torch derives from it
        raise CheckpointError(f"{path} does not hold plain tensors: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must hold a dict of tensors, got {type(state).__name__}")
    return dict(state)


def load_metadata(path: Path) -> Any:
    """The JSON that `save_tensors` stored beside the tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("json", "null"))


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors of a ``.pt`` or ``.safetensors`` file, without its data.

    Raises CheckpointError for a damaged file or one that holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return set(file.keys())
        state = torch.load(path, map_location="meta", weights_only=True)
        if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
            return set(state)
    except Exception:
        pass  # the full reader says what is wrong
    return set(load_tensors(path))


def load_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises ValueError when it holds none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file, empty for an empty file. Raises ValueError when it holds something else."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}")
    return content
