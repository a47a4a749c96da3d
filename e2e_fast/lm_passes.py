"""The two passes of a frozen language model: `Original`, once and without a graph, and `Spliced`, with one.

`e2e_fast.lm` says what they compute and how they are used together.

>>> import torch
>>> from e2e_fast import load_lm
>>> original = load_lm("embedded").original(torch.arange(12).view(2, 6), at="blocks.1.hook_resid_pre")
>>> spliced = original.splice(lambda x: 0.9 * x)
>>> spliced.final.shape == original.final.shape, bool(spliced.kl() > 0)
(True, True)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from e2e_fast import kernels
from e2e_fast.lm_blocks import Call, Replacement, Visit, blocks_needed, parse_position
from e2e_fast.precision import as_given, exact, lowered

if TYPE_CHECKING:
    from e2e_fast.lm import LM


class Original(Mapping[str, Tensor]):
    """What the unchanged model did on a batch: a mapping from the named positions to activations [B, T, width]."""

    lm: "LM"
    tokens: Tensor
    """[B, T], as given."""
    at: list[str]
    """Positions that a splice may replace."""
    fast: bool
    """As it was asked for; its splices follow."""

    def __init__(
        self,
        lm: "LM",
        tokens: Tensor,
        at: list[str],
        named: list[str],
        seen: dict[str, Tensor],
        calls: list[Call],
        final: Tensor | None,
        fast: bool,
    ) -> None:
        self.lm, self.tokens, self.at, self.fast = lm, tokens, at, fast
        self._named, self._seen, self._calls, self._final = named, seen, calls, final

    def __getitem__(self, position: str) -> Tensor:
        if position not in self._named:
            raise KeyError(f"{position!r} was not asked for: name it in at= or downstream= (there are {self._named})")
        return self._seen[position]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    @property
    def final(self) -> Tensor:
        """[B, T, D]: the hidden state after the final norm, which the unembedding reads; none with suffix=False."""
        if self._final is None:
            raise RuntimeError("the original pass stopped early (suffix=False): it has no final state, logits or KL")
        return self._final

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[B, T, V]."""
        return self.lm.unembed(self.final)

    def restrict(self, at: Iterable[str], downstream: Iterable[str] = ()) -> "Original":
        """The same pass as if it had been asked for these of its positions alone; nothing is copied."""
        at, wanted = list(at), {*at, *downstream}
        if missing := wanted - set(self._named):
            raise KeyError(f"{min(missing)!r} was not asked for: there are {self._named}")
        named = [position for position in self._named if position in wanted]
        return Original(self.lm, self.tokens, at, named, self._seen, self._calls, self._final, self.fast)

    def splice(self, x_hat: Replacement | Mapping[str, Replacement]) -> "Spliced":
        """The model from the first spliced position on, with a graph.

        x_hat: a tensor [B, T, width] or a function of the activation when ``at`` names one position; else
        ``{position: tensor or function}``. Functions are called in the order of the network, with the activation that
        arrives at their position: a later one sees what the earlier ones did. Positions of ``at`` that are left out
        stay as they are.

        Raises ValueError for positions outside ``at`` and for an x_hat of another shape, dtype or device.
        """
        if not isinstance(x_hat, Mapping):
            if len(self.at) != 1:
                raise ValueError(f"x_hat must map positions to replacements where at= is not one position: {self.at}")
            x_hat = {self.at[0]: x_hat}
        outside = [position for position in x_hat if position not in self.at]
        if outside or not x_hat:
            raise ValueError(f"x_hat must name positions of at= ({self.at}), got {list(x_hat)}")
        return Spliced(self, dict(x_hat))


