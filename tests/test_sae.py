"""SAETransformer behaves as e2e_sae's class: names, calls, gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
import transformers

import e2e_fast
from e2e_fast import checkpoint
from e2e_fast.config import ConfigError
from e2e_fast.kernels import JumpCode
from e2e_fast.sae import SAEActs, to_e2e_sae
from e2e_fast.sae_transformer import CacheActs

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


KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 4},
    "batch_topk": {"k": 4, "activation": "batch_topk"},
    "jump_relu": {"activation": "jump_relu", "threshold": 0.3, "bandwidth": 0.1},
}


@pytest.mark.parametrize("normalize_decoder", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_dense_codes_of_an_sae_agree(kind: str, normalize_decoder: bool) -> None:
    sae, x = e2e_fast.SAE(16, 64, normalize_decoder=normalize_decoder, **KINDS[kind]), torch.randn(3, 5, 16)
    sae.W_dec.data *= 3
    sae(x)
    with torch.no_grad():
        acts = sae(x)
    torch.testing.assert_close(sae.encode(x), acts.c)
    torch.testing.assert_close(sae.decode(acts.c), acts.output)
    rows = nnf.normalize(sae.W_dec, dim=-1) if normalize_decoder else sae.W_dec
    torch.testing.assert_close(acts.output, acts.c @ rows + sae.b_dec)
    assert torch.equal(acts.l0(), (acts.c > 0).sum(-1).flatten())
    assert torch.equal(acts.norm(0), acts.l0().float())
    assert torch.equal(acts.counts(), (acts.c > 0).sum((0, 1)))
    assert (
        eval(repr(sae), {"SAE": lambda **given: given}) if kind == "relu" else kind in repr(sae) or "k=4" in repr(sae)
    )


def test_an_sae_says_what_it_is() -> None:
    said = [repr(e2e_fast.SAE(16, 64, **kind)) for kind in KINDS.values()]
    size = "SAE(d_in=16, d_sae=64"
    assert said == [
        f"{size})", f"{size}, k=4)", f"{size}, activation=batch_topk, k=4)", f"{size}, activation=jump_relu)"
    ]  # fmt: skip
    assert repr(e2e_fast.SAE(16, 64, normalize_decoder=False)) == f"{size}, normalize_decoder=False)"


def test_k_alone_means_topk_and_contradictions_are_refused() -> None:
    assert (e2e_fast.SAE(4, 8).activation, e2e_fast.SAE(4, 8, k=2).activation) == ("relu", "topk")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"activation": "topk"}, "k belongs to topk and batch_topk, got k=None with activation 'topk'"),
        ({"activation": "relu", "k": 2}, "got k=2 with activation 'relu'"),
        ({"activation": "gelu"}, "activation must be one of relu, topk, batch_topk, jump_relu, got 'gelu'"),
        ({"activation": "jump_relu", "threshold": 0.0}, "threshold must be above 0"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            e2e_fast.SAE(4, 8, **arguments)


def test_batch_topk_shares_its_places_in_training_alone() -> None:
    sae, x = e2e_fast.SAE(16, 64, **KINDS["batch_topk"]), torch.randn(40, 16)
    x[:20] *= 4
    acts = sae(x)
    assert int(acts.l0().sum()) == 4 * 40
    assert acts.l0()[:20].sum() > 3 * acts.l0()[20:].sum()
    smallest = acts.code.values[acts.code.values > 0].min()
    assert torch.equal(sae.running_threshold, smallest)
    for alone in (sae.eval()(x[3:4]).c, sae.train().encode(x[3:4])):
        torch.testing.assert_close(alone, sae.encode(x)[3:4])
    before = sae.running_threshold.clone()
    with torch.no_grad():
        sae.train()(x)
    assert torch.equal(sae.running_threshold, before)


@pytest.mark.parametrize("batches", [10, 100, 3000])
def test_batch_topks_threshold_follows_a_training_of_any_length(batches: int) -> None:
    """The smallest kept activation falls from 2 to 1 over the training, as it does while an SAE learns."""
    sae = e2e_fast.SAE(16, 64, **KINDS["batch_topk"])
    for step in range(batches):
        sae._observe_threshold(torch.tensor([[0.0, 5.0, 2 - (step + 1) / batches]]))
    assert 1 <= sae.running_threshold < 1.12
    before = sae.running_threshold.clone()
    sae._observe_threshold(torch.zeros(3, 4))  # a batch that kept nothing
    assert torch.equal(sae.running_threshold, before)


def test_batch_topk_keeps_k_a_token_on_average_after_a_short_training() -> None:
    torch.manual_seed(0)
    sae = e2e_fast.SAE(16, 64, **KINDS["batch_topk"])
    optimizer, x = torch.optim.Adam(sae.parameters(), lr=3e-2), torch.randn(60, 200, 16)
    sae(x[0])
    first = sae.running_threshold.clone()
    for batch in x:
        acts = sae(batch)
        loss = (acts.output - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y = torch.randn(500, 16)
    assert sae.eval()(y).l0().float().mean() == pytest.approx(4, rel=0.1)
    sae.running_threshold.copy_(first)
    assert sae(y).l0().float().mean() > 5  # the weights have outgrown the threshold of the first batch


def test_jump_relu_trains_its_thresholds_on_the_l0() -> None:
    sae, x = e2e_fast.SAE(16, 64, **KINDS["jump_relu"]), torch.randn(400, 16)
    acts = sae(x)
    assert isinstance(acts.code, JumpCode)
    acts.norm(0).mean().backward()
    assert sae.log_threshold.grad is not None
    assert (sae.log_threshold.grad <= 0).all()  # raising a threshold lowers the L0
    assert sae.log_threshold.grad.any()
    assert sae.W_enc.grad is None


def run_settings(save_dir: Path | None, kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "tlens_model_name": "tiny",
        "save_dir": save_dir,
        "n_samples": 80,
        "save_every_n_samples": 40,
        "eval_n_samples": None,
        "batch_size": 8,
        "lr": 1e-2,
        "max_grad_norm": 1.0,
        "log_every_n_grad_steps": 1,
        "collect_act_frequency_every_n_samples": 0,
        "loss": {
            "sparsity": {"coeff": 0.05, "p_norm": 0 if kind == "jump_relu" else 1},
            "in_to_orig": None,
            "out_to_orig": None,
            "out_to_in": {"coeff": 0.0},
            "logits_kl": {"coeff": 1.0},
        },
        "train_data": {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": 10},
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 3.0, **KINDS[kind]},
    } | changes


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_trains_end_to_end_and_resumes_to_the_bit(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lm = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=16, vocab_size=61)
    )
    for parameter in lm.parameters():  # a model whose outputs depend on its activations
        parameter.data *= 3
    tokens = np.tile(np.random.default_rng(0).integers(61, size=(8, 10)), (10, 1))
    whole = e2e_fast.train(run_settings(tmp_path / "whole", kind), lm=lm, tokens=tokens, quiet=True)
    rows = [row for row in whole.history if "loss" in row]
    assert rows[-1]["loss/train/logits_kl"] < 0.7 * rows[0]["loss/train/logits_kl"]
    assert rows[-1]["loss"] < rows[0]["loss"]

    assert whole.folder is not None
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in whole.folder.iterdir():
        if "80" not in path.name:
            (cut / path.name).write_bytes(path.read_bytes())
    assert checkpoint.resumable(cut) == 40
    resumed = e2e_fast.train(run_settings(tmp_path, kind), lm=lm, tokens=tokens, resume=cut, quiet=True)
    expected = to_e2e_sae(whole.model.by_position)
    for key, value in to_e2e_sae(resumed.model.by_position).items():
        assert torch.equal(value, expected[key]), key
    assert resumed.history == whole.history

    loaded = e2e_fast.SAETransformer.from_local_path(whole.folder, lm=lm)
    batch = torch.from_numpy(tokens[:4])
    with torch.no_grad():
        assert torch.equal(loaded(batch)[0], whole.model(batch)[0])
    (sae,) = loaded.by_position.values()
    assert sae.activation == kind
    metrics = e2e_fast.evaluate(loaded, batch)
    assert 0 < metrics[f"sparsity/eval/L_0/{AT}"] < 96


def test_thresholds_have_keys_of_their_own_in_a_checkpoint(tmp_path: Path) -> None:
    stem = AT.replace(".", "-")
    for kind, key in (("jump_relu", "log_threshold"), ("batch_topk", "running_threshold")):
        sae = e2e_fast.SAE(16, 64, **KINDS[kind])
        state = to_e2e_sae({AT: sae})
        assert set(state) - set(to_e2e_sae({AT: e2e_fast.SAE(16, 64)})) == {f"{stem}.{key}"}


def test_an_l0_that_cannot_be_trained_on_is_refused() -> None:
    settings = run_settings(None, "topk")
    settings["loss"]["sparsity"]["p_norm"] = 0
    with pytest.raises(ConfigError, match="p_norm 0 needs saes.activation jump_relu, the L0 of topk has no gradient"):
        e2e_fast.load_config(settings)
    settings = run_settings(None, "relu")
    settings["saes"]["activation"] = "batch_topk"
    with pytest.raises(ConfigError, match="k belongs to topk and batch_topk"):
        e2e_fast.load_config(settings)
    e2e_fast.load_config(settings | {"sweep": {"k": [2, 3]}})
