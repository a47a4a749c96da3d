"""The training step on a CPU against the straightforward one.

A random 4-layer GPT-2 with d = 64 and V = 50,257; 4 × 512 tokens; 3,200 latents at layer 2. Forward and backward.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from benchmarks import straightforward
from e2e_fast import SAE, load_lm, losses
from e2e_fast.step import training_step

LAYER, POSITION, SPARSITY = 2, "blocks.2.hook_resid_pre", 1.0


def setup(l0: float | None, width: int = 64) -> tuple[Any, Any, straightforward.DenseSAE, SAE, torch.Tensor]:
    """Model, LM, both SAEs with equal weights, tokens. ``l0`` shifts the encoder's bias to so many active features."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=4, n_embd=width, n_head=width // 16, n_positions=512, vocab_size=50257)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    lm = load_lm(model, processing="none")
    tokens = torch.randint(50257, (4, 512))
    theirs, ours = straightforward.DenseSAE(width, 3200), SAE(width, 3200)
    if l0 is not None:
        with torch.no_grad():
            x = lm.original(tokens, at=POSITION, suffix=False)[POSITION]
            z = theirs.encoder(x).flatten()
            theirs.encoder.bias -= z[torch.randperm(z.numel())[:100_000]].quantile(1 - l0 / 3200)
    ours.W_enc.data.copy_(theirs.encoder.weight)
    ours.b_enc.data.copy_(theirs.encoder.bias)
    ours.W_dec.data.copy_(theirs.decoder.weight.T)
    ours.b_dec.data.copy_(theirs.decoder.bias)
    return model, lm, theirs, ours, tokens


@pytest.mark.parametrize("l0", [None, 50], ids=["at initialisation", "at L0 50"])
@pytest.mark.parametrize("kind", ["e2e", "local"])
def test_step(duel: Callable[..., Any], kind: str, l0: float | None) -> None:
    model, lm, theirs, ours, tokens = setup(l0)
    loss = losses.e2e(SPARSITY) if kind == "e2e" else losses.local(SPARSITY)
    baseline = straightforward.e2e_step if kind == "e2e" else straightforward.local_step

    def run_ours() -> torch.Tensor:
        ours.zero_grad()
        return training_step(lm, {POSITION: ours}, loss, tokens).loss

    def run_baseline() -> torch.Tensor:
        theirs.zero_grad()
        return baseline(model, theirs, tokens, LAYER, SPARSITY)

    torch.testing.assert_close(run_ours(), run_baseline(), rtol=1e-4, atol=1e-6)
    assert ours.W_enc.grad is not None
    assert ours.W_dec.grad is not None
    assert theirs.encoder.weight.grad is not None
    assert theirs.decoder.weight.grad is not None
    for got, want in (
        (ours.W_enc.grad, theirs.encoder.weight.grad),
        (ours.W_dec.grad, theirs.decoder.weight.grad.T),
    ):
        assert (got - want).norm() <= 1e-3 * want.norm()
    duel(
        f"{kind} step {'at L0 50' if l0 else 'at initialisation'}",
        run_ours,
        run_baseline,
        floor=(lambda: prefix(lm, tokens)) if kind == "local" else None,
    )


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("part", ["blocks", "spliced blocks and gradient"])
def test_model(duel: Callable[..., Any], part: str, width: int) -> None:
    """The model's blocks by our operators (``fast=True``) against its own: all four, or two with their gradient."""
    _, lm, _, _, tokens = setup(None, width)
    originals = {fast: lm.original(tokens, at=POSITION, fast=fast) for fast in (True, False)}

    def run(fast: bool) -> torch.Tensor:
        if part == "blocks":
            return lm.original(tokens, at=POSITION, fast=fast).final
        x = originals[fast][POSITION].clone().requires_grad_()
        return torch.autograd.grad(originals[fast].splice(x).final.square().sum(), x)[0]

    ours, theirs = run(True), run(False)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    duel(f"{part}, d = {width}", lambda: run(True), lambda: run(False))


def prefix(lm: Any, tokens: torch.Tensor) -> None:
    """A local step's floor: the model's first blocks; the SAE counts as free."""
    lm.original(tokens, at=POSITION, suffix=False, fast=True)
