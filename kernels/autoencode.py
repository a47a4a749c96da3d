"""A whole sparse autoencoder as one operator.

    z = x W_encᵀ + b_enc,  c = activation(z),  x̂ = Σ_j c_j W_dec[j] / ‖W_dec[j]‖ + b_dec

The activation is ReLU, TopK, BatchTopK or JumpReLU (`e2e_fast.kernels.encode`). The forward pass is an encoder and
`decode`; the backward pass is one sweep over the transposed code (`e2e_fast.kernels.code_backward`, where its schema
stands). ReLU and JumpReLU codes run dense while most features are active and sparse once few are; the function is the
same (`e2e_fast.kernels.density`).

Operators:
``e2e_fast::autoencode(x, W_enc, b_enc?, W_dec, b_dec?, k, capacity, normalize, batch, inverse_norms?) -> (x_hat,
values, indices, count)``, k = 0 for ReLU; capacity = -1 stands for the fullest row.
``e2e_fast::autoencode_jump(x, W_enc, b_enc?, W_dec, b_dec?, threshold, bandwidth, capacity, normalize, inverse_norms?)
-> (x_hat, values, indices, count, l0, band)``. Both call, on every device, an encoder, decode and, backwards,
code_backward.
``e2e_fast::autoencode_dense(x, W_enc, b_enc?, W_dec, b_dec?, normalize, threshold?, bandwidth, inverse_norms?) ->
(x_hat, c, l0, band)``: the ReLU (JumpReLU) autoencoder by matrix products, c (N, F) dense, a block of features at a
time: beside c nothing of size N × F is made (JumpReLU: band, N × F bool), no unit copy of W_dec; l0 and band are empty
for ReLU.

>>> import torch
>>> x, W_enc, W_dec = torch.randn(4, 8), torch.randn(32, 8), torch.randn(32, 8)
>>> x_hat, code = autoencode(x, W_enc, torch.zeros(32), W_dec, torch.zeros(8), k=3)
>>> x_hat.shape, code.values.shape
(torch.Size([4, 8]), torch.Size([4, 3]))
>>> _, code = autoencode(x, W_enc, torch.zeros(32), W_dec, torch.zeros(8), threshold=torch.ones(32))
>>> bool(((code.values == 0) | (code.values > 1)).all())
True
"""

import torch
from torch import Tensor

from e2e_fast.kernels._buffers import empty_like
from e2e_fast.kernels._checks import accumulator, check_bias, check_devices, check_matrix
from e2e_fast.kernels._gemm import CHUNK_BYTES, linear, row_chunks
from e2e_fast.kernels._native import direct, unwatched
from e2e_fast.kernels.code_backward import backward_on_cpu, code_backward, silent_gradients, tangent
from e2e_fast.kernels.decode import decode_on_cpu, known_norms, row_inverse_norms
from e2e_fast.kernels.density import DensityController, default_limit
from e2e_fast.kernels.encode import check_threshold, relu_on_cpu, slots_for, threshold_gradient, topk_on_cpu
from e2e_fast.kernels.reference import BANDWIDTH, check_activation, check_k
from e2e_fast.kernels.sparse_code import JumpCode, SparseCode

GPU_CHUNK_BYTES = 1 << 30
"""As `e2e_fast.kernels._gemm.CHUNK_BYTES`, for the dense blocks on a GPU."""

