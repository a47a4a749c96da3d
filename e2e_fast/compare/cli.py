"""``e2e-fast match A B`` and ``e2e-fast compare A B C …``: tables of files' dictionaries, pairs and a picture.

>>> from pathlib import Path
>>> import numpy as np, tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> np.save(folder / "a.npy", np.eye(4, dtype=np.float32))
>>> match(str(folder / "a.npy"), str(folder / "a.npy"), as_json=True)  # doctest: +ELLIPSIS
{"pairs": 4, "shape": [4, 4, 4], "total": 4.0, ...
>>> compare([str(folder / "a.npy"), str(folder / "a.npy")], as_json=True)  # doctest: +ELLIPSIS
{"which": "decoder", "dictionaries": [{"name": "a", ...
"""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from e2e_fast.compare.comparison import Comparison, compare_dictionaries
from e2e_fast.compare.matching import Matching, Progress, match_dictionaries
from e2e_fast.optional import require

_PAIR_FORMATS = (".csv", ".parquet", ".npz")
_STAGES = {
    "quantize": "quantizing",
    "sweep": "sweeping all pairs",
    "candidates": "candidates in float64",
    "solve": "solving",
    "price": "proving",
    "best": "best of each row and column",
    "done": "done",
}


def match(
    a: Annotated[str, typer.Argument(help="A dictionary: weights file or folder; path::name for one SAE of several.")],
    b: Annotated[str, typer.Argument(help="The other dictionary.")],
    pairs: Annotated[Path | None, typer.Option(help="Write the matched pairs: .csv, .parquet or .npz.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a histogram beside the null of random dictionaries.")] = None,
    which: Annotated[str, typer.Option(help="decoder, encoder, or both (joint similarity).")] = "decoder",
    encoder_share: Annotated[float, typer.Option(help="Weight of the encoder's cosine with --which both.")] = 0.5,
    absolute: Annotated[bool, typer.Option(help="Ignore signs.")] = False,
    center: Annotated[bool, typer.Option(help="Subtract each side's mean feature first.")] = False,
    keep_zero: Annotated[bool, typer.Option(help="Match zero rows, at similarity 0; else left out.")] = False,
    precision: Annotated[str, typer.Option(help="Of the sweep alone: auto, int8, bfloat16 or float32.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Default: as torch.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds; then the best so far, with its bound.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON and no progress.")] = False,
) -> None:
    """Match two dictionaries one to one, so that the summed cosine similarity is the largest possible, with a proof."""
    if pairs is not None and pairs.suffix not in _PAIR_FORMATS:
        raise typer.BadParameter(f"must end in one of {', '.join(_PAIR_FORMATS)}, got {pairs}", param_hint="--pairs")
    options: dict[str, Any] = {
        "which": which, "encoder_share": encoder_share, "absolute": absolute, "center": center,
        "zero_rows": "keep" if keep_zero else "drop", "precision": precision, "threads": threads,
        "time_limit": time_limit,
    }  # fmt: skip
    try:
        m = _match_quietly(a, b, options) if as_json else _match_with_progress(a, b, options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if pairs is not None:
        write_pairs(m, pairs)
    if plot is not None:
        if not len(m.rows):
            raise typer.BadParameter("no pair was matched, so there is nothing to draw", param_hint="--plot")
        from e2e_fast.compare.plot import plot_matching, random_matching

        plot_matching(m, random_matching(m, threads=threads)).savefig(plot, dpi=150)
    if as_json:
        print(json.dumps(m.summary()))
    else:
        _print_table(m, [str(path) for path in (pairs, plot) if path is not None])


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C …]", help="Dictionaries: run or SAE folders, folders of runs, weights; path::name."
        ),
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(help="A name for each (of a folder's runs, each), in order; default: the shortest."),
    ] = None,
    which: Annotated[str, typer.Option(help="decoder, encoder, or both (joint similarity).")] = "decoder",
    encoders: Annotated[bool, typer.Option(help="Match the encoders too and count agreement (slower).")] = False,
    keep_dead: Annotated[bool, typer.Option(help="Keep the features that a run recorded as dead.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for compare.json.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Write every matching's pairs into the folder too.")] = False,
    threads: Annotated[int | None, typer.Option(help="Default: as torch.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and no progress.")] = False,
) -> None:
    """Compare several dictionaries: every two matched exactly, one to one, and each with itself."""
    from e2e_fast.report.runs import named_dictionaries

    if pairs and out is None:
        raise ValueError("--pairs needs --out, a folder to write them into")
    options: dict[str, Any] = {"which": which, "encoders": encoders, "keep_dead": keep_dead, "threads": threads}
    named = named_dictionaries(sources, name)
    tell_without_weights(sources)
    comparison = (compare_dictionaries if as_json else compare_with_progress)(named, **options)
    written = [] if out is None else write_comparison(comparison, out, pairs=pairs)
    if as_json:
        print(json.dumps(comparison.summary()))
    else:
        print_comparison(comparison)
        for path in written:
            print(f"written {path}")


def tell_without_weights(sources: Sequence[str]) -> None:
    """Names on stderr the runs in folders of runs that are left out."""
    from e2e_fast.report.runs import without_weights

    for folder in without_weights(sources):
        print(f"left out, having no weights yet: {folder}", file=sys.stderr)


