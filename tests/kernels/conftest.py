"""The routes an operator can take on CPU, and how errors are compared."""

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from e2e_fast.kernels import _native


def levels() -> list[str]:
    """The SIMD levels of this processor, lowest first; none without the compiled core."""
    try:
        from e2e_fast import _C
    except ImportError:
        return []
    every = ["baseline", "avx2", "avx512"]
    return every[: every.index(_C.simd_best()) + 1]


@pytest.fixture(params=["torch", *levels()])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test by torch alone, as where the compiled core is missing, and at every SIMD level of the core."""
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "e2e_fast._C", None)
        _native.native.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert _native.native() is None
        yield "torch"
        _native.native.cache_clear()
        return
    core = _native.native()
    assert core is not None
    core.simd_force(request.param)
    yield request.param
    core.simd_force(core.simd_best())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
