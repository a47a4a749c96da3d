"""SAETransformer behaves as e2e_sae's class: names, calls, gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
import transformers

import e2e_fast
from e2e_fast.sae import CacheActs, SAEActs

AT, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture
def model() -> e2e_fast.SAETransformer:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=16, vocab_size=61)
    return e2e_fast.SAETransformer(transformers.GPT2LMHeadModel(config), [AT], dict_size_to_input_ratio=3)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 10))


def test_weights_have_e2e_saes_names_and_orientation(model: e2e_fast.SAETransformer) -> None:
    sae: Any = model.saes["blocks-1-hook_resid_pre"]
    assert (sae.encoder[0].weight.shape, sae.encoder[0].bias.shape) == ((96, 32), (96,))
    assert (sae.decoder.weight.shape, sae.decoder.bias.shape) == ((32, 96), (32,))
    torch.testing.assert_close(sae.dict_elements, nnf.normalize(sae.decoder.weight, dim=0))
    assert model.raw_sae_positions == [AT]
    assert model.all_sae_positions == [AT]


def test_forward_is_the_sae_by_its_formula(model: e2e_fast.SAETransformer, tokens: torch.Tensor) -> None:
    _, raw = model.forward_raw(tokens, cache_positions=[LATER])
    logits, acts = model(tokens, sae_positions=[AT], cache_positions=[LATER])
    sae: Any = model.saes["blocks-1-hook_resid_pre"]
    act = acts[AT]
    assert isinstance(act, SAEActs)
    assert isinstance(acts[LATER], CacheActs)
    c = torch.relu(nnf.linear(raw[AT], sae.encoder[0].weight, sae.encoder[0].bias))
    torch.testing.assert_close(act.c, c)
    torch.testing.assert_close(act.output, nnf.linear(c, sae.dict_elements, sae.decoder.bias))
    assert not torch.equal(acts[LATER].input, raw[LATER])
    assert logits.shape == (2, 10, 61)
    logits.square().mean().backward()
    assert sae.W_enc.grad.abs().sum() > 0


def test_stored_activations_run_the_saes_alone(model: e2e_fast.SAETransformer, tokens: torch.Tensor) -> None:
    logits, raw = model.forward_raw(tokens, run_entire_model=False)
    assert logits is None
    none, acts = model(None, [AT], orig_acts=raw)
    assert none is None
    torch.testing.assert_close(acts[AT].output, model(tokens)[1][AT].output)
    with pytest.raises(ValueError, match="tokens must be given"):
        model(None)


def test_without_saes_the_model_is_the_original(model: e2e_fast.SAETransformer, tokens: torch.Tensor) -> None:
    logits, acts = model(tokens, sae_positions=None, cache_positions=[LATER])
    original, raw = model.forward_raw(tokens, cache_positions=[LATER])
    assert original is not None
    assert torch.equal(logits, original)
    assert torch.equal(acts[LATER].input, raw[LATER])


def test_generate_goes_on_greedily_and_by_chance(model: e2e_fast.SAETransformer, tokens: torch.Tensor) -> None:
    greedy = model.generate(tokens, max_new_tokens=4, temperature=0)
    assert torch.equal(greedy[:, :10], tokens)
    assert torch.equal(greedy[:, 10], model(tokens)[0][:, -1].argmax(-1))
    assert model.generate(tokens, max_new_tokens=9).shape == (2, 19)


@pytest.mark.parametrize("k", [None, 4])
def test_sparse_and_dense_codes_of_an_sae_agree(k: int | None) -> None:
    sae, x = e2e_fast.SAE(16, 64, k=k), torch.randn(3, 5, 16)
    acts = sae(x)
    torch.testing.assert_close(sae.encode(x), acts.c)
    torch.testing.assert_close(sae.decode(acts.c), acts.output)
    assert torch.equal(acts.l0(), (acts.c > 0).sum(-1).flatten())
    assert torch.equal(acts.counts(), (acts.c > 0).sum((0, 1)))
