"""The backward pass of encoder and decoder in one sweep over the transposed code.

For every feature j and its tokens n (slots with values[n, k] > 0 and indices[n, k] = j), with s_j = 1/‖W_dec[j]‖ and
the unit row u_j = s_j W_dec[j]:

    dvalues[n, k] = g_n · u_j + dvalues_in[n, k]         g (N, D) the gradient of x̂, dvalues_in that of the values
    a_j = Σ_n values[n, k] g_n                           dW_dec[j] = s_j (a_j - (a_j · u_j) u_j)    tangent projection
    dW_enc[j] = Σ_n dvalues[n, k] x_n                    db_enc[j] = Σ_n dvalues[n, k]
    dx_n = Σ_k dvalues[n, k] W_enc[j]

Nothing of size N × F or N × K × D is formed, sums run in a fixed order, and features without tokens get exact zeros.

Operator: ``e2e_fast::code_backward(values, indices, dvalues?, g?, W_dec?, x?, W_enc?, normalize, need_dW_dec,
need_dW_enc, need_dx, inverse_norms?) -> (dW_dec, dW_enc, db_enc, dvalues, dx)``. ``g`` and ``W_dec`` come together
(absent: the code was not decoded), so do ``x`` and ``W_enc`` (absent: not encoded). dW_dec, dW_enc (F, D) and dx (N, D)
have the dtypes of W_dec, W_enc and x, db_enc (F,) W_enc's, dvalues (N, K) that of values and 0 in unused slots; what is
not needed has shape (0,), db_enc goes with dW_enc. Gradients may have any strides.
``inverse_norms`` (F,), where given, are the s_j: on a GPU they save reading W_dec once more; the compiled core makes
them as it goes.

>>> values, indices = torch.tensor([[2.0], [1.0]]), torch.tensor([[1], [1]])
>>> g, W_dec = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
>>> dW_dec, _, _, dvalues, _ = code_backward(values, indices, None, g, W_dec, None, None, True, True, False, False)
>>> dW_dec.tolist(), dvalues.tolist()                 # feature 0 never fired; feature 1 only turns, it cannot grow
([[0.0, 0.0], [1.0, 0.0]], [[0.0], [3.0]])
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from e2e_fast.kernels._buffers import empty
from e2e_fast.kernels._checks import accumulator, check_indices
from e2e_fast.kernels._gemm import row_chunks
from e2e_fast.kernels._native import array, native, strided
from e2e_fast.kernels.decode import gather, row_inverse_norms
from e2e_fast.kernels.reference import NORM_EPS

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def backward_on_cpu(
    values: Tensor,
    indices: Tensor,
    dvalues: Tensor | None,
    g: Tensor | None,
    W_dec: Tensor | None,
    x: Tensor | None,
    W_enc: Tensor | None,
    normalize: bool,
    need_dW_dec: bool,
    need_dW_enc: bool,
    need_dx: bool,
    inverse_norms: Tensor | None = None,
    need_dvalues: bool = True,
) -> Gradients:
    """The operator's body."""
    job = (values, indices, dvalues, g, W_dec, x, W_enc, normalize, need_dW_dec, need_dW_enc, need_dx, need_dvalues)
    core = native() if accumulator(values, W_dec, W_enc) == torch.float32 else None
    return _torch_backward(*job, inverse_norms) if core is None else _native_backward(core, *job)


code_backward = torch.library.custom_op("e2e_fast::code_backward", backward_on_cpu, mutates_args=(), device_types="cpu")


def _native_backward(
    core, values, indices, dvalues, g, W_dec, x, W_enc, normalize, need_dW_dec, need_dW_enc, need_dx, need_dvalues
) -> Gradients:
    """The sweep by the compiled core, in float32.

    It goes by feature and dvalues lie by token: cores that write neighbouring slots take the line from each other.
    """
    features, width = (W_dec if W_dec is not None else W_enc).shape
    dv = empty(*values.shape) if need_dvalues or need_dx else None
    dW_dec = empty(features, width) if need_dW_dec else None
    dW_enc = empty(features, width) if need_dW_enc else None
    db_enc = empty(features) if need_dW_enc else None
    core.code_backward(
        array(values), array(indices, torch.int32), strided(dvalues), array(g), None if g is None else array(W_dec),
        array(x) if need_dW_enc else None, normalize, array(dW_dec), array(dW_enc), array(db_enc), array(dv),
        features, width, torch.get_num_threads(),
    )  # fmt: skip
    dx = None
    if need_dx and dv is not None:
        dx = gather(core, dv, indices, W_enc, normalize=False, bias=None, nonzero=True)

    def result(gradient: Tensor | None, like: Tensor | None) -> Tensor:
        return values.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)

    kept = dv if need_dvalues else None
    return result(dW_dec, W_dec), result(dW_enc, W_enc), result(db_enc, W_enc), result(kept, values), result(dx, x)


