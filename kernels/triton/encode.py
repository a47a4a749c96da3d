"""Sparse encoders on the GPU: exact TopK by selection, and ReLU, JumpReLU and BatchTopK by one filter.

    z = x W_encᵀ + b                        float32 scores, a chunk of rows at a time
    topk      the k largest positive z of a row, descending, lower index first among equals
    relu      z > 0          jump_relu   z > θ_j         batch_topk   z ≥ τ, τ the (k·N)-th largest of the whole batch

**Selection.** Positive floats order as the integers that their bits spell, so a score becomes a key: its bits if z > 0,
else 0; NaN the greatest. A row is read twice. First each lane keeps the maximum of its strided share; the k-th largest
of these maxima, found bit by bit, is a lower bound t of the k-th largest score, because the lanes are disjoint. Then
every key ≥ t, about k of them, is written to a list, and a second kernel ranks the list by counting. A row whose list
would not hold its survivors (many ties, or winners that share lanes) is settled on the spot: the exact k-th key, bit by
bit over the row, then the keys above it and the first of those equal to it. No atomics, no host round trip, and the
same bits on every run.

**Lists.** Where it is faster, scores come from a product of our own, which writes only groups of features of which one
may be kept (`filter_gemm.py`); selection and filter then go over these lists as they go over whole rows (`groups.py`).

**Screening.** float32 products are some twelve times slower than bfloat16 ones, so float32 inputs are scored in
bfloat16 first. With x̃, w̃ the rounded vectors, Cauchy and Schwarz bound what that can hide:

    |x·w - x̃·w̃| ≤ ‖x - x̃‖ ‖w‖ + ‖x̃‖ ‖w - w̃‖ =: r_j        (+ the rounding of sums, at most D·2⁻²³ ‖x‖ ‖w‖ each)

The k-th largest z̃_j - r_j is a lower bound t of the k-th largest score, so every winner has z̃_j + r_j ≥ t; the few that
do (about 2k) are scored again in float32 and ranked. The result is that of float32 scores, proven and not merely
likely. A row with more candidates than its list holds is scored in float32 whole.

**Filter.** Survivors of the threshold are compacted in ascending index; rows keep their first ``capacity`` and report
their true count.

A NaN score counts as the greatest and is kept, so that NaN propagates; -inf is a score like any other, never kept.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as nnf

from e2e_fast.kernels.triton._launch import (
    accumulator,
    blocks,
    contiguous,
    launch,
    mm_accumulated,
    promoted,
    round_to,
    row_chunks,
    store_rounded,
    tl_accumulator,
    variant,
)
from e2e_fast.kernels.triton.filter_gemm import CHUNK_BYTES as LIST_BYTES
from e2e_fast.kernels.triton.filter_gemm import MARGIN_BITS, filtered_scores, row_bounds, sampled_maxima, serves
from e2e_fast.kernels.triton.groups import (
    Scores,
    kth_largest_key,
    listed_length,
    read_scores,
    score_key,
    screening_radius,
)

CHUNK_BYTES = 1 << 28
"""Scores of one chunk of rows."""

MOST_SELECTED = 1024
"""Up to this k the selection kernel serves; beyond it a row is sorted whole."""

SCREENED_SHARE = 64
"""float32 inputs are screened in bfloat16 when F is at least this many times k: else there is little to save."""

Code = tuple[Tensor, Tensor, Tensor]


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Code:
    """relu of the k largest entries of ``x @ weight.T + bias``: values (N, k), indices (N, k) int32, count (N,) int32.

    x (N, D), weight (F, D), bias (F,). Values, in the promoted dtype of x and weight, descend; equal ones come in
    ascending index; unused slots are 0 with index 0. Scores are float32 (float64 for float64 inputs), the selection is
    exact; float32 inputs are screened in bfloat16 first where k is small beside F.
    """
    bias = contiguous(bias)
    if promoted(x, weight) == torch.float32 and SCREENED_SHARE * k <= weight.shape[0] and k <= MOST_SELECTED // 2:
        return encode_topk_screened(x.float(), weight.float(), bias, k)
    values, indices, count = _empty_code(x, weight, k)
    if k <= MOST_SELECTED and _filters("encode_topk", x, weight):
        x, weight = x.contiguous(), weight.contiguous()
        for rows in _list_chunks(x, weight):
            bounds = row_bounds(sampled_maxima(x[rows], weight, bias), k)
            scores = filtered_scores(x[rows], weight, bias, bounds=bounds)
            _select(scores, k, values[rows], indices[rows], count[rows])
        return values, indices, count
    for rows, scores in _score_chunks(x, weight, bias):
        _select(scores, k, values[rows], indices[rows], count[rows])
    return values, indices, count


def encode_topk_screened(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Code:
    """`encode_topk` of float32 x and weight by bfloat16 products and float32 rescoring; k ≤ `MOST_SELECTED` / 2."""
    N, D = x.shape
    x, weight, bias = x.contiguous(), weight.contiguous(), contiguous(bias)
    F = weight.shape[0]
    capacity = max(32, triton.next_power_of_2(4 * k))
    values, indices, count = _empty_code(x, weight, k)
    rounded_x, norms_x, errors_x = round_rows(x)
    rounded, norms, errors = round_rows(weight)
    # Sums of D products round by at most D · 2⁻²³ of ‖x‖ ‖w‖, in the screen and again in the rescoring.
    errors_x += 2 * D * 2.0**-23 * norms_x
    filters = variant("encode_topk", x, D) == "filter_gemm" and serves(rounded.dtype, D)
    for start, stop in row_chunks(N, 4 * F, LIST_BYTES if filters else CHUNK_BYTES):
        C, rows = stop - start, slice(start, stop)
        spreads = (errors_x[rows], norms_x[rows], norms, errors)
        if filters:
            bounds = row_bounds(sampled_maxima(rounded_x[rows], rounded, bias, spreads), k)
            scores = filtered_scores(rounded_x[rows], rounded, bias, bounds=bounds, spreads=spreads)
        else:
            scores = Scores(mm_accumulated(rounded_x[rows], rounded.t()), F, bias)
        keys, columns = (x.new_empty(C, capacity, dtype=torch.int32) for _ in range(2))
        found = x.new_empty(C, dtype=torch.int32)
        options = {"GROUP": scores.group, "CAPACITY": capacity}
        for again in (False, True):  # the second scan settles the rows that were scored whole
            launch(
                topk_scan_kernel, (C,), x,
                *scores.arguments, *((None,) * 4 if again else spreads), keys, columns, found, k,
                BITS=31, ONLY_OVERFLOWED=again, **options, **blocks("topk_scan", x),
            )  # fmt: skip
            if not again:
                launch(
                    rescore_kernel, (C,), x,
                    x[rows], weight, bias, *scores.arguments, keys, columns, found, D,
                    **options, **blocks("rescore", x),
                )  # fmt: skip
        _rank(keys, columns, found, k, torch.float32, values[rows], indices[rows], count[rows])
    return values, indices, count


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A float32 matrix (R, D) in bfloat16, its row norms (R,) and those of what the rounding took away.

    Norms are of the longer of row and rounded row, and a little generous, so that bounds made of them hold.
    """
    R, D = matrix.shape
    rounded = torch.empty_like(matrix, dtype=torch.bfloat16)
    norms, errors = matrix.new_empty(R), matrix.new_empty(R)
    if R:
        options = blocks("round_rows", matrix)
        launch(round_rows_kernel, (R,), matrix, matrix, rounded, norms, errors, D, 1 + 1e-4, **options)
    return rounded, norms, errors


