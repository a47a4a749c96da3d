"""Fine-tuning a trained SAE on the KL, and writing it back as it came."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import e2e_fast
from e2e_fast import checkpoint, losses
from e2e_fast.sae import to_e2e_sae

AT = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=16, vocab_size=61)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.tile(np.random.default_rng(0).integers(61, size=(8, 16)), (40, 1))


@pytest.fixture(scope="module")
def source(model: Any, tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> e2e_fast.Run:
    """A local SAE, trained on rows of a file."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    settings: dict[str, Any] = {
        "tlens_model_name": "tiny",
        "save_dir": folder / "out",
        "n_samples": 320,
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": 8,
        "lr": 1e-3,
        "collect_act_frequency_every_n_samples": 0,
        "loss": losses.local(0.1).model_dump(),
        "train_data": {
            "dataset_name": str(folder / "tokens.npy"), "tokenizer_name": "-", "split": "train", "n_ctx": 16,
        },
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 3.1},
    }  # fmt: skip
    return e2e_fast.train(settings, lm=model, quiet=True)


def kl(model: Any, tokens: np.ndarray) -> float:
    return e2e_fast.evaluate(model, tokens[:8])["loss/eval/logits_kl"]


def test_a_fine_tune_lowers_the_kl_and_lies_beside_its_source(
    model: Any, tokens: np.ndarray, source: e2e_fast.Run
) -> None:
    assert source.folder is not None
    run = e2e_fast.finetune(source.folder, samples=160, lr=1e-3, lm=model, quiet=True)
    assert kl(run.model, tokens) < 0.8 * kl(source.model, tokens)
    assert run.folder is not None
    assert run.folder.parent == source.folder.parent
    assert "_finetuned_" in run.folder.name
    loaded = e2e_fast.SAETransformer.from_local_path(run.folder, lm=model)
    for key, value in to_e2e_sae(loaded.by_position).items():
        assert torch.equal(value, to_e2e_sae(run.model.by_position)[key]), key
    config = e2e_fast.load_config(run.folder / "final_config.yaml")
    assert (config.loss.kind, config.loss.sparsity.coeff, config.n_samples) == ("balanced", 0.1, 160)
    assert config.train_data.seed == 1


def test_a_folder_of_e2e_sae_gets_its_own_kind_of_weights_back(
    model: Any, tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path
) -> None:
    assert source.folder is not None
    settings = yaml.safe_load((source.folder / "final_config.yaml").read_text())
    for ours in ("schedule", "kl_positions", "keep_checkpoints", "lm_processing", "precision", "sweep", "device"):
        del settings[ours]
    del settings["saes"]["k"], settings["loss"]["balanced"]
    theirs = tmp_path / "theirs"
    checkpoint.write_config(theirs, settings)
    state = to_e2e_sae(source.model.by_position)
    checkpoint.save_tensors(theirs / "samples_320.pt", state)
    run = e2e_fast.finetune(theirs, samples=16, lm=model, downstream=True, sparsity=0.3, quiet=True)
    assert run.folder is not None
    written = torch.load(run.folder / "samples_16.pt", weights_only=True)
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in state.items()}
    assert not list(run.folder.glob("samples_*.safetensors"))
    config = e2e_fast.load_config(run.folder / "final_config.yaml")
    assert (config.loss.kind, config.loss.sparsity.coeff) == ("balanced+downstream", 0.3)
    assert config.loss.downstream == ("blocks.2.hook_resid_pre",)


def test_an_sae_in_memory_is_fine_tuned_and_left_as_it_is(tokens: np.ndarray, source: e2e_fast.Run) -> None:
    before = {key: value.clone() for key, value in to_e2e_sae(source.model.by_position).items()}
    run = e2e_fast.finetune(source.model, samples=16, lr=1e-3, sparsity=0.1, tokens=tokens, batch_size=4, quiet=True)
    assert run.folder is None
    for key, value in to_e2e_sae(source.model.by_position).items():
        assert torch.equal(value, before[key]), key
        assert not torch.equal(value, to_e2e_sae(run.model.by_position)[key]), key


def test_what_a_fine_tune_lacks_is_named(tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparsity must be given"):
        e2e_fast.finetune(source.model, samples=16, tokens=tokens)
    with pytest.raises(ValueError, match="needs tokens= or train_data="):
        e2e_fast.finetune(source.model, samples=16, sparsity=0.1)
    with pytest.raises(FileNotFoundError, match="no run folder"):
        e2e_fast.finetune(tmp_path / "nothing", samples=16)
