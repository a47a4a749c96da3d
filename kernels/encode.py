"""The encoder's sparse output: relu(x W_encᵀ + b_enc), all of it or the k largest entries of each row.

    z = x W_encᵀ + b_enc                                 (N, F), never stored whole
    encode_relu   the positive z, ascending index
    encode_topk   relu of the k largest z, descending; equal values: lower index first

Scores and selection are float32 (float64 for float64 inputs); values come in the promoted dtype of x and weight. The
backward pass is `e2e_fast.kernels.code_backward`: a selected slot with a positive value passes its gradient on, nothing
else does. A NaN score is kept, as the greatest, so that NaN propagates instead of disappearing.

Operators: ``e2e_fast::encode_topk(x, weight, bias?, k) -> (values, indices, count)`` and
``e2e_fast::encode_relu(x, weight, bias?, capacity)`` with the same outputs, ``capacity = -1`` for the fullest row;
values (N, K), indices (N, K) int32, count (N,) int32.

>>> import torch
>>> x, W, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 9.0], [-1.0, 0.0], [2.0, 0.0]]), torch.zeros(3)
>>> encode_topk(x, W, b, k=2).indices
tensor([[2, 0]], dtype=torch.int32)
>>> encode_relu(x, W, b).values
tensor([[0.5000, 2.0000]])
"""

from types import ModuleType

import torch
from torch import Tensor

from e2e_fast.kernels._buffers import empty
from e2e_fast.kernels._checks import accumulator, check_bias, check_matrix
from e2e_fast.kernels._gemm import linear, row_chunks
from e2e_fast.kernels._native import array, native
from e2e_fast.kernels.reference import check_k
from e2e_fast.kernels.sparse_code import SparseCode

ROWS_AT_ONCE = 4096
"""Tokens that go through the dictionary together on CPU."""

SCREENING = ("int8", "bfloat16")
"""Precisions in which CPUs that multiply them natively may look for candidates, in order; the result is the same."""

SCREENED_SHARE = 64
"""Screening pays while at most one feature in 64 is a candidate: each is scored again in float32."""

SCREENED_WIDTH = 64
"""Screening pays from this D on."""


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> SparseCode:
    """relu of the k largest entries of ``x @ weight.T + bias``, descending; equal values: lower index first.

    x (N, D), weight (F, D), bias (F,) → values and indices (N, k). Raises ValueError unless 1 ≤ k ≤ F.
    """
    _check(x, weight, bias)
    check_k(k, weight.shape[0])
    return SparseCode(*_encode_topk(x, weight, bias, k))


def encode_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None, capacity: int | None = None) -> SparseCode:
    """``relu(x @ weight.T + bias)`` as a sparse code, each row's features in ascending order.

    x (N, D), weight (F, D), bias (F,). ``capacity=None`` makes room for the fullest row (on a GPU this waits for the
    count); a row that needs more slots than an explicit capacity keeps its first ones and reports its true L0 in
    ``count``. Raises ValueError unless capacity ≥ 0.
    """
    _check(x, weight, bias)
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0 slots, got {capacity}")
    return SparseCode(*_encode_relu(x, weight, bias, -1 if capacity is None else capacity))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_matrix("x", x)
    check_matrix("weight", weight, x.shape[1], "(F, D)")
    check_bias("bias", bias, weight.shape[0])


@torch.library.custom_op("e2e_fast::encode_topk", mutates_args=(), device_types="cpu")
def _encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    core = native() if accumulator(x, weight) == torch.float32 else None
    if core is not None:
        return _select(core, x, weight, bias, k, k)
    values, indices = [x.new_empty(0, k)], [x.new_empty(0, k, dtype=torch.int64)]
    for z in _scores(x, weight, bias):
        top, where = _exact_topk(z, k)
        used = ~(top <= 0)
        values.append(torch.where(used, top, 0))
        indices.append(torch.where(used, where, 0))
    value = torch.cat(values).to(torch.promote_types(x.dtype, weight.dtype))
    return value, torch.cat(indices).int(), (~(value <= 0)).sum(-1, dtype=torch.int32)


