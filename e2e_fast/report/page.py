"""One HTML page about a set of runs and dictionaries: what they are, how well they do, how alike they are.

The page is one file: tables and pictures stand in it, nothing is loaded, no script runs. All that comes from files is
escaped. A number that a run does not have is a dash with a note that says why. What the numbers mean: docs/compare.md.

>>> import tempfile, torch
>>> folder = Path(tempfile.mkdtemp())
>>> for name in "ab":
...     torch.save(torch.randn(40, 8), folder / f"{name}.pt")
>>> path = write_report([folder / "a.pt", folder / "b.pt"], folder / "report.html")
>>> "<h2" in path.read_text()
True
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from e2e_fast.compare import Comparison, compare_dictionaries, match_dictionaries, read_dictionary
from e2e_fast.compare.comparison import Pair, Within
from e2e_fast.formats import layouts
from e2e_fast.report import markup, plots
from e2e_fast.report.runs import (
    CE,
    EV_IN,
    EV_LATER,
    Evaluation,
    Missing,
    RunRecord,
    evaluated,
    is_run,
    named_dictionaries,
    read_record,
)

MAX_PICTURES = 36
"""Pairs whose similarities are drawn; the tables hold all."""
MAX_POINTS = 400
"""Of a training curve."""


@dataclass(frozen=True)
class Entry:
    """A dictionary of the report: one SAE of a run, or a file's."""

    name: str
    source: str
    record: RunRecord | None = None
    position: str = ""
    """Of the run's SAE."""

    @property
    def kind(self) -> str:
        return "" if self.record is None else self.record.kind

    @property
    def short(self) -> str:
        """Its name; of a run with a long one, what it is."""
        if self.record is None or len(self.name) <= 40:
            return self.name
        return f"{self.kind}, sparsity {self.record.config.loss.sparsity.coeff:g}, seed {self.record.config.seed}"


