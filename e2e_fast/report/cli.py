"""``e2e-fast report RUN [RUN …]``: `write_report` for files.

e2e-fast report out/demo/runs other_sae.safetensors --out report.html
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    sources: Annotated[
        list[str], typer.Argument(metavar="RUN [RUN …]", help="Run folders, folders of them, dictionaries' files.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    eval_samples: Annotated[
        int | None, typer.Option("--eval", min=1, help="Evaluate runs that recorded none on so many sequences.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="A name for each, in their order.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the matching; default: as torch.")] = None,
) -> None:
    """Write one HTML page about runs: settings, metrics, training curves, and how alike their dictionaries are."""
    from rich.console import Console
    from rich.markup import escape

    from e2e_fast.compare.cli import tell_without_weights
    from e2e_fast.report import write_report

    with Console(stderr=True).status("reading", spinner="dots") as status:
        path = write_report(
            sources,
            out,
            names=name,
            eval_samples=eval_samples,
            threads=threads,
            command=shlex.join(["e2e-fast", *sys.argv[1:]]),
            on_progress=lambda text: status.update(escape(text)),
        )
    tell_without_weights(sources)
    print(f"written {path}")
