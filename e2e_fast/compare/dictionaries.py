"""Dictionaries from wherever they are: tensors, arrays, SAE objects, and the files of the common libraries.

A dictionary is a matrix whose rows are features: (n, d). Files are told apart by their tensors' names, as the table in
`e2e_fast.formats.layouts` has them; that a file is no SAE that we could run (gated, a transcoder) does not matter here.
A file with one matrix alone is that matrix, rows as features. A file with several SAEs is asked for one by
``path::name``, as in ``final.safetensors::blocks.6.hook_resid_pre``. Nothing in a ``.pt`` file is executed.

>>> import torch
>>> class SAE:
...     W_dec, W_enc = torch.eye(2, 3), torch.zeros(2, 3)
>>> read_dictionary(SAE()).shape
torch.Size([2, 3])
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2e_fast import files
from e2e_fast.formats import layouts


def read_dictionary(source: Any, *, which: str = "decoder", encoder_share: float = 0.5) -> Tensor:
    """The features of `source` as rows (n, d), float32 or float64, on the CPU.

    source: a tensor or array (n, d) of any float dtype; an object with ``W_dec`` (and ``W_enc``), [F, D]; or the path
    of a ``.npy``, ``.npz``, ``.pt``, ``.safetensors`` file or of a folder with one, ``path::name`` if it holds several.
    which: ``"decoder"``, ``"encoder"``, or ``"both"``: rows [√(1−w)·unit decoder, √w·unit encoder], w = encoder_share,
    of length 2d, whose products are (1−w)·cos_dec + w·cos_enc; a feature with either half zero becomes a zero row.

    Raises ValueError when the source does not have what is asked for, or has it more than once, and FileNotFoundError
    for a path where nothing is.
    """
    if which not in ("decoder", "encoder", "both"):
        raise ValueError(f"which must be 'decoder', 'encoder' or 'both', got {which!r}")
    if not 0.0 < encoder_share < 1.0:
        raise ValueError(f"encoder_share must lie strictly between 0 and 1, got {encoder_share}")
    decoder, encoder = decoder_and_encoder(source)
    if which == "decoder":
        return _plain(decoder)
    if encoder is None:
        raise ValueError(f"which={which!r} needs encoder weights, and the source has none (a bare matrix is a decoder)")
    if which == "encoder":
        return _plain(encoder)
    return _joint(_plain(decoder), _plain(encoder), encoder_share)


def decoder_and_encoder(source: Any) -> tuple[Any, Any]:
    """The decoder of a source as `read_dictionary` takes it, and its encoder or None: as stored, features as rows."""
    if isinstance(source, str | Path):
        return _from_tensors(*_load(str(source)), str(source))
    if hasattr(source, "W_dec"):
        decoder, encoder = source.W_dec, getattr(source, "W_enc", None)
        if encoder is not None and encoder.shape != decoder.shape and encoder.T.shape == decoder.shape:
            encoder = encoder.T  # SAELens objects keep [d, n]
        return decoder, encoder
    if hasattr(source, "saes"):
        saes = source.saes
        if len(saes) != 1:
            raise ValueError(f"the model has {len(saes)} SAEs ({', '.join(saes)}): pass one of model.saes")
        return decoder_and_encoder(next(iter(saes.values())))
    return source, None


def recorded_alive(source: Any) -> np.ndarray | None:
    """Indices of the features that were alive at the end of the run that a path belongs to; None where it is not known.

    The run's ``summary.json`` says it of the weights that it ended with: earlier checkpoints have none.
    """
    if not isinstance(source, str | Path):
        return None
    path, name = layouts.split_name(source)
    file = layouts.file_in(path)
    record = file.parent / layouts.SUMMARY
    if not record.is_file():
        return None
    summary = files.load_json(record)
    alive = {
        key.removeprefix(layouts.ALIVE).replace("-", "."): value
        for key, value in summary.items()
        if key.startswith(layouts.ALIVE)
    }
    earlier = file.stem.startswith("samples_") and file.stem != f"samples_{summary.get('samples')}"
    if earlier or not alive:
        return None
    found = next(iter(alive.values())) if name is None and len(alive) == 1 else alive.get(str(name).replace("-", "."))
    return None if found is None else np.asarray(found, dtype=np.int64)


def device_of(*sources: Any) -> torch.device:
    """The GPU that one of the sources lies on, else the CPU."""
    tensors = (source if isinstance(source, Tensor) else getattr(source, "W_dec", None) for source in sources)
    return next((t.device for t in tensors if isinstance(t, Tensor) and t.is_cuda), torch.device("cpu"))


def check_rows(x: Tensor, name: str) -> None:
    """Raises ValueError unless x is a non-empty matrix of finite numbers; names the first rows that are not."""
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix (features, d), got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    # One pass: a row's sum of squares in float64 is finite when all its entries are.
    bad = np.flatnonzero(~np.isfinite(_norms(x)))
    if len(bad):
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        raise ValueError(f"{name} must be finite, but has NaN or infinite entries in {len(bad)} rows: {shown}")


def kept_rows(x: Tensor, alive: Any, name: str, zero_rows: str = "drop", threads: int | None = None) -> np.ndarray:
    """Indices of the rows of x (n, d) that take part: those alive and, with zero_rows="drop", not zero.

    alive: a boolean mask (n,), or None for all. Raises ValueError when it is something else; `name` says of what.
    """
    keep = np.ones(len(x), dtype=bool)
    if alive is not None:
        mask = torch.as_tensor(alive)
        if mask.dtype != torch.bool or mask.shape != (len(x),):
            got = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"alive for {name} must be a boolean mask of shape ({len(x)},), got {got}")
        keep &= mask.cpu().numpy()
    if zero_rows == "drop":
        keep &= _norms(x, threads) > 0
    return np.flatnonzero(keep)


def _norms(x: Tensor, threads: int | None = None) -> np.ndarray:
    from e2e_fast.kernels.neighbours import row_norms

    return row_norms(x, threads).numpy()


def _plain(x: Any) -> Tensor:
    try:
        x = layouts.as_tensor(x)
    except ValueError as error:
        raise ValueError(
            f"a dictionary must be a tensor or array (n, d), an SAE, or the path of a file, got a {type(x).__name__}"
        ) from error
    if not x.is_floating_point():
        raise ValueError(f"a dictionary must hold floating-point numbers, got {x.dtype}")
    return (x if x.dtype == torch.float64 else x.float()).cpu().contiguous()


def _joint(decoder: Tensor, encoder: Tensor, share: float) -> Tensor:
    if decoder.shape != encoder.shape:
        raise ValueError(
            f"decoder and encoder must agree in shape, got {tuple(decoder.shape)} and {tuple(encoder.shape)}"
        )
    norms = [half.double().norm(dim=1, keepdim=True) for half in (decoder, encoder)]
    whole = (norms[0] > 0) & (norms[1] > 0)
    scales = [torch.where(whole, weight**0.5 / norm, 0) for weight, norm in zip((1 - share, share), norms, strict=True)]
    halves = [half.double() * scale for half, scale in zip((decoder, encoder), scales, strict=True)]
    return torch.cat(halves, dim=1).to(decoder.dtype)


def _load(source: str) -> tuple[dict[str, Any], str | None]:
    """The matrices of a file or folder by name, and the name asked for after ``::``."""
    path, name = layouts.split_name(source)
    tensors = layouts.load(layouts.file_in(path))
    return {key: value for key, value in tensors.items() if getattr(value, "ndim", 0) == 2}, name


def _from_tensors(tensors: dict[str, Any], name: str | None, source: str) -> tuple[Tensor, Tensor | None]:
    found = layouts.decoders(tensors)
    encoders = layouts.encoders(tensors)
    if not found:  # no SAE: a named or the only matrix
        plain = tensors if name is None else {key: matrix for key, matrix in tensors.items() if key == name}
        if len(plain) != 1:
            named = "" if name is None else f" named {name!r}"
            raise ValueError(f"{source} must hold a decoder or a single matrix{named}, found {sorted(tensors)}")
        return layouts.as_tensor(next(iter(plain.values()))), None
    if name is not None:
        wanted = name.replace("-", ".")
        found = {prefix: matrix for prefix, matrix in found.items() if prefix.replace("-", ".").rstrip(".") == wanted}
    if len(found) != 1:
        names = sorted(p.rstrip(".").replace("-", ".") for p in layouts.decoders(tensors))
        raise ValueError(f"{source} holds SAEs {names}: ask for one as path::name")
    ((prefix, decoder),) = found.items()
    encoder = encoders.get(prefix)
    if encoder is not None and encoder.shape != decoder.shape and encoder.T.shape == decoder.shape:
        encoder = encoder.T  # ours as [F, D] under SAELens's name
    return decoder, encoder
