"""The training loop: it owns the language model and the data, and gives each batch to its members.

    tokens → original pass (once) → each member: `step.training_step` → clip → Adam → logs      `member.Member`

With default settings a run gives e2e_sae's numbers: initialisation, losses, learning rate, Adam, clipping and the
steps at which things are logged. Counts are in sequences ("samples"), ``effective_batch_size`` an optimizer step.

>>> import e2e_fast                                                            # doctest: +SKIP
>>> run = e2e_fast.train("e2e.yaml")                                           # doctest: +SKIP
>>> run.history[-1]["loss/train/logits_kl"], run.folder                        # doctest: +SKIP
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from e2e_fast import __version__, checkpoint
from e2e_fast.config import EVAL_SEED_OFFSET, Config, load_config, require_same_run
from e2e_fast.cuda_graphs import CudaRecorder, StepGraphs
from e2e_fast.data import TokenBatches
from e2e_fast.distributed import World, join
from e2e_fast.evaluation import count_together, evaluate, evaluate_together
from e2e_fast.lm import load_lm
from e2e_fast.losses import LossConfig, LossName
from e2e_fast.measure import Timings
from e2e_fast.member import Member, TrainingStopped, crossed, first_samples, frequency_tokens, open_batches
from e2e_fast.metrics import ActFrequency
from e2e_fast.precision import Precision, arithmetic, resolve
from e2e_fast.sae import SAE
from e2e_fast.sae_transformer import SAETransformer
from e2e_fast.sources import token_array
from e2e_fast.step import SharedLogits, Steps


class TrainingTerminated(TrainingStopped):
    """SIGTERM came: the run was saved after the optimizer step under way, and can be resumed."""


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
) -> Run | Any:
    """Trains SAEs as ``config`` says: a YAML file, a mapping or a Config.

    ``lm`` (anything `load_lm` takes), ``tokens`` [samples, T] (taken in order, no tokenizer needed) and ``init``
    (weights under e2e_sae's keys) replace what the configuration names. ``resume`` is a run folder to go on with: from
    its last complete checkpoint, or from the start where the run ended before its first, and with the settings that it
    began with (`config.RESUMABLE_WITH` may change). Returns a Run; for a configuration with a ``sweep`` a list of them,
    in the order of its combinations.

    Raises ConfigError, ValueError and FileNotFoundError before anything is trained; TrainingStopped when the loss is
    not finite; CheckpointError when a checkpoint cannot be written; TrainingTerminated after SIGTERM.
    """
    return Trainer(config, lm, tokens, init, resume=resume, quiet=quiet).fit()


class Trainer:
    """A run that can be looked into: ``Trainer(config).fit()`` is `train`."""

    preset: ClassVar[LossName | None] = None
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
        self.world = join()
        self.config = config = _for_world(load_config(config), self.world)
        device = self.world.device(config.device)
        tokens = None if tokens is None else token_array(tokens)
        self.precision: Precision = resolve(config.precision, device)
        self.lm = load_lm(
            _existing(config) if lm is None else lm,
            processing=config.lm_processing,
            device=device,
            compile=config.compile,
        )
        self._names = list(config.members)
        self.members = [Member(member, self.lm, self.preset, init, self.world) for member in config.members.values()]
        """The sets of SAEs in training: one, or those of a sweep."""
        self.graphs = self._step_graphs(device)
        """With ``cuda_graphs``, what runs the micro-steps, with counts of its recordings and replays."""
        sweep = config.sweep
        shares = sweep is not None and sweep.share_logits and len(self.members) > 1 and config.kl_positions == 1
        self._shared = SharedLogits() if shares else Steps()
        self.timings = Timings(device, enabled=torch.device(device).type == "cpu")
        """Seconds by phase of the training steps; on a GPU set ``timings.enabled`` (each phase then synchronises)."""
        self.batches = open_batches(config, self.lm, "train", tokens, self.world)
        if tokens is not None and len(tokens) < (config.n_samples or 0):
            raise ValueError(
                f"n_samples must be at most the {len(tokens)} samples of tokens, got {config.n_samples}: tokens are "
                "taken in order and once, so give more of them, or fewer n_samples"
            )
        self.folder: Path | None = None
        """The run folder; a sweep's holds one for each member. None when nothing is saved."""
        self._tokens = tokens
        self._quiet = quiet
        self._terminate = False
        if resume is not None:
            model = {"tlens_model_name", "tlens_model_path"} if lm is not None else set()
            self._resume(Path(resume), model | ({"train_data"} if tokens is not None else set()))
        elif config.save_dir is not None:
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
            name = (self._member.config if sweep is None else config).run_name
            self.folder = folder = self.world.share(_fresh_folder(config.save_dir / f"{name}_{stamp}"))
            for name, member in zip(self._names, self.members, strict=True):
                member.folder = folder / name

    def _step_graphs(self, device: str) -> StepGraphs | None:
        if not self.config.cuda_graphs:
            return None
        if torch.device(device).type != "cuda":
            raise ValueError(f"cuda_graphs needs an NVIDIA GPU, got device {device}: leave it false there")
        return StepGraphs((member.saes for member in self.members), CudaRecorder(device))

    @property
    def _steps(self) -> Steps:
        return self.graphs or self._shared

    # ------------------------------------------------------------------ the loop

    def fit(self) -> Run | Any:
        """Trains to the end and returns the run, or the list of a sweep's runs."""
        try:
            if self.folder is not None and self.config.sweep is not None and self.world.writes:
                checkpoint.write_config(self.folder, self.config.model_dump(mode="json"))
            for i, member in enumerate(self.members):
                member.start(console=not self._quiet and i == 0, alone=len(self.members) == 1)
            began, tokens = time.perf_counter(), self.total_tokens
            with self._listening_for_sigterm():
                for _ in self.steps():
                    pass
            facts = self._facts(began, self.total_tokens - tokens)
            with arithmetic(self.precision, self.lm.device):
                if not self.world.share(self._is_saved()):
                    self.save()
                counts = self._final_counts()
                for member, frequency in zip(self.members, counts, strict=True):
                    member.finish(frequency, facts)
        except TrainingTerminated:  # by all processes together
            raise
        except BaseException:
            self.world.abandon()
            raise
        finally:
            self.batches.close()
            for member in self.members:
                member.close()
        runs = [Run(member.model, member.history, member.folder) for member in self.members]
        return runs[0] if self.config.sweep is None else runs

    def _facts(self, began: float, tokens: int) -> dict[str, Any]:
        """For the runs' summaries: the device, and how long ``tokens`` took since ``began``, evaluations too.

        The members of a sweep share the time.
        """
        on_gpu = self.lm.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.lm.device)
        return {
            "seconds": time.perf_counter() - began,
            "timed_tokens": tokens,
            "members": len(self.members),
            "processes": self.world.size,
            "device": torch.cuda.get_device_name(self.lm.device) if on_gpu else "cpu",
            "e2e_fast": __version__,
            "torch": torch.__version__,
        }

    def steps(self) -> Iterator[int]:
        """Trains; hands back control after each micro-batch, with its number from 1. `fit` does this and the rest."""
        for number, tokens in enumerate(self._training_batches(), start=1):
            with arithmetic(self.precision, self.lm.device):
                self._micro_batch(tokens)
            yield number

    def _micro_batch(self, tokens: Tensor) -> None:
        """One original pass for all; each member's own part; then the checkpoint, when one is due."""
        before = self.samples
        wanted = [(member.saes, member.loss) for member in self.members]
        original = self._steps.original_pass(self.lm, wanted, tokens, self.timings)
        for member in self.members:
            member.micro_batch(tokens, original, self.timings, self._steps.training_step)
        self._report()
        if not self._member.updated:
            return
        terminate = self.world.any(self._terminate)
        if terminate or self._save_due(before):
            self.save()
        if terminate:
            kept = f"go on with --resume {self.folder}" if self.folder else "save_dir is null, so nothing was kept"
            raise TrainingTerminated(f"SIGTERM at sample {self.samples}: {kept}")

    def _report(self) -> None:
        """The rows that are due, with the evaluation of all members that ask for one."""
        due = [member for member in self.members if member.evaluation_due]
        evaluations: dict[int, dict[str, float]] = {}
        if due:
            wanted = [(member.saes, member.evaluation_loss) for member in due]
            with open_batches(due[0].config, self.lm, "eval") as batches:
                found = evaluate_together(self.lm, wanted, first_samples(batches, self.config.eval_n_samples))
            evaluations = {id(member): metrics for member, metrics in zip(due, found, strict=True)}
        for member in self.members:
            member.report(evaluations.get(id(member)))

    def _final_counts(self) -> Sequence[ActFrequency | None]:
        """How often features fire with the final weights, on training data from the start."""
        config = self.members[0].config
        if not config.collect_act_frequency_every_n_samples:
            return [None] * len(self.members)
        wanted = [(member.saes, member.loss) for member in self.members]
        with open_batches(config, self.lm, "train", self._tokens, self.world) as batches:
            return count_together(self.lm, wanted, batches, frequency_tokens(config, self.world))

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
        if self._member.grad_updates == 0:
            raise ValueError(
                f"the training data ended after {self.samples} sequences, before the first optimizer step "
                f"({self.config.samples_per_step}): give more data, or a smaller effective_batch_size or batch_size"
            )

    @contextlib.contextmanager
    def _listening_for_sigterm(self) -> Iterator[None]:
        """SIGTERM asks for a checkpoint and the end, unless the program handles it in a way of its own."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return

        def ask(*_: object) -> None:
            self._terminate = True

        signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> Path | None:
        """Writes a checkpoint of every member, then removes old ones; returns the (first) weight file."""
        data = self.batches.state_dict()
        paths = [member.save(data) for member in self.members]
        for member in self.members:
            member.prune()
        return paths[0]

    def _save_due(self, before: int) -> bool:
        every = self.config.save_every_n_samples
        # A step may take several micro-batches: look back over all of them.
        start = self.samples - self.config.samples_per_step
        return every is not None and crossed(min(before, start), self.samples, every)

    def _is_saved(self) -> bool:
        folders = [member.folder for member in self.members if member.folder is not None]
        return not folders or checkpoint.resumable(*folders) == self.samples

    def _resume(self, folder: Path, given: set[str]) -> None:
        """Goes on with the run in ``folder``; ``given`` are keys in whose place something else was given."""
        if not self.world.share((folder / checkpoint.CONFIG).is_file()):
            raise FileNotFoundError(f"{folder} is no run folder to resume: it holds no {checkpoint.CONFIG}")
        whole = [] if self.config.sweep is None else [("", self.config)]
        members = [(name, member.config) for name, member in zip(self._names, self.members, strict=True)]
        for name, config in [*whole, *members]:
            began = folder / name / checkpoint.CONFIG
            if began.is_file():  # a kill may have fallen before a member's first file
                require_same_run(load_config(began), config, folder / name, given)
        self.folder = folder
        # A kill may have fallen between the checkpoints of two members: go back to the last that all have.
        samples = self.world.share(checkpoint.resumable(*(folder / name for name in self._names)))
        for name, member in zip(self._names, self.members, strict=True):
            if samples is None:
                member.start_over(folder / name)
            else:
                self.batches.load_state_dict(member.load(folder / name, samples))

    # ------------------------------------------------------------------ the run, seen from its (first) member

    @property
    def _member(self) -> Member:
        return self.members[0]

    @property
    def model(self) -> SAETransformer:
        """The language model with the SAEs in training."""
        return self._member.model

    @property
    def saes(self) -> dict[str, SAE]:
        """The SAEs in training, by position."""
        return self._member.saes

    @property
    def loss(self) -> LossConfig:
        """What is minimised at this point of the run."""
        return self._member.loss

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows logged so far."""
        return self._member.history

    @property
    def samples(self) -> int:
        """Sequences trained on so far."""
        return self._member.samples

    @property
    def total_tokens(self) -> int:
        """Tokens trained on so far."""
        return self._member.total_tokens


