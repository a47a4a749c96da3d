"""``e2e-fast match`` prints the certificate, writes the pairs, draws the picture, and says what is wrong."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from typer.testing import CliRunner

from e2e_fast.compare import match_dictionaries
from e2e_fast.compare.cli import match
from e2e_fast.compare.plot import plot_matching
from e2e_fast.report.plots import draw_similarities

sys.path.insert(0, str(Path(__file__).parent))
import families

app = typer.Typer()
app.command()(match)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    for name, side in zip("ab", families.planted(120, 150, 16), strict=True):
        np.save(tmp_path / f"{name}.npy", side)
    return str(tmp_path / "a.npy"), str(tmp_path / "b.npy")


def test_table_states_the_certificate(files: tuple[str, str]):
    result = CliRunner().invoke(app, [*files])
    assert result.exit_code == 0, result.output
    assert "optimal over all pairs (proven)" in result.output
    assert "120 pairs of 120 × 150 features" in result.output


def test_json_holds_the_matchings_numbers(files: tuple[str, str]):
    result = CliRunner().invoke(app, [*files, "--json", "--precision", "float32", "--threads", "1"])
    assert result.exit_code == 0, result.output
    printed, m = json.loads(result.stdout), match_dictionaries(*files)
    assert printed["total"] == m.total
    assert printed["certified"] is True
    assert printed["unmatched"] == [0, 30]
    assert printed["mutual"] == len(m.mutual)
    assert printed["stats"]["precision"] == "float32"


def test_pairs_are_written_as_csv_and_npz(files: tuple[str, str], tmp_path: Path):
    m = match_dictionaries(*files)
    for suffix in (".csv", ".npz"):
        result = CliRunner().invoke(app, [*files, "--json", "--pairs", str(tmp_path / f"pairs{suffix}")])
        assert result.exit_code == 0, result.output
    with (tmp_path / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["col"]) for row in rows] == m.cols.tolist()
    assert [float(row["similarity"]) for row in rows] == m.similarity.tolist()
    with np.load(tmp_path / "pairs.npz") as saved:
        assert np.array_equal(saved["row"], m.rows)
        assert saved["upper_bound"] == m.upper_bound


def test_picture_is_drawn(files: tuple[str, str], tmp_path: Path):
    result = CliRunner().invoke(app, [*files, "--plot", str(tmp_path / "plot.png")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_no_pair_is_missing_from_the_pictures():
    """A row's cosine with its copy may exceed 1 by rounding, and random directions' may lie below all others."""
    rows = np.random.default_rng(0).standard_normal((200, 20))
    m, null = match_dictionaries(rows, rows), match_dictionaries(*families.negative(40, 40, 3))
    assert m.similarity.max() > 1
    assert null.similarity.max() < 0
    drawn = plot_matching(m, null).axes[0]
    filled = sum(bar.get_height() for bar in drawn.containers[0])
    assert filled == 200
    outlined = [shape for shape in drawn.patches if isinstance(shape, Polygon)]
    assert min(shape.get_xy()[:, 0].min() for shape in outlined) == pytest.approx(null.similarity.min())
    axes = Figure().add_subplot()
    draw_similarities(axes, m.similarity, "pairs", random=null.similarity)
    for shape in axes.patches:
        assert isinstance(shape, Polygon)
        edges, heights = shape.get_xy().T
        steps = np.diff(edges) > 0
        assert heights[1:][steps].sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "pairs.txt"], "must end in one of"),
        (["--precision", "fp4"], "precision must be"),
        (["--which", "encoder"], "needs encoder"),
    ],
)
def test_wrong_arguments_are_named(files: tuple[str, str], arguments: list[str], message: str):
    result = CliRunner().invoke(app, [*files, *arguments], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert result.exit_code == 2
    assert message in result.output


def test_a_picture_without_pairs_is_refused(files: tuple[str, str], tmp_path: Path):
    np.save(tmp_path / "zero.npy", np.zeros((5, 16)))
    result = CliRunner().invoke(app, [files[0], str(tmp_path / "zero.npy"), "--plot", str(tmp_path / "plot.png")])
    assert result.exit_code == 2
    assert "no pair was matched, so there is nothing to draw" in result.stderr


def test_missing_file_is_named(files: tuple[str, str]):
    with pytest.raises(FileNotFoundError, match="no such file or folder: nowhere.npy"):
        CliRunner().invoke(app, [files[0], "nowhere.npy"], catch_exceptions=False)
