"""benchmarks/schedule_experiment.py on a tiny random model: recipes, records, going on, matching and the table."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks import schedule_experiment as experiment
from benchmarks.schedule_experiment import Recipe
from e2e_fast import load_lm

AT = "blocks.1.hook_resid_pre"
SIZES = {"steps": 12, "batch": 4, "warmup": 2, "features": 24}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and windows of random tokens."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=12, vocab_size=31)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    windows = {name: draw.integers(31, size=(n, 12)) for name, n in (("train", 40), ("dev", 4), ("heldout", 8))}
    np.savez(folder / "data.npz", train=windows["train"], dev=windows["dev"], heldout=windows["heldout"])
    (folder / "model.txt").write_text(str(folder / "model"))
    return folder


def call(*arguments: Any) -> None:
    experiment.main([str(argument) for argument in arguments])


def run(work: Path, results: Path, *arguments: Any) -> None:
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", value)]
    call("run", "--work", work, "--results", results, "--position", AT, *sizes, *arguments)


def test_the_kl_phases_of_a_schedule_have_the_steps_asked_for(work: Path) -> None:
    lm = load_lm(str(work / "model"))
    for cycles in (1, 2, 3):
        recipe = Recipe("schedule", 0.1, 0, steps=60, kl_steps=12, cycles=cycles)
        ends = [row.get("until") or 1.0 for row in experiment.phases(recipe, lm, AT)]
        lengths = np.diff([0.0, *ends]) * 60
        assert len(ends) == 2 * cycles
        assert lengths[1::2] == pytest.approx([12 / cycles] * cycles)
        assert lengths[::2] == pytest.approx([48 / cycles] * cycles)


def test_what_is_recorded_is_not_trained_again_and_neighbours_train_as_alone(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, alone = tmp_path / "r.jsonl", tmp_path / "alone.jsonl"
    run(work, results, "--kind", "local", "--coeff", 0.0, 0.2, "--seed", 0)
    first = load_file(work / f"{experiment.read(results)[1]['key']}.safetensors")
    run(work, alone, "--kind", "local", "--coeff", 0.2, "--seed", 0)
    for name, value in load_file(work / f"{experiment.read(alone)[0]['key']}.safetensors").items():
        assert torch.equal(value, first[name]), name
    assert [row["recipe"]["coeff"] for row in experiment.read(results)] == [0.0, 0.2]
    assert not list((work / "runs").iterdir())

    def refuse(*_: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiment, "train", refuse)
    run(work, results, "--kind", "local", "--coeff", 0.0, 0.2, "--seed", 0)
    with pytest.raises(AssertionError, match="trained again"):
        run(work, results, "--kind", "local", "--coeff", 0.2, "--seed", 0, "--split", "dev")


def test_a_schedule_is_measured_costed_matched_and_tabulated(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "r.jsonl"
    for seed in (0, 1):
        run(work, results, "--kind", "schedule", "--coeff", 0.0, 0.5, "--seed", seed, "--kl-steps", 4, "--kl-lr", 1e-3)
    run(work, results, "--kind", "e2e", "--coeff", 0.0, "--seed", 0)
    rows = experiment.read(results)
    assert len(rows) == 5
    for row in rows:
        assert 0 < row["l0"] <= 24
        assert 0 < row["alive"] <= 24
        assert list(row["downstream_explained_variance"]) == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
        assert math.isclose(row["ce_original"], rows[0]["ce_original"])
    groups = {experiment.group_of(Recipe(**row["recipe"])) for row in rows}
    assert len(groups) == 2

    call("cost", "--work", work, "--results", results, "--output", tmp_path / "c.jsonl", "--position", AT,
         "--steps", 2, "--rounds", 1)  # fmt: skip
    phases = [(row["group"] in groups, row["phase"], row["ms"] > 0) for row in experiment.read(tmp_path / "c.jsonl")]
    assert sorted(phases) == [(True, "KL", True), (True, "e2e", True), (True, "local", True)]

    call("match", "--work", work, "--results", results, "--output", tmp_path / "m.jsonl")
    matchings = experiment.read(tmp_path / "m.jsonl")
    assert [(row["seeds"], row["recipe"].startswith("schedule")) for row in matchings] == [([0, 1], True)] * 2
    assert all(row["certified"] and row["mean"] < 1 for row in matchings)

    low, high = sorted(row["l0"] for row in rows if row["recipe"]["kind"] == "schedule" and row["recipe"]["seed"] == 0)
    middle = math.sqrt(low * high)
    found = [row for row in experiment.table(results, middle) if row["seed"] == 0]
    assert [row["group"].split("_")[0] for row in found] == ["schedule"]
    ends = [row["ce_increase"] for row in rows if row["recipe"]["kind"] == "schedule" and row["recipe"]["seed"] == 0]
    assert min(ends) <= found[0]["ce_increase"] <= max(ends)
    capsys.readouterr()
    call("table", "--results", results, "--l0", middle, 1e9)
    printed = capsys.readouterr().out
    assert "| schedule" in printed
    assert "no group has measurements on both sides" in printed


def test_windows_set_apart_are_not_trained_on(tmp_path: Path, work: Path) -> None:
    text = tmp_path / "text.npy"
    np.save(text, np.arange(12 * 30).reshape(30, 12) % 31)
    call("data", "--model", work / "model", "--text", text, "--work", tmp_path / "w", "--n-ctx", 12,
         "--sampled", 0, "--dev", 3, "--heldout", 5)  # fmt: skip
    parts = {name: experiment.load_data(tmp_path / "w", name) for name in ("train", "dev", "heldout")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 20, "dev": 3, "heldout": 5}
    assert json.loads(json.dumps(parts["heldout"].tolist())) == np.load(text)[-5:].tolist()
