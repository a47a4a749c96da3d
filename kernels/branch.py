"""A branch of a frozen block, in one pass over its tokens and without a graph.

    y = residual + W₂ gelu(W₁ norm(x) + b₁) + b₂      norm(x) = (x - mean) / √(variance + ε) · gain + shift
    y = residual + W₁ norm(x) + b₁                    where there is no second layer

Norm and residual may be absent too: queries, keys and values, the attention's output and a whole MLP are such branches.
For the frozen language model on a CPU in float32. Operators of torch write what stands between to memory, and for a
narrow model each costs as much to call as to compute. Here 48 tokens pass through all of it in a thread's caches.
Everything else (float64, a GPU, no compiled core) goes through torch.

Operator: ``e2e_fast::branch(x, gain, shift, eps, W₁, b₁, gelu, W₂, b₂, residual) -> y``.

No gradient: raises RuntimeError where one would be recorded.

>>> import torch
>>> x, W1, W2 = torch.randn(3, 8), torch.randn(32, 8), torch.randn(8, 32)
>>> y = branch(x, Layer(W1), second=Layer(W2), gelu="tanh", residual=x)
>>> torch.allclose(y, x + torch.nn.functional.gelu(x @ W1.T, approximate="tanh") @ W2.T, atol=1e-4)
True
"""

from typing import NamedTuple

import torch
from torch import Tensor

from e2e_fast.kernels import reference
from e2e_fast.kernels._buffers import empty
from e2e_fast.kernels._native import array, direct, has_native, native, strided


class Layer(NamedTuple):
    """A layer ``x @ weight.T + bias``."""

    weight: Tensor
    """(outputs, inputs), in any layout."""
    bias: Tensor | None = None
    """(outputs,)."""


class Norm(NamedTuple):
    """A LayerNorm."""

    gain: Tensor
    """(D,)."""
    shift: Tensor
    """(D,)."""
    eps: float
    """Added to the variance."""


def branch(
    x: Tensor,
    first: Layer,
    *,
    norm: Norm | None = None,
    gelu: str = "none",
    second: Layer | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x (N, D) → (N, outputs), a new tensor; residual (N, outputs). ``gelu`` as in `kernels.gelu`.

    Raises ValueError on shapes that do not fit.
    """
    tensors = [t for t in (x, *first, *(norm or ())[:2], *(second or ()), residual) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("branch() has no gradient: call it under torch.no_grad()")
    if not (has_native() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)):
        return reference.branch(x, first, norm=norm, gelu=gelu, second=second, residual=residual)
    gain, shift, eps = norm or (None, None, 0.0)
    run = _forward if direct(*tensors) else _branch
    return run(x, gain, shift, eps, *first, gelu, *(second or (None, None)), residual)


def _forward(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    first_weight: Tensor,
    first_bias: Tensor | None,
    gelu: str,
    second_weight: Tensor | None,
    second_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    core, threads = native(), torch.get_num_threads()
    assert core is not None, "branch() takes the reference where the core is missing"
    hidden, inputs = first_weight.shape
    outputs = 0 if second_weight is None else second_weight.shape[0]
    y = empty(x.shape[0], outputs or hidden)
    scratch = torch.empty(core.branch_scratch(inputs, hidden, outputs, threads))
    core.branch(
        array(x), array(gain), array(shift), eps, strided(first_weight), array(first_bias), gelu == "tanh",
        strided(second_weight), array(second_bias), array(residual), y.numpy(), scratch.numpy(), threads,
    )  # fmt: skip
    return y


_branch = torch.library.custom_op("e2e_fast::branch", _forward, mutates_args=(), device_types="cpu")


@_branch.register_fake
def _(x, gain, shift, eps, first_weight, first_bias, gelu, second_weight, second_bias, residual):
    return x.new_empty(x.shape[0], (first_weight if second_weight is None else second_weight).shape[0])
