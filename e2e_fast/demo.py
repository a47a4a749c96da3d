"""The main job on a model that comes with the package: local, e2e and e2e+downstream SAEs, trained and compared.

Every kind is trained at two sparsity coefficients on the same tokens of the Python standard library, in the middle of
the embedded language model, and evaluated on files that neither the model nor the SAEs have seen.

>>> from e2e_fast.demo import run_demo
>>> results = run_demo(Path("out/demo"), samples=3000)                        # doctest: +SKIP
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from e2e_fast import embedded
from e2e_fast.config import Config, load_config
from e2e_fast.evaluation import evaluate
from e2e_fast.lm import LM, load_lm
from e2e_fast.measure import PeakMemory
from e2e_fast.report import Evaluation, pareto, write_report
from e2e_fast.trainer import E2EDownstreamTrainer, E2ETrainer, LocalTrainer, Trainer

N_CTX = 128
HELDOUT_SAMPLES = 64
RUNS: list[tuple[type[Trainer], float]] = [
    (LocalTrainer, 2.0),
    (LocalTrainer, 4.0),
    (E2ETrainer, 0.3),
    (E2ETrainer, 0.6),
    (E2EDownstreamTrainer, 4.0),
    (E2EDownstreamTrainer, 8.0),
]
"""Kind of training and coefficient of its sparsity."""


def run_demo(out: Path, samples: int) -> list[dict[str, Any]]:
    """Trains and evaluates the SAEs of `RUNS` on ``samples`` sequences each; prints a table and saves it.

    Writes ``results.json``, ``pareto.png`` and ``report.html`` (`write_report`) into ``out``, and a run folder for each
    SAE into ``out/runs``.
    """
    console = Console(width=max(Console().width, 150))
    lm = load_lm("embedded")
    position = f"blocks.{lm.n_layers // 2}.hook_resid_pre"
    console.print(f"{lm}\nSAEs at {position}, {samples} sequences of {N_CTX} tokens each")
    train = embedded.tokens("train", N_CTX, samples)
    heldout = embedded.tokens("heldout", N_CTX, HELDOUT_SAMPLES)
    results, evaluations = [], {}
    for kind, coeff in RUNS:
        trainer = kind(demo_config(out / "runs", position, coeff, len(train)), lm=lm, tokens=train)
        with PeakMemory(lm.device) as peak:
            run = trainer.fit()
        metrics = evaluate(run.model, heldout)
        evaluations[str(run.folder)] = Evaluation(metrics, f"on {HELDOUT_SAMPLES} sequences of held-out files")
        results.append(
            {
                "kind": trainer.loss.kind,
                "sparsity coeff": coeff,
                "tokens/s": trainer.total_tokens / trainer.timings.total,
                "seconds": trainer.timings.total,
                "peak MB": peak.bytes / 2**20,
                "alive": run.history[-1][f"sparsity/alive_dict_elements_final/{position}"],
                **summary(metrics, position),
                "folder": str(run.folder),
            }
        )
    seconds = [r["seconds"] for r in results if r["kind"] == "local"]
    mean_local = sum(seconds) / len(seconds)
    for result in results:
        result["time vs local"] = result["seconds"] / mean_local
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    points: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        points.setdefault(result["kind"], []).append((result["L0"], result["CE increase"]))
    picture = pareto(points, out / "pareto.png", title=f"embedded LM, {position}, {samples} sequences")
    print_table(console, results, lm)
    page = write_report(
        list(evaluations),
        out / "report.html",
        names=[f"{result['kind']} {result['sparsity coeff']:g}" for result in results],
        evaluations=evaluations,
        title="SAEs on the embedded language model",
        command=f"e2e-fast demo --samples {samples} --out {out}",
    )
    console.print(
        f"saved {out / 'results.json'}, {picture} and {page}, a page with all of it and the matched dictionaries"
    )
    return results


def demo_config(save_dir: Path, position: str, coeff: float, n_samples: int) -> Config:
    """The configuration of one demo run; the trainer's class puts in the losses."""
    n_samples -= n_samples % 4
    return load_config(
        {
            "tlens_model_name": "embedded",
            "save_dir": save_dir,
            "n_samples": n_samples,
            "save_every_n_samples": None,
            "eval_n_samples": None,
            "batch_size": 4,
            "lr": 3e-3,
            "warmup_samples": n_samples // 20,
            "max_grad_norm": 1.0,
            "collect_act_frequency_every_n_samples": n_samples,
            "act_frequency_n_tokens": 50_000,
            "loss": {
                "sparsity": {"coeff": coeff},
                "in_to_orig": None,
                "out_to_orig": None,
                "out_to_in": {"coeff": 1.0},
                "logits_kl": None,
            },
            "train_data": {
                "dataset_name": "embedded",
                "tokenizer_name": "embedded",
                "split": "train",
                "n_ctx": N_CTX,
            },
            "saes": {"sae_positions": position, "dict_size_to_input_ratio": 8},
        }
    )


def summary(metrics: dict[str, float], position: str) -> dict[str, Any]:
    """The numbers of an evaluation that the table shows."""
    prefix = "loss/eval/in_to_orig/explained_variance/"
    return {
        "L0": metrics[f"sparsity/eval/L_0/{position}"],
        "CE increase": -metrics["performance/eval/difference_ce_loss"],
        "KL": metrics["loss/eval/logits_kl"],
        "explained variance": {key.removeprefix(prefix): v for key, v in metrics.items() if key.startswith(prefix)},
    }


def print_table(console: Console, results: list[dict[str, Any]], lm: LM) -> None:
    """One row a run."""
    table = Table(title="SAEs on the embedded language model (held-out files)")
    later = sorted({p for r in results for p in r["explained variance"]}, key=lm.positions().index)
    columns = [("kind", "{}"), ("sparsity coeff", "{:g}"), ("tokens/s", "{:,.0f}"), ("time vs local", "{:.2f}×")]
    columns += [("peak MB", "{:.0f}"), ("L0", "{:.1f}"), ("alive", "{:.0f}")]
    columns += [("CE increase", "{:.4f}"), ("KL", "{:.4f}")]
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "kind" else "right")
    for position in later:
        _, layer, hook = position.split(".", 2)
        table.add_column(f"EV {layer}.{hook.removeprefix('hook_resid_')}", justify="right")
    for result in results:
        cells = [pattern.format(result[name]) for name, pattern in columns]
        cells += [_cell(result["explained variance"].get(position)) for position in later]
        table.add_row(*cells)
    console.print(table)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
