"""The report is one page that needs nothing else, shows the runs' own numbers, and says why one is missing."""

import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from tiny import AT, LAST

import e2e_fast
from e2e_fast import cli, formats
from e2e_fast.compare import compare_dictionaries, match_dictionaries, nearest_others
from e2e_fast.compare.dictionaries import recorded_alive
from e2e_fast.report import write_report
from e2e_fast.report.page import read_entries
from e2e_fast.report.plots import inline_svg
from e2e_fast.report.runs import Evaluation, Missing, evaluated, expanded, read_record

ODD = """<b>"x" & 'y'"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and tokens on disk, and two runs: local without an evaluation, e2e with one."""
    work = tmp_path_factory.mktemp("work")
    tiny.gpt2().save_pretrained(work / "model")
    np.save(work / "tokens.npy", tiny.tokens().astype(np.uint16))
    data = {"dataset_name": str(work / "tokens.npy"), "tokenizer_name": "none", "split": "train", "n_ctx": tiny.N_CTX}
    common = {
        "tlens_model_name": None,
        "tlens_model_path": str(work / "model"),
        "train_data": data,
        "collect_act_frequency_every_n_samples": 48,
        "act_frequency_n_tokens": 256,
    }
    local = {"loss": tiny.loss(out_to_in={"coeff": 1.0}), "wandb_run_name": ODD}
    e2e = {"eval_data": data, "eval_every_n_samples": 24, "eval_n_samples": 8, "seed": 1}
    for name, changes in (("local", local), ("e2e", e2e)):
        e2e_fast.train(tiny.settings(work / "runs" / name, **common, **changes), quiet=True)
    return work


