"""Activations, logits and gradients against TransformerLens: HookedTransformer (below 4) and TransformerBridge."""

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from lm_models import FAMILIES, bridge, hooked_transformer, random_model, random_tokens
from torch import Tensor

from e2e_fast.lm import load_lm

lens: Any = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
has_hooked_transformer = pytest.mark.skipif(
    int(version("transformer-lens").partition(".")[0]) >= 4, reason="TransformerLens 4 has no HookedTransformer"
)

# TransformerLens' converter for Llama leaves out biases, which only Llama-shaped models of other makers have.
HOOKED = [family for family in FAMILIES if family != "llama_biased"]


def assert_same_activations(original: Any, logits: Tensor, cache: Any, positions: list[str]) -> None:
    """Within 1e-5 of the largest entry, position by position."""
    assert (original.logits() - logits).abs().max() <= 1e-5 * logits.abs().max()
    for position in positions:
        expected = cache[position]
        assert original[position].shape == expected.shape, position
        assert (original[position] - expected).abs().max() <= 1e-5 * expected.abs().max(), position


@has_hooked_transformer
@pytest.mark.parametrize("family", HOOKED)
def test_activations_equal_run_with_cache_of_the_processed_model(family: str) -> None:
    model, tokens = random_model(family), random_tokens()
    theirs = hooked_transformer(copy.deepcopy(model))
    logits, cache = theirs.run_with_cache(tokens)
    lm = load_lm(model)
    assert_same_activations(lm.original(tokens, at=lm.positions()), logits, cache, lm.positions())


@has_hooked_transformer
@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("family", HOOKED)
def test_a_hooked_transformer_is_cut_as_it_is(family: str, processed: bool) -> None:
    theirs, tokens = hooked_transformer(random_model(family), processed), random_tokens()
    logits, cache = theirs.run_with_cache(tokens)
    lm = load_lm(theirs, "none")
    original = lm.original(tokens, at=lm.positions())
    assert_same_activations(original, logits, cache, lm.positions())
    for position in lm.positions():
        spliced = original.splice({position: original[position]})
        assert (spliced.logits() - logits).abs().max() <= 1e-5, position
    assert not any(p._forward_hooks for p in theirs.modules())


@has_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_an_unprocessed_hooked_transformer_is_processed_by_us(family: str) -> None:
    model, tokens = random_model(family), random_tokens()
    logits, cache = hooked_transformer(copy.deepcopy(model)).run_with_cache(tokens)
    lm = load_lm(hooked_transformer(model, processed=False))
    assert_same_activations(lm.original(tokens, at=lm.positions()), logits, cache, lm.positions())


@has_hooked_transformer
@pytest.mark.parametrize("family", HOOKED)
def test_gradients_at_every_position_equal_those_of_run_with_hooks(family: str) -> None:
    model, tokens = random_model(family), random_tokens()
    theirs, lm = hooked_transformer(copy.deepcopy(model)), load_lm(model)
    original = lm.original(tokens, at=lm.positions())
    target = nnf.log_softmax(theirs(tokens).detach(), dim=-1).flatten(0, 1)
    for position in lm.positions():
        noise = torch.randn(original[position].shape, generator=torch.Generator().manual_seed(4))
        mine = (original[position] + 0.3 * noise).requires_grad_()
        yours = mine.detach().clone().requires_grad_()
        kl = original.splice({position: mine}).kl()
        logits = theirs.run_with_hooks(tokens, fwd_hooks=[(position, lambda _, hook, yours=yours: yours)])
        expected = nnf.kl_div(
            nnf.log_softmax(logits, dim=-1).flatten(0, 1), target, log_target=True, reduction="batchmean"
        )
        kl.backward()
        expected.backward()
        assert mine.grad is not None
        assert yours.grad is not None
        torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-6, msg=position)
        error = (mine.grad - yours.grad).abs().max() / yours.grad.abs().max()
        assert error <= 1e-4, position


@has_hooked_transformer
@pytest.mark.parametrize("pair", [("hook_attn_out", "hook_mlp_out"), ("hook_resid_mid", "mlp.hook_post")])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_two_replacements_inside_a_block_equal_two_hooks(family: str, pair: tuple[str, str]) -> None:
    model, tokens = random_model(family), random_tokens()
    theirs, lm = hooked_transformer(copy.deepcopy(model)), load_lm(model)
    early, late = (f"blocks.1.{stage}" for stage in pair)
    original = lm.original(tokens, at=[early, late], downstream=["blocks.2.hook_resid_mid"])
    spliced = original.splice({late: lambda x: 0.5 * x + 0.1, early: lambda x: 0.8 * x})
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x

    logits = theirs.run_with_hooks(
        tokens,
        fwd_hooks=[
            (late, keep),
            (early, lambda x, hook: 0.8 * x),
            (late, lambda x, hook: 0.5 * x + 0.1),
            ("blocks.2.hook_resid_mid", keep),
        ],
    )
    assert (spliced.logits() - logits).abs().max() <= 1e-5 * logits.abs().max()
    for position, expected in seen.items():
        assert (spliced[position] - expected).abs().max() <= 1e-5 * expected.abs().max(), position


@pytest.mark.parametrize("processing", ["transformer_lens", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_gives_its_own_activations(family: str, processing: str) -> None:
    tokens, theirs = random_tokens(), bridge(random_model(family), processed=processing == "transformer_lens")
    lm = load_lm(theirs, processing)
    with torch.no_grad():
        logits, cache = theirs.run_with_cache(tokens)
        assert_same_activations(lm.original(tokens, at=lm.positions()), logits, cache, lm.positions())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_raw_bridge_is_processed_like_its_model(family: str) -> None:
    model, tokens = random_model(family), random_tokens()
    expected = load_lm(copy.deepcopy(model)).original(tokens, at="blocks.2.hook_mlp_out")
    actual = load_lm(bridge(model)).original(tokens, at="blocks.2.hook_mlp_out")
    torch.testing.assert_close(actual["blocks.2.hook_mlp_out"], expected["blocks.2.hook_mlp_out"])
    torch.testing.assert_close(actual.logits(), expected.logits())


def test_a_bridge_is_left_as_found_and_its_eager_attention_is_not_taken_over() -> None:
    theirs, tokens = bridge(random_model("qwen3")), random_tokens()
    before = theirs(tokens).detach()
    lm = load_lm(theirs, "none")
    original = lm.original(tokens, at="blocks.1.hook_resid_mid")
    original.splice((original["blocks.1.hook_resid_mid"] * 0.9).requires_grad_()).kl().backward()
    assert theirs.original_model.config._attn_implementation == "eager"
    assert lm.config._attn_implementation == "sdpa"
    assert torch.equal(theirs(tokens), before)
    assert all(p.grad is None for p in theirs.original_model.parameters())


@has_hooked_transformer
def test_hooked_transformers_without_mlps_are_refused() -> None:
    config = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "d_vocab": 9, "attn_only": True, "device": "cpu"}
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**config))
    with pytest.raises(ValueError, match="must have MLPs"):
        load_lm(model)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char"])
def test_a_booted_bridge_of_a_real_model_is_cut(name: str, shared: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    theirs = TransformerBridge.boot_transformers(str(shared / "models" / name), device="cpu")
    theirs.enable_compatibility_mode()
    lm, tokens = load_lm(theirs), torch.randint(100, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, cache = theirs.run_with_cache(tokens)
        assert_same_activations(lm.original(tokens, at=lm.positions()), logits, cache, lm.positions())
    assert lm.tokenizer is theirs.tokenizer
