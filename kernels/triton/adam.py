"""Exact Adam in one pass over a weight matrix, with the next forward's by-products: row norms and a bfloat16 copy.

    g = clip · grad (+ weight_decay · p)
    m ← m + (1 - β₁)(g - m)            v ← β₂ v + (1 - β₂) g²
    p ← p - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

The semantics of ``torch.optim.Adam``, up to the order of rounding. Per parameter 28 bytes are moved in float32 (grad,
p, m, v read; p, m, v written) and 2 more for the bfloat16 copy. A row is in registers once, so 1/‖row‖ costs nothing:
the decoder's normalisation needs no pass of its own.
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
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    clip_coefficient: Tensor | None = None,
    weight_decay: float = 0.0,
    inverse_norms: Tensor | None = None,
    shadow: Tensor | None = None,
) -> None:
    """Updates param, exp_avg and exp_avg_sq in place, and fills ``inverse_norms`` and ``shadow`` where they are given.

    param, grad, exp_avg, exp_avg_sq (F, D), or (F,), which counts as one row; all but grad contiguous and of one
    dtype. ``step`` counts from 1: the number of this update. ``clip_coefficient`` (1,) or () scales the gradient and
    stays on the device, as `torch.nn.utils.clip_grad_norm_` computes it: min(1, max_norm / ‖all gradients‖).
    ``inverse_norms`` (F,) float32 receives 1 / max(‖new row‖, 1e-12); ``shadow``, shaped like param, its rounded copy.
    Raises ValueError for a step below 1 and for tensors that do not fit.
    """
    if step < 1:
        raise ValueError(f"step must count from 1, got {step}")
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("shadow", shadow)):
        if tensor is not None and tensor.shape != param.shape:
            raise ValueError(f"{name} must have param's shape {tuple(param.shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("shadow", shadow)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is updated in place and must be contiguous, got strides {tensor.stride()}")
    D = param.shape[-1]
    rows = param.numel() // max(1, D)
    if inverse_norms is not None and inverse_norms.shape != (rows,):
        raise ValueError(f"inverse_norms must have shape ({rows},), got {tuple(inverse_norms.shape)}")
    if rows == 0 or D == 0:
        return
    beta1, beta2 = betas
    options = blocks("adam", param, D)
    # Without norms rows have no meaning, and a long one (a bias) is split over programs.
    pieces = 1 if inverse_norms is not None else triton.cdiv(D, options["BLOCK"])
    launch(
        adam_kernel, (rows, pieces), param,
        param, grad.contiguous(), exp_avg, exp_avg_sq, clip_coefficient, inverse_norms, shadow, D,
        lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), 1 - beta1, beta2, 1 - beta2,
        eps, weight_decay, NORM_EPS,
        ACC=tl_accumulator(param.dtype), **options,
    )  # fmt: skip


@triton.jit
def adam_kernel(
    param_ptr,  # (F, D) updated
    grad_ptr,  # (F, D)
    exp_avg_ptr,  # (F, D) updated
    exp_avg_sq_ptr,  # (F, D) updated
    clip_ptr,  # (1,) or None
    inverse_norms_ptr,  # (F,) out, or None
    shadow_ptr,  # (F, D) out, or None
    D,
    step_size,
    inverse_root,  # 1 / √(1 - β₂ᵗ)
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
