"""The encoder's sparse output: which entries of x W_encᵀ + b_enc survive, and what reaches the parameters.

    z = x W_encᵀ + b_enc                                 (N, F), never stored whole
    encode_relu         the positive z
    encode_topk         relu of the k largest z of a token, descending; equal values: lower index first
    encode_batch_topk   the k·N largest positive z of the whole batch, all that equal the smallest of them too
    encode_jump_relu    z > θ_j, a threshold θ_j > 0 for every feature

All but TopK list a token's features in ascending order. Scores and selection are float32 (float64 for float64 inputs);
values come in the promoted dtype of x and weight. The backward pass is `e2e_fast.kernels.code_backward`: a selected
slot with a positive value passes its gradient on, nothing else does. A NaN score is kept, as the greatest, so that NaN
propagates instead of disappearing.

**BatchTopK on CPU** is exact without a batch of scores in memory. The m largest of every token (m = 4k at first) yield
a lower bound t of the (k·N)-th largest score, since they are some of the scores. A token whose m-th largest lies below
t has shown all that can be selected; only the others are asked again, for four times as many. When none is left, t is
the threshold itself.

**JumpReLU's thresholds** get straight-through gradients (`reference.encode_jump_relu`): with the rectangle of width ε

    dL/dθ_j = -(1/ε) Σ_n [|z_nj - θ_j| < ε/2, z_nj > 0] (θ_j dL/dc_nj + dL/dL0_n)

Silent features of this band have slots as well, so that dL/dc_nj exists for them: see `JumpCode`. The band leaves out
scores that are not positive, which matters where θ_j < ε/2 alone: with them every silent feature would be in it.

Operators: ``e2e_fast::encode_topk(x, weight, bias?, k) -> (values, indices, count)``,
``e2e_fast::encode_relu(x, weight, bias?, capacity)`` and ``e2e_fast::encode_batch_topk(x, weight, bias?, k, capacity)``
with the same outputs, ``e2e_fast::encode_jump_relu(x, weight, bias?, threshold, bandwidth, capacity) -> (values,
indices, count, l0, band)``; ``capacity = -1`` for the fullest row; values (N, K), indices (N, K) int32, count (N,)
int32, l0 (N,), band (N, K) bool.

>>> import torch
>>> x, W, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 9.0], [-1.0, 0.0], [2.0, 0.0]]), torch.zeros(3)
>>> encode_topk(x, W, b, k=2).indices
tensor([[2, 0]], dtype=torch.int32)
>>> encode_relu(x, W, b).values
tensor([[0.5000, 2.0000]])
>>> encode_jump_relu(x, W, b, threshold=torch.ones(3)).to_dense(3)
tensor([[0., 0., 2.]])
"""

from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as nnf
from torch import Tensor

from e2e_fast.kernels._buffers import empty
from e2e_fast.kernels._checks import accumulator, check_bias, check_devices, check_matrix
from e2e_fast.kernels._gemm import linear, row_chunks
from e2e_fast.kernels._native import array, native
from e2e_fast.kernels.reference import BANDWIDTH, check_k
from e2e_fast.kernels.sparse_code import JumpCode, SparseCode

ROWS_AT_ONCE = 4096
"""Tokens that go through the dictionary together on CPU."""

SCREENING = ("int8", "bfloat16")
"""Precisions in which CPUs that multiply them natively may look for candidates, in order; the result is the same."""

SCREENED_SHARE = {"topk": 64, "relu": 16}
"""Screening pays while at most one feature in so many is a candidate: each is scored again in float32. TopK's lists of
candidates are kept in order of their bounds, ReLU's are not."""

SCREENED_WIDTH = 64
"""Screening pays from this D on."""

SCREENED_ROWS = 64
"""Screening pays from so many tokens on: it rounds the whole weight first."""

WIDENING = 4
"""BatchTopK looks at this many times k features of a token, and at as many times more where those do not suffice."""


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
    return SparseCode(*_encode_relu(x, weight, bias, slots_for(capacity)))


def encode_batch_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, capacity: int | None = None
) -> SparseCode:
    """The k·N largest positive entries of the whole of ``x @ weight.T + bias``, each row's in ascending order.

    x (N, D), weight (F, D), bias (F,); a token keeps k features on average (Bussmann et al. 2024, arXiv 2412.06410).
    Entries equal to the smallest kept one are all kept, so ties can add to k·N. ``capacity`` as in `encode_relu`; on a
    GPU the scores of the whole batch are held. Raises ValueError unless 1 ≤ k ≤ F and capacity ≥ 0.
    """
    _check(x, weight, bias)
    check_k(k, weight.shape[0])
    return SparseCode(*_encode_batch_topk(x, weight, bias, k, slots_for(capacity)))


