"""The Triton kernels against `kernels.reference` in float64: in the interpreter, or compiled where there is a GPU."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: garbage), so an element that no kernel wrote is seen."""
    if torch.cuda.is_available():
        # The caching allocator hands freed blocks out again: a large one, and several of the pool for small tensors.
        poison = [torch.full((n,), torch.nan, device="cuda") for n in (1 << 26, *[1 << 17] * 16)]
        del poison
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def ieee_arithmetic() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU goes on: inf - inf in a masked lane, say."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        # Triton 3.6's interpreter: loop bounds read from one-element arrays.
        warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
        yield