def write_report(
    sources: Sequence[str | Path],
    path: str | Path = "report.html",
    *,
    names: Sequence[str] | None = None,
    eval_samples: int | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    threads: int | None = None,
    title: str = "Sparse dictionaries compared",
    command: str = "",
    on_progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes the page and returns its path.

    sources: run folders, folders of run folders, and whatever `compare.read_dictionary` takes as a path, which then is
    in the geometric part alone. names: one for each, once folders of runs are replaced by the runs. eval_samples:
    evaluate the runs that recorded no evaluation on so many sequences. evaluations: source → an evaluation that takes
    the place of the run's own. command: what produced the page, printed in it.

    Raises ValueError and FileNotFoundError for sources that cannot be read, and for no source.
    """
    tell = on_progress or (lambda text: None)
    entries = read_entries(sources, names)
    records = {}
    for entry in entries:
        if entry.record is None or entry.record.file in records:
            continue
        record = entry.record
        if given := (evaluations or {}).get(entry.source):
            record = replace(record, evaluation=given)
        elif eval_samples is not None:
            tell(f"{entry.name}: evaluating")
            record = evaluated(record, eval_samples)
        records[entry.record.file] = record
    entries = [
        entry if entry.record is None else replace(entry, record=records[entry.record.file]) for entry in entries
    ]
    comparison = None
    if len(entries) > 1:
        comparison = compare_dictionaries(
            {entry.name: entry.source for entry in entries}, threads=threads, on_progress=tell
        )
    elif entries[0].record is None:
        read_dictionary(entries[0].source)  # the page shows nothing of it, so nothing else would find it unreadable
    tell("drawing")
    text = render(entries, comparison, title=title, command=command, threads=threads)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read_entries(sources: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Entry]:
    """The dictionaries that the sources hold, each with its run's record; those of a run with several SAEs apart."""
    if not sources:
        raise ValueError("a report needs at least one run or dictionary, got none")
    entries = []
    for name, source in named_dictionaries(sources, names).items():
        if not is_run(source):
            entries.append(Entry(name, source))
            continue
        record, (_, chosen) = read_record(source), layouts.split_name(source)
        entries.append(Entry(name, source, record, chosen.replace("-", ".") if chosen else record.positions[0]))
    return entries


def render(
    entries: Sequence[Entry],
    comparison: Comparison | None,
    *,
    title: str = "Sparse dictionaries compared",
    command: str = "",
    threads: int | None = None,
) -> str:
    """The page's text; ``comparison`` is that of the entries under their names, None for a single one."""
    sections = [_overview(entries, comparison), *_quality(entries)]
    if comparison is not None:
        sections += [_within(entries, comparison), _between(entries, comparison, threads)]
    sections += [_definitions(entries, comparison), _origin(command)]
    return markup.page(title, sections)


# ------------------------------------------------------------------------------------------------------------ sections


def _overview(entries: Sequence[Entry], comparison: Comparison | None) -> markup.Section:
    """What each is; settings that all runs share are named once."""
    within = {one.name: one for one in comparison.dictionaries} if comparison is not None else {}
    notes = markup.Notes()
    rows = []
    for entry in entries:
        row: dict[str, Any] = {"name": entry.name}
        if (record := entry.record) is not None:
            row |= _settings(record, entry.position)
        if (one := within.get(entry.name)) is not None:
            row |= {"features": one.n, "width d": one.d}
            row["used here"] = one.used
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    runs = [row for entry, row in zip(entries, rows, strict=True) if entry.record is not None]
    common = {
        column: runs[0][column]
        for column in columns
        if len(runs) > 1 and column in runs[0] and column not in _OWN and _all_same(row.get(column) for row in runs)
    }
    reason = Missing("not a run folder, so its training is not known")
    table = markup.table(
        ["", *(column for column in columns if column not in common)],
        [
            [str(i), *(notes.cell(row.get(column, reason)) for column in columns if column not in common)]
            for i, row in enumerate(rows, start=1)
        ],
        left=("kind", "position", "model", "coefficients", "device", "e2e_fast", "torch"),
    )
    shared = ""
    if common:
        items = " · ".join(f"{markup.text(name)} <b>{notes.cell(value)}</b>" for name, value in common.items())
        shared = f"<p>The same in all runs: {items}.</p>"
    return markup.Section("what", "What is compared", table + notes.html() + shared)


_OWN = ("name", "features", "width d", "used here")
"""Columns of the overview that stay even where all runs agree."""


def _settings(record: RunRecord, position: str) -> dict[str, Any]:
    config, saes = record.config, record.config.saes
    unknown = Missing("the folder holds no summary.json, which a run writes at its end")
    activation = saes.activation or "relu"
    return {
        "kind": record.kind,
        "coefficients": ", ".join(f"{name} {coeff:g}" for name, coeff in record.coefficients.items()),
        "activation": activation if saes.k is None else f"{activation}, k = {saes.k}",
        "seed": str(config.seed),
        "sequences": record.samples,
        "tokens": record.tokens,
        "alive": record.alive(position),
        "model": config.model,
        "position": position,
        "learning rate": f"{config.lr:g}",
        "context length": str(config.train_data.n_ctx),
        "device": record.summary.get("device", unknown),
        "e2e_fast": record.summary.get("e2e_fast", unknown),
        "torch": record.summary.get("torch", unknown),
    }


def _quality(entries: Sequence[Entry]) -> list[markup.Section]:
    """Metrics and their pictures, of the entries that are runs."""
    runs = [(i, entry, entry.record) for i, entry in enumerate(entries, start=1) if entry.record is not None]
    if not runs:
        return []
    notes = markup.Notes()
    measured = [record.evaluation.metrics for _, _, record in runs if isinstance(record.evaluation, Evaluation)]
    later = sorted({place for metrics in measured for place in _later(metrics)}, key=_by_layer)
    rows = []
    for i, entry, record in runs:
        increase = record.metric(CE)
        rows.append(
            [
                str(i),
                notes.cell(entry.kind),
                notes.cell(record.metric(f"sparsity/eval/L_0/{entry.position}"), "{:.1f}"),
                notes.cell(increase if isinstance(increase, Missing) else -increase, "{:.4f}"),
                notes.cell(record.metric("loss/eval/logits_kl"), "{:.4f}"),
                notes.cell(record.metric(EV_IN + entry.position), "{:.3f}"),
                *(notes.cell(_later_value(record, place), "{:.3f}") for place in later),
                notes.cell(record.tokens_per_second, "{:,.0f}"),
                notes.cell(_overhead(record, [r for _, _, r in runs]), "{:.2f}×"),
            ]
        )
    head = ["", "kind", "L0", "CE increase", "KL", "EV at the SAE"]
    head += [f"EV {place}" for place in later]
    table = markup.table([*head, "tokens/s", "time vs local"], rows, left=("kind",))
    origins: dict[str, list[str]] = {}
    for i, _, record in runs:
        if isinstance(record.evaluation, Evaluation):
            origins.setdefault(record.evaluation.origin, []).append(str(i))
    told = "".join(
        f"<li>{'all' if len(who) == len(runs) else ', '.join(who)}: evaluated {markup.text(origin)}</li>"
        for origin, who in origins.items()
    )
    content = table + notes.html() + (f"<ul>{told}</ul>" if told else "") + markup.figures([_pareto(runs)])
    sections = [markup.Section("quality", "How well the model is kept", content)]
    if curves := _curves(runs):
        sections.append(markup.Section("curves", "Training", curves))
    return sections


def _later(metrics: Mapping[str, float]) -> dict[str, float]:
    """Explained variance at later positions; what leaves a block is called by the block that it enters."""
    found = {}
    for key, value in metrics.items():
        if key.startswith(EV_LATER):
            place = key.removeprefix(EV_LATER)
            if stream := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", place):
                place = f"into block {int(stream[1]) + (stream[2] == 'post')}"
            found[place] = value
    return found


def _later_value(record: RunRecord, place: str) -> float | Missing:
    if isinstance(record.evaluation, Missing):
        return record.evaluation
    return _later(record.evaluation.metrics).get(place, Missing("not among the positions that were evaluated"))


def _by_layer(place: str) -> list[Any]:
    return [*map(int, re.findall(r"\d+", place)), place]


def _overhead(record: RunRecord, all_of_them: Sequence[RunRecord]) -> float | Missing:
    own = record.tokens_per_second
    if isinstance(own, Missing):
        return own
    local = {
        other.file: 1 / other.tokens_per_second
        for other in all_of_them
        if other.kind == "local"
        and other.comparable_speed == record.comparable_speed
        and not isinstance(other.tokens_per_second, Missing)
    }
    if not local:
        return Missing("no local run of the same sizes on the same device is here")
    return (1 / own) / (sum(local.values()) / len(local))


def _pareto(runs: Sequence[tuple[int, Entry, RunRecord]]) -> tuple[str, str]:
    points: dict[str, list[tuple[float, float]]] = {}
    labels: dict[tuple[float, float], str] = {}
    for i, entry, record in runs:
        l0, increase = record.metric(f"sparsity/eval/L_0/{entry.position}"), record.metric(CE)
        if len(record.positions) > 1 or isinstance(l0, Missing) or isinstance(increase, Missing):
            continue
        points.setdefault(entry.kind, []).append((l0, -increase))
        labels[l0, -increase] = str(i)
    if not points:
        return "", ""
    svg = plots.inline_svg(
        lambda axes: plots.draw_pareto(axes, points, labels), "CE loss increase against L0", size=(5.2, 3.6)
    )
    several = any(len(record.positions) > 1 for _, _, record in runs)
    left_out = " Runs with several SAEs are left out: the increase is that of all of them." if several else ""
    return svg, f"CE increase against L0, numbered as in the tables.{left_out}"


def _curves(runs: Sequence[tuple[int, Entry, RunRecord]]) -> str:
    wanted: list[tuple[str, bool, str, Callable[[Entry, Mapping[str, float]], float | None]]] = [
        ("loss", True, "", lambda entry, row: row.get("loss")),
        ("L0", True, "", lambda entry, row: row.get(f"sparsity/train/L_0/{entry.position}")),
        ("CE increase, nats/token", False, _LOCAL_HAS_NONE, lambda entry, row: _increase(row)),
    ]
    figures = []
    for ylabel, log, caption, of in wanted:
        curves = []
        for i, entry, record in runs:
            points = [(row["samples"], y) for row in record.history if (y := of(entry, row)) is not None]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            if points:
                curves.append((f"{i} {entry.kind}", entry.kind, _thinned(points)))
        if curves:
            draw = partial(plots.draw_curves, curves=curves, ylabel=ylabel, log=log)
            figures.append(
                (plots.inline_svg(draw, f"{ylabel} in training", size=(4.8, 3.1 + 0.1 * len(curves))), caption)
            )
    if not figures:
        return ""
    without = [str(i) for i, _, record in runs if not any("loss" in row for row in record.history)]
    note = f"<p>No curves were recorded of {', '.join(without)}.</p>" if without else ""
    return markup.figures(figures) + note


_LOCAL_HAS_NONE = "Local training does not run the model to its end, so only its evaluations are here, if it had any."


def _increase(row: Mapping[str, float]) -> float | None:
    for split in ("eval", "train"):
        if (value := row.get(f"performance/{split}/difference_ce_loss")) is not None:
            return -value
    return None


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = math.ceil(len(points) / MAX_POINTS)
    return [*points[:-1:step], points[-1]]


def _within(entries: Sequence[Entry], comparison: Comparison) -> markup.Section:
    notes = markup.Notes()
    number = _numbers(entries)
    rows = []
    for one in comparison.dictionaries:
        s = one.summary()
        quantiles = [markup.number(value) for value in s["within_quantiles"].values()]
        dead = Missing("nothing says which features are alive, so all but zero rows are used")
        rows.append(
            [
                number[one.name], f"{one.used:,}", notes.cell(dead if one.dead is None else one.dead), f"{one.zero:,}",
                notes.cell(markup.number(s["within_mean"])), notes.cell(markup.number(s["within_null_mean"])),
                *(notes.cell(value) for value in quantiles),
            ]
        )  # fmt: skip
    head = ["", "features used", "dead", "zero", "mean", "random", "5 %", "25 %", "median", "75 %", "95 %"]
    differences = ""
    if comparison.differences:
        table = markup.table(
            ["", "difference of the means", "95 % interval"],
            [
                [
                    f"{number[a]} − {number[b]}",
                    markup.signed(difference),
                    f"{markup.signed(low)} to {markup.signed(high)}",
                ]
                for (a, b), (difference, low, high) in comparison.differences.items()
            ],
        )
        differences = f"<h3>Differences between the means</h3>{table}"
    figures = [_within_figure(number[one.name], entries, one) for one in comparison.dictionaries if len(one.similarity)]
    content = markup.table(head, rows) + notes.html() + differences + markup.figures(figures)
    return markup.Section("within", "Within each dictionary: the nearest other feature", content)


def _within_figure(number: str, entries: Sequence[Entry], one: Within) -> tuple[str, str]:
    s = one.summary()
    entry = entries[int(number) - 1]
    colour = _colour(entries, entry.kind)
    draw = partial(
        plots.draw_similarities,
        similarity=one.similarity,
        ylabel="features",
        random_mean=s["within_null_mean"],
        colour=colour,
    )
    caption = f"{number} {entry.short}: mean {s['within_mean']:.3f}; dashed: of random directions"
    return plots.inline_svg(draw, f"within {number}", size=(4.0, 2.5)), caption


def _between(entries: Sequence[Entry], comparison: Comparison, threads: int | None) -> markup.Section:
    number = _numbers(entries)
    content = _matrix(entries, comparison)
    if comparison.left_out:
        content += (
            f"<p>Only dictionaries of the same width can be compared: {markup.text(comparison.widths(number))}.</p>"
        )
    content += _same_start(entries)
    if comparison.pairs:
        content += _pair_table(number, comparison)
        nulls: dict[tuple[int, ...], np.ndarray] = {}
        figures = [_pair_figure(number, pair, nulls, threads) for pair in comparison.pairs[:MAX_PICTURES]]
        content += markup.figures([figure for figure in figures if figure[0]])
        if len(comparison.pairs) > MAX_PICTURES:
            content += f"<p>Drawn are the first {MAX_PICTURES} of {len(comparison.pairs)} pairs.</p>"
    return markup.Section("between", "Between dictionaries: matched one to one", content)


def _same_start(entries: Sequence[Entry]) -> str:
    """Names the runs that began with the same weights, part of whose likeness that is."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for i, entry in enumerate(entries, start=1):
        if (record := entry.record) is not None and record.config.saes.pretrained_sae_paths is None:
            config = record.config
            start = (config.seed, config.model, config.saes.sae_positions, config.saes.dict_size_to_input_ratio)
            groups.setdefault((*start, entry.position), []).append(str(i))
    told = "; ".join(", ".join(group) for group in groups.values() if len(group) > 1)
    if not told:
        return ""
    return (
        f"<p>Of the same seed and size: {markup.text(told)}. Unless other weights were given, these runs began with "
        "the same random ones, and part of their likeness is that start, not what they learned.</p>"
    )


def _matrix(entries: Sequence[Entry], comparison: Comparison) -> str:
    """Means above the diagonal, the random ones below, shaded by how much lies between them."""
    pairs = {(pair.a, pair.b): pair.summary() for pair in comparison.pairs}
    names = [entry.name for entry in entries]
    rows = []
    for i, a in enumerate(names):
        cells = [f'<th scope="row">{i + 1} <span class="name">{markup.text(entries[i].short)}</span></th>']
        for j, b in enumerate(names):
            s = pairs.get((a, b) if i < j else (b, a))
            if i == j or s is None or s["mean"] is None:
                cells.append(f"<td>{'' if i == j else '–'}</td>")
            elif i < j:
                shade = max(0.0, min(1.0, (s["mean"] - (s["null_mean"] or 0)) / (1 - (s["null_mean"] or 0))))
                cells.append(f'<td style="--shade: {100 * shade:.0f}%" class="heat">{s["mean"]:.3f}</td>')
            else:
                cells.append(f'<td class="null">{markup.number(s["null_mean"])}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{i}</th>' for i in range(1, len(names) + 1))
    return (
        "<p>Above the diagonal: mean cosine of the matched pairs. Below it, in grey: the mean that random dictionaries "
        "of these sizes would have.</p>"
        f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pair_table(number: Mapping[str, str], comparison: Comparison) -> str:
    rows = []
    for pair in comparison.pairs:
        s = pair.summary()
        proof = "optimal, proven" if s["certified"] else f"at most {s['gap']:.2g} below the optimum"
        shown = (s["mean"], s["null_mean"], *s["fraction_above"].values(), s["row_best_mean"], s["col_best_mean"])
        counts = (f"{s['mutual']:,}", f"{s['exchangeable']:,}", " / ".join(f"{x:,}" for x in s["unmatched"]))
        which = f"{number[pair.a]} → {number[pair.b]}"
        rows.append([which, f"{s['pairs']:,}", *map(markup.number, shown), *counts, proof])
    head = ["", "pairs", "mean", "random", "> 0.5", "> 0.7", "> 0.9", "best →", "← best", "mutual", "exchangeable"]
    return markup.table([*head, "unmatched", "certificate"], rows)


def _pair_figure(
    number: Mapping[str, str], pair: Pair, nulls: dict[tuple[int, ...], np.ndarray], threads: int | None
) -> tuple[str, str]:
    m = pair.matching
    if not len(m.rows):
        return "", ""
    n, k, d = m.shape
    sizes = (_rounded(n - len(m.left_out_rows)), _rounded(k - len(m.left_out_cols)), d)
    if sizes not in nulls:
        rng = np.random.default_rng(0)
        sides = (rng.standard_normal((size, d), dtype=np.float32) for size in sizes[:2])
        nulls[sizes] = match_dictionaries(*sides, threads=threads).similarity
    draw = partial(plots.draw_similarities, similarity=m.similarity, ylabel="pairs", random=nulls[sizes])
    label = f"{number[pair.a]} → {number[pair.b]}"
    caption = f"{label}: mean {m.mean:.3f}; outlined: {sizes[0]:,} × {sizes[1]:,} random directions, matched"
    return plots.inline_svg(draw, label, size=(4.0, 2.5)), caption


def _rounded(n: int) -> int:
    """To two digits: the null hardly depends on the size, and need not be matched anew for every pair."""
    digits = max(0, len(str(n)) - 2)
    return max(1, round(n, -digits))


def _definitions(entries: Sequence[Entry], comparison: Comparison | None) -> markup.Section:
    terms = _RUN_TERMS if any(entry.record is not None for entry in entries) else {}
    terms = terms | (_GEOMETRY_TERMS if comparison is not None else {})
    return markup.Section("definitions", "What the numbers are", markup.definitions(terms))


_RUN_TERMS = {
    "L0": "mean number of features active on a token",
    "alive": "features active at least once on the tokens counted at the end of training, with the final weights",
    "CE increase": "cross-entropy of the next token with the SAE's output in place of the activation, less that of the "
    "original model; nats/token",
    "KL": "KL(original ‖ with the SAE) of the next-token distributions, mean over tokens; nats",
    "EV": "explained variance: mean over tokens of 1 − ‖prediction − activation‖² / ‖activation − its mean‖², at the "
    "SAE (reconstruction against input), and in the residual stream that enters later blocks (with the SAE against "
    "without); one block beyond the last is the stream that leaves the model's last block",
    "tokens/s": "trained tokens a second of wall-clock, first step, logs and evaluations included",
    "time vs local": "seconds a token, over the mean of the local runs of the same sizes on the same device here",
    "loss": "what the run minimises, of one batch; kinds weigh different terms, so only curves of one kind compare",
}
_GEOMETRY_TERMS = {
    "features used": "all but dead features, where the run recorded which those are, and zero rows",
    "nearest other feature": "each feature's largest cosine with another decoder row of its own dictionary, exact over "
    "all; high means that features repeat or split one another",
    "difference of the means": "with a percentile bootstrap over features, 95 %; another seed may differ by more",
    "matched": "the one-to-one pairing of decoder rows with the largest possible sum of cosines; its mean is PW-MCC",
    "random": "the same of independent random directions, as many and as wide: what no relation at all gives",
    "> 0.5, > 0.7, > 0.9": "share of the matched pairs with a cosine above that",
    "best →, ← best": "mean of each feature's best cosine in the other dictionary, over all used features of the "
    "first, and of the second; features may share a partner, so the two differ, and neither is a one-to-one measure",
    "mutual": "pairs of features that are each other's best",
    "exchangeable": "matched pairs that another matching of equal sum could pair otherwise (duplicates)",
    "unmatched": "used features of the first and of the second that get no partner, the sizes being unequal",
    "certificate": "dual prices prove that no other pairing of all pairs has a larger sum",
}


def _origin(command: str) -> markup.Section:
    from e2e_fast.info import describe

    facts = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        **({"command": command} if command else {}),
        **describe(),
    }
    listed = "".join(
        f"<dt>{markup.text(name)}</dt><dd><code>{markup.text(value)}</code></dd>" for name, value in facts.items()
    )
    return markup.Section("origin", "How this page was made", f"<dl>{listed}</dl>")


# -------------------------------------------------------------------------------------------------------------- pieces


def _numbers(entries: Sequence[Entry]) -> dict[str, str]:
    return {entry.name: str(i) for i, entry in enumerate(entries, start=1)}


def _colour(entries: Sequence[Entry], kind: str) -> str:
    return plots.colours([entry.kind for entry in entries if entry.kind]).get(kind, "#777777")


def _all_same(values: Iterable[Any]) -> bool:
    return len({repr(value) for value in values}) == 1
