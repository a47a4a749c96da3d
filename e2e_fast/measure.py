"""Time and memory of a piece of work, on a CPU or a GPU.

>>> with PeakMemory() as peak:
...     block = bytearray(64 * 2**20)
>>> 32 * 2**20 < peak.bytes < 128 * 2**20
True
"""

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """``with PeakMemory() as peak``: afterwards ``peak.bytes`` is the most memory in use beyond that at the start.

    On CUDA the allocator's, else the process's resident memory. Linux resets the kernel's high-water mark; elsewhere
    only growth beyond the process's earlier peak is seen.
    """

    bytes: int = 0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            # Memory that was freed but is kept for reuse would hide what the work needs: give it back first (glibc).
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")  # VmHWM := VmRSS (Linux)
            self._start = _resident("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._start
        else:
            self.bytes = max(0, _resident("VmHWM") - self._start)


def _resident(field: str) -> int:
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Timings:
    """Seconds by phase, each without the phases inside it, so that they add up.

    On CUDA a phase begins and ends with a synchronisation: measure there only when asked to (``enabled``).

    >>> timings = Timings()
    >>> with timings.phase("step"):
    ...     with timings.phase("backward"):
    ...         time.sleep(0.01)
    >>> timings.seconds["backward"] > 0.009 > timings.seconds["step"]
    True
    """

    def __init__(self, device: torch.device | str = "cpu", *, enabled: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self.enabled = enabled
        self._device = torch.device(device)
        self._inner = [0.0]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block, less that of the phases inside it, to ``seconds[name]``."""
        if not self.enabled:
            yield
            return
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
