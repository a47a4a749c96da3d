"""The sweep lists exactly the pairs above its thresholds, and its error bound holds, in every precision and form."""

import doctest
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from e2e_fast.kernels import neighbours as nb

_C: Any = importlib.import_module("e2e_fast._C")


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has."""
    best, level = _C.simd_level(), request.param
    try:
        _C.simd_force(level)
    except ValueError:
        pytest.skip(f"this processor has no {level}")
    yield level
    _C.simd_force(best)


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_torch(monkeypatch: pytest.MonkeyPatch, call):
    """The same call without the compiled core."""
    with monkeypatch.context() as patch:
        patch.setattr(nb, "_C", None)
        return call()


@pytest.mark.parametrize("d", [1, 3, 64, 130, 769])
@pytest.mark.parametrize("precision", nb.PRECISIONS)
def test_error_bound_holds_for_every_product(precision: str, d: int, simd: str):
    A, B = rows(37, d, 0), rows(61, d, 1)
    A[3] = 0
    a, b = nb.quantize(A, precision), nb.quantize(B, precision)
    row, col = nb.error_bound(a, b)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (A, B)]
    true = unit[0] @ unit[1].T
    # A pair the sweep lists at level t has product > t: bracket each product between neighbouring levels.
    for level in (-0.3, 0.0, 0.2):
        listed = torch.zeros(37, 61, dtype=torch.bool)
        i, j = nb.neighbours(a, b, torch.full((37,), level)).long().T
        listed[i, j] = True
        slack = row[:, None] + col
        assert (true[listed] > (level - slack)[listed]).all()
        assert (true[~listed] <= (level + slack)[~listed]).all()
    assert a.error[3] == 0


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("precision", nb.PRECISIONS)
def test_core_lists_what_plain_torch_lists(precision: str, absolute: bool, simd: str, monkeypatch: pytest.MonkeyPatch):
    n, m, d = 83, 121, 40
    A, B = rows(n, d, 2), rows(m, d, 3)
    row_level, col_level = torch.rand(n) * 0.4, torch.rand(m) * 0.2 + 0.3
    price = torch.rand(m) * 0.2
    a, b = nb.quantize(A, precision), nb.quantize(B, precision)

    def call():
        return nb.neighbours(a, b, row_level, col_level, price, absolute=absolute)

    compiled, plain = call(), with_torch(monkeypatch, call)
    # Sums in another order may differ in the last bits: pairs on the very threshold alone may.
    product = a.dequantize().double() @ b.dequantize().double().T
    product = product.abs() if absolute else product
    edge = torch.minimum((product - price - row_level[:, None]).abs(), (product - col_level).abs()) < 1e-6
    differing = {tuple(p) for p in compiled.tolist()} ^ {tuple(p) for p in plain.tolist()}
    assert all(edge[i, j] for i, j in differing)
    assert len(compiled) > 200


@pytest.mark.parametrize("precision", nb.PRECISIONS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (8, 48), (9, 49), (200, 47)])
def test_no_size_of_block_or_team_changes_the_pairs(precision: str, n: int, m: int):
    a, b = nb.quantize(rows(n, 20, 4), precision), nb.quantize(rows(m, 20, 5), precision)
    level = torch.full((n,), 0.1)
    expected = nb.neighbours(a, b, level)
    for block_rows, threads in ((8, 1), (8, 3), (64, 2), (10_000, 1)):
        assert torch.equal(nb.neighbours(a, b, level, block_rows=block_rows, threads=threads), expected)


@pytest.mark.parametrize("precision", nb.PRECISIONS)
def test_quantizing_is_the_same_compiled_or_not(precision: str, monkeypatch: pytest.MonkeyPatch):
    x = rows(50, 33, 6).float() * torch.logspace(-6, 6, 50)[:, None]
    x[7] = 0
    compiled, plain = nb.quantize(x, precision), with_torch(monkeypatch, lambda: nb.quantize(x, precision))
    assert compiled.data.shape == (50, 36)
    if precision == "int8":
        assert (compiled.data.int() - plain.data.int()).abs().max() <= 1  # .5 ± the last bit of the scale
    else:
        assert torch.equal(compiled.data, plain.data)
    torch.testing.assert_close(compiled.error, plain.error, rtol=1e-3, atol=1e-12)
    stored = compiled.data.double() * compiled.scale.double()[:, None]
    true_error = (stored[:, :33] - torch.nn.functional.normalize(x.double(), dim=1)).norm(dim=1)
    assert (compiled.error >= true_error - 1e-12).all()


@pytest.mark.parametrize("size", [20, 500])
def test_row_levels_are_at_most_the_ranks_product(size: int, monkeypatch: pytest.MonkeyPatch):
    a, b = nb.quantize(rows(90, 24, 7), "float32"), nb.quantize(rows(600, 24, 8), "float32")
    sample = torch.arange(0, size, dtype=torch.int32)
    products = a.dequantize() @ b.dequantize()[:size].T
    exact = products.topk(3, dim=1).values[:, -1]

    def call():
        return nb.row_levels(a, b, sample, 3)

    torch.testing.assert_close(with_torch(monkeypatch, call), exact)
    level = call()
    assert (level <= exact + 1e-6).all()
    assert ((products > level[:, None]).sum(1) < 20).all()
    if size <= 48:
        torch.testing.assert_close(level, exact)


def test_a_row_with_more_pairs_than_its_cap_is_reported():
    a = nb.quantize(torch.ones(3, 4), "float32")
    with pytest.raises(OverflowError, match="row 0 has more than row_cap = 2 pairs"):
        nb.neighbours(a, a, torch.zeros(3), row_cap=2)


@pytest.mark.parametrize("name", ["row_level", "col_level", "price"])
def test_wrong_shapes_are_refused(name: str):
    a = nb.quantize(torch.eye(3), "float32")
    levels: dict[str, Any] = {"row_level": torch.zeros(3), name: torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(3,\), got \(2,\)"):
        nb.neighbours(a, a, **levels)
    with pytest.raises(ValueError, match="precision must be one of"):
        nb.quantize(torch.eye(3), "float64")
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 3\]"):
        nb.row_levels(a, a, torch.arange(3, dtype=torch.int32), 4)


def test_examples_in_the_docstring_hold():
    result = doctest.testmod(nb)
    assert result.attempted > 0
    assert result.failed == 0
