"""One training step: tokens → prefix → encode → decode → suffix → losses → backward.

    original  = lm.original(tokens)          the prefix and, unless the loss is local, the teacher; once, no graph
    x̂         = sae(original[position])      encode, decode
    spliced   = original.splice(x̂)           the suffix, with a graph; in local training it is not run
    loss      = Σ coefficient · term         losses.compute_loss
    gradients = ∂loss/∂(SAE weights)         the LM is frozen and gets none

The Trainer calls this once a micro-batch; so can any other loop. Several sets of SAEs share a batch's original pass:
`original_pass` makes it with all that they need, and each one's step is given it.

>>> import torch
>>> from e2e_fast import losses, load_lm                                       # doctest: +SKIP
>>> from e2e_fast.sae import SAE                                               # doctest: +SKIP
>>> lm = load_lm("embedded")                                                   # doctest: +SKIP
>>> saes = {"blocks.3.hook_resid_pre": SAE(lm.d_model, 1024)}                  # doctest: +SKIP
>>> result = training_step(lm, saes, losses.e2e(sparsity=1.0), tokens)         # doctest: +SKIP
>>> result.loss, saes["blocks.3.hook_resid_pre"].W_dec.grad.shape              # doctest: +SKIP
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from e2e_fast.lm import Spliced, share_kl
from e2e_fast.losses import LossConfig, compute_loss
from e2e_fast.measure import Timings
from e2e_fast.precision import as_given

if TYPE_CHECKING:
    from e2e_fast.lm import LM, Original
    from e2e_fast.sae import SAE, SAEActs


class StepResult(NamedTuple):
    """What one micro-batch gave. Nothing here has a graph; reading a number off it synchronises a GPU."""

    loss: Tensor
    """() the weighted total, before division by the accumulation steps."""
    terms: dict[str, Tensor]
    """() each loss by itself, unweighted, under e2e_sae's key without its prefix."""
    acts: "dict[str, SAEActs]"
    """What each SAE did, by position."""
    original: "Original"
    spliced: "Spliced | None"
    """None in local training."""


class Work(NamedTuple):
    """What `Steps.training_step` is given."""

    lm: "LM"
    saes: "Mapping[str, SAE]"
    loss: LossConfig
    tokens: Tensor
    accumulation_steps: int
    timings: Timings
    original: "Original | None"
    kl_rows: Tensor | None


class Steps:
    """The original pass of a batch and the steps on it, run as they are written; subclasses run them in other ways."""

    def original_pass(
        self,
        lm: "LM",
        wanted: "Iterable[tuple[Mapping[str, Any], LossConfig]]",
        tokens: Tensor,
        timings: Timings | None = None,
    ) -> "Original":
        """The prefix and, unless every loss is local, the teacher: once, with what each (SAEs, loss) needs of them."""
        return self._original(lm, list(wanted), tokens, timings or Timings(enabled=False))

    def training_step(
        self,
        lm: "LM",
        saes: "Mapping[str, SAE]",
        loss: LossConfig,
        tokens: Tensor,
        *,
        accumulation_steps: int = 1,
        timings: Timings | None = None,
        original: "Original | None" = None,
        kl_rows: Tensor | None = None,
    ) -> StepResult:
        """Forward and backward of one micro-batch; gradients are added to the SAEs' ``.grad``.

        tokens [B, T]. ``loss`` names its downstream positions in full. The loss is divided by ``accumulation_steps``
        before the backward, so that the gradients of an optimizer step are those of its mean loss. ``timings`` receives
        the seconds of each phase. ``original`` is the `original_pass` of these tokens where it is known already.
        ``kl_rows`` [n] are the flattened tokens on which the KL is estimated; None takes all.
        """
        timings = timings or Timings(enabled=False)
        return self._step(Work(lm, saes, loss, tokens, accumulation_steps, timings, original, kl_rows))

    def _original(
        self, lm: "LM", wanted: "list[tuple[Mapping[str, Any], LossConfig]]", tokens: Tensor, timings: Timings
    ) -> "Original":
        at = list(dict.fromkeys(position for saes, _ in wanted for position in saes))
        downstream = list(dict.fromkeys(position for _, loss in wanted for position in loss.downstream))
        suffix = not all(loss.is_local for _, loss in wanted)
        return lm.original(tokens, at=at, downstream=downstream, suffix=suffix, timings=timings, fast=True)

    def _step(self, work: Work) -> StepResult:
        lm, saes, loss, tokens, _, timings, original, kl_rows = work
        return _backward(work, forward_step(lm, saes, loss, tokens, timings, original, kl_rows))


