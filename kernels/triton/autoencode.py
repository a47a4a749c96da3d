"""The backward pass of encoder and decoder in one sweep over the transposed code: code_backward's GPU side.

For every feature j and its tokens n (used slots with indices[n, k] = j), s_j = 1/‖W_dec[j]‖, u_j = s_j W_dec[j]:

    dvalues[n, k] = g_n · u_j + dvalues_in[n, k]
    a_j = Σ_n values[n, k] g_n                         dW_dec[j] = s_j (a_j - (a_j · u_j) u_j)
    dW_enc[j] = Σ_n dvalues[n, k] x_n                  db_enc[j] = Σ_n dvalues[n, k]
    dx_n = Σ_k dvalues[n, k] W_enc[j]                  a second, token-wise gather (`decode.gather_rows`)

The transpose is a stable sort of the slots by feature: a feature's tokens come in ascending order, every sum has a
fixed order, and two runs agree to the bit. Nothing is added atomically: a program owns a *segment*, at most
``SEGMENT`` tokens of one feature, and segments of the longest features are launched first. A feature of one segment is
finished on the spot. The others leave partial sums a and dW_enc, which a second kernel adds up in order: a feature that
is active in half of all tokens keeps many programs busy, and not one alone for as long as all others together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2e_fast.kernels.reference import NORM_EPS
from e2e_fast.kernels.triton._launch import (
    accumulator,
    blocks,
    contiguous,
    launch,
    promoted,
    store_rounded,
    tl_accumulator,
)
from e2e_fast.kernels.triton.decode import gather_rows, row_inverse_norms

MOST_PARTIAL = 4096
"""Segments beyond a feature's first that a call makes room for: with very full codes segments grow instead."""


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
    # An operator's results may not share memory, so each empty one is a tensor of its own.
    dW_dec = W_dec.new_empty(F, D) if need_dW_dec and W_dec is not None else values.new_empty(0)
    dW_enc = W_enc.new_empty(F, D) if need_dW_enc and W_enc is not None else values.new_empty(0)
    db_enc = W_enc.new_empty(F) if need_dW_enc and W_enc is not None else values.new_empty(0)
    scale = None
    if W_dec is not None and normalize:
        scale = row_inverse_norms(W_dec) if inverse_norms is None else inverse_norms.contiguous()
    order, offsets, by_count = transpose(values, indices, F)
    if order.numel() < 1 << 31:
        order = order.int()  # a division of 64-bit numbers costs a hundred instructions, and one stands in the loop
    options = blocks("code_backward", weight, D)
    segment = max(options.pop("SEGMENT"), triton.cdiv(N * K, MOST_PARTIAL))
    extra = N * K // segment
    ranks, ends = segments(offsets, by_count, segment, extra)
    acc = accumulator(promoted(values, weight))
    partial_a, partial_e = values.new_empty(2, 2 * max(extra, 1), D, dtype=acc)
    partial_db = values.new_empty(2 * max(extra, 1), dtype=acc)
    constants = {"ACC": tl_accumulator(acc), "BLOCK_D": triton.next_power_of_2(D)}
    spans = (offsets, by_count, ranks, ends, segment, extra)
    gradients = tuple(part if part.numel() else None for part in (dW_dec, dW_enc, db_enc))
    launch(
        code_backward_kernel, (F + extra,), values,
        order, *spans,
        values.contiguous(), contiguous(dvalues), contiguous(g), contiguous(W_dec), scale, contiguous(x),
        *gradients, out, partial_a, partial_e, partial_db,
        F, K, D, (1 - 1e-6) / NORM_EPS, **constants, **options,
    )  # fmt: skip
    if extra and (need_dW_dec or need_dW_enc):
        launch(
            add_segments_kernel, (min(extra, F),), values,
            *spans, contiguous(W_dec), scale, partial_a, partial_e, partial_db, *gradients,
            F, D, (1 - 1e-6) / NORM_EPS, **constants, **blocks("add_segments", weight, D),
        )  # fmt: skip
    dx = values.new_empty(0)
    if need_dx:
        assert x is not None
        assert W_enc is not None
        dx = gather_rows(out, indices, W_enc, None, None, positive=False).to(x.dtype)
    return dW_dec, dW_enc, db_enc, out, dx