def encode_jump_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    bandwidth: float = BANDWIDTH,
    capacity: int | None = None,
) -> JumpCode:
    """``z * (z > threshold)`` for ``z = x @ weight.T + bias``: a jump at each feature's own threshold.

    x (N, D), weight (F, D), bias and threshold (F,); a threshold below 0 counts as 0. ``threshold`` gets
    straight-through gradients (the module's formula, Rajamanoharan et al. 2024, arXiv 2407.14435) from ``values`` and
    from ``l0``; ``bandwidth`` is in units of the scores, 0 switches them off. ``capacity`` as in `encode_relu`, but
    slots of the band count too, and in a row that overflows ``count`` includes them. Raises ValueError unless
    capacity ≥ 0 and bandwidth ≥ 0.
    """
    _check(x, weight, bias)
    check_threshold(threshold, bandwidth, weight.shape[0])
    check_devices("x", x, threshold=threshold)
    return JumpCode(*_encode_jump_relu(x, weight, bias, threshold, bandwidth, slots_for(capacity)))


def slots_for(capacity: int | None) -> int:
    """The operators' form of a capacity, -1 for None. Raises ValueError for a negative one."""
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0 slots, got {capacity}")
    return -1 if capacity is None else capacity


def check_threshold(threshold: Tensor, bandwidth: float, d_sae: int) -> None:
    """Raises ValueError unless the thresholds are (d_sae,) numbers and the bandwidth is at least 0."""
    check_bias("threshold", threshold, d_sae)
    if not 0 <= bandwidth < float("inf"):
        raise ValueError(f"bandwidth must be finite and at least 0, got {bandwidth}")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_matrix("x", x)
    check_matrix("weight", weight, x.shape[1], "(F, D)")
    check_bias("bias", bias, weight.shape[0])
    check_devices("x", x, weight=weight, bias=bias)


def topk_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's body: values, indices and count."""
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


_encode_topk = torch.library.custom_op("e2e_fast::encode_topk", topk_on_cpu, mutates_args=(), device_types="cpu")


def relu_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's body: values, indices and count."""
    core = native() if accumulator(x, weight) == torch.float32 else None
    if core is not None:
        return _select(core, x, weight, bias, 0, min(capacity, weight.shape[0]))
    values, indices, count = _compacted(_scores(x, weight, bias), x, weight, capacity)
    return values.to(torch.promote_types(x.dtype, weight.dtype)), indices, count


_encode_relu = torch.library.custom_op("e2e_fast::encode_relu", relu_on_cpu, mutates_args=(), device_types="cpu")


