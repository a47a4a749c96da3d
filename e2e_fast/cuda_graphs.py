"""CUDA graphs of the micro-step: recorded once, then replayed on new tokens by one launch each.

    tokens    → static buffer → graph of the original pass → activations that stay at their addresses
    a member:   graph of SAE, suffix, losses and backward  → its result and gradients, which stay at theirs
    outside     gradients to ``.grad``; average, clip, Adam, logs: as without graphs

`StepGraphs` are `step.Steps` that give the same numbers. Every member has
graphs of its own, so that a change in one (dense to sparse) leaves the others' in place.

* A new situation (loss, size, dense or sparse, …) runs eagerly `WARM_UP` times, as part of the training, before it is
  recorded. Batches of another shape than the first, such as a smaller last one, always run eagerly.
* What changes from step to step comes in through static buffers: the tokens, and the rows on which the KL is estimated.
* A graph reads the optimizer's rounded weights and norms (`optimizer.Shadow`) where they were current when it was
  recorded; while they are not (before the first update, after a change by hand) the situation is another one.
* ReLU codes run dense, or sparse with so many slots (`e2e_fast.kernels.density`), each with its own graph. After a
  sparse one the fullest row is read, the step's only wait for the GPU; where it did not fit, the step's gradients are
  dropped and it runs again, with more room or dense.
* A gradient is added to ``.grad`` after its replay, or is it where an optimizer step has one micro-batch.
* What a replay gave is overwritten by the next: logs read it before.

Recording is a function ``record(work) -> (replay, outputs)``, a `CudaRecorder` unless another is given: ``work`` is run
once to be recorded, and its outputs hold valid numbers after each ``replay()``.

>>> from e2e_fast import Trainer                                               # doctest: +SKIP
>>> trainer = Trainer("e2e.yaml")             # with cuda_graphs: true         # doctest: +SKIP
>>> trainer.fit(); trainer.graphs.recordings, trainer.graphs.replays           # doctest: +SKIP
(2, 1994)
"""

import gc
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from e2e_fast import kernels, step
from e2e_fast.losses import LossConfig
from e2e_fast.measure import Timings
from e2e_fast.precision import as_given
from e2e_fast.sae import SAE, SAEActs

if TYPE_CHECKING:
    from e2e_fast.lm import LM, Original

WARM_UP = 3
"""Eager runs of a situation before it is recorded: they compile kernels, fill caches and make the attention masks."""

KEPT = 4
"""Recorded situations that a member keeps; before a fifth all graphs go."""

Recorded = tuple[Callable[[], None], Any]
Record = Callable[[Callable[[], Any]], Recorded]


class StepGraphs(step.Steps):
    """Steps of the members of one run, by graphs; ``original`` is what `original_pass` gave for these tokens.

    Raises ValueError for SAEs that read back from the GPU in every step (BatchTopK).
    """

    recordings: int
    """Graphs recorded so far."""
    replays: int
    """Graphs replayed so far."""

    def __init__(self, members: Iterable[Mapping[str, SAE]], record: Record | None = None) -> None:
        for position, sae in (item for saes in members for item in saes.items()):
            if sae.activation == "batch_topk":
                raise ValueError(
                    f"cuda_graphs cannot record activation batch_topk (at {position}), which reads the fullest row of "
                    "each step back from the GPU: use topk, relu or jump_relu"
                )
        self.recordings = self.replays = 0
        self._record = record or CudaRecorder()
        self._tokens: Tensor | None = None
        self._recorded_original: Original | None = None
        """What the last batch's original pass gave, where that was a graph."""
        self._originals = _Situations()
        self._members: dict[tuple[int, ...], _Situations] = {}

    def _original(
        self, lm: "LM", wanted: "list[tuple[Mapping[str, Any], LossConfig]]", tokens: Tensor, timings: Timings
    ) -> "Original":
        if self._tokens is None:
            self._tokens = torch.empty_like(tokens)
        static, self._recorded_original = self._tokens, None
        situation = tuple((tuple(saes), loss.downstream, loss.is_local) for saes, loss in wanted)
        if tokens.shape != static.shape or not self._originals.is_warm(situation):
            return super()._original(lm, wanted, tokens, timings)
        with timings.phase("prefix and teacher (graph)"):
            static.copy_(tokens, non_blocking=True)
            if situation not in self._originals:
                self._forget()  # the members' graphs read what the last recorded pass gave
                self._originals[situation] = self._new(lambda: step.original_pass(lm, wanted, static))
            original = self._recorded_original = self._replay(self._originals[situation])
            return original

    def _step(self, work: step.Work) -> step.StepResult:
        deciding = [sae for sae in work.saes.values() if sae.k is None]
        for sae in deciding:
            sae.density.refresh()
        rooms = tuple(_room(sae) for sae in deciding)
        shadowed = tuple(s.holds(s.parameter) for sae in work.saes.values() for s in sae.shadows.values())
        shape = None if work.kl_rows is None else work.kl_rows.shape
        situation = (work.loss, work.accumulation_steps, rooms, shadowed, shape)
        situations = self._members.setdefault(tuple(map(id, work.saes.values())), _Situations())
        is_warm = situations.is_warm(situation)
        if not is_warm or None in rooms or work.original is None or work.original is not self._recorded_original:
            return super()._step(work)
        if situation not in situations and len(situations) >= KEPT:
            self._forget()
            return super()._step(work)
        with work.timings.phase("SAE to backward (graph)"):
            if situation not in situations:
                member = _MemberStep(work, work.original)
                situations[situation] = member, self._new(member)
            member, recorded = situations[situation]
            if member.kl_rows is not None and work.kl_rows is not None:
                member.kl_rows.copy_(work.kl_rows, non_blocking=True)
            outputs: _Outputs = self._replay(recorded)
            fitted = _observe(deciding, rooms, outputs.fullest)
            if fitted:
                _hand_over(member.parameters, outputs.gradients, alone=work.accumulation_steps == 1)
        return outputs.result if fitted else super()._step(work)  # whoever did not fit has more room now, or is dense

    def _forget(self) -> None:
        """Drops all graphs together: in some torch 2.x destroying one takes cuBLAS's workspace from the others.

        (pytorch/pytorch#193402: a workspace belongs to a stream, and all graphs here are recorded on one.)
        """
        self._recorded_original = None
        for recorded in (self._originals, *self._members.values()):
            recorded.clear()

    def _new(self, work: Callable[[], Any]) -> Recorded:
        self.recordings += 1
        return self._record(work)

    def _replay(self, recorded: Recorded) -> Any:
        replay, outputs = recorded
        replay()
        self.replays += 1
        return outputs


