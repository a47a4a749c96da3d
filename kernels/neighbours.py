"""Pairs of rows whose product passes a threshold, out of all n·m, without the n×m matrix.

For unit rows a_i and b_j, stored in low precision as â_i and b̂_j, `neighbours` lists the pairs with

    â_i·b̂_j − price_j > row_level_i    or    â_i·b̂_j > col_level_j.

The product is a filter, not an answer. `quantize` measures every row's error ‖a_i − â_i‖, and by Cauchy and Schwarz

    |a_i·b_j − â_i·b̂_j| ≤ ‖a_i − â_i‖·‖b̂_j‖ + ‖b_j − b̂_j‖ + rounding        (`error_bound` gives the terms)

whatever the order of summation, the block size or the device. So a threshold lowered by the bound misses no pair, and
the caller recomputes in float64 the few that pass. `row_levels` finds levels that about `rank` of a sample pass.

float32, bfloat16 and int8 products: int8 (one scale a row) is exact in int32 and twice as fast as bfloat16 on a CPU
with VNNI, at four times its error bound.

>>> import torch
>>> a = quantize(torch.eye(3), "int8")
>>> neighbours(a, a, torch.full((3,), 0.5)).tolist()
[[0, 0], [1, 1], [2, 2]]
"""

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    _C: Any = importlib.import_module("e2e_fast._C")
except ImportError:  # the compiled core is optional: the same function in plain torch follows
    _C = None

PRECISIONS = ("float32", "bfloat16", "int8")
_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_TILE_ELEMENTS = 1 << 24  # products that the torch path holds at once


class Quantized(NamedTuple):
    """Unit rows in low precision: row i is ``scale[i] · data[i]``."""

    data: Tensor
    """(N, D) float32, bfloat16 or int8, D padded with zeros to a multiple of 4."""
    scale: Tensor
    """(N,) float32; ones unless int8."""
    error: Tensor
    """(N,) float64: at least the Euclidean distance between the stored row and the unit row."""

    @property
    def precision(self) -> str:
        return str(self.data.dtype).removeprefix("torch.")

    def to(self, device: torch.device) -> "Quantized":
        """The same rows on another device."""
        return Quantized(*(tensor.to(device) for tensor in self))

    def dequantize(self) -> Tensor:
        """The stored rows (N, D) as float32."""
        return self.data.float() * self.scale[:, None]


def row_norms(x: Tensor, threads: int | None = None) -> Tensor:
    """Euclidean norms of the rows of x (N, d), in float64."""
    if _core(x):
        return torch.from_numpy(_C.row_norms(x.contiguous().numpy(), thread_count(threads)))
    return torch.cat([block.double().norm(dim=1) for block in x.split(_rows_at_once(x.shape[1]))])


def quantize(x: Tensor, precision: str, norm: Tensor | None = None, threads: int | None = None) -> Quantized:
    """The rows of x (N, d), float32 or float64, divided by their norms and rounded to `precision`.

    Rows of norm 0 stay 0. Raises ValueError when `precision` is not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    norm = row_norms(x, threads) if norm is None else norm
    if _core(x):
        data, scale, error = _C.quantize(x.contiguous().numpy(), norm.numpy(), precision, thread_count(threads))
        stored = torch.from_numpy(data).view(_DTYPE[precision])
        return Quantized(stored, torch.from_numpy(scale), torch.from_numpy(error))
    blocks = [
        _quantize_block(rows, norms, precision)
        for rows, norms in zip(x.split(_rows_at_once(x.shape[1])), norm.split(_rows_at_once(x.shape[1])), strict=True)
    ]
    return Quantized(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def error_bound(a: Quantized, b: Quantized, largest: float = 1.0) -> tuple[Tensor, Tensor]:
    """Per row of a and per row of b, float64: for every pair, |a_i·b_j − product| ≤ row[i] + col[j].

    The row's term carries the rounding of the float32 accumulation (any order) and of comparing numbers up to
    `largest` in float32.
    """
    worst_a, worst_b = float(a.error.max()), float(b.error.max())
    depth, ulp = a.data.shape[1], 2.0**-24
    rounding = 1.01 * ulp * ((depth + 8) * (1 + worst_a) * (1 + worst_b) + 8 * (1 + largest)) + 1e-12
    return a.error * (1 + worst_b) + rounding, b.error


def neighbours(
    a: Quantized,
    b: Quantized,
    row_level: Tensor,
    col_level: Tensor | None = None,
    price: Tensor | None = None,
    *,
    absolute: bool = False,
    row_cap: int | None = None,
    block_rows: int = 0,
    threads: int | None = None,
) -> Tensor:
    """All pairs (i, j) with ``product − price[j] > row_level[i]`` or ``product > col_level[j]``: (E, 2) int32, sorted.

    a (n, D), b (m, D) quantized alike; row_level (n,), col_level and price (m,), float32; None means +∞ and 0.
    ``absolute`` takes the product's absolute value. Raises OverflowError when a row has more than `row_cap` pairs.
    """
    n, m = a.data.shape[0], b.data.shape[0]
    for name, level, size in (("row_level", row_level, n), ("col_level", col_level, m), ("price", price, m)):
        if level is not None and level.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(level.shape)}")
    cap = m if row_cap is None else row_cap
    pairs, capped = sweep(
        a, b, row_level, col_level, price, absolute=absolute, row_cap=cap, block_rows=block_rows, threads=threads
    )
    if bool(capped.any()):
        raise OverflowError(f"row {int(capped.nonzero()[0])} has more than row_cap = {cap} pairs")
    keys = pairs[:, 0].long() * m + pairs[:, 1]
    return pairs[torch.argsort(keys)]


def sweep(
    a: Quantized,
    b: Quantized,
    row_level: Tensor,
    col_level: Tensor | None = None,
    price: Tensor | None = None,
    *,
    absolute: bool = False,
    row_cap: int,
    block_rows: int = 0,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`neighbours` in no particular order, and (n,) bool: rows that passed more than `row_cap` pairs and were cut."""
    if _core(a.data) and not _triton(a.data):
        everything = np.arange(max(a.data.shape[0], b.data.shape[0]), dtype=np.int32)
        pairs, capped = _C.sweep(
            as_core(a), as_core(b), everything[: a.data.shape[0]], everything[: b.data.shape[0]], row_level.numpy(),
            None if col_level is None else col_level.numpy(), None if price is None else price.numpy(), None,
            row_cap, absolute, block_rows, thread_count(threads),
        )  # fmt: skip
        return torch.from_numpy(pairs), torch.from_numpy(capped).bool()
    if _triton(a.data):
        from e2e_fast.kernels.triton import neighbours as gpu

        tensors = (a.data, b.data, a.scale, b.scale, row_level, col_level, price)
        pairs = gpu.sweep(*tensors, absolute, capacity=128 * a.data.shape[0])
        # Nothing is cut, but rows over the cap are named as on the CPU.
        return pairs, torch.bincount(pairs[:, 0], minlength=a.data.shape[0]) > row_cap
    return _sweep_torch(a, b, row_level, col_level, price, absolute, row_cap)