def only(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def runs(work: Path) -> tuple[Path, Path]:
    return only(work / "runs" / "local"), only(work / "runs" / "e2e")


class Page(HTMLParser):
    """Tags that open and close, text, ids and links of a page; fails where they do not fit."""

    VOID = ("meta", "br", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_stands_alone(text: str) -> Page:
    page = Page(text)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert "script" not in page.tags
    assert "://" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{i}" for i in page.ids}
    return page


SECTIONS = ["what", "quality", "curves", "within", "between", "definitions", "origin"]


def test_the_page_stands_alone_and_shows_the_runs_own_numbers(
    work: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    np.save(tmp_path / "other.npy", np.eye(5))
    np.save(tmp_path / "plain.npy", np.random.default_rng(0).standard_normal((20, 32)))
    sources = [*runs, tmp_path / "plain.npy", tmp_path / "other.npy"]
    path = write_report(sources, tmp_path / "deep" / "report.html", command=f"make {ODD}")
    text = path.read_text()
    page = check_stands_alone(text)
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    assert ODD not in text
    assert html.escape(ODD) in text
    # Each number of the last evaluation that the run recorded.
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "performance/eval/difference_ce_loss" in row)
    for value in (
        f"{last[f'sparsity/eval/L_0/{AT}']:.1f}",
        f"{-last['performance/eval/difference_ce_loss']:.4f}".replace("-", "−"),
        f"{last['loss/eval/logits_kl']:.4f}",
        f"{last[f'loss/eval/out_to_in/explained_variance/{AT}']:.3f}".replace("-", "−"),
    ):
        assert f"<td>{value}</td>" in text
    assert "in training, on 8 sequences of its eval_data, after 48 sequences" in text
    assert "no evaluation was recorded" in text
    # The geometry is that of the functions, on the features that the runs found alive.
    alive = [np.isin(np.arange(96), record_alive(run)) for run in runs]
    m = match_dictionaries(*runs, alive=(alive[0], alive[1]))
    assert f"<td>{m.mean:.3f}</td><td>{m.null_mean:.3f}</td>" in text
    assert f"<td>{np.nanmean(nearest_others(runs[0], alive=alive[0]).similarity):.3f}</td>" in text
    assert "1, 2, 3 (d = 32); 4 (d = 5)" in text
    assert text.count("<svg") == 1 + 3 + 4 + 3  # the front, the curves, each within, every two of equal width


def record_alive(run: Path) -> list[int]:
    return json.loads((run / "summary.json").read_text())[f"sparsity/alive_dict_elements_indices_final/{AT}"]


def test_what_runs_recorded_is_read(runs: tuple[Path, Path]) -> None:
    local, e2e = (read_record(run) for run in runs)
    assert (local.kind, e2e.kind) == ("local", "e2e")
    assert local.coefficients == {"sparsity": 0.2, "MSE": 1.0}
    assert local.samples == 48
    assert local.tokens == 48 * tiny.N_CTX
    assert local.alive(AT) == len(record_alive(runs[0]))
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert local.tokens_per_second == summary["timed_tokens"] / summary["seconds"]
    assert local.comparable_speed == e2e.comparable_speed
    assert isinstance(local.evaluation, Missing)
    assert isinstance(e2e.evaluation, Evaluation)


def test_an_evaluation_is_made_where_none_was_recorded(runs: tuple[Path, Path]) -> None:
    local, e2e = (evaluated(read_record(run), 8) for run in runs)
    assert isinstance(local.evaluation, Evaluation)
    assert local.evaluation.origin == "by this report on 8 sequences of its train_data, having no eval_data"
    expected = e2e_fast.evaluate(e2e_fast.SAETransformer.from_local_path(runs[0]), tiny.tokens()[:8], batch_size=4)
    drawn = local.metric("performance/eval/orig_model_ce_loss")
    assert isinstance(drawn, float)
    assert drawn == pytest.approx(expected["performance/eval/orig_model_ce_loss"], rel=0.05)
    assert e2e.evaluation == read_record(runs[1]).evaluation


def test_a_fine_tune_in_another_librarys_format_is_a_run_too(work: Path, runs: tuple[Path, Path]) -> None:
    sae = formats.write(formats.read(runs[0]), work / "theirs" / "sae", "sae_lens")
    changes: dict[str, Any] = {"collect_act_frequency_every_n_samples": 8, "act_frequency_n_tokens": 64}
    data = read_record(runs[0]).config.train_data.model_dump()
    tuned = e2e_fast.finetune(
        sae, 8, lm=str(work / "model"), sparsity=0.2, quiet=True, train_data=data, **changes
    ).folder
    assert tuned is not None
    record = read_record(tuned)
    assert (record.kind, record.file.name, record.positions) == ("balanced", "sae_weights.safetensors", (AT,))
    assert record.samples == 8
    alive = recorded_alive(tuned)
    assert alive is not None
    assert record.alive(AT) == len(alive)
    settings = {"tlens_model_path": str(work / "model"), "tlens_model_name": None}
    record = evaluated(replace(record, config=record.config.replace(**settings)), 8)
    assert isinstance(record.metric("loss/eval/logits_kl"), float)


def test_a_run_that_cannot_be_evaluated_says_why(runs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = yaml.safe_load((runs[0] / "final_config.yaml").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "final_config.yaml").write_text(yaml.safe_dump(settings | {"tlens_model_path": str(tmp_path / "none")}))
    (moved / "samples_48.safetensors").write_bytes((runs[0] / "samples_48.safetensors").read_bytes())
    record = evaluated(read_record(moved), 8)
    assert isinstance(record.evaluation, Missing)
    assert record.evaluation.reason.startswith("it could not be evaluated: ")
    assert isinstance(record.tokens_per_second, Missing)
    text = write_report([moved], tmp_path / "report.html", eval_samples=8).read_text()
    page = check_stands_alone(text)
    # One dictionary has nothing to be compared with, and a run without history no curves.
    assert [i for i in page.ids if i in SECTIONS] == ["what", "quality", "definitions", "origin"]
    assert "it could not be evaluated" in text
    assert "the folder holds no summary.json" in text


def test_axes_say_the_numbers_that_they_were_drawn_with() -> None:
    ticks = [0.0, 0.005, 0.0125, 1.2345]

    def draw(axes: Any) -> None:
        axes.set_yticks(ticks, [str(tick) for tick in ticks])

    svg = inline_svg(draw, "ticks")
    assert set(map(str, ticks)) <= set(re.findall(r">([^<>]+)</text>", svg))


def test_the_saes_of_one_run_are_entries_of_their_own_and_a_sweep_is_its_members(tmp_path: Path) -> None:
    saes = {"sae_positions": [AT, LAST], "dict_size_to_input_ratio": 1.0}
    config = tiny.settings(tmp_path, n_samples=8, saes=saes, sweep={"seed": [0, 1]})
    e2e_fast.train(config, lm=tiny.gpt2(), tokens=tiny.tokens(), quiet=True)
    folder = only(tmp_path)
    assert [Path(p).name for p in expanded([folder])] == ["seed-0", "seed-1"]
    entries = read_entries([folder])
    assert [entry.name for entry in entries] == [f"seed-{i} · {p}" for i in (0, 1) for p in (AT, LAST)]
    assert entries[0].record is not None
    assert entries[0].record.tokens_per_second == Missing("trained in a sweep of 2, whose time is shared")
    of_all = Evaluation({"performance/eval/difference_ce_loss": -0.1, f"sparsity/eval/L_0/{AT}": 3.0}, "here")
    for sources in ([folder], [f"{folder}/seed-0::{AT}", f"{folder}/seed-1::{AT}"]):
        evaluations = dict.fromkeys([entry.source for entry in read_entries(sources)], of_all)
        text = write_report(sources, tmp_path / "report.html", evaluations=evaluations).read_text()
        check_stands_alone(text)
        assert "CE increase against L0" not in text, "the increase is that of both SAEs of a run"
    text = write_report([folder], tmp_path / "report.html").read_text()
    first, second = (f"{folder}/{name}::{AT}" for name in ("seed-0", "seed-1"))
    assert f"<td>{match_dictionaries(first, second).mean:.3f}</td>" in text
    assert "Of the same seed and size" not in text


def test_the_command_writes_the_page_with_itself_in_it(
    runs: tuple[Path, Path], tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    arguments = [*map(str, runs), "--out", str(out), "--eval", "4", "--name", "same", "--name", ODD]
    assert command("report", *arguments) == 0
    assert capsys.readouterr().out.strip() == f"written {out}"
    text = out.read_text()
    check_stands_alone(text)
    assert html.escape("e2e-fast report ") in text
    assert "by this report on 4 sequences" in text
    assert html.escape(ODD) in text


def test_compare_takes_a_folder_of_runs_as_the_report_does(
    work: Path, runs: tuple[Path, Path], tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    for run, name in zip(runs, ("<b> ü", "e2e"), strict=True):
        shutil.copytree(run, folder / name)
    (folder / "begun").mkdir()
    shutil.copy(runs[0] / "final_config.yaml", folder / "begun")
    np.save(tmp_path / "plain.npy", np.eye(32))
    assert command("compare", str(folder), str(tmp_path / "plain.npy"), "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.strip().endswith(f"left out, having no weights yet: {folder / 'begun'}")
    printed = json.loads(captured.out)
    names = [one["name"] for one in printed["dictionaries"]]
    assert (
        names == ["<b> ü", "e2e", "plain"] == [entry.name for entry in read_entries([folder, tmp_path / "plain.npy"])]
    )
    assert printed["dictionaries"][0]["used"] == len(record_alive(runs[0])), "what the run recorded counts"
    assert (
        printed["pairs"][0]["total"] == compare_dictionaries(dict(zip("ab", runs, strict=True))).pairs[0].matching.total
    )
    assert command("report", str(folder), "--out", str(tmp_path / "page.html")) == 0
    assert "left out, having no weights yet" in capsys.readouterr().err
    for name in names[:2]:
        shutil.rmtree(folder / name)
    assert command("compare", str(folder)) == cli.EXIT_BAD_INPUT
    assert f"{folder} holds runs, none of which has weights yet: begun" in capsys.readouterr().err


def broken_history(runs: tuple[Path, Path], folder: Path) -> Path:
    for name in ("final_config.yaml", "samples_48.safetensors"):
        (folder / name).write_bytes((runs[0] / name).read_bytes())
    (folder / "metrics.jsonl").write_text('{"samples": 4}\n{"samples"')
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such file or folder: nowhere"),
        (["RUN", "NAN"], "nan: the dictionary must be finite"),
        (["RUN", "EMPTY"], "must hold one file of weights, found []"),
        (["EMPTY"], "must hold one file of weights, found []"),
        (["HISTORY"], "line 2, is no JSON"),
        (["RUN::blocks.9.hook_resid_pre"], "holds no SAE 'blocks.9.hook_resid_pre'"),
        (["RUN", "--name", "a", "--name", "b"], "a name for each of the 1 runs and dictionaries, got 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, runs: tuple[Path, Path], tmp_path: Path,
    command: Callable[..., int], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    np.save(tmp_path / "nan.npy", np.full((3, 32), np.nan))
    for name in ("empty", "history"):
        (tmp_path / name).mkdir()
    places: dict[str, Any] = {
        "RUN": runs[1],
        "NAN": tmp_path / "nan.npy",
        "EMPTY": tmp_path / "empty",
        "HISTORY": broken_history(runs, tmp_path / "history"),
    }
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    assert command("report", *arguments, "--out", str(tmp_path / "page.html")) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "page.html").exists()
