"""One set of SAEs in training: its weights, loss, Adam, logs, counters and checkpoints.

A run has one member; a sweep has several, which share the language model, the batches and each batch's original pass.
A member knows nothing of the others: it does in a sweep what it would do alone.

    micro-batch   `step.training_step` → counters → on a full accumulation: clip, Adam → metrics, when a row is due
    report        that row, with an evaluation when one is due, to the logs
    checkpoint    weights, optimizer, random state, counters, position in the data: all that the next step depends on

>>> from e2e_fast.trainer import Trainer                                       # doctest: +SKIP
>>> Trainer("e2e.yaml").members[0].saes                                        # doctest: +SKIP
{'blocks.6.hook_resid_pre': SAE(d_in=768, d_sae=46080)}
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from e2e_fast import checkpoint, files, losses
from e2e_fast.config import EVAL_SEED_OFFSET, Config
from e2e_fast.data import TokenBatches
from e2e_fast.distributed import World
from e2e_fast.evaluation import evaluation_loss
from e2e_fast.formats.layouts import ALIVE
from e2e_fast.lm import LM, Original
from e2e_fast.log import ConsoleLog, JsonlLog, Log, WandbLog, keep_rows
from e2e_fast.losses import LossConfig, LossName
from e2e_fast.measure import Timings
from e2e_fast.metrics import ActFrequency, step_metrics
from e2e_fast.optimizer import Adam
from e2e_fast.sae import load_e2e_sae, to_e2e_sae
from e2e_fast.sae_transformer import SAETransformer
from e2e_fast.schedule import Phase, learning_rate, phases
from e2e_fast.step import StepResult, training_step

COUNTERS = ("samples", "micro_batches", "grad_updates", "total_tokens")


class TrainingStopped(RuntimeError):
    """Training could not go on: the message names the step and the last good checkpoint."""


class Member:
    """SAEs in training. `Trainer` makes them and hands each the batches."""

    def __init__(
        self,
        config: Config,
        lm: LM,
        preset: LossName | None = None,
        init: Mapping[str, Tensor] | None = None,
        world: World | None = None,
    ) -> None:
        """``preset`` replaces the configuration's loss but for its sparsity; ``init`` is `train`'s."""
        self.lm = lm
        self.world = world or World()
        self.accumulation = config.samples_per_step // (config.batch_size * self.world.size)
        """Micro-batches of this process in an optimizer step."""
        torch.manual_seed(config.seed)
        self.model = SAETransformer(
            lm, config.saes.sae_positions, config.saes.dict_size_to_input_ratio, **config.saes.options
        )
        self.saes = self.model.by_position
        if preset is not None:
            config = _with_loss(config, preset, list(self.saes), lm)
        self.config = config
        self.phases = phases(config, list(self.saes), lm.positions())
        frozen = self._load_pretrained()
        if init is not None:
            load_e2e_sae(self.saes, init)
        self.parameters = {
            f"{position}.{name}": parameter
            for position, sae in self.saes.items()
            for name, parameter in sae.named_parameters()
            if position not in frozen
        }
        if not self.parameters:
            raise ValueError(
                "saes.pretrained_sae_paths covers every position and retrain_saes is false: nothing to train"
            )
        for position in frozen:
            self.saes[position].requires_grad_(False).eval()  # BatchTopK keeps its threshold too
        self._by_batch = {p: sae for p, sae in self.saes.items() if sae.activation == "batch_topk" and sae.training}
        self.world.same_weights(self.parameters.values())
        shadows = [shadow for sae in self.saes.values() for shadow in sae.shadows.values()]
        self.optimizer = Adam(self.parameters.values(), config.lr, shadows)
        self.history: list[dict[str, float]] = []
        self.samples = self.micro_batches = self.grad_updates = self.total_tokens = 0
        self.frequency: ActFrequency | None = None
        self.folder: Path | None = None
        self.last_checkpoint: Path | None = None
        self.evaluation_due = False
        """Whether the row that `report` writes next is to hold an evaluation."""
        self._row: dict[str, Any] | None = None
        self._advanced = 0
        self._logs: list[Log] = []

    # ------------------------------------------------------------------ training

    def micro_batch(
        self, tokens: Tensor, original: Original, timings: Timings, step: Callable[..., StepResult] = training_step
    ) -> None:
        """One micro-batch and, when it completes an optimizer step, the update; `report` is to follow.

        ``step`` is `step.training_step` or does the same.
        """
        config = self.config
        result = step(
            self.lm, self.saes, self.loss, tokens,
            accumulation_steps=self.accumulation, timings=timings, original=original, kl_rows=self._kl_rows(tokens),
        )  # fmt: skip
        self.world.average(sae.running_threshold for sae in self._by_batch.values())
        before, first = self.samples, self.micro_batches == 0
        self._advanced = len(tokens) * self.world.size
        self.samples += self._advanced
        self.total_tokens += tokens.numel() * self.world.size
        self.micro_batches += 1
        self._require_finite(result)
        self._count_activations(result, before)
        grad_norm = self._update(timings) if self.updated else None

        due = first or (self.updated and self.grad_updates % config.log_every_n_grad_steps == 0)
        self.evaluation_due = config.eval_every_n_samples is not None and (
            first or crossed(before, self.samples, config.eval_every_n_samples) or self.samples == config.n_samples
        )
        self._row = self._metrics(result, tokens, grad_norm) if due or self.evaluation_due else None

    def report(self, evaluation: Mapping[str, float] | None = None) -> None:
        """Writes the row of the last micro-batch, if one is due, with the metrics of an evaluation."""
        if self._row is not None:
            row: dict[str, Any] = {"samples": self.samples, **self._row, **(evaluation or {})}
            row = self.world.mean({key: float(value) for key, value in row.items()})
            if not math.isfinite(row["loss"]):
                self._stop_not_finite(row["loss"])
            self._write(row)
            self._row = None
        for log in self._logs:
            log.advance(self._advanced)

    @property
    def updated(self) -> bool:
        """Whether the last micro-batch completed an optimizer step."""
        return self.micro_batches % self.accumulation == 0

    def _update(self, timings: Timings) -> Tensor | None:
        """Averages over processes, clips, steps Adam; returns the norm of the gradients before clipping."""
        with timings.phase("optimizer"):
            self.world.average_gradients(self.parameters.values())
            norm = self.optimizer.clip(self.config.max_grad_norm)
            self.optimizer.param_groups[0]["lr"] = self.learning_rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.grad_updates += 1
        return norm

    @property
    def phase(self) -> Phase:
        """The phase of the next optimizer step."""
        return next(phase for phase in reversed(self.phases) if phase.first <= self.grad_updates)

    @property
    def loss(self) -> LossConfig:
        """What the next optimizer step minimises."""
        return self.phase.loss

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step."""
        return learning_rate(self.config, self.phase, self.grad_updates)

    def _kl_rows(self, tokens: Tensor) -> Tensor | None:
        """The tokens of a micro-batch on which the KL is estimated: a draw that depends on seed and sample alone."""
        share = self.config.kl_positions
        if share == 1:
            return None
        n = tokens.numel()
        draw = np.random.default_rng([self.config.seed, self.samples + self.world.rank * len(tokens)])
        rows = draw.choice(n, max(1, round(share * n)), replace=False)
        rows = torch.from_numpy(rows)
        if tokens.device.type == "cuda":
            rows = rows.pin_memory()  # from other memory a copy would be waited for
        return rows.to(tokens.device, non_blocking=True)

    @property
    def evaluation_loss(self) -> LossConfig:
        """What an evaluation measures: the loss, and the terms that only training leaves out."""
        return evaluation_loss(self.loss, self.lm, list(self.saes))

    def finish(self, frequency: ActFrequency | None, facts: Mapping[str, Any]) -> None:
        """The last row, and ``summary.json`` with the trainer's ``facts``.

        ``frequency`` was counted with the final weights, on this process's part of the data.
        """
        row = {"samples": float(self.samples)}
        summary: dict[str, Any] = {"samples": self.samples, "total_tokens": self.total_tokens, **facts}
        if frequency is not None:
            frequency.counts = self.world.sum(frequency.counts)
            row |= frequency.metrics("_final")
            summary |= {f"{ALIVE}{p}": frequency.alive(p).tolist() for p in frequency.counts}
        self._write(row)
        repeated = facts["timed_tokens"] == 0 and self.folder is not None and checkpoint.read_summary(self.folder)
        if self.folder is not None and self.world.writes and not repeated:
            checkpoint.write_summary(self.folder, summary)

    def _require_finite(self, result: StepResult) -> None:
        # On a GPU this would wait for the device, so there only the steps that log look.
        if self.lm.device.type != "cpu" or math.isfinite(float(result.loss)):
            return
        self._stop_not_finite(float(result.loss))

    def _stop_not_finite(self, loss: float) -> None:
        bad = [name for name, parameter in self.parameters.items() if not bool(torch.isfinite(parameter).all())]
        cause = f"weights {bad[0]} are no longer finite" if bad else "the activations or the data gave it"
        kept = (
            f"the last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint
            else "no checkpoint was saved yet"
        )
        raise TrainingStopped(
            f"the loss is {loss} at optimizer step {self.grad_updates} (sample {self.samples}): {cause}; {kept}"
        )

    # ------------------------------------------------------------------ logging and evaluation

    def start(self, *, console: bool, alone: bool) -> None:
        """Opens the logs; the run folder gets its configuration before anything else."""
        config = self.config
        if not self.world.writes:
            return
        if console:
            self._logs.append(ConsoleLog(" → ".join(phase.loss.kind for phase in self.phases)))
        if self.folder is not None:
            if not (self.folder / checkpoint.CONFIG).exists():
                checkpoint.write_config(self.folder, config.model_dump(mode="json"))
            self._logs.append(JsonlLog(self.folder))
        if config.wandb_project is not None:
            log = WandbLog(config.wandb_project, config.run_name, config.model_dump(mode="json"), alone=alone)
            self._logs.append(log)
        for log in self._logs:
            log.start(config.n_samples)

    def close(self) -> None:
        """Closes the logs."""
        for log in self._logs:
            log.close()
        self._logs = []

    def _write(self, row: dict[str, float]) -> None:
        self.history.append(row)
        for log in self._logs:
            log.row(row)

    def _metrics(self, result: StepResult, tokens: Tensor, grad_norm: Tensor | None) -> dict[str, Any]:
        """What a row holds of a micro-batch: numbers, and scalars that are still on their device."""
        metrics: dict[str, Any] = {
            "loss": result.loss / self.accumulation,
            "grad_updates": self.grad_updates,
            "total_tokens": self.total_tokens,
            "lr": self.learning_rate,
            **step_metrics(result, "train", tokens),
        }
        if grad_norm is not None:
            metrics["grad_norm"] = grad_norm
        if self.frequency is not None and self.frequency.full:
            self.frequency.counts = self.world.sum(self.frequency.counts)
            metrics.update(self.frequency.metrics())
            self.frequency = None
        return metrics

    def _count_activations(self, result: StepResult, before: int) -> None:
        every = self.config.collect_act_frequency_every_n_samples
        if every and (before == 0 or crossed(before, self.samples, every)):
            self.frequency = self._new_frequency()
        if self.frequency is not None and not self.frequency.full:
            self.frequency.update(result.acts)

    def _new_frequency(self) -> ActFrequency:
        return ActFrequency(frequency_tokens(self.config, self.world))

    # ------------------------------------------------------------------ checkpoints

    def save(self, data: Mapping[str, int]) -> Path | None:
        """Writes weights, then resume state (``data`` is the position in it); returns the weight file.

        To be called by all processes, of which the first writes; any number of them can resume it. A checkpoint counts
        from the moment that both files are there. Older ones stay: see `prune`.
        """
        if self.folder is None:
            return None
        state = to_e2e_sae(self.saes)
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            self._stop_not_finite(math.nan)
        path = self.last_checkpoint = self.folder / f"samples_{self.samples}.safetensors"
        counts = self.world.sum(self.frequency.counts) if self.frequency is not None else {}
        if not self.world.writes:
            return path
        files.save_tensors(path, state)
        counters = {name: getattr(self, name) for name in COUNTERS}
        extra = {"rng": torch.get_rng_state()}
        extra.update({f"threshold_batches.{p}": sae.threshold_batches for p, sae in self._by_batch.items()})
        if self.frequency is not None:
            counters["frequency_tokens"] = self.frequency.tokens * self.world.size
            extra.update({f"frequency.{p}": c for p, c in counts.items()})
        rows = self.folder / JsonlLog.NAME
        checkpoint.save_resume(
            self.folder, self.samples, self.optimizer, list(self.parameters), extra,
            {
                "counters": counters,
                "data": dict(data),
                "density": {at: (sae.density.sparse, sae.density.capacity) for at, sae in self.saes.items()},
                "metrics_bytes": rows.stat().st_size if rows.exists() else 0,
            },
        )  # fmt: skip
        return path

    def prune(self) -> None:
        """Removes old checkpoints: resume files but for the last two, weights as ``keep_checkpoints`` says."""
        if self.folder is None or not self.world.writes:
            return
        keep = self.config.keep_checkpoints
        checkpoint.keep_last(self.folder, "resume", 2 if keep is None else min(keep, 2))
        if keep is not None:
            checkpoint.keep_last(self.folder, "samples", keep)

    def load(self, folder: Path, samples: int) -> dict[str, int]:
        """Goes on from a checkpoint of ``folder``; returns the position in the data."""
        self.folder = folder
        if self.world.writes:
            checkpoint.remove_after(folder, samples)
        weights = folder / f"samples_{samples}.safetensors"
        load_e2e_sae(self.saes, files.load_tensors(weights))
        extra, state = checkpoint.load_resume(
            folder / f"resume_{samples}.safetensors", self.optimizer, list(self.parameters)
        )
        counters = dict(state["counters"])
        if (tokens := counters.pop("frequency_tokens", None)) is not None:
            self.frequency = self._new_frequency()
            self.frequency.tokens = tokens // self.world.size
            # The counts so far are those of all processes: the first goes on from them, the others from zero.
            self.frequency.counts = {
                key.removeprefix("frequency."): (value if self.world.writes else value * 0).to(self.lm.device)
                for key, value in extra.items()
                if key.startswith("frequency.")
            }
        for name, value in counters.items():
            setattr(self, name, value)
        self.micro_batches = self.grad_updates * self.accumulation
        for position, (sparse, capacity) in state["density"].items():
            self.saes[position].density.sparse, self.saes[position].density.capacity = sparse, capacity
        for position, sae in self._by_batch.items():
            sae.threshold_batches.copy_(extra[f"threshold_batches.{position}"])
        torch.set_rng_state(extra["rng"])
        if self.world.writes:
            self.history = keep_rows(folder / JsonlLog.NAME, state["metrics_bytes"])
        self.history = self.world.share(self.history)
        self.last_checkpoint = weights
        return state["data"]

    def start_over(self, folder: Path) -> None:
        """Takes a run folder whose run ended before its first checkpoint."""
        self.folder = folder
        if self.world.writes:
            checkpoint.remove_after(folder, 0)
            keep_rows(folder / JsonlLog.NAME, 0)

    # ------------------------------------------------------------------ setting up

    def _load_pretrained(self) -> set[str]:
        """Loads ``pretrained_sae_paths``; returns the positions that stay frozen."""
        covered: set[str] = set()
        for path in self.config.saes.pretrained_sae_paths or ():
            covered.update(load_e2e_sae(self.saes, files.load_tensors(path), strict=False))
        return set() if self.config.saes.retrain_saes else covered


