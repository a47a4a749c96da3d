"""The sparse code of a batch: for each token the active features and how strongly they fire.

`SparseCode` is what every encoder gives and `decode` takes; a JumpReLU encoder gives a `JumpCode`, which is the same
and holds in addition what the straight-through gradients of its thresholds need.
"""

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

    def needed(self) -> Tensor:
        """(N,) slots that each token needs."""
        return self.count

    @staticmethod
    def from_dense(dense: Tensor, capacity: int | None = None) -> "SparseCode":
        """The positive entries of an (N, F) matrix, each row's in ascending index, at most ``capacity`` of them.

        ``capacity=None`` takes the largest row count. Differentiable in ``dense``.
        """
        indices, used, count = compacted(~(dense <= 0), capacity)
        return SparseCode(torch.where(used, dense.gather(1, indices), 0), indices, count)


class JumpCode(NamedTuple):
    """A `SparseCode` of thresholded features, with the silent ones that lie just below their threshold.

    A silent feature within half a bandwidth of its threshold has a slot as well: value 0, its own index, and ``band``
    set. Its value takes no part in anything, but gradients reach it, and through it the threshold. So `decode`,
    `to_dense` and any function of them give the thresholds their whole straight-through gradient.

    >>> from e2e_fast.kernels import reference
    >>> x, W, theta = torch.ones(1, 1), torch.tensor([[0.2], [0.499], [0.7]]), torch.full((3,), 0.5, requires_grad=True)
    >>> code = reference.encode_jump_relu(x, W, None, theta, bandwidth=0.01)
    >>> code.indices, code.count, code.l0.detach()
    (tensor([[1, 2]]), tensor([1]), tensor([1.]))
    >>> torch.autograd.grad(code.l0.sum(), theta)[0]         # a lower threshold would let feature 1 fire
    tensor([   0., -100.,    0.])
    """

    values: Tensor
    """(N, K) float: activations, positive in used slots, 0 in all others."""
    indices: Tensor
    """(N, K) int32 or int64: feature of each slot, in [0, F), ascending among used slots and those of the band."""
    count: Tensor
    """(N,) int32 or int64: active features of each token (L0). Above K where slots were missing: see `overflowed`."""
    l0: Tensor
    """(N,) float: ``count``, differentiable in the thresholds by its slots' straight-through gradients alone."""
    band: Tensor
    """(N, K) bool: slots, active or silent, whose score lies within half a bandwidth of the threshold."""

    def to_dense(self, d_sae: int) -> Tensor:
        """The code as an (N, d_sae) matrix; differentiable in ``values``."""
        return SparseCode(self.values, self.indices, self.count).to_dense(d_sae)

    def overflowed(self) -> Tensor:
        """(N,) bool: tokens that needed more slots than there are; their ``count`` includes silent ones of the band."""
        return self.count > self.values.shape[1]

    def needed(self) -> Tensor:
        """(N,) slots that each token needs, those of the band's silent features among them."""
        return torch.where(
            self.overflowed(), self.count, (~(self.values <= 0) | self.band).sum(-1).to(self.count.dtype)
        )


def compacted(keep: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Slots for the entries of an (N, F) mask, ascending: indices (N, K), used (N, K) bool, true count (N,).

    ``capacity=None`` takes the largest row count as K.
    """
    count = keep.sum(-1)
    width = int(count.max()) if capacity is None and count.numel() else (capacity or 0)
    width = min(width, keep.shape[1])
    # A stable sort of "is not kept" lists the kept columns first, in ascending order.
    indices = torch.argsort(~keep, dim=-1, stable=True)[:, :width]
    used = torch.arange(width, device=keep.device) < count[:, None]
    return torch.where(used, indices, 0), used, count
