"""What measures on a GPU, run on little tensors: the benchmarks, and the report's time limits."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tape
import torch

from benchmarks import bench_kernels_gpu


def test_the_gpu_benchmark_runs_every_operator_on_little_tensors(tmp_path):
    records = bench_kernels_gpu.main(["--tiny", "--out", str(tmp_path), "--rep-ms", "1"])
    assert [r for r in records if "failed" in r] == []
    ours = [r for r in records if r["provider"] == "ours"]
    assert {r["operator"] for r in ours} >= {"linear_kl + gradient", "encode_topk", "decode + backward", "SAE step"}
    assert {r["operator"] for r in ours} >= {"encode_batch_topk", "encode_jump_relu", "adam + norms + shadow"}
    lines = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert len(lines) == len(records)
    assert {"commit", "device", "torch", "triton"} <= json.loads(lines[0]).keys()
    assert (tmp_path / "kernels.md").read_text().count("\n| ") >= len(records)


def test_what_fails_is_recorded_and_a_broken_gpu_is_left_to_a_new_process(tmp_path, monkeypatch):
    def wrong(*arguments, **options):
        raise RuntimeError("an illegal access\nand much text")

    class Replaced(Exception):
        pass

    def replace(program, arguments):
        raise Replaced(arguments)

    monkeypatch.setattr(bench_kernels_gpu, "adam_step", wrong)
    only = ["--tiny", "--only", "adam", "--rep-ms", "1", "--commit", "abc", "--out", str(tmp_path)]
    ours, *theirs = bench_kernels_gpu.main(only)
    assert (ours["provider"], ours["failed"]) == ("ours", "RuntimeError: an illegal access")
    assert theirs
    assert all("failed" not in r and r["commit"] == "abc" for r in theirs)

    monkeypatch.setattr(bench_kernels_gpu, "usable", lambda: False)
    monkeypatch.setattr(bench_kernels_gpu.os, "execv", replace)
    with pytest.raises(Replaced) as replaced:
        bench_kernels_gpu.main([*only, "--first=3"])
    assert replaced.value.args[0][-1] == "--first=4"
    assert replaced.value.args[0][2:-1] == only
    monkeypatch.setattr(bench_kernels_gpu, "adam_operator", wrong)
    monkeypatch.setattr(bench_kernels_gpu, "usable", lambda: True)
    records = bench_kernels_gpu.main([*only, "--first=4"])
    assert records[: 1 + len(theirs)] == [ours, *theirs]  # what was measured before stays
    assert [r["failed"] for r in records[1 + len(theirs) :]] == ["RuntimeError: an illegal access"] * 2


def test_the_sweep_tries_other_block_sizes(tmp_path):
    before = {kernel: dict(table) for kernel, table in bench_kernels_gpu._launch.BLOCKS.items()}
    arguments = ["--tiny", "--sweep", "--only", "adam", "--out", str(tmp_path), "--rep-ms", "1"]
    records = bench_kernels_gpu.main(arguments)
    assert [r["BLOCK"] for r in records] == [c["BLOCK"] for c in bench_kernels_gpu.SWEEP["adam"]]
    assert before == bench_kernels_gpu._launch.BLOCKS


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present, so the full benchmark would start")
def test_without_a_gpu_only_the_tiny_run_is_allowed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_kernels_gpu.main(["--out", str(tmp_path)])
    assert "only --tiny" in capsys.readouterr().err


@pytest.fixture
def bench_training_gpu() -> Any:
    for package in ("transformers", "pydantic", "yaml", "safetensors"):
        pytest.importorskip(package, reason="the training benchmark needs it, the kernels do not")
    return importlib.import_module("benchmarks.bench_training_gpu")


def test_the_training_benchmark_runs_every_way_on_little_tensors(bench_training_gpu, tmp_path, capsys):
    records = bench_training_gpu.main(["--tiny", "--out", str(tmp_path)])
    assert [r for r in records if "failed" in r] == []
    assert [r["kind"] for r in records[:15]] == [kind for kind in bench_training_gpu.KINDS for _ in range(5)]
    assert all(r["ms"] > 0 and r["peak_mb"] >= 0 and r["held_mb"] >= 0 for r in records)
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == len(records)
    assert (tmp_path / "training.md").read_text().count("\n| ") == 1 + len(records)
    kinds = [row["kind"] for row in json.loads((tmp_path / "overhead.json").read_text())]
    assert kinds == ["local", "e2e", "e2e+downstream", "schedule", "four e2e SAEs in one process"]
    assert "x local" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_the_training_benchmark_measures_graphs_and_compiled_blocks(bench_training_gpu, monkeypatch):
    monkeypatch.setattr(bench_training_gpu.LM, "check_tokens", lambda self, tokens: None)  # for CPU tensors alone
    s = bench_training_gpu.setup(bench_training_gpu.TINY)
    graphs = bench_training_gpu.as_graphs(s, "e2e", record=None if torch.cuda.is_available() else tape.record)
    compiled = bench_training_gpu.compiled(s, "e2e", backend="aot_eager")
    records = list(bench_training_gpu.measure(s, "e2e", bench_training_gpu.providers(s, "e2e") | graphs | compiled))
    assert [r for r in records if "failed" in r] == []
    assert [r["provider"] for r in records[-2:]] == ["ours, bf16, CUDA graphs", "ours, bf16, compiled blocks"]


def test_a_side_that_fails_or_computes_something_else_costs_no_other_its_record(
    bench_training_gpu, tmp_path, monkeypatch
):
    def too_large(*arguments: Any) -> Any:
        raise RuntimeError("out of memory\nand much text")

    monkeypatch.setattr(bench_training_gpu, "reference", too_large)
    monkeypatch.setattr(bench_training_gpu, "overhead", too_large)
    records = bench_training_gpu.main(["--tiny", "--out", str(tmp_path)])
    assert {r["failed"] for r in records if r["provider"].startswith("reference")} == {"RuntimeError: out of memory"}
    ours = [r for r in records if r["provider"] in ("ours, bf16", "ours, fp32")]
    assert all(r["ms"] > 0 for r in ours)
    assert len(ours) == 6
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == len(records)
    monkeypatch.undo()

    s = bench_training_gpu.setup(bench_training_gpu.TINY)
    sides = bench_training_gpu.providers(s, "local")
    records = list(bench_training_gpu.measure(s, "local", {"ours, bf16": sides["ours, bf16"]}, expected=1e-3))
    assert [r["failed"].partition(" is ")[0] for r in records] == ["AssertionError: the first loss"]


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu_report.sh"


def report(*arguments: Any, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def steps(folder: Path) -> dict[str, int]:
    """Name → exit status, of the report's first table."""
    rows = [line.split("|") for line in (folder / "report.md").read_text().splitlines() if line.endswith(" |")]
    return {row[1].strip(): int(row[2]) for row in rows if row[2].strip().isdigit() and len(row) == 5}


