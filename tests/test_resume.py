"""Processes that end before their time: killed at any moment, or asked to stop."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import e2e_fast
from e2e_fast import checkpoint, cli
from e2e_fast.sae import to_e2e_sae

AT = "blocks.1.hook_resid_pre"

# The n-th call of a function is preceded by a signal to the process itself.
DRIVER = """
import importlib, os, sys
from e2e_fast import cli

module, name, n, number = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
*outer, name = name.split(".")
owner = importlib.import_module(module)
for part in outer:
    owner = getattr(owner, part)
function, calls = getattr(owner, name), 0

def signalling(*args, **kwargs):
    global calls
    calls += 1
    if calls == n:
        os.kill(os.getpid(), number)
    return function(*args, **kwargs)

setattr(owner, name, signalling)
cli.main()
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=31)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(31, size=(64, 8)).astype(np.uint16))
    return folder


def settings(work: Path, out: Path, **changes: Any) -> Path:
    config: dict[str, Any] = {
        "tlens_model_path": str(work / "model"),
        "save_dir": str(out),
        "n_samples": 48,
        "save_every_n_samples": 16,
        "eval_n_samples": None,
        "batch_size": 4,
        "effective_batch_size": 8,
        "lr": 1e-2,
        "max_grad_norm": 1.0,
        "log_every_n_grad_steps": 1,
        "collect_act_frequency_every_n_samples": 16,
        "act_frequency_n_tokens": 100,
        "loss": {
            "sparsity": {"coeff": 0.2},
            "in_to_orig": None,
            "out_to_orig": None,
            "out_to_in": {"coeff": 0.0},
            "logits_kl": {"coeff": 1.0},
        },
        "train_data": {"dataset_name": str(work / "tokens.npy"), "tokenizer_name": "-", "split": "train", "n_ctx": 8},
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 3.0},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | changes))
    return path


def signalled(config: Path, function: str, n: int, number: int) -> subprocess.CompletedProcess[str]:
    module, name = function.split(":")
    command = [sys.executable, "-c", DRIVER, module, name, str(n), str(int(number)), "train", str(config), "--quiet"]
    return subprocess.run(command, capture_output=True, text=True)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def only(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def whole(work: Path) -> e2e_fast.Run:
    return e2e_fast.train(settings(work, work / "whole"), quiet=True)


@pytest.mark.parametrize(
    ("function", "n", "found"),
    [
        ("os:replace", 3, None),  # the weights of the first checkpoint are there, its resume file is not
        ("os:replace", 5, 16),  # the same at the second checkpoint
        ("e2e_fast.member:Member._update", 6, 32),  # within an optimizer step, with rows logged since the checkpoint
    ],
    ids=["before the first checkpoint", "between two files", "between two checkpoints"],
)
def test_a_killed_run_goes_on_to_the_bits_of_an_uninterrupted_one(
    work: Path, whole: e2e_fast.Run, tmp_path: Path, function: str, n: int, found: int | None
) -> None:
    config = settings(work, tmp_path / "out")
    assert signalled(config, function, n, signal.SIGKILL).returncode == -signal.SIGKILL
    folder = only(tmp_path / "out")
    assert checkpoint.resumable(folder) == found
    run = e2e_fast.train(config, resume=folder, quiet=True)
    expected = to_e2e_sae(whole.model.by_position)
    for key, value in to_e2e_sae(run.model.by_position).items():
        assert torch.equal(value, expected[key]), key
    assert rows(folder) == run.history == whole.history
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_sigterm_saves_at_the_next_optimizer_step_and_leaves_with_143(
    work: Path, whole: e2e_fast.Run, tmp_path: Path
) -> None:
    config = settings(work, tmp_path / "out", save_every_n_samples=None)
    done = signalled(config, "e2e_fast.member:Member.micro_batch", 3, signal.SIGTERM)
    assert done.returncode == cli.EXIT_TERMINATED == 143
    folder = only(tmp_path / "out")
    assert f"SIGTERM at sample 16: go on with --resume {folder}" in done.stderr
    assert checkpoint.resumable(folder) == 16
    run = e2e_fast.train(config, resume=folder, quiet=True)
    expected = to_e2e_sae(whole.model.by_position)
    for key, value in to_e2e_sae(run.model.by_position).items():
        assert torch.equal(value, expected[key]), key
    assert rows(folder) == run.history == whole.history


def test_a_finished_run_can_be_resumed_and_repeats_no_row(work: Path, tmp_path: Path) -> None:
    config = settings(work, tmp_path / "out")
    run = e2e_fast.train(config, quiet=True)
    assert run.folder is not None
    again = e2e_fast.train(config, resume=run.folder, quiet=True)
    assert rows(run.folder) == again.history == run.history


def test_the_last_checkpoints_are_kept(work: Path, tmp_path: Path) -> None:
    run = e2e_fast.train(settings(work, tmp_path / "all"), quiet=True)
    assert run.folder is not None
    assert sorted(p.stem for p in run.folder.glob("*.safetensors")) == [
        "resume_32", "resume_48", "samples_16", "samples_32", "samples_48",
    ]  # fmt: skip
    run = e2e_fast.train(settings(work, tmp_path / "one", keep_checkpoints=1), quiet=True)
    assert run.folder is not None
    assert sorted(p.stem for p in run.folder.glob("*.safetensors")) == ["resume_48", "samples_48"]


def test_a_folder_that_is_no_run_is_not_resumed(work: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no final_config.yaml"):
        e2e_fast.train(settings(work, tmp_path / "out"), resume=tmp_path, quiet=True)
