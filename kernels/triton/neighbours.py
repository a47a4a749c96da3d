"""The sweep of :mod:`e2e_fast.kernels.neighbours` on a GPU: one tile of products a program, thresholds in registers.

A program multiplies BLOCK_N rows of a by BLOCK_M rows of b (int8 in int32, everything else in float32), compares,
counts what passes, takes that many places with one atomic addition and stores the pairs there. Their order is
therefore arbitrary, their set is not. Nothing n×m is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2e_fast.kernels.triton._launch import INTERPRETED, blocks, launch

_INTERPRETED = tl.constexpr(INTERPRETED)


def sweep(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    row_level: Tensor,
    col_level: Tensor | None,
    price: Tensor | None,
    absolute: bool,
    capacity: int,
) -> Tensor:
    """Pairs (E, 2) int32 with ``product − price > row_level`` or ``product > col_level``, in no particular order.

    a (N, D), b (M, D) float32, bfloat16 or int8; scales, levels and prices float32, (N,) or (M,). ``capacity`` is a
    guess of E: when it is too small the sweep runs a second time with the counted size.
    """
    if a.shape[0] == 0 or b.shape[0] == 0:
        return torch.empty(0, 2, dtype=torch.int32, device=a.device)
    options = blocks("neighbours", a, a.shape[1])
    tiles = triton.cdiv(a.shape[0], options["BLOCK_N"]) * triton.cdiv(b.shape[0], options["BLOCK_M"])
    while True:
        pairs = torch.empty(max(capacity, 1), 2, dtype=torch.int32, device=a.device)
        count = torch.zeros(1, dtype=torch.int64, device=a.device)
        arguments = (
            a,
            b,
            a_scale,
            b_scale,
            row_level,
            col_level,
            price,
            pairs,
            count,
            *a.shape,
            b.shape[0],
            len(pairs),
        )
        launch(neighbours_kernel, (tiles,), a, *arguments, ABSOLUTE=absolute, **options)
        found = int(count)
        if found <= len(pairs):
            return pairs[:found]
        capacity = found


@triton.jit
def neighbours_kernel(
    a_ptr,  # (N, D)
    b_ptr,  # (M, D)
    a_scale_ptr,  # (N,) float32
    b_scale_ptr,  # (M,) float32
    row_level_ptr,  # (N,) float32
    col_level_ptr,  # (M,) float32, or None: +∞
    price_ptr,  # (M,) float32, or None: 0
    pairs_ptr,  # (capacity, 2) int32
    count_ptr,  # (1,) int64, starts at 0
    rows,
    width,
    cols,
    capacity,
    ABSOLUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    across = tl.cdiv(rows, BLOCK_N)  # neighbouring programs share b's rows
    i = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in, col_in = i < rows, j < cols
    INTEGER: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    for start in range(0, width, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        k_in = k < width
        a_at = a_ptr + i[:, None].to(tl.int64) * width + k
        b_at = b_ptr + j[None, :].to(tl.int64) * width + k[:, None]
        a = tl.load(a_at, mask=row_in[:, None] & k_in, other=0)
        b = tl.load(b_at, mask=col_in[None, :] & k_in[:, None], other=0)
        if _INTERPRETED and not INTEGER:  # its products of bfloat16 (Triton ≤ 3.9) are products of the bits
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
    scale_a = tl.load(a_scale_ptr + i, mask=row_in, other=0.0)
    scale_b = tl.load(b_scale_ptr + j, mask=col_in, other=0.0)
    product = acc.to(tl.float32) * scale_a[:, None] * scale_b
    if ABSOLUTE:
        product = tl.abs(product)
    offered = product
    if price_ptr is not None:
        offered = product - tl.load(price_ptr + j, mask=col_in, other=0.0)
    passes = offered > tl.load(row_level_ptr + i, mask=row_in, other=0.0)[:, None]
    if col_level_ptr is not None:
        passes = passes | (product > tl.load(col_level_ptr + j, mask=col_in, other=0.0))
    passes = passes & row_in[:, None] & col_in

    flat = tl.reshape(passes.to(tl.int32), (BLOCK_N * BLOCK_M,))
    found = tl.sum(flat, axis=0)
    if found > 0:
        first = tl.atomic_add(count_ptr, found.to(tl.int64))
        place = first + tl.cumsum(flat, axis=0) - 1
        stored = (flat > 0) & (place < capacity)
        row = tl.reshape(tl.broadcast_to(i[:, None], (BLOCK_N, BLOCK_M)), (BLOCK_N * BLOCK_M,))
        col = tl.reshape(tl.broadcast_to(j[None, :], (BLOCK_N, BLOCK_M)), (BLOCK_N * BLOCK_M,))
        tl.store(pairs_ptr + 2 * place, row, mask=stored)
        tl.store(pairs_ptr + 2 * place + 1, col, mask=stored)
