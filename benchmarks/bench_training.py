"""Whole training steps on a CPU, clipping and Adam included, against the straightforward ones; four SAEs against one.

A random 6-layer GPT-2 with d = 256 and V = 50,257; 15,360 latents (60 · d) at layer 3; 4 × 512 tokens a step. Ours is
what the Trainer does with a micro-batch; the baseline is `benchmarks.straightforward` with torch's default Adam. Both
start from equal weights; the first two steps are compared before anything is timed.

Beside each of our steps stands its floor: what cannot be left out, at rates measured in the same run. These are the
FLOP of `e2e_fast.overhead.floor_flops` at the rate of the fastest matrix product, and the bytes of clipping and exact
Adam (11 passes over the weights: gradient written, read for its norm, scaled, read; weight and both moments read and
written) at the rate of a copy. A baseline also does what floor and step leave out, so baseline / floor is the largest
ratio that any implementation could show on this machine.

    python -m pytest benchmarks/bench_training.py --record benchmarks/results/training.jsonl
    python -m benchmarks.bench_training        where the time of a local step at L0 50 goes: torch.profiler's table
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks import straightforward
from e2e_fast import Trainer, load_lm, losses
from e2e_fast.lm import LM
from e2e_fast.overhead import floor_flops

LAYERS, D, V, F = 6, 256, 50257, 15360
LAYER, POSITION = 3, "blocks.3.hook_resid_pre"
LATER = ("blocks.4.hook_resid_pre", "blocks.5.hook_resid_pre")
SAMPLES, T = 4, 512
L0 = 50
SPARSITY, LR, MAX_NORM = 1.0, 1e-6, 1.0
ROUNDS = 2

KINDS = {
    "e2e": losses.e2e(SPARSITY),
    "local": losses.local(SPARSITY),
    "e2e+downstream": losses.e2e_downstream(SPARSITY, LATER),
}
STATES = ("at initialisation", f"at L0 {L0}", f"TopK, k = {L0}")


class TopKSAE(straightforward.DenseSAE):
    """Scores of all latents, torch.topk, scattered into a dense code."""

    def encode(self, x: Tensor) -> Tensor:
        values, indices = self.encoder(x).topk(L0, dim=-1)
        return torch.zeros(*x.shape[:-1], F).scatter(-1, indices, values.relu())


class Setup(NamedTuple):
    """One model, the weights to start from and the tokens of a step."""

    model: Any
    lm: LM
    state: dict[str, Tensor]
    """Under e2e_sae's keys."""
    k: int | None
    active: int
    """Latents that fire on a token, about."""
    tokens: Tensor


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


