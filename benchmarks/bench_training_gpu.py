"""A whole training step against the reference's own way: milliseconds, tokens a second, peak memory.

    python benchmarks/bench_training_gpu.py --out DIR [--tiny]

A random GPT-2 small, its SAE at layer 6 with 46,080 features, 8 × 1,024 tokens; forward, backward, clipping and Adam,
for local and end-to-end training. Ours runs in bf16 and in fp32. The reference runs the model twice from the tokens to
full logits, with a dense SAE (`straightforward`), as e2e_sae does: in fp32 and in TF32 with eager attention, and, as
its users could speed it up, under bf16 autocast with SDPA and fused Adam. Both SAEs start from the same weights, ReLU
at an L0 of 64. Before anything is timed the first loss of ours, in both precisions, must be that of the reference in
fp32; how far the others are off is recorded (autocast rounds the logits, which a small KL does not survive). Sides
alternate; medians.

Then `e2e_fast.overhead`: local, e2e, e2e+downstream and the schedule, by phase, on the same shape.

Writes DIR/training.jsonl, DIR/training.md and DIR/overhead.json. ``--tiny`` runs all of it on little tensors, on a CPU
too: a check of this file, its times mean nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import straightforward
from e2e_fast import SAE, load_lm, losses
from e2e_fast.measure import PeakMemory
from e2e_fast.optimizer import Adam
from e2e_fast.overhead import measure_overhead
from e2e_fast.precision import arithmetic
from e2e_fast.step import training_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPARSITY, L0, MAX_NORM, LR = 1.5, 64, 10.0, 5e-4


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
    rounds: int = 5
    l0: int = L0


TINY = Size(layers=3, width=16, heads=2, vocabulary=61, layer=1, features=96, batch=2, n_ctx=8, rounds=1, l0=6)


def model_of(size: Size, attention: str) -> Any:
    """A random GPT-2; the same weights whatever the attention."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "n_layer": size.layers, "n_embd": size.width, "n_head": size.heads, "n_positions": size.n_ctx,
        "vocab_size": size.vocabulary, "attn_implementation": attention, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    return model.eval().requires_grad_(False).to(DEVICE)


def first_weights(size: Size, model: Any, tokens: Tensor) -> straightforward.DenseSAE:
    """An SAE whose encoder's bias leaves about ``size.l0`` features active."""
    sae = straightforward.DenseSAE(size.width, size.features).to(DEVICE)
    lm = load_lm(model, processing="none")
    position = f"blocks.{size.layer}.hook_resid_pre"
    with torch.no_grad():
        x = lm.original(tokens[:1], at=position, suffix=False)[position].flatten(0, 1)
        z = sae.encoder(x[:256]).flatten()
        sae.encoder.bias -= z[torch.randperm(len(z), device=DEVICE)[:100_000]].quantile(1 - size.l0 / size.features)
    return sae


