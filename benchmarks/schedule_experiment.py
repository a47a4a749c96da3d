"""What a short KL phase after local training reaches, beside local, e2e and e2e+downstream SAEs, on a real small model.

One SAE a *recipe*: a kind of training, a sparsity coefficient, a seed, and for a schedule how its KL phase runs. Each
finished recipe is a line of a JSON-lines file; what is in the file is not trained again, and a run that SIGTERM ended
goes on where it was, so a long plan can be done in pieces. Recipes that differ in nothing but the coefficient are
trained side by side on one pass of the model.

    data    windows for training, development and held-out evaluation
    run     trains and evaluates recipes
    cost    CPU seconds a step, all kinds in turn
    match   dictionaries of two seeds, matched one to one
    table   everything interpolated to one L0, in Markdown

    E="python -m benchmarks.schedule_experiment"
    $E data --model ../shared/models/stories260K --text ../shared/text/tinystories.txt --work W
    $E run --work W --results R.jsonl --kind local --coeff 0.3 0.5 --seed 0
    $E run --work W --results R.jsonl --kind schedule --coeff 0.4 --seed 0 --kl-steps 130
    $E table --results R.jsonl --l0 30

Between two coefficients a kind's CE increase at a given L0 is interpolated linearly in log CE increase against log L0.
Training windows are drawn with replacement, in an order of their own for each seed; evaluation windows are never
trained on.
"""

import argparse
import glob
import itertools
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import e2e_fast
from e2e_fast import embedded, losses
from e2e_fast.data import DatasetConfig, TokenBatches
from e2e_fast.lm import LM
from e2e_fast.metrics import ActFrequency
from e2e_fast.sae import to_e2e_sae
from e2e_fast.sae_transformer import SAETransformer
from e2e_fast.step import forward_step
from e2e_fast.trainer import Trainer

Kind = Literal["local", "e2e", "e2e+downstream", "schedule"]
ALIVE_TOKENS = 100_000
"""Training tokens on which a feature must fire at least once to count as alive."""


@dataclass(frozen=True)
class Recipe:
    """How one SAE is trained."""

    kind: Kind
    coeff: float
    """Of the sparsity loss; of a schedule, that of its local phase."""
    seed: int
    """Of the first weights and of the order of the data."""
    steps: int = 1200
    """Optimizer steps, of a schedule all of its phases together."""
    batch: int = 8
    lr: float = 2e-3
    warmup: int = 60
    """Steps."""
    features: int = 1024
    precision: str = "fp32"
    kl_steps: int = 0
    """Of a schedule: steps that run the whole model."""
    kl_loss: str = "balanced"
    kl_coeff: float | None = None
    """Sparsity coefficient of those steps; None: ``coeff``."""
    kl_lr: float | None = None
    """Their own learning rate; None: the run's goes on."""
    kl_warmup: int = 0
    kl_positions: float = 1.0
    cycles: int = 1
    """KL phases, spread evenly over the run; the last ends it."""

    @property
    def key(self) -> str:
        """A name that differs where anything does, from what differs from the defaults."""
        plain = Recipe(self.kind, self.coeff, self.seed)
        changed = {name: value for name, value in asdict(self).items() if value != getattr(plain, name)}
        parts = [self.kind, f"coeff-{self.coeff:g}", f"seed-{self.seed}"]
        return "_".join([*parts, *(f"{name}-{value}" for name, value in changed.items())])


# ---------------------------------------------------------------------- data


def make_data(model: str, text: str, work: Path, *, n_ctx: int, sampled: int, dev: int, heldout: int) -> None:
    """Writes ``data.npz``: train, dev and heldout windows [samples, n_ctx].

    Of ``text`` the last ``heldout`` windows, then, before a gap of one, ``dev`` windows are set apart; ``sampled`` more
    training windows are drawn from the model itself, each from BOS on.
    """
    if text == "embedded":
        train = embedded.tokens("train", n_ctx, 6000).numpy()
        apart = embedded.tokens("heldout", n_ctx, dev + heldout + 1).numpy()
    else:
        source = DatasetConfig(
            dataset_name=text, tokenizer_name=model, split="train", n_ctx=n_ctx, shuffle=False, is_tokenized=False
        )
        with TokenBatches(source, 1, repeat=False) as batches:
            windows = torch.cat(list(batches)).numpy()
        n = len(windows) - dev - heldout - 2
        train, apart = windows[:n], windows[n + 1 :]
    if sampled:
        train = np.concatenate([train, sample_windows(model, sampled, n_ctx)])
    work.mkdir(parents=True, exist_ok=True)
    np.savez(work / "data.npz", train=train, dev=apart[:dev], heldout=apart[dev + 1 :])
    (work / "model.txt").write_text(model)


