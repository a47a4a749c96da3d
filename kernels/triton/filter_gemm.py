"""Encoder scores by a product of our own, which writes only what an activation may keep: a variant of `encode`.

    z = x W_encᵀ + b          in tiles of rows × features; a program owns BLOCK_R rows and a run of features
    kept                      z > 0, z > θ_j, z > τ, or key(z) ≥ t_n: ReLU, JumpReLU, BatchTopK, TopK
    written                   groups of GROUP neighbouring features of which one is kept, listed (`groups.py`)

A program takes its tiles in ascending order and counts, for each of its rows, the groups it has listed: a group's slot
is the sum of those before it. So there are no atomics, lists ascend, and two runs agree to the bit; N × F numbers are
never written. A ReLU's list has as many slots as a row has room for features, so what does not fit would not fit the
code either; where every winner counts (TopK, BatchTopK) there is a slot for every group: memory that is not touched.

**Bounds.** Every eighth tile is multiplied beforehand for the largest key of each of its groups alone. Groups are
disjoint, so the k-th largest of any k or more of these maxima is a lower bound t_n of the row's k-th largest score, and
the (k·N)-th largest of all rows' one of BatchTopK's τ. Tiles taken at a stride see features that are sorted by cluster
as well as others. About 8·k scores a row reach t_n. The bound is lowered by 2⁻¹⁰ of itself, so that a first product
that rounded otherwise than the second would lose nothing. The selection from the lists is that of `encode`, exact
whatever the scores are: many ties, or winners in few groups, cost time and nothing else.

**Screening.** With the radius r_j of `encode`'s bound the maxima are those of z - r_j, and kept is what z + r_j lets
reach t_n: a superset of the float32 winners.

What is saved are bytes, since cuBLAS's scores are all written and read twice; an eighth of the FLOPs comes on top. That
pays only if this product keeps up with cuBLAS's: `_launch.VARIANTS` decides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2e_fast.kernels.triton._launch import INTERPRETED, blocks, launch
from e2e_fast.kernels.triton.groups import Scores, kth_largest_key, score_key, screening_radius

SAMPLED = 8
"""One tile of features in this many is multiplied beforehand, for a bound."""

MARGIN_BITS = 13
"""Bounds are lowered by 2 to this power as keys: 2⁻¹⁰ of a float32."""

CHUNK_BYTES = 1 << 30
"""Lists of one chunk of rows, were all scores written."""

Spreads = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of screened scores: row_errors, row_norms (C,), norms, errors (F,)."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_SAMPLED = tl.constexpr(SAMPLED)


def serves(dtype: torch.dtype, width: int) -> bool:
    """Whether this variant computes such products: in 16 bits, D a multiple of 16."""
    return dtype in (torch.bfloat16, torch.float16) and width % 16 == 0


def filtered_scores(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    floor: Tensor | None = None,
    bounds: Tensor | None = None,
    spreads: Spreads | None = None,
    slots: int | None = None,
) -> Scores:
    """The groups of which one score exceeds ``floor`` (None: 0), or reaches its row's bound, listed.

    x (C, D) and weight (F, D), contiguous, of one 16-bit dtype; bias (F,); floor (F,) or (1,); bounds (C,) keys.
    A segment has ``slots`` slots (None: for all groups). What is not written is whatever the memory held.
    """
    (C, D), F = x.shape, weight.shape[0]
    options = blocks("filter_gemm", x)
    tiles, row_tiles = triton.cdiv(F, options["BLOCK_F"]), triton.cdiv(C, options["BLOCK_R"])
    segments = max(1, min(tiles, options.pop("PROGRAMS") // max(1, row_tiles)))
    all_groups = triton.cdiv(tiles, segments) * (options["BLOCK_F"] // options["GROUP"])
    slots = all_groups if slots is None else min(slots, all_groups)
    z = x.new_empty(C, segments, slots, options["GROUP"], dtype=torch.float32)
    numbers = x.new_empty(C, segments, slots, dtype=torch.int32)
    found, kept = (x.new_empty(C, segments, dtype=torch.int32) for _ in range(2))
    if C:
        launch(
            filter_gemm_kernel, (row_tiles, segments), x,
            x, weight, bias, floor, bounds, *(spreads or (None,) * 4), None, z, numbers, found, kept,
            C, D, F, tiles, slots,
            ONE_FLOOR=floor is not None and floor.numel() == 1, **options,
        )  # fmt: skip
    return Scores(z, F, None, numbers, found, kept)


def sampled_maxima(x: Tensor, weight: Tensor, bias: Tensor | None, spreads: Spreads | None = None) -> Tensor:
    """The largest key of every group of the sampled tiles (C, groups) int32; of z - r where scores are screened."""
    (C, D), F = x.shape, weight.shape[0]
    options = blocks("filter_gemm", x)
    tiles = triton.cdiv(triton.cdiv(F, options["BLOCK_F"]), SAMPLED)
    row_tiles = triton.cdiv(C, options["BLOCK_R"])
    segments = max(1, min(tiles, options.pop("PROGRAMS") // max(1, row_tiles)))
    maxima = x.new_empty(C, tiles * (options["BLOCK_F"] // options["GROUP"]), dtype=torch.int32)
    if C:
        launch(
            filter_gemm_kernel, (row_tiles, segments), x,
            x, weight, bias, None, None, *(spreads or (None,) * 4), maxima, None, None, None, None,
            C, D, F, tiles, 0,
            ONE_FLOOR=False, **options,
        )  # fmt: skip
    return maxima


def row_bounds(maxima: Tensor, k: int) -> Tensor:
    """The k-th largest key of each row of (C, groups), lowered by the margin; 1 where fewer than k are positive."""
    C, groups = maxima.shape
    bounds = maxima.new_empty(C)
    if C:
        launch(
            row_bound_kernel, (C,), maxima, maxima, bounds, groups, k, 1 << MARGIN_BITS, **blocks("row_bound", maxima)
        )
    return bounds


@triton.jit(do_not_specialize=["rows", "tiles", "slots"])
def filter_gemm_kernel(
    x_ptr,  # (C, D)
    weight_ptr,  # (F, D)
    bias_ptr,  # (F,) or None
    floor_ptr,  # (F,) or (1,): kept is what exceeds it, and 0; or None
    bounds_ptr,  # (C,) keys: kept is what reaches its row's; or None
    row_errors_ptr,  # (C,) or None: scores are exact
    row_norms_ptr,  # (C,) or None
    norms_ptr,  # (F,) or None
    errors_ptr,  # (F,) or None
    maxima_ptr,  # (C, groups of the sampled tiles) out, and nothing else is written; or None
    z_ptr,  # (C, segments, slots, GROUP) out
    numbers_ptr,  # (C, segments, slots) out
    found_ptr,  # (C, segments) out: groups
    kept_ptr,  # (C, segments) out: scores
    rows,
    width,
    F,
    tiles,
    slots,
    ONE_FLOOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,  # divides BLOCK_F
):
    """BLOCK_R rows × one run of tiles a program; programs of one run go over W together, which L2 then holds."""
    GROUPS: tl.constexpr = BLOCK_F // GROUP
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    x_rows = x_ptr + row.to(tl.int64)[:, None] * width
    run = tl.cdiv(tiles, tl.num_programs(1))
    # Within the lists of a program's rows 32 bits are enough: half the registers.
    segments = tl.num_programs(1)
    first = (tl.program_id(0).to(tl.int64) * BLOCK_R * segments + tl.program_id(1)) * slots
    row_place = tl.arange(0, BLOCK_R) * segments * slots
    if maxima_ptr is None:
        numbers_ptr += first
        z_ptr += first * GROUP
    count = tl.zeros((BLOCK_R,), tl.int32)
    kept = tl.zeros((BLOCK_R,), tl.int32)
    for number in range(tl.program_id(1) * run, tl.minimum((tl.program_id(1) + 1) * run, tiles)):
        tile = number
        if maxima_ptr is not None:
            tile = number * _SAMPLED
        feature = tile * BLOCK_F + tl.arange(0, BLOCK_F)
        exists = feature < F
        w_rows = weight_ptr + feature.to(tl.int64)[:, None] * width
        z = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
        for k in range(0, width, BLOCK_D):
            d = k + tl.arange(0, BLOCK_D)
            x = tl.load(x_rows + d, mask=inside[:, None] & (d < width), other=0.0)
            w = tl.load(w_rows + d, mask=exists[:, None] & (d < width), other=0.0)
            if _INTERPRETED:  # its products of bfloat16 (Triton ≤ 3.9) are products of the bits
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, tl.trans(w), z)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + feature, mask=exists, other=0.0).to(tl.float32)
        spreads = (row_errors_ptr, row_norms_ptr, norms_ptr, errors_ptr)
        if maxima_ptr is not None:
            z -= _radius(z, row, feature, inside, exists, *spreads)
            z = tl.where(z == z, z, 0.0)  # what may be anything bounds nothing
            key = tl.where(exists, score_key(z), 0)
            largest = tl.max(tl.reshape(key, (BLOCK_R, GROUPS, GROUP)), 2)
            at = row.to(tl.int64)[:, None] * (tiles * GROUPS) + number * GROUPS + tl.arange(0, GROUPS)
            tl.store(maxima_ptr + at, largest, mask=inside[:, None])
        else:
            compared = z + _radius(z, row, feature, inside, exists, *spreads)
            if bounds_ptr is not None:
                keep = score_key(compared) >= tl.load(bounds_ptr + row, mask=inside, other=1)[:, None]
            else:
                drop = compared <= 0  # NaN is not
                if floor_ptr is not None:
                    if ONE_FLOOR:  # noqa: SIM108 - decided when compiled
                        floor = tl.load(floor_ptr)
                    else:
                        floor = tl.load(floor_ptr + feature, mask=exists, other=0.0)
                    drop |= compared <= floor
                keep = drop ^ True
            keep &= exists
            members = tl.sum(tl.reshape(keep.to(tl.int32), (BLOCK_R, GROUPS, GROUP)), 2)
            passed = (members > 0).to(tl.int32)
            slot = count[:, None] + tl.cumsum(passed, 1) - passed
            fits = (passed > 0) & (slot < slots) & inside[:, None]
            place = row_place[:, None] + slot
            tl.store(numbers_ptr + place, tile * GROUPS + tl.arange(0, GROUPS), mask=fits)
            at = place[:, :, None] * GROUP + tl.arange(0, GROUP)
            tl.store(z_ptr + at, tl.reshape(z, (BLOCK_R, GROUPS, GROUP)), mask=fits[:, :, None])
            count += tl.sum(passed, 1)
            kept += tl.sum(members, 1)
    if maxima_ptr is None:
        tl.store(found_ptr + row * tl.num_programs(1) + tl.program_id(1), count, mask=inside)
        tl.store(kept_ptr + row * tl.num_programs(1) + tl.program_id(1), kept, mask=inside)


@triton.jit
def _radius(z, row, feature, inside, exists, row_errors_ptr, row_norms_ptr, norms_ptr, errors_ptr):
    """`screening_radius` of a tile; 0 where scores are exact."""
    radius = 0.0
    if errors_ptr is not None:
        radius = screening_radius(
            z,
            tl.load(row_errors_ptr + row, mask=inside, other=0.0)[:, None],
            tl.load(row_norms_ptr + row, mask=inside, other=0.0)[:, None],
            tl.load(errors_ptr + feature, mask=exists, other=0.0),
            tl.load(norms_ptr + feature, mask=exists, other=0.0),
        )
    return radius


@triton.jit
def row_bound_kernel(
    maxima_ptr,  # (C, groups)
    bounds_ptr,  # (C,) out
    groups,
    k,
    margin,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    maxima_ptr += tl.program_id(0).to(tl.int64) * groups
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(maxima_ptr + group, mask=group < groups, other=0))
    tl.store(bounds_ptr + tl.program_id(0), tl.maximum(kth_largest_key(largest, k, 31) - margin, 1))
