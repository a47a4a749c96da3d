"""The command ``e2e-fast``: thin wrappers around the library's functions.

e2e-fast demo                     train the three kinds of SAE on the embedded model, no download
e2e-fast train config.yaml        what ``e2e_fast.train`` does
e2e-fast eval out/my_run          what ``e2e_fast.evaluate`` does
e2e-fast match A B                what ``e2e_fast.match_dictionaries`` does, for files
e2e-fast compare A B C …          what ``e2e_fast.compare.compare_dictionaries`` does, for files
e2e-fast report RUN [RUN …]       what ``e2e_fast.report.write_report`` does: one HTML page
e2e-fast convert A B --to FORMAT  an SAE's file in another library's format, the same function
e2e-fast bench overhead           what end-to-end training costs beside local, phase by phase
e2e-fast bench sharing            what several SAEs in one process cost beside separate runs
e2e-fast train-lm                 train the embedded language model anew
e2e-fast info                     versions, devices, which kernels are active
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from e2e_fast.compare.cli import compare, match
from e2e_fast.report.cli import report
from e2e_fast.train_lm import train_lm

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Fast end-to-end sparse dictionary learning.")

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3
EXIT_TERMINATED = 143


def main() -> None:
    """Entry point: input errors end with one clear line and exit code 2, stopped training with 3, SIGTERM with 143."""
    from e2e_fast.optional import MissingPackage
    from e2e_fast.trainer import TrainingStopped, TrainingTerminated

    try:
        app()
    except TrainingTerminated as error:
        print(f"e2e-fast: {error}", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    except TrainingStopped as error:
        print(f"e2e-fast: training stopped: {error}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except (ValueError, OSError, MissingPackage) as error:
        print(f"e2e-fast: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table, the picture and report.html.")] = Path("out/demo"),
    samples: Annotated[int, typer.Option(help="Sequences each SAE is trained on.")] = 3000,
) -> None:
    """Train local, e2e and e2e+downstream SAEs on the embedded language model and compare them."""
    from e2e_fast.demo import run_demo

    run_demo(out, samples)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with e2e_sae's keys.")],
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Train SAEs as a configuration says."""
    from e2e_fast.distributed import join
    from e2e_fast.trainer import train as run_training

    runs = run_training(config, resume=resume, quiet=quiet)
    if not join().writes:
        return
    for run in runs if isinstance(runs, list) else [runs]:
        _print_metrics(run.history[-2] if len(run.history) > 1 else run.history[-1])
        if run.folder is not None:
            print(f"saved in {run.folder}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its weight files.")],
    samples: Annotated[int, typer.Option(help="Sequences to evaluate on.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a run on its eval_data (or, without one, its train_data)."""
    from e2e_fast.checkpoint import read_run
    from e2e_fast.config import load_config
    from e2e_fast.trainer import evaluate_run

    settings, state = read_run(run)
    metrics = evaluate_run(load_config(settings), state, samples)
    if as_json:
        print(json.dumps(metrics, indent=1))
    else:
        _print_metrics(metrics)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or weight file; path::position for one SAE of several.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    to: Annotated[str, typer.Option(help="sae_lens, dictionary_learning, sparsify or e2e_sae.")],
    position: Annotated[str | None, typer.Option(help="Where it sits, e.g. blocks.6.hook_resid_pre.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the language model.")] = None,
    lm_processing: Annotated[
        str | None, typer.Option(help="Of the activations it was trained on: transformer_lens (centred) or none (raw).")
    ] = None,
) -> None:
    """Write an SAE in another library's format; what is given replaces what the source says. See docs/formats.md."""
    from e2e_fast import formats
    from e2e_fast.lm import PROCESSINGS

    if lm_processing not in (None, *PROCESSINGS):
        raise ValueError(f"--lm-processing must be one of {', '.join(PROCESSINGS)}, got {lm_processing!r}")
    original = formats.read(source)
    sae = original.at(position, model, lm_processing)
    if to == sae.format and (position or model or lm_processing):
        sae = formats.adapt(sae, to, like=original)
    folder = formats.write(sae, target, to)
    print(f"{sae.format} → {to}: {sae.activation}, {sae.d_sae:,} features of width {sae.d_in:,}, in {folder}")
    if to in ("dictionary_learning", "sparsify") and sae.lm_processing == "transformer_lens":
        print("note: trained on centred activations (TransformerLens' processing), and this library gives raw ones")


@app.command()
def info() -> None:
    """Print versions, devices, the SIMD level and which kernels are active."""
    from e2e_fast.info import describe

    for name, value in describe().items():
        print(f"{name:<18} {value}")


bench = typer.Typer(no_args_is_help=True, help="Measure.")
app.add_typer(bench, name="bench")


@bench.command("overhead")
def overhead(
    model: Annotated[str, typer.Option(help="Name or folder of the language model.")] = "embedded",
    layer: Annotated[int | None, typer.Option(help="Block whose input the SAE reads; default: the middle.")] = None,
    features: Annotated[int | None, typer.Option(help="d_sae; default: 8 times the model's width.")] = None,
    k: Annotated[int, typer.Option(help="Active features a token.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    n_ctx: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps a round; three rounds are timed.")] = 10,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
) -> None:
    """Train local, e2e, e2e+downstream and the schedule side by side, and print where the time goes."""
    from e2e_fast.info import describe
    from e2e_fast.overhead import measure_overhead

    settings: dict[str, Any] = {
        "layer": layer, "features": features, "k": k, "batch_size": batch_size, "n_ctx": n_ctx, "steps": steps
    }  # fmt: skip
    rows = measure_overhead(model, **settings)
    for row in rows:
        phases = "  ".join(f"{name} {ms:.1f}" for name, ms in row["phases"].items())
        print(
            f"{row['kind']:<15} {row['overhead']:5.2f} × local  {row['ms']:9.1f} ms/step  "
            f"{row['tokens/s']:10,.0f} tokens/s  peak {row['peak_bytes'] / 2**20:7.0f} MB  "
            f"{row['floor_share']:4.0%} of the FLOP floor's rate\n    {phases}"
        )
    if as_json is not None:  # at the end: where it cannot be written, the measurement is not lost
        record = {"model": model, **settings, "machine": describe(), "rows": rows}
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(record, indent=1) + "\n")


@bench.command("sharing")
def sharing(
    model: Annotated[str, typer.Option(help="Name or folder of the language model.")] = "embedded",
    members: Annotated[int, typer.Option(help="SAEs in the one process.")] = 4,
    layer: Annotated[int | None, typer.Option(help="Block whose input the SAEs read; default: the middle.")] = None,
    features: Annotated[int | None, typer.Option(help="d_sae; default: 8 times the model's width.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    n_ctx: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps a round; three rounds are timed.")] = 10,
) -> None:
    """Train several e2e SAEs in one process and one alone, in turn, and print what sharing saves."""
    from e2e_fast.overhead import measure_sharing

    found = measure_sharing(
        model, members=members, layer=layer, features=features, batch_size=batch_size, n_ctx=n_ctx, steps=steps
    )
    print(
        f"{members} SAEs in one process: {found['ms']:.1f} ms a step and SAE, alone {found['alone_ms']:.1f} ms: "
        f"{found['share']:.2f} of {members} separate runs"
    )


app.command("match")(match)
app.command("compare")(compare)
app.command("report")(report)
app.command("train-lm")(train_lm)


def _print_metrics(metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right")
    for key, value in metrics.items():
        table.add_row(key, f"{value:.6g}")
    Console().print(table)


if __name__ == "__main__":
    main()
