"""The one place that loads the compiled core ``e2e_fast._C``.

Everything works without it, through torch and several times slower; the first operator that misses it says so, once.
"""

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

KEPT_BYTES = 256 << 20
"""Freed memory that the process keeps for its next temporaries (glibc), set when the first CPU operator runs."""


@functools.cache
def native() -> ModuleType | None:
    """The compiled core, or None where it was not built (warns once)."""
    try:
        core = importlib.import_module("e2e_fast._C")
        core.keep_freed_memory(KEPT_BYTES)
        return core
    except ImportError as error:
        warnings.warn(
            f"e2e_fast._C is missing ({error}): the CPU operators run through torch, several times slower. "
            "Build it with `python setup.py build_ext --inplace`, or reinstall with a C++ compiler present.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def has_native() -> bool:
    """Whether there is a compiled core; torch.compile may ask too, while it traces."""
    return native() is not None


has_native._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, which imports triton


def native_missing() -> str | None:
    """Why the compiled core cannot be loaded, or None when it can; warns of nothing."""
    try:
        importlib.import_module("e2e_fast._C")
    except ImportError as error:
        return str(error)
    return None


def array(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
    """A NumPy view of a CPU tensor, copied only where its dtype or layout demands it; None stays None."""
    return None if tensor is None else strided(tensor.contiguous(), dtype)


def strided(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
    """`array` in any layout."""
    if tensor is None:
        return None
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).numpy()  # each call of torch's takes a microsecond


def direct(*tensors: Tensor | None) -> bool:
    """Whether an operator may run without torch's dispatcher, which takes 20 µs, and without a graph."""
    return not torch.is_grad_enabled() and unwatched(*tensors)


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing wants to see which operators run on these tensors: no trace, mode or profiler."""
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch.autograd._profiler_enabled()
        and not torch._C._are_functorch_transforms_active()
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )
