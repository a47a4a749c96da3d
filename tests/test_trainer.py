"""Training from end to end on a tiny model: what is saved, logged, resumed and refused."""

import errno
import io
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import AT, LAST, LATER

import e2e_fast
from e2e_fast import checkpoint, files
from e2e_fast.compare.dictionaries import recorded_alive
from e2e_fast.files import CheckpointError
from e2e_fast.sae import SAEActs, to_e2e_sae


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return tiny.tokens()


def settings(save_dir: Path | None = None, **changes: Any) -> dict[str, Any]:
    return tiny.settings(save_dir, **({"warmup_samples": 8, "loss": tiny.DOWNSTREAM} | changes))


def weights(run: e2e_fast.Run) -> dict[str, torch.Tensor]:
    return to_e2e_sae(run.model.by_position)


def test_training_lowers_the_loss_and_saves_what_it_logged(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    repeated = np.tile(tokens[:8], (60, 1))
    run = e2e_fast.train(settings(tmp_path, n_samples=480, lr=3e-3), lm=model, tokens=repeated, quiet=True)
    assert run.folder is not None
    rows = [row for row in run.history if "loss" in row]
    assert rows[-1]["loss/train/logits_kl"] < 0.7 * rows[0]["loss/train/logits_kl"]
    assert [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == run.history
    assert (run.folder / "final_config.yaml").exists()
    loaded = e2e_fast.SAETransformer.from_local_path(run.folder, lm=model)
    for key, value in to_e2e_sae(loaded.by_position).items():
        assert torch.equal(value, weights(run)[key]), key


def test_a_finished_run_says_what_it_took_and_which_features_are_alive(
    model: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    changes = {"collect_act_frequency_every_n_samples": 48, "act_frequency_n_tokens": 128, "save_every_n_samples": 24}
    run = e2e_fast.train(settings(tmp_path, **changes), lm=model, tokens=tokens, quiet=True)
    assert run.folder is not None
    summary = checkpoint.read_summary(run.folder)
    assert summary["samples"] == 48
    assert summary["timed_tokens"] == summary["total_tokens"] == tokens[:48].size
    assert summary["seconds"] > 0
    assert (summary["members"], summary["processes"], summary["device"]) == (1, 1, "cpu")
    assert (summary["e2e_fast"], summary["torch"]) == (e2e_fast.__version__, torch.__version__)
    acts = run.model.forward(torch.from_numpy(tokens[:8]))[1][AT]
    assert isinstance(acts, SAEActs)
    fired = (acts.c > 0).flatten(0, 1).any(0).nonzero().flatten().tolist()
    alive = recorded_alive(run.folder)
    assert alive is not None
    assert alive.tolist() == fired
    assert len(alive) == run.history[-1][f"sparsity/alive_dict_elements_final/{AT}"]
    assert recorded_alive(run.folder / "samples_24.safetensors") is None
    e2e_fast.train(settings(tmp_path, **changes), lm=model, tokens=tokens, quiet=True, resume=run.folder)
    assert checkpoint.read_summary(run.folder) == summary, "a run with nothing left to do keeps its record"


def test_the_same_seed_gives_the_same_bits(model: Any, tokens: np.ndarray) -> None:
    runs = [e2e_fast.train(settings(), lm=model, tokens=tokens, quiet=True) for _ in range(2)]
    for key, value in weights(runs[0]).items():
        assert torch.equal(value, weights(runs[1])[key]), key
    assert runs[0].history == runs[1].history


@pytest.mark.parametrize("positions", [AT, [AT, LAST]], ids=["one position", "two positions"])
@pytest.mark.parametrize("every", [16, 24])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    model: Any, tokens: np.ndarray, tmp_path: Path, positions: Any, every: int
) -> None:
    changes = {
        "save_every_n_samples": every,
        "saes": {"sae_positions": positions, "dict_size_to_input_ratio": 3.0},
        "collect_act_frequency_every_n_samples": 16,
        "act_frequency_n_tokens": 200,
    }
    whole = e2e_fast.train(settings(tmp_path / "whole", **changes), lm=model, tokens=tokens, quiet=True)
    assert whole.folder is not None
    cut = tmp_path / "cut"
    cut.mkdir()
    first = checkpoint.resumable(whole.folder)
    # Pretend that the run was killed after its earlier checkpoint.
    assert first == 48
    for path in whole.folder.iterdir():
        if str(48) not in path.name:
            (cut / path.name).write_bytes(path.read_bytes())
    resumed = e2e_fast.train(settings(cut, **changes), lm=model, tokens=tokens, resume=cut, quiet=True)
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key
    assert resumed.history == whole.history[-len(resumed.history) :]


def test_e2e_saes_own_folders_are_read_and_can_be_written(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    run = e2e_fast.train(settings(), lm=model, tokens=tokens, quiet=True)
    folder = tmp_path / "theirs"
    checkpoint.write_config(folder, settings())
    files.save_tensors(folder / "samples_8.pt", weights(run))
    files.save_tensors(folder / "samples_100.pt", {k: v + 1 for k, v in weights(run).items()})
    newest = e2e_fast.SAETransformer.from_local_path(folder, lm=model)
    older = e2e_fast.SAETransformer.from_local_path(folder, lm=model, checkpoint_file="samples_8.pt")
    for key, value in weights(run).items():
        assert torch.equal(to_e2e_sae(older.by_position)[key], value)
        assert torch.equal(to_e2e_sae(newest.by_position)[key], value + 1)


class _Malicious:
    def __reduce__(self) -> Any:
        return (os.system, ("true",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples_1.pt"
    torch.save({"a": _Malicious()}, path)
    with pytest.raises(CheckpointError, match="plain tensors"):
        files.load_tensors(path)


def test_weights_of_another_shape_are_refused(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    run = e2e_fast.train(settings(), lm=model, tokens=tokens, quiet=True)
    other = settings(saes={"sae_positions": AT, "dict_size_to_input_ratio": 2.0})
    with pytest.raises(ValueError, match=r"shape \[96, 32\].*needs \[64, 32\]"):
        e2e_fast.train(other, lm=model, tokens=tokens, init=weights(run), quiet=True)
    elsewhere = settings(saes={"sae_positions": LAST, "dict_size_to_input_ratio": 3.0})
    with pytest.raises(ValueError, match="which no SAE here has"):
        e2e_fast.train(elsewhere, lm=model, tokens=tokens, init=weights(run), quiet=True)
    lacking = {k: v for k, v in weights(run).items() if "bias" not in k}
    with pytest.raises(ValueError, match="weights lack .*decoder.bias"):
        e2e_fast.train(settings(), lm=model, tokens=tokens, init=lacking, quiet=True)


def test_pretrained_saes_stay_frozen_unless_retrained(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    run = e2e_fast.train(settings(), lm=model, tokens=tokens, quiet=True)
    path = files.save_tensors(tmp_path / "first.safetensors", weights(run))
    saes = {"sae_positions": [AT, LAST], "dict_size_to_input_ratio": 3.0, "pretrained_sae_paths": str(path)}
    frozen = e2e_fast.train(settings(saes=saes), lm=model, tokens=tokens, quiet=True)
    retrained = e2e_fast.train(settings(saes=saes | {"retrain_saes": True}), lm=model, tokens=tokens, quiet=True)
    for key, value in weights(run).items():
        assert torch.equal(weights(frozen)[key], value), key
        assert not torch.equal(weights(retrained)[key], value), key
    for sae in frozen.model.by_position.values():
        assert sae.training == sae.W_enc.requires_grad
    only = settings(saes=saes | {"sae_positions": AT})
    with pytest.raises(ValueError, match="nothing to train"):
        e2e_fast.train(only, lm=model, tokens=tokens, quiet=True)


def test_evaluation_runs_without_wandb_on_its_own_interval(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "eval.npy", tokens[:10])
    data = {"dataset_name": str(tmp_path / "eval.npy"), "tokenizer_name": "none", "split": "train", "n_ctx": 16}
    changes: dict[str, Any] = {"eval_every_n_samples": 24, "eval_n_samples": 6, "eval_data": data}
    run = e2e_fast.train(settings(log_every_n_grad_steps=100, **changes), lm=model, tokens=tokens, quiet=True)
    evaluated = [row["samples"] for row in run.history if "performance/eval/difference_ce_loss" in row]
    assert evaluated == [4, 24, 48]
    assert f"loss/eval/in_to_orig/explained_variance/{LATER}" in run.history[0]


def test_evaluate_gives_kl_and_later_explained_variance_of_a_local_sae(model: Any, tokens: np.ndarray) -> None:
    trainer = e2e_fast.LocalTrainer(settings(), lm=model, tokens=tokens, quiet=True)
    assert trainer.loss.kind == "local"
    metrics = e2e_fast.evaluate(trainer.fit().model, tokens[:10])
    assert metrics["loss/eval/logits_kl"] > 0
    assert {k for k in metrics if "/in_to_orig/explained_variance/" in k} == {
        f"loss/eval/in_to_orig/explained_variance/blocks.{i}.hook_resid_post" for i in (1, 2, 3)
    }
    split = [e2e_fast.evaluate(trainer.model, tokens[:8], batch_size=b)["loss/eval/logits_kl"] for b in (2, 8)]
    assert split[0] == pytest.approx(split[1], rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "kind"),
    [(e2e_fast.LocalTrainer, "local"), (e2e_fast.E2ETrainer, "e2e"), (e2e_fast.E2EDownstreamTrainer, "e2e+downstream")],
)
def test_the_trainers_are_presets_of_the_loss(model: Any, tokens: np.ndarray, trainer: Any, kind: str) -> None:
    loss = settings()["loss"] | {"in_to_orig": None}
    made = trainer(settings(loss=loss), lm=model, tokens=tokens, quiet=True)
    assert made.loss.kind == kind
    assert made.loss.sparsity.coeff == 0.2
    if kind == "e2e+downstream":
        assert made.loss.downstream == (LATER, LAST)
    made.fit()
    assert {"backward", "optimizer", "SAE"} <= made.timings.seconds.keys()


@pytest.mark.parametrize("position", ["hook_mlp_out", "blocks.1.hook_attn_out", "blocks.2.mlp.hook_post"])
@pytest.mark.parametrize("k", [None, 5])
def test_every_kind_of_position_trains_with_relu_and_topk(
    model: Any, tokens: np.ndarray, position: str, k: int | None
) -> None:
    saes = {"sae_positions": position, "dict_size_to_input_ratio": 2.0, "k": k}
    loss = settings()["loss"] | {"in_to_orig": {"total_coeff": 1.0, "hook_positions": "blocks.3.hook_resid_post"}}
    run = e2e_fast.train(settings(saes=saes, loss=loss, n_samples=16), lm=model, tokens=tokens, quiet=True)
    assert math.isfinite(run.history[0]["loss"])
    if k is not None:
        assert all(v <= k for key, v in run.history[0].items() if "/L_0/" in key)


def test_alive_features_are_counted_in_their_window_and_at_the_end(model: Any, tokens: np.ndarray) -> None:
    changes: dict[str, Any] = {"collect_act_frequency_every_n_samples": 24, "act_frequency_n_tokens": 128}
    run = e2e_fast.train(settings(**changes), lm=model, tokens=tokens, quiet=True)
    key = f"sparsity/alive_dict_elements/{AT}"
    assert [row["samples"] for row in run.history if key in row] == [8, 32]
    assert 0 < run.history[-1][f"sparsity/alive_dict_elements_final/{AT}"] <= 96


def test_nan_stops_with_the_step_and_keeps_the_last_checkpoint(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    trainer = e2e_fast.Trainer(settings(tmp_path, save_every_n_samples=16), lm=model, tokens=tokens, quiet=True)
    save = trainer.save

    def poison() -> Any:
        path = save()
        with torch.no_grad():
            trainer.saes[AT].W_enc[3, 5] = float("nan")
        return path

    trainer.save = poison
    message = r"optimizer step 2 \(sample 20\).*W_enc.*samples_16.safetensors"
    with pytest.raises(e2e_fast.TrainingStopped, match=message):
        trainer.fit()
    assert trainer.folder is not None
    kept = files.load_tensors(trainer.folder / "samples_16.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())


def test_nan_in_the_activations_stops_before_any_update(model: Any, tokens: np.ndarray) -> None:
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.wte.weight[60] = float("nan")
    message = "the activations or the data gave it; no checkpoint was saved yet"
    with pytest.raises(e2e_fast.TrainingStopped, match=message):
        e2e_fast.train(settings(), lm=broken, tokens=tokens, quiet=True)


def test_a_full_disk_leaves_the_older_checkpoint_whole(
    model: Any, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = e2e_fast.Trainer(settings(tmp_path, save_every_n_samples=16), lm=model, tokens=tokens, quiet=True)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if trainer.samples > 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = r"cannot write .*samples_32.*No space left.*older checkpoints are intact"
    with pytest.raises(CheckpointError, match=message):
        trainer.fit()
    assert trainer.folder is not None
    names = sorted(p.name for p in trainer.folder.iterdir())
    assert names == ["final_config.yaml", "metrics.jsonl", "resume_16.safetensors", "samples_16.safetensors"]
    e2e_fast.SAETransformer.from_local_path(trainer.folder, lm=model)


def test_files_of_a_run_can_be_read_by_whom_the_umask_lets(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = e2e_fast.train(settings(tmp_path), lm=model, tokens=tokens, quiet=True)
    finally:
        os.umask(before)
    assert run.folder is not None
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in run.folder.iterdir()}
    assert len(modes) == 5
    assert set(modes.values()) == {"0o640"}, modes


def test_rows_that_find_no_room_are_named_with_their_file(
    model: Any, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = e2e_fast.Trainer(settings(tmp_path), lm=model, tokens=tokens, quiet=True)

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = flush

    def opened(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        return Full() if path.name == "metrics.jsonl" else open(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics.jsonl: No space left"):
        trainer.fit()


def test_a_wandb_that_does_not_start_is_one_clear_line(
    model: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UsageError(Exception):
        pass

    def init(**_: Any) -> None:
        raise UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=UsageError))
    message = r"wandb_project 'p': wandb starts no run \(No API key configured. Use `wandb login`\); log in .*=offline"
    with pytest.raises(ValueError, match=message):
        e2e_fast.train(settings(wandb_project="p"), lm=model, tokens=tokens, quiet=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_float32_losses_and_metrics(tokens: np.ndarray, dtype: torch.dtype) -> None:
    loud = {"in_to_orig": {"total_coeff": 1.0, "hook_positions": [LATER]}, "out_to_in": {"coeff": 0.5}}
    loss = tiny.DOWNSTREAM | loud | {"out_to_orig": {"coeff": 0.5}}
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e5)  # squared errors above float16's greatest number
    whole, half = (
        e2e_fast.train(settings(loss=loss), lm=lm, tokens=tokens, quiet=True) for lm in (model, model.to(dtype))
    )
    ours, theirs = half.history[0], whole.history[0]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.startswith(("loss/train/out_to", "loss/train/in_to")) and "explained" not in key:
            assert value > 65504, key
            assert ours[key] == pytest.approx(value, rel=0.01), key
            assert ours[key] != float(torch.tensor(ours[key]).to(dtype)), key
    assert e2e_fast.evaluate(half.model, tokens)["performance/eval/orig_model_ce_loss"] > 0


def test_wandb_gets_the_rows_when_it_is_asked_for(
    model: Any, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[dict[str, float], int]] = []

    class FakeRun:
        def log(self, row: dict[str, float], step: int) -> None:
            logged.append((row, step))

        def finish(self) -> None:
            logged.append(({}, -1))

    started: dict[str, Any] = {}
    fake = types.SimpleNamespace(init=lambda **options: (started.update(options), FakeRun())[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = e2e_fast.train(settings(wandb_project="p", wandb_run_name="r"), lm=model, tokens=tokens, quiet=True)
    assert (started["project"], started["name"]) == ("p", "r")
    assert started["config"]["loss"]["sparsity"]["coeff"] == 0.2
    assert [step for _, step in logged] == [*(int(row["samples"]) for row in run.history), -1]
    assert logged[0][0]["loss"] == run.history[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saes": {"sae_positions": "blocks.9.hook_resid_pre"}}, "'blocks.9.hook_resid_pre' is not in this model"),
        ({"saes": {"sae_positions": AT, "k": 99}}, r"k must lie in \[1, 32\].*got 99"),
        ({"tlens_model_name": "no/such/folder", "lm": None}, "no/such/folder"),
    ],
)
def test_settings_the_model_cannot_meet_are_refused(
    model: Any, tokens: np.ndarray, changes: dict[str, Any], message: str
) -> None:
    lm = changes.pop("lm", model)
    with pytest.raises((ValueError, OSError), match=message):
        e2e_fast.train(settings(**changes), lm=lm, tokens=tokens, quiet=True)


def test_tokens_the_model_cannot_read_are_refused(model: Any, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="context length 16, got 20"):
        e2e_fast.train(settings(), lm=model, tokens=np.zeros((8, 20), dtype=np.int64), quiet=True)
    with pytest.raises(ValueError, match="61"):
        e2e_fast.train(settings(), lm=model, tokens=tokens + 1, quiet=True)


def test_a_hidden_position_of_the_loss_is_refused(model: Any, tokens: np.ndarray) -> None:
    loss = settings()["loss"] | {"in_to_orig": {"total_coeff": 1.0, "hook_positions": "blocks.7.hook_resid_pre"}}
    with pytest.raises(ValueError, match=r"blocks\.7\.hook_resid_pre"):
        e2e_fast.train(settings(loss=loss), lm=model, tokens=tokens, quiet=True)
