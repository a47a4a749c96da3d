"""Large CPU results in memory that is used again.

malloc gives buffers of more than 32 MB back to the system as soon as they are free and maps new ones for the next step:
the kernel then clears every page before we write it, which for the gradients of a large dictionary takes longer than
computing them. So large buffers are kept. One is free when no tensor refers to it any more, as its reference count
tells; a training step finds those of the step before.

>>> x = empty(1 << 10, 1 << 12)
>>> address = x.data_ptr()
>>> del x
>>> empty(1 << 12, 1 << 10).data_ptr() == address
True
>>> release_buffers()
"""

import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

from e2e_fast.kernels._native import native

LARGE_BYTES = 8 << 20
"""Buffers from this size on are kept, and ask for huge pages: touching fresh 4 KB pages is slow."""

KEPT_BYTES = 1 << 30
"""Free buffers beyond this are given back, the longest unused first."""

PAGE_BYTES = 2 << 20
"""Large buffers begin at a multiple of this: a huge page."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised CPU tensor, from the kept buffers where it is large."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE_BYTES:
        return torch.empty(*shape, dtype=dtype)
    return torch.from_numpy(_POOL.take(size)).view(dtype).view(*shape)


def empty_like(tensor: Tensor) -> Tensor:
    """`empty` with the tensor's shape and dtype; on another device plain ``torch.empty_like``."""
    if tensor.device.type != "cpu":
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return empty(*tensor.shape, dtype=tensor.dtype)


def release_buffers() -> None:
    """Gives all kept memory that no tensor uses back to the system."""
    _POOL.release(0)


class _Pool:
    """Buffers by time of use, the oldest first."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()
        self._references = self._references_of_a_free_one()

    def take(self, size: int) -> np.ndarray:
        """``size`` bytes that nobody uses; they stay taken while the array or a tensor made of it lives."""
        with self._lock:
            for i in range(len(self._buffers)):
                if self._buffers[i].nbytes == size and sys.getrefcount(self._buffers[i]) <= self._references:
                    self._buffers.append(self._buffers.pop(i))
                    return self._buffers[-1]
            raw = np.empty(size + PAGE_BYTES, np.uint8)
            start = -raw.ctypes.data % PAGE_BYTES
            buffer = raw[start : start + size]
            core = native()
            if core is not None:
                core.prefer_huge_pages(buffer)
            self._buffers.append(buffer)
        self.release(KEPT_BYTES)
        return buffer

    def release(self, keep: int) -> None:
        """Drops free buffers, oldest first, until at most ``keep`` bytes of them are left."""
        with self._lock:
            free = [i for i in range(len(self._buffers)) if sys.getrefcount(self._buffers[i]) <= self._references]
            excess = sum(self._buffers[i].nbytes for i in free) - keep
            dropped = set()
            for i in free:
                if excess > 0:
                    excess -= self._buffers[i].nbytes
                    dropped.add(i)
            self._buffers = [buffer for i, buffer in enumerate(self._buffers) if i not in dropped]

    @staticmethod
    def _references_of_a_free_one() -> int:
        """What sys.getrefcount says of a list's item that nothing else refers to."""
        alone = [np.empty(0, np.uint8)]
        return sys.getrefcount(alone[0])


_POOL = _Pool()