def _compacted(scores: Iterator[Tensor], x: Tensor, weight: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The code of chunks of scores (overwritten), by torch: values in the scores' dtype."""
    chunks = [SparseCode.from_dense(z.relu_(), None if capacity < 0 else capacity) for z in scores]
    width = max((c.values.shape[1] for c in chunks), default=max(0, min(capacity, weight.shape[0])))
    values = x.new_zeros(x.shape[0], width, dtype=accumulator(x, weight))
    indices = x.new_zeros(x.shape[0], width, dtype=torch.int32)
    count = torch.cat([x.new_empty(0, dtype=torch.int32), *(c.count.int() for c in chunks)])
    start = 0
    for c in chunks:
        rows, slots = c.values.shape
        values[start : start + rows, :slots] = c.values
        indices[start : start + rows, :slots] = c.indices.int()
        start += rows
    return values, indices, count


@torch.library.custom_op("e2e_fast::encode_batch_topk", mutates_args=(), device_types="cpu")
def _encode_batch_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    (N, _), F = x.shape, weight.shape[0]
    dtype = accumulator(x, weight)
    x_wide, w_wide = x.to(dtype), weight.to(dtype)  # so that scores are compared before they are rounded
    m = min(F, WIDENING * k)
    values, indices, _ = _encode_topk(x_wide, w_wide, bias, m)
    while True:
        smallest = _kth_largest(values, k * N)
        last = values[:, -1]
        more = ~(last <= 0) & ~(last < smallest)
        if m == F or not more.any():
            break
        m = min(F, WIDENING * m)
        wider = (N, m - values.shape[1])
        values = torch.cat([values, values.new_zeros(wider)], 1)
        indices = torch.cat([indices, indices.new_zeros(wider)], 1)
        values[more], indices[more], _ = _encode_topk(x_wide[more], w_wide, bias, m)
    keep = ~(values <= 0) & ~(values < smallest)
    count = keep.sum(-1, dtype=torch.int32)
    width = min(F, capacity) if capacity >= 0 else int(count.max()) if N else 0
    by_index, order = torch.sort(torch.where(keep, indices, F), dim=-1)
    by_index, order = by_index[:, :width], order[:, :width]
    short = width - by_index.shape[1]  # more slots than features were looked at
    by_index, order = nnf.pad(by_index, (0, short), value=F), nnf.pad(order, (0, short))
    used = by_index < F
    values = torch.where(used, values.gather(1, order), 0).to(torch.promote_types(x.dtype, weight.dtype))
    return values, torch.where(used, by_index, 0), count


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of the positive entries; 0 when they are fewer."""
    positive = values[~(values <= 0)]
    if positive.numel() < k or k == 0:
        return values.new_zeros(())
    return positive.kthvalue(positive.numel() - k + 1).values


@torch.library.custom_op("e2e_fast::encode_jump_relu", mutates_args=(), device_types="cpu")
def _encode_jump_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, bandwidth: float, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(x, weight)
    theta = threshold.to(dtype)
    floor = (theta - bandwidth / 2).clamp_min(0)
    core = native() if dtype == torch.float32 else None
    if core is not None:
        slots = min(capacity, weight.shape[0])
        scores = _select(core, x.float(), weight.float(), bias, 0, slots, floor)
    else:
        above = (z.masked_fill_(z <= floor, 0) for z in _scores(x, weight, bias))
        scores = _compacted(above, x, weight, capacity)
    return jump_slots(*scores, theta, bandwidth, torch.promote_types(x.dtype, weight.dtype))


def jump_slots(
    scores: Tensor, indices: Tensor, kept: Tensor, threshold: Tensor, bandwidth: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A `JumpCode`'s parts from the scores (N, K) above ``threshold - bandwidth / 2``, and how many there were (N,)."""
    theta = threshold[indices]
    found = ~(scores <= 0)
    active = found & ~(scores <= theta)
    band = found & ((scores - theta).abs() < bandwidth / 2)
    count = torch.where(kept > scores.shape[1], kept, active.sum(-1)).int()
    return torch.where(active, scores, 0).to(dtype), indices, count, count.to(scores.dtype), band


def _select(
    core: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    slots: int,
    floor: Tensor | None = None,
):
    """The code by the compiled core: TopK's for ``k`` > 0, else ReLU's. ``slots = -1``: the fullest row's.

    With ``floor`` (F,) scores that do not exceed their feature's are left out.
    """
    x32, w = x.detach().float().contiguous(), weight.detach().float().contiguous()
    b = None if bias is None else bias.detach().float().contiguous()
    chunks = [
        (rows, _select_rows(core, x32[rows], w, b, k, slots, floor)) for rows in row_chunks(x.shape[0], 1, ROWS_AT_ONCE)
    ]
    width = slots if slots >= 0 else max((scores.fullest() for _, scores in chunks), default=0)
    values, indices = empty(x.shape[0], width), empty(x.shape[0], width, dtype=torch.int32)
    count = empty(x.shape[0], dtype=torch.int32)
    for rows, scores in chunks:
        scores.finish(values[rows].numpy(), indices[rows].numpy(), count[rows].numpy(), torch.get_num_threads())
    return values.to(torch.promote_types(x.dtype, weight.dtype)), indices, count


def _select_rows(
    core: ModuleType, x: Tensor, w: Tensor, b: Tensor | None, k: int, limit: int, floor: Tensor | None = None
):
    """What the core selects (`Selection`, or `Positives` for k = 0) of a chunk of rows.

    Where the processor multiplies int8 or bfloat16 natively, its products with a proven bound find the candidates
    (csrc/screen.cpp), which are then scored in float32; else float32 products, a block of features at a time.
    """
    threads = torch.get_num_threads()
    share = SCREENED_SHARE["topk" if k else "relu"]
    selection = core.Selection(x.shape[0], k) if k else core.Positives(x.shape[0], limit)
    pays = x.shape[0] >= SCREENED_ROWS and x.shape[1] >= SCREENED_WIDTH and k * share <= w.shape[0]
    if pays:
        for precision in filter(core.native_precision, SCREENING):
            if selection.screen(x.numpy(), w.numpy(), array(b), precision, share, threads, array(floor)):
                return selection
    for block in row_chunks(w.shape[0], 4 * x.shape[0]):
        z = linear(x, w[block], None if b is None else b[block])
        if floor is not None:
            z.masked_fill_(z <= floor[block], 0)
        selection.add(z.numpy(), block.start, threads)
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


def _width(capacity: int, weight: Tensor):
    """Slots of a row; the fullest one's, where nothing is said, show when it runs."""
    return torch.library.get_ctx().new_dynamic_size(min=0) if capacity < 0 else min(capacity, weight.shape[0])


@_encode_relu.register_fake
def _(x, weight, bias, capacity):
    return _outputs_like(x, weight, _width(capacity, weight))


@_encode_batch_topk.register_fake
def _(x, weight, bias, k, capacity):
    return _outputs_like(x, weight, _width(capacity, weight))


@_encode_jump_relu.register_fake
def _(x, weight, bias, threshold, bandwidth, capacity):
    values, indices, count = _outputs_like(x, weight, _width(capacity, weight))
    l0 = x.new_empty(x.shape[0], dtype=accumulator(x, weight))
    return values, indices, count, l0, torch.empty_like(indices, dtype=torch.bool)


@_encode_topk.register_kernel("cuda")
def _(x, weight, bias, k):
    from e2e_fast.kernels.triton.encode import encode_topk as launch

    return launch(x, weight, bias, k)


@_encode_relu.register_kernel("cuda")
def _(x, weight, bias, capacity):
    from e2e_fast.kernels.triton.encode import encode_relu as launch

    return launch(x, weight, bias, capacity)


@_encode_batch_topk.register_kernel("cuda")
def _(x, weight, bias, k, capacity):
    from e2e_fast.kernels.triton.encode import encode_batch_topk as launch

    return launch(x, weight, bias, k, capacity)[0]


@_encode_jump_relu.register_kernel("cuda")
def _(x, weight, bias, threshold, bandwidth, capacity):
    from e2e_fast.kernels.triton.jump_relu import encode_jump_relu as launch

    return launch(x, weight, bias, threshold, bandwidth, capacity)


def _setup_context(ctx, inputs, output):
    x, weight, bias, *rest = inputs
    values, indices, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, values, indices)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.rest = (None,) * len(rest)