PROBE_ROWS = 16
"""Rows encoded to find out how dense a code is when nothing is known about it yet."""


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    *,
    k: int | None = None,
    batch: bool = False,
    threshold: Tensor | None = None,
    bandwidth: float = BANDWIDTH,
    capacity: int | None = None,
    normalize: bool = True,
    density: DensityController | None = None,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, SparseCode | JumpCode]:
    """A whole SAE: ``decode(encode(x))`` and the code; ReLU unless ``k`` or ``threshold`` is given.

    x (N, D), W_enc and W_dec (F, D), b_enc (F,), b_dec (D,) → x_hat (N, D) in W_dec's dtype, code with N rows.

    ``k``: TopK, or with ``batch`` BatchTopK. ``threshold`` (F,): JumpReLU, with straight-through gradients of this
    ``bandwidth`` to it, and a `JumpCode` whose ``l0`` is differentiable (`encode_jump_relu`).

    ReLU and JumpReLU with ``capacity=None`` are exact: the code is sparse with room for the fullest row where few
    features are active, and dense otherwise (K = F, ``indices[n, j] = j`` also in unused slots). ``density`` remembers
    which from step to step; without it a few rows are tried first. On a GPU a sparse step reads one flag back, whether
    all rows fitted, and is repeated dense if not; BatchTopK reads its fullest row. An explicit ``capacity`` always runs
    sparse and truncates as `encode_relu`. ``inverse_norms`` (F,) of W_dec, where known, save a GPU a pass over it.

    Raises ValueError on shapes that do not fit, k outside [1, F], capacity < 0, and arguments of two activations.
    """
    check_matrix("x", x)
    check_matrix("W_enc", W_enc, x.shape[1], "(F, D)")
    check_bias("b_enc", b_enc, W_enc.shape[0])
    check_bias("b_dec", b_dec, x.shape[1])
    check_bias("inverse_norms", inverse_norms, W_enc.shape[0])
    if W_dec.shape != W_enc.shape:
        raise ValueError(f"W_dec must have W_enc's shape {tuple(W_enc.shape)}, got {tuple(W_dec.shape)}")
    check_matrix("W_dec", W_dec, expected="(F, D)")
    others = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    check_devices("x", x, **others, threshold=threshold, inverse_norms=inverse_norms)
    check_activation(k, batch, threshold)
    if k is not None:
        check_k(k, W_enc.shape[0])
    if threshold is not None:
        check_threshold(threshold, bandwidth, W_enc.shape[0])
    slots, weights = slots_for(capacity), (x, W_enc, b_enc, W_dec, b_dec)
    norms = known_norms(W_dec, normalize, inverse_norms)

    if k is not None:
        x_hat, *code = _run(*weights, k, slots, normalize, batch, norms)
        return x_hat, SparseCode(*code)
    if capacity is None:
        return _exact(weights, threshold, bandwidth, normalize, density, norms)
    return _sparse(weights, threshold, bandwidth, slots, normalize, norms)


def _sparse(weights, threshold, bandwidth, slots, normalize, norms) -> tuple[Tensor, SparseCode | JumpCode]:
    if threshold is None:
        x_hat, *code = _run(*weights, 0, slots, normalize, False, norms)
        return x_hat, SparseCode(*code)
    x_hat, *code = _autoencode_jump(*weights, threshold, bandwidth, slots, normalize, norms)
    return x_hat, JumpCode(*code)


def _exact(weights, threshold, bandwidth, normalize, density, norms) -> tuple[Tensor, SparseCode | JumpCode]:
    x, W_enc, b_enc, *_ = weights
    if density is None:
        density = DensityController(default_limit(W_enc.shape[0]))
    density.refresh()
    if density.sparse is None:
        with torch.no_grad():
            density.observe(_probe(x[:PROBE_ROWS], W_enc, b_enc, threshold).cpu())
    if density.sparse:
        # A CPU code grows to the fullest row; a GPU code has the room that was decided beforehand.
        slots = density.limit if x.is_cuda else -1
        x_hat, code = _sparse(weights, threshold, bandwidth, slots, normalize, norms)
        density.observe(code.count)
        if not x.is_cuda or not code.overflowed().any():
            return x_hat, code
    x_hat, values, l0, band = _autoencode_dense(*weights, normalize, threshold, bandwidth, norms)
    code = dense_code(values)
    density.observe(code.count)
    return x_hat, code if threshold is None else JumpCode(*code, l0, band)


