"""The losses against their formulas, term by term."""

from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
import transformers
from watch import Watch

from e2e_fast import SAE, load_lm, losses
from e2e_fast.kernels import SparseCode
from e2e_fast.metrics import ActFrequency, explained_variance, performance
from e2e_fast.sae import SAEActs
from e2e_fast.step import forward_step, training_step

AT, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture
def setting() -> tuple[Any, SAE, torch.Tensor]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=16, vocab_size=61)
    return load_lm(transformers.GPT2LMHeadModel(config)), SAE(32, 96), torch.randint(61, (3, 16))


def loss_config(**terms: Any) -> losses.LossConfig:
    empty = dict.fromkeys(("in_to_orig", "out_to_orig", "out_to_in", "logits_kl"))
    return losses.LossConfig.model_validate({"sparsity": {"coeff": 0.3}, **empty, **terms})


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_every_term_is_its_formula_and_the_total_their_weighted_sum(setting: Any, p: float) -> None:
    lm, sae, tokens = setting
    config = loss_config(
        sparsity={"coeff": 0.3, "p_norm": p},
        in_to_orig={"total_coeff": 2.0, "hook_positions": [LATER, "blocks.2.hook_mlp_out"]},
        out_to_orig={"coeff": 0.7},
        out_to_in={"coeff": 0.1},
        logits_kl={"coeff": 0.5},
    )
    result = forward_step(lm, {AT: sae}, config, tokens)
    assert result.spliced is not None
    x = result.original[AT]
    c = torch.relu(nnf.linear(x, sae.W_enc, sae.b_enc))
    x_hat = nnf.linear(c, nnf.normalize(sae.W_dec, dim=1).T, sae.b_dec)
    log_p, log_q = result.original.logits().log_softmax(-1), result.spliced.logits().log_softmax(-1)
    expected = {
        f"sparsity/{AT}": c.flatten(0, 1).norm(p=p, dim=-1).mean() / 32,
        f"out_to_in/{AT}": nnf.mse_loss(x_hat, x),
        f"out_to_orig/{AT}": nnf.mse_loss(x_hat, x),
        f"in_to_orig/{LATER}": nnf.mse_loss(result.spliced[LATER], result.original[LATER]),
        "in_to_orig/blocks.2.hook_mlp_out": nnf.mse_loss(
            result.spliced["blocks.2.hook_mlp_out"], result.original["blocks.2.hook_mlp_out"]
        ),
        "logits_kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
    }
    assert result.terms.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(result.terms[key], value.detach(), rtol=1e-4, atol=1e-6, msg=key)
    weights = dict(zip(expected, (0.3, 0.1, 0.7, 1.0, 1.0, 0.5), strict=True))
    total = sum(weights[key] * value for key, value in expected.items())
    torch.testing.assert_close(result.loss, total, rtol=1e-4, atol=1e-6)


