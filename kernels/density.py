"""Dense or sparse: which way the next ReLU step runs.

A ReLU autoencoder starts with half of its features active and ends with tens. Dense products win at the start, the
sparse operators at the end; both compute the same function. The controller watches the fullest row of each step:

    dense  → sparse   when it fell to 3/4 of ``limit`` (hysteresis)
    sparse → dense    when it exceeded ``limit``

On a GPU a step's fullest row is copied to the host without waiting and read when it has arrived, a step or so late.

>>> import torch
>>> density = DensityController(limit=4)
>>> density.sparse is None                      # nothing seen yet
True
>>> density.observe(torch.tensor([2, 3])); density.sparse
True
>>> density.observe(torch.tensor([1, 5])); density.sparse
False
"""

import torch
from torch import Tensor

REENTRY = 0.75
"""Share of ``limit`` to which the fullest row must fall before dense steps become sparse again."""

SPARSE_FRACTION = 16
"""Default limit: one feature in 16 (of the fullest row, so that most rows have fewer)."""


def default_limit(d_sae: int) -> int:
    """Slots per token up to which the sparse operators are used, of ``d_sae`` features."""
    return max(1, d_sae // SPARSE_FRACTION)


class DensityController:
    """Decides before each step whether it runs sparse, from the rows' counts of the steps before it.

    Keep one for each autoencoder and pass it to `e2e_fast.kernels.autoencode`, which reads and feeds it.
    """

    limit: int
    """Slots per token that a sparse step has room for."""
    sparse: bool | None
    """Whether the next step runs sparse; None while no step has been seen."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1 slot, got {limit}")
        self.limit = limit
        self.sparse = None
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def observe(self, count: Tensor) -> None:
        """Takes note of a step's active features per token, count (N,) on any device."""
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
            event.record()
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
            self.sparse = True