original_pass, training_step = Steps().original_pass, Steps().training_step


def _backward(work: Work, result: StepResult) -> StepResult:
    with work.timings.phase("backward"), as_given(work.lm.device):
        loss = result.loss if work.accumulation_steps == 1 else result.loss / work.accumulation_steps
        loss.backward()
    return without_graph(result)


def forward_step(
    lm: "LM",
    saes: "Mapping[str, Callable[[Tensor], SAEActs]]",
    loss: LossConfig,
    tokens: Tensor,
    timings: Timings | None = None,
    original: "Original | None" = None,
    kl_rows: Tensor | None = None,
) -> StepResult:
    """The step without its backward; evaluation calls it under ``torch.no_grad``."""
    timings = timings or Timings(enabled=False)
    if original is None:
        original = original_pass(lm, [(saes, loss)], tokens, timings)
    else:
        original = original.restrict(saes, loss.downstream)
    acts, spliced = _run(saes, loss, original, timings)
    with timings.phase("losses"):
        total, terms = compute_loss(loss, acts, original, spliced, kl_rows, timings)
    return StepResult(total, terms, acts, original, spliced)


def _run(
    saes: "Mapping[str, Callable[[Tensor], SAEActs]]", loss: LossConfig, original: "Original", timings: Timings
) -> "tuple[dict[str, SAEActs], Spliced | None]":
    """The SAEs and, unless the loss is local, the model behind them."""
    acts: dict[str, SAEActs] = {}

    def autoencode_at(position: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with timings.phase("SAE"):
                acts[position] = saes[position](x)
            return acts[position].output

        return run

    spliced = None
    if loss.is_local:
        for position in saes:
            autoencode_at(position)(original[position])
    else:
        with timings.phase("student"):
            spliced = original.splice({position: autoencode_at(position) for position in saes})
            if loss.logits_kl is not None:
                spliced.run_to_end()
    return acts, spliced


class SharedLogits(Steps):
    """Steps of several sets of SAEs, whose KLs share the teacher's logits.

    The numbers are the same. The original pass runs all of them up to their KL, so their activations are alive at a
    time; their losses and backward passes follow one by one. `training_step` needs the pass and takes no ``kl_rows``.
    """

    def __init__(self) -> None:
        self._runs: dict[int, tuple[dict[str, SAEActs], Spliced]] = {}

    def _original(
        self, lm: "LM", wanted: "list[tuple[Mapping[str, Any], LossConfig]]", tokens: Tensor, timings: Timings
    ) -> "Original":
        original, self._runs = super()._original(lm, wanted, tokens, timings), {}
        if any(loss.logits_kl is None for _, loss in wanted):
            return original
        for saes, loss in wanted:
            acts, spliced = _run(saes, loss, original.restrict(saes, loss.downstream), timings)
            assert spliced is not None
            self._runs[id(saes)] = acts, spliced
        with timings.phase("KL"):
            gradient = any(loss.logits_kl is not None and loss.logits_kl.coeff > 0 for _, loss in wanted)
            share_kl([spliced for _, spliced in self._runs.values()], gradient=gradient)
        return original

    def _step(self, work: Work) -> StepResult:
        if work.original is None or work.kl_rows is not None:
            raise ValueError("shared logits need the original pass and take no kl_rows")
        run = self._runs.pop(id(work.saes), None)
        if run is None:
            return super()._step(work)
        acts, spliced = run
        original = work.original.restrict(work.saes, work.loss.downstream)
        with work.timings.phase("losses"):
            total, terms = compute_loss(work.loss, acts, original, spliced, None, work.timings)
        return _backward(work, StepResult(total, terms, acts, original, spliced))


def without_graph(result: StepResult) -> StepResult:
    """The same numbers, without autograd's graph."""
    acts = {}
    for position, act in result.acts.items():
        code = type(act.code)(*(tensor.detach() for tensor in act.code))
        acts[position] = replace(act, input=act.input.detach(), output=act.output.detach(), code=code)
    if result.spliced is not None:
        result.spliced.drop_graph()
    return result._replace(loss=result.loss.detach(), acts=acts)
