"""Encoder scores whose product's epilogue writes only what may be among a row's k largest: a variant of `encode_topk`.

    z = x W_encᵀ + b                in tiles of rows × features
    G[n, j] = max of group j        as keys, for every GROUP neighbouring features
    z[n, j, :]                      written only if G[n, j] ≥ t_n

**The bound.** Groups are disjoint, so the k-th largest of any k or more group maxima is a lower bound of the k-th
largest score: a group whose maximum is lower holds no winner. Every eighth tile of features goes first, with nothing
held back; the k-th largest of its maxima is t_n, and the other seven eighths are held to it. Tiles taken at a stride
see features that are sorted by cluster as well as others. About 8·k scores a row exceed t_n, in 8·k groups at most.

**The selection** is that of `encode.topk_scan_kernel`: the k-th largest of all group maxima is a tighter bound, about
k groups reach it, and only these are read; unwritten ones lie below it. So the result is exact whatever the scores are:
many ties, or winners in few groups, cost time and nothing else. No atomics, and the same bits on every run.

Counted for normal scores at k = 64: of F = 46,080 scores 43 % are written and 4 % read (F = 131,072: 23 % and 2 %),
where float32 scores from cuBLAS are all written and read twice. That pays only if this product keeps up with cuBLAS's:
`_launch.VARIANTS` decides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2e_fast.kernels.triton._launch import INTERPRETED, blocks, launch

FIRST_OF = 8
"""One tile of features in this many goes first and sets the bound for the others."""

_FIRST_OF = tl.constexpr(FIRST_OF)
_INTERPRETED = tl.constexpr(INTERPRETED)


def serves(dtype: torch.dtype, width: int) -> bool:
    """Whether this variant computes such products: in 16 bits, D a multiple of 16."""
    return dtype in (torch.bfloat16, torch.float16) and width % 16 == 0


def promising_scores(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor, int]:
    """Scores (C, F), float32, written where a group may hold one of the row's k largest; keys of the groups' maxima.

    x (C, D) and weight (F, D), contiguous, of one 16-bit dtype; bias (F,). The second result is (C, groups) int32, the
    third the number of features a group spans. What is not written is whatever the memory held.
    """
    (C, D), F = x.shape, weight.shape[0]
    options = blocks("topk_gemm", x)
    tiles = triton.cdiv(F, options["BLOCK_F"])
    groups = tiles * (options["BLOCK_F"] // options["GROUP"])
    first = triton.cdiv(tiles, FIRST_OF)
    z = x.new_empty(C, F, dtype=torch.float32)
    group_max = x.new_empty(C, groups, dtype=torch.int32)
    bound = x.new_empty(C, dtype=torch.int32)
    row_tiles = triton.cdiv(C, options["BLOCK_R"])
    tensors = (x, weight, bias, None, z, group_max, C, D, F, groups)
    launch(topk_gemm_kernel, (row_tiles * first,), x, *tensors, **options)
    if tiles > first:
        launch(
            topk_bound_kernel, (C,), x,
            group_max, bound, groups, first, k,
            PER_TILE=options["BLOCK_F"] // options["GROUP"], **blocks("topk_bound", x),
        )  # fmt: skip
        tensors = (x, weight, bias, bound, z, group_max, C, D, F, groups)
        launch(topk_gemm_kernel, (row_tiles * (tiles - first),), x, *tensors, **options)
    return z, group_max, options["GROUP"]


@triton.jit
def topk_gemm_kernel(
    x_ptr,  # (C, D)
    weight_ptr,  # (F, D)
    bias_ptr,  # (F,) or None
    bound_ptr,  # (C,) keys ≥ 1: the tiles are those not first, and only groups that reach these are written; or None
    z_ptr,  # (C, F) out
    group_max_ptr,  # (C, groups) out
    rows,
    width,
    F,
    groups,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,  # divides BLOCK_F
):
    """One tile a program; those of the same features follow each other, so that W comes from memory once."""
    row_tiles = tl.cdiv(rows, BLOCK_R)
    place = tl.program_id(0) // row_tiles
    if bound_ptr is None:
        tile = place * _FIRST_OF
    else:
        tile = place // (_FIRST_OF - 1) * _FIRST_OF + place % (_FIRST_OF - 1) + 1
    row = tl.program_id(0) % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    feature = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * width
    w_rows = weight_ptr + feature.to(tl.int64)[:, None] * width
    z = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for k in range(0, width, BLOCK_D):
        d = k + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d, mask=inside[:, None] & (d < width), other=0.0)
        w = tl.load(w_rows + d, mask=(feature < F)[:, None] & (d < width), other=0.0)
        if _INTERPRETED:  # its products of bfloat16 (Triton ≤ 3.9) are products of the bits
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(x, tl.trans(w), z)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + feature, mask=feature < F, other=0.0).to(tl.float32)
    z = tl.reshape(z, (BLOCK_R, BLOCK_F // GROUP, GROUP))
    group = tl.arange(0, BLOCK_F // GROUP)
    feature = tile * BLOCK_F + group[:, None] * GROUP + tl.arange(0, GROUP)
    largest = tl.max(tl.where((feature < F)[None, :, :], score_key(z), 0), 2)
    group = tile * (BLOCK_F // GROUP) + group
    tl.store(group_max_ptr + row.to(tl.int64)[:, None] * groups + group, largest, mask=inside[:, None])
    written = inside[:, None, None] & (feature < F)[None, :, :]
    if bound_ptr is not None:
        bound = tl.load(bound_ptr + row, mask=inside, other=0)
        written &= (largest >= bound[:, None])[:, :, None]
    tl.store(z_ptr + row.to(tl.int64)[:, None, None] * F + feature, z, mask=written)


@triton.jit
def topk_bound_kernel(
    group_max_ptr,  # (C, groups)
    bound_ptr,  # (C,) out
    groups,
    first,  # tiles that went first
    k,
    PER_TILE: tl.constexpr,  # groups of a tile
    BLOCK: tl.constexpr,
):
    """One row a program: the k-th largest key of the tiles that went first, or 1 where fewer than k are positive."""
    group_max_ptr += tl.program_id(0).to(tl.int64) * groups
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, first * PER_TILE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        group = i // PER_TILE * (_FIRST_OF * PER_TILE) + i % PER_TILE
        largest = tl.maximum(largest, tl.load(group_max_ptr + group, mask=i < first * PER_TILE, other=0))
    tl.store(bound_ptr + tl.program_id(0), kth_largest_key(largest, k, 31))


@triton.jit
def kth_largest_key(keys, k, BITS: tl.constexpr):
    """The k-th largest of these keys, bit by bit; 1, a positive score's least, if fewer than k are positive."""
    one = tl.full((), 1, keys.dtype)
    kth = tl.zeros((), keys.dtype)
    for i in range(BITS):
        candidate = kth | (one << (BITS - 1 - i))
        kth = tl.where(tl.sum((keys >= candidate).to(tl.int32), 0) >= k, candidate, kth)
    return tl.maximum(kth, one)


@triton.jit
def score_key(z):
    """Order-preserving integers of positive scores: 0 for what is not positive, the greatest for NaN."""
    if z.dtype == tl.float64:
        key = tl.where(z != z, 0x7FFFFFFFFFFFFFFF, tl.where(z > 0, z.to(tl.int64, bitcast=True), 0))
    else:
        key = tl.where(z != z, 0x7FFFFFFF, tl.where(z > 0, z.to(tl.int32, bitcast=True), 0))
    return key
