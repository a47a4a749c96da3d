"""Cosine similarities of two dictionaries, asked for a few pairs at a time and never held as a matrix.

`Similarities` stores the rows as given, their norms, and a low-precision copy. Three questions are answered:

* `candidates`: about k pairs a row and k a column that may matter, in one sweep, with what is known of all others;
* `price`: of some rows, every pair whose similarity less the column's price exceeds a level;
* `exact`: the similarity of given pairs, in float64.

The similarity of rows a and b is ``a·b / (‖a‖‖b‖)``, summed in float64 over the entries as given; 0 for zero rows.

>>> import torch
>>> s = Similarities(torch.eye(4), torch.eye(4)[[2, 0, 1, 3]])
>>> start, col, value = s.graph(s.candidates(2, seed=0).pairs)
>>> col.tolist(), value.tolist()
([1, 2, 0, 3], [1.0, 1.0, 1.0, 1.0])
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from e2e_fast.compare.assignment import core
from e2e_fast.kernels import neighbours as nb


class Candidates(NamedTuple):
    """Outcome of the first sweep."""

    pairs: np.ndarray
    """(E, 2) int32: pairs worth looking at, in no particular order."""
    row_level: np.ndarray
    """(n,) float32: the filter's product of a pair that is not listed is at most row_level of its row …"""
    col_level: np.ndarray
    """(m,) float32: … and at most col_level of its column. 2 where nothing is known (a row that was cut)."""
    cut: np.ndarray
    """(n,) bool: rows whose list is incomplete, for which neither level holds."""


class Priced(NamedTuple):
    """Outcome of a pricing sweep over some rows."""

    pairs: np.ndarray
    """(E, 2) int32."""
    value: np.ndarray
    """(E,) float64: the pairs' similarities."""
    bound: np.ndarray
    """(rows,) float64: at least similarity − price of every pair of the row that is not listed."""


