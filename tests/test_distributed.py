"""Data parallel training: two gloo processes give the loss curve of one process on the same global batch."""

import copy
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import e2e_fast
from e2e_fast import checkpoint, files
from e2e_fast.distributed import World
from e2e_fast.trainer import _for_world

AT = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=31)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(31, size=(64, 8)).astype(np.uint16))
    return folder


def settings(work: Path, out: Path, **changes: Any) -> Path:
    data = {"dataset_name": str(work / "tokens.npy"), "tokenizer_name": "-", "split": "train", "n_ctx": 8}
    config: dict[str, Any] = {
        "tlens_model_path": str(work / "model"),
        "save_dir": str(out),
        "n_samples": 48,
        "save_every_n_samples": 16,
        "eval_every_n_samples": 24,
        "eval_n_samples": 10,
        "batch_size": 4,
        "effective_batch_size": 8,
        "lr": 1e-2,
        "max_grad_norm": 0.1,
        "log_every_n_grad_steps": 1,
        "collect_act_frequency_every_n_samples": 24,
        "act_frequency_n_tokens": 120,
        "loss": {
            "sparsity": {"coeff": 0.2},
            "in_to_orig": None,
            "out_to_orig": None,
            "out_to_in": {"coeff": 0.0},
            "logits_kl": {"coeff": 1.0},
        },
        "train_data": data,
        "eval_data": data,
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 3.0},
        "device": "cpu",
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | changes))
    return path