def _with_loss(config: Config, kind: LossName, at: list[str], lm: LM) -> Config:
    if config.schedule is not None:
        raise ValueError(f"a trainer of one kind of loss ({kind}) needs schedule to be None, got one")
    return config.replace(loss=losses.named(kind, config.loss, at, lm.positions()).model_dump())


def open_batches(
    config: Config,
    lm: LM,
    split: Literal["train", "eval"],
    tokens: np.ndarray | None = None,
    world: World | None = None,
) -> TokenBatches:
    """The configuration's token batches of a split, or those of an array in their place: a process's part of them."""
    world = world or World()
    data = config.train_data if split == "train" else config.eval_data
    if data is None:
        raise ValueError("evaluation needs eval_data, got None")
    seed = config.seed if split == "train" else config.seed + EVAL_SEED_OFFSET
    n_ctx = data.n_ctx if tokens is None else tokens.shape[1]
    if n_ctx > lm.n_ctx:
        raise ValueError(f"{split}_data.n_ctx must be at most the model's context length {lm.n_ctx}, got {n_ctx}")
    return TokenBatches(
        data,
        config.batch_size,
        seed=seed if data.seed is None else data.seed,
        tokens=tokens,
        # Without n_samples a run ends with its data; an evaluation always does.
        repeat=split == "train" and tokens is None and config.n_samples is not None,
        vocab_size=lm.d_vocab,
        rank=world.rank,
        world_size=world.size,
        pin_memory=lm.device.type == "cuda",
    )


def frequency_tokens(config: Config, world: World) -> int:
    """This process's part of a window in which activations are counted, tokens."""
    return math.ceil(config.act_frequency_n_tokens / world.size)


def first_samples(batches: TokenBatches, n: int | None) -> Iterator[Tensor]:
    """Batches with ``n`` sequences in all (None: all of them)."""
    left = math.inf if n is None else n
    for tokens in batches:
        if left <= 0:
            return
        yield tokens[: int(min(left, len(tokens)))]
        left -= len(tokens)
        if left <= 0:
            return


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]."""
    return after // every > before // every
