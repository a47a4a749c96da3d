"""The Gaussian error linear unit, in the two forms that language models use.

    "none"   gelu(x) = x Φ(x)          Φ the normal distribution      gelu'(x) = Φ(x) + x e^(-x²/2) / √(2π)
    "tanh"   gelu(x) = x / (1 + e)     e = e^(-2u)                    gelu'(x) = 1 / (1 + e) + 2 x u' e / (1 + e)²
             u = √(2/π) (x + 0.044715 x³)

For the frozen language model on a CPU in float32: one pass with one exponential, and another for the gradient.
Everything else (other dtypes, a GPU, no compiled core) goes to ``torch.nn.functional.gelu``.

Operator: ``e2e_fast::gelu(x, approximate) -> y``.

>>> import torch
>>> x = torch.linspace(-3, 3, 7)
>>> torch.allclose(gelu(x), torch.nn.functional.gelu(x), atol=1e-6)
True
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from e2e_fast.kernels._buffers import empty_like
from e2e_fast.kernels._native import array, direct, has_native, native


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu`` of any shape. Error below 2^-19 of the result, or below 2^-30 where x < -4.

    Once differentiable on a CPU in float32. Raises ValueError unless ``approximate`` is "none" or "tanh".
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
    if x.device.type == "cpu" and x.dtype == torch.float32 and has_native():
        return (_forward if direct(x) else _gelu)(x, approximate)
    return nnf.gelu(x, approximate=approximate)


def _forward(x: Tensor, approximate: str) -> Tensor:
    core, y = native(), empty_like(x)
    assert core is not None, "gelu() takes torch's where the core is missing"
    core.gelu(array(x), approximate == "tanh", y.numpy(), torch.get_num_threads())
    return y


_gelu = torch.library.custom_op("e2e_fast::gelu", _forward, mutates_args=(), device_types="cpu")


@_gelu.register_fake
def _(x, approximate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("e2e_fast::gelu_backward", mutates_args=(), device_types="cpu")
def _gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    core, dx = native(), empty_like(x)
    assert core is not None, "gelu() takes torch's where the core is missing"
    core.gelu_gradient(array(x), array(dy), approximate == "tanh", dx.numpy(), torch.get_num_threads())
    return dx


@_gelu_backward.register_fake
def _(dy, x, approximate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.approximate = inputs[1]
    ctx.save_for_backward(inputs[0])


@once_differentiable
def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return _gelu_backward(dy, x, ctx.approximate), None


_gelu.register_autograd(_backward, setup_context=_setup_context)
