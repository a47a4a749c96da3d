"""Weighted sums of dictionary rows: decode's GPU side, and the encoder's dx.

    out_n = Σ_k coefficient[n, k] · s_j · W[j] (+ bias),  j = indices[n, k],  s_j = 1 / max(‖W[j]‖, 1e-12)

A program sums one token's rows over one stretch of columns. Tokens run fastest over the grid, so programs in flight
share a column stretch: of W (F, D) only F × BLOCK_D numbers are hot, 24 MB of bfloat16 at F = 46,080, which L2 holds
while the whole of W would not fit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2e_fast.kernels.reference import NORM_EPS
from e2e_fast.kernels.triton._launch import (
    accumulator,
    blocks,
    contiguous,
    launch,
    promoted,
    store_rounded,
    tl_accumulator,
)


def decode(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    normalize: bool,
    inverse_norms: Tensor | None = None,
) -> Tensor:
    """Σ_k values · weight[indices] (/ ‖weight[indices]‖) + bias: (N, D) in weight's dtype, accumulated in float32.

    values, indices (N, K), weight (F, D), bias (D,). Slots whose value is zero or negative are unused and their rows
    are not read. ``inverse_norms`` (F,), when given, saves reading weight for its norms. An index outside [0, F) is
    undefined behaviour: checking would wait for the GPU.
    """
    scale = None
    if normalize:
        scale = row_inverse_norms(weight) if inverse_norms is None else inverse_norms
    return gather_rows(values, indices, weight, bias, scale, positive=True)


def row_inverse_norms(weight: Tensor) -> Tensor:
    """``1 / max(‖row‖, 1e-12)`` of each row of weight (F, D): (F,) float32, or float64 for float64 weights."""
    norms = torch.linalg.vector_norm(weight, dim=-1, dtype=accumulator(weight.dtype))
    return norms.clamp_min(NORM_EPS).reciprocal()


def gather_rows(
    coefficients: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *, positive: bool
) -> Tensor:
    """``Σ_k coefficients[n, k] · scale[j] · weight[j] + bias`` → (N, D) in weight's dtype.

    Slots whose coefficient is 0 (with ``positive``: or negative) are skipped.
    """
    N, K = coefficients.shape
    D = weight.shape[1]
    out = weight.new_empty(N, D)
    if N == 0:
        return out
    options = blocks("gather_rows", weight)
    launch(
        gather_rows_kernel, (N, triton.cdiv(D, options["BLOCK_D"])), weight,
        coefficients.contiguous(), indices.contiguous(), weight.contiguous(), contiguous(bias),
        contiguous(scale), out, K, D,
        POSITIVE=positive, ACC=tl_accumulator(promoted(coefficients, weight)), **options,
    )  # fmt: skip
    return out


@triton.jit
def gather_rows_kernel(
    coefficients_ptr,  # (N, K)
    indices_ptr,  # (N, K)
    weight_ptr,  # (F, D)
    bias_ptr,  # (D,) or None
    scale_ptr,  # (F,) or None
    out_ptr,  # (N, D)
    K,
    D,
    POSITIVE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_K rows are in flight at a time, each with its own partial sum: one reduction, after the loop."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    total = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    for start in range(0, K, BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        c = tl.load(coefficients_ptr + row * K + slots, mask=slots < K, other=0.0).to(ACC)
        # "Not zero" and "not ≤ 0" keep NaN, which then shows in the result.
        used = (c <= 0) ^ True if POSITIVE else c != 0
        j = tl.load(indices_ptr + row * K + slots, mask=(slots < K) & used, other=0).to(tl.int64)
        if scale_ptr is not None:
            c *= tl.load(scale_ptr + j, mask=used, other=0.0).to(ACC)
        addresses = weight_ptr + j[:, None] * D + cols[None, :]
        w = tl.load(addresses, mask=used[:, None] & inside[None, :], other=0.0).to(ACC)
        total += tl.where(used, c, 0.0)[:, None] * w
    out = tl.sum(total, 0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    store_rounded(out_ptr + row * D + cols, out, inside)
