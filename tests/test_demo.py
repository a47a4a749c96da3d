"""The demo trains, evaluates and compares, and leaves a table, a picture and a page that agree."""

import json
from pathlib import Path

import pytest

from e2e_fast import demo


def test_the_demo_leaves_a_table_a_picture_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RUNS", [demo.RUNS[0], demo.RUNS[2]])
    monkeypatch.setattr(demo, "HELDOUT_SAMPLES", 4)
    results = demo.run_demo(tmp_path, samples=8)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "report.html").read_text()
    for result in results:
        assert f"<td>{result['L0']:.1f}</td><td>{result['CE increase']:.4f}</td>" in page
        assert f"{result['kind']} {result['sparsity coeff']:g}" in page
    assert "on 4 sequences of held-out files" in page
    assert f"e2e-fast demo --samples 8 --out {tmp_path}" in page
