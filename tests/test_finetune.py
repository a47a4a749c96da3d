"""Fine-tuning a trained SAE on the KL, and writing it back as it came."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import e2e_fast
from e2e_fast import checkpoint, files, formats, losses
from e2e_fast.compare import read_dictionary
from e2e_fast.formats import StoredSAE
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
    files.save_tensors(theirs / "samples_320.pt", state)
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


# ----------------------------------------------------------------------------------------------- other libraries' files

KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 12},
    "batch_topk": {"k": 12, "threshold": torch.tensor(0.05)},
    "jump_relu": {"threshold": torch.full((99,), 0.02)},
}
FILES = [
    ("sae_lens", "relu"), ("sae_lens", "topk"), ("sae_lens", "jump_relu"), ("dictionary_learning", "relu"),
    ("dictionary_learning", "topk"), ("dictionary_learning", "batch_topk"), ("dictionary_learning", "jump_relu"),
    ("sparsify", "topk"), ("e2e_sae", "relu"), ("e2e_sae", "batch_topk"),
]  # fmt: skip


def stored(source: e2e_fast.Run, kind: str) -> StoredSAE:
    """The locally trained SAE, with another activation on top."""
    sae = StoredSAE.of(source.model.by_position[AT], position=AT, model="tiny", lm_processing="transformer_lens")
    return replace(sae, activation=kind, **KINDS[kind])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("format", "kind"), FILES)
def test_files_of_other_libraries_are_fine_tuned_and_written_back(
    format: str, kind: str, model: Any, tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path
) -> None:
    file = formats.write(stored(source, kind), tmp_path / "theirs", format)
    before = e2e_fast.SAETransformer.from_local_path(file, lm=model)
    run = e2e_fast.finetune(
        file, samples=160, lr=1e-3, sparsity=None if "topk" in kind else 0.1, tokens=tokens, lm=model, quiet=True
    )
    run.model.eval()
    assert kl(run.model, tokens) < 0.9 * kl(before.eval(), tokens)
    assert run.folder is not None
    assert run.folder.parent == tmp_path
    assert run.folder.name.startswith("theirs_finetuned_")
    assert formats.detect(run.folder) == format
    # What was written is what was trained.
    trained, written = run.model.by_position[AT], formats.read(run.folder)
    assert (written.position, written.lm_processing) == (AT, "transformer_lens")
    assert (written.activation, written.k) == (kind, KINDS[kind].get("k"))
    x = run.model.lm.original(torch.as_tensor(tokens[:8]), at=AT)[AT].flatten(0, 1)
    expected = trained(x).output.detach()
    torch.testing.assert_close(written(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    again = e2e_fast.SAETransformer.from_local_path(run.folder, lm=model).eval()
    assert kl(again, tokens) == pytest.approx(kl(run.model, tokens), rel=1e-4)
    assert read_dictionary(run.folder, which="encoder").shape == (99, 32)
    # The same library's keys, and none of a run's weights beside them.
    assert {p.name for p in file.iterdir()} - {"samples_0.pt"} <= {p.name for p in run.folder.iterdir()}
    assert not list(run.folder.glob("*.safetensors")) or format in ("sae_lens", "sparsify", "e2e_sae")


def test_raw_activations_are_trained_on_when_the_file_says_so(
    model: Any, tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path
) -> None:
    sae = replace(stored(source, "topk"), lm_processing="none", position="blocks.0.hook_resid_post")
    file = formats.write(sae, tmp_path / "layers.0", "sparsify")
    (file / "cfg.json").write_text(json.dumps({"k": 12, "d_in": 32, "num_latents": 99}))  # as sparsify itself has it
    run = e2e_fast.finetune(file, samples=16, tokens=tokens, lm=model, quiet=True)
    assert run.model.lm.processing == "none"
    assert run.model.all_sae_positions == ["blocks.0.hook_resid_post"]
    assert run.folder is not None
    assert formats.read(run.folder).position == "blocks.0.hook_resid_post"


def test_top_k_rows_of_unequal_norm_are_trained_as_they_are(
    model: Any, tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path
) -> None:
    plain = stored(source, "topk").arranged(decoder="raw")
    uneven = replace(plain, W_dec=plain.W_dec * torch.linspace(0.5, 1.5, 99)[:, None])
    file = formats.write(uneven, tmp_path / "uneven", "sae_lens")
    run = e2e_fast.finetune(file, samples=16, lr=1e-3, tokens=tokens, lm=model, quiet=True)
    trained = run.model.by_position[AT]
    assert not trained.normalize_decoder
    assert run.folder is not None
    x = torch.randn(50, 32)
    torch.testing.assert_close(formats.read(run.folder)(x), trained(x).output.detach(), rtol=1e-5, atol=1e-5)


def test_what_a_file_leaves_out_is_asked_for(
    model: Any, tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path
) -> None:
    bare = replace(stored(source, "relu"), position=None, model=None, lm_processing=None)
    file = formats.write(bare, tmp_path / "bare", "sae_lens")
    given: dict[str, Any] = {"samples": 16, "tokens": tokens, "quiet": True}
    lacking: list[tuple[dict[str, Any], str]] = [
        ({}, "give position="),
        ({"position": AT}, "names no language model: pass lm="),
        ({"position": AT, "lm": model}, "give lm_processing="),
        ({"position": "blocks.9.hook_resid_pre", "lm": source.model.lm}, "is not in"),
        ({"position": AT, "lm": source.model.lm}, r"sparsity must be given for an SAE without k \(relu\)"),
    ]
    for more, message in lacking:
        with pytest.raises(ValueError, match=message):
            e2e_fast.finetune(file, **given, **more)
    run = e2e_fast.finetune(file, **given, position=AT, lm=model, lm_processing="transformer_lens", sparsity=0.1)
    assert run.folder is not None
    written = formats.read(run.folder)
    assert (written.position, written.lm_processing) == (AT, "transformer_lens")
    given["sparsity"] = 0.1
    places: list[dict[str, Any]] = [{"position": AT}, {"lm_processing": "none"}]
    for place in places:
        with pytest.raises(ValueError, match="is for files of other libraries"):
            e2e_fast.finetune(source.model, **given, **place)


def test_saes_without_a_file_are_fine_tuned_in_memory(
    model: Any, tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path
) -> None:
    sae = stored(source, "jump_relu").to_sae()
    before = sae.log_threshold.clone()
    run = e2e_fast.finetune(
        sae, samples=160, lr=1e-2, tokens=tokens, lm=source.model.lm, position=AT, sparsity=0.1, quiet=True,
        save_dir=tmp_path,
    )  # fmt: skip
    assert torch.equal(sae.log_threshold, before)
    trained: Any = run.model.by_position[AT]
    assert not torch.equal(trained.log_threshold, before)  # the L0 reaches the thresholds
    assert run.folder is not None
    assert formats.read(run.folder).format == "e2e_sae"
    assert e2e_fast.load_config(run.folder / "final_config.yaml").loss.sparsity.p_norm == 0


def test_what_could_not_be_written_back_is_not_trained(
    model: Any, tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path
) -> None:
    plain = stored(source, "batch_topk").arranged(decoder="raw")
    tensors = {"W_enc": plain.W_enc.T, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    more = {"k": torch.tensor(12), "threshold": torch.tensor(0.05), "group_sizes": torch.tensor([50, 49])}
    torch.save({key: value.contiguous() for key, value in tensors.items()} | more, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="nested groups are not trained here"):
        e2e_fast.finetune(tmp_path, samples=16, tokens=tokens, lm=model, position=AT, lm_processing="none")


def test_what_a_fine_tune_lacks_is_named(tokens: np.ndarray, source: e2e_fast.Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparsity must be given"):
        e2e_fast.finetune(source.model, samples=16, tokens=tokens)
    with pytest.raises(ValueError, match="needs tokens= or train_data="):
        e2e_fast.finetune(source.model, samples=16, sparsity=0.1)
    with pytest.raises(FileNotFoundError, match="no run folder"):
        e2e_fast.finetune(tmp_path / "nothing", samples=16)
