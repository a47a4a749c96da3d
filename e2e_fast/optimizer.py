"""Adam as the trainer uses it: torch's own on a CPU, `kernels.adam_step` on a GPU, with the same state and files.

On a GPU a parameter is read and written once a step: clipping is a factor in the update, and the update leaves the
bfloat16 copy and the inverse row norms that the next forward pass needs (`Shadow`).

>>> import torch
>>> p = torch.nn.Parameter(torch.ones(2, 3))
>>> optimizer = Adam([p], lr=0.5, own=True)             # own: the operator on a CPU too
>>> p.grad = torch.full((2, 3), 2.0)
>>> optimizer.clip(1.0)
tensor(4.8990)
>>> optimizer.step(); p[0].detach()
tensor([0.5000, 0.5000, 0.5000])
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from e2e_fast import kernels


class Shadow:
    """What the optimizer leaves of a parameter for the next forward pass; useless once the parameter changes.

    A change is seen by torch's version counter, and by another address. Writing through ``parameter.data`` raises no
    counter: whoever does that calls `forget`.
    """

    rounded: Tensor | None
    """The parameter in bfloat16, as autocast would cast it."""
    inverse_norms: Tensor | None
    """(F,) 1 / ‖row‖ of the parameter itself, where they are wanted."""

    def __init__(self, parameter: nn.Parameter, *, norms: bool) -> None:
        self.parameter, self._norms = parameter, norms
        self.forget()

    def forget(self) -> None:
        """Drops both: the next forward pass makes its own."""
        self.rounded = self.inverse_norms = None
        self._seen: tuple[int, int] | None = None

    def allocate(self) -> None:
        """Room for both on the parameter's device."""
        p = self.parameter
        if self.rounded is None or self.rounded.device != p.device:
            self.rounded = torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False)
            dtype = torch.promote_types(p.dtype, torch.float32)
            self.inverse_norms = torch.empty(len(p), dtype=dtype, device=p.device) if self._norms else None

    def written(self) -> None:
        """Both are those of the parameter as it is now."""
        self._seen = self._now()

    def holds(self, parameter: Tensor) -> bool:
        """Whether both are those of this tensor as it is now."""
        return parameter is self.parameter and self._seen is not None and self._seen == self._now()

    def _now(self) -> tuple[int, int]:
        return self.parameter._version, self.parameter.data_ptr()


class Adam(torch.optim.Adam):
    """``torch.optim.Adam`` with its defaults, its state and its ``state_dict``; fused on every device."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        shadows: Iterable[Shadow] = (),
        own: bool | None = None,
    ) -> None:
        """``own`` None takes our operator on CUDA. ``shadows`` are kept up to date where it is used."""
        parameters = list(parameters)
        super().__init__(parameters, lr=lr, fused=True)
        self.own = parameters[0].is_cuda if own is None else own
        self._shadows = {id(shadow.parameter): shadow for shadow in shadows}
        self._clip: Tensor | None = None
        self._lr: Tensor | None = None

    def clip(self, max_norm: float | None) -> Tensor | None:
        """Clips the gradients of the coming step by their common norm, which is returned; None does nothing."""
        if max_norm is None:
            return None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self.own or not parameters:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        self._clip, norm = kernels.clip_coefficient([p.grad for p in parameters], max_norm)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update; ``param_groups[0]["lr"]`` is its learning rate."""
        if not self.own:
            step: Any = torch.optim.Adam.step
            # Where a plain Adam lives in the process torch wraps that step to call hooks, which ours has called.
            return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, closure)
        if closure is not None:
            raise ValueError("closure must be None: Adam evaluates nothing itself")
        for group in self.param_groups:
            if self._lr is None:
                self._lr = torch.zeros((), dtype=torch.float64, device=group["params"][0].device)
            self._lr.fill_(group["lr"])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self._lr, group)
        self._clip = None
        return None

    def _update(self, p: nn.Parameter, grad: Tensor, lr: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        shadow = self._shadows.get(id(p))
        if shadow is not None:
            shadow.allocate()
        kernels.adam_step(
            p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], lr,
            betas=group["betas"], eps=group["eps"], clip=self._clip,
            inverse_norms=shadow.inverse_norms if shadow else None, shadow=shadow.rounded if shadow else None,
        )  # fmt: skip
        if shadow is not None:
            shadow.written()
