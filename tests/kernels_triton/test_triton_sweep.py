"""The Triton sweep lists what plain torch lists, whatever the precision, the sizes and the guessed capacity."""

import pytest
import torch
from triton_checks import DEVICE

from e2e_fast.compare import match_dictionaries
from e2e_fast.kernels import neighbours as nb
from e2e_fast.kernels.triton.neighbours import sweep


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("capacity", [1, 100_000])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 4), (33, 70, 40), (64, 16, 16)])
@pytest.mark.parametrize("precision", nb.PRECISIONS)
@pytest.mark.parametrize("form", ["rows", "rows and columns", "prices"])
def test_sweep_lists_what_plain_torch_lists(form, precision, n, m, d, capacity, absolute, generator):
    a, b = (nb.quantize(torch.randn(size, d, generator=generator), precision) for size in (n, m))
    row_level = torch.rand(n, generator=generator) * 0.2
    col_level = torch.rand(m, generator=generator) * 0.2 if form == "rows and columns" else None
    price = torch.rand(m, generator=generator) * 0.1 if form == "prices" else None
    product = a.dequantize().double() @ b.dequantize().double().T
    product = product.abs() if absolute else product
    over = product - (0 if price is None else price) - row_level[:, None]
    if col_level is not None:
        over = torch.maximum(over, product - col_level)
    there = [x if x is None else x.to(DEVICE) for x in (a.data, b.data, a.scale, b.scale, row_level, col_level, price)]
    pairs = sweep(*there, absolute, capacity).cpu()
    listed = torch.zeros(n, m, dtype=torch.int)
    listed.index_put_(tuple(pairs.long().T), torch.ones(len(pairs), dtype=torch.int), accumulate=True)
    clear = over.abs() > 1e-6  # sums in another order may differ in the last bits
    assert torch.equal(listed[clear], (over[clear] > 0).int())


def test_empty_sides_have_no_pairs():
    empty, one = torch.empty(0, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    none, ones = torch.empty(0, device=DEVICE), torch.ones(3, device=DEVICE)
    assert sweep(empty, one, none, ones, none, None, None, False, 10).shape == (0, 2)
    assert sweep(one, empty, ones, none, ones, None, None, False, 10).shape == (0, 2)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("precision", nb.PRECISIONS)
def test_a_matching_whose_sweep_ran_in_triton_is_the_cpus(precision, absolute, generator, monkeypatch):
    pytest.importorskip("e2e_fast._C", reason="the exact assignment after the sweep runs in the compiled core")
    A, B = torch.randn(40, 24, generator=generator), torch.randn(53, 24, generator=generator)
    options = {"precision": precision, "absolute": absolute, "candidates": 6}
    expected = match_dictionaries(A, B, **options)
    calls = []
    monkeypatch.setattr(nb, "_triton", lambda x: calls.append(x.device) is None)
    got = match_dictionaries(A, B, device=DEVICE, **options)
    assert calls
    assert got.certified
    assert got.rows.tolist() == expected.rows.tolist()
    assert got.cols.tolist() == expected.cols.tolist()
    assert got.row_best.tolist() == expected.row_best.tolist()
