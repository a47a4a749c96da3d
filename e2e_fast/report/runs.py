"""What run folders say of themselves: settings, training curves, evaluation, time. Nothing is guessed.

A number that a run does not have is a `Missing` with the reason.

>>> Missing("no evaluation was recorded").reason
'no evaluation was recorded'
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from e2e_fast import checkpoint, files
from e2e_fast.compare.comparison import default_names
from e2e_fast.config import Config, load_config
from e2e_fast.formats import layouts
from e2e_fast.log import JsonlLog
from e2e_fast.optional import MissingPackage

CE = "performance/eval/difference_ce_loss"
EV_IN = "loss/eval/out_to_in/explained_variance/"
EV_LATER = "loss/eval/in_to_orig/explained_variance/"


class Missing(NamedTuple):
    """A number that is not there."""

    reason: str


class Evaluation(NamedTuple):
    """Metrics of the finished weights, or of those at the last evaluation in training."""

    metrics: Mapping[str, float]
    """Under e2e_sae's names, as `e2e_fast.evaluate` gives them."""
    origin: str
    """On what and when, in words."""


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read."""

    folder: Path
    file: Path
    """Its weights."""
    config: Config
    positions: tuple[str, ...]
    """Of its SAEs."""
    history: Sequence[Mapping[str, float]]
    """The rows of ``metrics.jsonl``; none where there is no such file."""
    summary: Mapping[str, Any]
    """``summary.json``; empty where there is no such file."""
    evaluation: Evaluation | Missing

    @property
    def kind(self) -> str:
        """Of its loss; of a schedule's losses, in their order."""
        phases = self.config.schedule or ()
        kinds = [phase.loss if isinstance(phase.loss, str) else phase.loss.kind for phase in phases]
        return " → ".join(kinds or [self.config.loss.kind])

    @property
    def coefficients(self) -> dict[str, float]:
        """Of the terms of its loss; of a schedule, of the one that the others take their sparsity from."""
        loss = self.config.loss
        terms = {
            "sparsity": loss.sparsity.coeff,
            "MSE": loss.out_to_in and loss.out_to_in.coeff,
            "MSE to original": loss.out_to_orig and loss.out_to_orig.coeff,
            "KL": loss.logits_kl and loss.logits_kl.coeff,
            "downstream": loss.in_to_orig and loss.in_to_orig.total_coeff,
        }
        return {name: coeff for name, coeff in terms.items() if coeff}

    @property
    def samples(self) -> int | Missing:
        """Sequences that the weights were trained on."""
        name = self.file.stem.removeprefix("samples_")
        return int(name) if name.isdigit() else self.summary.get("samples", Missing("the weights' file does not say"))

    @property
    def tokens(self) -> int | Missing:
        """Tokens that it was trained on."""
        rows = [row["total_tokens"] for row in self.history if row["samples"] == self.samples and "total_tokens" in row]
        if self.summary.get("samples") == self.samples:
            return int(self.summary["total_tokens"])
        return int(rows[-1]) if rows else Missing("the run did not record it")

    @property
    def tokens_per_second(self) -> float | Missing:
        """Trained tokens a second of wall-clock, logs and evaluations included."""
        if not self.summary:
            return Missing(f"the folder holds no {layouts.SUMMARY}, which a run writes at its end")
        if self.summary["members"] > 1:
            return Missing(f"trained in a sweep of {self.summary['members']}, whose time is shared")
        if not self.summary["timed_tokens"]:
            return Missing("the run was resumed when nothing was left to train")
        return self.summary["timed_tokens"] / self.summary["seconds"]

    def alive(self, position: str) -> int | Missing:
        """Features that fired at least once while they were counted, with the final weights."""
        key = f"sparsity/alive_dict_elements_final/{position}"
        counts = [row[key] for row in self.history if key in row and row["samples"] == self.samples]
        return int(counts[-1]) if counts else Missing("the run did not count how often features fire")

    def metric(self, key: str) -> float | Missing:
        """A metric of the evaluation."""
        if isinstance(self.evaluation, Missing):
            return self.evaluation
        return self.evaluation.metrics.get(key, Missing("the run's loss has no such term, so it was not evaluated"))

    @property
    def comparable_speed(self) -> tuple[Any, ...]:
        """Runs that differ in none of these differ in speed by their loss alone."""
        saes, data = self.config.saes, self.config.train_data
        machine = (self.summary.get("device"), self.summary.get("processes"))
        sizes = (saes.dict_size_to_input_ratio, *saes.sae_positions, data.n_ctx, self.config.batch_size)
        return (self.config.model, *sizes, self.config.precision, *machine)


def is_run(source: str | Path) -> bool:
    """Whether a path is a run folder with the configuration of its training, or one of its weight files."""
    path, _ = layouts.split_name(source)
    settings = (path if path.is_dir() else path.parent) / checkpoint.CONFIG
    # A converted SAE may come with a file of that name that says where it sits and nothing of a training.
    return settings.is_file() and "loss" in files.load_yaml(settings)