def torchrun(processes: int, *arguments: Any) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, "-m", "e2e_fast", "train", *map(str, arguments), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def only(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def assert_close(folder: Path, run: e2e_fast.Run) -> None:
    """The rows of a folder are a run's, but for explained variance, which is relative to the mean of its own batch."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == [row["samples"] for row in run.history]
    for ours, theirs in zip(rows, run.history, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if "explained_variance" not in key:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (key, ours["samples"])
    for key, tensor in files.load_tensors(folder / "samples_48.safetensors").items():
        assert run.folder is not None
        expected = files.load_tensors(run.folder / "samples_48.safetensors")[key]
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-5, msg=key)


def test_two_processes_train_as_one_and_checkpoints_go_between_them(work: Path, tmp_path: Path) -> None:
    whole = e2e_fast.train(settings(work, tmp_path / "one", batch_size=8), quiet=True)
    assert whole.folder is not None
    config = settings(work, tmp_path / "two")
    out = torchrun(2, config)
    assert out.count("saved in") == 1
    folder = only(tmp_path / "two")
    assert_close(folder, whole)

    for path in folder.glob("*_48.safetensors"):
        path.unlink()
    assert checkpoint.resumable(folder) == 32
    one = settings(work, tmp_path / "one_goes_on", save_dir=str(tmp_path))
    e2e_fast.train(one, resume=folder, quiet=True)  # two micro-batches a step now
    resumed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in resumed] == [8, 16, 24, 32, 40, 48, 48]
    got = files.load_tensors(folder / "samples_48.safetensors")
    for key, expected in files.load_tensors(whole.folder / "samples_48.safetensors").items():
        torch.testing.assert_close(got[key], expected, rtol=1e-3, atol=1e-5, msg=key)

    for path in whole.folder.glob("*_48.safetensors"):
        path.unlink()
    torchrun(2, config, "--resume", whole.folder)  # one to two
    for key, tensor in files.load_tensors(whole.folder / "samples_48.safetensors").items():
        torch.testing.assert_close(tensor, got[key], rtol=1e-3, atol=1e-5, msg=key)


def test_two_processes_train_a_sweep_as_one_does(work: Path, tmp_path: Path) -> None:
    """Members of different sizes at different positions, on shared passes and logits."""
    sweep = {"sae_positions": [AT, "blocks.1.hook_mlp_out", [AT, "blocks.1.hook_resid_post"]],
             "dict_size_to_input_ratio": [2.0, 3.0]}  # fmt: skip
    runs: Any = e2e_fast.train(settings(work, tmp_path / "one", batch_size=8, sweep=sweep), quiet=True)
    out = torchrun(2, settings(work, tmp_path / "two", sweep=sweep))
    assert out.count("saved in") == len(runs) == 6
    folder = only(tmp_path / "two")
    for run in runs:
        assert_close(folder / run.folder.name, run)


def test_batch_topks_threshold_is_that_of_all_processes(work: Path, tmp_path: Path) -> None:
    """The mean of what each saw in its part of the batch."""
    saes = {"sae_positions": AT, "dict_size_to_input_ratio": 3.0, "activation": "batch_topk", "k": 4}
    changes: dict[str, Any] = {
        "saes": saes, "n_samples": 8, "save_every_n_samples": None, "eval_every_n_samples": None,
        "collect_act_frequency_every_n_samples": 0,
    }  # fmt: skip
    torchrun(2, settings(work, tmp_path / "two", **changes))
    together = files.load_tensors(only(tmp_path / "two") / "samples_8.safetensors")
    alone = e2e_fast.Trainer(settings(work, tmp_path / "one", **changes), quiet=True)
    seen = []
    for tokens in itertools.islice(alone.batches, 2):
        sae = copy.deepcopy(alone.saes[AT])
        sae(alone.lm.original(tokens, at=AT)[AT])
        seen.append(sae.running_threshold)
    alone.batches.close()
    assert seen[0] != seen[1]
    torch.testing.assert_close(together[f"{AT.replace('.', '-')}.running_threshold"], torch.stack(seen).mean())


def driven(tmp_path: Path, before: str, config: Path) -> subprocess.Popen[str]:
    """Two processes that train; ``before`` each micro-batch is run with the member as ``self``."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, pathlib, signal, time\n"
        "from e2e_fast import cli\n"
        "from e2e_fast.member import Member\n"
        "micro_batch = Member.micro_batch\n"
        "def driven(self, *args):\n"
        f"    {before}\n"
        "    micro_batch(self, *args)\n"
        "Member.micro_batch = driven\n"
        "cli.main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(driver), "train", str(config), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(e2e_fast.__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_sigterm_to_one_process_ends_all_with_a_checkpoint(work: Path, tmp_path: Path) -> None:
    config = settings(work, tmp_path / "out", save_every_n_samples=None)
    signalling = "os.environ['RANK'] == '1' and self.samples == 16 and os.kill(os.getpid(), signal.SIGTERM)"
    processes = driven(tmp_path, signalling, config)
    _, errors = processes.communicate(timeout=120)
    assert processes.returncode != 0
    folder = only(tmp_path / "out")
    assert f"SIGTERM at sample 24: go on with --resume {folder}" in errors
    assert "exitcode  : 143" in errors
    assert checkpoint.resumable(folder) == 24


def test_sigterm_to_torchrun_ends_all_with_a_checkpoint(work: Path, tmp_path: Path) -> None:
    config = settings(work, tmp_path / "out", save_every_n_samples=None)
    started = tmp_path / "started"
    processes = driven(tmp_path, f"pathlib.Path({str(started)!r}).touch(), time.sleep(0.5)", config)
    while not started.exists() and processes.poll() is None:
        time.sleep(0.05)
    processes.terminate()
    _, errors = processes.communicate(timeout=25)  # torchrun kills after 30 s what does not end
    folder = only(tmp_path / "out")
    assert f"go on with --resume {folder}" in errors
    assert checkpoint.resumable(folder) in (8, 16)
    assert "process group" not in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all_at_once(work: Path, tmp_path: Path, rank: int) -> None:
    """The other waits for it in an all_reduce."""
    config = settings(work, tmp_path / "out", eval_every_n_samples=None)
    failing = f"os.environ['RANK'] == '{rank}' and self.samples == 16 and [][0]"
    processes = driven(tmp_path, failing, config)
    _, errors = processes.communicate(timeout=120)
    assert processes.returncode != 0
    assert f"[rank{rank}]: IndexError: list index out of range" in errors
    assert "process group" not in errors


def test_another_optimizer_step_is_not_resumed(work: Path, tmp_path: Path) -> None:
    run = e2e_fast.train(settings(work, tmp_path / "out", n_samples=16), quiet=True)
    assert run.folder is not None
    other = settings(work, tmp_path / "other", effective_batch_size=16, n_samples=16)
    with pytest.raises(e2e_fast.ConfigError, match="other settings .*: effective_batch_size was 8, is 16\\."):
        e2e_fast.train(other, resume=run.folder, quiet=True)


def test_the_step_is_checked_against_the_number_of_processes(work: Path, tmp_path: Path) -> None:
    config = e2e_fast.load_config(settings(work, tmp_path / "out", effective_batch_size=None))
    assert _for_world(config, World(0, 4)).effective_batch_size == 16
    assert _for_world(config, World()) is config
    with pytest.raises(ValueError, match=r"n_samples must be a multiple of batch_size × processes \(4 × 5\), got 48"):
        _for_world(config, World(0, 5))
    config = config.replace(effective_batch_size=8)
    with pytest.raises(ValueError, match=r"effective_batch_size must be a multiple .* \(4 × 3\), got 8"):
        _for_world(config, World(0, 3))


AT_THE_END = """
import os
import torch
from e2e_fast import distributed, kernels

world = distributed.join()
kernels.linear_kl(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 3))  # loads torch's compiler, as training does
world.average([torch.ones(3)])
distributed._leave()
print({open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")})
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for the names of threads")
def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(AT_THE_END)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("{") == 2
    assert "gloo" not in done.stdout