def test_gradients_equal_autograd_through_the_whole_unsplit_step(setting: Any) -> None:
    lm, sae, tokens = setting
    config = losses.e2e_downstream(0.3, (LATER,))
    training_step(lm, {AT: sae}, config, tokens)
    got = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()

    original = lm.original(tokens, at=AT, downstream=[LATER])
    x = original[AT]
    c = torch.relu(nnf.linear(x, sae.W_enc, sae.b_enc))
    x_hat = nnf.linear(c, nnf.normalize(sae.W_dec, dim=1).T, sae.b_dec)
    spliced = original.splice(x_hat)
    log_p, log_q = original.logits().log_softmax(-1), spliced.logits().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = 0.5 * kl + 2.5 * nnf.mse_loss(spliced[LATER], original[LATER]) + 0.3 * c.sum(-1).mean() / 32
    loss.backward()
    for name, parameter in sae.named_parameters():
        error = (got[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, (name, float(error))


def test_a_loss_with_coefficient_zero_is_logged_and_not_trained_on(setting: Any) -> None:
    lm, sae, tokens = setting
    with_it = training_step(lm, {AT: sae}, loss_config(out_to_in={"coeff": 0.0}, logits_kl={"coeff": 1.0}), tokens)
    gradient = sae.W_dec.grad.clone()
    sae.zero_grad()
    without = training_step(lm, {AT: sae}, loss_config(logits_kl={"coeff": 1.0}), tokens)
    assert f"out_to_in/{AT}" in with_it.terms
    assert f"out_to_in/{AT}" not in without.terms
    assert torch.equal(gradient, sae.W_dec.grad)


def test_a_local_step_runs_no_suffix(setting: Any) -> None:
    lm, sae, tokens = setting
    result = training_step(lm, {AT: sae}, losses.local(0.3), tokens)
    assert result.spliced is None
    with pytest.raises(RuntimeError, match="suffix"):
        _ = result.original.final


def test_accumulated_gradients_are_those_of_the_whole_batch(setting: Any) -> None:
    lm, sae, tokens = setting
    tokens = torch.cat([tokens, tokens.flip(0)])[:4]
    training_step(lm, {AT: sae}, losses.e2e(0.3), tokens)
    whole = sae.W_enc.grad.clone()
    sae.zero_grad()
    for part in tokens.split(2):
        training_step(lm, {AT: sae}, losses.e2e(0.3), part, accumulation_steps=2)
    torch.testing.assert_close(sae.W_enc.grad, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["e2e+downstream", "balanced+downstream"])
def test_behind_an_sae_in_the_last_block_lies_the_stream_after_it(setting: Any, kind: str) -> None:
    lm, _, _ = setting
    last = lm.n_layers - 1
    for stage in ("hook_resid_pre", "hook_mlp_out"):
        named = losses.named(kind, losses.local(0.3), [f"blocks.{last}.{stage}"], lm.positions())
        assert named.downstream == (f"blocks.{last}.hook_resid_post",)
    with pytest.raises(ValueError, match="there is none in this model"):
        losses.named(kind, losses.local(0.3), [f"blocks.{last}.hook_resid_post"], lm.positions())


def test_performance_in_chunks_equals_whole_logits(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sae, tokens = setting
    result = forward_step(lm, {AT: sae}, losses.e2e(0.3), tokens)
    assert result.spliced is not None
    monkeypatch.setattr("e2e_fast.metrics.CHUNK_BYTES", 8 * 61 * 5)  # five rows a chunk
    got = performance(result.original, result.spliced, tokens)
    p, q = result.original.logits(), result.spliced.logits()
    target = tokens[:, 1:].flatten()
    want = {
        "orig_model_ce_loss": nnf.cross_entropy(p[:, :-1].flatten(0, 1), target),
        "sae_model_ce_loss": nnf.cross_entropy(q[:, :-1].flatten(0, 1), target),
        "sae_model_top1_accuracy": (q[:, :-1].argmax(-1).flatten() == target).float().mean(),
        "orig_vs_sae_top1_consistency": (p.argmax(-1) == q.argmax(-1)).float().mean(),
        "orig_vs_sae_statistical_distance": 0.5 * (p.softmax(-1) - q.softmax(-1)).abs().sum(-1).mean(),
    }
    for key, value in want.items():
        torch.testing.assert_close(got[key], value.detach(), rtol=1e-4, atol=1e-6, msg=key)


def test_explained_variance_is_one_minus_the_share_of_unexplained_distance() -> None:
    target = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    prediction = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    assert explained_variance(prediction, target).tolist() == [1.0, 0.0]


def test_a_feature_is_alive_when_it_fired_in_the_window(setting: Any) -> None:
    lm, sae, tokens = setting
    with torch.no_grad():
        sae.b_enc[:50] = -1e3
    frequency = ActFrequency(n_tokens=48)
    frequency.update(forward_step(lm, {AT: sae}, losses.local(0.3), tokens).acts)
    assert frequency.full
    c = sae.encode(lm.original(tokens, at=AT)[AT]).flatten(0, 1)
    assert torch.equal(frequency.counts[AT], (c > 0).sum(0))
    assert frequency.alive(AT).min() >= 50
    assert frequency.metrics()[f"sparsity/alive_dict_elements/{AT}"] == float(((c > 0).sum(0) > 0).sum())


def test_unused_slots_are_not_all_counted_in_one_place() -> None:
    """A GPU's atomic additions to one address wait for one another: at an L0 of 64 in 2,880 slots, 97 % of them."""
    rows, slots = 8, 6
    values, indices = torch.zeros(rows, slots), torch.zeros(rows, slots, dtype=torch.int32)
    values[:, 0], indices[:, 0] = 1.0, torch.arange(rows, dtype=torch.int32)
    x, frequency = torch.zeros(rows, 4), ActFrequency(n_tokens=rows)
    with Watch() as watch:
        frequency.update({AT: SAEActs(x, x, SparseCode(values, indices, torch.ones(rows, dtype=torch.int32)), 16)})
    assert frequency.counts[AT].tolist() == [1] * rows + [0] * 8
    assert [int(place.bincount().max()) for _, _, place, *_ in watch.calls["aten::scatter_add_"]] == [rows + 1]
