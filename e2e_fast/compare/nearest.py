"""The most similar row of each row, with replacement: of another dictionary, or among the rest of its own.

How close a dictionary's features lie to one another says how much it splits or repeats them: the paper's "within-SAE
similarity" (Braun et al. 2024). It comes from the matching's sweep, in float64 in the end, and no n×n matrix is
built.

>>> import torch
>>> nearest_others(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])).index.tolist()
[1, 0, 1]
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from e2e_fast.compare.assignment import best_net, core
from e2e_fast.compare.dictionaries import check_rows, device_of, kept_rows, read_dictionary
from e2e_fast.compare.similarities import Similarities

CANDIDATES = 64
"""Pairs a row that the sweep lists, about; they affect speed alone."""


class Nearest(NamedTuple):
    """Each row's most similar other row."""

    index: np.ndarray
    """(n,) int64; −1 where the row is left out, or alone."""
    similarity: np.ndarray
    """(n,) float64; NaN there."""


def nearest_others(
    A: Any,
    *,
    which: str = "decoder",
    alive: Any = None,
    threads: int | None = None,
    device: torch.device | str | None = None,
) -> Nearest:
    """Each feature's most similar other feature of the same dictionary A (n, d), as `match_dictionaries` takes it.

    Features that are not ``alive`` (a boolean mask) and zero rows are left out. A feature that occurs twice has its
    copy, at similarity 1, as its nearest. Raises ValueError as `match_dictionaries`.
    """
    rows = read_dictionary(A, which=which)
    check_rows(rows, "A")
    kept = kept_rows(rows, alive, "A", threads=threads)
    index, similarity = np.full(len(rows), -1, dtype=np.int64), np.full(len(rows), np.nan)
    if len(kept) > 1:
        used = rows[torch.from_numpy(kept)]
        s = Similarities(used, used, threads=threads, device=device_of(A) if device is None else device)
        seen = s.candidates(CANDIDATES, seed=0)
        graph = s.graph(_without_self(seen.pairs)[0])
        at, similarity[kept] = best_of_each(s, seen.row_level, seen.cut, *graph, skip_self=True)
        index[kept] = kept[at]
    return Nearest(index, similarity)


def best_of_each(
    s: Similarities,
    row_level: np.ndarray,
    unknown: np.ndarray,
    start: np.ndarray,
    col: np.ndarray,
    value: np.ndarray,
    *,
    skip_self: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's most similar column and the similarity, over all columns (but its own number with ``skip_self``).

    start, col, value: candidates; an unlisted pair's product is at most its row's ``row_level``, except in rows that
    are ``unknown``. A row whose best candidate does not beat that level by the error bound is swept once more.
    """
    best = best_net(start, col, value, np.zeros(s.shape[1]))
    unlisted = row_level + s.row_error + s.col_error.max()
    doubtful = np.flatnonzero((best <= unlisted) | unknown)
    if len(doubtful):
        level = np.nextafter(best[doubtful], -np.inf)
        level[np.isinf(level)] = -2.0
        found = s.price(doubtful, level, np.zeros(s.shape[1]), keep=64, row_cap=s.shape[1])
        pairs, values = _without_self(found.pairs, found.value) if skip_self else (found.pairs, found.value)
        start, col, value = core().merge_rows(start, col, value, pairs, values, s.shape[1])
        best = best_net(start, col, value, np.zeros(s.shape[1]))
    at = np.flatnonzero(value == np.repeat(best, np.diff(start)))
    row = np.repeat(np.arange(s.shape[0]), np.diff(start))[at]
    first = np.searchsorted(row, np.arange(s.shape[0]))  # columns ascend within a row: the lowest index of a tie
    return col[at[first]].astype(np.int64), best


def _without_self(pairs: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    other = pairs[:, 0] != pairs[:, 1]
    return np.ascontiguousarray(pairs[other]), *(value[other] for value in values)