def encode_relu(x: Tensor, weight: Tensor, bias: Tensor | None, capacity: int) -> Code:
    """The positive entries of ``x @ weight.T + bias``: values, indices (N, capacity), ascending; true count (N,).

    ``capacity = -1`` makes room for the fullest row, which waits for the GPU.
    """
    return filtered_code(x, weight, bias, None, capacity)


def encode_jump_relu(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, capacity: int) -> Code:
    """The entries of ``x @ weight.T + bias`` that exceed their feature's threshold (F,), and 0; as `encode_relu`."""
    return filtered_code(x, weight, bias, threshold, capacity)


def encode_batch_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, capacity: int) -> tuple[Code, Tensor]:
    """The k·N largest positive entries of the whole batch of scores, as `encode_relu`, and their smallest, τ (1,).

    Entries equal to τ are all kept, so ties can add to k·N. With fewer than k·N positive scores all are kept and τ
    is 0. Holds the scores of the whole batch, N × F accumulators, since τ is known only after the last of them.
    """
    bias, (N, _), F = contiguous(bias), x.shape, weight.shape[0]
    if _filters("encode_batch_topk", x, weight) and N:
        x, weight = x.contiguous(), weight.contiguous()
        sampled = sampled_maxima(x, weight, bias)
        bound = kth_key(Scores(sampled.view(torch.float32), sampled.shape[1]), k * N) - (1 << MARGIN_BITS)
        scores = filtered_scores(x, weight, bias, floor=_float_of(bound.clamp_min(0), torch.float32))
    else:
        scores = Scores(torch.cat([weight.new_empty(0, F), *(z.z for _, z in _score_chunks(x, weight, None))]), F, bias)
    dtype = scores.z.dtype
    key = kth_key(scores, k * N)
    tau, below = _float_of(key, dtype), _float_of((key - 1).clamp_min(0), dtype)
    if capacity < 0:
        capacity = _fullest(scores, below)
    code = _empty_code(x, weight, min(capacity, F))
    _filter(scores, below, *code)
    return code, tau


