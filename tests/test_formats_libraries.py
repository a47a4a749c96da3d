"""The libraries themselves load what we write and compute the same with it, and we read what they write.

They are no dependencies of ours: each test is skipped where its library is not installed. To run them:
``pip install --no-deps sae-lens dictionary-learning eai-sparsify`` and what these import.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import e2e_fast
from e2e_fast import formats
from e2e_fast.formats import StoredSAE

pytestmark = pytest.mark.filterwarnings("default")

F, D, N, K = 48, 16, 200, 6
TOLERANCE = 1e-6
"""Of the largest entry of a reconstruction, in float32."""


def library(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def activations() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)) + 0.3


def randomised(module: torch.nn.Module, unit_rows: bool = False) -> Any:
    """All parameters random, so that no term of the function vanishes; thresholds positive."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise * 0.5 if "threshold" not in name else noise.abs() * 0.5
        if unit_rows and name in ("W_dec", "decoder.weight"):
            p.data = torch.nn.functional.normalize(p.data, dim=0 if name == "decoder.weight" else 1)
    return module.eval()


def check(theirs: Callable[[torch.Tensor], torch.Tensor], ours: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = activations()
    with torch.no_grad():
        expected, got = theirs(x), ours(x)
    scale = float(expected.abs().max())
    assert scale > 0.1
    error = float((got - expected).abs().max()) / scale
    assert error < TOLERANCE


def stored(activation: str, **changes: Any) -> StoredSAE:
    """An SAE as ours are: decoder normalised when used, nothing subtracted from the input."""
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=g) * 0.5 for shape in ((F, D), (F,), (F, D), (D,))]
    by_activation: dict[str, dict[str, Any]] = {
        "relu": {},
        "topk": {"k": K},
        "jump_relu": {"threshold": torch.rand(F, generator=g)},
        "batch_topk": {"k": K, "threshold": torch.tensor(0.4)},
    }
    about = {"position": "blocks.1.hook_resid_post", "model": "gpt2", "lm_processing": "none", "decoder": "unit"}
    return StoredSAE(*weights, activation=activation, **about | by_activation[activation] | changes)  # pyright: ignore


# ---------------------------------------------------------------------------------------------------------- SAELens


def sae_lens_inference(sae_lens: Any, architecture: str, **settings: Any) -> Any:
    classes = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    }
    sae, config = classes[architecture]
    return randomised(sae(config(d_in=D, d_sae=F, **settings)))


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {}),
        ("topk", {"k": K}),
        ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
    ],
)
def test_sae_lens_files_are_read(
    architecture: str, settings: dict[str, Any], subtract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae_lens = library("sae_lens", monkeypatch)
    theirs = sae_lens_inference(sae_lens, architecture, apply_b_dec_to_input=subtract, **settings)
    theirs.save_model(tmp_path / "theirs")
    read = formats.read(tmp_path / "theirs")
    check(theirs, read)
    check(theirs, read.arranged())
    formats.write(read, tmp_path / "copy")
    check(theirs, sae_lens.SAE.load_from_disk(tmp_path / "copy"))


@pytest.mark.parametrize("training", ["topk", "batchtopk", "matryoshka", "jumprelu", "standard"])
def test_sae_lens_training_checkpoints_are_read(training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae_lens = library("sae_lens", monkeypatch)
    make = {
        "topk": lambda: sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)),
        "batchtopk": lambda: sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)),
        "matryoshka": lambda: sae_lens.MatryoshkaBatchTopKTrainingSAE(
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, matryoshka_widths=[16, F])
        ),
        "jumprelu": lambda: sae_lens.JumpReLUTrainingSAE(sae_lens.JumpReLUTrainingSAEConfig(d_in=D, d_sae=F)),
        "standard": lambda: sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(d_in=D, d_sae=F)),
    }
    theirs = randomised(make[training]())
    if hasattr(theirs, "topk_threshold"):
        theirs.topk_threshold.fill_(0.7)
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "inference")
    inference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    check(inference, formats.read(tmp_path / "inference"))
    # What a checkpoint computes outside training is what its inference file computes.
    check(inference, formats.read(tmp_path / "checkpoint"))
    check(inference, formats.read(tmp_path / "checkpoint").arranged(decoder="raw"))