def named_dictionaries(sources: Sequence[str | Path], names: Sequence[str] | None = None) -> dict[str, str]:
    """Name → source of every dictionary that the sources hold: `expanded`, and each SAE of a run with several.

    names: one for each source, once folders of runs are replaced by the runs; None: the shortest that differ.
    Raises ValueError for names that do not fit, and as `expanded`.
    """
    paths = expanded(sources)
    if names and len(names) != len(paths):
        raise ValueError(f"there must be a name for each of the {len(paths)} runs and dictionaries, got {len(names)}")
    if names and len(set(names)) < len(names):
        raise ValueError(f"names must differ, got {', '.join(names)}")
    found = {}
    for name, source in zip(names or default_names(paths), paths, strict=True):
        path, chosen = layouts.split_name(source)
        positions = _positions(layouts.file_in(path)) if chosen is None and is_run(source) else ()
        several = {f"{name} · {position}": f"{source}::{position}" for position in positions}
        found |= several if len(several) > 1 else {name: source}
    return found


def expanded(sources: Sequence[str | Path]) -> list[str]:
    """The sources, a folder of run folders (a sweep's, the demo's ``runs``) replaced by those, in order of their names.

    Runs in a folder that have no weights yet are left out (`without_weights`). Raises FileNotFoundError where nothing
    is, and ValueError where no run of a folder has weights.
    """
    found = []
    for source in sources:
        path, _ = layouts.split_name(source)
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        inner = _runs_in(path)
        whole = [run for run in inner if _holds_weights(run)]
        if inner and not whole:
            raise ValueError(
                f"{path} holds runs, none of which has weights yet: {', '.join(run.name for run in inner)}"
            )
        found += map(str, whole) if inner else [str(source)]
    return found


def without_weights(sources: Sequence[str | Path]) -> list[str]:
    """The run folders that `expanded` leaves out: begun or broken off before anything was saved."""
    inside = [run for source in sources for run in _runs_in(layouts.split_name(source)[0])]
    return [str(run) for run in inside if not _holds_weights(run)]


def _runs_in(path: Path) -> list[Path]:
    """The run folders in a folder that is no run or dictionary itself."""
    if not path.is_dir() or _holds_weights(path):
        return []
    return sorted(inner for inner in path.iterdir() if (inner / checkpoint.CONFIG).is_file())


def _holds_weights(folder: Path) -> bool:
    return any(file.suffix in layouts.SUFFIXES for file in folder.iterdir())


def read_record(source: str | Path) -> RunRecord:
    """The record of a run folder or of one of its weight files.

    Raises ValueError (ConfigError, CheckpointError) for what is damaged and for ``path::name`` of an SAE that it does
    not hold, FileNotFoundError where nothing is.
    """
    path, name = layouts.split_name(source)
    file = layouts.file_in(path)
    config = load_config(file.parent / checkpoint.CONFIG)
    positions = _positions(file) or config.saes.sae_positions
    if name is not None and name.replace("-", ".") not in positions:
        raise ValueError(f"{file} holds no SAE {name!r}, but {', '.join(positions)}")
    history = _rows(file.parent / JsonlLog.NAME)
    record = RunRecord(file.parent, file, config, positions, history, checkpoint.read_summary(file.parent), Missing(""))
    return replace(record, evaluation=_recorded(record))


def evaluated(record: RunRecord, samples: int) -> RunRecord:
    """The record with an evaluation of its weights on ``samples`` sequences unless it has one, or why it has none."""
    from e2e_fast.trainer import evaluate_run

    if isinstance(record.evaluation, Evaluation):
        return record
    try:
        metrics = evaluate_run(record.config, _weights(record), samples)
    except (ValueError, OSError, MissingPackage) as error:
        reason = " ".join(str(error).split())
        return replace(record, evaluation=Missing(f"it could not be evaluated: {reason}"))
    data = "eval_data" if record.config.eval_data else "train_data, having no eval_data"
    return replace(record, evaluation=Evaluation(metrics, f"by this report on {samples:,} sequences of its {data}"))


def _weights(record: RunRecord) -> dict[str, Tensor]:
    """Under e2e_sae's keys, also where a fine-tune has written them back in another library's format."""
    if checkpoint.WEIGHTS.fullmatch(record.file.name):
        return files.load_tensors(record.file)
    from e2e_fast import formats
    from e2e_fast.sae import to_e2e_sae

    return to_e2e_sae({record.positions[0]: formats.read(record.folder).to_sae()})


def _recorded(record: RunRecord) -> Evaluation | Missing:
    if not record.history:
        return Missing(f"the folder holds no {JsonlLog.NAME}")
    rows = [row for row in record.history if CE in row]
    if not rows:
        return Missing("no evaluation was recorded (--eval N evaluates)")
    at = int(rows[-1]["samples"])
    n = record.config.eval_n_samples
    size = "all of" if n is None else f"{n:,} sequences of"
    return Evaluation(rows[-1], f"in training, on {size} its eval_data, after {at:,} sequences")


def _positions(file: Path) -> tuple[str, ...]:
    """Of the SAEs in a weight file of e2e_sae's or ours, from the first layer on; empty for another library's."""
    ending = ".decoder.weight"
    found = [name.removesuffix(ending).replace("-", ".") for name in files.tensor_names(file) if name.endswith(ending)]
    return tuple(sorted(found, key=lambda p: [int(part) if part.isdigit() else 0 for part in p.split(".")]))


def _rows(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(row, dict) or "samples" not in row:
            raise ValueError(f"{path}, line {number}, must be an object with 'samples'")
        rows.append(row)
    return rows