def _empty_code(x: Tensor, weight: Tensor, width: int, dtype: torch.dtype | None = None) -> Code:
    N = x.shape[0]
    values = x.new_empty(N, width, dtype=dtype or promoted(x, weight))
    return values, x.new_empty(N, width, dtype=torch.int32), x.new_empty(N, dtype=torch.int32)


def _score_chunks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Scores]]:
    """Spans of rows with their products x Wᵀ (C, F), in the accumulator's dtype; the bias is still to be added."""
    dtype, F = promoted(x, weight), weight.shape[0]
    columns = weight.to(dtype).t()
    for start, stop in row_chunks(x.shape[0], F * accumulator(dtype).itemsize, CHUNK_BYTES):
        yield slice(start, stop), Scores(mm_accumulated(x[start:stop].to(dtype), columns), F, bias)


def _filters(operator: str, x: Tensor, weight: Tensor) -> bool:
    """Whether this operator's scores come from `filter_gemm`."""
    chosen = variant(operator, x, x.shape[1]) == "filter_gemm"
    return chosen and x.dtype == weight.dtype and serves(x.dtype, x.shape[1])


def _list_chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    return (slice(*span) for span in row_chunks(x.shape[0], 4 * weight.shape[0], LIST_BYTES))


def _key_dtype(z: Tensor) -> torch.dtype:
    return torch.int64 if z.dtype == torch.float64 else torch.int32