def random_model() -> Any:
    """With centred writing weights, as the default processing makes them: both sides see the same stream."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=LAYERS, n_embd=D, n_head=8, n_positions=T, vocab_size=V, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    body: Any = model.transformer
    for writer in (body.wte, body.wpe, *(part for block in body.h for part in (block.attn.c_proj, block.mlp.c_proj))):
        for parameter in writer.parameters():
            parameter -= parameter.mean(-1, keepdim=True)
    return model


def setup(model: Any, state: str) -> Setup:
    """``state`` is one of `STATES`; at L0 50 the encoder's bias is shifted until so many latents fire."""
    torch.manual_seed(1)
    lm = load_lm(model)
    tokens = torch.randint(V, (SAMPLES, T))
    sae = straightforward.DenseSAE(D, F)
    if state == STATES[1]:
        with torch.no_grad():
            x = lm.original(tokens[:1], at=POSITION, suffix=False)[POSITION]
            z = sae.encoder(x).flatten()
            sae.encoder.bias -= z[torch.randperm(z.numel())[:1_000_000]].quantile(1 - L0 / F)
    names = {"encoder.weight": "encoder.0.weight", "encoder.bias": "encoder.0.bias"}
    prefix = POSITION.replace(".", "-")
    weights = {f"{prefix}.{names.get(name, name)}": value.clone() for name, value in sae.state_dict().items()}
    k = L0 if state == STATES[2] else None
    return Setup(model, lm, weights, k, F // 2 if state == STATES[0] else L0, tokens)


def our_trainer(s: Setup, kind: str, **changes: Any) -> Trainer:
    config = {
        "tlens_model_name": "random",
        "save_dir": None,
        "n_samples": None,
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": SAMPLES,
        "lr": LR,
        "lr_schedule": "linear",
        "max_grad_norm": MAX_NORM,
        "log_every_n_grad_steps": 10**9,
        "collect_act_frequency_every_n_samples": 0,
        "loss": KINDS[kind].model_dump(),
        "train_data": {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": T},
        "saes": {"sae_positions": POSITION, "dict_size_to_input_ratio": F / D, "k": s.k},
    }
    return Trainer(config | changes, s.lm, s.tokens, s.state, quiet=True)


def our_step(trainer: Trainer, tokens: Tensor) -> None:
    trainer._micro_batch(tokens)


def baseline_step(s: Setup, kind: str) -> tuple[straightforward.DenseSAE, Callable[[], None]]:
    """A straightforward SAE with the same weights, and a call that trains it one step."""
    sae = (straightforward.DenseSAE if s.k is None else TopKSAE)(D, F)
    names = {"encoder.0.weight": "encoder.weight", "encoder.0.bias": "encoder.bias"}
    state = {key.partition(".")[2]: value for key, value in s.state.items()}
    sae.load_state_dict({names.get(key, key): value for key, value in state.items()})
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)

    def step() -> None:
        if kind == "local":
            straightforward.local_step(s.model, sae, s.tokens, LAYER, SPARSITY)
        elif kind == "e2e":
            straightforward.e2e_step(s.model, sae, s.tokens, LAYER, SPARSITY)
        else:
            later = {4: 1.25, 5: 1.25}
            straightforward.e2e_step(s.model, sae, s.tokens, LAYER, SPARSITY, kl=0.5, downstream=later)
        nn.utils.clip_grad_norm_(sae.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return sae, step


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_step(duel: Callable[..., Any], model: Any, kind: str, state: str) -> None:
    s = setup(model, state)
    trainer = our_trainer(s, kind)
    theirs, baseline = baseline_step(s, kind)
    ours = trainer.saes[POSITION]
    for _ in range(2):
        our_step(trainer, s.tokens)
        baseline()
    # Adam's first steps have the gradient's sign, so an entry whose gradient is all rounding may go either way.
    for got, want, name in (
        (ours.W_enc, theirs.encoder.weight, "encoder.0.weight"),
        (ours.W_dec, theirs.decoder.weight.T, "decoder.weight"),
    ):
        start = next(value for key, value in s.state.items() if key.endswith(name))
        start = start.T if name == "decoder.weight" else start
        assert (want - start).norm() > 0
        assert (got - want).norm() < 0.05 * (want - start).norm(), name
    floor = floor_seconds(s, kind)
    duel(
        f"{kind} step {state}, floor {floor * 1e3:.0f} ms", lambda: our_step(trainer, s.tokens), baseline, rounds=ROUNDS
    )


@pytest.mark.parametrize("state", STATES[1:2])
def test_four_saes_in_one_process(duel: Callable[..., Any], model: Any, state: str) -> None:
    """A sweep over four sparsity coefficients against four runs, each with one: e2e."""
    s = setup(model, state)
    coeffs = [0.5, 1.0, 2.0, 4.0]
    sweep = our_trainer(s, "e2e", sweep={"sparsity_coeff": coeffs})
    apart = [
        our_trainer(s, "e2e", loss=losses.e2e(coeff).model_dump())
        for coeff in coeffs
    ]  # fmt: skip

    def together() -> None:
        our_step(sweep, s.tokens)

    def separately() -> None:
        for trainer in apart:
            our_step(trainer, s.tokens)

    for _ in range(2):
        together()
        separately()
    for member, trainer in zip(sweep.members, apart, strict=True):
        for a, b in zip(member.parameters.values(), trainer.members[0].parameters.values(), strict=True):
            assert torch.equal(a, b)
    duel(f"4 SAEs in one process, e2e {state}", together, separately, rounds=ROUNDS)


def floor_seconds(s: Setup, kind: str) -> float:
    """What a step of ours takes at least (module docstring)."""
    x, weight, square, copy = torch.randn(SAMPLES * T, D), torch.randn(F, D), torch.randn(1536, 1536), torch.empty(F, D)
    rate = max(
        2 * len(x) * D * F / best_time(lambda: torch.mm(x, weight.t())),
        2 * len(square) ** 3 / best_time(lambda: torch.mm(square, square)),
    )
    bandwidth = 2 * weight.nbytes / best_time(lambda: copy.copy_(weight))
    work = floor_flops(s.lm, kind, LAYER, F, s.active, T) * SAMPLES * T
    return work / rate + 11 * 2 * weight.nbytes / bandwidth


def best_time(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of ten runs."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def profile() -> None:
    """Prints the operators of local steps at L0 50 by their own CPU time."""
    s = setup(random_model(), STATES[1])
    trainer = our_trainer(s, "local")
    for _ in range(3):
        our_step(trainer, s.tokens)
    trainer.timings.seconds.clear()
    start = time.perf_counter()
    for _ in range(5):
        our_step(trainer, s.tokens)
    total = (time.perf_counter() - start) / 5
    print(f"{total * 1e3:.1f} ms a step, floor {floor_seconds(s, 'local') * 1e3:.1f} ms; by phase:")
    print({name: f"{seconds / 5 * 1e3:.1f}" for name, seconds in trainer.timings.seconds.items()})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            our_step(trainer, s.tokens)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


if __name__ == "__main__":
    profile()
