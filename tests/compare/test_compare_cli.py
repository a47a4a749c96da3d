"""``e2e-fast compare`` prints and writes what `compare_dictionaries` finds, and says in one line what is wrong."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from e2e_fast import cli
from e2e_fast.compare import compare_dictionaries, match_dictionaries

sys.path.insert(0, str(Path(__file__).parent))
import families


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    A, B = families.planted(60, 80, 8)
    for name, rows in (("a", A), ("b", B), ("[odd] <name>", A[:30]), ("wide", np.eye(9))):
        np.save(tmp_path / f"{name}.npy", rows)
    return [str(tmp_path / f"{name}.npy") for name in ("a", "b", "[odd] <name>", "wide")]


def test_the_tables_name_every_dictionary_and_pair(
    files: list[str], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert command("compare", *files) == 0
    printed = capsys.readouterr().out
    assert "[odd] <name>" in printed
    for text in ("1 → 2", "1 → 3", "2 → 3", "exact", "the same width can be compared: 1, 2, 3 (d = 8); 4 (d = 9)"):
        assert text in printed
    assert "…" not in printed, "eighty columns suffice"
    assert f"{match_dictionaries(*files[:2]).mean:.3f}" in printed


def test_json_and_files_hold_the_functions_numbers(
    files: list[str], tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    arguments = ("--json", "--out", str(out), "--pairs", "--name", "x", "--name", "y", "--threads", "1")
    assert command("compare", *files[:2], *arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "compare.json").read_text())
    found = compare_dictionaries({"x": files[0], "y": files[1]}, threads=1)
    assert printed["pairs"][0]["total"] == found.pairs[0].matching.total
    assert printed["dictionaries"] == json.loads(json.dumps(found.summary()["dictionaries"]))
    assert printed["within_differences"][0]["low"] == found.differences["x", "y"][1]
    with (out / "pairs_1_2.csv").open() as file:
        assert [int(row["col"]) for row in csv.DictReader(file)] == found.pairs[0].matching.cols.tolist()


@pytest.mark.parametrize(
    ("take", "arguments", "message"),
    [
        (1, [], "at least two dictionaries, got 1"),
        (2, ["--pairs"], "--pairs needs --out"),
        (2, ["--name", "a"], "there must be a name for each of the 2 runs and dictionaries, got 1"),
        (2, ["--name", "a", "--name", "a"], "names must differ, got a, a"),
        (2, ["nowhere"], "no such file or folder: nowhere"),
        (2, ["--which", "encoder"], "a: which='encoder' needs encoder weights"),
        (2, ["NAN"], "broken: the dictionary must be finite, but has NaN or infinite entries in 1 rows: 3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    files: list[str], take: int, arguments: list[str], message: str, tmp_path: Path,
    command: Callable[..., int], capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    broken = np.eye(8)
    broken[3, 1] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    arguments = [str(tmp_path / "broken.npy") if argument == "NAN" else argument for argument in arguments]
    assert command("compare", *files[:take], *arguments) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
