"""What measures on a GPU, run on little tensors: the benchmarks, and the report's time limits."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
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


def test_the_training_benchmark_runs_every_way_on_little_tensors(tmp_path, capsys):
    pytest.importorskip("transformers", reason="the language model of the training benchmark")
    bench_training_gpu = importlib.import_module("benchmarks.bench_training_gpu")
    records = bench_training_gpu.main(["--tiny", "--out", str(tmp_path)])
    assert [r["kind"] for r in records] == ["local"] * 5 + ["e2e"] * 5
    assert all(r["ms"] > 0 and r["peak_mb"] >= 0 for r in records)
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 10
    assert (tmp_path / "training.md").read_text().count("\n| ") == 11
    kinds = [row["kind"] for row in json.loads((tmp_path / "overhead.json").read_text())]
    assert kinds == ["local", "e2e", "e2e+downstream", "schedule"]
    assert "x local" in capsys.readouterr().out


def test_the_report_ends_within_nine_minutes():
    script = (Path(__file__).resolve().parents[2] / "benchmarks/gpu_report.sh").read_text()
    limits = [int(seconds) for seconds in re.findall(r'^ *step "[a-z ]+" (\d+) ', script, re.MULTILINE)]
    assert len(limits) == 8
    assert sum(limits) < 9 * 60 - 5


def test_the_kernels_need_torch_triton_and_numpy_alone():
    blocked = ("pydantic", "transformers", "transformer_lens", "yaml", "safetensors", "typer", "rich", "wandb")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); " + (
        "import benchmarks.bench_kernels_gpu, e2e_fast.sae, e2e_fast.optimizer, e2e_fast.kernels.triton.jump_relu"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
