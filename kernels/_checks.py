"""Argument checks that the operators share: shapes, dtypes and devices, from metadata alone (no synchronisation)."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_matrix(name: str, tensor: Tensor, columns: int | None = None, expected: str = "(N, D)") -> None:
    """Raises ValueError unless ``tensor`` is a floating matrix, with ``columns`` columns when given."""
    if tensor.dim() != 2 or (columns is not None and tensor.shape[1] != columns):
        width = "" if columns is None else f" with {columns} columns"
        raise ValueError(f"{name} must be a matrix {expected}{width}, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_bias(name: str, bias: Tensor | None, size: int) -> None:
    """Raises ValueError unless ``bias`` is None or a floating vector of ``size`` entries."""
    if bias is None:
        return
    if tuple(bias.shape) != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(bias.shape)}")
    if bias.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point, got {bias.dtype}")


def check_devices(name: str, like: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError unless all tensors are where ``like`` is: some devices would answer with what memory held."""
    for other, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{other} must be on {name}'s device {like.device}, got {tensor.device}")


def check_code(values: Tensor, indices: Tensor) -> None:
    """Raises ValueError unless values and indices are matrices of one shape, floating and int32 or int64."""
    if values.dim() != 2 or values.shape != indices.shape:
        raise ValueError(
            "code.values and code.indices must share a shape (N, K), "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if values.dtype not in FLOATS:
        raise ValueError(f"code.values must be floating point, got {values.dtype}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"code.indices must be int32 or int64, got {indices.dtype}")


def check_indices(indices: Tensor, d_sae: int) -> None:
    """Raises ValueError unless every index lies in [0, d_sae). Reads the data: for CPU tensors."""
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < d_sae):
        raise ValueError(
            f"code.indices must lie in [0, {d_sae}), got values from {int(indices.min())} to {int(indices.max())}"
        )


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any tensor is float64, else float32: the type that the operators compute in."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32
