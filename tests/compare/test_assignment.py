"""The sparse solver is exact, its prices prove it, and it refuses what it cannot solve."""

import doctest
import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.optimize import linear_sum_assignment

from e2e_fast.compare import SparseAssignment, sparse_assignment

_C: Any = importlib.import_module("e2e_fast._C")
MODULES = [
    "",
    *(f".{x}" for x in ("assignment", "cli", "dictionaries", "matching", "plot", "similarities", "statistics")),
]


def graph(rows: int, cols: int, degree: int, seed: int, digits: int = 16) -> Any:
    """Random edges plus a one-to-one map of the smaller side, so that a matching exists. Few digits make ties."""
    rng = np.random.default_rng(seed)
    small = min(rows, cols)
    i = np.concatenate([np.repeat(np.arange(rows), degree), rng.permutation(rows)[:small]])
    j = np.concatenate([rng.integers(0, cols, rows * degree), rng.permutation(cols)[:small]])
    keys = np.unique(i * cols + j)
    values = np.maximum(np.round(rng.uniform(0.01, 1, len(keys)), digits), 10.0**-digits)
    return scipy.sparse.csr_array((values, (keys // cols, keys % cols)), shape=(rows, cols))


def optimum(g: Any, maximize: bool = True) -> float:
    """SciPy's dense total. (Its sparse solver does not terminate on some graphs with ties, scipy 1.17.)"""
    stored = np.zeros(g.shape, dtype=bool)
    stored[g.nonzero()] = True
    dense = np.where(stored, g.toarray(), -1e6 if maximize else 1e6)
    i, j = linear_sum_assignment(dense, maximize=maximize)
    return float(dense[i, j].sum())


def check(solved: SparseAssignment, g: Any, sign: int = 1) -> None:
    dense = g.toarray()
    assert len(solved.rows) == min(g.shape) == len(np.unique(solved.cols)) == len(np.unique(solved.rows))
    assert (dense[solved.rows, solved.cols] != 0).all()
    assert solved.total == pytest.approx(dense[solved.rows, solved.cols].sum(), abs=1e-9)
    assert solved.total == pytest.approx(optimum(g, sign > 0), abs=1e-9)
    slack = solved.row_price[:, None] + solved.col_price - dense
    assert (sign * slack[dense != 0]).min() >= -1e-12
    assert solved.gap <= 1e-9


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("digits", [16, 1])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (300, 300), (200, 350), (350, 200), (1000, 1000)], ids=str)
def test_total_equals_scipys(size: tuple[int, int], digits: int, maximize: bool):
    g = graph(*size, degree=6, seed=sum(size), digits=digits)
    check(sparse_assignment(g, maximize=maximize), g, 1 if maximize else -1)


@pytest.mark.parametrize("bids_per_row", [0, 1, 300])
def test_the_auctions_budget_does_not_change_the_optimum(bids_per_row: int):
    g = graph(400, 400, 8, seed=3)
    check(sparse_assignment(g, bids_per_row=bids_per_row), g)


def test_every_form_of_a_graph_gives_the_same():
    g = graph(50, 60, 4, seed=1)
    expected = sparse_assignment(g).cols
    parts = (torch.from_numpy(x) for x in (g.indptr, g.indices, g.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch_graph = torch.sparse_csr_tensor(*parts, size=g.shape, check_invariants=True)
    for form in (g.tocoo(), g.tocsc(), torch_graph):
        assert np.array_equal(sparse_assignment(form).cols, expected)
    assert np.array_equal(sparse_assignment((g.indptr, g.indices, g.data), shape=g.shape).cols, expected)


def test_values_of_any_size_and_sign_are_solved_exactly():
    g = graph(200, 200, 6, seed=9)
    best = optimum(g)
    for scale, shift in ((1e12, 0.0), (1e-12, 0.0), (1.0, -1e3), (-1.0, 0.0)):
        changed = scipy.sparse.csr_array((g.data * scale + shift, g.indices, g.indptr), shape=g.shape)
        total = sparse_assignment(changed, maximize=scale > 0).total
        assert total == pytest.approx(best * scale + 200 * shift, rel=1e-12)


def test_stored_zeros_can_be_matched():
    solved = sparse_assignment(
        (np.array([0, 2, 4]), np.array([0, 1, 0, 1]), np.array([0.0, 3.0, 0.0, 5.0])), shape=(2, 2)
    )
    assert solved.total == 5.0


def test_no_complete_matching_is_refused():
    with pytest.raises(ValueError, match=r"no matching covers all rows: row [01]"):
        sparse_assignment((np.array([0, 1, 2]), np.array([0, 0]), np.ones(2)), shape=(2, 2))
    with pytest.raises(ValueError, match="no matching covers all rows"):
        sparse_assignment((np.array([0, 0, 2]), np.array([0, 1]), np.ones(2)), shape=(2, 3))


@pytest.mark.parametrize(
    ("indptr", "indices", "data", "shape", "message"),
    [
        ([0, 1], [0], [1.0], None, "shape must be given"),
        ([0, 1], [0], [1.0], (2, 2), r"indptr must have shape \(3,\)"),
        ([0, 2, 1], [0], [1.0], (2, 2), "indptr must ascend"),
        ([0, 1, 2], [0, 2], [1.0, 1.0], (2, 2), r"indices must lie in \[0, 2\)"),
        ([0, 1, 2], [0, 1], [1.0, np.nan], (2, 2), "value must be finite, got nan at edge 1"),
        ([0, 2, 3], [0, 0, 1], [1.0, 2.0, 1.0], (2, 2), "must not repeat a column"),
        ([0, 1, 2], [0, 1], [1.0], (2, 2), "indptr must ascend from 0 to the number of indices and of data"),
    ],
)
def test_contradictory_graphs_are_refused(indptr, indices, data, shape, message: str):
    with pytest.raises(ValueError, match=message):
        sparse_assignment(tuple(map(np.array, (indptr, indices, data))), shape=shape)


def test_added_edges_are_taken_up_from_the_old_prices():
    full = graph(500, 500, 12, seed=5)
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(500, dtype=np.int32), np.diff(full.indptr))
    early = _C.assign(*(full.indptr.astype(np.int64), full.indices.astype(np.int32), full.data), 500)[0]
    keep = (rng.random(full.nnz) < 0.4) | (early[rows] == full.indices)  # a complete matching stays
    first = scipy.sparse.csr_array((full.data[keep], (rows[keep], full.indices[keep])), shape=full.shape)
    first.data[early[np.repeat(np.arange(500), np.diff(first.indptr))] == first.indices] *= 0.5
    start, col = first.indptr.astype(np.int64), first.indices.astype(np.int32)
    state = _C.assign(start, col, first.data, 500)
    pairs = np.stack([rows[~keep], full.indices[~keep]], axis=1).astype(np.int32)
    start, col, value = _C.merge_rows(start, col, first.data, pairs, full.data[~keep], 500)
    assert len(col) == full.nnz
    again = _C.reassign(start, col, value, 500, *state[:3])
    merged = scipy.sparse.csr_array((value, col, start), shape=full.shape)
    assert merged.toarray()[np.arange(500), again[0]].sum() == pytest.approx(optimum(merged), abs=1e-9)
    assert (again[2] >= state[2] - 1e-15).all()


@pytest.mark.parametrize(
    "name", ["assignment", "dictionaries", "matching", "similarities", "statistics", "plot", "cli", ""]
)
def test_examples_in_the_docstrings_hold(name: str):
    module = importlib.import_module(f"e2e_fast.compare.{name}" if name else "e2e_fast.compare")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
