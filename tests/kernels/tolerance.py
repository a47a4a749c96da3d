"""Errors are compared, not values: ours against float64, beside what plain torch of the same dtype leaves."""

import torch
from torch import Tensor

FACTOR = 2.0
"""Our error may be at most this many times that of the straightforward path in the same dtype …"""

FLOOR = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}
"""… plus this, relative to the exact result's norm: a rounding or two, where the straightforward path is lucky."""


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual - exact‖ / ‖exact‖ in float64 (absolute where exact is 0)."""
    exact = exact.double()
    scale = float(exact.norm()) or 1.0
    return float((actual.double() - exact).norm()) / scale


def assert_as_accurate(name: str, actual: Tensor, naive: Tensor, exact: Tensor) -> None:
    """Fails unless ``actual`` is finite where ``exact`` is and within the table's bound of it."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.equal(actual.isfinite(), exact.isfinite()), f"{name}: finite in other places than the exact result"
    ours, theirs = relative_error(actual, exact), relative_error(naive, exact)
    allowed = FACTOR * theirs + FLOOR[actual.dtype]
    assert ours <= allowed, f"{name}: relative error {ours:.2e}, allowed {allowed:.2e} (plain torch: {theirs:.2e})"
