"""KL over the vocabulary and its gradient from hidden states, without the N×V logits: linear_kl's GPU side.

    z_t = h_t Wᵀ + b,  z_s = h_s Wᵀ + b         capped by c·tanh(z / c) where the model does that
    loss = Σ_v p_t (log p_t - log p_s) = E_t[z_t - z_s] - lse(z_t) + lse(z_s)
    d loss / d h_s = (p_s - p_t) W              with the cap: each entry times 1 - (z_s / c)²

Rows go through in chunks: two products give float32 logits, `kl_rows_kernel` turns a pair of rows into the loss and
the difference p_s - p_t, and a third product takes that back to d. So the gradient is ready with the loss: three
products in all, and W, frozen, never gets one. Logits stay in float32 up to the difference; only the difference is
rounded to the model's dtype. With bfloat16 logits the gradient is off by 12 % at a KL of 0.15, by 40 % at 0.013.

`linear_kl_dual.py` holds another way, for narrow 16-bit models, taken where `_launch.VARIANTS` says so.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from e2e_fast.kernels.triton._launch import (
    accumulator,
    blocks,
    contiguous,
    launch,
    mm_accumulated,
    promoted,
    row_chunks,
    store_rounded,
    tl_accumulator,
    variant,
)
from e2e_fast.kernels.triton.linear_kl_dual import linear_kl_dual, serves

CHUNK_BYTES = 2 << 30
"""Scratch for one chunk of rows: both logits and their difference."""

ALIGNMENT = 64
"""Vocabulary rows are padded to a multiple of this: odd sizes such as 50,257 defeat aligned loads and matrix units."""


def linear_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss of every token (N,) in nats, float32, and the gradient (N, D) of their *sum* with respect to ``student``.

    student, teacher (N, D), weight (V, D), bias (V,); products are taken in the promoted dtype of the first three, and
    with float64 the loss is float64 too. The gradient has student's dtype; without ``need_grad`` it is empty (shape
    (0,)) and its product is saved.
    A teacher logit of -inf is legal (probability 0); a student logit of -inf where the teacher's is not gives inf.
    Nothing waits for the GPU, and identical inputs give exactly 0.
    """
    dtype, D = promoted(student, teacher, weight), student.shape[1]
    bias = contiguous(bias)
    way = variant("linear_kl", student, D)
    if way != "logits" and serves(dtype, D, softcap):
        padded = padded_unembedding(weight, dtype)
        return linear_kl_dual(student, teacher, padded, len(weight), bias, need_grad, combine=way == "dual_combine")
    loss, gradient = linear_kl_shared(student[None], teacher, weight, bias, softcap, need_grad)
    return loss[0], gradient[0] if need_grad else gradient


