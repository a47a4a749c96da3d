"""A whole sparse autoencoder as one operator.

    z = x W_encᵀ + b_enc,  c = activation(z),  x̂ = Σ_j c_j W_dec[j] / ‖W_dec[j]‖ + b_dec

The activation is ReLU, TopK, BatchTopK or JumpReLU (`e2e_fast.kernels.encode`). The forward pass is an encoder and
`decode`; the backward pass is one sweep over the transposed code (`e2e_fast.kernels.code_backward`, where its schema
stands). ReLU and JumpReLU codes run dense while most features are active and sparse once few are; the function is the
same (`e2e_fast.kernels.density`, `e2e_fast.kernels.autoencode_dense`).

Operators:
``e2e_fast::autoencode(x, W_enc, b_enc?, W_dec, b_dec?, k, capacity, normalize, batch, inverse_norms?) -> (x_hat,
values, indices, count)``, k = 0 for ReLU; capacity = -1 stands for the fullest row.
``e2e_fast::autoencode_jump(x, W_enc, b_enc?, W_dec, b_dec?, threshold, bandwidth, capacity, normalize, inverse_norms?)
-> (x_hat, values, indices, count, l0, band)``. Both call, on every device, an encoder, decode and, backwards,
code_backward.

>>> import torch
>>> x, W_enc, W_dec = torch.randn(4, 8), torch.randn(32, 8), torch.randn(32, 8)
>>> x_hat, code = autoencode(x, W_enc, torch.zeros(32), W_dec, torch.zeros(8), k=3)
>>> x_hat.shape, code.values.shape
(torch.Size([4, 8]), torch.Size([4, 3]))
>>> _, code = autoencode(x, W_enc, torch.zeros(32), W_dec, torch.zeros(8), threshold=torch.ones(32))
>>> bool(((code.values == 0) | (code.values > 1)).all())
True
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from e2e_fast.kernels._checks import check_bias, check_devices, check_matrix
from e2e_fast.kernels._native import unwatched
from e2e_fast.kernels.autoencode_dense import autoencode_dense, sum_rows
from e2e_fast.kernels.code_backward import Gradients, backward_on_cpu, code_backward, silent_gradients
from e2e_fast.kernels.decode import decode_on_cpu, known_norms
from e2e_fast.kernels.density import DensityController, default_limit
from e2e_fast.kernels.encode import check_threshold, relu_on_cpu, slots_for, threshold_gradient, topk_on_cpu
from e2e_fast.kernels.reference import BANDWIDTH, check_activation, check_k
from e2e_fast.kernels.sparse_code import JumpCode, SparseCode

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
    which from step to step, and how much room to make; without it a few rows are tried first. On a GPU a sparse step
    reads one flag back, whether all rows fitted, and is repeated dense if not; BatchTopK reads its fullest row. An
    explicit ``capacity`` always runs sparse and truncates as `encode_relu`. ``inverse_norms`` (F,) of W_dec, where
    known, save a GPU a pass over it.

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
            density.observe(_probe(x[:PROBE_ROWS], W_enc, b_enc, threshold, bandwidth).cpu())
    if density.sparse:
        # A CPU code grows to the fullest row; a GPU code has the room that was decided beforehand.
        slots = density.capacity if x.is_cuda else -1
        x_hat, code = _sparse(weights, threshold, bandwidth, slots, normalize, norms)
        density.observe(code.needed())
        if not x.is_cuda or not code.overflowed().any():
            return x_hat, code
    x_hat, values, l0, band = autoencode_dense(*weights, normalize, threshold, bandwidth, norms)
    code = dense_code(values)
    code = code if threshold is None else JumpCode(*code, l0, band)
    density.observe(code.needed())
    return x_hat, code


def _probe(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor | None, bandwidth: float) -> Tensor:
    """Slots that a few rows need."""
    if threshold is None:
        return torch.ops.e2e_fast.encode_relu(x, W_enc, b_enc, 0)[2]
    return torch.ops.e2e_fast.encode_jump_relu(x, W_enc, b_enc, threshold, bandwidth, 0)[2]


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
    batch: bool = False,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code = _encode(x, W_enc, b_enc, k, capacity, batch)
    return torch.ops.e2e_fast.decode(code[0], code[1], W_dec, b_dec, normalize, None, inverse_norms), *code


def _encode(x, W_enc, b_enc, k, capacity, batch) -> tuple[Tensor, Tensor, Tensor]:
    op = torch.ops.e2e_fast
    if not k:
        return op.encode_relu(x, W_enc, b_enc, capacity)
    return op.encode_batch_topk(x, W_enc, b_enc, k, capacity) if batch else op.encode_topk(x, W_enc, b_enc, k)


@_autoencode.register_fake
def _(x, W_enc, b_enc, W_dec, b_dec, k, capacity, normalize, batch=False, inverse_norms=None):
    return W_dec.new_empty(x.shape[0], W_dec.shape[1]), *_encode(x, W_enc, b_enc, k, capacity, batch)


def _setup_context(ctx, inputs, output):
    x, W_enc, b_enc, W_dec, b_dec, _, _, ctx.normalize, _, inverse_norms = inputs
    _, values, indices, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, W_dec, values, indices, inverse_norms)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_enc, b_dec)]


def _backward(ctx, g, dvalues, dindices, dcount, sweep: Callable[..., Gradients] = code_backward):
    gradients, _ = _weight_gradients(ctx, ctx.saved_tensors, g, dvalues, need_dvalues=False, sweep=sweep)
    return *gradients, *(None,) * 5


def _weight_gradients(ctx, saved, g, dvalues, need_dvalues, sweep: Callable[..., Gradients] = code_backward):
    """Those of x, W_enc, b_enc, W_dec and b_dec, None where not needed; and dvalues, where anything arrived."""
    if g is None and dvalues is None:
        return (None,) * 5, None
    x, W_enc, W_dec, values, indices, inverse_norms = saved
    need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec, *_ = ctx.needs_input_grad
    enc_dtype, dec_dtype = ctx.bias_dtypes
    need_W_dec = need_W_dec and g is not None
    dW_dec, dW_enc, db_enc, dv, dx = sweep(
        values, indices, dvalues, g, None if g is None else W_dec, x, W_enc,
        ctx.normalize, need_W_dec, need_W_enc or need_b_enc, need_x, inverse_norms, need_dvalues,
    )  # fmt: skip
    gradients = (
        dx if need_x else None,
        dW_enc if need_W_enc else None,
        db_enc.to(enc_dtype) if need_b_enc and enc_dtype is not None else None,
        dW_dec if need_W_dec else None,
        sum_rows(g, dec_dtype) if need_b_dec and g is not None and dec_dtype is not None else None,
    )
    return gradients, dv


_autoencode.register_autograd(_backward, setup_context=_setup_context)


class _OnCpu(torch.autograd.Function):
    """The same on a CPU where nothing watches, without torch's dispatcher and wrappers, which take 0.1 ms."""

    @staticmethod
    def forward(ctx, *inputs):
        x, W_enc, b_enc, W_dec, b_dec, k, capacity, normalize, _, inverse_norms = inputs
        code = topk_on_cpu(x, W_enc, b_enc, k) if k else relu_on_cpu(x, W_enc, b_enc, capacity)
        output = decode_on_cpu(code[0], code[1], W_dec, b_dec, normalize, None, inverse_norms), *code
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return _backward(ctx, *gradients, sweep=backward_on_cpu)


def _run(*inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, *weights, _, _, _, batch, inverse_norms = inputs
    plain = x.device.type == "cpu" and not batch and unwatched(x, *weights, inverse_norms)
    return (_OnCpu.apply if plain else _autoencode)(*inputs)


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
