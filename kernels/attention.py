"""Causal softmax attention: every token attends to itself and to the tokens before it, or to the last few of them.

    s_ij = scale · q_i · k_j    or    softcap · tanh(scale · q_i · k_j / softcap),      for i - window < j ≤ i
    p_ij = e^s_ij / Σ_j' e^s_ij'      out_i = Σ_j p_ij v_j

    from g = ∂L/∂out:    dv_j = Σ_i p_ij g_i    ds_ij = p_ij (g_i · v_j - g_i · out_i)    (Dao et al. 2022)
                         dq_i = scale Σ_j ds_ij k_j    dk_j = scale Σ_i ds_ij q_i    (ds times 1 - (s/softcap)²)

For the frozen language model on a CPU in float32: attention is the largest part of a small model's blocks, and torch
runs it at a third of the processor's rate where heads are narrow. Everything else (float64, a GPU, no compiled core)
goes to torch.

Operator: ``e2e_fast::attention(q, k, v, scale, window, softcap) -> (out, softmax)``; softmax (2, B, H, T), each row's
greatest score and the inverse of its sum, is what the gradient starts from.

>>> import torch
>>> q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
>>> out = attention(q, k, v, scale=8**-0.5)
>>> out.shape
torch.Size([2, 5, 4, 8])
>>> torch.allclose(out[:, 0], v[:, :, 0].repeat_interleave(2, dim=1))
True
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from e2e_fast.kernels import reference
from e2e_fast.kernels._buffers import empty
from e2e_fast.kernels._native import array, direct, has_native, native

ALL = 1 << 30
"""The window of an attention that has none, tokens."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """``softmax(scale · q kᵀ, over keys up to the query's own token) v``, tokens before heads in the result.

    q (B, H, T, D), k and v (B, K, T, D), K a divisor of H: query head h reads key head h // (H / K). Returns
    (B, T, H, D), as an output projection reads it. ``window``: a token attends to so many, itself among them.
    ``softcap`` bounds the scores by c · tanh(s / c). Any strides. NaN and infinities of a token may reach up to 47
    tokens before it. Once differentiable. Raises ValueError on shapes that do not fit and on a window or softcap that
    is not positive.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q (B, H, T, D) must have a multiple of k's heads, got {tuple(q.shape)}, {tuple(k.shape)}")
    expected = (q.shape[0], k.shape[1], *q.shape[2:])
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"k and v must have shape {expected}, got {tuple(k.shape)} and {tuple(v.shape)}")
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"window and softcap must be positive or None, got {window} and {softcap}")
    if q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.float32 and has_native():
        run = _forward if direct(q, k, v) else _attention
        return run(q, k, v, scale, window or ALL, softcap or 0.0)[0]
    if softcap is not None:
        return reference.attention(q, k, v, scale=scale, window=window, softcap=softcap)
    seen = None if window is None or window >= q.shape[2] else reference.seen_keys(q.shape[2], window, q.device)
    out = nnf.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    core, (B, H, T, D), threads = native(), q.shape, torch.get_num_threads()
    assert core is not None, "attention() takes torch's where the core is missing"
    out, softmax = q.new_empty(B, T, H, D), q.new_empty(2, B, H, T)
    scratch = empty(core.attention_scratch(B, H, k.shape[1], T, D, False, threads))
    core.attention(
        *map(_rows, (q, k, v)), scale, window, softcap,
        out.transpose(1, 2).numpy(), softmax.numpy(), array(scratch), threads,
    )  # fmt: skip
    return out, softmax


_attention = torch.library.custom_op("e2e_fast::attention", _forward, mutates_args=(), device_types="cpu")


def _rows(x: Tensor) -> object:
    """A NumPy view whose last axis is contiguous."""
    x = x.detach()
    return (x if x.stride(-1) == 1 else x.contiguous()).numpy()


@_attention.register_fake
def _(q, k, v, scale, window, softcap):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(2, B, H, T)


@torch.library.custom_op("e2e_fast::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    softcap: float,
    out: Tensor,
    softmax: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, T, H, D), dk and dv (B, T, K, D)."""
    core, (B, H, T, D), K, threads = native(), q.shape, k.shape[1], torch.get_num_threads()
    assert core is not None, "attention() takes torch's where the core is missing"
    gradients = q.new_empty(B, T, H, D), q.new_empty(B, T, K, D), q.new_empty(B, T, K, D)
    scratch = empty(core.attention_scratch(B, H, K, T, D, True, threads))
    core.attention_gradient(
        *map(_rows, (q, k, v)), scale, window, softcap,
        out.transpose(1, 2).numpy(), array(softmax), _rows(dout.transpose(1, 2)),
        *(g.transpose(1, 2).numpy() for g in gradients), array(scratch), threads,
    )  # fmt: skip
    return gradients


@_attention_backward.register_fake
def _(q, k, v, scale, window, softcap, out, softmax, dout):
    (B, H, T, D), K = q.shape, k.shape[1]
    return q.new_empty(B, T, H, D), q.new_empty(B, T, K, D), q.new_empty(B, T, K, D)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output)


@once_differentiable
def _backward(ctx, dout, _):
    if dout is None:
        return None, None, None, None, None, None
    q, k, v, out, softmax = ctx.saved_tensors
    dq, dk, dv = _attention_backward(q, k, v, *ctx.options, out, softmax, dout)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
