"""Dense or sparse: which way the next ReLU step runs.

A ReLU autoencoder starts with half of its features active and ends with tens. Dense products win at the start, the
sparse operators at the end; both compute the same function. The controller watches the fullest row of each step:

    dense  → sparse   when it fell to 3/4 of ``limit`` (hysteresis)
    sparse → dense    when it exceeded ``limit``

On a GPU a step's fullest row is copied to the host without waiting and read when it has arrived, a step or so late. A
sparse code has room there for ``capacity`` features a token, decided beforehand: a power of two that leaves the fullest
row seen half as much again, since decoding and sorting cost as many slots as there are. It grows at once, and is halved
when `CALM` steps in a row filled at most a quarter of it.

>>> import torch
>>> density = DensityController(limit=4)
>>> density.sparse is None                      # nothing seen yet
True
>>> density.observe(torch.tensor([2, 3])); density.sparse
True
>>> density.observe(torch.tensor([1, 5])); density.sparse
False
>>> density = DensityController(limit=2880)
>>> density.observe(torch.tensor([150])); density.capacity
256
"""

import math

import torch
from torch import Tensor

REENTRY = 0.75
"""Share of ``limit`` to which the fullest row must fall before dense steps become sparse again."""

SPARSE_FRACTION = 16
"""Default limit: one feature in 16 (of the fullest row, so that most rows have fewer)."""

MARGIN = 1.5
"""Room for so many times the fullest row seen."""

CALM = 16
"""Steps that must leave three quarters of the room empty before it is halved."""


def default_limit(d_sae: int) -> int:
    """Slots per token up to which the sparse operators are used, of ``d_sae`` features."""
    return max(1, d_sae // SPARSE_FRACTION)


class DensityController:
    """Decides before each step whether it runs sparse, from the rows' counts of the steps before it.

    Keep one for each autoencoder and pass it to `e2e_fast.kernels.autoencode`, which reads and feeds it.
    """

    limit: int
    """Slots that the fullest row may need for steps to run sparse."""
    sparse: bool | None
    """Whether the next step runs sparse; None while no step has been seen."""
    capacity: int
    """Slots per token of a sparse step whose room is decided beforehand, at most ``limit``."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1 slot, got {limit}")
        self.limit = limit
        self.sparse = None
        self.capacity = limit
        self._calm = 0  # steps in a row that left the room nearly empty
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def observe(self, count: Tensor) -> None:
        """Takes note of the slots that a step's tokens need, count (N,) on any device."""
        if count.numel() == 0:
            return
        fullest = count.max()
        if fullest.device.type != "cuda":
            self._decide(int(fullest))
            return
        self.refresh()
        if self._pending is None:
            host = torch.empty((), dtype=fullest.dtype, pin_memory=True)
            host.copy_(fullest, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(fullest.device))
            self._pending = host, event

    def refresh(self) -> None:
        """Reads a count that has arrived from the GPU in the meantime; never waits."""
        if self._pending is not None and self._pending[1].query():
            self._decide(int(self._pending[0]))
            self._pending = None

    def _decide(self, fullest: int) -> None:
        if fullest > self.limit:
            self.sparse = False
        elif self.sparse is not False or fullest <= REENTRY * self.limit:
            if not self.sparse:
                self.capacity = self._room(fullest)
            self.sparse = True
        self._calm = self._calm + 1 if 4 * fullest <= self.capacity else 0
        if MARGIN * fullest > self.capacity:
            self.capacity = self._room(fullest)
        elif self._calm >= CALM:
            # The power of two below it.
            self.capacity, self._calm = max(1, (1 << (self.capacity - 1).bit_length()) // 2), 0

    def _room(self, fullest: int) -> int:
        return min(self.limit, 1 << max(0, math.ceil(MARGIN * fullest) - 1).bit_length())
