"""The training loop: batches → `step.training_step` → clip → Adam, with schedule, logs, evaluation and checkpoints.

With default settings a run gives e2e_sae's numbers: initialisation, losses, learning rate, Adam, clipping and the
steps at which things are logged. Counts are in sequences ("samples"); an optimizer step takes ``effective_batch_size`` of them.

>>> import e2e_fast                                                            # doctest: +SKIP
>>> run = e2e_fast.train("e2e.yaml")                                           # doctest: +SKIP
>>> run.history[-1]["loss/train/logits_kl"], run.folder                        # doctest: +SKIP
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from e2e_fast import checkpoint, losses
from e2e_fast.config import Config, load_config
from e2e_fast.data import TokenBatches
from e2e_fast.evaluation import evaluate, evaluate_saes, evaluation_loss
from e2e_fast.lm import load_lm
from e2e_fast.log import ConsoleLog, JsonlLog, Log, WandbLog
from e2e_fast.losses import LossConfig
from e2e_fast.measure import Timings
from e2e_fast.metrics import ActFrequency, step_metrics
from e2e_fast.sae import SAETransformer, load_e2e_sae, to_e2e_sae
from e2e_fast.step import StepResult, forward_step, training_step

EVAL_SEED_OFFSET = 42
"""e2e_sae evaluates on data shuffled with the training seed plus this, unless ``eval_data.seed`` is set."""


class TrainingStopped(RuntimeError):
    """Training could not go on: the message names the step and the last good checkpoint."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    model: SAETransformer
    history: list[dict[str, float]]
    """One dict a logged step, under e2e_sae's key names, plus ``samples``."""
    folder: Path | None
    """Where it was saved; None with ``save_dir: null``."""


def train(
    config: "str | Path | Mapping[str, Any] | Config",
    lm: Any = None,
    tokens: "Tensor | np.ndarray | None" = None,
    init: Mapping[str, Tensor] | None = None,
    *,
    resume: str | Path | None = None,
    quiet: bool = False,
) -> Run:
    """Trains SAEs as ``config`` says: a YAML file, a mapping or a Config.

    ``lm`` (anything `load_lm` takes), ``tokens`` [samples, T] (taken in order, no tokenizer needed) and ``init``
    (weights under e2e_sae's keys) replace what the configuration names. ``resume`` is a run folder to go on with.

    Raises ConfigError, ValueError and FileNotFoundError before anything is trained; TrainingStopped when the loss is
    not finite; CheckpointError when a checkpoint cannot be written.
    """
    return Trainer(config, lm, tokens, init, resume=resume, quiet=quiet).fit()