@torch.library.custom_op("e2e_fast::encode_relu", mutates_args=(), device_types="cpu")
def _encode_relu(x: Tensor, weight: Tensor, bias: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    core = native() if accumulator(x, weight) == torch.float32 else None
    if core is not None:
        return _select(core, x, weight, bias, 0, min(capacity, weight.shape[0]))
    dtype = torch.promote_types(x.dtype, weight.dtype)
    chunks = [SparseCode.from_dense(z.relu_(), None if capacity < 0 else capacity) for z in _scores(x, weight, bias)]
    width = max((c.values.shape[1] for c in chunks), default=max(0, min(capacity, weight.shape[0])))
    values, indices = x.new_zeros(x.shape[0], width, dtype=dtype), x.new_zeros(x.shape[0], width, dtype=torch.int32)
    count = torch.cat([x.new_empty(0, dtype=torch.int32), *(c.count.int() for c in chunks)])
    start = 0
    for c in chunks:
        rows, slots = c.values.shape
        values[start : start + rows, :slots] = c.values.to(dtype)
        indices[start : start + rows, :slots] = c.indices.int()
        start += rows
    return values, indices, count


def _select(core: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None, k: int, slots: int):
    """The code by the compiled core: score blocks go through its Selection. ``slots = -1``: the fullest row's."""
    x32, w = x.detach().float().contiguous(), weight.detach().float().contiguous()
    b = None if bias is None else bias.detach().float().contiguous()
    chunks = [(rows, _select_rows(core, x32[rows], w, b, k, slots)) for rows in row_chunks(x.shape[0], 1, ROWS_AT_ONCE)]
    width = slots if slots >= 0 else max((selection.fullest() for _, selection in chunks), default=0)
    values, indices = empty(x.shape[0], width), empty(x.shape[0], width, dtype=torch.int32)
    count = empty(x.shape[0], dtype=torch.int32)
    for rows, selection in chunks:
        selection.finish(values[rows].numpy(), indices[rows].numpy(), count[rows].numpy(), torch.get_num_threads())
    return values.to(torch.promote_types(x.dtype, weight.dtype)), indices, count


def _select_rows(core: ModuleType, x: Tensor, w: Tensor, b: Tensor | None, k: int, limit: int):
    """A finished Selection of a chunk of rows.

    Where the processor multiplies int8 or bfloat16 natively, its products with a proven bound find the candidates
    (csrc/screen.cpp), which are then scored in float32; else float32 products, a block of features at a time.
    """
    threads = torch.get_num_threads()
    selection = core.Selection(x.shape[0], k, -1 if k else limit)
    if x.shape[1] >= SCREENED_WIDTH and k * SCREENED_SHARE <= w.shape[0]:
        for precision in filter(core.native_precision, SCREENING):
            if selection.screen(x.numpy(), w.numpy(), array(b), precision, SCREENED_SHARE, threads):
                return selection
    for block in row_chunks(w.shape[0], 4 * x.shape[0]):
        bias = None if b is None else b[block]
        selection.add(linear(x, w[block], bias).numpy(), block.start, threads)
    return selection


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None):
    """The pre-activations (n, F), a chunk of rows at a time."""
    dtype = accumulator(x, weight)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    for rows in row_chunks(x.shape[0], 4 * weight.shape[0]):
        yield linear(x[rows].to(dtype), w, b)


def _exact_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk whose ties are settled by the lower index."""
    values, indices = torch.topk(z, k, dim=-1)
    # Among equal values order by index; where equal values straddle the k-th place only a full sort decides.
    indices, order = torch.sort(indices, dim=-1)
    values, by_value = torch.sort(values.gather(-1, order), dim=-1, descending=True, stable=True)
    indices = indices.gather(-1, by_value)
    tied = (~(z < values[:, -1:])).sum(-1) > k
    if tied.any():
        full, where = torch.sort(z[tied], dim=-1, descending=True, stable=True)
        values[tied], indices[tied] = full[:, :k], where[:, :k]
    return values, indices


def _outputs_like(x: Tensor, weight: Tensor, width) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    rows = x.shape[0]
    return (
        x.new_empty(rows, width, dtype=dtype),
        x.new_empty(rows, width, dtype=torch.int32),
        x.new_empty(rows, dtype=torch.int32),
    )


@_encode_topk.register_fake
def _(x, weight, bias, k):
    return _outputs_like(x, weight, k)


@_encode_relu.register_fake
def _(x, weight, bias, capacity):
    if capacity < 0:  # the fullest row decides, when it runs
        return _outputs_like(x, weight, torch.library.get_ctx().new_dynamic_size(min=0))
    return _outputs_like(x, weight, min(capacity, weight.shape[0]))


@_encode_topk.register_kernel("cuda")
def _(x, weight, bias, k):
    from e2e_fast.kernels.triton.encode import encode_topk as launch

    return launch(x, weight, bias, k)


@_encode_relu.register_kernel("cuda")
def _(x, weight, bias, capacity):
    from e2e_fast.kernels.triton.encode import encode_relu as launch

    return launch(x, weight, bias, capacity)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _ = inputs
    values, indices, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, values, indices)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dvalues, dindices, dcount):
    if dvalues is None:
        return None, None, None, None
    x, weight, values, indices = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    _, dweight, dbias, _, dx = torch.ops.e2e_fast.code_backward(
        values, indices, dvalues, None, None, x, weight, False, False, need_weight or need_bias, need_x
    )
    dbias = dbias.to(ctx.bias_dtype) if need_bias and ctx.bias_dtype is not None else None
    return dx if need_x else None, dweight if need_weight else None, dbias, None


_encode_topk.register_autograd(_backward, setup_context=_setup_context)
_encode_relu.register_autograd(_backward, setup_context=_setup_context)
