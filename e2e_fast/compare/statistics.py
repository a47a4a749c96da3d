"""What similarities mean: the null of random dictionaries, intervals of differences, and greedy matching.

A forced one-to-one matching pairs everything, so its mean is positive even between unrelated dictionaries: `null_mean`
is that mean for random directions. Greedy matching, by falling similarity, is what many scripts do; it never totals
more than the optimum.

>>> round(null_mean(2000, 2000, 768), 3)
0.119
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from e2e_fast.compare.assignment import core


def null_mean(n: int, m: int, d: int) -> float:
    """Expected mean similarity of the optimal matching of n and m independent random directions in d dimensions.

    The quantile of one random cosine at tail probability x / max(n, m), where x = 0.63 + (0.315 + 16 / d²)·ρ^2.25 and
    ρ = min / max of n and m: fitted to exact matchings of Gaussian dictionaries, and within 1 % of them for d ≥ 4 and
    min(n, m) ≥ 100. NaN for d < 2, an empty side, and where that probability exceeds 0.1, beyond which the fit is worth
    nothing: fewer than about 11 features, 20 at d = 4, 50 at d = 2.
    """
    small, large = sorted((n, m))
    if d < 2 or small < 1:
        return float("nan")
    tail = (0.63 + (0.315 + 16 / d**2) * (small / large) ** 2.25) / large
    if tail > 0.1:
        return float("nan")
    phi, mass = _random_angle(d)
    return float(np.cos(np.interp(tail, mass, phi)))


def null_best_mean(candidates: int, d: int) -> float:
    """Expected cosine of the most similar of ``candidates`` independent random directions in d dimensions.

    What best-of-each statistics (`Matching.row_best`, `nearest_others`) give on random dictionaries; exact but for the
    integration. NaN for d < 2 or no candidates.

    >>> round(null_best_mean(1, 16), 6), round(null_best_mean(2000, 768), 3)
    (0.0, 0.124)
    """
    if d < 2 or candidates < 1:
        return float("nan")
    phi, mass = _random_angle(d)
    none_closer = (1 - mass) ** candidates
    return float(((np.cos(phi[1:]) + np.cos(phi[:-1])) / 2 * (none_closer[:-1] - none_closer[1:])).sum())


def mean_differences(
    values: Mapping[str, np.ndarray], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Differences of the means of every two samples with a bootstrap interval: {(a, b): (difference, low, high)}.

    Percentile bootstrap over the entries of each sample, drawn independently. It says how far the mean depends on which
    features there are, not how far another training run would differ. Samples without entries are left out.

    >>> found = mean_differences({"a": np.arange(200.0), "b": np.arange(200.0) + 50})
    >>> difference, low, high = found["a", "b"]
    >>> difference, -65 < low < -50 < high < -35
    (-50.0, True)
    """
    rng = np.random.default_rng(seed)
    means = {name: _resampled_means(x, resamples, rng) for name, x in values.items() if len(x)}
    found = {}
    for a, b in itertools.combinations(means, 2):
        low, high = np.quantile(means[a] - means[b], [(1 - level) / 2, (1 + level) / 2])
        found[a, b] = (float(values[a].mean() - values[b].mean()), float(low), float(high))
    return found


def _resampled_means(x: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    return np.array([x[rng.integers(len(x), size=len(x))].mean() for _ in range(resamples)])


def _random_angle(d: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles on a fine grid of [0, π], and the probability that two random directions lie no further apart."""
    # cos φ of a random direction has density sin^(d−2) φ.
    phi = np.linspace(0.0, np.pi, 200_001)
    with np.errstate(divide="ignore"):
        density = np.exp((d - 2) * np.log(np.sin(phi))) if d > 2 else np.ones_like(phi)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return phi, mass / mass[-1]


def greedy_matching(A: Any, B: Any, *, candidates: int = 64, threads: int | None = None, seed: int = 0) -> np.ndarray:
    """Pairs taken by falling similarity, each if both of its sides are free: (min(n, m), 2) int64, rows ascending.

    A (n, d), B (m, d) as in `match_dictionaries`; zero rows take part at similarity 0. Exact: a pair is taken only when
    no unlisted pair can come before it; what remains undecided is swept again. Equal similarities: lowest row first.
    """
    from e2e_fast.compare.dictionaries import check_rows, read_dictionary
    from e2e_fast.compare.similarities import Similarities

    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    a, b = read_dictionary(A), read_dictionary(B)
    for name, side in (("A", a), ("B", b)):
        check_rows(side, name)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"A and B must have rows of equal length, got d = {a.shape[1]} and {b.shape[1]}")
    wide = torch.promote_types(a.dtype, b.dtype)
    rows, cols = np.arange(len(a)), np.arange(len(b))
    taken = []
    while len(rows) and len(cols):
        s = Similarities(a[rows].to(wide), b[cols].to(wide), threads=threads)
        if len(rows) * len(cols) <= 1 << 22 or candidates >= len(cols):
            every = np.indices((len(rows), len(cols)), dtype=np.int32).reshape(2, -1).T
            start, col, value = s.graph(np.ascontiguousarray(every))
            row_bound, col_bound = np.full(len(rows), -np.inf), np.full(len(cols), -np.inf)
        else:
            seen = s.candidates(candidates, seed=seed)
            start, col, value = s.graph(seen.pairs)
            unknown = 2.0 if seen.cut.any() else -np.inf
            row_bound = np.maximum(seen.row_level + s.row_error + s.col_error.max(), unknown)
            col_bound = np.maximum(seen.col_level + s.col_error + s.row_error.max(), unknown)
        match = core().greedy(start, col, value, len(cols), row_bound, col_bound)
        hit = np.flatnonzero(match >= 0)
        taken.append(np.stack([rows[hit], cols[match[hit]]], axis=1))
        rows, cols = np.delete(rows, hit), np.delete(cols, match[hit])
        if len(hit) == 0:
            candidates *= 4
    pairs = np.concatenate(taken)
    return pairs[np.argsort(pairs[:, 0])]
