"""Matrix products on a CPU: every layout gives F.linear's result, and none meets oneDNN's slow path."""

import pytest
import torch
import torch.nn.functional as nnf

from e2e_fast.kernels import _gemm

DENSE = {"rows": lambda r, c: torch.randn(r, c), "columns": lambda r, c: torch.randn(c, r).t()}
SLICED = {
    "column slice": lambda r, c: torch.randn(r, 2 * c)[:, :c],
    "row slice": lambda r, c: torch.randn(c, 2 * r)[:, :r].t(),
}
LAYOUTS = DENSE | SLICED


@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_takes_any_layout(layout, weight_layout):
    x, w, bias = LAYOUTS[layout](33, 20), LAYOUTS[weight_layout](50, 20), torch.randn(50)
    torch.testing.assert_close(_gemm.linear(x, w, bias), nnf.linear(x, w, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_takes_a_bias_of_any_stride(dtype):
    x, w = torch.randn(33, 20, dtype=dtype), torch.randn(50, 20, dtype=dtype)
    for bias in (torch.randn(50, 3, dtype=dtype)[:, 1], torch.randn(1, dtype=dtype).expand(50)):
        assert torch.equal(_gemm.linear(x, w, bias), _gemm.linear(x, w, bias.contiguous()))


@pytest.mark.parametrize("layout", SLICED)
def test_a_sliced_weight_goes_to_torch(layout, monkeypatch):
    calls, plain = [], nnf.linear
    monkeypatch.setattr(_gemm.nnf, "linear", lambda *a: calls.append(a) or plain(*a))
    _gemm.linear(torch.randn(3, 20), SLICED[layout](50, 20))
    assert len(calls) == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_a_frozen_product_has_linears_values_and_gradient(transposed):
    x, bias = torch.randn(3, 5, 33, requires_grad=True), torch.randn(18)
    weight = torch.randn(33, 18).t() if transposed else torch.randn(18, 33)
    results = []
    for function in (_gemm.frozen_linear, nnf.linear):
        y = function(x, weight, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(_gemm.frozen_linear(x, weight, bias), results[1][0])