def write_comparison(comparison: Comparison, folder: Path, *, pairs: bool = False) -> list[Path]:
    """``compare.json`` and, with ``pairs``, ``pairs_1_2.csv`` of the first and second …; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "compare.json"]
    written[0].write_text(json.dumps(comparison.summary(), indent=1) + "\n")
    number = {one.name: i for i, one in enumerate(comparison.dictionaries, start=1)}
    for pair in comparison.pairs if pairs else ():
        written.append(folder / f"pairs_{number[pair.a]}_{number[pair.b]}.csv")
        write_pairs(pair.matching, written[-1])
    return written


def print_comparison(comparison: Comparison) -> None:
    """The tables of dictionaries, of pairs and of differences; what was left out."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    narrow: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": 0, "title_justify": "left"}
    number = {one.name: str(i) for i, one in enumerate(comparison.dictionaries, start=1)}
    table = Table(title="Each dictionary: cosine of a feature with its nearest other feature", **narrow)
    for column in ("", "name", "features", "used", "d", "mean", "random", "5 % – 95 %"):
        table.add_column(column, justify="left" if column == "name" else "right", overflow="fold")
    for one in comparison.dictionaries:
        s = one.summary()
        low, high = (_short(s["within_quantiles"][str(q)]) for q in (0.05, 0.95))
        table.add_row(
            number[one.name], escape(one.name), f"{one.n:,}", f"{one.used:,}", f"{one.d:,}",
            _short(s["within_mean"]), _short(s["within_null_mean"]), f"{low} – {high}",
        )  # fmt: skip
    console.print(table)

    of = {"decoder": "decoders", "encoder": "encoders", "both": "decoders and encoders jointly"}[comparison.which]
    table = Table(title=f"Every two, {of}: matched one to one; best of each, both ways", **narrow)
    agree = any(pair.agree is not None for pair in comparison.pairs)
    columns = ["", "pairs", "mean", "random", ">0.5", ">0.7", ">0.9", "best→", "←best", "mutual", "proof"]
    for column in columns + ["agree"] * agree:
        table.add_column(column, justify="right", no_wrap=True)
    for pair in comparison.pairs:
        s = pair.summary()
        table.add_row(
            f"{number[pair.a]} → {number[pair.b]}", f"{s['pairs']:,}", _short(s["mean"]), _short(s["null_mean"]),
            *(_short(share) for share in s["fraction_above"].values()),
            _short(s["row_best_mean"]), _short(s["col_best_mean"]), f"{s['mutual']:,}",
            "exact" if s["certified"] else f"{s['gap']:.2g}", *([_short(s["agree"])] if agree else []),
        )  # fmt: skip
    console.print(table)

    for (a, b), (difference, low, high) in comparison.differences.items():
        console.print(
            f"within, {number[a]} − {number[b]}: {difference:+.4f} (95 % over features: {low:+.4f} to {high:+.4f})"
        )
    if comparison.left_out:
        console.print(f"only dictionaries of the same width can be compared: {comparison.widths(number)}")
    unknown = [number[one.name] for one in comparison.dictionaries if one.dead is None]
    if unknown:
        console.print(f"dead features not known, so all but zero rows are used: {', '.join(unknown)}")


def compare_with_progress(named: Mapping[str, Any], **options: Any) -> Comparison:
    """`compare_dictionaries` with what it is at on stderr."""
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("reading", spinner="dots") as status:
        return compare_dictionaries(named, on_progress=lambda text: status.update(escape(text)), **options)


def write_pairs(m: Matching, path: Path) -> None:
    """The pairs with similarity, margin and tie group as CSV, Parquet (needs pyarrow) or npz, by the path's ending."""
    columns = {"row": m.rows, "col": m.cols, "similarity": m.similarity, "margin": m.margin, "tie_group": m.tie_group}
    if path.suffix == ".npz":
        bounds = {"total": m.total, "upper_bound": m.upper_bound, "row_price": m.row_price, "col_price": m.col_price}
        np.savez(path, **columns, **bounds)
    elif path.suffix == ".parquet":
        parquet = require("pyarrow.parquet", "writing Parquet (.csv and .npz need nothing)")
        parquet.write_table(require("pyarrow", "writing Parquet").table(columns), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def _match_quietly(a: str, b: str, options: dict[str, Any]) -> Matching:
    return match_dictionaries(a, b, **options)


def _match_with_progress(a: str, b: str, options: dict[str, Any]) -> Matching:
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("reading", spinner="dots") as status:

        def show(progress: Progress) -> None:
            state = f"{_STAGES[progress.stage]} · {progress.seconds:.1f} s"
            if progress.gap is not None:
                state += f" · gap {progress.gap:.2g} · {progress.unproven:,} rows to prove"
            status.update(state)

        return match_dictionaries(a, b, on_progress=show, **options)


def _print_table(m: Matching, written: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    s = m.summary()

    proof = "optimal over all pairs (proven)" if m.certified else "not proven optimal"
    title = f"{s['pairs']:,} pairs of {m.shape[0]:,} × {m.shape[1]:,} features, d = {m.shape[2]:,}"
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("mean similarity of the pairs", _show(s["mean"])),
        ("… of random dictionaries", _show(s["null_mean"])),
        *((f"pairs above {t}", _show(share)) for t, share in s["fraction_above"].items()),
        ("best of each row, with replacement", _show(s["row_best_mean"])),
        ("best of each column, with replacement", _show(s["col_best_mean"])),
        ("mutual nearest neighbours", f"{s['mutual']:,}"),
        ("pairs exchangeable at no loss", f"{s['exchangeable']:,}"),
        ("left out (zero or not alive), A and B", " and ".join(f"{x:,}" for x in s["left_out"])),
        ("unmatched, A and B", " and ".join(f"{x:,}" for x in s["unmatched"])),
        ("certificate", proof),
        ("no matching exceeds the total by more than", f"{m.gap:.2g}"),
        ("seconds", f"{m.stats['seconds'].get('total', 0.0):.2f}"),
        *(("written", path) for path in written),
    ):
        table.add_row(name, value)
    Console().print(table)


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