class CudaRecorder:
    """Records CUDA graphs which share one memory pool: they run one after the other, in the order of the step."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], Any]) -> Recorded:
        with torch.cuda.device(self._device):  # on a stream of another one nothing would be recorded, without a word
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            gc.collect()  # autograd graphs of earlier steps must not meet this one's on another stream
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # A pool that no graph uses any more must not be named again: torch's allocator stops at it.
            pool = next((other.pool() for other in self._graphs), None)
            # thread_local: the data thread may pin memory meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = work()
        self._graphs.add(graph)
        return graph.replay, outputs


class _Situations(dict[Hashable, Any]):
    """What was recorded, by situation, and how often each has run eagerly (also when its recording is dropped)."""

    def __init__(self) -> None:
        super().__init__()
        self._runs: dict[Hashable, int] = {}

    def is_warm(self, situation: Hashable) -> bool:
        """Whether it has run eagerly often enough; if not, counts one more run."""
        runs = self._runs.get(situation, 0)
        self._runs[situation] = min(runs + 1, WARM_UP)
        return runs >= WARM_UP


class _Outputs(NamedTuple):
    result: step.StepResult
    gradients: tuple[Tensor | None, ...]
    """Of the member's parameters."""
    fullest: Tensor | None
    """(n,) slots that the fullest row of each SAE needs which runs dense or sparse; None where there is none."""


class _MemberStep:
    """What a member's graph records: as `step.training_step`, but gradients are returned, and nothing is decided."""

    def __init__(self, work: step.Work, original: "Original") -> None:
        self.parameters = [p for sae in work.saes.values() for p in sae.parameters() if p.requires_grad]
        self.kl_rows = None if work.kl_rows is None else work.kl_rows.clone()
        saes = {position: _decided(sae) for position, sae in work.saes.items()}
        self._arguments = work.lm, saes, work.loss, original
        self._deciding = [position for position, sae in work.saes.items() if sae.k is None]
        self._accumulation_steps = work.accumulation_steps

    def __call__(self) -> _Outputs:
        lm, saes, loss, original = self._arguments
        result = step.forward_step(lm, saes, loss, original.tokens, None, original, self.kl_rows)
        with as_given(lm.device):
            scaled = result.loss / self._accumulation_steps
            gradients = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        needed = [result.acts[position].code.needed().max() for position in self._deciding]
        return _Outputs(step.without_graph(result), gradients, torch.stack(needed) if needed else None)


def _decided(sae: SAE) -> Callable[[Tensor], SAEActs]:
    """The SAE as it runs now, dense or with room for so many features, without asking how many there are."""
    if sae.k is not None:
        return sae
    if room := _room(sae):
        return lambda x: sae(x, capacity=room)

    def dense(x: Tensor) -> SAEActs:
        density, sae.density = sae.density, _AlwaysDense(sae.density.limit)
        try:
            return sae(x)
        finally:
            sae.density = density

    return dense


def _room(sae: SAE) -> int | None:
    """Slots of the SAE's next step; 0 where it runs dense, None while nothing is known."""
    return sae.density.capacity if sae.density.sparse else None if sae.density.sparse is None else 0


class _AlwaysDense(kernels.DensityController):
    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.sparse = False

    def observe(self, count: Tensor) -> None:
        """Leaves the count where it is: it is read after the replay."""


def _observe(deciding: Sequence[SAE], rooms: Sequence[int | None], fullest: Tensor | None) -> bool:
    """Tells the SAEs how full their fullest rows were; returns whether those that ran sparse had room for them."""
    if fullest is None:
        return True
    if not any(rooms):
        for sae, count in zip(deciding, fullest.split(1), strict=True):
            sae.density.observe(count)  # waits for nothing
        return True
    counts = fullest.cpu()
    for sae, count in zip(deciding, counts.split(1), strict=True):
        sae.density.observe(count)
    return all(not room or int(count) <= room for room, count in zip(rooms, counts, strict=True))


def _hand_over(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], *, alone: bool) -> None:
    """Adds gradients to ``.grad``. ``alone``: no further micro-batch follows, so the static tensor itself may serve."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient if alone else gradient.clone()
        else:
            parameter.grad += gradient
