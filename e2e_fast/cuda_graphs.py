"""CUDA graphs of the micro-step: recorded once, then replayed on new tokens by one launch each.

    tokens    → static buffer → graph of the original pass → activations that stay at their addresses
    a member:   graph of SAE, suffix, losses and backward  → its result and gradients, which stay at theirs
    outside     gradients to ``.grad``; average, clip, Adam, logs: as without graphs

`StepGraphs` has the two calls of `e2e_fast.step`, with the same arguments, and gives the same numbers. Every member has
graphs of its own, so that a change of one (a phase, dense to sparse) leaves the others' in place.

* A new situation (loss, size, dense or sparse, …) runs eagerly `WARM_UP` times, as part of the training, before it is
  recorded. Batches of another shape than the first, such as a smaller last one, always run eagerly.
* What changes from step to step comes in through static buffers: the tokens, and the rows on which the KL is estimated.
* ReLU codes run dense or sparse (`e2e_fast.kernels.density`), each with its own graph. After a sparse one the fullest
  row is read, the step's only wait for the GPU; where it did not fit, the step's gradients are dropped and it runs anew,
  dense.
* A gradient is added to ``.grad`` after its replay, or is it where an optimizer step has one micro-batch.
* What a replay gave is overwritten by the next: logs read it before.

Recording is a function ``record(work) -> (replay, outputs)``, `record_cuda_graph` unless another is given: ``work`` is
run once to be recorded and its outputs hold valid numbers after each ``replay()``.
"""

import gc
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from e2e_fast import kernels, step
from e2e_fast.losses import LossConfig
from e2e_fast.measure import Timings
from e2e_fast.precision import as_given, lowered
from e2e_fast.sae import SAE, SAEActs

if TYPE_CHECKING:
    from e2e_fast.lm import LM, Original

WARM_UP = 3
"""Eager runs of a situation before it is recorded: they compile kernels, fill caches and make the attention masks."""

KEPT = 4
"""Recorded situations a member keeps; the oldest goes."""

T = TypeVar("T")
Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class StepGraphs:
    """`step.original_pass` and `step.training_step` for the members of one run, by graphs."""

    recordings: int
    """Graphs recorded so far."""
    replays: int
    """Graphs replayed so far."""

    def __init__(self, record: Record | None = None) -> None:
        self.recordings = self.replays = 0
        self._record = record or _CudaRecorder()
        self._shape: torch.Size | None = None
        self._tokens: Tensor | None = None
        self._original = _Situations()
        self._members: dict[tuple[int, ...], _Situations] = {}

    def original_pass(
        self,
        lm: "LM",
        wanted: "Iterable[tuple[Mapping[str, SAE], LossConfig]]",
        tokens: Tensor,
        timings: Timings | None = None,
    ) -> "Original":
        """`step.original_pass`."""
        wanted = list(wanted)
        if self._shape is None:
            self._shape = tokens.shape
        needs = tuple((tuple(saes), loss.downstream, loss.is_local) for saes, loss in wanted)
        if tokens.shape != self._shape or not self._original.is_warm(needs):
            return step.original_pass(lm, wanted, tokens, timings)
        timings = timings or Timings(enabled=False)
        with timings.phase("prefix and teacher (graph)"):
            if self._tokens is None:
                self._tokens = torch.empty_like(tokens)
            static = self._tokens
            static.copy_(tokens, non_blocking=True)
            if needs not in self._original:
                self._members.clear()  # their graphs read the activations of the pass before
                self._original.forget()
                self._original[needs] = self._recorded(lambda: step.original_pass(lm, wanted, static))
            return self._replayed(self._original[needs])

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
    ) -> step.StepResult:
        """`step.training_step`; ``original`` is what `original_pass` gave for these tokens."""

        def eager() -> step.StepResult:
            return step.training_step(
                lm, saes, loss, tokens,
                accumulation_steps=accumulation_steps, timings=timings, original=original, kl_rows=kl_rows,
            )  # fmt: skip

        if original is None or original is not self._original.current:
            return eager()
        relus = [sae for sae in saes.values() if sae.k is None]
        for sae in relus:
            sae.density.refresh()
        sparse = tuple(sae.density.sparse for sae in relus)
        situations = self._members.setdefault(tuple(map(id, saes.values())), _Situations())
        rows = None if kl_rows is None else kl_rows.shape
        situation = (loss, accumulation_steps, sparse, rows)
        if None in sparse or not situations.is_warm(situation):
            return eager()
        with (timings or Timings(enabled=False)).phase("SAE to backward (graph)"):
            if situation not in situations:
                work = _MemberStep(lm, saes, loss, accumulation_steps, original, kl_rows)
                situations[situation] = work, *self._recorded(work)
            work, *recorded = situations[situation]
            if work.kl_rows is not None and kl_rows is not None:
                work.kl_rows.copy_(kl_rows, non_blocking=True)
            outputs: _Outputs = self._replayed(recorded)
            if not _all_fitted(relus, sparse, outputs):
                return eager()  # dense now
            _hand_over(work.parameters, outputs.gradients, last=accumulation_steps == 1)
        return outputs.result

    def _recorded(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recordings += 1
        return self._record(work)

    def _replayed(self, recorded: Any) -> Any:
        replay, outputs = recorded
        replay()
        self.replays += 1
        return outputs


class _Situations(dict[Hashable, Any]):
    """What was recorded, by situation, and how often each situation has run eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self._runs: dict[Hashable, int] = {}

    def __setitem__(self, situation: Hashable, recorded: Any) -> None:
        while len(self) >= KEPT:
            del self[next(iter(self))]
        super().__setitem__(situation, recorded)

    def is_warm(self, situation: Hashable) -> bool:
        """Whether it has run eagerly often enough; if not, counts one more run."""
        if self._runs.get(situation, 0) >= WARM_UP:
            return True
        self._runs[situation] = self._runs.get(situation, 0) + 1
        return False
