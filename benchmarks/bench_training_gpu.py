"""A whole training step against the reference's own way: milliseconds, tokens a second, memory.

    python benchmarks/bench_training_gpu.py --out DIR [--tiny]

A random GPT-2 small, its SAE at layer 6 with 46,080 features, micro-batches of 8 × 1,024 tokens, two to an optimizer
step as in the paper; forward, backward, clipping and Adam, for local, end-to-end and e2e+downstream training. Times are
of a micro-batch with its share of the optimizer. Ours runs in bf16 and in fp32. The reference runs the model twice from
the tokens to full logits, with a dense SAE (`straightforward`), as e2e_sae does: in fp32 and in TF32 with eager
attention, and, as its users could speed it up, under bf16 autocast with SDPA and fused Adam. Both SAEs start from the
same weights, ReLU at an L0 of 64. The first loss of ours, in both precisions, must be that of the reference in fp32;
how far the others are off is recorded (autocast rounds the logits, which a small KL does not survive). Sides alternate;
medians. Memory: what a side holds between steps (weights of the SAE, Adam, copies; the model is everyone's), and the
peak beyond that.

Then `e2e_fast.overhead`: local, e2e, e2e+downstream and the schedule, by phase, on the same shape, and what four e2e
SAEs cost in one process, beside four runs. Then ours in bf16 as CUDA graphs, and with the model's blocks under
torch.compile.

Each record is written when it is there, and what fails is one. The exit status is 1 where one of ours failed. Writes
DIR/training.jsonl, DIR/training.md and DIR/overhead.json. ``--tiny`` runs it on little tensors, on a CPU too, without
graphs and compiler: a check of this file, its times mean nothing.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import straightforward
from e2e_fast import SAE, load_lm, losses
from e2e_fast.cuda_graphs import CudaRecorder, Record, StepGraphs
from e2e_fast.lm import LM
from e2e_fast.losses import LossConfig
from e2e_fast.measure import PeakMemory
from e2e_fast.optimizer import Adam
from e2e_fast.overhead import measure_overhead, measure_sharing
from e2e_fast.precision import Precision, arithmetic
from e2e_fast.step import Steps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPARSITY, L0, MAX_NORM, LR = 1.5, 64, 10.0, 5e-4
KL, DOWNSTREAM = 0.5, 2.5
"""Coefficients of e2e+downstream, the latter over all later positions."""
KINDS = ("local", "e2e", "e2e+downstream")
EXACT = "reference, fp32, eager attention"
"""Whose loss ours must have, to a share of it."""
TOLERANCE = {"fp32": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Size:
    """What is trained."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    layer: int = 6
    features: int = 46080
    batch: int = 8
    n_ctx: int = 1024
    accumulation: int = 2
    rounds: int = 5
    l0: int = L0


TINY = Size(layers=3, width=16, heads=2, vocabulary=61, layer=1, features=96, batch=2, n_ctx=8, rounds=1, l0=6)


@dataclass(frozen=True)
class Setup:
    """What all sides share."""

    size: Size
    models: dict[str, Any]
    """A random GPT-2 by its attention, "sdpa" or "eager"; the same weights."""
    start: straightforward.DenseSAE
    tokens: Tensor

    @property
    def position(self) -> str:
        return f"blocks.{self.size.layer}.hook_resid_pre"

    @property
    def later(self) -> range:
        """The blocks before which e2e+downstream compares."""
        return range(self.size.layer + 1, self.size.layers)

    def loss(self, kind: str) -> LossConfig:
        if kind == "local":
            return losses.local(SPARSITY)
        if kind == "e2e":
            return losses.e2e(SPARSITY)
        positions = tuple(f"blocks.{layer}.hook_resid_pre" for layer in self.later)
        return losses.e2e_downstream(SPARSITY, positions, kl=KL, total_coeff=DOWNSTREAM)


def setup(size: Size) -> Setup:
    """Made on the device: at this size a CPU takes many seconds for each random model and each orthogonal decoder."""
    tokens = torch.randint(size.vocabulary, (size.batch, size.n_ctx), generator=torch.Generator().manual_seed(0))
    models = {attention: model_of(size, attention) for attention in ("sdpa", "eager")}
    tokens = tokens.to(DEVICE)
    return Setup(size, models, first_weights(size, models["sdpa"], tokens), tokens)


