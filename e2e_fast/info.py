"""What this installation can do: versions, devices, which kernels are active.

>>> describe()["e2e_fast"]
'0.1.0'
"""

import importlib.metadata
import importlib.util
import platform

import torch

import e2e_fast
from e2e_fast.kernels._native import native_missing


def describe() -> dict[str, str]:
    """Name → value, in the order they are printed."""
    facts = {
        "e2e_fast": e2e_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu threads": str(torch.get_num_threads()),
        "cuda": _cuda(),
        "C++ kernels": _cpp(),
        "Triton kernels": _triton(),
    }
    for package in ("transformers", "transformer-lens", "datasets", "wandb"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _cpp() -> str:
    if (why := native_missing()) is not None:
        return (
            f"missing ({why}); plain torch is used, several times slower, and no dictionaries can be matched. "
            "Reinstall with a C++20 compiler"
        )
    from e2e_fast import _C

    return f"active, SIMD level {_C.simd_level()} (best here: {_C.simd_best()})"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "missing (pip install triton): the operators cannot run on a GPU"
    version = importlib.metadata.version("triton")
    return f"active, Triton {version}" if torch.cuda.is_available() else f"idle, no GPU (Triton {version})"