def _probe(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor | None) -> Tensor:
    """Active features of a few rows."""
    if threshold is None:
        return torch.ops.e2e_fast.encode_relu(x, W_enc, b_enc, 0)[2]
    return torch.ops.e2e_fast.encode_jump_relu(x, W_enc, b_enc, threshold, 0.0, 0)[2]


def dense_code(values: Tensor) -> SparseCode:
    """The (N, F) activations of a dense step as a code with K = F slots: ``indices[n, j] = j``, no copy made."""
    indices = torch.arange(values.shape[1], dtype=torch.int32, device=values.device).expand(values.shape)
    return SparseCode(values, indices, (~(values <= 0)).sum(-1, dtype=torch.int32))


def _forward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    k: int,
    capacity: int,
    normalize: bool,
    batch: bool = False,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.device.type == "cpu" and not batch and direct(x, W_enc, b_enc, W_dec, b_dec, inverse_norms):
        code = topk_on_cpu(x, W_enc, b_enc, k) if k else relu_on_cpu(x, W_enc, b_enc, capacity)
        return decode_on_cpu(code[0], code[1], W_dec, b_dec, normalize, None, inverse_norms), *code
    code = _encode(x, W_enc, b_enc, k, capacity, batch)
    return torch.ops.e2e_fast.decode(code[0], code[1], W_dec, b_dec, normalize, None, inverse_norms), *code


def _encode(x, W_enc, b_enc, k, capacity, batch) -> tuple[Tensor, Tensor, Tensor]:
    op = torch.ops.e2e_fast
    if not k:
        return op.encode_relu(x, W_enc, b_enc, capacity)
    return op.encode_batch_topk(x, W_enc, b_enc, k, capacity) if batch else op.encode_topk(x, W_enc, b_enc, k)


_autoencode = torch.library.custom_op("e2e_fast::autoencode", _forward, mutates_args=())


@_autoencode.register_fake
def _(x, W_enc, b_enc, W_dec, b_dec, k, capacity, normalize, batch=False, inverse_norms=None):
    return W_dec.new_empty(x.shape[0], W_dec.shape[1]), *_encode(x, W_enc, b_enc, k, capacity, batch)


def _setup_context(ctx, inputs, output):
    x, W_enc, b_enc, W_dec, b_dec, _, _, ctx.normalize, _, inverse_norms = inputs
    _, values, indices, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, W_dec, values, indices, inverse_norms)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_enc, b_dec)]


def _backward(ctx, g, dvalues, dindices, dcount):
    gradients, _ = _weight_gradients(ctx, ctx.saved_tensors, g, dvalues, need_dvalues=False)
    return *gradients, *(None,) * 5


def _weight_gradients(ctx, saved, g, dvalues, need_dvalues):
    """Those of x, W_enc, b_enc, W_dec and b_dec, None where not needed; and dvalues, where anything arrived."""
    if g is None and dvalues is None:
        return (None,) * 5, None
    x, W_enc, W_dec, values, indices, inverse_norms = saved
    need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec, *_ = ctx.needs_input_grad
    enc_dtype, dec_dtype = ctx.bias_dtypes
    need_W_dec = need_W_dec and g is not None
    on_cpu = x.device.type == "cpu" and direct(values, dvalues, g, W_dec, x, W_enc)
    dW_dec, dW_enc, db_enc, dv, dx = (backward_on_cpu if on_cpu else code_backward)(
        values, indices, dvalues, g, None if g is None else W_dec, x, W_enc,
        ctx.normalize, need_W_dec, need_W_enc or need_b_enc, need_x, inverse_norms, need_dvalues,
    )  # fmt: skip
    gradients = (
        dx if need_x else None,
        dW_enc if need_W_enc else None,
        db_enc.to(enc_dtype) if need_b_enc and enc_dtype is not None else None,
        dW_dec if need_W_dec else None,
        _sum_rows(g, dec_dtype) if need_b_dec and g is not None and dec_dtype is not None else None,
    )
    return gradients, dv


