"""How the Triton tests compare: errors against float64, ours beside those of the naive torch path of the same dtype."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FACTOR = 2.0
"""An operator may err this many times as much as the naive torch path of the same dtype…"""
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""…plus one rounding of the dtype that the result is stored in, relative to the reference's norm."""


def error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the error over that of the expected value; NaN where anything is NaN."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close(name: str, actual: Tensor, expected: Tensor, naive: Tensor) -> None:
    """``actual`` errs at most FACTOR times as much as ``naive`` plus FLOOR."""
    ours, theirs = error(actual, expected), error(naive, expected)
    limit = FACTOR * theirs + FLOOR[actual.dtype]
    assert ours <= limit, f"{name}: relative error {ours:.2e} > {limit:.2e} ({FACTOR} x naive {theirs:.2e} + floor)"
