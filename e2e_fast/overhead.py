"""What end-to-end training costs beside local training: milliseconds by phase, memory, and the share of the FLOP floor.

All kinds are trained on the same tokens, in turn, several rounds; medians over the rounds. The codes are TopK, so that
they are as sparse in the first step as they are at the end of a training. The schedule is 95 % local and 5 %
balanced steps; its numbers are put together from those two.

The floor counts what no implementation can leave out, a token: with P matrix weights a block, T positions, V
vocabulary, L blocks before the SAE and n in all, causal attention, K active of F features

    block            b = 2P + 2TD
    local            L·b + 2FD + 8KD                      prefix, encoder; decoder and three sparse gradients
    e2e              local + 2(n - L)·b + (n - L)(2P + 5TD) + 6DV     teacher and student suffix, its gradient, KL

divided by the rate of a large matrix product on this device, measured in the same run.

>>> from e2e_fast.overhead import measure_overhead
>>> [row["kind"] for row in measure_overhead("embedded", steps=1, rounds=1, batch_size=1, n_ctx=16)]
['local', 'e2e', 'e2e+downstream', 'schedule']
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from e2e_fast import embedded, losses
from e2e_fast.lm import LM, load_lm
from e2e_fast.measure import PeakMemory
from e2e_fast.trainer import Trainer

PHASES = ("data", "prefix", "teacher", "SAE", "student", "KL", "losses", "backward", "optimizer")
"""Of a step, in its order."""

BALANCED_SHARE = 0.05
"""Share of the schedule's steps that run the whole model."""


