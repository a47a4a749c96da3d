"""A model's blocks, run one by one: the arguments they are called with, and visits to the positions in them.

>>> positions_of(2, parallel=True)["blocks.1.hook_resid_pre"]
6
>>> parse_position("blocks.6.mlp.hook_post")
(6, 'mlp.hook_post')
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from e2e_fast.lm_architectures import Tap

Replacement = Tensor | Callable[[Tensor], Tensor]
"""What a splice puts in an activation's place: a tensor, or a function of the activation that arrives there."""

STAGES = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""Named points of a block, in the order in which the block computes them."""


# --- Positions ------------------------------------------------------------------------------------------------------


def positions_of(n_layers: int, parallel: bool) -> dict[str, int]:
    """Position → its place in the order of the network."""
    stages = [stage for stage in STAGES if not (parallel and stage == "hook_resid_mid")]
    names = (f"blocks.{layer}.{stage}" for layer in range(n_layers) for stage in stages)
    return {name: i for i, name in enumerate(names)}


def parse_position(position: str) -> tuple[int, str]:
    _, layer, stage = position.split(".", 2)
    return int(layer), stage


def blocks_needed(position: str) -> int:
    layer, stage = parse_position(position)
    return layer if stage == "hook_resid_pre" else layer + 1


# --- Running --------------------------------------------------------------------------------------------------------


class Call:
    """The arguments that a block is called with, next to the stream."""

    __slots__ = ("args", "kwargs")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


def same_arguments(a: Call, b: Call) -> bool:
    leaves = [tree_leaves((call.args, call.kwargs)) for call in (a, b)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(*leaves, strict=True))


class Notes:
    """The calls of one pass, and whether the blocks answer with a tensor or with a tuple that starts with it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answers_tuple: bool | None = None


class NoteTaker(nn.Module):
    """Stands where a block stood: writes the call down and passes the stream on."""

    def __init__(self, notes: Notes, block: nn.Module) -> None:
        super().__init__()
        self._notes = notes
        self._block = [block]  # in a list: it is not a part of this module
        # Some models of transformers below 4.57 choose the mask by an attribute of the block.
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self._notes.calls.append(Call(args, kwargs))
        if self._notes.answers_tuple is None:
            self._notes.answers_tuple = not isinstance(self._block[0](x, *args, **kwargs), Tensor)
        return (x,) if self._notes.answers_tuple else x


class Visit:
    """Sees the activations at some positions and replaces those it has a replacement for."""

    def __init__(self, wanted: Iterable[str], replace: Mapping[str, Replacement] | None = None) -> None:
        self.replace = replace or {}
        self.names = {*wanted, *self.replace}
        self.inside = {layer for layer, stage in map(parse_position, self.names) if stage in STAGES[1:-1]}
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self.names:
            return x
        self.seen[name] = x
        if name not in self.replace:
            return x
        x_hat = self.replace[name]
        if not isinstance(x_hat, Tensor):
            x_hat = x_hat(x)
        if not isinstance(x_hat, Tensor) or (x_hat.shape, x_hat.dtype, x_hat.device) != (x.shape, x.dtype, x.device):
            raise ValueError(f"x_hat at {name} must be like the activation, {describe(x)}, got {describe(x_hat)}")
        return x_hat


class Left(Exception):
    """Carries a module's output out of the block's forward."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def leave(module: nn.Module, args: Any, output: Any) -> None:
    raise Left(main_output(output))


def listen(block: nn.Module, tap: Tap, visit: Visit, name: str) -> Any:
    """Puts a visit on a module's input or output; returns the hook's handle."""
    module = block.get_submodule(tap.module)
    if tap.side == "input":

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (visit(name, args[0]), *args[1:])

        return module.register_forward_pre_hook(before)

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return visit(name, output)

    return module.register_forward_hook(after)


def main_output(output: Any) -> Tensor:
    """A module's main output: some return (tensor, attention weights, …)."""
    return output if isinstance(output, Tensor) else output[0]


def describe(x: Any) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
