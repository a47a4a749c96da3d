"""The report of what end-to-end training costs: its phases, its sums and its record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from e2e_fast.cli import app
from e2e_fast.lm import load_lm
from e2e_fast.measure import PeakMemory, Timings
from e2e_fast.overhead import BALANCED_SHARE, PHASES, floor_flops, measure_overhead, measure_sharing

SMALL: dict[str, Any] = {"steps": 2, "rounds": 1, "batch_size": 2, "n_ctx": 16}


def test_every_phase_of_every_kind_is_timed_and_they_add_up() -> None:
    rows = {row["kind"]: row for row in measure_overhead("embedded", **SMALL)}
    assert list(rows) == ["local", "e2e", "e2e+downstream", "schedule"]
    without_model = {"data", "prefix", "SAE", "losses", "backward", "optimizer"}
    assert set(rows["local"]["phases"]) == without_model
    for kind in ("e2e", "e2e+downstream", "schedule"):
        assert tuple(rows[kind]["phases"]) == PHASES
    for row in rows.values():
        assert all(ms > 0 for ms in row["phases"].values())
        assert row["ms"] == pytest.approx(sum(row["phases"].values()))
        assert row["tokens/s"] == pytest.approx(2 * 16 / row["ms"] * 1e3)
        assert row["overhead"] == pytest.approx(row["ms"] / rows["local"]["ms"])
        assert 0 < row["floor_share"] < 1.5
        assert row["peak_bytes"] >= 0
    assert rows["local"]["floor_gflop"] < rows["schedule"]["floor_gflop"] < rows["e2e"]["floor_gflop"]
    assert 0 < BALANCED_SHARE < 1


def test_the_floor_is_the_modules_formula() -> None:
    class Gpt2Small:
        d_model, d_vocab, n_layers = 768, 50257, 12

        def block_weights(self, layer: int) -> int:
            return 12 * 768**2

    lm: Any = Gpt2Small()
    assert floor_flops(lm, "local", 6, 46080, 50, 1024) == pytest.approx(166e6, rel=0.01)
    assert floor_flops(lm, "e2e", 6, 46080, 50, 1024) == pytest.approx(694e6, rel=0.01)


def test_the_command_writes_the_rows_it_prints(tmp_path: Path) -> None:
    path = tmp_path / "records" / "overhead.json"
    command = ["bench", "overhead", "--steps", "1", "--batch-size", "1", "--n-ctx", "16", "--json", str(path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    record = json.loads(path.read_text())
    assert (record["model"], record["batch_size"], record["n_ctx"]) == ("embedded", 1, 16)
    lm = load_lm("embedded")
    for row in record["rows"]:  # what was measured, also where it is a default
        assert (row["layer"], row["features"], row["n_ctx"]) == (lm.n_layers // 2, 8 * lm.d_model, 16)
    assert record["machine"]["torch"]
    for row in record["rows"]:
        assert row["kind"] in result.stdout
        assert set(row["phases"]) <= set(PHASES)
    for phase in PHASES:
        assert f"{phase} " in result.stdout


def test_sharing_is_measured_beside_separate_runs() -> None:
    found = measure_sharing("embedded", members=2, **SMALL)
    assert found["ms"] > 0
    assert found["share"] == pytest.approx(found["ms"] / found["alone_ms"])  # one round: its ratio
    result = CliRunner().invoke(app, ["bench", "sharing", "--members", "2", "--steps", "1", "--n-ctx", "16"])
    assert "2 SAEs in one process" in result.stdout


def test_time_and_memory_are_those_of_the_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: asked.append(device) or 0)
    with PeakMemory("cuda:1"), Timings("cuda:1").phase("step"):
        pass
    assert asked == [torch.device("cuda:1")] * 7
