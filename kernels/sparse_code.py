"""The sparse code of a batch: for each token the active features and how strongly they fire."""

from typing import NamedTuple

import torch
from torch import Tensor


class SparseCode(NamedTuple):
    """Active features of N tokens, K slots each.

    A slot whose value is not positive is unused: value 0, index 0, no gradient. (NaN counts as used, so that it
    propagates; dense codes with K = F keep ``indices[n, j] = j`` in unused slots too.) ``count`` may exceed K: such
    a row did not fit its capacity and the code is incomplete (`overflowed`).

    >>> code = SparseCode(torch.tensor([[2.0, 0.5]]), torch.tensor([[3, 1]]), torch.tensor([2]))
    >>> code.to_dense(5)
    tensor([[0.0000, 0.5000, 0.0000, 2.0000, 0.0000]])
    """

    values: Tensor
    """(N, K) float: activations, positive in used slots."""
    indices: Tensor
    """(N, K) int32 or int64: feature of each slot, in [0, F)."""
    count: Tensor
    """(N,) int32 or int64: active features of each token (L0), also when they exceed K."""

    def to_dense(self, d_sae: int) -> Tensor:
        """The code as an (N, d_sae) matrix; differentiable in ``values``."""
        dense = self.values.new_zeros(self.values.shape[0], d_sae)
        return dense.scatter_add(1, self.indices.long(), self.values)

    def overflowed(self) -> Tensor:
        """(N,) bool: tokens with more active features than slots."""
        return self.count > self.values.shape[1]

    @staticmethod
    def from_dense(dense: Tensor, capacity: int | None = None) -> "SparseCode":
        """The positive entries of an (N, F) matrix, each row's in ascending index, at most ``capacity`` of them.

        ``capacity=None`` takes the largest row count. Differentiable in ``dense``.
        """
        active = ~(dense <= 0)
        count = active.sum(-1)
        width = int(count.max()) if capacity is None and count.numel() else (capacity or 0)
        width = min(width, dense.shape[1])
        # A stable sort of "is inactive" lists the active columns first, in ascending order.
        indices = torch.argsort(~active, dim=-1, stable=True)[:, :width]
        used = torch.arange(width, device=dense.device) < count[:, None]
        indices = torch.where(used, indices, 0)
        values = torch.where(used, dense.gather(1, indices), 0)
        return SparseCode(values, indices, count)