_autoencode.register_autograd(_backward, setup_context=_setup_context)


class _Undispatched(torch.autograd.Function):
    """The operator and its gradient without torch's dispatcher and the operator's wrappers, which take 0.1 ms."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return _backward(ctx, *gradients)


def _run(*inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = [*inputs[:5], inputs[-1]]
    plain = inputs[0].device.type == "cpu" and unwatched(*tensors)
    return (_Undispatched.apply if plain else _autoencode)(*inputs)


# --- JumpReLU -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("e2e_fast::autoencode_jump", mutates_args=())
def _autoencode_jump(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    threshold: Tensor,
    bandwidth: float,
    capacity: int,
    normalize: bool,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = torch.ops.e2e_fast
    code = op.encode_jump_relu(x, W_enc, b_enc, threshold, bandwidth, capacity)
    return op.decode(code[0], code[1], W_dec, b_dec, normalize, None, inverse_norms), *code


@_autoencode_jump.register_fake
def _(x, W_enc, b_enc, W_dec, b_dec, threshold, bandwidth, capacity, normalize, inverse_norms=None):
    code = torch.ops.e2e_fast.encode_jump_relu(x, W_enc, b_enc, threshold, bandwidth, capacity)
    return W_dec.new_empty(x.shape[0], W_dec.shape[1]), *code


def _setup_context_jump(ctx, inputs, output):
    x, W_enc, b_enc, W_dec, b_dec, threshold, ctx.bandwidth, _, ctx.normalize, inverse_norms = inputs
    _, values, indices, _, _, band = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, W_dec, values, indices, inverse_norms, threshold, band)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_enc, b_dec)]


def _backward_jump(ctx, g, dvalues, dindices, dcount, dl0, dband):
    *saved, threshold, band = ctx.saved_tensors
    need_threshold = ctx.needs_input_grad[5]
    gradients, dv = _weight_gradients(ctx, saved, g, dvalues, need_threshold)
    dthreshold = None
    if need_threshold:
        if dv is not None:
            _, _, W_dec, values, indices, inverse_norms = saved
            dv = dv + silent_gradients(values, indices, band, dvalues, g, W_dec, ctx.normalize, inverse_norms)
        dthreshold = threshold_gradient(saved[4], band, dv, dl0, threshold, ctx.bandwidth)
    return *gradients, dthreshold, *(None,) * 4


_autoencode_jump.register_autograd(_backward_jump, setup_context=_setup_context_jump)


# --- Dense ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("e2e_fast::autoencode_dense", mutates_args=())
def _autoencode_dense(
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


@_autoencode_dense.register_fake
def _(x, W_enc, b_enc, W_dec, b_dec, normalize, threshold, bandwidth, inverse_norms):
    (N, _), F = x.shape, W_enc.shape[0]
    jump = threshold is not None
    return (
        W_dec.new_empty(N, W_dec.shape[1]),
        x.new_empty(N, F, dtype=torch.promote_types(x.dtype, W_enc.dtype)),
        x.new_empty(N if jump else 0, dtype=accumulator(x, W_enc)),
        x.new_empty(N, F if jump else 0, dtype=torch.bool),
    )


def _setup_context_dense(ctx, inputs, output):
    x, W_enc, b_enc, W_dec, b_dec, ctx.normalize, threshold, ctx.bandwidth, inverse_norms = inputs
    _, values, _, band = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, W_dec, values, band, threshold, inverse_norms)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_enc, b_dec)]


def _backward_dense(ctx, g, dvalues, dl0, dband):
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
        _sum_rows(g, dec_dtype) if need_b_dec and g is not None and dec_dtype is not None else None,
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


def _sum_rows(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum(0, dtype=accumulator(g)).to(dtype)


_autoencode_dense.register_autograd(_backward_dense, setup_context=_setup_context_dense)