def _backward(ctx, dvalues, dindices, dcount):
    if dvalues is None:
        return None, None, None, *ctx.rest
    return *_encoder_gradients(ctx, ctx.saved_tensors, dvalues), *ctx.rest


def _encoder_gradients(ctx, saved, dvalues):
    """dx, dweight and dbias."""
    x, weight, values, indices = saved
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    _, dweight, dbias, _, dx = torch.ops.e2e_fast.code_backward(
        values, indices, dvalues, None, None, x, weight, False, False, need_weight or need_bias, need_x, None, False
    )
    dbias = dbias.to(ctx.bias_dtype) if need_bias and ctx.bias_dtype is not None else None
    return dx if need_x else None, dweight if need_weight else None, dbias


_encode_topk.register_autograd(_backward, setup_context=_setup_context)
_encode_relu.register_autograd(_backward, setup_context=_setup_context)
_encode_batch_topk.register_autograd(_backward, setup_context=_setup_context)


def _setup_context_jump(ctx, inputs, output):
    x, weight, bias, threshold, ctx.bandwidth, _ = inputs
    values, indices, _, _, band = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, values, indices, threshold, band)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_jump(ctx, dvalues, dindices, dcount, dl0, dband):
    *saved, threshold, band = ctx.saved_tensors
    dx = dweight = dbias = dthreshold = None
    if dvalues is not None:
        dx, dweight, dbias = _encoder_gradients(ctx, saved, dvalues)
    if ctx.needs_input_grad[3]:
        dthreshold = threshold_gradient(saved[3], band, dvalues, dl0, threshold, ctx.bandwidth)
    return dx, dweight, dbias, dthreshold, None, None


_encode_jump_relu.register_autograd(_backward_jump, setup_context=_setup_context_jump)


def threshold_gradient(
    indices: Tensor, band: Tensor, dvalues: Tensor | None, dl0: Tensor | None, threshold: Tensor, bandwidth: float
) -> Tensor:
    """``-(1/ε) Σ (θ_j dvalues + dl0)`` over the slots of the band: (F,), in a fixed order of additions.

    indices, band, dvalues (N, K), the last with the gradients of silent slots too; dl0 (N,); either may be None.
    """
    dtype = accumulator(threshold, dvalues)
    total = torch.zeros(threshold.shape, dtype=dtype, device=threshold.device)
    if bandwidth == 0 or (dvalues is None and dl0 is None):
        return total.to(threshold.dtype)
    pull = torch.zeros(band.shape, dtype=dtype, device=band.device)
    if dvalues is not None:
        pull += threshold.to(dtype)[indices] * dvalues
    if dl0 is not None:
        pull += dl0[:, None]
    pull = torch.where(band, pull, 0).flatten()
    if pull.is_cuda:  # by sorting, where index_add_ would add in any order
        total.index_put_((indices.flatten().long(),), pull, accumulate=True)
    else:
        total.index_add_(0, indices.flatten(), pull)
    return (total / -bandwidth).to(threshold.dtype)