@torch.no_grad()
def sample_windows(model: str, n: int, n_ctx: int, batch: int = 512) -> np.ndarray:
    """[n, n_ctx] tokens drawn from the model at temperature 1, beginning with its BOS."""
    from transformers import AutoModelForCausalLM

    lm: Any = AutoModelForCausalLM.from_pretrained(embedded.path() if model == "embedded" else model).eval()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for start in range(0, n, batch):
        tokens = torch.full((min(batch, n - start), 1), lm.config.bos_token_id)
        past = None
        while tokens.shape[1] < n_ctx:
            out = lm(tokens if past is None else tokens[:, -1:], past_key_values=past, use_cache=True)
            past = out.past_key_values
            drawn = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], dim=1)
        rows.append(tokens)
    return torch.cat(rows).numpy()


def load_data(work: Path, split: str) -> np.ndarray:
    """[samples, n_ctx] windows of "train", "dev" or "heldout"."""
    return np.load(work / "data.npz")[split].astype(np.int64)


# ---------------------------------------------------------------------- training


def settings(recipes: Sequence[Recipe], lm: LM, position: str) -> dict[str, Any]:
    """The configuration that trains recipes which differ in their coefficient only."""
    r = recipes[0]
    base = losses.local(r.coeff)
    kind = "local" if r.kind == "schedule" else r.kind
    config = {
        "tlens_model_name": "given",
        "save_dir": None,
        "seed": r.seed,
        "n_samples": r.steps * r.batch,
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": r.batch,
        "lr": r.lr,
        "warmup_samples": r.warmup * r.batch,
        "max_grad_norm": 1.0,
        "log_every_n_grad_steps": 10**9,
        "collect_act_frequency_every_n_samples": 0,
        "loss": losses.named(kind, base, [position], lm.positions()).model_dump(),
        "kl_positions": r.kl_positions,
        "train_data": {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": lm.n_ctx},
        "saes": {"sae_positions": position, "dict_size_to_input_ratio": (r.features + 0.5) / lm.width(position)},
        "precision": r.precision,
    }
    if r.kind == "schedule":
        config["schedule"] = phases(r, lm, position)
    if len(recipes) > 1:
        config["sweep"] = {"sparsity_coeff": [recipe.coeff for recipe in recipes]}
    return config


def phases(r: Recipe, lm: LM, position: str) -> list[dict[str, Any]]:
    """Local and KL phases of a schedule, ``cycles`` of each."""
    loss: Any = r.kl_loss
    if r.kl_coeff is not None:
        loss = losses.named(r.kl_loss, losses.local(r.kl_coeff), [position], lm.positions()).model_dump()
    kl = {"loss": loss, "lr": r.kl_lr, "warmup_samples": r.kl_warmup * r.batch}
    if r.kl_steps >= r.steps:
        return [kl]
    local = r.steps - r.kl_steps
    rows: list[dict[str, Any]] = []
    for i in range(r.cycles):
        begin = (local * (i + 1) + r.kl_steps * i) / r.cycles
        end = (local + r.kl_steps) * (i + 1) / r.cycles
        rows += [{"until": begin / r.steps, "loss": "local"}, kl | {"until": end / r.steps}]
    return [*rows[:-1], kl]


def train(recipes: Sequence[Recipe], lm: LM, position: str, windows: np.ndarray, work: Path) -> Trainer:
    """Trains recipes that differ in their coefficient only, or goes on where SIGTERM ended that."""
    r = recipes[0]
    drawn = np.random.default_rng([r.seed, 1]).integers(len(windows), size=r.steps * r.batch)
    name = "_".join([r.key, *(f"{recipe.coeff:g}" for recipe in recipes[1:])])
    begun = sorted((work / "runs").glob(f"{glob.escape(name)}_20*"))
    config = settings(recipes, lm, position) | {"save_dir": work / "runs", "wandb_run_name": name}
    trainer = Trainer(config, lm, windows[drawn], resume=begun[0] if begun else None, quiet=True)
    trainer.fit()
    return trainer


def measure(model: SAETransformer, position: str, evaluation: np.ndarray) -> dict[str, Any]:
    """L0, CE increase, KL, MSE and explained variances on evaluation windows."""
    metrics = e2e_fast.evaluate(model, evaluation, batch_size=32)
    later = [p for p in model.lm.positions() if f"loss/eval/in_to_orig/{p}" in metrics]
    return {
        "l0": metrics[f"sparsity/eval/L_0/{position}"],
        "ce_increase": -metrics["performance/eval/difference_ce_loss"],
        "ce_original": metrics["performance/eval/orig_model_ce_loss"],
        "kl": metrics["loss/eval/logits_kl"],
        "mse": metrics[f"loss/eval/out_to_in/{position}"],
        "explained_variance": metrics[f"loss/eval/out_to_in/explained_variance/{position}"],
        "downstream_explained_variance": {
            p: metrics[f"loss/eval/in_to_orig/explained_variance/{p}"] for p in later
        },
        "downstream_mse": {p: metrics[f"loss/eval/in_to_orig/{p}"] for p in later},
    }  # fmt: skip


@torch.no_grad()
def alive_features(model: SAETransformer, position: str, windows: np.ndarray) -> Tensor:
    """(F,) whether each feature fires on the first `ALIVE_TOKENS` tokens of the windows in a fixed random order."""
    frequency = ActFrequency(ALIVE_TOKENS)
    order = np.random.default_rng(0).permutation(len(windows))
    for rows in np.array_split(order, math.ceil(len(order) / 32)):
        tokens = torch.from_numpy(windows[rows])
        frequency.update(forward_step(model.lm, model.by_position, losses.local(0.0), tokens).acts)
        if frequency.full:
            break
    return frequency.counts[position] > 0


# ---------------------------------------------------------------------- records


def read(results: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none where it is missing."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append(results: Path, row: dict[str, Any]) -> None:
    """Adds a line with the commit, the date and torch's version."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    where = {"commit": commit.stdout.strip(), "when": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as lines:
        lines.write(json.dumps(row | where) + "\n")


def run(recipes: Iterable[Recipe], work: Path, results: Path, position: str, split: str) -> None:
    """Trains what is not in the results yet, side by side, and appends it; weights go to ``work``."""
    have = {row["key"] for row in read(results) if row.get("split") == split}
    todo = [recipe for recipe in recipes if recipe.key not in have]
    if not todo:
        return
    lm = e2e_fast.load_lm((work / "model.txt").read_text())
    windows = load_data(work, "train")
    # A phase with loss keys of its own cannot be swept: those recipes run one by one.
    groups = [todo] if todo[0].kl_coeff is None else [[recipe] for recipe in todo]
    for group in groups:
        trainer = train(group, lm, position, windows, work)
        for recipe, member in zip(group, trainer.members, strict=True):
            model = member.model
            alive = alive_features(model, position, windows)
            metrics = measure(model, position, load_data(work, split)) | {"alive": int(alive.sum())}
            state = to_e2e_sae(model.by_position) | {"alive": alive}
            save_file({k: v.contiguous() for k, v in state.items()}, work / f"{recipe.key}.safetensors")
            row = {"key": recipe.key, "recipe": asdict(recipe), "split": split, **metrics}
            append(results, row)
            print(f"{recipe.key}: L0 {row['l0']:.1f}, CE increase {row['ce_increase']:.4f}, alive {row['alive']}")
        if trainer.folder is not None:
            shutil.rmtree(trainer.folder)


# ---------------------------------------------------------------------- what it cost, how alike two seeds are


def group_of(recipe: Recipe) -> str:
    """The name of what recipes share that differ in their sparsity coefficients and seed only."""
    plain = replace(recipe, coeff=0.0, seed=0, kl_coeff=None if recipe.kl_coeff is None else 0.0)
    return plain.key.replace("_coeff-0_seed-0", "").replace("_kl_coeff-0.0", "")


def cost(work: Path, results: Path, output: Path, position: str, l0: float, steps: int, rounds: int) -> None:
    """CPU seconds a step of every group in the results, from its weights nearest to ``l0``; all groups in turn."""
    lm = e2e_fast.load_lm((work / "model.txt").read_text())
    windows = load_data(work, "train")
    nearest: dict[str, dict[str, Any]] = {}
    for row in sorted(read(results), key=lambda row: -abs(math.log(row["l0"] / l0))):
        nearest[group_of(Recipe(**row["recipe"]))] = row
    timed: list[tuple[str, str, Recipe, dict[str, Tensor]]] = []
    for group, row in nearest.items():
        recipe = Recipe(**row["recipe"])
        state = load_file(work / f"{recipe.key}.safetensors")
        state.pop("alive")
        short = replace(recipe, steps=steps, warmup=0, kl_steps=steps, kl_warmup=0, cycles=1)
        if recipe.kind == "schedule":
            timed.append((group, "KL", short, state))
            short = replace(short, kind="local", kl_steps=0)
        timed.append((group, "local" if short.kind == "local" else "e2e", short, state))
    seconds: dict[tuple[str, str], list[float]] = {(group, phase): [] for group, phase, *_ in timed}
    for number in range(rounds + 1):  # the first round warms up
        for group, phase, recipe, state in timed:
            trainer = Trainer(
                settings([recipe], lm, position), lm, windows[: steps * recipe.batch], state, quiet=True
            )  # fmt: skip
            start = time.process_time()
            trainer.fit()
            if number:
                seconds[group, phase].append((time.process_time() - start) / steps)
    for (group, phase), times in seconds.items():
        row = {"group": group, "phase": phase, "ms": 1e3 * float(np.median(times))}
        row |= {"ms_range": [1e3 * min(times), 1e3 * max(times)], "l0": nearest[group]["l0"]}
        append(output, row | {"steps": steps, "rounds": rounds, "threads": torch.get_num_threads()})
        print(row)


def match(work: Path, results: Path, output: Path) -> None:
    """Matches the alive decoder rows of every two seeds of a recipe."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for row in read(results):
        recipe = Recipe(**row["recipe"])
        by_recipe.setdefault(replace(recipe, seed=0).key, []).append(row)
    done = {(row["recipe"], *row["seeds"]) for row in read(output)}
    for name, rows in by_recipe.items():
        for i, a in enumerate(rows):
            for b in rows[i + 1 :]:
                seeds = (a["recipe"]["seed"], b["recipe"]["seed"])
                if (name, *seeds) in done:
                    continue
                m = e2e_fast.match_dictionaries(*(alive_decoder(work / f"{r['key']}.safetensors") for r in (a, b)))
                row = {"recipe": name, "group": group_of(Recipe(**a["recipe"])), "seeds": seeds}
                row |= {"l0": [a["l0"], b["l0"]], "alive": [a["alive"], b["alive"]]}
                row |= {"mean": m.mean, "above_0.9": m.fraction_above(0.9), "null_mean": m.null_mean}
                append(output, row | {"certified": m.certified})
                print(row)


def alive_decoder(path: Path) -> Tensor:
    """[alive, d_in] raw decoder rows of the features that fire."""
    state = load_file(path)
    weight = next(value for key, value in state.items() if key.endswith("decoder.weight"))
    return weight.T[state["alive"]]


# ---------------------------------------------------------------------- tables


def at_l0(points: Sequence[tuple[float, float]], l0: float, *, log: bool) -> float | None:
    """The value at ``l0`` on the line between the two neighbouring (L0, value), in log L0 and, if ``log``, log value.

    A point within 1 % of ``l0`` is taken as it is. Values that are not positive are interpolated as they are. None
    where ``l0`` does not lie between two points.

    >>> round(at_l0([(10.0, 0.4), (40.0, 0.1)], 20.0, log=True), 6)
    0.2
    """
    points = sorted(points)
    near, value = min(points, key=lambda point: abs(math.log(point[0] / l0)))
    if abs(math.log(near / l0)) < 0.01:
        return value
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= l0 <= x1:
            share = math.log(l0 / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
            if log and min(y0, y1) > 0:
                return math.exp(math.log(y0) * (1 - share) + math.log(y1) * share)
            return y0 * (1 - share) + y1 * share
    return None


def table(results: Path, l0: float) -> list[dict[str, Any]]:
    """One row a group and seed: what was measured, interpolated to ``l0``. Groups that do not reach it are left out."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in read(results):
        recipe = Recipe(**row["recipe"])
        groups.setdefault((group_of(recipe), recipe.seed), []).append(row)
    found = []
    for (group, seed), rows in sorted(groups.items()):
        row: dict[str, Any] = {"group": group, "seed": seed, "points": len(rows)}
        for name in ("ce_increase", "kl", "mse"):
            row[name] = at_l0([(r["l0"], r[name]) for r in rows], l0, log=True)
        for name in ("alive", "explained_variance"):
            row[name] = at_l0([(r["l0"], r[name]) for r in rows], l0, log=False)
        for position in rows[0]["downstream_explained_variance"]:
            values = [(r["l0"], r["downstream_explained_variance"][position]) for r in rows]
            row[f"ev {position}"] = at_l0(values, l0, log=False)
        if row["ce_increase"] is not None:
            found.append(row)
    return found


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Markdown."""
    if not rows:
        print("no group has measurements on both sides of this L0")
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("data")
    verb.add_argument("--model", required=True, help="a name or folder, or 'embedded'")
    verb.add_argument("--text", required=True, help="a text file, or 'embedded'")
    for name, default in (("n-ctx", 128), ("sampled", 6144), ("dev", 128), ("heldout", 256)):
        verb.add_argument(f"--{name}", type=int, default=default)
    others = [verb]
    verb = verbs.add_parser("run")
    others.append(verb)
    verb.add_argument("--kind", required=True, choices=["local", "e2e", "e2e+downstream", "schedule"])
    verb.add_argument("--coeff", type=float, nargs="+", required=True)
    verb.add_argument("--split", choices=["dev", "heldout"], default="heldout", help="windows to evaluate on")
    for name, value in asdict(Recipe("local", 0.0, 0)).items():
        if name not in ("kind", "coeff"):
            kind = float if value is None else type(value)
            verb.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    for name in ("cost", "match"):
        verb = verbs.add_parser(name)
        others.append(verb)
        verb.add_argument("--output", type=Path, required=True, help="JSON-lines file to append to")
        if name == "cost":
            for option, default in (("l0", 30.0), ("steps", 10), ("rounds", 5)):
                verb.add_argument(f"--{option}", type=type(default), default=default)
    verb = verbs.add_parser("table")
    verb.add_argument("--results", type=Path, required=True)
    verb.add_argument("--l0", type=float, nargs="+", default=[30.0])
    for verb in others:
        verb.add_argument("--work", type=Path, required=True, help="folder for windows and weights")
    for verb in others[1:]:
        verb.add_argument("--results", type=Path, required=True)
        if verb.prog.split()[-1] != "match":
            verb.add_argument("--position", default="blocks.2.hook_resid_pre")
    given = vars(parser.parse_args(arguments))
    match given.pop("verb"):
        case "data":
            make_data(**given)
        case "run":
            chosen = [given.pop(name) for name in ("coeff", "work", "results", "position", "split")]
            coeffs, work, results, position, split = chosen
            recipe = Recipe(coeff=0.0, **given)
            run([replace(recipe, coeff=coeff) for coeff in coeffs], work, results, position, split)
        case "cost":
            cost(**given)
        case "match":
            match(**given)
        case "table":
            for l0 in given["l0"]:
                print(f"\nat L0 {l0:g}\n")
                print_table(table(given["results"], l0))


if __name__ == "__main__":
    main()
