"""The `duel` fixture: times two ways of doing the same thing alternately and reports their ratio."""

import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from e2e_fast import _C, kernels
from e2e_fast.measure import PeakMemory


class Duel(NamedTuple):
    """Ours against a baseline; times are medians in seconds, memory is the peak beyond the start in bytes."""

    name: str
    ours: float
    baseline: float
    spread: tuple[float, float]
    """Smallest and largest ratio over the rounds."""
    ours_bytes: int
    baseline_bytes: int
    floor: float | None
    """Seconds of the part of the work that no way of doing it leaves out, by the fastest routines known here."""

    @property
    def speedup(self) -> float:
        return self.baseline / self.ours

    @property
    def limit(self) -> float | None:
        """The speedup that would be left if all but the floor took no time."""
        return None if self.floor is None else self.baseline / self.floor

    @property
    def memory(self) -> float:
        """Our share of the baseline's peak memory."""
        return self.ours_bytes / max(self.baseline_bytes, 1)


RESULTS = pytest.StashKey[list[Duel]]()

TURN = 0.2
"""Seconds that a turn lasts at least: short work is repeated, so that what one side leaves behind (caches, spinning
threads) weighs little in the other's turn, and both are timed as a training loop runs them."""


@pytest.fixture
def duel(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Duel]:
    """``duel(name, ours, baseline, rounds=7, floor=None)``: all are warmed up, then run in turn; medians count.

    Work shorter than `TURN` is repeated within its turn, whose mean counts.
    """

    def run(
        name: str,
        ours: Callable[[], Any],
        baseline: Callable[[], Any],
        rounds: int = 7,
        floor: Callable[[], Any] | None = None,
    ) -> Duel:
        peaks = []
        for work in (ours, baseline):
            work()
            gc.collect()
            kernels.release_buffers()  # else the second call would not have to ask for them
            with PeakMemory() as peak:
                work()
            peaks.append(peak.bytes)
        works = [ours, baseline, *([] if floor is None else [floor])]
        works[-1]()
        repeats = [1 + int(TURN / seconds(work)) for work in works]
        turns = [[seconds(*turn) for turn in zip(works, repeats, strict=True)] for _ in range(rounds)]
        medians = [statistics.median(times) for times in zip(*turns, strict=True)]
        ratios = [slow / fast for fast, slow, *_ in turns]
        fastest_possible = None if floor is None else medians[2]
        result = Duel(name, medians[0], medians[1], (min(ratios), max(ratios)), peaks[0], peaks[1], fastest_possible)
        benchmark.extra_info.update(result._asdict())
        benchmark.pedantic(ours, rounds=rounds)
        request.config.stash.setdefault(RESULTS, []).append(result)
        return result

    return run


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """The mean wall-clock time of ``work()``."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def record(results: list[Duel], file: Path) -> None:
    """Appends one line a duel: its figures, the commit, the machine and the versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpus = Path("/proc/cpuinfo")
    name = [line for line in cpus.read_text().splitlines() if "model name" in line] if cpus.exists() else []
    where = {
        "commit": commit.stdout.strip(),
        "when": time.strftime("%Y-%m-%d"),
        "cpu": name[0].partition(": ")[2] if name else platform.processor(),
        "simd": _C.simd_level(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    with file.open("a") as lines:
        for result in results:
            lines.write(json.dumps(result._asdict() | {"speedup": result.speedup} | where) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, [])
    if not results:
        return
    if file := config.getoption("--record"):
        record(results, Path(file))
    terminalreporter.section("ratios: both sides timed alternately in this run, medians")
    terminalreporter.write_line(
        f"{'':52}{'ours':>10}{'baseline':>11}{'faster':>9}{'(range)':>15}{'memory':>9}{'floor':>11}{'at most':>9}"
    )
    for r in results:
        spread = f"({r.spread[0]:.1f}–{r.spread[1]:.1f})"
        terminalreporter.write_line(
            f"{r.name:52}{r.ours * 1e3:8.1f}ms{r.baseline * 1e3:9.1f}ms{r.speedup:8.2f}x{spread:>15}{r.memory:8.2f}x"
            + ("" if r.floor is None else f"{r.floor * 1e3:9.1f}ms{r.limit:8.2f}x")
        )
