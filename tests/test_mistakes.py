"""What a user may get wrong ends in an error that names the argument, what it must be, what came, and the remedy."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import save_file
from tiny import AT, settings

import e2e_fast
from e2e_fast import ConfigError, cli
from e2e_fast.sae import to_e2e_sae


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def transformer(model: Any) -> e2e_fast.SAETransformer:
    return e2e_fast.SAETransformer(model, AT, 3.0)


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> e2e_fast.Run:
    """A finished run with a checkpoint half-way."""
    folder = tmp_path_factory.mktemp("runs")
    return e2e_fast.train(settings(folder, save_every_n_samples=24), model, tiny.tokens(), quiet=True)


# ------------------------------------------------------------------------------------------------------ SAEs by hand


@pytest.mark.parametrize("activation", ["relu", "batch_topk", "jump_relu"])
def test_inputs_of_another_width_are_refused(activation: Any) -> None:
    """(4, 32) also holds whole rows of 16: nothing may be cut differently in silence."""
    sae = e2e_fast.SAE(16, 64, activation=activation, k=4 if activation == "batch_topk" else None)
    wrong = r"x must be a tensor \[..., d_in\] with d_in = 16, got \[4, 32\]"
    for function in (sae, sae.encode, sae.encode_sparse):
        with pytest.raises(ValueError, match=wrong):
            function(torch.randn(4, 32))
    with pytest.raises(ValueError, match="with d_in = 16, got a ndarray"):
        sae(np.zeros((4, 16), np.float32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"c must be a tensor \[..., d_sae\] with d_sae = 64, got \[4, 16\]"):
        sae.decode(torch.randn(4, 16))


@pytest.mark.parametrize(
    ("size", "message"), [((0, 8), "d_in must be at least 1"), ((8, 0), "d_sae must be at least 1")]
)
def test_an_sae_without_size_is_refused(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        e2e_fast.SAE(*size)


def test_unknown_positions_are_named_with_near_ones(transformer: e2e_fast.SAETransformer, model: Any) -> None:
    with pytest.raises(
        ValueError, match="'blocks.1.hook_resid_prex' is not in this model; near it are blocks.1.hook_resid"
    ):
        e2e_fast.SAETransformer(model, "blocks.1.hook_resid_prex")
    with pytest.raises(ValueError, match=f"'blocks.9' is not in this model; near it are {AT}"):
        transformer(torch.zeros(2, 4, dtype=torch.long), sae_positions="blocks.9")


# ------------------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (tiny.tokens().astype(np.float32), "tokens must hold integer token ids, got float32"),
        (tiny.tokens() > 5, "tokens must hold integer token ids, got bool"),
        (tiny.tokens()[0], r"tokens must be \[samples, T\], got shape \[16\]"),
        (tiny.tokens()[:0], r"at least one sample of one token, got shape \[0, 16\]"),
        ([[1, 2, 3], [4, 5]], r"tokens must be \[samples, T\], got no array"),
        (tiny.tokens() + 1, r"must lie in \[0, 61\).*, got "),
        (tiny.tokens() - 1, r"must lie in \[0, 61\).*, got "),
    ],
)
def test_tokens_that_are_none_are_refused_everywhere(
    tokens: Any, message: str, model: Any, transformer: e2e_fast.SAETransformer
) -> None:
    with pytest.raises(ValueError, match=message):
        e2e_fast.train(settings(), model, tokens, quiet=True)
    with pytest.raises(ValueError, match=message):
        e2e_fast.finetune(transformer, 8, sparsity=0.1, tokens=tokens, quiet=True)
    if not isinstance(tokens, list):
        with pytest.raises(ValueError, match=message):
            e2e_fast.evaluate(transformer, tokens)


def test_rows_of_numbers_are_tokens_for_training(model: Any) -> None:
    lists, array = (
        e2e_fast.train(settings(), model, tokens, quiet=True) for tokens in (tiny.tokens().tolist(), tiny.tokens())
    )
    assert lists.history == array.history


@pytest.mark.parametrize("given", [torch.from_numpy, np.asarray], ids=["tensor", "array"])
def test_more_samples_than_were_given_are_refused_before_training(model: Any, given: Any) -> None:
    message = "n_samples must be at most the 40 samples of tokens, got 48: .* give more of them, or fewer n_samples"
    with pytest.raises(ValueError, match=message):
        e2e_fast.train(settings(), model, given(tiny.tokens(40)), quiet=True)
    with pytest.raises(ValueError, match="at most the 40 samples of tokens, got 48"):
        e2e_fast.finetune(e2e_fast.SAETransformer(model, AT), 48, sparsity=0.1, tokens=given(tiny.tokens(40)))


def test_a_training_without_a_single_step_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"n_samples must be at least an optimizer step \(8 sequences\), got 4"):
        e2e_fast.train(settings(n_samples=4), model, tiny.tokens(), quiet=True)
    endless = settings(n_samples=None, lr_schedule="linear")
    with pytest.raises(
        ValueError, match=r"ended after 4 sequences, before the first optimizer step \(8\): give more data"
    ):
        e2e_fast.train(endless, model, tiny.tokens(4), quiet=True)
    assert e2e_fast.train(endless, model, tiny.tokens(8), quiet=True).history[-1]["samples"] == 8


def test_evaluation_says_what_it_takes(model: Any, transformer: e2e_fast.SAETransformer) -> None:
    wrong: Any
    for wrong in (model, "out/my_run"):
        with pytest.raises(
            ValueError, match=r"must be an SAETransformer, such as run.model .*got a (GPT2LMHeadModel|str)"
        ):
            e2e_fast.evaluate(wrong, tiny.tokens())
    with pytest.raises(ValueError, match=r"tokens must be an array \[samples, T\] or batches of tensors, got a list"):
        e2e_fast.evaluate(transformer, tiny.tokens().tolist())
    with pytest.raises(ValueError, match="at least one batch of tokens, got none"):
        e2e_fast.evaluate(transformer, [])


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": [1e-3]}, r"lr: Input should be a valid number; got \[0.001\]"),
        ({"batch_size": "four"}, "batch_size: Input should be a valid integer.*; got 'four'"),
        ({"lr_shedule": "linear"}, r"lr_shedule: unknown key \(did you mean lr_schedule\?\); got 'linear'"),
        ({"save_every_n_samples": 0}, "save_every_n_samples: Input should be greater than 0; got 0"),
        ({"saes": {"sae_positions": AT, "ratio": 4}}, "saes.ratio: unknown key"),
        ({"saes": 3}, "saes: Input should be a valid dictionary"),
        ({"loss": tiny.loss(logits_kl=1.0)}, "loss.logits_kl: Input should be a valid dictionary"),
        ({"train_data": None}, "train_data: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_in_a_yaml_file_is_named_by_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings() | changes))
    with pytest.raises(ConfigError, match=message) as error:
        e2e_fast.load_config(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="config.yaml is not valid YAML"):
        e2e_fast.load_config(path)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("cuda:99", r"device 'cuda:99' is not here: torch sees \d"),
    ],
)
def test_a_device_that_is_not_there_is_named(model: Any, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        e2e_fast.train(settings(device=device), model, tiny.tokens(), quiet=True)


@pytest.mark.parametrize("key", ["tlens_model_name", "tlens_model_path"])
def test_a_language_model_that_is_not_there_is_named_with_its_key(tmp_path: Path, key: str) -> None:
    place = str(tmp_path / "no_model")
    changes: dict[str, Any] = {"tlens_model_name": None, "tlens_model_path": None, key: place}
    with pytest.raises(FileNotFoundError, match=f"{key}: there is no file or folder .*no_model"):
        e2e_fast.train(settings(**changes), tokens=tiny.tokens(), quiet=True)


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.1}, "lr was 0.001, is 0.1."),
        ({"seed": 1, "n_samples": 56}, "seed was 0, is 1; n_samples was 48, is 56."),
        (
            {"loss": tiny.loss(out_to_in={"coeff": 1.0})},
            "loss.out_to_in.coeff was 0.0, is 1.0; loss.logits_kl.coeff was 1.0",
        ),
        ({"effective_batch_size": 16}, "effective_batch_size was 8, is 16"),
        ({"saes": {"sae_positions": AT, "dict_size_to_input_ratio": 2.0}}, "dict_size_to_input_ratio was 3.0, is 2.0"),
        ({"sweep": {"seed": [0, 1]}}, "sweep.seed was None, is"),
    ],
)
def test_a_run_goes_on_only_with_what_it_began_with(
    model: Any, run: e2e_fast.Run, changes: dict[str, Any], message: str
) -> None:
    assert run.folder is not None
    before = sorted(run.folder.iterdir())
    with pytest.raises(ConfigError, match=f"cannot go on with other settings than it began with: .*{message}"):
        e2e_fast.train(settings(**changes), model, tiny.tokens(), resume=run.folder, quiet=True)
    assert sorted(run.folder.iterdir()) == before


def test_a_trainer_of_another_loss_does_not_go_on_with_a_run(model: Any, run: e2e_fast.Run, tmp_path: Path) -> None:
    assert run.folder is not None
    with pytest.raises(ConfigError, match="loss.out_to_in.coeff was 0.0, is 1.0"):
        e2e_fast.LocalTrainer(settings(), model, tiny.tokens(), resume=run.folder, quiet=True)
    local = e2e_fast.LocalTrainer(settings(tmp_path), model, tiny.tokens(), quiet=True).fit()
    assert e2e_fast.load_config(local.folder / "final_config.yaml").loss.kind == "local"
    e2e_fast.LocalTrainer(settings(tmp_path), model, tiny.tokens(), resume=local.folder, quiet=True)


def test_where_and_how_a_run_is_computed_may_change(model: Any, run: e2e_fast.Run, tmp_path: Path) -> None:
    assert run.folder is not None
    for path in run.folder.glob("*_48.safetensors"):
        path.unlink()
    changes = {
        "batch_size": 8,
        "keep_checkpoints": 3,
        "log_every_n_grad_steps": 2,
        "device": "cpu",
        "wandb_run_name": "b",
    }
    elsewhere = {"tlens_model_name": "moved", "train_data": settings()["train_data"] | {"dataset_name": "moved"}}
    resumed = e2e_fast.train(
        settings(tmp_path, **changes, **elsewhere), model, tiny.tokens(), resume=run.folder, quiet=True
    )
    assert resumed.folder == run.folder
    expected = to_e2e_sae(run.model.by_position)
    for key, value in to_e2e_sae(resumed.model.by_position).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------------- language models


@pytest.mark.parametrize("name", ["./nope", "/nope", "~/nope", "nope/", "a/b/nope", Path("nope")], ids=str)
def test_a_path_without_a_model_is_not_looked_up_on_the_hub(name: Any) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}$"):
        e2e_fast.load_lm(name)


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=f"a config.json, which {tmp_path} has not"):
        e2e_fast.load_lm(tmp_path)


# ------------------------------------------------------------------------------------------------- files of SAEs


def test_a_fine_tune_of_what_is_no_sae_is_refused(model: Any, tmp_path: Path) -> None:
    wrong: Any
    for wrong in (model, None, 3):
        with pytest.raises(ValueError, match="sae must be a path, an SAETransformer, an SAE or a StoredSAE, got a "):
            e2e_fast.finetune(wrong, 8, lm=model, tokens=tiny.tokens())
    (tmp_path / "notes.txt").write_text("no SAE")
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    save_file({"w": torch.zeros(3, 4)}, tmp_path / "other.safetensors")
    for name, message in (
        ("notes.txt", "notes.txt is no SAE of a known format: expected "),
        ("damaged.safetensors", "damaged.safetensors is no readable weight file"),
        ("other.safetensors", "other.safetensors is no SAE of a known format: expected "),
    ):
        with pytest.raises(ValueError, match=message):
            e2e_fast.finetune(tmp_path / name, 8, lm=model, tokens=tiny.tokens())
    with pytest.raises(FileNotFoundError, match="there is no run folder .*nothing"):
        e2e_fast.finetune(tmp_path / "nothing", 8, lm=model, tokens=tiny.tokens())


def test_dictionaries_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder: nope"):
        e2e_fast.match_dictionaries("nope", torch.eye(3))
    (tmp_path / "notes.txt").write_text("no SAE")
    (tmp_path / "damaged.pt").write_bytes(b"no tensors")
    for name, message in (
        ("notes.txt", "notes.txt must end in one of .npy"),
        ("damaged.pt", "damaged.pt is no readable"),
    ):
        with pytest.raises(ValueError, match=message):
            e2e_fast.match_dictionaries(tmp_path / name, torch.eye(3))
    wrong: Any
    for wrong in (None, {}, object()):
        with pytest.raises(ValueError, match="a dictionary must be a tensor or array .*, got a "):
            e2e_fast.match_dictionaries(wrong, torch.eye(3))


def test_the_command_line_says_the_same_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(tlens_model_name=str(tmp_path / "no_model"))))
    for arguments, message in (
        (["train", str(path)], "tlens_model_name: there is no file or folder"),
        (["match", "nope", "nope"], "no such file or folder: nope"),
        (["eval", "nope"], "there is no run folder nope"),
        (["convert", "nope", "there", "--to", "sparsify"], "no such file or folder: nope"),
    ):
        monkeypatch.setattr("sys.argv", ["e2e-fast", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == cli.EXIT_BAD_INPUT
        assert re.sub(r"\s+", " ", capsys.readouterr().err).strip().startswith(f"e2e-fast: {message}")