@pytest.mark.parametrize("activation", ["relu", "topk", "jump_relu", "batch_topk"])
def test_sae_lens_loads_what_we_write(activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae_lens = library("sae_lens", monkeypatch)
    ours = stored(activation)
    theirs = sae_lens.SAE.load_from_disk(formats.write(ours, tmp_path / "ours", "sae_lens"))
    check(theirs, ours)
    about = theirs.cfg.metadata
    assert (about.hook_name, about.model_name) == (ours.position, ours.model)
    # Back into a file of theirs, as after training.
    theirs.cfg.apply_b_dec_to_input = True
    theirs.save_model(tmp_path / "like")
    like = formats.read(tmp_path / "like")
    back = formats.write(formats.adapt(ours, "sae_lens", like), tmp_path / "back")
    check(sae_lens.SAE.load_from_disk(back), ours)
    assert sae_lens.SAE.load_from_disk(back).cfg.apply_b_dec_to_input


OLD: dict[str, dict[str, Any]] = {
    "standard": {"activation_fn_str": "relu", "normalize_activations": "none", "finetuning_scaling_factor": False},
    "topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False},
    "bare": {"hook_point_layer": 1, "expansion_factor": 3},
}
"""Settings of files from before SAELens 6: all on one level."""


@pytest.mark.parametrize("kind", OLD)
def test_old_sae_lens_files_mean_the_same_to_both_and_stay_loadable(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae_lens = library("sae_lens", monkeypatch)
    sae_lens_inference(sae_lens, "standard").save_model(tmp_path)
    state = load_file(tmp_path / "sae_weights.safetensors") | {"scaling_factor": torch.ones(F)}
    save_file(state, tmp_path / "sae_weights.safetensors")
    cfg = {"model_name": "gpt2-small", "hook_point": "blocks.1.hook_resid_pre", "d_in": D, "d_sae": F}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"dtype": "float32", "device": "cpu"} | OLD[kind]))
    theirs, read = sae_lens.SAE.load_from_disk(tmp_path), formats.read(tmp_path)
    check(theirs, read)
    assert (read.activation, read.position) == ("topk" if kind == "topk" else "relu", "blocks.1.hook_resid_pre")
    ours = stored(read.activation, position=None, model=None, lm_processing=None)
    back = formats.write(formats.adapt(ours, "sae_lens", read), tmp_path / "back")
    check(sae_lens.SAE.load_from_disk(back), ours)
    assert sae_lens.SAE.load_from_disk(back).cfg.metadata.model_name == "gpt2-small"


def test_sae_lens_scaled_activations_are_folded_as_they_fold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae_lens = library("sae_lens", monkeypatch)
    theirs = sae_lens_inference(sae_lens, "standard", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path / "scaled")
    with pytest.raises(ValueError, match="trained on scaled activations"):
        formats.read(tmp_path / "scaled").arranged()
    (tmp_path / "scaled" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5}))
    read = formats.read(tmp_path / "scaled")
    theirs.fold_activation_norm_scaling_factor(2.5)
    check(theirs, read)
    check(theirs, read.arranged())
    check(theirs, read.arranged(decoder="unit"))


# ------------------------------------------------------------------------------------------------ dictionary_learning


