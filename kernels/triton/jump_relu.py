"""JumpReLU on the GPU: the filter of `encode`, with room for the silent features of the thresholds' band.

    found   z > max(θ_j - ε/2, 0)        values   z where z > θ_j, else 0        band   found and |z - θ_j| < ε/2

Scores are compared in the accumulator's dtype: a bfloat16 near 1 cannot tell which side of θ it is on. What follows the
filter is elementwise on N × K slots.
"""

import torch
from torch import Tensor

from e2e_fast.kernels.encode import jump_slots
from e2e_fast.kernels.triton._launch import accumulator, contiguous, promoted
from e2e_fast.kernels.triton.encode import _filter, _fullest, _score_chunks


def encode_jump_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, bandwidth: float, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, indices (N, capacity), count, l0 (N,), band (N, capacity) of ``e2e_fast::encode_jump_relu``.

    x (N, D), weight (F, D), bias and threshold (F,). ``capacity = -1`` makes room for the fullest row, which waits for
    the GPU.
    """
    (N, _), F = x.shape, weight.shape[0]
    dtype, bias = promoted(x, weight), contiguous(bias)
    theta = threshold.to(accumulator(dtype))
    floor = (theta - bandwidth / 2).clamp_min(0).contiguous()
    if capacity < 0:
        capacity = max((_fullest(z, bias, floor) for _, z in _score_chunks(x, weight)), default=0)
    scores = x.new_empty(N, min(capacity, F), dtype=theta.dtype)
    indices = x.new_empty(scores.shape, dtype=torch.int32)
    kept = x.new_empty(N, dtype=torch.int32)
    for rows, z in _score_chunks(x, weight):
        _filter(z, bias, floor, scores[rows], indices[rows], kept[rows])
    return jump_slots(scores, indices, kept, theta, bandwidth, dtype)