def _float_of(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The positive number of a key."""
    return key.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


# --- TopK -----------------------------------------------------------------------------------------------------------


def _select(scores: Scores, k: int, values: Tensor, indices: Tensor, count: Tensor) -> None:
    """Writes the code of a chunk of rows."""
    if k > MOST_SELECTED:
        _select_by_sorting(scores.z, scores.bias, k, values, indices, count)
        return
    z, C = scores.z, len(scores.z)
    capacity = max(32, triton.next_power_of_2(2 * k))
    keys = z.new_empty(C, capacity, dtype=_key_dtype(z))
    columns = z.new_empty(C, capacity, dtype=torch.int32)
    found = z.new_empty(C, dtype=torch.int32)
    launch(
        topk_scan_kernel, (C,), z,
        *scores.arguments, None, None, None, None, keys, columns, found, k,
        GROUP=scores.group, BITS=8 * z.element_size() - 1, ONLY_OVERFLOWED=False, CAPACITY=capacity,
        **blocks("topk_scan", z),
    )  # fmt: skip
    _rank(keys, columns, found, k, z.dtype, values, indices, count)


def _rank(
    keys: Tensor,
    columns: Tensor,
    found: Tensor,
    k: int,
    dtype: torch.dtype,
    values: Tensor,
    indices: Tensor,
    count: Tensor,
) -> None:
    """Writes the k first of each row's list, in order."""
    C, capacity = keys.shape
    launch(
        topk_rank_kernel, (C,), keys,
        keys, columns, found, values, indices, count, k,
        VALUE=tl_accumulator(dtype), CAPACITY=capacity, **blocks("topk_rank", keys, 8 * capacity),
    )  # fmt: skip


def _select_by_sorting(z: Tensor, bias: Tensor | None, k: int, values: Tensor, indices: Tensor, count: Tensor) -> None:
    """The same for a k so large that a row's list would no longer be short."""
    z = z if bias is None else z + bias
    top, where = torch.sort(z, dim=-1, descending=True, stable=True)
    used = ~(top[:, :k] <= 0)
    values.copy_(torch.where(used, top[:, :k], 0))
    indices.copy_(torch.where(used, where[:, :k], 0))
    count.copy_(used.sum(-1))


@triton.jit
def topk_scan_kernel(
    z_ptr,  # scores of C rows, as groups.py says, up to found_ptr
    bias_ptr,
    numbers_ptr,
    listed_ptr,
    F,
    segments,
    slots,
    row_errors_ptr,  # (C,) or None: scores are exact; else each may be off by row_error · norm + row_norm · error
    row_norms_ptr,  # (C,) or None
    norms_ptr,  # (F,) or None
    errors_ptr,  # (F,) or None
    keys_ptr,  # (C, CAPACITY) out: keys of the survivors, ascending index; of their upper bounds when inexact
    columns_ptr,  # (C, CAPACITY) out: their features
    found_ptr,  # (C,) out: how many; beyond CAPACITY only when inexact
    k,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,  # of a key: 31, or 63 for float64
    ONLY_OVERFLOWED: tl.constexpr,  # leave rows alone whose list holds all it found
    CAPACITY: tl.constexpr,  # at least k
    BLOCK: tl.constexpr,
):
    """One row a program: lane maxima → lower bound of the k-th key → list of the keys that reach it."""
    row = tl.program_id(0).to(tl.int64)
    if ONLY_OVERFLOWED:  # noqa: SIM102 - decided when compiled, the next one when run
        if tl.load(found_ptr + row) <= CAPACITY:
            return
    keys_ptr += row * CAPACITY
    columns_ptr += row * CAPACITY
    row_error = 0.0
    row_norm = 0.0
    if errors_ptr is not None:
        row_error = tl.load(row_errors_ptr + row)
        row_norm = tl.load(row_norms_ptr + row)
    largest = tl.zeros((BLOCK,), keys_ptr.dtype.element_ty)
    for segment in range(0, segments):
        length = listed_length(listed_ptr, row, segment, F, segments, slots, GROUP)
        for start in range(0, length, BLOCK):
            z, cols, exists = read_scores(
                z_ptr, bias_ptr, numbers_ptr, row, segment, F, segments, slots, start, length, GROUP, BLOCK
            )
            if errors_ptr is not None:
                z -= _radius(z, norms_ptr, errors_ptr, row_norm, row_error, cols, exists)
                z = tl.where(z == z, z, 0.0)  # a score that may be anything bounds nothing
            largest = tl.maximum(largest, score_key(z))
    bound = kth_largest_key(largest, k, BITS)
    found = tl.zeros((), tl.int32)
    for segment in range(0, segments):
        length = listed_length(listed_ptr, row, segment, F, segments, slots, GROUP)
        for start in range(0, length, BLOCK):
            z, cols, exists = read_scores(
                z_ptr, bias_ptr, numbers_ptr, row, segment, F, segments, slots, start, length, GROUP, BLOCK
            )
            if errors_ptr is not None:
                z += _radius(z, norms_ptr, errors_ptr, row_norm, row_error, cols, exists)
            key = score_key(z)
            keep = (key >= bound) & exists
            slot = found + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(keys_ptr + slot, key, mask=keep & (slot < CAPACITY))
            tl.store(columns_ptr + slot, cols, mask=keep & (slot < CAPACITY))
            found += tl.sum(keep.to(tl.int32), 0)
    if errors_ptr is None:  # noqa: SIM102
        if found > CAPACITY:
            bound = tl.zeros((), keys_ptr.dtype.element_ty)
            above = tl.zeros((), tl.int32)
            for i in range(BITS):
                candidate = bound | (tl.full((), 1, keys_ptr.dtype.element_ty) << (BITS - 1 - i))
                reached_lanes = tl.zeros((BLOCK,), tl.int32)
                for segment in range(0, segments):
                    length = listed_length(listed_ptr, row, segment, F, segments, slots, GROUP)
                    for start in range(0, length, BLOCK):
                        z, _, _ = read_scores(
                            z_ptr, bias_ptr, numbers_ptr, row, segment, F, segments, slots, start, length, GROUP, BLOCK
                        )
                        reached_lanes += (score_key(z) >= candidate).to(tl.int32)
                reached = tl.sum(reached_lanes, 0)
                bound = tl.where(reached >= k, candidate, bound)
                # What a bit that is not set leaves behind is above every later candidate.
                above = tl.where(reached >= k, above, reached)
            room = k - above  # for keys equal to the bound, lowest index first
            ties = tl.zeros((), tl.int32)
            found = tl.zeros((), tl.int32)
            for segment in range(0, segments):
                length = listed_length(listed_ptr, row, segment, F, segments, slots, GROUP)
                for start in range(0, length, BLOCK):
                    z, cols, exists = read_scores(
                        z_ptr, bias_ptr, numbers_ptr, row, segment, F, segments, slots, start, length, GROUP, BLOCK
                    )
                    key = score_key(z)
                    tie = ((key == bound) & exists).to(tl.int32)
                    keep = ((key > bound) & exists) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= room))
                    slot = found + tl.cumsum(keep.to(tl.int32), 0) - 1
                    tl.store(keys_ptr + slot, key, mask=keep)
                    tl.store(columns_ptr + slot, cols, mask=keep)
                    found += tl.sum(keep.to(tl.int32), 0)
                    ties += tl.sum(tie, 0)
    tl.store(found_ptr + row, found)


