"""Weighted sum of dictionary rows, each divided by its own norm.

    y_n = Σ_k values[n, k] · s_j · W[j] + b        j = indices[n, k],  s_j = 1 / max(‖W[j]‖, 1e-12)

The normalisation is a scale on K numbers, never a normalised copy of W; autograd sees it (Braun et al. 2024, App. D):
a row's gradient is the tangent projection divided by its norm. The backward pass is `e2e_fast.kernels.code_backward`.

Operator: ``e2e_fast::decode(values, indices, weight, bias?, normalize, band?, inverse_norms?) -> y``, y (N, D) in
weight's dtype, accumulated in float32 (float64 for float64 weights); ``band`` (N, K) bool marks slots of a JumpReLU
code that get a gradient even where they hold no value; ``inverse_norms`` (F,) are the s_j where they are known.

>>> import torch
>>> from e2e_fast.kernels import SparseCode
>>> code = SparseCode(torch.tensor([[2.0, 1.0]]), torch.tensor([[1, 0]]), torch.tensor([2]))
>>> decode(code, torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
tensor([[1., 2.]])
"""

from types import ModuleType

import torch
import torch.nn.functional as nnf
from torch import Tensor

from e2e_fast.kernels._buffers import empty
from e2e_fast.kernels._checks import accumulator, check_bias, check_code, check_devices, check_indices, check_matrix
from e2e_fast.kernels._native import array, native
from e2e_fast.kernels.reference import NORM_EPS
from e2e_fast.kernels.sparse_code import JumpCode, SparseCode


def decode(
    code: SparseCode | JumpCode,
    weight: Tensor,
    bias: Tensor | None = None,
    normalize: bool = True,
    *,
    inverse_norms: Tensor | None = None,
) -> Tensor:
    """Weighted sum of dictionary rows: ``(values[..., None] * unit(weight)[indices]).sum(-2) + bias``.

    code.values, code.indices (N, K); weight (F, D), rows need not be unit; bias (D,); returns (N, D) in weight's dtype,
    accumulated in float32. Slots whose value is zero or negative are unused. ``inverse_norms`` (F,) are those of the
    rows where they are known, which saves a GPU a pass over weight; they are believed. Raises ValueError when an index
    is outside [0, F) (on a GPU, where the check would synchronise, such an index is undefined behaviour).
    """
    check_code(code.values, code.indices)
    check_matrix("weight", weight, expected="(F, D)")
    check_bias("bias", bias, weight.shape[1])
    check_bias("inverse_norms", inverse_norms, weight.shape[0])
    others = {"weight": weight, "bias": bias, "inverse_norms": inverse_norms}
    check_devices("code.values", code.values, indices=code.indices, **others)
    band = code.band if isinstance(code, JumpCode) else None
    known = known_norms(weight, normalize, inverse_norms)
    return _decode(code.values, code.indices, weight, bias, normalize, band, known)


def known_norms(weight: Tensor, normalize: bool, inverse_norms: Tensor | None) -> Tensor | None:
    """What forward and backward share: the given inverse norms, or on a GPU, where each would make them, fresh ones."""
    if not normalize:
        return None
    if inverse_norms is None and weight.is_cuda:
        return row_inverse_norms(weight.detach())
    return inverse_norms


def row_inverse_norms(weight: Tensor) -> Tensor:
    """``1 / max(‖row‖, 1e-12)`` of each row of weight (F, D): (F,) in float32, or float64 for float64 weights."""
    norms = torch.linalg.vector_norm(weight, dim=-1, dtype=accumulator(weight))
    return norms.clamp_min(NORM_EPS).reciprocal()


def decode_on_cpu(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    normalize: bool,
    band: Tensor | None = None,
    inverse_norms: Tensor | None = None,
) -> Tensor:
    """The operator's body."""
    dtype = accumulator(weight)
    core = native() if dtype == torch.float32 else None
    if core is not None:
        return gather(core, values, indices, weight, normalize, bias, nonzero=False).to(weight.dtype)
    check_indices(indices, weight.shape[0])
    scaled = torch.where(values <= 0, 0, values).to(dtype)
    if normalize:
        scaled = scaled * (row_inverse_norms(weight) if inverse_norms is None else inverse_norms)[indices]
    if values.numel():
        y = nnf.embedding_bag(indices, weight.to(dtype), per_sample_weights=scaled, mode="sum")
    else:
        y = torch.zeros(values.shape[0], weight.shape[1], dtype=dtype)
    return (y if bias is None else y + bias).to(weight.dtype)


_decode = torch.library.custom_op("e2e_fast::decode", decode_on_cpu, mutates_args=(), device_types="cpu")


def gather(
    core: ModuleType,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    normalize: bool,
    bias: Tensor | None,
    nonzero: bool,
) -> Tensor:
    """``Σ_k values[n, k] · s_j · weight[j] + bias`` by the compiled core: (N, D) float32.

    Takes the slots whose value is not <= 0, or with ``nonzero`` those whose value is not 0.
    """
    if indices.dtype == torch.int64:  # in 32 bits a wrong one could look right
        check_indices(indices, weight.shape[0])
    y = empty(values.shape[0], weight.shape[1])
    core.decode(
        array(values), array(indices, torch.int32), array(weight), normalize, array(bias), nonzero, y.numpy(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


@_decode.register_fake
def _(values, indices, weight, bias, normalize, band=None, inverse_norms=None):
    return weight.new_empty(values.shape[0], weight.shape[1])


@_decode.register_kernel("cuda")
def _(values, indices, weight, bias, normalize, band=None, inverse_norms=None):
    from e2e_fast.kernels.triton.decode import decode as launch

    return launch(values, indices, weight, bias, normalize, inverse_norms)


def _setup_context(ctx, inputs, output):
    values, indices, weight, bias, ctx.normalize, band, inverse_norms = inputs
    ctx.save_for_backward(values, indices, weight, band, inverse_norms)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    values, indices, weight, band, inverse_norms = ctx.saved_tensors
    need_values, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    dweight = dvalues = None
    if need_values or need_weight:
        dweight, _, _, dvalues, _ = torch.ops.e2e_fast.code_backward(
            values, indices, None, dy, weight, None, None, ctx.normalize, need_weight, False, False, inverse_norms
        )
    if dvalues is not None and need_values and band is not None:
        from e2e_fast.kernels.code_backward import silent_gradients  # which imports this module

        dvalues += silent_gradients(values, indices, band, None, dy, weight, ctx.normalize, inverse_norms)
    dbias = dy.sum(0, dtype=accumulator(dy)).to(ctx.bias_dtype) if need_bias else None
    return dvalues if need_values else None, None, dweight if need_weight else None, dbias, None, None, None


_decode.register_autograd(_backward, setup_context=_setup_context)