def _torch_backward(
    values,
    indices,
    dvalues,
    g,
    W_dec,
    x,
    W_enc,
    normalize,
    need_dW_dec,
    need_dW_enc,
    need_dx,
    need_dvalues,
    inverse_norms,
) -> Gradients:
    """The sweep in torch: gathers and index_add_, a chunk of tokens at a time."""
    used = ~(values <= 0)
    dtype = accumulator(values, W_dec, W_enc)
    f = torch.where(used, values, 0).to(dtype)
    dv = torch.zeros_like(f) if dvalues is None else dvalues.to(dtype, copy=True)
    dW_dec, dW_enc, db_enc, dx = (values.new_empty(0) for _ in range(4))
    if g is not None and W_dec is not None:
        check_indices(indices, W_dec.shape[0])
        scale = f.new_ones(W_dec.shape[0])
        if normalize:
            scale = (row_inverse_norms(W_dec) if inverse_norms is None else inverse_norms).to(f.dtype)
        dW_dec = _decoder(f, indices, dv, g, W_dec, scale, normalize, need_dW_dec)
    dv = torch.where(used, dv, 0)
    if x is not None and W_enc is not None:
        check_indices(indices, W_enc.shape[0])
        if need_dW_enc:
            dW_enc = _scatter(dv, indices, x.to(dtype), W_enc.shape[0]).to(W_enc.dtype)
            db_enc = dv.new_zeros(W_enc.shape[0]).index_add_(0, indices.reshape(-1), dv.reshape(-1)).to(W_enc.dtype)
        if need_dx and values.numel():
            dx = nnf.embedding_bag(indices, W_enc.to(dtype), per_sample_weights=dv, mode="sum").to(x.dtype)
        elif need_dx:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    return dW_dec, dW_enc, db_enc, dv.to(values.dtype) if need_dvalues else values.new_empty(0), dx


def _decoder(
    f: Tensor, indices: Tensor, dv: Tensor, g: Tensor, W_dec: Tensor, scale: Tensor, normalize: bool, need: bool
) -> Tensor:
    """dW_dec, or shape (0,) when not needed; adds ``g_n · u_j`` to ``dv`` in place."""
    for rows in row_chunks(f.shape[0], 4 * f.shape[1] * W_dec.shape[1], multiple=1):
        rows_of_w = W_dec[indices[rows]].to(f.dtype)
        dv[rows] += (rows_of_w * g[rows].to(f.dtype)[:, None, :]).sum(-1) * scale[indices[rows]]
    if not need:
        return f.new_empty(0)
    a = _scatter(f, indices, g.to(f.dtype), W_dec.shape[0])
    return (tangent(a, W_dec.to(f.dtype), scale) if normalize else a).to(W_dec.dtype)


def _scatter(coefficients: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """``out[j] = Σ coefficients[n, k] rows[n]`` over the slots with indices[n, k] = j: (d_sae, D)."""
    out = rows.new_zeros(d_sae, rows.shape[1])
    for n in row_chunks(rows.shape[0], 4 * indices.shape[1] * rows.shape[1], multiple=1):
        terms = coefficients[n][..., None] * rows[n][:, None, :]
        out.index_add_(0, indices[n].reshape(-1), terms.reshape(-1, rows.shape[1]))
    return out


def tangent(a: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Gradient of a row from the gradient ``a`` of its unit row: ``s (a - (a·u) u)``, u = s·row. Overwrites ``a``.

    Rows shorter than 1e-12 are divided by that constant (`reference.NORM_EPS`), so nothing is projected out of theirs.
    """
    along = (a * weight).sum(-1) * scale.square()
    along[scale >= 1 / NORM_EPS] = 0
    return a.sub_(along[:, None] * weight).mul_(scale[:, None])


def silent_gradients(
    values: Tensor,
    indices: Tensor,
    band: Tensor,
    dvalues: Tensor | None,
    g: Tensor | None,
    W_dec: Tensor,
    normalize: bool,
    inverse_norms: Tensor | None,
) -> Tensor:
    """``g_n · u_j + dvalues`` in the slots of a JumpReLU code's band that hold no value, 0 in all others: (N, K)."""
    silent = band & (values <= 0)
    if g is None:
        return torch.zeros_like(values) if dvalues is None else torch.where(silent, dvalues, 0)
    return torch.ops.e2e_fast.code_backward(
        silent.to(values.dtype), indices, dvalues, g, W_dec, None, None, normalize, False, False, False, inverse_norms
    )[3]


@code_backward.register_fake
def _(
    values, indices, dvalues, g, W_dec, x, W_enc, normalize, need_dW_dec, need_dW_enc, need_dx, inverse_norms=None,
    need_dvalues=True,
):  # fmt: skip
    return (
        W_dec.new_empty(W_dec.shape) if need_dW_dec else values.new_empty(0),
        W_enc.new_empty(W_enc.shape) if need_dW_enc else values.new_empty(0),
        W_enc.new_empty(W_enc.shape[0]) if need_dW_enc else values.new_empty(0),
        values.new_empty(values.shape if need_dvalues else (0,)),
        x.new_empty(x.shape) if need_dx else values.new_empty(0),
    )


@code_backward.register_kernel("cuda")
def _(
    values, indices, dvalues, g, W_dec, x, W_enc, normalize, need_dW_dec, need_dW_enc, need_dx, inverse_norms=None,
    need_dvalues=True,
):  # fmt: skip
    from e2e_fast.kernels.triton.autoencode import code_backward as launch

    dW_dec, dW_enc, db_enc, dv, dx = launch(
        values, indices, dvalues, g, W_dec, x, W_enc, normalize, need_dW_dec, need_dW_enc, need_dx, inverse_norms
    )
    return dW_dec, dW_enc, db_enc, dv if need_dvalues else values.new_empty(0), dx