def model_of(size: Size, attention: str) -> Any:
    """A random GPT-2; the same weights whatever the attention."""
    settings: dict[str, Any] = {
        "n_layer": size.layers, "n_embd": size.width, "n_head": size.heads, "n_positions": size.n_ctx,
        "vocab_size": size.vocabulary, "attn_implementation": attention, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    with DEVICE:
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    return model.eval().requires_grad_(False).to(DEVICE)


def first_weights(size: Size, model: Any, tokens: Tensor) -> straightforward.DenseSAE:
    """An SAE whose encoder's bias leaves about ``size.l0`` features active."""
    with DEVICE:
        sae = straightforward.DenseSAE(size.width, size.features)
    lm = load_lm(model, processing="none")
    position = f"blocks.{size.layer}.hook_resid_pre"
    with torch.no_grad():
        x = lm.original(tokens[:1], at=position, suffix=False)[position].flatten(0, 1)
        z = sae.encoder(x[:256]).flatten()
        sae.encoder.bias -= z[torch.randperm(len(z), device=DEVICE)[:100_000]].quantile(1 - size.l0 / size.features)
    return sae


Provider = Callable[[], Callable[[], Tensor]]
"""Makes a side, whose calls are one optimizer step each and return its last loss."""


def ours(s: Setup, kind: str, precision: Precision, lm: LM, record: Record | None = None) -> Callable[[], Tensor]:
    """``record``: as graphs."""
    sae = SAE(s.size.width, s.size.features, init="empty").to(DEVICE)
    with torch.no_grad():
        sae.W_enc.copy_(s.start.encoder.weight)
        sae.b_enc.copy_(s.start.encoder.bias)
        sae.W_dec.copy_(s.start.decoder.weight.T)
        sae.b_dec.copy_(s.start.decoder.bias)
    saes, loss = {s.position: sae}, s.loss(kind)
    optimizer = Adam(sae.parameters(), LR, sae.shadows.values())
    steps = Steps() if record is None else StepGraphs([saes], record)

    def micro_batch() -> Tensor:
        original = steps.original_pass(lm, [(saes, loss)], s.tokens)
        result = steps.training_step(
            lm, saes, loss, s.tokens, accumulation_steps=s.size.accumulation, original=original
        )  # fmt: skip
        return result.loss

    def step() -> Tensor:
        with arithmetic(precision, DEVICE):
            values = [micro_batch() for _ in range(s.size.accumulation)]
        optimizer.clip(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return values[-1]

    if isinstance(steps, StepGraphs):
        rate = optimizer.param_groups[0]
        rate["lr"] = 0.0
        for _ in range(10):  # eager at first, then recorded
            step()
        replays = steps.replays
        step()
        rate["lr"] = LR
        if steps.replays != replays + 2 * s.size.accumulation:
            raise RuntimeError(f"{steps.replays - replays} graphs were replayed in a step, not two a micro-batch")
    return step


def reference(s: Setup, kind: str, precision: Precision, attention: str, fused: bool) -> Callable[[], Tensor]:
    model, sae, layer = s.models[attention], copy.deepcopy(s.start), s.size.layer
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=fused)
    downstream = {later: DOWNSTREAM / len(s.later) for later in s.later}

    def micro_batch() -> Tensor:
        if kind == "local":
            return straightforward.local_step(model, sae, s.tokens, layer, SPARSITY)
        if kind == "e2e":
            return straightforward.e2e_step(model, sae, s.tokens, layer, SPARSITY)
        return straightforward.e2e_step(model, sae, s.tokens, layer, SPARSITY, KL, downstream)

    def step() -> Tensor:
        optimizer.zero_grad()
        with arithmetic(precision, DEVICE):
            values = [micro_batch() for _ in range(s.size.accumulation)]
        torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_NORM)
        optimizer.step()
        return values[-1]

    return step


def providers(s: Setup, kind: str) -> dict[str, Provider]:
    lm = load_lm(s.models["sdpa"], processing="none")
    return {
        EXACT: lambda: reference(s, kind, "fp32", "eager", False),
        "ours, bf16": lambda: ours(s, kind, "bf16", lm),
        "ours, fp32": lambda: ours(s, kind, "fp32", lm),
        "reference, TF32, eager attention": lambda: reference(s, kind, "tf32", "eager", False),
        "reference, bf16 autocast, SDPA, fused Adam": lambda: reference(s, kind, "bf16", "sdpa", True),
    }


def as_graphs(s: Setup, kind: str, record: Record | None = None) -> dict[str, Provider]:
    def make() -> Callable[[], Tensor]:
        lm = load_lm(s.models["sdpa"], processing="none")
        return ours(s, kind, "bf16", lm, record or CudaRecorder(DEVICE))

    return {"ours, bf16, CUDA graphs": make}


def compiled(s: Setup, kind: str, backend: str = "inductor") -> dict[str, Provider]:
    def make() -> Callable[[], Tensor]:
        return ours(s, kind, "bf16", load_lm(s.models["sdpa"], processing="none").compile(backend))

    return {"ours, bf16, compiled blocks": make}