def transpose(values: Tensor, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The code by feature: used slots n·K + k in feature order, each feature's span, and features by falling count.

    order (N·K,) int64 (unused slots last), offsets (F + 1,) int64, by_count (F,) int64. Deterministic.
    """
    features = torch.where(values <= 0, d_sae, indices).flatten()
    features, order = torch.sort(features, stable=True)
    bounds = torch.arange(d_sae + 1, device=values.device, dtype=features.dtype)
    offsets = torch.searchsorted(features, bounds)
    return order, offsets, torch.argsort(offsets.diff(), descending=True, stable=True)


def segments(offsets: Tensor, by_count: Tensor, segment: int, extra: int) -> tuple[Tensor, Tensor]:
    """Who owns what: for each of F + extra programs the rank of its feature, and where each rank's programs end.

    ranks (F + extra,) int64, F for programs without work; ends (F,) int64, by rank. A feature of n tokens has
    max(1, ⌈n / segment⌉) programs, one after the other; all features together at most F + extra.
    """
    counts = offsets.diff()[by_count]
    ends = ((counts + segment - 1) // segment).clamp_min(1).cumsum(0)
    programs = torch.arange(by_count.numel() + extra, device=ends.device)
    return torch.searchsorted(ends, programs, right=True), ends


@triton.jit
def code_backward_kernel(
    order_ptr,  # (N * K,) int32 or int64: slots sorted by feature
    offsets_ptr,  # (F + 1,) feature j owns order[offsets[j] : offsets[j + 1]]
    by_count_ptr,  # (F,) rank → feature
    ranks_ptr,  # (F + extra,) program → rank, F without work
    ends_ptr,  # (F,) rank → its last program + 1
    segment,  # tokens of a program
    extra,
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
    partial_a_ptr,  # (2 * extra, D) sums of segments, where a feature has several
    partial_e_ptr,  # (2 * extra, D)
    partial_db_ptr,  # (2 * extra,)
    F,
    K,
    D,
    largest_scale,  # of rows shorter than this scale's inverse nothing is projected out
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One segment a program. BLOCK_T tokens at a time, each with its own partial sums: one reduction, at the end."""
    if tl.load(ranks_ptr + tl.program_id(0)) >= F:
        return
    feature, first, last, many, place = _owned(offsets_ptr, by_count_ptr, ranks_ptr, ends_ptr, segment)
    order_ptr += first + place * segment
    tokens_here = tl.minimum(last - first - place * segment, segment).to(tl.int32)
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
    for start in range(0, tokens_here, BLOCK_T):
        positions = start + tl.arange(0, BLOCK_T)
        valid = positions < tokens_here
        slots = tl.load(order_ptr + positions, mask=valid, other=0)
        tokens = slots // K
        addresses = tokens.to(tl.int64)[:, None] * D + cols[None, :]
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
    # Read anew: numbers that live through the loop would cost registers in it.
    feature, first, last, many, place = _owned(offsets_ptr, by_count_ptr, ranks_ptr, ends_ptr, segment)
    if many > 1:
        row = _partial_row(tl.program_id(0), tl.load(ranks_ptr + tl.program_id(0)), place, extra)
        if dW_enc_ptr is not None:
            tl.store(partial_e_ptr + row * D + cols, tl.sum(e, 0), mask=inside)
            tl.store(partial_db_ptr + row, tl.sum(db, 0))
        if dW_dec_ptr is not None:
            tl.store(partial_a_ptr + row * D + cols, tl.sum(a, 0), mask=inside)
    else:
        if dW_enc_ptr is not None:
            store_rounded(dW_enc_ptr + feature * D + cols, tl.sum(e, 0), inside)
            store_rounded(db_enc_ptr + feature, tl.sum(db, 0), None)
        if dW_dec_ptr is not None:
            total = tl.sum(a, 0)
            if scale_ptr is not None:
                total = _tangent(total, unit, scale, largest_scale)
            store_rounded(dW_dec_ptr + feature * D + cols, total, inside)


@triton.jit
def add_segments_kernel(
    offsets_ptr,  # (F + 1,)
    by_count_ptr,  # (F,)
    ranks_ptr,  # (F + extra,) unused
    ends_ptr,  # (F,)
    segment,
    extra,
    W_dec_ptr,  # (F, D) or None
    scale_ptr,  # (F,) or None
    partial_a_ptr,  # (2 * extra, D)
    partial_e_ptr,  # (2 * extra, D)
    partial_db_ptr,  # (2 * extra,)
    dW_dec_ptr,  # (F, D) or None
    dW_enc_ptr,  # (F, D) or None
    db_enc_ptr,  # (F,) or None
    F,
    D,
    largest_scale,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One rank a program: the sums of its feature's segments, where it has several, in their order."""
    rank = tl.program_id(0)
    feature = tl.load(by_count_ptr + rank).to(tl.int64)
    many = tl.cdiv(tl.load(offsets_ptr + feature + 1) - tl.load(offsets_ptr + feature), segment)
    if many < 2:
        return
    program = tl.load(ends_ptr + rank) - many
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    if dW_dec_ptr is not None:
        a = tl.zeros((BLOCK_D,), ACC)
    if dW_enc_ptr is not None:
        e = tl.zeros((BLOCK_D,), ACC)
        db = tl.zeros((), ACC)
    for place in range(0, many):
        row = _partial_row(program + place, rank, place, extra)
        if dW_dec_ptr is not None:
            a += tl.load(partial_a_ptr + row * D + cols, mask=inside, other=0.0)
        if dW_enc_ptr is not None:
            e += tl.load(partial_e_ptr + row * D + cols, mask=inside, other=0.0)
            db += tl.load(partial_db_ptr + row)
    if dW_dec_ptr is not None:
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + feature).to(ACC)
            unit = tl.load(W_dec_ptr + feature * D + cols, mask=inside, other=0.0).to(ACC) * scale
            a = _tangent(a, unit, scale, largest_scale)
        store_rounded(dW_dec_ptr + feature * D + cols, a, inside)
    if dW_enc_ptr is not None:
        store_rounded(dW_enc_ptr + feature * D + cols, e, inside)
        store_rounded(db_enc_ptr + feature, db, None)


@triton.jit
def _owned(offsets_ptr, by_count_ptr, ranks_ptr, ends_ptr, segment):
    """Of this program: its feature, the feature's span and number of segments, and which of them is its own."""
    program = tl.program_id(0)
    rank = tl.load(ranks_ptr + program)
    feature = tl.load(by_count_ptr + rank).to(tl.int64)
    first = tl.load(offsets_ptr + feature)
    last = tl.load(offsets_ptr + feature + 1)
    many = tl.maximum(tl.cdiv(last - first, segment), 1)
    return feature, first, last, many, program - (tl.load(ends_ptr + rank) - many)


@triton.jit
def _partial_row(program, rank, place, extra):
    """Where a segment's sums lie: first segments in the lower half, all others in the upper.

    Each rank has one program and the further ones of its feature, so program - rank counts the further ones before.
    """
    before = (program - rank).to(tl.int64)
    return tl.where(place == 0, before, extra + before - 1)


@triton.jit
def _tangent(row, unit, scale, largest_scale):
    """The gradient of a row from that of its unit row."""
    along = tl.where(scale < largest_scale, tl.sum(row * unit, 0), 0.0)
    return (row - along * unit) * scale
