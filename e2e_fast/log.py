"""Where a run reports to: the console with a progress bar, a JSONL file, wandb when asked for.

A row is a dict from e2e_sae's key names to numbers, with ``samples`` (sequences seen so far).

>>> import tempfile
>>> log = JsonlLog(Path(tempfile.mkdtemp()))
>>> log.row({"samples": 8, "loss": 0.5}); log.close()
>>> (log.path).read_text()
'{"samples": 8, "loss": 0.5}\\n'
"""

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from e2e_fast.files import CheckpointError
from e2e_fast.optional import require

Row = Mapping[str, float]


class Log(Protocol):
    """A place for rows."""

    def start(self, total_samples: int | None) -> None: ...

    def advance(self, samples: int) -> None: ...

    def row(self, row: Row) -> None: ...

    def close(self) -> None: ...


class JsonlLog:
    """``metrics.jsonl`` in the run folder: one JSON object a logged step, flushed at once, appended on resume."""

    NAME: ClassVar[str] = "metrics.jsonl"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / self.NAME
        self._file = self.path.open("a")

    def start(self, total_samples: int | None) -> None: ...

    def advance(self, samples: int) -> None: ...

    def row(self, row: Row) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror or error}; checkpoints are intact"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what did not reach the disk has been raised by `row`
            self._file.close()


def keep_rows(path: Path, size: int) -> list[dict[str, float]]:
    """Cuts a JSONL file to its first ``size`` bytes, where a checkpoint left it, and returns the rows that remain.

    Rows written after the checkpoint are written again when training goes on from it.
    """
    if not path.exists():
        return []
    with path.open("r+b") as file:
        file.truncate(min(size, path.stat().st_size))
    return [json.loads(line) for line in path.read_text().splitlines()]


class ConsoleLog:
    """A progress bar on a terminal; plain lines, at most one every few seconds, elsewhere."""

    def __init__(self, name: str, *, seconds_between_lines: float = 5.0) -> None:
        self.name = name
        self.seconds_between_lines = seconds_between_lines
        self._last_line = 0.0
        self._progress: Any = None
        self._samples = 0
        self._total: int | None = None

    def start(self, total_samples: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._total = total_samples
        if sys.stderr.isatty():
            from rich.console import Console

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(self.name, total=total_samples)
            self._progress.start()

    def advance(self, samples: int) -> None:
        self._samples += samples
        if self._progress is not None:
            self._progress.advance(self._task, samples)

    def row(self, row: Row) -> None:
        now = time.monotonic()
        if now - self._last_line < self.seconds_between_lines:
            return
        self._last_line = now
        text = f"{self.name}  {self._samples}" + (f"/{self._total}" if self._total else "") + "  " + summary(row)
        (self._progress.console.print if self._progress is not None else lambda t: print(t, file=sys.stderr))(text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class WandbLog:
    """Rows to Weights & Biases, stepped by samples as e2e_sae does. ``alone``: no other run of the process is open."""

    def __init__(self, project: str, name: str, settings: Mapping[str, Any], *, alone: bool = True) -> None:
        wandb = require("wandb", f"logging to wandb_project {project!r}", extra="wandb")
        further: dict[str, Any] = {} if alone else {"reinit": "create_new"}
        try:
            self._run = wandb.init(project=project, name=name, config=dict(settings), **further)
        except wandb.Error as error:
            raise ValueError(
                f"wandb_project {project!r}: wandb starts no run ({' '.join(str(error).split())}); log in with "
                "`wandb login`, set WANDB_MODE=offline, or leave the key out"
            ) from error

    def start(self, total_samples: int | None) -> None: ...

    def advance(self, samples: int) -> None: ...

    def row(self, row: Row) -> None:
        self._run.log({k: v for k, v in row.items() if k != "samples"}, step=int(row["samples"]))

    def close(self) -> None:
        self._run.finish()


def summary(row: Row) -> str:
    """The few numbers of a row that a person follows."""
    wanted = (
        ("loss", "loss"),
        ("KL", "/logits_kl"),
        ("MSE", "/out_to_in/"),
        ("L0", "/L_0/"),
        ("CE", "/difference_ce_loss"),
    )
    parts = []
    for label, part in wanted:
        value = next((v for k, v in row.items() if (k == part if part == "loss" else part in k)), None)
        if value is not None:
            parts.append(f"{label} {-value:+.4f}" if label == "CE" else f"{label} {value:.4g}")
    return "  ".join(parts)
