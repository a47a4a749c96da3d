"""A whole sparse autoencoder as one operator.

    z = x W_encᵀ + b_enc,  c = relu(z) or relu(top-k of z),  x̂ = Σ_j c_j W_dec[j] / ‖W_dec[j]‖ + b_dec

The forward pass is `encode` and `decode`; the backward pass is one sweep over the transposed code
(`e2e_fast.kernels.code_backward`, where its schema stands). ReLU codes run dense while most features are active and
sparse once few are; the function is the same (`e2e_fast.kernels.density`).

Operators:
``e2e_fast::autoencode(x, W_enc, b_enc?, W_dec, b_dec?, k, capacity, normalize) -> (x_hat, values, indices, count)``,
k = 0 for ReLU, where capacity = -1 stands for the fullest row; on every device it calls encode, decode and, backwards,
code_backward.
``e2e_fast::autoencode_dense(x, W_enc, b_enc?, W_dec, b_dec?, normalize) -> (x_hat, c)``: the ReLU autoencoder by matrix
products, c (N, F) dense, a block of features at a time: beside c nothing of size N × F is made, no unit copy of W_dec.

>>> import torch
>>> x, W_enc, W_dec = torch.randn(4, 8), torch.randn(32, 8), torch.randn(32, 8)
>>> x_hat, code = autoencode(x, W_enc, torch.zeros(32), W_dec, torch.zeros(8), k=3)
>>> x_hat.shape, code.values.shape
(torch.Size([4, 8]), torch.Size([4, 3]))
"""

import torch
from torch import Tensor

from e2e_fast.kernels._buffers import empty_like
from e2e_fast.kernels._checks import accumulator, check_bias, check_matrix
from e2e_fast.kernels._gemm import CHUNK_BYTES, linear, row_chunks
from e2e_fast.kernels.code_backward import code_backward, tangent
from e2e_fast.kernels.decode import inverse_norms
from e2e_fast.kernels.density import DensityController, default_limit
from e2e_fast.kernels.reference import check_k
from e2e_fast.kernels.sparse_code import SparseCode

GPU_CHUNK_BYTES = 1 << 30
"""As `e2e_fast.kernels._gemm.CHUNK_BYTES`, for the dense blocks on a GPU."""

PROBE_ROWS = 16
"""Rows encoded to find out how dense a ReLU code is when nothing is known about it yet."""


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    *,
    k: int | None = None,
    capacity: int | None = None,
    normalize: bool = True,
    density: DensityController | None = None,
) -> tuple[Tensor, SparseCode]:
    """A whole SAE: ``decode(encode(x))`` and the code; TopK when ``k`` is given, else ReLU.

    x (N, D), W_enc and W_dec (F, D), b_enc (F,), b_dec (D,) → x_hat (N, D) in W_dec's dtype, code with N rows.
    ReLU with ``capacity=None`` is exact: the code is sparse with room for the fullest row where few features are
    active, and dense otherwise (K = F, ``indices[n, j] = j`` also in unused slots). ``density`` remembers which from
    step to step; without it a few rows are tried first. On a GPU a sparse step reads one flag back, whether all rows
    fitted, and is repeated dense if not. An explicit ``capacity`` always runs sparse and truncates as `encode_relu`.
    Raises ValueError on shapes that do not fit, k outside [1, F], capacity < 0.
    """
    check_matrix("x", x)
    check_matrix("W_enc", W_enc, x.shape[1], "(F, D)")
    check_bias("b_enc", b_enc, W_enc.shape[0])
    check_bias("b_dec", b_dec, x.shape[1])
    if W_dec.shape != W_enc.shape:
        raise ValueError(f"W_dec must have W_enc's shape {tuple(W_enc.shape)}, got {tuple(W_dec.shape)}")
    if k is not None:
        check_k(k, W_enc.shape[0])
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0 slots, got {capacity}")

    if k is None and capacity is None:
        return _exact_relu(x, W_enc, b_enc, W_dec, b_dec, normalize, density)
    x_hat, *code = _autoencode(x, W_enc, b_enc, W_dec, b_dec, k or 0, -1 if capacity is None else capacity, normalize)
    return x_hat, SparseCode(*code)