def stand_in(folder: Path, kernels: str, training: str) -> Path:
    """A program in Python's place that only does, step by step, what it is told."""
    python = folder / "python"
    python.write_text(
        f"""#!/bin/bash
        out={folder / "out"}
        case "$*" in
            *nvidia-smi*) echo "fla missing"; echo "commit ${{@: -1}}" ;;
            *--sweep*) echo '{{}}' > $out/sweep.jsonl ;;
            *bench_kernels_gpu*) {kernels} ;;
            *pytest*kernels_triton*) echo "12 passed" ;;
            *bench_training_gpu*) {training} ;;
        esac
        """
    )
    python.chmod(0o755)
    return python


def test_a_step_that_fails_stops_no_other(tmp_path):
    python = stand_in(tmp_path, 'echo "| a kernel |" > $out/kernels.md; exit 3', 'echo "no module"; exit 1')
    done = report(tmp_path / "out", python, COMMIT="abcdef")
    assert done.returncode == 3, done.stderr
    expected = {"machine": 0, "kernels": 3, "tests": 0, "training": 1, "graphs": 0, "sweep": 0}
    assert expected.items() <= steps(tmp_path / "out").items()
    log = (tmp_path / "out/log.txt").read_text()
    assert "commit abcdef" in log
    assert log.index("===== machine") < log.index("===== training") < log.index("no module")
    assert "12 passed" in done.stdout
    assert "| a kernel |" in (tmp_path / "out/report.md").read_text()


