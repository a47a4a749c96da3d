"""JumpReLU on the GPU: the filter of `encode`, with room for the silent features of the thresholds' band.

    found   z > max(θ_j - ε/2, 0)        values   z where z > θ_j, else 0        band   found and |z - θ_j| < ε/2

Scores are compared in the accumulator's dtype: a bfloat16 near 1 cannot tell which side of θ it is on. What follows the
filter is elementwise on N × K slots.
"""

from torch import Tensor

from e2e_fast.kernels.encode import jump_slots
from e2e_fast.kernels.triton._launch import accumulator, promoted
from e2e_fast.kernels.triton.encode import filtered_code


def encode_jump_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, bandwidth: float, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, indices (N, capacity), count, l0 (N,), band (N, capacity) of ``e2e_fast::encode_jump_relu``.

    x (N, D), weight (F, D), bias and threshold (F,). ``capacity = -1`` makes room for the fullest row, which waits for
    the GPU.
    """
    dtype = promoted(x, weight)
    theta = threshold.to(accumulator(dtype))
    floor = (theta - bandwidth / 2).clamp_min(0)
    scores, indices, kept = filtered_code(x, weight, bias, floor, capacity, exact=True)
    return jump_slots(scores, indices, kept, theta, bandwidth, dtype)