def measure_overhead(
    model: Any = "embedded",
    *,
    layer: int | None = None,
    features: int | None = None,
    k: int = 32,
    batch_size: int = 8,
    n_ctx: int | None = None,
    steps: int = 10,
    rounds: int = 3,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """One row a kind of training: local, e2e, e2e+downstream and the schedule.

    model: what `load_lm` takes; layer: the SAE reads its residual stream before that block (default: the middle one);
    features: d_sae (default 8 · d_in); k active features a token; batch_size sequences of n_ctx tokens (default: the
    model's context, at most 512); ``steps`` optimizer steps a round. Tokens are random unless the model is "embedded".

    A row holds ``kind``, what was measured (``layer``, ``features``, ``n_ctx``), ``phases`` (milliseconds a step by the
    names of `PHASES`, those that the kind has), ``ms`` (their sum), ``tokens/s``, ``peak_bytes``, ``floor_gflop``,
    ``floor_share`` (floor time / time) and ``overhead`` (time / local time). A phase is timed without those inside it:
    "student" is the model behind the SAE, "losses" all losses but the KL.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lm = load_lm(model, device=device)
    layer = lm.n_layers // 2 if layer is None else layer
    n_ctx = min(lm.n_ctx, 512) if n_ctx is None else n_ctx
    features = 8 * lm.d_model if features is None else features
    position = f"blocks.{layer}.hook_resid_pre"
    lm.check_position(position)
    tokens = _tokens(model, lm, steps * batch_size, n_ctx)
    kinds = ("local", "e2e", "e2e+downstream", "balanced")
    seconds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    peaks = dict.fromkeys(kinds, 0)
    for number in range(rounds + 1):  # the first round warms up
        for kind in kinds:
            trainer = _trainer(_settings(lm, kind, position, features, k, batch_size, tokens), lm, tokens)
            trainer.timings.enabled = True
            with PeakMemory(device) as peak:
                trainer.fit()
            if number:
                seconds[kind].append(trainer.timings.seconds)
                peaks[kind] = max(peaks[kind], peak.bytes)
    rate = _product_rate(torch.device(device))
    rows = []
    for kind in kinds:
        seen = seconds[kind][0]
        if unknown := set(seen) - set(PHASES):
            raise AssertionError(f"phases must be among {PHASES}, got {sorted(unknown)}")
        names = [name for name in PHASES if name in seen]
        phases = {name: statistics.median(each[name] for each in seconds[kind]) / steps * 1e3 for name in names}
        rows.append(_row(kind, phases, peaks[kind], floor_flops(lm, kind, layer, features, k, n_ctx), tokens, steps))
    local, balanced = rows[0], rows.pop()
    rows.append(_schedule(local, balanced))
    for row in rows:
        row |= {"layer": layer, "features": features, "n_ctx": n_ctx}
        row["floor_share"] = row["floor_gflop"] * 1e9 / rate / (row["ms"] / 1e3)
        row["overhead"] = row["ms"] / local["ms"]
    return rows


def floor_flops(lm: LM, kind: str, layer: int, features: int, k: int, n_ctx: int) -> float:
    """FLOP a token that training of a kind needs at least (the module's formula)."""
    D, T = lm.d_model, n_ctx
    P = lm.block_weights(layer)
    block = 2 * P + 2 * T * D
    local = layer * block + 2 * features * D + 8 * k * D
    if kind == "local":
        return local
    suffix = lm.n_layers - layer
    return local + 2 * suffix * block + suffix * (2 * P + 5 * T * D) + 6 * D * lm.d_vocab


def measure_sharing(
    model: Any = "embedded",
    *,
    members: int = 4,
    layer: int | None = None,
    features: int | None = None,
    k: int = 32,
    batch_size: int = 8,
    n_ctx: int | None = None,
    steps: int = 10,
    rounds: int = 3,
    device: str | None = None,
) -> dict[str, float]:
    """What e2e SAEs of several seeds cost in one process, beside as many runs of their own: the medians of the rounds.

    Arguments as in `measure_overhead`. ``ms`` and ``alone_ms`` are milliseconds of a step and SAE in the sweep and
    alone, ``share`` the median over the rounds of their ratio. On a CPU they are CPU time, of all threads.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lm = load_lm(model, device=device)
    layer = lm.n_layers // 2 if layer is None else layer
    n_ctx = min(lm.n_ctx, 512) if n_ctx is None else n_ctx
    features = 8 * lm.d_model if features is None else features
    position = lm.check_position(f"blocks.{layer}.hook_resid_pre")
    tokens = _tokens(model, lm, (steps + 1) * batch_size, n_ctx)
    alone = _settings(lm, "e2e", position, features, k, batch_size, tokens)
    together = alone | {"sweep": {"seed": list(range(members))}}
    pairs = []
    for number in range(rounds + 1):  # the first round warms up
        pair = [_seconds(settings, lm, tokens, device) / steps * 1e3 for settings in (together, alone)]
        if number:
            pairs.append((pair[0] / members, pair[1]))
    return {
        "ms": statistics.median(ours for ours, _ in pairs),
        "alone_ms": statistics.median(theirs for _, theirs in pairs),
        "share": statistics.median(ours / theirs for ours, theirs in pairs),
    }


def _seconds(settings: dict[str, Any], lm: LM, tokens: Tensor, device: str) -> float:
    """Of all steps of a training but the first, which logs: CPU time on a CPU, which other programs do not lengthen."""
    trainer = _trainer(settings, lm, tokens)
    is_cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if is_cuda else time.process_time
    start = 0.0
    for n in trainer.steps():
        if n == 1:
            if is_cuda:
                torch.cuda.synchronize()
            start = clock()
    if is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def _trainer(settings: dict[str, Any], lm: LM, tokens: Tensor) -> Trainer:
    """Its SAEs are drawn on the device: for a large orthogonal decoder a CPU takes longer than for what is measured."""
    with lm.device:
        return Trainer(settings, lm, tokens, quiet=True)


def _row(kind: str, phases: dict[str, float], peak: int, floor: float, tokens: Tensor, steps: int) -> dict[str, Any]:
    per_step = tokens.numel() // steps
    total = sum(phases.values())
    return {
        "kind": kind,
        "phases": phases,
        "ms": total,
        "tokens/s": per_step / total * 1e3,
        "peak_bytes": peak,
        "floor_gflop": floor * per_step / 1e9,
    }


def _schedule(local: dict[str, Any], balanced: dict[str, Any]) -> dict[str, Any]:
    def mix(a: float, b: float) -> float:
        return (1 - BALANCED_SHARE) * a + BALANCED_SHARE * b

    names = [name for name in PHASES if name in balanced["phases"]]
    ms = mix(local["ms"], balanced["ms"])
    return {
        "kind": "schedule",
        "phases": {n: mix(local["phases"].get(n, 0.0), balanced["phases"].get(n, 0.0)) for n in names},
        "ms": ms,
        "tokens/s": local["tokens/s"] * local["ms"] / ms,
        "peak_bytes": max(local["peak_bytes"], balanced["peak_bytes"]),
        "floor_gflop": mix(local["floor_gflop"], balanced["floor_gflop"]),
    }


def _settings(
    lm: LM, kind: str, position: str, features: int, k: int, batch_size: int, tokens: Tensor
) -> dict[str, Any]:
    base = losses.local(sparsity=0.0)
    return {
        "tlens_model_name": "given",
        "save_dir": None,
        "n_samples": len(tokens),
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": batch_size,
        "lr": 1e-3,
        "max_grad_norm": 1.0,
        "log_every_n_grad_steps": 10**9,
        "collect_act_frequency_every_n_samples": 0,
        "loss": losses.named(kind, base, [position], lm.positions()).model_dump(),
        "train_data": {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": tokens.shape[1]},
        "saes": {"sae_positions": position, "dict_size_to_input_ratio": (features + 0.5) / lm.width(position), "k": k},
        "device": str(lm.device),
    }


def _tokens(model: Any, lm: LM, samples: int, n_ctx: int) -> Tensor:
    if model == "embedded":
        return embedded.tokens("train", n_ctx, samples)
    return torch.randint(lm.d_vocab, (samples, n_ctx), generator=torch.Generator().manual_seed(0))


def _product_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product: float32 on a CPU, bfloat16 on a GPU; the best of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
