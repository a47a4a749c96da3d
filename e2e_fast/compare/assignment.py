"""Exact assignment on a sparse graph: each row to one column of its own, the total as large (or small) as can be.

Solved by a compiled ε-scaling auction finished with shortest augmenting paths; the prices prove the optimum: for
u_i = max_j (s_ij − p_j) over the row's edges, no matching that covers all rows exceeds Σ u + Σ p.

>>> import numpy as np
>>> indptr, indices, data = np.array([0, 2, 4]), np.array([0, 1, 0, 1]), np.array([5.0, 4.0, 4.0, 0.0])
>>> solved = sparse_assignment((indptr, indices, data), shape=(2, 2))
>>> solved.cols.tolist(), solved.total
([1, 0], 8.0)
"""

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch

from e2e_fast.optional import MissingPackage


class SparseAssignment(NamedTuple):
    """Optimal matching of a sparse graph that covers its smaller side."""

    rows: np.ndarray
    """(pairs,) int64, ascending: every row, or, where rows outnumber columns, those that got a column."""
    cols: np.ndarray
    """(pairs,) int64: the columns of `rows`."""
    total: float
    """Sum of the matched edges' values."""
    row_price: np.ndarray
    """(rows,) float64: dual value of each row."""
    col_price: np.ndarray
    """(cols,) float64: of each column. row_price[i] + col_price[j] ≥ value of every edge (≤ when minimising)."""
    bids: int
    """Auction bids made."""
    pops: int
    """Columns scanned by the shortest augmenting paths."""

    @property
    def gap(self) -> float:
        """Distance of the dual bound from the total: rounding, at an optimum."""
        return abs(float(self.row_price.sum() + self.col_price.sum()) - self.total)


def sparse_assignment(
    graph: Any, *, shape: tuple[int, int] | None = None, maximize: bool = True, bids_per_row: int = 300
) -> SparseAssignment:
    """The optimal assignment over the stored edges of `graph`; unstored pairs cannot be matched, stored zeros can.

    `graph`: a scipy.sparse matrix or array, a torch sparse CSR tensor, or ``(indptr, indices, data)`` with `shape`.
    Where rows ≤ columns every row is matched, else every column. Raises ValueError when that cannot be, when a value is
    NaN or infinite, or when the arrays contradict each other. ``bids_per_row`` bounds the auction, not the result.
    """
    start, col, value, (rows, cols) = _csr(graph, shape)
    if rows > cols:
        start, col, value = core().transpose_rows(start, col, value, cols)
        flipped = sparse_assignment(
            (start, col, value), shape=(cols, rows), maximize=maximize, bids_per_row=bids_per_row
        )
        order = np.argsort(flipped.cols)
        return flipped._replace(
            rows=flipped.cols[order],
            cols=flipped.rows[order],
            row_price=flipped.col_price,
            col_price=flipped.row_price,
        )
    signed = value if maximize else -value
    col_of_row, _, price, bids, pops = core().assign(start, col, signed, cols, bids_per_row)
    total = float(edge_values(start, col, value, col_of_row).sum())
    sign = 1.0 if maximize else -1.0
    utility = best_net(start, col, signed, price)
    return SparseAssignment(
        np.arange(rows, dtype=np.int64), col_of_row.astype(np.int64), total, sign * utility, sign * price, bids, pops
    )


def core() -> Any:
    """The compiled core; MissingPackage with the remedy where it was not built."""
    try:
        return importlib.import_module("e2e_fast._C")
    except ImportError as error:
        raise MissingPackage(
            "exact assignment runs in the compiled core e2e_fast._C, which is missing: reinstall e2e_fast with a C++ "
            "compiler at hand (`make install`, or `pip install .`)"
        ) from error


def best_net(start: np.ndarray, col: np.ndarray, value: np.ndarray, price: np.ndarray) -> np.ndarray:
    """max_j (value − price) of each row of compressed sparse rows; −∞ for a row without edges."""
    if len(start) == 1:
        return np.zeros(0)
    net = np.append(value - price[col], -np.inf)  # reduceat needs an entry at the end of trailing empty rows
    best = np.maximum.reduceat(net, start[:-1])
    best[start[:-1] == start[1:]] = -np.inf
    return best


def edge_values(start: np.ndarray, col: np.ndarray, value: np.ndarray, col_of_row: np.ndarray) -> np.ndarray:
    """The value of each row's matched edge, (rows,)."""
    hit = np.flatnonzero(col == np.repeat(col_of_row, np.diff(start)))
    return value[hit]


def _csr(graph: Any, shape: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    size: Any = shape
    if isinstance(graph, torch.Tensor):
        if graph.layout != torch.sparse_csr:
            raise ValueError(f"graph must be a sparse CSR tensor, got layout {graph.layout}; use .to_sparse_csr()")
        parts = (graph.crow_indices().cpu().numpy(), graph.col_indices().cpu().numpy(), graph.values().cpu().numpy())
        size = graph.shape
    elif hasattr(graph, "tocsr"):
        matrix = graph.tocsr()
        parts, size = (matrix.indptr, matrix.indices, matrix.data), matrix.shape
    else:
        if shape is None:
            raise ValueError("shape must be given with (indptr, indices, data)")
        parts = graph
    start, col, value = (np.asarray(part) for part in parts)
    rows, cols = int(size[0]), int(size[1])
    if start.shape != (rows + 1,):
        raise ValueError(f"indptr must have shape ({rows + 1},) for {rows} rows, got {start.shape}")
    if start[0] != 0 or (np.diff(start) < 0).any() or start[-1] != col.size or col.shape != value.shape:
        raise ValueError(
            f"indptr must ascend from 0 to the number of indices and of data, got {start[0]} to {start[-1]} for "
            f"{col.size} and {value.size}"
        )
    if col.size and (col.min() < 0 or col.max() >= cols):
        raise ValueError(f"indices must lie in [0, {cols}), got {col.min()} to {col.max()}")
    if max(rows, cols) >= 2**31:
        raise ValueError(f"shape must stay below 2**31, got {(rows, cols)}")
    keys = np.repeat(np.arange(rows), np.diff(start)) * cols + col
    if len(np.unique(keys)) != len(keys):
        raise ValueError("indices must not repeat a column within a row")
    return start.astype(np.int64), col.astype(np.int32), value.astype(np.float64), (rows, cols)