@triton.jit
def topk_rank_kernel(
    keys_ptr,  # (C, CAPACITY)
    columns_ptr,  # (C, CAPACITY)
    found_ptr,  # (C,)
    values_ptr,  # (C, k) out
    indices_ptr,  # (C, k) out
    count_ptr,  # (C,) out
    k,
    VALUE: tl.constexpr,  # the dtype whose bits a key is
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: a survivor's place is the number of those before it (greater, or equal and of lower index)."""
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * CAPACITY
    columns_ptr += row * CAPACITY
    found = tl.load(found_ptr + row)
    i = tl.arange(0, CAPACITY)
    key = tl.load(keys_ptr + i, mask=i < found, other=0)
    column = tl.load(columns_ptr + i, mask=i < found, other=0)
    place = tl.zeros((CAPACITY,), tl.int32)
    for start in range(0, found, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other_key = tl.load(keys_ptr + j, mask=j < found, other=-1)[None, :]
        other_column = tl.load(columns_ptr + j, mask=j < found, other=0)[None, :]
        before = (other_key > key[:, None]) | ((other_key == key[:, None]) & (other_column < column[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    # The list fills the places 0 … found - 1; what is left of the k slots is unused, and so is a key of 0.
    place = tl.where(i < found, place, i)
    store_rounded(values_ptr + row * k + place, key.to(VALUE, bitcast=True), place < k)
    tl.store(indices_ptr + row * k + place, tl.where(key > 0, column, 0), mask=place < k)
    tl.store(count_ptr + row, tl.sum(((key > 0) & (place < k)).to(tl.int32), 0))


@triton.jit
def round_rows_kernel(
    matrix_ptr,  # (R, D)
    rounded_ptr,  # (R, D) out
    norms_ptr,  # (R,) out
    errors_ptr,  # (R,) out
    D,
    generous,
    BLOCK: tl.constexpr,
):
    """One row a program: bfloat16 copy, the longer of both norms, and the norm of the difference."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    rounded_squares = tl.zeros((BLOCK,), tl.float32)
    error_squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        w = tl.load(matrix_ptr + row * D + cols, mask=cols < D, other=0.0)
        rounded = round_to(w, rounded_ptr.dtype.element_ty)
        tl.store(rounded_ptr + row * D + cols, rounded, mask=cols < D)
        kept = rounded.to(tl.float32)
        squares += w * w
        rounded_squares += kept * kept
        error_squares += (w - kept) * (w - kept)
    norm = tl.sqrt(tl.maximum(tl.sum(squares, 0), tl.sum(rounded_squares, 0)))
    # Squares of numbers below 1e-22 vanish: the constant makes up for them.
    tl.store(norms_ptr + row, norm * generous + 1e-20)
    tl.store(errors_ptr + row, tl.sqrt(tl.sum(error_squares, 0)) * generous + 1e-20)


@triton.jit
def rescore_kernel(
    x_ptr,  # (C, D)
    weight_ptr,  # (F, D)
    full_bias_ptr,  # (F,) or None
    z_ptr,  # scores as in topk_scan_kernel; overwritten by exact ones where more was found than a list of keys holds
    bias_ptr,
    numbers_ptr,
    listed_ptr,
    F,
    segments,
    slots,
    keys_ptr,  # (C, CAPACITY) out: keys of the exact scores
    columns_ptr,  # (C, CAPACITY)
    found_ptr,  # (C,)
    D,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row a program: float32 scores of its candidates, or of all that is listed where they overflowed."""
    row = tl.program_id(0).to(tl.int64)
    found = tl.load(found_ptr + row)
    if found <= CAPACITY:
        for start in range(0, found, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            column = tl.load(columns_ptr + row * CAPACITY + i, mask=i < found, other=0)
            score = _products(x_ptr + row * D, weight_ptr, column, i < found, D, BLOCK_K, BLOCK_D)
            if full_bias_ptr is not None:
                score += tl.load(full_bias_ptr + column, mask=i < found, other=0.0).to(tl.float32)
            tl.store(keys_ptr + row * CAPACITY + i, score_key(score), mask=i < found)
    else:
        for segment in range(0, segments):
            length = listed_length(listed_ptr, row, segment, F, segments, slots, GROUP)
            for start in range(0, length, BLOCK_K):
                _, column, exists = read_scores(
                    z_ptr, None, numbers_ptr, row, segment, F, segments, slots, start, length, GROUP, BLOCK_K
                )
                score = _products(x_ptr + row * D, weight_ptr, column, exists, D, BLOCK_K, BLOCK_D)
                i = start + tl.arange(0, BLOCK_K)
                if numbers_ptr is None:  # whose bias is added when they are read
                    tl.store(z_ptr + row * F + i, score, mask=exists)
                else:
                    if full_bias_ptr is not None:
                        score += tl.load(full_bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
                    tl.store(z_ptr + (row * segments + segment) * slots * GROUP + i, score, mask=exists)


@triton.jit
def _products(x_ptr, weight_ptr, column, valid, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """x · weight[column] in float32, always in the same order."""
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        addresses = weight_ptr + column.to(tl.int64)[:, None] * D + d[None, :]
        w = tl.load(addresses, mask=valid[:, None] & (d < D)[None, :], other=0.0)
        total += w * tl.load(x_ptr + d, mask=d < D, other=0.0)[None, :]
    return tl.sum(total, 1)


@triton.jit
def _radius(z, norms_ptr, errors_ptr, row_norm, row_error, cols, exists):
    """`screening_radius` of one block of a row's scores."""
    norm = tl.load(norms_ptr + cols, mask=exists, other=0.0)
    error = tl.load(errors_ptr + cols, mask=exists, other=0.0)
    return screening_radius(z, row_error, row_norm, error, norm)


# --- Filter ---------------------------------------------------------------------------------------------------------


def filtered_code(
    x: Tensor, weight: Tensor, bias: Tensor | None, floor: Tensor | None, capacity: int, exact: bool = False
) -> Code:
    """The scores above 0 and ``floor`` (F,): values, in the accumulator's dtype if ``exact``, indices and count.

    With ``capacity = -1`` a row has room for the fullest; each chunk's products are taken once, and their code padded.
    """
    bias, floor, F = contiguous(bias), contiguous(floor), weight.shape[0]
    dtype = promoted(x, weight)
    dtype = accumulator(dtype) if exact else dtype
    chunks = _filter_chunks(x, weight, bias, floor, capacity)
    if capacity >= 0:
        code = _empty_code(x, weight, min(capacity, F), dtype)
        for rows, scores in chunks:
            values, indices, count = (part[rows] for part in code)
            _filter(scores, floor, values, indices, count)
            if scores.kept is not None:  # also what has no slot
                torch.sum(scores.kept, 1, out=count)
        return code
    parts = []
    for rows, scores in chunks:
        parts.append(_empty_code(x[rows], weight, _fullest(scores, floor), dtype))
        _filter(scores, floor, *parts[-1])
    if not parts:
        return _empty_code(x, weight, 0, dtype)
    width = max(values.shape[1] for values, _, _ in parts)
    padded = [[nnf.pad(part, (0, width - part.shape[1])) for part in code[:2]] for code in parts]
    values, indices = (torch.cat(every) for every in zip(*padded, strict=True))
    return values, indices, torch.cat([count for _, _, count in parts])


def _filter_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, floor: Tensor | None, capacity: int
) -> Iterator[tuple[slice, Scores]]:
    if not _filters("encode_filter", x, weight):
        yield from _score_chunks(x, weight, bias)
        return
    x, weight = x.contiguous(), weight.contiguous()
    for rows in _list_chunks(x, weight):
        # A group has a kept score at least: what finds no slot here would find none in the code.
        yield rows, filtered_scores(x[rows], weight, bias, floor=floor, slots=None if capacity < 0 else capacity)


def _fullest(scores: Scores, threshold: Tensor | None) -> int:
    """The largest count of any row. Waits for the GPU."""
    C = len(scores.z)
    none = scores.z.new_empty(C, 0)
    count = scores.z.new_empty(C, dtype=torch.int32)
    _filter(scores, threshold, none, none.int(), count)
    return int(count.max()) if C else 0


def _filter(scores: Scores, threshold: Tensor | None, values: Tensor, indices: Tensor, count: Tensor) -> None:
    """Writes the entries of C rows above the threshold: None for 0, (F,) one a feature, (1,) one for all."""
    if len(scores.z) == 0:
        return
    launch(
        filter_kernel, (len(scores.z),), scores.z,
        *scores.arguments, threshold, values, indices, count, values.shape[1],
        GROUP=scores.group, ONE_THRESHOLD=threshold is not None and threshold.numel() == 1,
        **blocks("filter", scores.z),
    )  # fmt: skip


@triton.jit
def filter_kernel(
    z_ptr,  # scores as in topk_scan_kernel
    bias_ptr,
    numbers_ptr,
    listed_ptr,
    F,
    segments,
    slots,
    threshold_ptr,  # (F,), (1,) or None
    values_ptr,  # (C, capacity) out
    indices_ptr,  # (C, capacity) out
    count_ptr,  # (C,) out
    capacity,
    GROUP: tl.constexpr,
    ONE_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: entries neither ≤ 0 nor ≤ their threshold (NaN is neither), compacted by a running sum."""
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * capacity
    indices_ptr += row * capacity
    if ONE_THRESHOLD:
        threshold = tl.load(threshold_ptr)
    found = tl.zeros((), tl.int32)
    for segment in range(0, segments):
        length = listed_length(listed_ptr, row, segment, F, segments, slots, GROUP)
        for start in range(0, length, BLOCK):
            z, cols, exists = read_scores(
                z_ptr, bias_ptr, numbers_ptr, row, segment, F, segments, slots, start, length, GROUP, BLOCK
            )
            drop = z <= 0
            if threshold_ptr is not None:
                if not ONE_THRESHOLD:
                    threshold = tl.load(threshold_ptr + cols, mask=exists, other=0.0)
                drop |= z <= threshold.to(z.dtype)
            keep = (drop ^ True) & exists
            slot = found + tl.cumsum(keep.to(tl.int32), 0) - 1
            fits = keep & (slot < capacity)
            store_rounded(values_ptr + slot, z, fits)
            tl.store(indices_ptr + slot, cols, mask=fits)
            found += tl.sum(keep.to(tl.int32), 0)
    tl.store(count_ptr + row, found)
    lanes = tl.arange(0, BLOCK)
    for start in range(found, capacity, BLOCK):
        slot = start + lanes
        store_rounded(values_ptr + slot, tl.zeros((BLOCK,), z_ptr.dtype.element_ty), slot < capacity)
        tl.store(indices_ptr + slot, tl.zeros((BLOCK,), tl.int32), mask=slot < capacity)


# --- The k-th largest of a matrix -----------------------------------------------------------------------------------

DIGIT_BITS = 8


def kth_key(scores: Scores, k: int) -> Tensor:
    """Key (1,) int64 of the k-th largest positive of all scores; 0 when fewer are positive.

    Radix selection: a histogram of the leading digit of all keys tells the digit of the k-th; then the next digit,
    among the keys that share the ones before. Integer counts, so the order of additions does not matter.
    """
    z, C = scores.z, len(scores.z)
    bits = 8 * z.element_size()
    prefix = torch.zeros(1, dtype=torch.int64, device=z.device)
    if k == 0 or C == 0:
        return prefix
    wanted = torch.full((1,), k, dtype=torch.int64, device=z.device)
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=z.device)
        launch(
            digit_histogram_kernel, (C,), z,
            *scores.arguments, prefix, histogram, shift,
            GROUP=scores.group, DIGIT_BITS=DIGIT_BITS, BINS=1 << DIGIT_BITS, **blocks("digit_histogram", z),
        )  # fmt: skip
        # at_least[d]: keys whose digit is d or more; the digit of the k-th is the last d with at_least[d] ≥ wanted.
        at_least = histogram.flip(0).cumsum(0).flip(0)
        digit = ((at_least >= wanted).sum(0, keepdim=True) - 1).clamp_min(0)
        above = torch.where(digit + 1 < at_least.numel(), at_least[(digit + 1).clamp_max(at_least.numel() - 1)], 0)
        wanted = wanted - above
        prefix = prefix | (digit << shift)
    return prefix


@triton.jit
def digit_histogram_kernel(
    z_ptr,  # scores as in topk_scan_kernel
    bias_ptr,
    numbers_ptr,
    listed_ptr,
    F,
    segments,
    slots,
    prefix_ptr,  # (1,) the digits found so far
    histogram_ptr,  # (BINS,) int64, added to
    shift,
    GROUP: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    BINS: tl.constexpr,  # 2 ** DIGIT_BITS
    BLOCK: tl.constexpr,
):
    """Counts one digit of the keys of a row whose higher digits equal the prefix's."""
    row = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    prefix = tl.load(prefix_ptr)
    counts = tl.zeros((BINS,), tl.int32)
    for segment in range(0, segments):
        length = listed_length(listed_ptr, row, segment, F, segments, slots, GROUP)
        for start in range(0, length, BLOCK):
            z, _, exists = read_scores(
                z_ptr, bias_ptr, numbers_ptr, row, segment, F, segments, slots, start, length, GROUP, BLOCK
            )
            key = score_key(z).to(tl.int64)
            same = ((key ^ prefix) >> shift >> DIGIT_BITS == 0) & exists
            digit = (key >> shift) & (BINS - 1)
            counts += tl.histogram(digit.to(tl.int32), BINS, mask=same)
    tl.atomic_add(histogram_ptr + bins, counts.to(tl.int64), sem="relaxed")
