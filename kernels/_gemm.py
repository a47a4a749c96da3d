"""Matrix products on CPU by the fastest route that is exact to rounding, and row chunks by a byte budget.

In torch's x86 wheels float32 products go to MKL, which runs at half speed on AMD processors; oneDNN, in the same wheel,
does not. torch reaches oneDNN for float32 only through an internal operator, so it is probed once and used only where
it exists and agrees.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

CHUNK_BYTES = 16 << 20
"""Bytes of the largest temporary matrix: below the size from which malloc maps (and zeroes) fresh pages every time."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for x (N, D), weight (F, D), bias (F,) of one dtype."""
    if (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel()
        and weight.numel()
        # Weights in other layouts meet oneDNN's plain loops, 400 times slower.
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and _onednn()
    ):
        bias = None if bias is None else bias.contiguous()  # its strides are not looked at
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nnf.linear(x, weight, bias)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of x (…, D) with a gradient for x alone: weight and bias are constants."""
    if x.requires_grad and torch.is_grad_enabled():
        return _FrozenLinear.apply(x, weight, bias)
    return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return frozen_linear(dy, ctx.saved_tensors[0].t()), None, None


def row_chunks(rows: int, row_bytes: int, budget: int = CHUNK_BYTES, multiple: int = 16) -> Iterator[slice]:
    """Slices that cover ``rows``, each at most ``budget`` bytes and at least ``multiple`` rows."""
    step = max(multiple, budget // max(1, row_bytes) // multiple * multiple)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@functools.cache
def _onednn() -> bool:
    """Whether torch's internal oneDNN linear exists here and computes what F.linear computes."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, w, b = torch.linspace(-1, 1, 35).view(5, 7), torch.linspace(1, 3, 21).view(3, 7), torch.ones(3)
    try:
        ours = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(ours, nnf.linear(x, w, b), rtol=1e-6, atol=1e-6)