class Spliced:
    """The model's run with replaced activations. Blocks after the last named position wait until they are needed."""

    def __init__(self, original: Original, replace: dict[str, Replacement]) -> None:
        lm = self._lm = original.lm
        self._original = original
        self._token_kl: Tensor | None = None
        """(B·T,), where `share_kl` has made it."""
        first = min(replace, key=lm._order.__getitem__)
        affected = {p for p in original if lm._order[p] >= lm._order[first]}
        self._visit = Visit(affected, replace)
        with lm._mode.set(original.fast):
            x, layer = self._enter(first)
            self._next = max(layer, *map(blocks_needed, affected))
            self._stream = lm._advance(x, original._calls, layer, self._next, self._visit)

    def _enter(self, first: str) -> tuple[Tensor, int]:
        """To the end of the block with the first replacement: the stream there and the index of the next block."""
        lm, seen, visit = self._lm, self._original._seen, self._visit
        layer, stage = parse_position(first)
        if stage == "hook_resid_pre":
            return visit(first, seen[first]), layer
        if stage == "hook_resid_post":
            return lm._between(layer, seen[first], visit), layer + 1
        x, attn_out = seen[f"blocks.{layer}.hook_resid_pre"], seen[f"blocks.{layer}.hook_attn_out"]
        attn_out = visit(f"blocks.{layer}.hook_attn_out", attn_out)
        x = lm._after_attention(layer, x, attn_out, visit, seen[first] if stage == "hook_mlp_out" else None)
        return lm._between(layer, x, visit), layer + 1

    def __getitem__(self, position: str) -> Tensor:
        """The activation that arrives at a named position (before its own replacement), with a graph."""
        seen = self._visit.seen
        return seen[position] if position in seen else self._original[position]

    def run_to_end(self) -> None:
        """Runs the blocks that wait, now."""
        _ = self.final

    @cached_property
    def final(self) -> Tensor:
        """[B, T, D]: the hidden state after the final norm."""
        lm = self._lm
        with lm._mode.set(self._original.fast):
            x = lm._advance(self._stream, self._original._calls, self._next, lm.n_layers, self._visit)
        return lm._norm(x)

    def drop_graph(self) -> None:
        """Keeps the numbers and forgets how they were made: for what is read after the backward pass."""
        for kept in (self._visit.seen, self.__dict__):
            kept.update({name: value.detach() for name, value in kept.items() if isinstance(value, Tensor)})
        self._visit.replace = {}

    def logits(self) -> Tensor:
        """[B, T, V]."""
        return self._lm.unembed(self.final)

    def kl(self, rows: Tensor | None = None) -> Tensor:
        """KL(original ‖ spliced) over the vocabulary, nats, mean over all B·T tokens; never builds the logits.

        ``rows`` [n], int64, are the flattened tokens to take the mean over; None takes all.
        """
        student, teacher = self.final.flatten(0, 1), self._original.final.flatten(0, 1)
        if rows is None and self._token_kl is not None:
            return self._token_kl.mean()
        if rows is not None:
            student, teacher = student[rows], teacher[rows]
        unembed = self._lm.unembed
        student, teacher = lowered(student, teacher)
        weight = unembed.reduced()
        with as_given(student.device):
            return kernels.linear_kl(student, teacher, weight, unembed.bias, softcap=unembed.softcap)

    def mse(self, position: str) -> Tensor:
        """Mean squared difference between what arrives at a position and the original, over tokens and channels."""
        return nnf.mse_loss(exact(self[position]), exact(self._original[position]))


def share_kl(passes: Sequence[Spliced], *, gradient: bool = True) -> None:
    """Makes the KL of several spliced runs of one original pass, whose logits are formed once; `kl` then returns it.

    The numbers are those of each run's own `kl`. All runs' graphs are alive at a time. ``gradient=False`` makes KLs
    that cannot be trained on.
    """
    original, unembed = passes[0]._original, passes[0]._lm.unembed
    finals = [spliced.final.flatten(0, 1) for spliced in passes]
    students, teacher = lowered(torch.stack([final.detach() for final in finals]), original.final.flatten(0, 1))
    # The operator itself: it gives the KL of every token, and the gradient of their sum.
    token_kl, gradients = torch.ops.e2e_fast.linear_kl_shared(
        students, teacher, unembed.reduced(), unembed.bias, unembed.softcap, gradient
    )
    for s, (spliced, final) in enumerate(zip(passes, finals, strict=True)):
        spliced._token_kl = _TokenKL.apply(final, token_kl[s], gradients[s]) if gradient else token_kl[s]


class _TokenKL(torch.autograd.Function):
    """KLs that are known already, (N,), with their gradient with respect to the final hidden state, (N, D)."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, token_kl: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = final.dtype
        return token_kl.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * dkl[:, None]).to(gradient.dtype).to(ctx.dtype), None, None
