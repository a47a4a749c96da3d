"""A stand-in for CUDA graphs on a CPU: what `e2e_fast.cuda_graphs` records is replayed without its Python.

While ``record(work)`` runs the work, every operator is written down with its arguments and outputs. A replay runs the
operators again on the *same* tensors and puts their results where the first ones were, as a CUDA graph does. So a
number that Python computed, a tensor that was not static, or anything that happened outside the operators stays as it
was recorded, and a test that compares with eager training sees it. Reading a value while recording is refused, and
after it the outputs hold NaN until the first replay, since a CUDA graph is recorded without being run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default,
    aten.equal.default, aten.bincount.default, aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
"""Operators that a GPU must be waited for."""


class HostRead(RuntimeError):
    """A value was read while recording."""


class Tape(TorchDispatchMode):
    """The operators of a piece of work."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._made: dict[int, Tensor] = {}
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS or (
            func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            raise HostRead(f"{func} while recording: a GPU would be waited for")
        kwargs = kwargs or {}
        for tensor in tensors((args, kwargs)):
            if storage(tensor) not in self._made:
                self._given.add(storage(tensor))
        output = func(*args, **kwargs)
        for tensor in tensors(output):
            if storage(tensor) not in self._given:
                self._made.setdefault(storage(tensor), tensor)
        self.operators.append((func, args, kwargs, output))
        return output

    def spoil(self) -> None:
        """NaN into all that the work made."""
        for _, _, _, output in self.operators:
            for tensor in tensors(output):
                if storage(tensor) in self._made and tensor.is_floating_point():
                    tensor.detach().fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, output in self.operators:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(output), tensors(again), strict=True):
                if storage(old) != storage(new):
                    old.detach().copy_(new)


def record(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What `e2e_fast.cuda_graphs.CudaRecorder` does, on a CPU."""
    tape = Tape()
    with tape:
        outputs = work()
    tape.spoil()
    return tape.replay, outputs


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