def row_levels(
    a: Quantized, b: Quantized, sample: Tensor, rank: int, *, absolute: bool = False, threads: int | None = None
) -> Tensor:
    """For each row of a, about the `rank`-th largest product with the rows `sample` of b, never more: (n,) float32.

    sample (s,) int32 indices into b. Exact for s ≤ 16·rank; else the rank-th largest of at least 16·rank group maxima.
    """
    if not 1 <= rank <= sample.numel():
        raise ValueError(f"rank must lie in [1, {sample.numel()}] (the sample's size), got {rank}")
    if _core(a.data):
        level = _C.row_levels(as_core(a), as_core(b), sample.numpy(), rank, absolute, thread_count(threads))
        return torch.from_numpy(level)
    chosen = b.data[sample.long()].float() * b.scale[sample.long(), None]
    levels = []
    for rows, scale in zip(*(t.split(_rows_at_once(sample.numel())) for t in (a.data, a.scale)), strict=True):
        products = (rows.float() * scale[:, None]) @ chosen.T
        levels.append((products.abs() if absolute else products).topk(rank, dim=1).values[:, -1])
    return torch.cat(levels)


def as_core(q: Quantized):
    """The compiled core's view of the same memory."""
    return _C.Quantized(q.precision, q.data.view(torch.uint8).numpy(), q.scale.numpy())


def fastest_precision(d: int) -> str:
    """The precision that a sweep over rows of d entries runs fastest in on this CPU, counting its error bound.

    int8 where the processor has its instructions; below 128 entries the product is cheap and the bound decides.
    """
    return "int8" if _C is not None and d >= 128 and _C.native_precision("int8") else "float32"


def _core(x: Tensor) -> bool:
    return _C is not None and x.device.type == "cpu"


def _triton(x: Tensor) -> bool:
    return x.is_cuda


def thread_count(threads: int | None) -> int:
    """As many as asked for; None: as torch. Raises ValueError outside 1 to 1024."""
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads must lie in [1, 1024], got {threads}")
    return torch.get_num_threads() if threads is None else threads


def _rows_at_once(width: int) -> int:
    return max(1, _TILE_ELEMENTS // max(width, 1))


def _quantize_block(x: Tensor, norm: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    unit = torch.where(norm[:, None] > 0, x.double() / norm[:, None], 0)
    unit = torch.nn.functional.pad(unit, (0, -x.shape[1] % 4))
    scale = torch.ones_like(norm, dtype=torch.float32)
    if precision == "int8":
        peak = unit.abs().amax(dim=1)
        scale = torch.where(peak > 0, peak / 127, 1).float()
        data = (unit / scale.double()[:, None]).round().clamp(-127, 127).to(torch.int8)
    else:
        data = unit.to(_DTYPE[precision])
    error = (data.double() * scale.double()[:, None] - unit).norm(dim=1)
    return data, scale, torch.where(norm > 0, error * (1 + 1e-9) + 1e-15, 0)


def _sweep_torch(a, b, row_level, col_level, price, absolute, row_cap) -> tuple[Tensor, Tensor]:
    """The specification: one tile of rows at a time, in float32."""
    right, pairs, capped = b.dequantize().T, [], []
    for first in range(0, a.data.shape[0], step := _rows_at_once(b.data.shape[0])):
        rows = slice(first, first + step)
        product = (a.data[rows].float() * a.scale[rows, None]) @ right
        if absolute:
            product = product.abs()
        passes = (product if price is None else product - price) > row_level[rows, None]
        if col_level is not None:
            passes |= product > col_level
        capped.append(passes.sum(1) > row_cap)
        passes &= passes.cumsum(1, dtype=torch.int32) <= row_cap
        i, j = passes.nonzero(as_tuple=True)
        pairs.append(torch.stack([i + first, j], dim=1).int())
    return torch.cat(pairs), torch.cat(capped)