class Trainer:
    """A run that can be stepped through: ``Trainer(config).fit()`` is `train`."""

    preset: ClassVar[Literal["local", "e2e", "e2e+downstream"] | None] = None
    """Which family of losses replaces the configuration's (its sparsity term stays); None leaves it."""

    def __init__(
        self,
        config: "str | Path | Mapping[str, Any] | Config",
        lm: Any = None,
        tokens: "Tensor | np.ndarray | None" = None,
        init: Mapping[str, Tensor] | None = None,
        *,
        resume: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        self.config = config = load_config(config)
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.lm = load_lm(config.model if lm is None else lm, processing=config.lm_processing, device=device)
        torch.manual_seed(config.seed)
        self.model = SAETransformer(
            self.lm, config.saes.sae_positions, config.saes.dict_size_to_input_ratio, k=config.saes.k
        )
        self.saes = self.model.by_position
        self.loss = losses.with_full_names(self._preset_loss(config.loss), self.lm.positions())
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
            self.saes[position].requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.lr, fused=True)
        self.timings = Timings(device, enabled=torch.device(device).type == "cpu")
        """Seconds by phase of the training steps; on a GPU set ``timings.enabled`` (each phase then synchronises)."""
        self.batches = self._batches("train", tokens)
        self.history: list[dict[str, float]] = []
        self.samples = self.micro_batches = self.grad_updates = self.total_tokens = 0
        self.frequency: ActFrequency | None = None
        self.folder: Path | None = None
        self._last_checkpoint: Path | None = None
        self._tokens = tokens
        self._quiet = quiet
        self._logs: list[Log] = []
        if resume is not None:
            self._resume(Path(resume))
        elif config.save_dir is not None:
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
            self.folder = _fresh_folder(config.save_dir / f"{config.run_name}_{stamp}")

    # ------------------------------------------------------------------ the loop

    def fit(self) -> Run:
        """Trains to the end and returns the run."""
        self._start_logs()
        try:
            for tokens in self._training_batches():
                self._micro_batch(tokens)
                for log in self._logs:
                    log.advance(len(tokens))
            self._finish()
        finally:
            self.batches.close()
            for log in self._logs:
                log.close()
        return Run(self.model, self.history, self.folder)

    def _micro_batch(self, tokens: Tensor) -> None:
        """One micro-batch and, when it completes an optimizer step, the update; then whatever is due at this point."""
        config = self.config
        accumulation = config.n_gradient_accumulation_steps
        result = training_step(
            self.lm, self.saes, self.loss, tokens, accumulation_steps=accumulation, timings=self.timings
        )
        before, first = self.samples, self.micro_batches == 0
        self.samples += len(tokens)
        self.total_tokens += tokens.numel()
        self.micro_batches += 1
        self._require_finite(result)
        self._count_activations(result, before)
        updated = self.micro_batches % accumulation == 0
        grad_norm = self._update() if updated else None

        due = first or (updated and self.grad_updates % config.log_every_n_grad_steps == 0)
        evaluate = config.eval_every_n_samples is not None and (
            first or _crossed(before, self.samples, config.eval_every_n_samples) or self._is_last
        )
        if due or evaluate:
            self._log(result, tokens, grad_norm, evaluate)
        if updated and self._save_due(before):
            self.save()

    def _update(self) -> Tensor | None:
        """Clips, steps Adam, moves the learning rate on; returns the norm of the gradients before clipping."""
        norm = None
        with self.timings.phase("optimizer"):
            if self.config.max_grad_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
            self.optimizer.param_groups[0]["lr"] = self.config.lr * lr_factor(self.config, self.grad_updates)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.grad_updates += 1
        return norm

    def _training_batches(self) -> Iterator[Tensor]:
        total = self.config.n_samples
        if total is not None and self.samples >= total:
            return
        batches = iter(self.batches)
        while True:
            with self.timings.phase("data"):
                tokens = next(batches, None)
            if tokens is None:
                break
            if total is not None:
                tokens = tokens[: total - self.samples]
            yield tokens.to(self.lm.device, non_blocking=True)
            if total is not None and self.samples >= total:
                return
        if self.samples == 0:
            raise ValueError("train_data gave no batch: fewer sequences than batch_size")

    @property
    def _is_last(self) -> bool:
        return self.config.n_samples is not None and self.samples >= self.config.n_samples

    def _finish(self) -> None:
        metrics = self._final_frequency()
        self.history.append({"samples": float(self.samples), **metrics})
        for log in self._logs:
            log.row(self.history[-1])
        if self.folder is not None and not (self.folder / f"samples_{self.samples}.safetensors").exists():
            self.save()

    def _require_finite(self, result: StepResult) -> None:
        # On a GPU this would wait for the device, so there only the steps that log look.
        if self.lm.device.type != "cpu" or math.isfinite(float(result.loss)):
            return
        self._stop_not_finite(float(result.loss))

    def _stop_not_finite(self, loss: float) -> None:
        bad = [name for name, parameter in self.parameters.items() if not bool(torch.isfinite(parameter).all())]
        cause = f"weights {bad[0]} are no longer finite" if bad else "the activations or the data gave it"
        kept = (
            f"the last good checkpoint is {self._last_checkpoint}"
            if self._last_checkpoint
            else "no checkpoint was saved yet"
        )
        raise TrainingStopped(
            f"the loss is {loss} at optimizer step {self.grad_updates} (sample {self.samples}): {cause}; {kept}"
        )

    # ------------------------------------------------------------------ logging

    def _start_logs(self) -> None:
        config = self.config
        if not self._quiet:
            self._logs.append(ConsoleLog(self.loss.kind))
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._logs.append(JsonlLog(self.folder))
        if config.wandb_project is not None:
            self._logs.append(WandbLog(config.wandb_project, config.run_name, config.model_dump(mode="json")))
        for log in self._logs:
            log.start(config.n_samples)

    def _log(self, result: StepResult, tokens: Tensor, grad_norm: Tensor | None, evaluate: bool) -> None:
        metrics: dict[str, Any] = {
            "loss": result.loss / self.config.n_gradient_accumulation_steps,
            "grad_updates": self.grad_updates,
            "total_tokens": self.total_tokens,
            "lr": self.config.lr * lr_factor(self.config, self.grad_updates),
            **step_metrics(result, "train", tokens),
        }
        if grad_norm is not None:
            metrics["grad_norm"] = grad_norm
        if self.frequency is not None and self.frequency.full:
            metrics.update(self.frequency.metrics())
            self.frequency = None
        if evaluate:
            metrics.update(self.evaluate())
        row = {"samples": float(self.samples)} | {key: float(value) for key, value in metrics.items()}
        if not math.isfinite(row["loss"]):
            self._stop_not_finite(row["loss"])
        self.history.append(row)
        for log in self._logs:
            log.row(row)

    def _count_activations(self, result: StepResult, before: int) -> None:
        every = self.config.collect_act_frequency_every_n_samples
        if every and (before == 0 or _crossed(before, self.samples, every)):
            self.frequency = ActFrequency(self.config.act_frequency_n_tokens)
        if self.frequency is not None and not self.frequency.full:
            self.frequency.update(result.acts)

    @torch.no_grad()
    def _final_frequency(self) -> dict[str, float]:
        """Alive features counted with the final weights, on training data from the start."""
        if not self.config.collect_act_frequency_every_n_samples:
            return {}
        frequency = ActFrequency(self.config.act_frequency_n_tokens)
        # With one SAE what it sees does not depend on the SAE, so the suffix need not run.
        loss = losses.local(0.0) if len(self.saes) == 1 else self.loss
        batches = self._batches("train", self._tokens)
        try:
            for tokens in batches:
                frequency.update(forward_step(self.lm, self.saes, loss, tokens.to(self.lm.device)).acts)
                if frequency.full:
                    break
        finally:
            batches.close()
        return frequency.metrics("_final")

    def evaluate(self) -> dict[str, float]:
        """`e2e_fast.evaluate` of the current weights on ``eval_data``."""
        loss = evaluation_loss(self.loss, self.lm, list(self.saes))
        batches = self._batches("eval", None)
        try:
            return evaluate_saes(self.lm, self.saes, loss, _first_samples(batches, self.config.eval_n_samples))
        finally:
            batches.close()

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> Path | None:
        """Writes configuration, weights and resume state; returns the weight file. Older files stay until then."""
        if self.folder is None:
            return None
        state = to_e2e_sae(self.saes)
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            self._stop_not_finite(math.nan)
        if not (self.folder / "final_config.yaml").exists():
            checkpoint.write_config(self.folder, self.config.model_dump(mode="json"))
        path = checkpoint.save_tensors(self.folder / f"samples_{self.samples}.safetensors", state)
        counters = {name: getattr(self, name) for name in ("samples", "micro_batches", "grad_updates", "total_tokens")}
        extra = {"rng": torch.get_rng_state()}
        if self.frequency is not None:
            counters["frequency_tokens"] = self.frequency.tokens
            extra.update({f"frequency.{p}": c for p, c in self.frequency.counts.items()})
        checkpoint.save_resume(
            self.folder, self.samples, self.optimizer, list(self.parameters), extra,
            {
                "counters": counters,
                "data": self.batches.state_dict(),
                "density": {position: sae.density.sparse for position, sae in self.saes.items()},
            },
        )  # fmt: skip
        checkpoint.keep_last(self.folder, "resume", 2)
        self._last_checkpoint = path
        return path

    def _save_due(self, before: int) -> bool:
        every = self.config.save_every_n_samples
        # A step may take several micro-batches: look back over all of them.
        start = self.samples - (self.config.effective_batch_size or self.config.batch_size)
        return every is not None and _crossed(min(before, start), self.samples, every)

    def _resume(self, folder: Path) -> None:
        samples = checkpoint.resumable(folder) if folder.is_dir() else None
        if samples is None:
            raise FileNotFoundError(f"{folder} holds no checkpoint to resume from (samples_N and resume_N of equal N)")
        self.folder = folder
        load_e2e_sae(self.saes, checkpoint.load_tensors(folder / f"samples_{samples}.safetensors"))
        path = folder / f"resume_{samples}.safetensors"
        extra, state = checkpoint.load_resume(path, self.optimizer, list(self.parameters))
        counters = dict(state["counters"])
        if (tokens := counters.pop("frequency_tokens", None)) is not None:
            self.frequency = ActFrequency(self.config.act_frequency_n_tokens)
            self.frequency.tokens = tokens
            self.frequency.counts = {
                key.removeprefix("frequency."): value.to(self.lm.device)
                for key, value in extra.items()
                if key.startswith("frequency.")
            }
        for name, value in counters.items():
            setattr(self, name, value)
        self.batches.load_state_dict(state["data"])
        for position, sparse in state["density"].items():
            self.saes[position].density.sparse = sparse
        torch.set_rng_state(extra["rng"])
        self._last_checkpoint = folder / f"samples_{samples}.safetensors"

    # ------------------------------------------------------------------ setting up

    def _preset_loss(self, loss: LossConfig) -> LossConfig:
        sparsity = (loss.sparsity.coeff, loss.sparsity.p_norm)
        if self.preset == "local":
            return losses.local(*sparsity)
        if self.preset == "e2e":
            return losses.e2e(*sparsity)
        if self.preset == "e2e+downstream":
            first = self.lm.positions().index(next(iter(self.saes)))
            later = [p for p in self.lm.positions()[first + 1 :] if p.endswith("hook_resid_pre")]
            if not later:
                raise ValueError("e2e+downstream needs a residual stream behind the SAE; there is none in this model")
            positions = loss.downstream or tuple(later)
            return losses.e2e_downstream(sparsity[0], positions, sparsity[1])
        return loss

    def _load_pretrained(self) -> set[str]:
        """Loads ``pretrained_sae_paths``; returns the positions that stay frozen."""
        covered: set[str] = set()
        for path in self.config.saes.pretrained_sae_paths or ():
            covered.update(load_e2e_sae(self.saes, checkpoint.load_tensors(path), strict=False))
        return set() if self.config.saes.retrain_saes else covered

    def _batches(self, split: Literal["train", "eval"], tokens: "Tensor | np.ndarray | None") -> TokenBatches:
        config = self.config
        data = config.train_data if split == "train" else config.eval_data
        if data is None:
            raise ValueError("evaluation needs eval_data, got None")
        seed = config.seed if split == "train" else config.seed + EVAL_SEED_OFFSET
        n_ctx = tokens.shape[1] if tokens is not None and tokens.ndim == 2 else data.n_ctx
        if n_ctx > self.lm.n_ctx:
            raise ValueError(
                f"{split}_data.n_ctx must be at most the model's context length {self.lm.n_ctx}, got {n_ctx}"
            )
        return TokenBatches(
            data,
            config.batch_size,
            seed=seed if data.seed is None else data.seed,
            tokens=tokens,
            # Without n_samples a run ends with its data; an evaluation always does.
            repeat=split == "train" and tokens is None and config.n_samples is not None,
            tokenizer=None if tokens is not None else self.lm.tokenizer,
            vocab_size=self.lm.d_vocab,
        )


