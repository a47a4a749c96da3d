"""Exact Adam for one parameter, in place, with what the next forward needs of it: row norms and a bfloat16 copy.

    g = clip · grad (+ weight_decay · p)
    m ← m + (1 - β₁)(g - m)            v ← β₂ v + (1 - β₂) g²
    p ← p - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)
    inverse_norms ← 1 / max(‖row of p‖, 1e-12)         shadow ← p, rounded

The semantics of ``torch.optim.Adam``, up to the order of rounding. t, lr and clip are tensors on the parameter's
device: nothing waits for it, and a captured CUDA graph goes on counting. Gradients are clipped by their common norm as
``torch.nn.utils.clip_grad_norm_`` does, but the scaling happens in the update, which saves a pass over them all.

Operator: ``e2e_fast::adam_step(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, clip?,
inverse_norms?, shadow?) -> ()``, which writes param, exp_avg, exp_avg_sq, inverse_norms and shadow.

>>> import torch
>>> p, m, v = torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
>>> norms = torch.empty(2)
>>> adam_step(p, torch.ones(2, 3), m, v, torch.tensor(1.0), torch.tensor(0.5), inverse_norms=norms)
>>> p[0], norms                                         # the first step has the length of lr
(tensor([0.5000, 0.5000, 0.5000]), tensor([1.1547, 1.1547]))
>>> clip_coefficient([torch.tensor([3.0, 4.0])], max_norm=1.0)
(tensor(0.2000), tensor(5.))
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from e2e_fast.kernels._checks import accumulator, check_devices
from e2e_fast.kernels.decode import row_inverse_norms


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: Tensor | None = None,
    inverse_norms: Tensor | None = None,
    shadow: Tensor | None = None,
) -> None:
    """Updates param, exp_avg and exp_avg_sq in place, and fills ``inverse_norms`` and ``shadow`` where they are given.

    param, grad, exp_avg, exp_avg_sq (F, D), or of any other shape, whose last dimension then is a row; all but grad
    contiguous and of one dtype. ``step`` () counts from 1: the number of this update. ``lr`` (). ``clip`` () scales the
    gradient (`clip_coefficient`). ``inverse_norms`` (F,) float32 (float64 for such parameters); ``shadow``, shaped like
    param, of any floating dtype. All on one device. Raises ValueError for tensors that do not fit.
    """
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("shadow", shadow)):
        if tensor is not None and tensor.shape != param.shape:
            raise ValueError(f"{name} must have param's shape {tuple(param.shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("shadow", shadow)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is updated in place and must be contiguous, got strides {tensor.stride()}")
    for name, tensor in (("step", step), ("lr", lr), ("clip", clip)):
        if tensor is not None and tensor.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(tensor.shape)}")
    rows = param.numel() // max(1, param.shape[-1]) if param.dim() else 1
    if inverse_norms is not None and inverse_norms.shape != (rows,):
        raise ValueError(f"inverse_norms must have shape ({rows},), got {tuple(inverse_norms.shape)}")
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    others = {"step": step, "lr": lr, "clip": clip, "inverse_norms": inverse_norms, "shadow": shadow}
    check_devices("param", param, grad=grad, **moments, **others)
    _adam_step(
        param, grad, exp_avg, exp_avg_sq, step, lr, *betas, eps, weight_decay, clip, inverse_norms, shadow
    )  # fmt: skip


def clip_coefficient(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """(min(1, max_norm / (‖all gradients‖ + 1e-6)), ‖all gradients‖), both () on their device, none changed.

    The formula of ``torch.nn.utils.clip_grad_norm_``.
    """
    norms = torch._foreach_norm(list(grads))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


@torch.library.custom_op(
    "e2e_fast::adam_step",
    mutates_args=("param", "exp_avg", "exp_avg_sq", "inverse_norms", "shadow"),
    device_types="cpu",
)
def _adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: Tensor | None,
    inverse_norms: Tensor | None,
    shadow: Tensor | None,
) -> None:
    dtype = accumulator(param)
    t = float(step)
    g = grad.to(dtype) if clip is None else grad.to(dtype) * clip
    if weight_decay:
        g = g + weight_decay * param
    exp_avg.lerp_(g.to(exp_avg.dtype), 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g.to(exp_avg_sq.dtype), g.to(exp_avg_sq.dtype), value=1 - beta2)
    denominator = exp_avg_sq.to(dtype).sqrt().div_((1 - beta2**t) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg.to(dtype), denominator, value=-float(lr) / (1 - beta1**t))
    if inverse_norms is not None:
        inverse_norms.copy_(row_inverse_norms(param.view(len(inverse_norms), -1)))
    if shadow is not None:
        shadow.copy_(param)


@_adam_step.register_fake
def _(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, clip, inverse_norms, shadow):
    return None


@_adam_step.register_kernel("cuda")
def _(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, clip, inverse_norms, shadow):
    from e2e_fast.kernels.triton.adam import adam_step as launch

    launch(
        param, grad, exp_avg, exp_avg_sq, step, lr, (beta1, beta2), eps, weight_decay, clip, inverse_norms, shadow
    )  # fmt: skip