class Similarities:
    """A (n, d) against B (m, d), float32 or float64 on the CPU; ``device`` is where the sweep over all pairs runs."""

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        precision: str = "auto",
        absolute: bool = False,
        block_rows: int = 0,
        threads: int | None = None,
        norms: tuple[Tensor, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.shape = (A.shape[0], B.shape[0])
        self.absolute, self.block_rows = absolute, block_rows
        self.threads = nb.thread_count(threads)
        self.precision = nb.fastest_precision(A.shape[1]) if precision == "auto" else precision
        self.A, self.B = A.contiguous(), B.contiguous()
        self.norms = norms or (nb.row_norms(self.A, self.threads), nb.row_norms(self.B, self.threads))
        self.a = nb.quantize(self.A, self.precision, self.norms[0], self.threads)
        self.b = nb.quantize(self.B, self.precision, self.norms[1], self.threads)
        row, col = nb.error_bound(self.a, self.b)
        self.row_error, self.col_error = row.numpy(), col.numpy()

    def transposed(self) -> "Similarities":
        """The same with A and B exchanged; shares all memory."""
        other = object.__new__(Similarities)
        other.__dict__.update(self.__dict__)
        other.shape = self.shape[::-1]
        other.A, other.B, other.a, other.b, other.norms = self.B, self.A, self.b, self.a, self.norms[::-1]
        row, col = nb.error_bound(other.a, other.b)
        other.row_error, other.col_error = row.numpy(), col.numpy()
        return other

    def candidates(self, k: int, *, seed: int, row_cap: int = 1 << 14) -> Candidates:
        """One sweep with thresholds that let about k pairs a row and k a column pass.

        Each threshold is estimated on a sample of the other side: a guess that costs speed when it is off, never truth.
        """
        a, b = self.a.to(self.device), self.b.to(self.device)
        row_level, col_level = self._levels(a, b, k, seed), self._levels(b, a, k, seed + 1)
        found = nb.sweep(
            a, b, row_level, col_level,
            absolute=self.absolute, row_cap=row_cap, block_rows=self.block_rows, threads=self.threads,
        )  # fmt: skip
        pairs, cut, row_level, col_level = (x.cpu().numpy() for x in (*found, row_level, col_level))
        return Candidates(pairs, row_level, col_level, cut)

    def graph(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs (E, 2), repeats allowed, as compressed sparse rows with their similarities: start, col, value."""
        start, col = core().build_rows(pairs, self.shape[0], self.threads)
        return start, col, self.exact(start, col)

    def exact(self, start: np.ndarray, col: np.ndarray) -> np.ndarray:
        """Similarities in float64 of compressed sparse rows."""
        return core().exact_cosines(*self._exact_sides(), start, col, self.absolute, self.threads)

    def price(
        self,
        rows: np.ndarray,
        level: np.ndarray,
        price: np.ndarray,
        row_level: np.ndarray | None = None,
        *,
        keep: int = 256,
        row_cap: int = 1 << 14,
    ) -> Priced:
        """For each of `rows` (r,) the pairs with similarity − price[j] > level (r,), at most the `keep` best.

        ``row_level`` (r,), from the first sweep, says that pairs not listed there have products at most that: columns
        whose price alone rules them out are then skipped. Rows that pass more than row_cap get the bound +∞.
        """
        order = np.argsort(price - self.col_error, kind="stable").astype(np.int32)
        discount = (price - self.col_error)[order]  # ascending
        row_error = nb.error_bound(self.a, self.b, float(np.abs(price).max(initial=0)) + 1)[0].numpy()[rows]
        limit = np.full(len(rows), self.shape[1])
        if row_level is not None:
            # Column j matters to row i only if row_level + errors − price_j > level.
            limit = np.searchsorted(discount, row_level + row_error - level, side="right")
        by_limit = np.argsort(-limit, kind="stable")  # neighbours in a tile stop together
        filter_level = np.nextafter((level - row_error).astype(np.float32), np.float32(-np.inf))
        pairs, value, bound = core().price_rows(
            nb.as_core(self.a), nb.as_core(self.b), rows[by_limit].astype(np.int32), order, filter_level[by_limit],
            discount.astype(np.float32), limit[by_limit].astype(np.int64), *self._exact_sides(), level[by_limit], price,
            keep, row_cap, self.absolute, self.block_rows, self.threads,
        )  # fmt: skip
        unsorted = np.empty_like(bound)
        unsorted[by_limit] = bound
        self.priced_share = float(limit.sum()) / (self.shape[0] * self.shape[1])
        return Priced(pairs, value, unsorted)

    def unlisted_bound(self, seen: Candidates, price: np.ndarray | None = None) -> np.ndarray:
        """(n,): at least similarity − price of every pair of the row that the first sweep did not list.

        max_j (min(row_level_i, col_level_j) + col_error_j − price_j) + row_error_i, in O((n + m) log m).
        """
        q = self.col_error - (0.0 if price is None else price)
        order = np.argsort(seen.col_level, kind="stable")
        levels, q_sorted = seen.col_level[order].astype(np.float64), q[order]
        below = np.concatenate([[-np.inf], np.maximum.accumulate(levels + q_sorted)])
        above = np.concatenate([np.maximum.accumulate(q_sorted[::-1])[::-1], [-np.inf]])
        split = np.searchsorted(levels, seen.row_level.astype(np.float64))
        bound = np.maximum(below[split], seen.row_level + above[split]) + self.row_error
        return np.where(seen.cut, 1.0 + 1e-9 + (q - self.col_error).max(), bound)

    def _levels(self, a: nb.Quantized, b: nb.Quantized, k: int, seed: int) -> Tensor:
        m = b.data.shape[0]
        k = min(k, m)
        size = min(m, max(1024, -(-3 * m // k)))
        sample = np.sort(np.random.default_rng(seed).permutation(m)[:size]).astype(np.int32)
        rank = max(1, round(k * size / m))
        return nb.row_levels(a, b, torch.from_numpy(sample), rank, absolute=self.absolute, threads=self.threads)

    def _exact_sides(self) -> tuple[np.ndarray, ...]:
        return self.A.numpy(), self.norms[0].numpy(), self.B.numpy(), self.norms[1].numpy()
