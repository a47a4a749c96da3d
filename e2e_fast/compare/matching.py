"""The exact one-to-one matching of two dictionaries, without the n×m matrix, with a proof of optimality.

With similarities s_ij (cosines, float64) and any prices p_j, every one-to-one matching totals at most

    Σ_i max_j (s_ij − p_j) + Σ_j p_j        (p ≥ 0 where the sides differ in size, rows the smaller)

since each matched pair contributes s_ij = (s_ij − p_j) + p_j. A matching that attains this bound is optimal.

1. One low-precision sweep over all pairs lists about k candidates a row and a column (`Similarities.candidates`).
2. The candidates' cosines, in float64, form a sparse graph whose optimal assignment comes with prices.
3. For every row, u_i = max over its candidates of s_ij − p_j. The sweep's thresholds bound what it did not list; where
   that bound does not reach u_i the row is proven. The remaining rows are swept again at the current prices.
4. Pairs that beat u_i join the graph, which is solved again, until every row is proven.

Nothing but speed depends on the candidates, the precision, the blocks or the threads: the result is the optimum of the
float64 similarities, `certified`, and unique unless there are ties (`Matching.tie_group`).

>>> import torch
>>> A = torch.nn.functional.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=1)
>>> order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
>>> m = match_dictionaries(A, A[order])
>>> bool((order[m.cols] == torch.from_numpy(m.rows)).all()), m.certified, round(m.mean, 6)
(True, True, 1.0)
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from e2e_fast.compare.assignment import best_net, core, edge_values
from e2e_fast.compare.dictionaries import check_rows, device_of, kept_rows, read_dictionary
from e2e_fast.compare.nearest import best_of_each
from e2e_fast.compare.similarities import Candidates, Similarities
from e2e_fast.compare.statistics import null_mean

TIE_TOLERANCE = 1e-10
"""Totals that differ by less than this are called equal."""
CERTIFIED_GAP = 1e-9
"""`certified` demands a gap of at most this, besides every row's proof: it bounds what float64 sums may have lost."""


class Progress(NamedTuple):
    """What `on_progress` receives."""

    stage: str
    """'quantize', 'sweep', 'candidates', 'solve', 'price', 'best' or 'done'."""
    seconds: float
    """Since the call began."""
    unproven: int | None
    """Rows not yet proven optimal; None before the first solution."""
    gap: float | None
    """Bound on what any matching could still gain; None before the first solution."""


@dataclass(frozen=True)
class Matching:
    """A maximum-similarity one-to-one matching of A (n, d) and B (m, d); indices count the rows as given."""

    rows: np.ndarray
    """(pairs,) int64, ascending: rows of A."""
    cols: np.ndarray
    """(pairs,) int64: the rows of B they are matched with."""
    similarity: np.ndarray
    """(pairs,) float64."""
    upper_bound: float
    """No one-to-one matching totals more than this, up to float64 rounding."""
    certified: bool
    """Every row is proven, and `gap` is rounding: the matching is optimal over all n·m pairs."""
    row_best: np.ndarray
    """(n,) int64: each row's most similar row of B, with replacement (lowest index on a tie); −1: left out."""
    row_best_similarity: np.ndarray
    """(n,) float64; NaN for left-out rows."""
    col_best: np.ndarray
    """(m,) int64: each column's most similar row of A; −1 for left-out columns."""
    col_best_similarity: np.ndarray
    """(m,) float64; NaN for left-out columns."""
    margin: np.ndarray
    """(pairs,) float64: forbidding the pair costs the total at least this much (0: nothing proven)."""
    tie_group: np.ndarray
    """(pairs,) int64: pairs with the same number can be exchanged at no loss; −1 where the pair is in every optimum."""
    row_price: np.ndarray
    """(n,) float64, and"""
    col_price: np.ndarray
    """(m,) float64: the certificate: similarity ≤ row_price[i] + col_price[j] for every pair. NaN: left out."""
    left_out_rows: np.ndarray
    """int64: rows of A not taken part (not alive, or zero)."""
    left_out_cols: np.ndarray
    """int64: rows of B not taken part."""
    shape: tuple[int, int, int]
    """(n, m, d) as given."""
    stats: dict[str, Any] = field(default_factory=dict)
    """How it went: precision, seconds and CPU seconds by stage, candidate edges, sweeps priced, rounds, bids."""

    @property
    def total(self) -> float:
        """Sum of the matched similarities."""
        return math.fsum(self.similarity)

    @property
    def gap(self) -> float:
        """upper_bound − total, at least 0: what any other matching could gain at most."""
        return max(self.upper_bound - self.total, 0.0)

    @property
    def mean(self) -> float:
        """Mean similarity of the matched pairs, 1 − cost in PW-MCC's terms; NaN without pairs."""
        return self.total / len(self.rows) if len(self.rows) else math.nan

    @property
    def mutual(self) -> np.ndarray:
        """(k, 2) int64: mutual nearest neighbours, pairs (i, j) with row_best[i] == j and col_best[j] == i."""
        i = np.flatnonzero(self.row_best >= 0)
        i = i[self.col_best[self.row_best[i]] == i]
        return np.stack([i, self.row_best[i]], axis=1)

    @property
    def null_mean(self) -> float:
        """`mean` expected of random dictionaries of the same sizes: see `statistics.null_mean`."""
        n, m, d = self.shape
        return null_mean(n - len(self.left_out_rows), m - len(self.left_out_cols), d)

    def fraction_above(self, threshold: float) -> float:
        """Share of the matched pairs with similarity above the threshold; NaN without pairs."""
        return float((self.similarity > threshold).mean()) if len(self.rows) else math.nan

    def summary(self) -> dict[str, Any]:
        """The numbers that tables show, JSON-able; None where a number does not exist."""
        n, m, _ = self.shape
        best = {"row": self.row_best_similarity, "col": self.col_best_similarity}
        return {
            "pairs": len(self.rows),
            "shape": list(self.shape),
            "total": self.total,
            "upper_bound": self.upper_bound,
            "gap": self.gap,
            "certified": self.certified,
            "mean": _number(self.mean),
            "null_mean": _number(self.null_mean),
            "fraction_above": {str(t): _number(self.fraction_above(t)) for t in (0.5, 0.7, 0.9)},
            **{f"{side}_best_mean": _number(_mean(of[~np.isnan(of)])) for side, of in best.items()},
            "mutual": len(self.mutual),
            "exchangeable": int((self.tie_group >= 0).sum()),
            "left_out": [len(self.left_out_rows), len(self.left_out_cols)],
            "unmatched": [n - len(self.rows) - len(self.left_out_rows), m - len(self.cols) - len(self.left_out_cols)],
            "stats": self.stats,
        }


