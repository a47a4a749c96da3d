"""Losses and learning rates by phase; the balanced loss; the KL on a share of the positions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
import transformers
import yaml

import e2e_fast
from e2e_fast import losses
from e2e_fast.config import ConfigError
from e2e_fast.losses import InToOrigLoss
from e2e_fast.sae import to_e2e_sae
from e2e_fast.step import training_step

AT, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=16, vocab_size=61)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(61, size=(80, 16))


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "tlens_model_name": "tiny",
        "save_dir": None,
        "n_samples": 80,
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": 4,
        "effective_batch_size": 8,
        "lr": 1e-3,
        "warmup_samples": 8,
        "log_every_n_grad_steps": 1,
        "collect_act_frequency_every_n_samples": 0,
        "loss": losses.local(0.2).model_dump(),
        "schedule": [{"until": 0.6, "loss": "local"}, {"loss": "balanced", "lr": 1e-2, "warmup_samples": 16}],
        "train_data": {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": 16},
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 3.0},
    }
    return base | changes


@pytest.mark.parametrize("downstream", [False, True])
def test_the_balanced_loss_is_its_formula_and_its_gradients_autograds(
    model: Any, tokens: np.ndarray, downstream: bool
) -> None:
    torch.manual_seed(0)
    lm, batch = e2e_fast.load_lm(model), torch.from_numpy(tokens[:3])
    sae: Any = e2e_fast.SAE(32, 96)
    later = InToOrigLoss(total_coeff=0.7, hook_positions=(LATER,)) if downstream else None
    result = training_step(lm, {AT: sae}, losses.balanced(0.3, in_to_orig=later), batch)
    got = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()

    original = lm.original(batch, at=AT, downstream=[LATER])
    x = original[AT]
    c = torch.relu(nnf.linear(x, sae.W_enc, sae.b_enc))
    x_hat = nnf.linear(c, nnf.normalize(sae.W_dec, dim=1).T, sae.b_dec)
    spliced = original.splice(x_hat)
    log_p, log_q = original.logits().log_softmax(-1), spliced.logits().log_softmax(-1)
    kl = torch.sum(log_p.exp() * (log_p - log_q), -1).mean()
    mse = nnf.mse_loss(x_hat, x)
    loss = 0.5 * (mse + (mse / kl).detach() * kl) + 0.3 * c.sum(-1).mean() / 32
    if downstream:
        loss = loss + 0.7 * nnf.mse_loss(spliced[LATER], original[LATER])
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-4, atol=1e-6)
    for name, parameter in sae.named_parameters():
        error = (got[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-3, (name, float(error))


def test_a_schedule_changes_loss_and_learning_rate_at_its_step(model: Any, tokens: np.ndarray) -> None:
    trainer = e2e_fast.Trainer(settings(), lm=model, tokens=tokens, quiet=True)
    rates: list[float] = []
    optimizer = trainer.members[0].optimizer
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    history = trainer.fit().history[1:-1]
    assert ["loss/train/logits_kl" in row for row in history] == [False] * 6 + [True] * 4
    plain = e2e_fast.load_config(settings(schedule=None))
    from e2e_fast.schedule import lr_factor

    assert rates[:6] == [1e-3 * lr_factor(plain, s) for s in range(6)]  # the run's own, over all of its steps
    assert rates[6:] == pytest.approx([0.0, 0.5e-2, 1e-2, 1e-2 * (0.1 + 0.9 * 0.5)])  # two steps up, two down


def test_before_the_change_a_schedule_trains_as_its_first_loss_alone(model: Any, tokens: np.ndarray) -> None:
    scheduled = e2e_fast.train(settings(), lm=model, tokens=tokens, quiet=True)
    alone = e2e_fast.train(settings(schedule=None), lm=model, tokens=tokens, quiet=True)
    at = [row.get("grad_updates") for row in scheduled.history].index(6)
    ours, theirs = ([row["loss"] for row in run.history[:-1]] for run in (scheduled, alone))
    # A balanced loss has the value of the MSE: what differs is the weights after the second phase's first update.
    assert ours[: at + 2] == theirs[: at + 2]
    assert ours[at + 3] != theirs[at + 3]


def test_a_phase_without_a_rate_of_its_own_goes_on_with_the_runs(model: Any, tokens: np.ndarray) -> None:
    schedule = [{"until": 0.5, "loss": "local"}, {"loss": "e2e"}]
    run = e2e_fast.train(settings(schedule=schedule), lm=model, tokens=tokens, quiet=True)
    plain = e2e_fast.train(settings(schedule=None), lm=model, tokens=tokens, quiet=True)
    assert [row.get("lr") for row in run.history] == [row.get("lr") for row in plain.history]


def test_a_schedule_resumes_to_the_same_bits(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    changes = {"save_every_n_samples": 40, "kl_positions": 0.25}
    whole = e2e_fast.train(settings(save_dir=tmp_path, **changes), lm=model, tokens=tokens, quiet=True)
    assert whole.folder is not None
    for path in whole.folder.glob("*_80.safetensors"):
        path.unlink()
    resumed = e2e_fast.train(settings(**changes), lm=model, tokens=tokens, resume=whole.folder, quiet=True)
    expected = to_e2e_sae(whole.model.by_position)
    for key, value in to_e2e_sae(resumed.model.by_position).items():
        assert torch.equal(value, expected[key]), key
    assert resumed.history == whole.history
    assert yaml.safe_load((whole.folder / "final_config.yaml").read_text())["schedule"][1]["loss"] == "balanced"
    assert len((whole.folder / "metrics.jsonl").read_text().splitlines()) == len(whole.history)
    e2e_fast.load_config(whole.folder / "final_config.yaml")


def test_the_kl_on_a_share_of_the_positions_is_unbiased(model: Any, tokens: np.ndarray) -> None:
    """The mean over all subsets that partition the tokens is the KL over all; a draw repeats only with its sample."""
    torch.manual_seed(0)
    lm = e2e_fast.load_lm(model)
    original = lm.original(torch.from_numpy(tokens[:4]), at=AT)
    spliced = original.splice(original[AT] + 0.5 * torch.randn(4, 16, 32))
    parts = [spliced.kl(rows) for rows in torch.randperm(64).chunk(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), spliced.kl(), rtol=1e-5, atol=0)

    member = e2e_fast.Trainer(settings(kl_positions=0.25), lm=lm, tokens=tokens, quiet=True).members[0]
    batch = torch.from_numpy(tokens[:4])
    drawn = np.zeros(64)
    for member.samples in range(400):
        rows, again = member._kl_rows(batch), member._kl_rows(batch)
        assert rows is not None
        assert again is not None
        assert torch.equal(rows, again)
        assert len(set(rows.tolist())) == 16
        drawn[rows.numpy()] += 1
    assert abs(drawn / 400 - 0.25).max() < 0.1  # 4.6 standard deviations of a fair draw


def test_training_on_a_share_of_the_positions_lowers_the_kl_over_all(model: Any, tokens: np.ndarray) -> None:
    changes: dict[str, Any] = {"schedule": None, "loss": losses.e2e(0.0).model_dump(), "n_samples": 480, "lr": 3e-3}
    repeated = np.tile(tokens[:8], (60, 1))
    run = e2e_fast.train(settings(kl_positions=0.25, **changes), lm=model, tokens=repeated, quiet=True)
    before = e2e_fast.Trainer(settings(**changes), lm=model, tokens=repeated, quiet=True).model
    key = "loss/eval/logits_kl"
    assert e2e_fast.evaluate(run.model, tokens[:8])[key] < 0.7 * e2e_fast.evaluate(before, tokens[:8])[key]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": [{"until": 0.5, "loss": "locl"}, {"loss": "e2e"}]}, "schedule.0.loss: Input should be 'local'"),
        ({"schedule": [{"untl": 0.5, "loss": "local"}]}, "schedule.0.untl: unknown key (did you mean until?)"),
        ({"schedule": [{"loss": "local"}, {"loss": "e2e"}]}, "every phase but the last needs until, phase 1 has none"),
        ({"schedule": [{"loss": "local", "until": 0.5}]}, "the last phase ends with the run and has no until, got 0.5"),
        ({"schedule": [{"loss": "local", "until": 1.5}, {"loss": "e2e"}]}, "schedule.0.until: Input should be less"),
        (
            {"schedule": [{"loss": "local", "until": 0.5}, {"loss": "e2e", "until": 0.4}, {"loss": "e2e"}]},
            "until must grow by at least one optimizer step (8 of 80 samples)",
        ),
        ({"schedule": [{"loss": "local", "until": 0.01}, {"loss": "e2e"}]}, "until must grow by at least one"),
        ({"schedule": [{"loss": "local", "warmup_samples": 8}]}, "warmup_samples needs lr, phase 1 has none"),
        ({"schedule": [{"loss": {"sparsity": {"coeff": 1}}}]}, "schedule.0.loss.in_to_orig: missing"),
        ({"schedule": []}, "schedule"),
        ({"n_samples": None, "lr_schedule": "linear"}, "schedule needs n_samples"),
        ({"kl_positions": 0}, "kl_positions: Input should be greater than 0"),
        ({"loss": losses.e2e(0.1).model_dump() | {"balanced": True}}, "balanced needs out_to_in with a coeff above 0"),
    ],
)
def test_a_mistake_in_a_schedule_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        e2e_fast.load_config(json.loads(json.dumps(settings(**changes))))
    assert message in str(error.value)


def test_a_trainer_of_one_kind_refuses_a_schedule(model: Any, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="needs schedule to be None"):
        e2e_fast.LocalTrainer(settings(), lm=model, tokens=tokens, quiet=True)
