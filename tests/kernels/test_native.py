"""The compiled core and life without it."""

import subprocess
import sys

import pytest

from e2e_fast.kernels import _native

WITHOUT_CORE = """
import sys, warnings
sys.modules["e2e_fast._C"] = None
import torch
from e2e_fast import kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, W = torch.randn(4, 8), torch.randn(32, 8)
    for _ in range(3):
        y, code = kernels.autoencode(x, W, None, W, None, k=3)
        kernels.linear_kl(y, x, W)
print([str(w.message)[:27] for w in caught if issubclass(w.category, RuntimeWarning)])
"""


def test_missing_core_is_said_once_and_everything_still_works():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CORE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['e2e_fast._C is missing (imp']"


def test_why_the_core_is_missing_can_be_asked(monkeypatch):
    assert _native.native_missing() is None
    monkeypatch.setitem(sys.modules, "e2e_fast._C", None)
    assert "e2e_fast._C" in str(_native.native_missing())


def test_simd_level_is_forced_by_name_only():
    core = _native.native()
    assert core is not None
    with pytest.raises(ValueError, match="simd level must be 'baseline', 'avx2' or 'avx512', got 'sse9'"):
        core.simd_force("sse9")
    core.simd_force("baseline")
    assert core.simd_level() == "baseline"
    core.simd_force(core.simd_best())