def linear_kl_shared(
    students: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """`linear_kl` of S students (S, N, D) against one teacher (N, D): 1 + 2·S products instead of 3·S.

    Returns losses (S, N) and gradients (S, N, D), the latter empty (shape (0,)) without ``need_grad``.
    """
    S, N, _ = students.shape
    V = weight.shape[0]
    dtype = promoted(students, teacher, weight)
    acc, bias = accumulator(dtype), contiguous(bias)
    padded = padded_unembedding(weight, dtype)
    stride = padded.shape[0]
    # float16 holds nothing below 6e-8: probabilities are scaled into its range, and back after the product.
    scale = 1024.0 if dtype == torch.float16 else 1.0
    loss = students.new_empty(S, N, dtype=acc)
    gradient = torch.empty_like(students, memory_format=torch.contiguous_format) if need_grad else students.new_empty(0)
    bytes_per_row = stride * (2 * acc.itemsize + dtype.itemsize)
    for start, stop in row_chunks(N, bytes_per_row, CHUNK_BYTES):
        z_teacher = mm_accumulated(teacher[start:stop].to(dtype), padded.t())
        tile = students.new_empty(stop - start, stride, dtype=dtype) if need_grad else None
        for s in range(S):
            z_student = mm_accumulated(students[s, start:stop].to(dtype), padded.t())
            launch(
                kl_rows_kernel, (stop - start,), students,
                z_student, z_teacher, bias, loss[s, start:stop], tile, V, stride, softcap, scale,
                ACC=tl_accumulator(dtype), **blocks("kl_rows", students),
            )  # fmt: skip
            del z_student  # its memory serves the next product
            if tile is not None:
                gradient[s, start:stop] = mm_accumulated(tile, padded) / scale
        del z_teacher, tile
    return loss, gradient


_padded: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of each weight its padded copies by dtype, with the version of the weight that they show."""


def padded_unembedding(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (V, D) as a contiguous matrix of this dtype, its row count a multiple of `ALIGNMENT`; added rows are zero.

    The copy is made once and lives as long as ``weight`` does, at one address, as recorded CUDA graphs need it; when
    ``weight`` was changed in place it is filled anew. A matrix that has this form already is returned as it is.
    """
    V, D = weight.shape
    if V % ALIGNMENT == 0 and weight.is_contiguous() and weight.dtype == dtype:
        return weight
    known = not weight.is_inference()  # inference tensors count no versions, so a stale copy could not be told
    copies = _padded.get(weight, {}) if known else {}
    version, copy = copies.get(dtype, (None, None))
    if copy is not None and version == weight._version:
        return copy
    if copy is None:
        with torch.inference_mode(False):  # else it could not be filled anew outside of one
            copy = weight.new_zeros(triton.cdiv(V, ALIGNMENT) * ALIGNMENT, D, dtype=dtype)
    copy[:V] = weight.detach()
    recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if known and not recording:  # what is recorded is not done yet
        _padded[weight] = copies | {dtype: (weight._version, copy)}
    return copy


@triton.jit
def kl_rows_kernel(
    student_ptr,  # (C, stride) logits, accumulator dtype
    teacher_ptr,  # (C, stride)
    bias_ptr,  # (V,) or None
    loss_ptr,  # (C,)
    tile_ptr,  # (C, stride) p_s - p_t in the model's dtype, zero in the padding; or None
    vocab,
    stride,
    softcap,  # number or None
    scale,  # of the differences
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: a pass for maxima, sums and E_t[z_t - z_s], a pass for the difference.

    Exact up to rounding: sums are rescaled when a maximum rises. Two exponentials an entry and pass; the second pass
    finds in L2 what fits there.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * stride
    teacher_ptr += row * stride
    max_t = tl.full((), float("-inf"), ACC)
    max_s = tl.full((), float("-inf"), ACC)
    sum_t = tl.zeros((), ACC)
    sum_s = tl.zeros((), ACC)
    cross = tl.zeros((), ACC)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z_t = _logits(teacher_ptr, bias_ptr, cols, vocab, stride, softcap, ACC)
        z_s = _logits(student_ptr, bias_ptr, cols, vocab, stride, softcap, ACC)
        new_t = tl.maximum(max_t, tl.max(z_t, 0))
        new_s = tl.maximum(max_s, tl.max(z_s, 0))
        e_t = tl.exp(z_t - _finite(new_t))
        e_s = tl.exp(z_s - _finite(new_s))
        rescale_t = tl.exp(max_t - _finite(new_t))
        rescale_s = tl.exp(max_s - _finite(new_s))
        sum_t = sum_t * rescale_t + tl.sum(e_t, 0)
        sum_s = sum_s * rescale_s + tl.sum(e_s, 0)
        # Where e_t is 0 the term is 0, also when a logit is -inf; forming 0 · inf would give NaN.
        cross = cross * rescale_t + tl.sum(tl.where(e_t > 0, e_t * (z_t - z_s), 0.0), 0)
        max_t = new_t
        max_s = new_s
    log_t = tl.log(sum_t)
    log_s = tl.log(sum_s)
    tl.store(loss_ptr + row, cross / sum_t + (max_s - max_t) + (log_s - log_t))
    if tile_ptr is not None:
        tile_ptr += row * stride
        for start in range(0, stride, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z_t = _logits(teacher_ptr, bias_ptr, cols, vocab, stride, softcap, ACC)
            z_s = _logits(student_ptr, bias_ptr, cols, vocab, stride, softcap, ACC)
            # The sums sit in the exponents: a product or quotient could be fused with the subtraction on one side only,
            # and then equal inputs would not cancel.
            difference = tl.exp(z_s - max_s - log_s) - tl.exp(z_t - max_t - log_t)
            if softcap is not None:
                difference *= 1.0 - (z_s / softcap) * (z_s / softcap)
            store_rounded(tile_ptr + cols, tl.where(cols < vocab, difference * scale, 0.0), cols < stride)


@triton.jit
def _logits(row_ptr, bias_ptr, cols, vocab, stride, softcap, ACC: tl.constexpr):
    """Logits of one block with bias and cap; -inf outside the vocabulary."""
    inside = cols < vocab
    # Masked by the stride, a multiple of 64, instead of the vocabulary: so the load stays 16 bytes wide.
    z = tl.load(row_ptr + cols, mask=cols < stride, other=0.0).to(ACC)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    if softcap is not None:
        decay = tl.exp(-2.0 * tl.abs(z / softcap))
        magnitude = softcap * ((1.0 - decay) / (1.0 + decay))
        z = tl.where(z < 0, -magnitude, magnitude)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _finite(shift):
    """The shift of an exponential; 0 while everything seen is -inf, since -inf - (-inf) is NaN."""
    return tl.where(shift == float("-inf"), 0.0, shift)