def match_dictionaries(
    A: Any,
    B: Any,
    *,
    which: str = "decoder",
    encoder_share: float = 0.5,
    alive: tuple[Any, Any] = (None, None),
    zero_rows: str = "drop",
    absolute: bool = False,
    center: bool = False,
    candidates: int = 64,
    precision: str = "auto",
    block_rows: int = 0,
    threads: int | None = None,
    device: torch.device | str | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Matching:
    """The one-to-one matching of A's rows with B's that maximises the summed cosine similarity, with its certificate.

    A (n, d), B (m, d): tensors or arrays of any float dtype, SAEs with ``W_dec`` and ``W_enc`` [F, D], or paths
    (`read_dictionary`). All min(n, m) rows of the smaller side are matched.

    which: ``"decoder"``, ``"encoder"`` or ``"both"``: w·cos_enc + (1 − w)·cos_dec, w = encoder_share.
    alive: for each side a boolean mask or None; the others are left out. zero_rows: ``"drop"`` leaves them out,
    ``"keep"`` matches them at similarity 0. absolute: ignore signs. center: subtract each side's mean row first.
    candidates, precision (``"auto"``, ``"int8"``, ``"bfloat16"``, ``"float32"``), block_rows, threads and seed affect
    speed alone.
    device: where the first sweep, over all pairs, runs; None: the GPU that A or B lies on, else the CPU. What follows
    (a few per cent of the pairs, and the solver) runs on the CPU.
    time_limit: seconds after which no further sweep starts; the best matching so far is returned with its bound.

    Raises ValueError for NaN or infinite entries (with the rows), different d, empty or not two-dimensional input.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    if precision not in ("auto", *core_precisions()):
        raise ValueError(f"precision must be 'auto' or one of {core_precisions()}, got {precision!r}")
    if zero_rows not in ("drop", "keep"):
        raise ValueError(f"zero_rows must be 'drop' or 'keep', got {zero_rows!r}")
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    sides = [read_dictionary(source, which=which, encoder_share=encoder_share) for source in (A, B)]
    for name, side in zip("AB", sides, strict=True):
        check_rows(side, name)
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(f"A and B must have rows of equal length, got d = {sides[0].shape[1]} and {sides[1].shape[1]}")
    if center:
        sides = [side - side.mean(dim=0, dtype=torch.float64).to(side.dtype) for side in sides]
    wide = torch.promote_types(sides[0].dtype, sides[1].dtype)
    kept = [
        kept_rows(side, mask, name, zero_rows, threads) for side, mask, name in zip(sides, alive, "AB", strict=True)
    ]
    used = [
        side.to(wide) if len(k) == len(side) else side[torch.from_numpy(k)].to(wide)
        for side, k in zip(sides, kept, strict=True)
    ]

    flip = used[0].shape[0] > used[1].shape[0]
    search = _Search(
        *(reversed(used) if flip else used),
        candidates=candidates, seed=seed, time_limit=time_limit,
        began=began, began_cpu=began_cpu, on_progress=on_progress,
        precision=precision, absolute=absolute, block_rows=block_rows, threads=threads,
        device=device_of(A, B) if device is None else device,
    )  # fmt: skip
    found = search.run()
    return _in_given_order(found, flip, kept, (sides[0].shape[0], sides[1].shape[0], sides[0].shape[1]), search.stats)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def core_precisions() -> tuple[str, ...]:
    """Precisions of the sweeps."""
    return ("int8", "bfloat16", "float32")


class _Found(NamedTuple):
    """The result for the rows that took part, rows ≤ columns."""

    cols: np.ndarray
    similarity: np.ndarray
    row_price: np.ndarray
    col_price: np.ndarray
    certified: bool
    row_best: tuple[np.ndarray, np.ndarray]
    col_best: tuple[np.ndarray, np.ndarray]
    margin: np.ndarray
    tie_group: np.ndarray


class _Search:
    """Steps 1 to 4 of the module's text for A (n, d), B (m, d), n ≤ m."""

    ESCAPES = 4  # random one-to-one maps added as edges: a complete matching exists, and prices stay small
    SLACK = 0.01  # a priced row stays proven while its u falls by less than this

    def __init__(self, A, B, *, candidates, seed, time_limit, began, began_cpu, on_progress, **options) -> None:
        self.A, self.B, self.k, self.seed, self.options = A, B, candidates, seed, options
        self.began, self.time_limit, self.on_progress = began, time_limit, on_progress or (lambda progress: None)
        self.stats: dict[str, Any] = {"seconds": {}, "cpu_seconds": {}, "rounds": 0, "priced_sweeps": 0.0}
        self.unproven: int | None = None
        self.gap: float | None = None
        self._clock, self._cpu_clock = began, began_cpu
        self._note("read")

    def run(self) -> _Found:
        n, m = len(self.A), len(self.B)
        if n == 0:
            return _nothing_to_match(m)
        self._report("quantize")
        s = Similarities(self.A, self.B, **self.options)
        self.stats["precision"] = s.precision
        self._note("quantize")

        self._report("sweep")
        seen = s.candidates(self.k, seed=self.seed)
        self._note("sweep")
        self._report("candidates")
        start, col, value = s.graph(self._with_escapes(seen.pairs, n, m))
        self.stats["edges_swept"] = len(seen.pairs)
        seen = seen._replace(pairs=seen.pairs[:0])
        self._note("candidates")

        self._report("solve")
        solution = core().assign(start, col, value, m)
        self.stats["bids"], self.stats["pops"] = solution[3:]
        self._note("solve")
        priced_bound = np.full(n, np.inf)
        row_cap = 1 << 14
        while True:
            cols, _, price = solution[:3]
            u = best_net(start, col, value, price)
            bound = np.minimum(s.unlisted_bound(seen, price), priced_bound)
            open_rows = np.flatnonzero(bound > u)
            matched = edge_values(start, col, value, cols)
            utility = np.maximum(u, bound)
            self.gap = max(math.fsum(utility) + math.fsum(price) - math.fsum(matched), 0.0)
            self.unproven = len(open_rows)
            self.stats.setdefault("unproven_by_round", []).append(self.unproven)
            if len(open_rows) == 0 or self._out_of_time():
                break
            self._report("price")
            level = u[open_rows] - self.SLACK
            known = np.where(seen.cut, np.inf, seen.row_level)[open_rows]
            priced = s.price(open_rows, level, price, known, row_cap=row_cap)
            self.stats["priced_sweeps"] += s.priced_share
            self.stats["rounds"] += 1
            row_cap = row_cap * 8 if np.isinf(priced.bound).any() else row_cap
            priced_bound[open_rows] = np.minimum(priced_bound[open_rows], priced.bound)
            self._note("price")
            better = priced.value - price[priced.pairs[:, 1]] > u[priced.pairs[:, 0]]
            start, col, value = core().merge_rows(start, col, value, priced.pairs, priced.value, m)
            if better.any():
                self._report("solve")
                solution = core().reassign(start, col, value, m, *solution[:3])
                self.stats["bids"] += solution[3]
                self.stats["pops"] += solution[4]
                # A bound on similarity − price moves with the price that fell most, or rose least.
                priced_bound += float((price - solution[2]).max())
                self._note("solve")
        self.stats["edges"] = len(col)

        self._report("best")
        row_best = best_of_each(s, seen.row_level, seen.cut, start, col, value)
        turned = s.transposed()
        t_start, t_col, t_value = core().transpose_rows(start, col, value, m)
        cut = bool(seen.cut.any())
        col_best = best_of_each(turned, seen.col_level, np.full(m, cut), t_start, t_col, t_value)
        self._note("best")

        # Without its pair a row takes another column and the column another row, or none: both new pairs cost.
        row_slack = matched - price[cols] - np.maximum(_second_net(start, col, value, price, cols), bound)
        unlisted = turned.unlisted_bound(Candidates(seen.pairs, seen.col_level, seen.row_level, np.full(m, cut)), u)
        second = np.maximum(_second_net(t_start, t_col, t_value, u, solution[1]), unlisted)
        col_slack = np.minimum(price - second, price if n < m else np.inf)[cols]
        margin = np.clip(row_slack, 0.0, None) + np.clip(col_slack, 0.0, None)
        groups = core().tie_groups(start, col, value, m, *solution[:3], TIE_TOLERANCE)
        certified = self.unproven == 0 and self.gap <= CERTIFIED_GAP
        self._note("statistics")
        self.stats["seconds"]["total"] = time.perf_counter() - self.began
        self._report("done")
        return _Found(
            cols.astype(np.int64),
            matched,
            utility,
            price,
            certified,
            row_best,
            col_best,
            margin,
            groups.astype(np.int64),
        )

    def _with_escapes(self, pairs: np.ndarray, n: int, m: int) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        rows = np.arange(n, dtype=np.int32)
        maps = [np.stack([rows, rng.permutation(m)[:n].astype(np.int32)], axis=1) for _ in range(self.ESCAPES)]
        return np.concatenate([pairs, *maps])

    def _out_of_time(self) -> bool:
        return self.time_limit is not None and time.perf_counter() - self.began > self.time_limit

    def _report(self, stage: str) -> None:
        self.on_progress(Progress(stage, time.perf_counter() - self.began, self.unproven, self.gap))

    def _note(self, stage: str) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        for key, spent in (("seconds", now - self._clock), ("cpu_seconds", cpu_now - self._cpu_clock)):
            self.stats[key][stage] = self.stats[key].get(stage, 0.0) + spent
        self._clock, self._cpu_clock = now, cpu_now


def _second_net(start, col, value, price, own) -> np.ndarray:
    """max of value − price over each row's edges other than the one to its own column (own: −1 for none)."""
    return best_net(start, col, np.where(col == np.repeat(own, np.diff(start)), -np.inf, value), price)


def _nothing_to_match(m: int) -> _Found:
    none, no_value = np.zeros(0, dtype=np.int64), np.zeros(0)
    best = (np.full(m, -1, dtype=np.int64), np.full(m, np.nan))
    return _Found(none, no_value, no_value, np.zeros(m), True, (none, no_value), best, no_value, none)


def _in_given_order(
    found: _Found, flip: bool, kept: list[np.ndarray], shape: tuple[int, int, int], stats: dict
) -> Matching:
    """The result in the caller's numbering and orientation."""
    small, large = (1, 0) if flip else (0, 1)
    pairs = {small: kept[small], large: kept[large][found.cols]}
    order = np.argsort(pairs[0], kind="stable")
    groups = found.tie_group[order]
    groups[groups >= 0] = np.unique(groups[groups >= 0], return_inverse=True)[1] if (groups >= 0).any() else []

    def spread(values: np.ndarray, side: int, fill: float) -> np.ndarray:
        full = np.full(shape[side], fill, dtype=values.dtype)
        full[kept[side]] = values
        return full

    def spread_best(best: tuple[np.ndarray, np.ndarray], side: int) -> tuple[np.ndarray, np.ndarray]:
        index, value = best
        other = kept[1 - side]
        given = np.where(index >= 0, other[index], -1) if len(other) else index
        return spread(given, side, -1), spread(value, side, np.nan)

    best = {small: spread_best(found.row_best, small), large: spread_best(found.col_best, large)}
    price = {small: spread(found.row_price, small, np.nan), large: spread(found.col_price, large, np.nan)}
    left_out = [np.setdiff1d(np.arange(shape[side]), kept[side]) for side in (0, 1)]
    return Matching(
        rows=pairs[0][order],
        cols=pairs[1][order],
        similarity=found.similarity[order],
        upper_bound=math.fsum(found.row_price) + math.fsum(found.col_price),
        certified=found.certified,
        row_best=best[0][0],
        row_best_similarity=best[0][1],
        col_best=best[1][0],
        col_best_similarity=best[1][1],
        margin=found.margin[order],
        tie_group=groups,
        row_price=price[0],
        col_price=price[1],
        left_out_rows=left_out[0],
        left_out_cols=left_out[1],
        shape=shape,
        stats=stats,
    )
