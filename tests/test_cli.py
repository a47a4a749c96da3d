"""The command line: trains and evaluates real files, and turns mistakes into one line and an exit code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from e2e_fast import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, token files and a configuration, as a user has them."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=16, vocab_size=61)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(61, size=(64, 16)).astype(np.uint16))
    data = {"dataset_name": str(folder / "tokens.npy"), "tokenizer_name": "none", "split": "train", "n_ctx": 16}
    settings: dict[str, Any] = {
        "tlens_model_path": str(folder / "model"),
        "save_dir": str(folder / "out"),
        "n_samples": 32,
        "save_every_n_samples": 16,
        "eval_n_samples": 8,
        "eval_every_n_samples": 16,
        "eval_data": data,
        "batch_size": 4,
        "lr": "1e-3",
        "loss": {
            "sparsity": {"coeff": 0.2},
            "in_to_orig": None,
            "out_to_orig": None,
            "out_to_in": None,
            "logits_kl": {"coeff": 1.0},
        },
        "train_data": data,
        "saes": {"sae_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_train_then_eval(folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", str(folder / "config.yaml"), "--quiet") == 0
    saved = Path(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("saved in "))
    names = {p.name for p in saved.iterdir()}
    assert names >= {"final_config.yaml", "samples_16.safetensors", "samples_32.safetensors"}
    assert command("eval", str(saved), "--samples", "8", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["loss/eval/logits_kl"] > 0
    last = [json.loads(line) for line in (saved / "metrics.jsonl").read_text().splitlines()]
    logged = next(row for row in reversed(last) if "loss/eval/logits_kl" in row)
    assert metrics["loss/eval/logits_kl"] == pytest.approx(logged["loss/eval/logits_kl"], rel=1e-5)
    assert command("train", str(folder / "config.yaml"), "--quiet", "--resume", str(saved)) == 0


def test_a_mistake_is_one_clear_line_and_exit_code_2(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    wrong = folder / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(settings | {"batchsize": 4}))
    assert command("train", str(wrong)) == cli.EXIT_BAD_INPUT
    assert "batchsize: unknown key (did you mean batch_size?)" in capsys.readouterr().err
    assert command("train", str(folder / "none.yaml")) == cli.EXIT_BAD_INPUT
    assert "no file" in capsys.readouterr().err
    assert command("eval", str(folder)) == cli.EXIT_BAD_INPUT
    assert "final_config.yaml" in capsys.readouterr().err


def test_a_damaged_configuration_of_a_run_is_one_clear_line(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples_8.safetensors").write_bytes(b"")
    for content, message in (
        ("x: [", "is no readable YAML"),
        ("- x", "must hold a mapping of keys to values, got list"),
    ):
        (tmp_path / "final_config.yaml").write_text(content)
        for name in ("eval", "report"):
            assert command(name, str(tmp_path)) == cli.EXIT_BAD_INPUT
            assert message in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"kind": "local", "phases": {"data": 1.0}, "ms": 1.0, "tokens/s": 1.0, "peak_bytes": 1, "floor_share": 1.0}]
    monkeypatch.setattr("e2e_fast.overhead.measure_overhead", lambda *_, **__: [rows[0] | {"overhead": 1.0}])
    (tmp_path / "file").touch()
    assert command("bench", "overhead", "--json", str(tmp_path / "file" / "x.json")) == cli.EXIT_BAD_INPUT
    assert "1.00 × local" in capsys.readouterr().out


def test_info_names_what_is_active(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("info") == 0
    out = capsys.readouterr().out
    assert "SIMD level" in out
    assert torch.__version__ in out


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = ["transformers", "transformer_lens", "wandb", "datasets", "matplotlib", "triton", "typer"]
    code = f"import sys, e2e_fast, e2e_fast.kernels, e2e_fast.compare; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_training_works_without_the_compiled_extension(folder: Path) -> None:
    code = (
        "import sys; sys.modules['e2e_fast._C'] = None; import e2e_fast; from e2e_fast.info import describe\n"
        f"run = e2e_fast.train({str(folder / 'config.yaml')!r}, quiet=True)\n"
        "print(describe()['C++ kernels']); print(len(run.history))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "missing" in done.stdout
    assert done.stderr.count("_C is missing") == 1, done.stderr


def test_matching_without_the_compiled_extension_names_the_remedy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.eye(4, dtype=np.float32))
    code = (
        "import sys; sys.modules['e2e_fast._C'] = None; from e2e_fast import cli\n"
        f"sys.argv = ['e2e-fast', 'match', *[{str(tmp_path / 'a.npy')!r}] * 2]; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