def _exact_relu(x, W_enc, b_enc, W_dec, b_dec, normalize, density) -> tuple[Tensor, SparseCode]:
    if density is None:
        density = DensityController(default_limit(W_enc.shape[0]))
    density.refresh()
    if density.sparse is None:
        with torch.no_grad():
            density.observe(torch.ops.e2e_fast.encode_relu(x[:PROBE_ROWS], W_enc, b_enc, 0)[2].cpu())
    if density.sparse:
        # A CPU code grows to the fullest row; a GPU code has the room that was decided beforehand.
        capacity = density.limit if x.is_cuda else -1
        x_hat, *code = _autoencode(x, W_enc, b_enc, W_dec, b_dec, 0, capacity, normalize)
        code = SparseCode(*code)
        density.observe(code.count)
        if not x.is_cuda or not code.overflowed().any():
            return x_hat, code
    x_hat, values = _autoencode_dense(x, W_enc, b_enc, W_dec, b_dec, normalize)
    code = dense_code(values)
    density.observe(code.count)
    return x_hat, code


def dense_code(values: Tensor) -> SparseCode:
    """The (N, F) activations of a dense step as a code with K = F slots: ``indices[n, j] = j``, no copy made."""
    indices = torch.arange(values.shape[1], dtype=torch.int32, device=values.device).expand(values.shape)
    return SparseCode(values, indices, (~(values <= 0)).sum(-1, dtype=torch.int32))


@torch.library.custom_op("e2e_fast::autoencode", mutates_args=())
def _autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    k: int,
    capacity: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = torch.ops.e2e_fast
    code = op.encode_topk(x, W_enc, b_enc, k) if k else op.encode_relu(x, W_enc, b_enc, capacity)
    return op.decode(code[0], code[1], W_dec, b_dec, normalize), *code


@_autoencode.register_fake
def _(x, W_enc, b_enc, W_dec, b_dec, k, capacity, normalize):
    op = torch.ops.e2e_fast
    code = op.encode_topk(x, W_enc, b_enc, k) if k else op.encode_relu(x, W_enc, b_enc, capacity)
    return W_dec.new_empty(x.shape[0], W_dec.shape[1]), *code


def _setup_context(ctx, inputs, output):
    x, W_enc, b_enc, W_dec, b_dec, _, _, normalize = inputs
    _, values, indices, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, W_dec, values, indices)
    ctx.normalize = normalize
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_enc, b_dec)]


def _backward(ctx, g, dvalues, dindices, dcount):
    if g is None and dvalues is None:
        return (None,) * 8
    x, W_enc, W_dec, values, indices = ctx.saved_tensors
    need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec, *_ = ctx.needs_input_grad
    enc_dtype, dec_dtype = ctx.bias_dtypes
    need_W_dec = need_W_dec and g is not None
    dW_dec, dW_enc, db_enc, _, dx = code_backward(
        values, indices, dvalues, g, None if g is None else W_dec, x, W_enc,
        ctx.normalize, need_W_dec, need_W_enc or need_b_enc, need_x,
    )  # fmt: skip
    return (
        dx if need_x else None,
        dW_enc if need_W_enc else None,
        db_enc.to(enc_dtype) if need_b_enc and enc_dtype is not None else None,
        dW_dec if need_W_dec else None,
        _sum_rows(g, dec_dtype) if need_b_dec and g is not None and dec_dtype is not None else None,
        None,
        None,
        None,
    )


_autoencode.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("e2e_fast::autoencode_dense", mutates_args=())
def _autoencode_dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, W_dec: Tensor, b_dec: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, W_enc.dtype)
    inner, b = x.to(dtype), None if b_enc is None else b_enc.to(dtype)
    values = x.new_empty(x.shape[0], W_enc.shape[0], dtype=dtype)
    x_hat = W_dec.new_zeros(x.shape[0], W_dec.shape[1], dtype=accumulator(W_dec))
    if b_dec is not None:
        x_hat += b_dec
    for block in _feature_blocks(values):
        c = linear(inner, W_enc[block].to(dtype), None if b is None else b[block]).relu_()
        values[:, block] = c
        _add_product(x_hat, c.to(W_dec.dtype), _unit(W_dec[block], normalize))
    return x_hat.to(W_dec.dtype), values