def evaluate_run(config: Config, state: Mapping[str, Tensor], samples: int | None) -> dict[str, float]:
    """`evaluate` of saved weights on the configuration's eval_data (without one, on its train_data)."""
    model = SAETransformer.from_weights(config.model_dump(mode="json"), state)
    data = config.eval_data or config.train_data
    seed = config.seed + EVAL_SEED_OFFSET if data.seed is None else data.seed
    batches = TokenBatches(data, config.batch_size, seed=seed, vocab_size=model.lm.d_vocab, repeat=False)
    with batches:
        return evaluate(model, first_samples(batches, samples), loss=config.loss)


class LocalTrainer(Trainer):
    """Trains with reconstruction and sparsity, whatever else the configuration's loss holds."""

    preset = "local"


class E2ETrainer(Trainer):
    """Trains with KL of the output and sparsity."""

    preset = "e2e"


class E2EDownstreamTrainer(Trainer):
    """Trains with KL, the MSE of later residual streams (the configured ones, or all) and sparsity."""

    preset = "e2e+downstream"


def _for_world(config: Config, world: World) -> Config:
    """The configuration with its optimizer step in global sequences, checked against the number of processes."""
    if world.size == 1:
        return config
    batch = config.batch_size * world.size
    config = config if config.effective_batch_size else config.replace(effective_batch_size=batch)
    for key, value in (("effective_batch_size", config.effective_batch_size), ("n_samples", config.n_samples)):
        if value is not None and value % batch:
            raise ValueError(
                f"{key} must be a multiple of batch_size × processes ({config.batch_size} × {world.size}), got {value}"
            )
    return config


def _existing(config: Config) -> str:
    """The language model that the configuration names; raises FileNotFoundError for a path where nothing is."""
    key = "tlens_model_path" if config.tlens_model_path else "tlens_model_name"
    is_path = config.tlens_model_path or config.model.startswith(("/", "./", "../", "~"))
    if is_path and not Path(config.model).expanduser().exists():
        raise FileNotFoundError(f"{key}: there is no file or folder {config.model!r}")
    return config.model


def _fresh_folder(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3`` … when it is taken: two runs may start in the same second."""
    candidate, n = path, 2
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}-{n}"), n + 1
    return candidate