def providers(size: Size, kind: str, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name → one optimizer step, which returns the loss."""
    position = f"blocks.{size.layer}.hook_resid_pre"
    loss = losses.e2e(SPARSITY) if kind == "e2e" else losses.local(SPARSITY)
    start = first_weights(size, model_of(size, "sdpa"), tokens)

    def ours(precision: Any) -> Callable[[], Tensor]:
        lm = load_lm(model_of(size, "sdpa"), processing="none")
        sae = SAE(size.width, size.features).to(DEVICE)
        with torch.no_grad():
            sae.W_enc.copy_(start.encoder.weight)
            sae.b_enc.copy_(start.encoder.bias)
            sae.W_dec.copy_(start.decoder.weight.T)
            sae.b_dec.copy_(start.decoder.bias)
        optimizer = Adam(sae.parameters(), LR, sae.shadows.values())

        def step() -> Tensor:
            with arithmetic(precision, DEVICE):
                result = training_step(lm, {position: sae}, loss, tokens)
            optimizer.clip(MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return result.loss

        return step

    def reference(precision: Any, attention: str, fused: bool) -> Callable[[], Tensor]:
        model = model_of(size, attention)
        sae = straightforward.DenseSAE(size.width, size.features).to(DEVICE)
        sae.load_state_dict(start.state_dict())
        optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=fused)
        run = straightforward.e2e_step if kind == "e2e" else straightforward.local_step

        def step() -> Tensor:
            optimizer.zero_grad()
            with arithmetic(precision, DEVICE):
                value = run(model, sae, tokens, size.layer, SPARSITY)
            torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_NORM)
            optimizer.step()
            return value

        return step

    return {
        "ours, bf16": ours("bf16"),
        "ours, fp32": ours("fp32"),
        "reference, fp32, eager attention": reference("fp32", "eager", False),
        "reference, TF32, eager attention": reference("tf32", "eager", False),
        "reference, bf16 autocast, SDPA, fused Adam": reference("bf16", "sdpa", True),
    }


def measure(size: Size, kind: str) -> list[dict[str, Any]]:
    """One record a provider; they take turns."""
    tokens = torch.randint(size.vocabulary, (size.batch, size.n_ctx), generator=torch.Generator().manual_seed(0))
    steps = providers(size, kind, tokens.to(DEVICE))
    first = {name: float(step()) for name, step in steps.items()}
    errors = {name: abs(value / first["reference, fp32, eager attention"] - 1) for name, value in first.items()}
    for name, most in (("ours, fp32", 1e-2), ("ours, bf16", 5e-2)):
        if not errors[name] < most:
            raise AssertionError(f"{kind}: the first loss of {name} is off by {errors[name]:.1%}: {first}")
    peaks = {}
    for name, step in steps.items():
        with PeakMemory(DEVICE) as peak:
            step()
        peaks[name] = peak.bytes
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(size.rounds):
        for name, step in steps.items():
            synchronize()
            begun = time.perf_counter()
            step()
            synchronize()
            seconds[name].append(time.perf_counter() - begun)
    records = []
    for name, times in seconds.items():
        ms = 1e3 * statistics.median(times)
        figures = {"ms": ms, "min_ms": 1e3 * min(times), "max_ms": 1e3 * max(times)}
        figures |= {
            "tokens_per_s": 1e3 * tokens.numel() / ms,
            "peak_mb": peaks[name] / 2**20,
            "loss_error": errors[name],
        }
        records.append({"kind": kind, "provider": name, **figures})
    return records


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def markdown(records: list[dict[str, Any]]) -> str:
    lines = [
        "| kind | provider | ms/step | (range) | tokens/s | peak MB | × ours, bf16 | loss off by |",
        "|---" * 8 + "|",
    ]
    ours = {r["kind"]: r["ms"] for r in records if r["provider"] == "ours, bf16"}
    for r in records:
        spread = f"{r['min_ms']:.1f} - {r['max_ms']:.1f}"
        figures = [f"{r['ms']:.1f}", spread, f"{r['tokens_per_s']:,.0f}", f"{r['peak_mb']:,.0f}"]
        figures += [f"{r['ms'] / ours[r['kind']]:.2f}", f"{r['loss_error']:.1%}"]
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
    size = TINY if options.tiny else Size()
    where = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU", "torch": torch.__version__}
    where["commit"] = options.commit
    records: list[dict[str, Any]] = []
    with (options.out / "training.jsonl").open("w") as file:
        for kind in ("local", "e2e"):
            for record in measure(size, kind):
                records.append(record | where)
                file.write(json.dumps(record | where) + "\n")
    (options.out / "training.md").write_text(f"{where}\n\n{markdown(records)}")
    print(markdown(records), flush=True)
    rows = measure_overhead(
        model_of(size, "sdpa"), layer=size.layer, features=size.features, k=size.l0, batch_size=size.batch,
        n_ctx=size.n_ctx, steps=size.rounds, rounds=1 if options.tiny else 2, device=str(DEVICE),
    )  # fmt: skip
    (options.out / "overhead.json").write_text(json.dumps(rows, indent=1))
    for row in rows:
        print(f"{row['kind']:<15} {row['ms']:9.1f} ms/step  {row['overhead']:5.2f} x local  {row['phases']}")
    return records


if __name__ == "__main__":
    main()