def _feature_blocks(values: Tensor):
    """Blocks of features whose (N, block) matrices fit a chunk: nothing else of size N × F is made beside the code."""
    budget = CHUNK_BYTES if values.device.type == "cpu" else GPU_CHUNK_BYTES
    return row_chunks(values.shape[1], values.element_size() * values.shape[0], budget)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` where total may be wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _unit(rows: Tensor, normalize: bool) -> Tensor:
    return rows * inverse_norms(rows)[:, None].to(rows.dtype) if normalize else rows


@_autoencode_dense.register_fake
def _(x, W_enc, b_enc, W_dec, b_dec, normalize):
    dtype = torch.promote_types(x.dtype, W_enc.dtype)
    return W_dec.new_empty(x.shape[0], W_dec.shape[1]), x.new_empty(x.shape[0], W_enc.shape[0], dtype=dtype)


def _setup_context_dense(ctx, inputs, output):
    x, W_enc, b_enc, W_dec, b_dec, normalize = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, W_dec, output[1])
    ctx.normalize = normalize
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_enc, b_dec)]


def _backward_dense(ctx, g, dvalues):
    if g is None and dvalues is None:
        return (None,) * 6
    x, W_enc, W_dec, values = ctx.saved_tensors
    need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec, _ = ctx.needs_input_grad
    enc_dtype, dec_dtype = ctx.bias_dtypes
    need_W_dec = need_W_dec and g is not None
    dW_dec, dW_enc, db_enc, dx = _dense_backward(
        values, dvalues, g, W_dec, x, W_enc, ctx.normalize, need_W_dec, need_W_enc, need_x
    )
    return (
        dx if need_x else None,
        dW_enc if need_W_enc else None,
        db_enc.to(enc_dtype) if need_b_enc and enc_dtype is not None else None,
        dW_dec if need_W_dec else None,
        _sum_rows(g, dec_dtype) if need_b_dec and g is not None and dec_dtype is not None else None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = values.dtype
    inner, g_dec = x.to(dtype), None if g is None else g.to(W_dec.dtype).contiguous()
    db_enc = W_enc.new_empty(W_enc.shape[0], dtype=accumulator(values))
    dW_dec = empty_like(W_dec) if need_dW_dec else W_dec.new_empty(0)
    dW_enc = empty_like(W_enc) if need_dW_enc else W_enc.new_empty(0)
    dx = torch.zeros_like(x, dtype=accumulator(x)) if need_dx else x.new_empty(0)
    for block in _feature_blocks(values):
        c = values[:, block]
        dz = torch.zeros_like(c) if g_dec is None else linear(g_dec, _unit(W_dec[block], normalize)).to(dtype)
        if dvalues is not None:
            dz.add_(dvalues[:, block])
        dz = torch.ops.aten.threshold_backward(dz, c, 0)  # 0 where c <= 0
        if need_dW_dec and g is not None:
            a, w = (c.t() @ g.to(dtype)).to(accumulator(W_dec)), W_dec[block]
            dW_dec[block] = tangent(a, w.to(a.dtype), inverse_norms(w)) if normalize else a
        if need_dW_enc:
            dW_enc[block] = dz.t() @ inner
        if need_dx:
            _add_product(dx, dz, W_enc[block].to(dtype))
        db_enc[block] = dz.sum(0, dtype=db_enc.dtype)
    return dW_dec, dW_enc, db_enc, dx.to(x.dtype)


@_dense_backward.register_fake
def _(values, dvalues, g, W_dec, x, W_enc, normalize, need_dW_dec, need_dW_enc, need_dx):
    return (
        W_dec.new_empty(W_dec.shape if need_dW_dec else (0,)),
        W_enc.new_empty(W_enc.shape if need_dW_enc else (0,)),
        W_enc.new_empty(W_enc.shape[0], dtype=accumulator(values)),
        x.new_empty(x.shape if need_dx else (0,)),
    )


def _sum_rows(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum(0, dtype=accumulator(g)).to(dtype)


_autoencode_dense.register_autograd(_backward_dense, setup_context=_setup_context_dense)
