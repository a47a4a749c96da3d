"""The backward pass of encoder and decoder in one sweep over the transposed code: code_backward's GPU side.

For every feature j and its tokens n (used slots with indices[n, k] = j), s_j = 1/‖W_dec[j]‖, u_j = s_j W_dec[j]:

    dvalues[n, k] = g_n · u_j + dvalues_in[n, k]
    a_j = Σ_n values[n, k] g_n                         dW_dec[j] = s_j (a_j - (a_j · u_j) u_j)
    dW_enc[j] = Σ_n dvalues[n, k] x_n                  db_enc[j] = Σ_n dvalues[n, k]
    dx_n = Σ_k dvalues[n, k] W_enc[j]                  a second, token-wise gather (`decode.gather_rows`)

The transpose is a stable sort of the slots by feature: a feature's tokens come in ascending order, every sum has a
fixed order, and two runs agree to the bit. One program owns a feature, so nothing is added atomically; features with
many tokens are launched first, so none of them is left over at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2e_fast.kernels.reference import NORM_EPS
from e2e_fast.kernels.triton._launch import blocks, launch, promoted, store_rounded, tl_accumulator
from e2e_fast.kernels.triton.decode import gather_rows, row_inverse_norms


def code_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dW_dec, dW_enc, db_enc, dvalues, dx of a code; schema and dtypes of ``e2e_fast::code_backward``.

    values, indices, dvalues (N, K); g (N, D) the gradient of the decoder's output, with W_dec (F, D); x (N, D) the
    encoder's input, with W_enc (F, D); either pair may be absent. What is not needed has shape (0,); dvalues is always
    there, 0 in unused slots. ``inverse_norms`` (F,), when given, saves reading W_dec for its norms.
    """
    weight = W_dec if W_dec is not None else W_enc
    if weight is None:
        raise ValueError("code_backward needs W_dec with g, or W_enc with x, got neither")
    N, K = values.shape
    F, D = weight.shape
    out = values.new_zeros(N, K)
    none = values.new_empty(0)
    dW_dec = W_dec.new_empty(F, D) if need_dW_dec and W_dec is not None else none
    dW_enc = W_enc.new_empty(F, D) if need_dW_enc and W_enc is not None else none
    db_enc = W_enc.new_empty(F) if need_dW_enc and W_enc is not None else none
    scale = None
    if W_dec is not None and normalize:
        scale = row_inverse_norms(W_dec) if inverse_norms is None else inverse_norms
    order, offsets, launch_order = transpose(values, indices, F)
    launch(
        code_backward_kernel, (F,), values,
        order, offsets, launch_order,
        values.contiguous(), _contiguous(dvalues), _contiguous(g), _contiguous(W_dec), scale, _contiguous(x),
        dW_dec if need_dW_dec else None, dW_enc if need_dW_enc else None, db_enc if need_dW_enc else None, out,
        K, D, (1 - 1e-6) / NORM_EPS,
        ACC=tl_accumulator(promoted(values, weight)), BLOCK_D=triton.next_power_of_2(D),
        **blocks("code_backward", weight, D),
    )  # fmt: skip
    dx = none
    if need_dx:
        assert x is not None
        assert W_enc is not None
        dx = gather_rows(out, indices, W_enc, None, None, positive=False).to(x.dtype)
    return dW_dec, dW_enc, db_enc, out, dx


def transpose(values: Tensor, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The code by feature: used slots n·K + k in feature order, each feature's span, and features by falling count.

    order (N·K,) int64 (unused slots last), offsets (F + 1,) int64, launch order (F,) int64. Deterministic; the order of
    launching does not touch any sum.
    """
    features = torch.where(values <= 0, d_sae, indices).flatten()
    features, order = torch.sort(features, stable=True)
    bounds = torch.arange(d_sae + 1, device=values.device, dtype=features.dtype)
    offsets = torch.searchsorted(features, bounds)
    return order, offsets, torch.argsort(offsets.diff(), descending=True)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@triton.jit
def code_backward_kernel(
    order_ptr,  # (N * K,) slots sorted by feature
    offsets_ptr,  # (F + 1,) feature j owns order[offsets[j] : offsets[j + 1]]
    launch_order_ptr,  # (F,)
    values_ptr,  # (N, K)
    dvalues_ptr,  # (N, K) or None
    g_ptr,  # (N, D) or None
    W_dec_ptr,  # (F, D) or None, as g
    scale_ptr,  # (F,) or None
    x_ptr,  # (N, D) or None
    dW_dec_ptr,  # (F, D) or None
    dW_enc_ptr,  # (F, D) or None
    db_enc_ptr,  # (F,) or None
    out_ptr,  # (N, K) dvalues
    K,
    D,
    largest_scale,  # of rows shorter than this scale's inverse nothing is projected out
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One feature a program. BLOCK_T tokens at a time, each with its own partial sums: one reduction, at the end."""
    feature = tl.load(launch_order_ptr + tl.program_id(0)).to(tl.int64)
    first = tl.load(offsets_ptr + feature)
    last = tl.load(offsets_ptr + feature + 1)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + feature).to(ACC)
    if g_ptr is not None:
        unit = tl.load(W_dec_ptr + feature * D + cols, mask=inside, other=0.0).to(ACC) * scale
    if dW_dec_ptr is not None:
        a = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    if dW_enc_ptr is not None:
        e = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        db = tl.zeros((BLOCK_T,), ACC)
    for start in range(first, last, BLOCK_T):
        positions = start + tl.arange(0, BLOCK_T)
        valid = positions < last
        slots = tl.load(order_ptr + positions, mask=valid, other=0)
        tokens = slots // K
        addresses = tokens[:, None] * D + cols[None, :]
        mask = valid[:, None] & inside[None, :]
        c = tl.zeros((BLOCK_T,), ACC)
        if dvalues_ptr is not None:
            c += tl.load(dvalues_ptr + slots, mask=valid, other=0.0).to(ACC)
        if g_ptr is not None:
            g = tl.load(g_ptr + addresses, mask=mask, other=0.0).to(ACC)
            c += tl.sum(g * unit[None, :], 1)
            if dW_dec_ptr is not None:
                f = tl.load(values_ptr + slots, mask=valid, other=0.0).to(ACC)
                a += f[:, None] * g
        if dW_enc_ptr is not None:
            x = tl.load(x_ptr + addresses, mask=mask, other=0.0).to(ACC)
            e += c[:, None] * x
            db += c
        store_rounded(out_ptr + slots, c, valid)
    if dW_dec_ptr is not None:
        row = tl.sum(a, 0)
        if scale_ptr is not None:
            along = tl.where(scale < largest_scale, tl.sum(row * unit, 0), 0.0)
            row = (row - along * unit) * scale
        store_rounded(dW_dec_ptr + feature * D + cols, row, inside)
    if dW_enc_ptr is not None:
        store_rounded(dW_enc_ptr + feature * D + cols, tl.sum(e, 0), inside)
        store_rounded(db_enc_ptr + feature, tl.sum(db, 0), None)
