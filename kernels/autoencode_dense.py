"""A ReLU or JumpReLU autoencoder by matrix products, for codes with many active features.

    c = activation(x W_encᵀ + b_enc),  x̂ = c U + b_dec                       rows u_j = W_dec[j] / ‖W_dec[j]‖
    dc = g Uᵀ + dvalues,  dz = dc where c > 0,  dW_enc = dzᵀ x,  db_enc = Σ_n dz,  dx = dz W_enc
    dW_dec[j] = (a_j - (a_j · u_j) u_j) / ‖W_dec[j]‖,  a = cᵀ g

Forward and backward go over blocks of features: beside c (N, F) nothing of its size is made (JumpReLU: band, N × F
bool), and no unit copy of W_dec. The thresholds' gradients are those of `e2e_fast.kernels.encode`.
`e2e_fast.kernels.autoencode` chooses between this and the sparse form.

Operators:
``e2e_fast::autoencode_dense(x, W_enc, b_enc?, W_dec, b_dec?, normalize, threshold?, bandwidth, inverse_norms?) ->
(x_hat, c, l0, band)``, l0 and band empty for ReLU; ``e2e_fast::autoencode_dense_backward``, its gradient.

>>> import torch
>>> x, W_enc, W_dec = torch.randn(4, 8), torch.randn(32, 8), torch.randn(32, 8)
>>> x_hat, c, _, _ = autoencode_dense(x, W_enc, None, W_dec, None, True, None, 0.0, None)
>>> torch.allclose(c, torch.relu(x @ W_enc.T), atol=1e-4)
True
"""

import torch
from torch import Tensor

from e2e_fast.kernels._buffers import empty_like
from e2e_fast.kernels._checks import accumulator
from e2e_fast.kernels._gemm import CHUNK_BYTES, linear, row_chunks
from e2e_fast.kernels.code_backward import tangent
from e2e_fast.kernels.decode import row_inverse_norms

GPU_CHUNK_BYTES = 1 << 30
"""As `e2e_fast.kernels._gemm.CHUNK_BYTES`, for the blocks on a GPU."""


@torch.library.custom_op("e2e_fast::autoencode_dense", mutates_args=())
def autoencode_dense(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    normalize: bool,
    threshold: Tensor | None,
    bandwidth: float,
    inverse_norms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, _), F = x.shape, W_enc.shape[0]
    dtype, wide = torch.promote_types(x.dtype, W_enc.dtype), accumulator(x, W_enc)
    inner, b = x.to(dtype), None if b_enc is None else b_enc.to(wide)
    values = x.new_empty(N, F, dtype=dtype)
    band = x.new_empty(N, 0 if threshold is None else F, dtype=torch.bool)
    l0 = x.new_zeros(0 if threshold is None else N, dtype=wide)
    x_hat = W_dec.new_zeros(N, W_dec.shape[1], dtype=accumulator(W_dec))
    if b_dec is not None:
        x_hat += b_dec
    for block in _feature_blocks(values):
        bias = None if b is None else b[block]
        if threshold is None:
            c = linear(inner, W_enc[block].to(dtype), None if bias is None else bias.to(dtype)).relu_()
        else:
            z, theta = _accumulated(inner, W_enc[block].to(dtype), bias), threshold[block].to(wide)
            c = z.masked_fill((z <= theta) | (z <= 0), 0).to(dtype)
            band[:, block] = ((z - theta).abs() < bandwidth / 2) & (z > 0)
            l0 += (~(c <= 0)).sum(-1)
        values[:, block] = c
        _add_product(x_hat, c.to(W_dec.dtype), _unit(W_dec, block, normalize, inverse_norms))
    return x_hat.to(W_dec.dtype), values, l0, band


def _accumulated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in the accumulator's dtype: a 16-bit score cannot tell which side of θ it is on."""
    if x.is_cuda:
        from e2e_fast.kernels.triton._launch import mm_accumulated

        z = mm_accumulated(x, weight.t())
        return z if bias is None else z.add_(bias)
    wide = accumulator(x)
    return linear(x.to(wide), weight.to(wide), bias)


