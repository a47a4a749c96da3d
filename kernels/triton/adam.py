"""Exact Adam in one pass over a weight matrix, with the next forward's by-products: row norms and a bfloat16 copy.

    g = clip · grad (+ weight_decay · p)
    m ← m + (1 - β₁)(g - m)            v ← β₂ v + (1 - β₂) g²
    p ← p - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

The semantics of ``torch.optim.Adam``, up to the order of rounding. Per parameter 28 bytes are moved in float32 (grad,
p, m, v read; p, m, v written) and 2 more for the bfloat16 copy. A row is in registers once, so 1/‖row‖ costs nothing:
the decoder's normalisation needs no pass of its own. The step t and lr are read from the device, so a captured CUDA
graph goes on counting; 1 - βᵗ, a difference of near numbers, is formed in float64 by every program for itself.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from e2e_fast.kernels.reference import NORM_EPS
from e2e_fast.kernels.triton._launch import blocks, launch, store_rounded, tl_accumulator


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    clip_coefficient: Tensor | None = None,
    inverse_norms: Tensor | None = None,
    shadow: Tensor | None = None,
) -> None:
    """``e2e_fast.kernels.adam_step`` for tensors that it has checked: one launch, no synchronisation."""
    D = param.shape[-1] if param.dim() else 1
    rows = param.numel() // max(1, D)
    if param.numel() == 0:
        return
    beta1, beta2 = betas
    options = blocks("adam", param, D)
    # Without norms rows have no meaning, and a long one (a bias) is split over programs.
    pieces = 1 if inverse_norms is not None else triton.cdiv(D, options["BLOCK"])
    launch(
        adam_kernel, (rows, pieces), param,
        param, grad.contiguous(), exp_avg, exp_avg_sq, step, lr, clip_coefficient, inverse_norms, shadow, D,
        math.log(beta1) if beta1 else -math.inf, math.log(beta2) if beta2 else -math.inf,
        1 - beta1, beta2, 1 - beta2, eps, weight_decay, NORM_EPS,
        ACC=tl_accumulator(param.dtype), **options,
    )  # fmt: skip


@triton.jit
def adam_kernel(
    param_ptr,  # (F, D) updated
    grad_ptr,  # (F, D)
    exp_avg_ptr,  # (F, D) updated
    exp_avg_sq_ptr,  # (F, D) updated
    step_ptr,  # () the number of this update, from 1
    lr_ptr,  # ()
    clip_ptr,  # () or None
    inverse_norms_ptr,  # (F,) out, or None
    shadow_ptr,  # (F, D) out, or None
    D,
    log_beta1,
    log_beta2,
    gain1,  # 1 - β₁
    beta2,
    gain2,  # 1 - β₂
    eps,
    weight_decay,
    norm_eps,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program where its norm is wanted, else one block of it: the grid's second axis."""
    offset = tl.program_id(0).to(tl.int64) * D
    t = tl.load(step_ptr).to(tl.float64)
    step_size = (tl.load(lr_ptr).to(tl.float64) / (1.0 - tl.exp(t * log_beta1))).to(ACC)
    inverse_root = (1.0 / tl.sqrt(1.0 - tl.exp(t * log_beta2))).to(ACC)
    clip = 1.0
    if clip_ptr is not None:
        clip = tl.load(clip_ptr).to(ACC)
    squares = tl.zeros((BLOCK,), ACC)
    for start in range(tl.program_id(1) * BLOCK, D, BLOCK * tl.num_programs(1)):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < D
        at = offset + cols
        p = tl.load(param_ptr + at, mask=inside, other=0.0).to(ACC)
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(ACC) * clip + weight_decay * p
        m = tl.load(exp_avg_ptr + at, mask=inside, other=0.0).to(ACC)
        v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0).to(ACC)
        m += gain1 * (g - m)
        v = beta2 * v + gain2 * g * g
        p -= step_size * (m / (tl.sqrt(v) * inverse_root + eps))
        store_rounded(param_ptr + at, p, inside)
        store_rounded(exp_avg_ptr + at, m, inside)
        store_rounded(exp_avg_sq_ptr + at, v, inside)
        if shadow_ptr is not None:
            store_rounded(shadow_ptr + at, p, inside)
        squares += tl.where(inside, p * p, 0.0)
    if inverse_norms_ptr is not None:
        norm = tl.sqrt(tl.sum(squares, 0))
        tl.store(inverse_norms_ptr + tl.program_id(0), 1.0 / tl.maximum(norm, norm_eps))
