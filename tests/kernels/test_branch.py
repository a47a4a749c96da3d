"""branch: against float64, with and without each of its parts, at sizes that fit no block."""

import itertools
from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate
from torch import Tensor

from e2e_fast import kernels
from e2e_fast.kernels import _native, reference
from e2e_fast.kernels.branch import Layer, Norm

# N, D, F, outputs of the second layer (0: there is none)
SIZES = [(1, 1, 1, 1), (48, 16, 64, 16), (49, 17, 5, 33), (200, 64, 192, 0), (131, 20, 80, 20), (0, 8, 16, 8)]


def inputs(N: int, D: int, F: int, outputs: int, transposed: bool = False) -> dict[str, Any]:
    def layer(out: int, into: int) -> Layer:
        weight = torch.randn(into, out).t() if transposed else torch.randn(out, into)
        return Layer(weight / into**0.5, torch.randn(out))

    return {
        "x": 3 * torch.randn(N, D) + 1, "first": layer(F, D), "second": layer(outputs, F) if outputs else None,
        "norm": Norm(torch.randn(D), torch.randn(D), 1e-5), "residual": torch.randn(N, outputs or F),
    }  # fmt: skip


def double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: double(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if isinstance(value, Tensor) else value


def compare(options: dict[str, Any]) -> None:
    ours = kernels.branch(**options)
    exact = reference.branch(**double(options))
    assert_as_accurate("y", ours, reference.branch(**options), exact)


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_branches_match_float64(route, size, transposed, gelu):
    compare(inputs(*size, transposed=transposed) | {"gelu": gelu})


@pytest.mark.parametrize(
    "absent", [a for n in (1, 2, 3) for a in itertools.combinations(("norm", "residual", "second"), n)]
)
def test_each_part_may_be_absent(route, absent):
    options = inputs(70, 24, 24, 24)
    compare(options | dict.fromkeys(absent))
    options["first"] = Layer(options["first"].weight)
    compare(options | dict.fromkeys(absent))


def test_the_stream_may_be_its_own_residual(route):
    options = inputs(99, 24, 96, 24)
    compare(options | {"residual": options["x"]})


def test_result_has_the_same_bits_for_any_number_of_threads():
    assert _native.has_native()  # torch promises no such thing
    options, threads, results = inputs(501, 40, 160, 40), torch.get_num_threads(), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(kernels.branch(**options))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_other_types_go_through_torch():
    options = double(inputs(9, 8, 32, 8))
    options |= {"first": Layer(*options["first"]), "second": Layer(*options["second"]), "norm": Norm(*options["norm"])}
    assert torch.equal(kernels.branch(**options), reference.branch(**options))


def test_a_graph_is_refused(route):
    options = inputs(9, 8, 32, 8)
    options["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        kernels.branch(**options)
    with torch.no_grad():
        assert not kernels.branch(**options).requires_grad


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(9, 7), "outputs, inputs of the layer"), ("x", torch.zeros(9), "x must be"),
        ("second", Layer(torch.zeros(8, 31)), "outputs, inputs of the layer"),
        ("first", Layer(torch.zeros(32, 8), torch.zeros(31)), "a bias must have"),
        ("norm", Norm(torch.zeros(7), torch.zeros(8), 0.0), "gain and shift"),
        ("residual", torch.zeros(9, 9), "y and residual"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        kernels.branch(**(inputs(9, 8, 32, 8) | {name: wrong}))