def evaluate_run(config: Config, state: Mapping[str, Tensor], samples: int | None) -> dict[str, float]:
    """`evaluate` of saved weights on the configuration's eval_data (without one, on its train_data)."""
    model = SAETransformer.from_weights(config.model_dump(mode="json"), state)
    data = config.eval_data or config.train_data
    seed = config.seed + EVAL_SEED_OFFSET if data.seed is None else data.seed
    batches = TokenBatches(
        data, config.batch_size, seed=seed, tokenizer=model.lm.tokenizer, vocab_size=model.lm.d_vocab, repeat=False
    )
    try:
        return evaluate(model, _first_samples(batches, samples), loss=config.loss)
    finally:
        batches.close()


class LocalTrainer(Trainer):
    """Trains with reconstruction and sparsity, whatever else the configuration's loss holds."""

    preset = "local"


class E2ETrainer(Trainer):
    """Trains with KL of the output and sparsity."""

    preset = "e2e"


class E2EDownstreamTrainer(Trainer):
    """Trains with KL, the MSE of later residual streams (the configured ones, or all) and sparsity."""

    preset = "e2e+downstream"


def lr_factor(config: Config, step: int) -> float:
    """Share of ``lr`` that optimizer step ``step`` (from 0) uses.

    cosine: step / warmup, then from 1 to ``min_lr_factor`` along half a cosine; the first update has rate 0.
    linear: (step + 1) / warmup, then 1, then a line down over the cooldown, never below ``min_lr_factor``.
    """
    per_step = config.effective_batch_size or config.batch_size
    warmup, cooldown = config.warmup_samples // per_step, config.cooldown_samples // per_step
    total = config.n_samples // per_step if config.n_samples else None
    floor = config.min_lr_factor
    if config.lr_schedule == "cosine":
        assert total is not None  # Config requires n_samples for this schedule
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return max(floor, floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if step < warmup:
        return (step + 1) / warmup
    if total is not None and cooldown and step >= total - cooldown:
        return max(floor, 1 - (step - (total - cooldown)) / cooldown)
    return 1.0


def _crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]."""
    return after // every > before // every


def _first_samples(batches: TokenBatches, n: int | None) -> Iterator[Tensor]:
    """Batches with ``n`` sequences in all (None: all of them)."""
    left = math.inf if n is None else n
    for tokens in batches:
        if left <= 0:
            return
        yield tokens[: int(min(left, len(tokens)))]
        left -= len(tokens)
        if left <= 0:
            return


def _fresh_folder(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3`` … when it is taken: two runs may start in the same second."""
    candidate, n = path, 2
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}-{n}"), n + 1
    return candidate