def _feature_blocks(values: Tensor):
    """Blocks of features whose (N, block) matrices fit a chunk: nothing else of size N × F is made beside the code."""
    budget = CHUNK_BYTES if values.device.type == "cpu" else GPU_CHUNK_BYTES
    return row_chunks(values.shape[1], values.element_size() * values.shape[0], budget)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` where total may be wider than a and b."""
    if total.is_cuda and total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b if a.is_cuda else linear(a, b.t())


def _unit(W_dec: Tensor, block: slice, normalize: bool, inverse_norms: Tensor | None) -> Tensor:
    rows = W_dec[block]
    if not normalize:
        return rows
    # Scaled before it is rounded: 1 / ‖row‖ of a short row is beyond float16.
    return (rows * _scale(rows, block, inverse_norms)[:, None]).to(rows.dtype)


def _scale(rows: Tensor, block: slice, inverse_norms: Tensor | None) -> Tensor:
    return row_inverse_norms(rows) if inverse_norms is None else inverse_norms[block]


@autoencode_dense.register_fake
def _(x, W_enc, b_enc, W_dec, b_dec, normalize, threshold, bandwidth, inverse_norms):
    (N, _), F = x.shape, W_enc.shape[0]
    jump = threshold is not None
    return (
        W_dec.new_empty(N, W_dec.shape[1]),
        x.new_empty(N, F, dtype=torch.promote_types(x.dtype, W_enc.dtype)),
        x.new_empty(N if jump else 0, dtype=accumulator(x, W_enc)),
        x.new_empty(N, F if jump else 0, dtype=torch.bool),
    )


def _setup_context(ctx, inputs, output):
    x, W_enc, b_enc, W_dec, b_dec, ctx.normalize, threshold, ctx.bandwidth, inverse_norms = inputs
    _, values, _, band = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, W_dec, values, band, threshold, inverse_norms)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_enc, b_dec)]


def _backward(ctx, g, dvalues, dl0, dband):
    if g is None and dvalues is None and dl0 is None:
        return (None,) * 9
    x, W_enc, W_dec, values, band, threshold, inverse_norms = ctx.saved_tensors
    need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec, _, need_threshold, *_ = ctx.needs_input_grad
    enc_dtype, dec_dtype = ctx.bias_dtypes
    need_W_dec = need_W_dec and g is not None
    if g is None and dvalues is None:  # a gradient of the L0 reaches the thresholds alone
        need_x = need_W_enc = need_b_enc = False
    dW_dec, dW_enc, db_enc, dx, dthreshold = _dense_backward(
        values, dvalues, g, W_dec, x, W_enc, ctx.normalize, need_W_dec, need_W_enc, need_x,
        threshold if need_threshold else None, band, dl0, ctx.bandwidth, inverse_norms,
    )  # fmt: skip
    return (
        dx if need_x else None,
        dW_enc if need_W_enc else None,
        db_enc.to(enc_dtype) if need_b_enc and enc_dtype is not None else None,
        dW_dec if need_W_dec else None,
        sum_rows(g, dec_dtype) if need_b_dec and g is not None and dec_dtype is not None else None,
        None,
        dthreshold if need_threshold else None,
        None,
        None,
    )


@torch.library.custom_op("e2e_fast::autoencode_dense_backward", mutates_args=())
def _dense_backward(
    values: Tensor,
    dvalues: Tensor | None,
    g: Tensor | None,
    W_dec: Tensor,
    x: Tensor,
    W_enc: Tensor,
    normalize: bool,
    need_dW_dec: bool,
    need_dW_enc: bool,
    need_dx: bool,
    threshold: Tensor | None,
    band: Tensor | None,
    dl0: Tensor | None,
    bandwidth: float,
    inverse_norms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = values.dtype
    inner, g_dec = x.to(dtype), None if g is None else g.to(W_dec.dtype).contiguous()
    db_enc = W_enc.new_empty(W_enc.shape[0], dtype=accumulator(values))
    dW_dec = empty_like(W_dec) if need_dW_dec else W_dec.new_empty(0)
    dW_enc = empty_like(W_enc) if need_dW_enc else W_enc.new_empty(0)
    dx = torch.zeros_like(x, dtype=accumulator(x)) if need_dx else x.new_empty(0)
    dthreshold = x.new_empty(0) if threshold is None else torch.zeros_like(threshold, dtype=accumulator(threshold))
    for block in _feature_blocks(values):
        c = values[:, block]
        if g_dec is None:
            dz = torch.zeros_like(c)
        else:
            dz = linear(g_dec, _unit(W_dec, block, normalize, inverse_norms)).to(dtype)
        if dvalues is not None:
            dz.add_(dvalues[:, block])
        if threshold is not None and band is not None and bandwidth > 0:
            pull = dz.to(dthreshold.dtype) * threshold[block]
            if dl0 is not None:
                pull += dl0[:, None]
            dthreshold[block] = torch.where(band[:, block], pull, 0).sum(0) / -bandwidth
        dz = torch.ops.aten.threshold_backward(dz, c, 0)  # 0 where c <= 0
        if need_dW_dec and g is not None:
            a, w = (c.t() @ g.to(dtype)).to(accumulator(W_dec)), W_dec[block]
            dW_dec[block] = tangent(a, w.to(a.dtype), _scale(w, block, inverse_norms)) if normalize else a
        if need_dW_enc:
            dW_enc[block] = dz.t() @ inner
        if need_dx:
            _add_product(dx, dz, W_enc[block].to(dtype))
        db_enc[block] = dz.sum(0, dtype=db_enc.dtype)
    return dW_dec, dW_enc, db_enc, dx.to(x.dtype), dthreshold if threshold is None else dthreshold.to(threshold.dtype)


@_dense_backward.register_fake
def _(
    values, dvalues, g, W_dec, x, W_enc, normalize, need_dW_dec, need_dW_enc, need_dx,
    threshold, band, dl0, bandwidth, inverse_norms,
):  # fmt: skip
    return (
        W_dec.new_empty(W_dec.shape if need_dW_dec else (0,)),
        W_enc.new_empty(W_enc.shape if need_dW_enc else (0,)),
        W_enc.new_empty(W_enc.shape[0], dtype=accumulator(values)),
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(0) if threshold is None else threshold.new_empty(threshold.shape),
    )


def sum_rows(g: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias in its dtype, from those of the rows that it was added to."""
    return g.sum(0, dtype=accumulator(g)).to(dtype)


autoencode_dense.register_autograd(_backward, setup_context=_setup_context)