def dictionary(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    library("dictionary_learning", monkeypatch)
    plain = importlib.import_module("dictionary_learning.dictionary")
    top_k = importlib.import_module("dictionary_learning.trainers.top_k")
    batch = importlib.import_module("dictionary_learning.trainers.batch_top_k")
    nested = importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
    if name == "MatryoshkaBatchTopKSAE":
        made = nested.MatryoshkaBatchTopKSAE(D, F, K, [16, F - 16])
    elif name in ("AutoEncoderTopK", "BatchTopKSAE"):
        made = getattr(top_k if "Auto" in name else batch, name)(D, F, K)
    else:
        made = getattr(plain, name)(D, F)
    randomised(made, unit_rows=True)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        made.threshold.fill_(0.6)
    return made


def load_dictionary(folder: Path) -> Any:
    utils = importlib.import_module("dictionary_learning.utils")
    return utils.load_dictionary(str(folder), "cpu")[0]


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)  # fmt: skip
def test_dictionary_learning_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = dictionary(name, monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": K}, "buffer": {}}))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    read = formats.read(tmp_path)
    check(theirs, read)
    check(theirs, read.arranged(decoder="unit"))
    formats.write(read, tmp_path / "copy")
    check(theirs, load_dictionary(tmp_path / "copy"))


@pytest.mark.parametrize("activation", ["relu", "topk", "jump_relu", "batch_topk"])
def test_dictionary_learning_loads_what_we_write(
    activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library("dictionary_learning", monkeypatch)
    ours = stored(activation)
    folder = formats.write(ours, tmp_path / "ours", "dictionary_learning")
    check(load_dictionary(folder), ours)
    back = formats.write(formats.adapt(ours, "dictionary_learning", formats.read(folder)), tmp_path / "back")
    check(load_dictionary(back), ours)


# ----------------------------------------------------------------------------------------------------------- sparsify


def test_sparsify_files_are_read_and_what_we_write_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsify = library("sparsify", monkeypatch)
    theirs = randomised(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K)), unit_rows=True)

    def reconstruct(coder: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: coder(x).sae_out

    theirs.save_to_disk(tmp_path / "layers.1")
    read = formats.read(tmp_path / "layers.1")
    assert read.position == "blocks.1.hook_resid_post"
    check(reconstruct(theirs), read)
    check(reconstruct(theirs), read.arranged(decoder="unit"))
    formats.write(read, tmp_path / "copy")
    check(reconstruct(theirs), reconstruct(sparsify.SparseCoder.load_from_disk(tmp_path / "copy")))
    ours = stored("topk")
    folder = formats.write(ours, tmp_path / "ours", "sparsify")
    check(reconstruct(sparsify.SparseCoder.load_from_disk(folder)), ours)
    back = formats.write(formats.adapt(ours, "sparsify", read), tmp_path / "back")
    check(reconstruct(sparsify.SparseCoder.load_from_disk(back)), ours)


# -------------------------------------------------------------------------------------------- after a fine-tune of ours


def load(format: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], torch.Tensor]:
    """The SAE of a folder, loaded and run by its library."""
    if format == "sae_lens":
        return library("sae_lens", monkeypatch).SAE.load_from_disk(folder)
    if format == "dictionary_learning":
        library("dictionary_learning", monkeypatch)
        return load_dictionary(folder)
    coder = library("sparsify", monkeypatch).SparseCoder.load_from_disk(folder)
    return lambda x: coder(x).sae_out


@pytest.mark.parametrize(
    ("format", "activation"),
    [
        ("sae_lens", "relu"), ("sae_lens", "topk"), ("sae_lens", "jump_relu"), ("dictionary_learning", "relu"),
        ("dictionary_learning", "topk"), ("dictionary_learning", "batch_topk"), ("dictionary_learning", "jump_relu"),
        ("sparsify", "topk"),
    ],
)  # fmt: skip
def test_what_finetune_writes_is_loaded_and_computes_the_same(
    format: str, activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(format, monkeypatch)
    import transformers

    size: dict[str, Any] = {"n_layer": 3, "n_embd": D, "n_head": 2, "n_positions": 8, "vocab_size": 40}
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    file = formats.write(stored(activation), tmp_path / "layers.1", format)
    run = e2e_fast.finetune(
        file, samples=32, lr=1e-2, tokens=torch.randint(40, (32, 8)), lm=transformers.GPT2LMHeadModel(config),
        sparsity=0.01, quiet=True,
    )  # fmt: skip
    assert run.folder is not None
    ours = next(iter(run.model.by_position.values())).eval()
    check(load(format, run.folder, monkeypatch), lambda x: ours(x).output)