def test_without_a_folder_to_write_into_nothing_is_removed_or_run(tmp_path):
    removed = tmp_path / "removed"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/rm").write_text(f'#!/bin/bash\necho "$@" >> {removed}\n')
    (tmp_path / "bin/rm").chmod(0o755)
    (tmp_path / "file").touch()
    wrong = {
        (): "usage: gpu_report.sh",
        (tmp_path / "file", "/bin/true"): "File exists",
        (tmp_path / "out", "/bin/true", tmp_path / "no_wheels"): "No such file",
    }
    for arguments, reason in wrong.items():
        done = report(*arguments, SECONDS_LEFT="0", LC_ALL="C", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        assert not removed.exists(), removed.read_text()
        assert done.returncode != 0
        assert reason in done.stderr


def test_the_report_ends_within_nine_minutes_in_at_most_eight_files(tmp_path):
    left = re.search(r"SECONDS_LEFT:-(\d+)", SCRIPT.read_text())
    assert left is not None
    assert int(left[1]) + 5 < 9 * 60  # the last step may take five seconds to end
    python = stand_in(
        tmp_path,
        "touch $out/kernels.jsonl $out/kernels.md; exec sleep 60",
        "touch $out/training.jsonl $out/training.md $out/overhead.json",
    )
    begun = time.monotonic()
    done = report(tmp_path / "out", python, SECONDS_LEFT="3")
    assert time.monotonic() - begun < 15
    assert done.returncode == 124
    assert steps(tmp_path / "out") == {"machine": 0} | dict.fromkeys(
        ("kernels", "tests", "training", "graphs", "sweep"), 124
    )
    assert "no time was left" in (tmp_path / "out/log.txt").read_text()
    report(tmp_path / "out", python, SECONDS_LEFT="30", PATH=f"{without_sleep(tmp_path)}:{os.environ['PATH']}")
    assert len(list((tmp_path / "out").iterdir())) == 8


def without_sleep(folder: Path) -> Path:
    (folder / "bin").mkdir()
    (folder / "bin/sleep").symlink_to("/bin/true")
    return folder / "bin"


def test_the_machine_is_described_where_nvidia_smi_is_not(tmp_path):
    machine = re.search(r"^machine='\n(.*?)^'", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert machine is not None
    code = "import shutil; shutil.which = lambda name: None\n" + machine[1]
    done = subprocess.run([sys.executable, "-c", code, "abc"], capture_output=True, text=True, check=False)
    assert "\nfla " in done.stdout, done.stderr
    assert torch.cuda.is_available() or "torch sees no GPU" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present, so the full report would start")
def test_only_what_is_missing_is_unpacked_and_nothing_is_measured_without_a_gpu(tmp_path):
    for name in ("torch", "not_to_be_found_elsewhere"):
        with zipfile.ZipFile(tmp_path / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
            about = f"{name}-99.0.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    done = report(tmp_path / "out", sys.executable, tmp_path)
    assert done.returncode == 1
    assert "nothing was measured" in done.stderr
    assert steps(tmp_path / "out") == {"packages": 0, "machine": 1}
    assert "torch sees no GPU" in (tmp_path / "out/log.txt").read_text()  # also where there is no nvidia-smi
    unpacked = (tmp_path / "out/log.txt").read_text()
    assert "not_to_be_found_elsewhere" in unpacked
    assert "torch-99.0" not in unpacked


def test_the_kernels_need_torch_triton_and_numpy_alone():
    blocked = ("pydantic", "transformers", "transformer_lens", "yaml", "safetensors", "typer", "rich", "wandb")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); " + (
        "import benchmarks.bench_kernels_gpu, e2e_fast.sae, e2e_fast.optimizer, e2e_fast.kernels.triton.jump_relu"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
