"""Scores of a chunk of rows as the selecting kernels read them: all of them, or listed groups of neighbouring features.

    all       z (C, F), as cuBLAS writes them
    listed    a row's features are cut in ``segments`` runs; each run lists, in ascending order, its groups of GROUP
              features of which one may be kept: their numbers, and the scores of the whole group

A kernel goes over a row by ``for segment …: for start in range(0, listed_length(…), BLOCK): read_scores(…)``; what it
gets is a block of scores and their features, ascending. `filter_gemm` writes the lists.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Scores(NamedTuple):
    """Scores of C rows, float32 (float64 where they are not listed and the inputs are)."""

    z: Tensor
    """(C, F), or (C, segments, slots, GROUP)."""
    F: int
    """Features of a row."""
    bias: Tensor | None = None
    """(F,) that is still to be added."""
    numbers: Tensor | None = None
    """(C, segments, slots) int32: which group a slot holds; None where all scores are there."""
    found: Tensor | None = None
    """(C, segments) int32: groups that passed; those beyond ``slots`` are not there."""
    kept: Tensor | None = None
    """(C, segments) int32: the scores that passed, those that are not there included."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """z, bias, numbers, found, F, segments and slots, in the order of the kernels."""
        segments, slots = (1, 1) if self.numbers is None else self.numbers.shape[1:]
        return self.z, self.bias, self.numbers, self.found, self.F, segments, slots

    @property
    def group(self) -> int:
        return 1 if self.numbers is None else self.z.shape[3]


@triton.jit
def listed_length(found_ptr, row, segment, F, segments, slots, GROUP: tl.constexpr):
    """How many scores a row has in a segment."""
    if found_ptr is None:  # noqa: SIM108 - decided when compiled
        length = F
    else:
        length = tl.minimum(tl.load(found_ptr + row * segments + segment), slots) * GROUP
    return length


@triton.jit
def read_scores(
    z_ptr, bias_ptr, numbers_ptr, row, segment, F, segments, slots, start, length,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores (0 where there are none), features, and which of them exist: BLOCK places of a segment from ``start``."""
    place = start + tl.arange(0, BLOCK)
    exists = place < length
    if numbers_ptr is None:
        feature = place
        z = tl.load(z_ptr + row * F + place, mask=exists, other=0.0)
    else:
        first = (row * segments + segment) * slots
        number = tl.load(numbers_ptr + first + place // GROUP, mask=exists, other=0)
        feature = number * GROUP + place % GROUP
        exists &= feature < F
        z = tl.load(z_ptr + first * GROUP + place, mask=exists, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + feature, mask=exists, other=0.0).to(z.dtype)
    return z, feature, exists


@triton.jit
def kth_largest_key(keys, k, BITS: tl.constexpr):
    """The k-th largest of these keys, bit by bit; 1, a positive score's least, if fewer than k are positive."""
    one = tl.full((), 1, keys.dtype)
    kth = tl.zeros((), keys.dtype)
    for i in range(BITS):
        candidate = kth | (one << (BITS - 1 - i))
        kth = tl.where(tl.sum((keys >= candidate).to(tl.int32), 0) >= k, candidate, kth)
    return tl.maximum(kth, one)


@triton.jit
def score_key(z):
    """Order-preserving integers of positive scores: 0 for what is not positive, the greatest for NaN."""
    if z.dtype == tl.float64:
        key = tl.where(z != z, 0x7FFFFFFFFFFFFFFF, tl.where(z > 0, z.to(tl.int64, bitcast=True), 0))
    else:
        key = tl.where(z != z, 0x7FFFFFFF, tl.where(z > 0, z.to(tl.int32, bitcast=True), 0))
    return key


@triton.jit
def screening_radius(z, row_error, row_norm, error, norm):
    """How far a screened score may be from the float32 one; the last term is for the bias's additions, 2⁻²¹."""
    return row_error * norm + row_norm * error + tl.abs(z) * 4.8e-7
