import json

import pytest
import torch

from benchmarks import bench_kernels_gpu


def test_the_gpu_benchmark_runs_every_operator_on_little_tensors(tmp_path):
    records = bench_kernels_gpu.main(["--tiny", "--out", str(tmp_path), "--rep-ms", "1"])
    assert [r for r in records if "failed" in r] == []
    ours = [r for r in records if r["provider"] == "ours"]
    assert {r["operator"] for r in ours} >= {"linear_kl + gradient", "encode_topk", "decode + backward", "SAE step"}
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
