"""gelu: both forms and their gradients against float64."""

import pytest
import torch
import torch.nn.functional as nnf
from tolerance import assert_as_accurate

from e2e_fast import kernels
from e2e_fast.kernels import reference

KINDS = ["none", "tanh"]


def run(function, x, dy, *options):
    leaf = x.detach().requires_grad_()
    y = function(leaf, *options)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy.to(y.dtype))]


def compare(x, dy, kind):
    exact, naive, ours = (
        run(reference.gelu, x.double(), dy, kind),
        run(reference.gelu, x, dy, kind),
        run(kernels.gelu, x, dy, kind),
    )
    for name, *tensors in zip(("y", "dx"), ours, naive, exact, strict=True):
        assert_as_accurate(name, *tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 33), (0, 4)], ids=str)
@pytest.mark.parametrize("size", [0.02, 3.0])
def test_gelu_and_its_gradient_match_float64(route, shape, kind, size):
    compare(size * torch.randn(shape), torch.randn(shape), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_any_layout_and_the_gradient_of_a_sum(route, kind):
    compare(torch.randn(9, 7).t(), torch.ones(()).expand(7, 9), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs_function(route, kind):
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(kernels.gelu(x, kind), nnf.gelu(x, approximate=kind), rtol=1e-6, atol=2e-6)
    assert torch.equal(kernels.gelu(x.double(), kind), nnf.gelu(x.double(), approximate=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_and_nan(route, kind):
    x = torch.tensor([1e4, 1e10, -1e4, -1e10, torch.nan])
    y, dx = run(kernels.gelu, x, torch.ones(5), kind)
    assert y[:2].tolist() == x[:2].tolist()
    assert dx[:2].tolist() == [1, 1]
    assert y[2:4].abs().max() < 1e-20
    assert dx[2:4].abs().max() < 1e-20
    assert y[4].isnan()
    assert dx[4].isnan()


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="approximate must be"):
        kernels.gelu(torch.zeros(3), "quick")
