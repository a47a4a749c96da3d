"""``e2e-fast match A B``: match two dictionaries' files, print the summary, write pairs and a picture.

>>> from pathlib import Path
>>> import numpy as np, tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> np.save(folder / "a.npy", np.eye(4, dtype=np.float32))
>>> match(str(folder / "a.npy"), str(folder / "a.npy"), as_json=True)  # doctest: +ELLIPSIS
{"pairs": 4, "shape": [4, 4, 4], "total": 4.0, ...
"""

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

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
        from e2e_fast.compare.plot import plot_matching, random_matching

        plot_matching(m, random_matching(m, threads=threads)).savefig(plot, dpi=150)
    if as_json:
        print(json.dumps(summary(m)))
    else:
        _print_table(m, [str(path) for path in (pairs, plot) if path is not None])


def summary(m: Matching) -> dict[str, Any]:
    """What the table shows, as plain numbers; None where a number does not exist."""
    n, k, _ = m.shape
    present_rows, present_cols = (side[~np.isnan(side)] for side in (m.row_best_similarity, m.col_best_similarity))

    def number(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    return {
        "pairs": len(m.rows),
        "shape": list(m.shape),
        "total": m.total,
        "upper_bound": m.upper_bound,
        "gap": m.gap,
        "certified": m.certified,
        "mean": number(m.mean),
        "null_mean": number(m.null_mean),
        "fraction_above": {str(t): number(m.fraction_above(t)) for t in (0.5, 0.7, 0.9)},
        "row_best_mean": number(present_rows.mean()) if len(present_rows) else None,
        "col_best_mean": number(present_cols.mean()) if len(present_cols) else None,
        "mutual": len(m.mutual),
        "exchangeable": int((m.tie_group >= 0).sum()),
        "left_out": [len(m.left_out_rows), len(m.left_out_cols)],
        "unmatched": [n - len(m.rows) - len(m.left_out_rows), k - len(m.cols) - len(m.left_out_cols)],
        "stats": m.stats,
    }


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

    s = summary(m)

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    proof = "optimal over all pairs (proven)" if m.certified else "not proven optimal"
    title = f"{s['pairs']:,} pairs of {m.shape[0]:,} × {m.shape[1]:,} features, d = {m.shape[2]:,}"
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("mean similarity of the pairs", show(s["mean"])),
        ("… of random dictionaries", show(s["null_mean"])),
        *((f"pairs above {t}", show(share)) for t, share in s["fraction_above"].items()),
        ("best of each row, with replacement", show(s["row_best_mean"])),
        ("best of each column, with replacement", show(s["col_best_mean"])),
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