def measure(s: Setup, kind: str, sides: dict[str, Provider], expected: float | None = None) -> Iterator[dict[str, Any]]:
    """One record a side, with its first loss's distance from `EXACT`'s, or from ``expected``; they take turns.

    A side that fails is a record too, at once.
    """
    works: dict[str, Callable[[], Tensor]] = {}
    figures: dict[str, dict[str, float | None]] = {}

    for name, make in sides.items():
        try:
            before = allocated()
            works[name] = step = make()
            loss = float(step())
            held = allocated() - before
            expected = loss if name == EXACT else expected
            error = None if expected is None else abs(loss / expected - 1)
            figures[name] = {"loss": loss, "loss_error": error, "held_mb": held / 2**20}
            if name.startswith("ours") and error is not None and not error < TOLERANCE[name.split(", ")[1]]:
                raise AssertionError(f"the first loss is {loss}, off by {error:.1%}")
            with PeakMemory(DEVICE) as peak:
                step()
            figures[name]["peak_mb"] = peak.bytes / 2**20
        except Exception as reason:
            works.pop(name, None)
            yield failure(kind, name, reason)
    milliseconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(s.size.rounds):
        for name, step in list(works.items()):
            try:
                synchronize()
                begun = time.perf_counter()
                step()
                synchronize()
                milliseconds[name].append(1e3 * (time.perf_counter() - begun) / s.size.accumulation)
            except Exception as reason:
                works.pop(name, None)
                yield failure(kind, name, reason)
    for name in works:
        times = milliseconds[name]
        ms = statistics.median(times)
        rate = {"ms": ms, "min_ms": min(times), "max_ms": max(times), "tokens_per_s": 1e3 * s.tokens.numel() / ms}
        yield {"kind": kind, "provider": name, **rate, **figures[name]}


def failure(kind: str, name: str, reason: Exception) -> dict[str, Any]:
    return {"kind": kind, "provider": name, "failed": f"{type(reason).__name__}: {reason}".partition("\n")[0]}


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def markdown(records: list[dict[str, Any]]) -> str:
    lines = [
        "| kind | provider | ms/micro-batch | (range) | tokens/s | held MB | peak MB | × ours, bf16 | loss off by |",
        "|---" * 9 + "|",
    ]
    ours = {r["kind"]: r["ms"] for r in records if r["provider"] == "ours, bf16" and "ms" in r}
    for r in records:
        if "failed" in r:
            figures = [r["failed"], *[""] * 6]
        else:
            ratio = f"{r['ms'] / ours[r['kind']]:.2f}" if r["kind"] in ours else ""
            error = "" if r["loss_error"] is None else f"{r['loss_error']:.1%}"
            figures = [f"{r['ms']:.1f}", f"{r['min_ms']:.1f} - {r['max_ms']:.1f}", f"{r['tokens_per_s']:,.0f}"]
            figures += [f"{r['held_mb']:,.0f}", f"{r['peak_mb']:,.0f}", ratio, error]
        lines.append("| " + " | ".join([r["kind"], r["provider"], *figures]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for training.jsonl, training.md, overhead.json")
    parser.add_argument("--tiny", action="store_true", help="little tensors: checks this file")
    parser.add_argument("--commit", default="unknown", help="what is measured")
    options = parser.parse_args(arguments)
    if DEVICE.type != "cuda" and not options.tiny:
        parser.error("no GPU here: only --tiny can run")
    options.out.mkdir(parents=True, exist_ok=True)
    where = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU", "torch": torch.__version__}
    where["commit"] = options.commit
    records: list[dict[str, Any]] = []
    (options.out / "training.jsonl").write_text("")

    def keep(measured: Iterator[dict[str, Any]]) -> None:
        for record in measured:
            records.append(record | where)
            print(json.dumps(record), flush=True)
            with (options.out / "training.jsonl").open("a") as file:
                file.write(json.dumps(record | where) + "\n")
            table = markdown(sorted(records, key=lambda r: KINDS.index(r["kind"])))
            (options.out / "training.md").write_text(f"{where}\n\n{table}")

    size = TINY if options.tiny else Size()
    s = setup(size)
    for kind in KINDS:
        keep(measure(s, kind, providers(s, kind)))
    try:
        overhead(s, options.out)
    except Exception as reason:
        keep(iter([failure("e2e", "ours, overhead by phase", reason)]))
    if not options.tiny:
        exact = {r["kind"]: r.get("loss") for r in records if r["provider"] == EXACT}
        for way in (as_graphs, compiled):
            for kind in ("e2e", "local"):
                keep(measure(s, kind, way(s, kind), exact[kind]))
    return records


def overhead(s: Setup, out: Path) -> None:
    size = s.size
    same: dict[str, Any] = {
        "layer": size.layer, "features": size.features, "k": size.l0, "batch_size": size.batch, "n_ctx": size.n_ctx,
        "steps": size.rounds, "rounds": min(size.rounds, 2), "device": str(DEVICE),
    }  # fmt: skip
    rows = measure_overhead(s.models["sdpa"], **same)
    (out / "overhead.json").write_text(json.dumps(rows, indent=1))
    for row in rows:
        print(f"{row['kind']:<15} {row['ms']:9.1f} ms/step  {row['overhead']:5.2f} x local  {row['phases']}")
    rows.append({"kind": "four e2e SAEs in one process", **measure_sharing(s.models["sdpa"], **same)})
    (out / "overhead.json").write_text(json.dumps(rows, indent=1))
    print(f"four e2e SAEs in one process: {rows[-1]['share']:.2f} of four runs", flush=True)


if __name__ == "__main__":
    failures = [r for r in main() if "failed" in r and r["provider"].startswith("ours")]
    sys.exit(f"{len(failures)} of ours failed" if failures else 0)
