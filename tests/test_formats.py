"""Files of other libraries: nothing is lost on the way, the function stays the same, and what cannot be is refused."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from e2e_fast import cli, formats
from e2e_fast.compare import read_dictionary
from e2e_fast.formats import StoredSAE, dictionary_learning, places
from e2e_fast.lm import load_lm

F, D, N, K = 20, 8, 64, 3
PLACE = {"position": "blocks.1.hook_resid_post", "model": "gpt2", "lm_processing": "none"}
FORMATS = ["sae_lens", "dictionary_learning", "sparsify", "e2e_sae"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(*names: str, dtype: torch.dtype = torch.float32, unit: bool = False) -> dict[str, torch.Tensor]:
    """Random tensors under a library's names, whose shapes the names tell."""
    shapes = {
        "W_enc": (D, F), "encoder.weight": (F, D), "encoder.0.weight": (F, D), "W_dec": (F, D),
        "decoder.weight": (D, F), "b_enc": (F,), "encoder.bias": (F,), "encoder.0.bias": (F,), "b_dec": (D,),
        "decoder.bias": (D,), "bias": (D,), "threshold": (F,), "r_mag": (F,), "gate_bias": (F,), "mag_bias": (F,),
        "decoder_bias": (D,), "b_gate": (F,), "b_mag": (F,),
    }  # fmt: skip
    made = {}
    for seed, name in enumerate(names):
        tensor = random(*shapes[name.split("::")[-1]], seed=seed)
        if unit and name in ("W_dec", "decoder.weight"):
            tensor = torch.nn.functional.normalize(tensor, dim=0 if name == "decoder.weight" else 1)
        made[name] = (tensor.abs() if name == "threshold" else tensor).to(dtype)
    return made


LENS = ("W_enc", "b_enc", "W_dec", "b_dec")
OURS = {"encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias"}
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")


def lens(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **cfg: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(weights(*LENS) if tensors is None else tensors, folder / "sae_weights.safetensors")
    about = {"sae_lens_version": "6.20.0", "model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_pre"}
    settings = {"architecture": "standard", "d_in": D, "d_sae": F, "metadata": about} | cfg
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


def dictionary(folder: Path, tensors: dict[str, torch.Tensor], **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ae.pt")
    if trainer:
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return folder


def top_k(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of dictionary_learning's AutoEncoderTopK and BatchTopKSAE."""
    names = weights(*LINEAR, "b_dec", unit=True)
    return names | {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.3)} | more


def sparse_coder(folder: Path, **cfg: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(weights("encoder.weight", "encoder.bias", "W_dec", "b_dec"), folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": K, "expansion_factor": 32} | cfg))
    return folder


def run(folder: Path, *positions: str, suffix: str = ".pt", **saes: Any) -> Path:
    folder.mkdir(parents=True)
    names = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")
    state = {f"{p.replace('.', '-')}.{n}": t for p in positions for n, t in weights(*names).items()}
    (torch.save if suffix == ".pt" else save_file)(state, folder / f"samples_400{suffix}")
    settings = {"tlens_model_name": "gpt2-small", "seed": 3, "saes": {"sae_positions": list(positions)} | saes}
    (folder / "final_config.yaml").write_text(yaml.safe_dump(settings))
    return folder


Made = Callable[[Path], Path]
FILES: dict[str, Made] = {
    "sae_lens standard": lambda p: lens(p / "x", mystery=[1, {"a": None}]),
    "sae_lens bf16": lambda p: lens(p / "x", weights(*LENS, dtype=torch.bfloat16), dtype="bfloat16"),
    "sae_lens no b_dec": lambda p: lens(p / "x", apply_b_dec_to_input=False),
    "sae_lens topk": lambda p: lens(p / "x", architecture="topk", k=K),
    "sae_lens topk rescaled": lambda p: lens(p / "x", architecture="topk", k=K, rescale_acts_by_decoder_norm=True),
    "sae_lens jumprelu": lambda p: lens(p / "x", weights(*LENS, "threshold"), architecture="jumprelu"),
    "sae_lens batchtopk": lambda p: lens(
        p / "x", weights(*LENS) | {"topk_threshold": torch.tensor(0.5, dtype=torch.float64)},
        architecture="batchtopk", k=2.5, rescale_acts_by_decoder_norm=True,
    ),
    "sae_lens 5 standard": lambda p: lens(
        p / "x", weights(*LENS) | {"scaling_factor": torch.ones(F)}, metadata=None, hook_name="blocks.0.hook_mlp_out",
        activation_fn_str="relu", finetuning_scaling_factor=False, normalize_activations="none",
    ),
    "sae_lens 3 topk": lambda p: lens(
        p / "x", metadata=None, hook_point="blocks.{layer}.hook_resid_pre", hook_point_layer=2,
        activation_fn_str="topk", activation_fn_kwargs={"k": K}, normalize_activations=False, architecture=None,
    ),
    "dictionary_learning AutoEncoder": lambda p: dictionary(
        p / "x", weights(*LINEAR, "bias"), dict_class="AutoEncoder", lm_name="gpt2",
        submodule_name="resid_post_layer_1", l1_penalty=0.1,
    ),
    "dictionary_learning AutoEncoder by its tensors": lambda p: dictionary(p / "x", weights(*LINEAR, "bias")),
    "dictionary_learning AutoEncoderNew": lambda p: dictionary(p / "x", weights(*LINEAR, "decoder.bias")),
    "dictionary_learning AutoEncoderTopK": lambda p: dictionary(p / "x", top_k(), dict_class="AutoEncoderTopK", k=K),
    "dictionary_learning TopK with k in the config alone": lambda p: dictionary(
        p / "x", weights(*LINEAR, "b_dec"), dict_class="AutoEncoderTopK", k=K
    ),
    "dictionary_learning BatchTopKSAE": lambda p: dictionary(p / "x", top_k(), dict_class="BatchTopKSAE", k=K),
    "dictionary_learning Matryoshka": lambda p: dictionary(
        p / "x", weights(*LENS, unit=True) | {"k": torch.tensor(K), "threshold": torch.tensor(0.3),
                                              "group_sizes": torch.tensor([5, F - 5])},
    ),
    "dictionary_learning JumpRelu": lambda p: dictionary(p / "x", weights(*LENS, "threshold")),
    "sparsify": lambda p: sparse_coder(p / "layers.1", activation="topk", transcode=False),
    "e2e_sae": lambda p: run(p / "x", "blocks.1.hook_resid_pre"),
    "e2e_sae of ours, top-k": lambda p: run(p / "x", "blocks.1.hook_resid_pre", suffix=".safetensors", k=K),
}  # fmt: skip


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FILES[request.param](tmp_path)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [p for p in folder.iterdir() if p.suffix in (".pt", ".safetensors")]
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def settings_of(folder: Path) -> Any:
    texts = [p.read_text() for p in sorted(folder.iterdir()) if p.suffix in (".json", ".yaml")]
    return [yaml.safe_load(text) for text in texts]


# ---------------------------------------------------------------------------------------------------------- lossless


def test_what_is_read_is_written_back_bit_for_bit(file: Path, tmp_path: Path) -> None:
    copy = formats.write(formats.read(file), tmp_path / "copy")
    before, after = tensors_of(file), tensors_of(copy)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    if (file / "config.json").exists() or not (file / "ae.pt").exists():
        assert settings_of(copy) == settings_of(file)
    x = random(N, D, seed=9)
    assert torch.equal(formats.read(file)(x), formats.read(copy)(x))


def test_files_beside_the_weights_travel_along(tmp_path: Path) -> None:
    source = lens(tmp_path / "source")
    save_file({"sparsity": torch.zeros(F)}, source / "sparsity.safetensors")
    (source / "runner_cfg.json").write_text('{"lr": 1}')
    copy = formats.write(formats.read(source), tmp_path / "copy")
    for name in ("sparsity.safetensors", "runner_cfg.json"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
    # A trained SAE has another sparsity.
    assert not formats.adapt(formats.read(source), "sae_lens", formats.read(source)).files


# ------------------------------------------------------------------------------------------------- the same function


def relu_topk(p: torch.Tensor) -> torch.Tensor:
    kept = p.topk(K, dim=-1).indices
    return torch.zeros_like(p).scatter(-1, kept, p.gather(-1, kept).relu())


Tensors = dict[str, torch.Tensor]
FORMULAS: dict[str, Callable[[torch.Tensor, Tensors], torch.Tensor]] = {
    "sae_lens standard": lambda x, t: (
        ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu() @ t["W_dec"] + t["b_dec"]
    ),
    "sae_lens no b_dec": lambda x, t: (x @ t["W_enc"] + t["b_enc"]).relu() @ t["W_dec"] + t["b_dec"],
    "sae_lens topk": lambda x, t: (
        relu_topk((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) @ t["W_dec"] + t["b_dec"]
    ),
    "sae_lens topk rescaled": lambda x, t: (
        relu_topk(((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * t["W_dec"].norm(dim=1))
        @ torch.nn.functional.normalize(t["W_dec"]) + t["b_dec"]
    ),
    "sae_lens jumprelu": lambda x, t: (
        (p := (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * (p > t["threshold"]) @ t["W_dec"] + t["b_dec"]
    ),
    "dictionary_learning AutoEncoder": lambda x, t: (
        ((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu() @ t["decoder.weight"].T + t["bias"]
    ),
    "dictionary_learning AutoEncoderNew": lambda x, t: (
        (x @ t["encoder.weight"].T + t["encoder.bias"]).relu() @ t["decoder.weight"].T + t["decoder.bias"]
    ),
    "dictionary_learning AutoEncoderTopK": lambda x, t: (
        relu_topk((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]) @ t["decoder.weight"].T + t["b_dec"]
    ),
    "dictionary_learning BatchTopKSAE": lambda x, t: (
        (p := (x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]) * (p > t["threshold"])
        @ t["decoder.weight"].T + t["b_dec"]
    ),
    "dictionary_learning JumpRelu": lambda x, t: (
        (p := x @ t["W_enc"] + t["b_enc"]) * (p > t["threshold"]) @ t["W_dec"] + t["b_dec"]
    ),
    "sparsify": lambda x, t: (
        relu_topk((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]) @ t["W_dec"] + t["b_dec"]
    ),
    "e2e_sae": lambda x, t: (
        (x @ t["encoder.0.weight"].T + t["encoder.0.bias"]).relu()
        @ torch.nn.functional.normalize(t["decoder.weight"], dim=0).T + t["decoder.bias"]
    ),
}  # fmt: skip
"""What the libraries compute, from the tensors as they are stored."""


@pytest.mark.parametrize("name", FORMULAS)
def test_files_are_read_with_their_librarys_formula(name: str, tmp_path: Path) -> None:
    file = FILES[name](tmp_path)
    tensors = {key.removeprefix("blocks-1-hook_resid_pre."): t.double() for key, t in tensors_of(file).items()}
    same_function(lambda x: FORMULAS[name](x, tensors), double(formats.read(file)))


def double(sae: StoredSAE) -> StoredSAE:
    threshold = None if sae.threshold is None else sae.threshold.double()
    kept = {name: getattr(sae, name).double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return replace(sae, threshold=threshold, **kept)


def same_function(a: Callable[[torch.Tensor], torch.Tensor], b: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = random(N, D, seed=9, dtype=torch.float64) + 0.2
    expected = a(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(b(x), expected, rtol=1e-12, atol=1e-12)


def test_every_arrangement_computes_the_same(file: Path) -> None:
    sae = double(formats.read(file))
    for subtract in (False, True):
        same_function(sae, sae.arranged(subtract_b_dec=subtract, decoder="raw"))
        if sae.can_be_unit():
            same_function(sae, sae.arranged(subtract_b_dec=subtract, decoder="unit"))


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_input_scales_are_folded(file: Path, scale: float) -> None:
    sae = replace(double(formats.read(file)), input_scale=scale)
    same_function(sae, sae.arranged(subtract_b_dec=True, decoder="raw"))
    if sae.can_be_unit():
        same_function(sae, sae.arranged(decoder="unit"))


def test_saes_of_ours_compute_the_same(file: Path, tmp_path: Path) -> None:
    stored = double(formats.read(file))
    if stored.k is not None and stored.k != int(stored.k):
        with pytest.raises(ValueError, match="k must be whole, got 2.5"):
            stored.to_sae()
        return
    sae = stored.to_sae().eval()
    assert sae.W_enc.dtype == torch.float64
    assert sae.normalize_decoder == stored.can_be_unit()
    same_function(stored, lambda x: sae(x).output.detach())
    same_function(stored, lambda x: sae.decode(sae.encode(x)).detach())
    raw = stored.to_sae(normalize_decoder=False).eval()
    same_function(stored, lambda x: raw(x).output.detach())
    # And back.
    again = StoredSAE.of(sae, **PLACE)
    same_function(stored, again)
    assert again.activation == stored.activation


def test_thresholds_that_let_everything_through_stay_finite() -> None:
    threshold = torch.tensor([0.5] * 10 + [-1.0] * 5 + [0.0] * 5, dtype=torch.float64)
    made = [random(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(((F, D), (F,), (F, D), (D,)))]
    stored = StoredSAE(*made, activation="jump_relu", threshold=threshold)
    sae = stored.to_sae()
    assert torch.isfinite(sae.log_threshold).all()
    same_function(stored, lambda x: sae(x).output.detach())


CANNOT = {
    ("sparsify", "relu"): "knows top-k SAEs alone",
    ("sparsify", "jump_relu"): "knows top-k SAEs alone",
    ("sparsify", "batch_topk"): "knows top-k SAEs alone",
}


@pytest.mark.parametrize("format", FORMATS)
def test_an_sae_of_one_library_is_written_for_another_or_refused(format: str, file: Path, tmp_path: Path) -> None:
    sae = replace(double(formats.read(file)), **PLACE)
    reason = CANNOT.get((format, sae.activation))
    if format in ("dictionary_learning", "e2e_sae") and sae.k is not None and sae.k != int(sae.k):
        reason = "k must be whole"
    if format == sae.format == "dictionary_learning" and "group_sizes" in sae.extra:
        return  # written as it is: the test above
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            formats.write(sae, tmp_path / "out", format)
        assert not (tmp_path / "out").exists()
        return
    written = formats.write(sae, tmp_path / "out", format)
    assert formats.detect(written) == format
    read = formats.read(written)
    same_function(sae, read)
    if format != sae.format:  # tensors of the one library are not left over in the other's file
        names = {key.removeprefix("blocks-1-hook_resid_post.") for key in tensors_of(written)}
        assert (
            names
            in {
                "sae_lens": [{*LENS}, {*LENS, "threshold"}],
                "sparsify": [{"encoder.weight", "encoder.bias", "W_dec", "b_dec"}],
                "dictionary_learning": [{*LINEAR, "bias"}, {*LINEAR, "b_dec", "k", "threshold"}, {*LENS, "threshold"}],
                "e2e_sae": [OURS, OURS | {"log_threshold"}, OURS | {"running_threshold"}],
            }[format]
        )
    if format != sae.format:
        assert (read.position, read.model, read.lm_processing) == tuple(PLACE.values())


@pytest.mark.parametrize("name", [name for name in FILES if "Matryoshka" not in name])
def test_a_trained_sae_goes_back_into_the_kind_of_file_it_came_from(name: str, tmp_path: Path) -> None:
    like = formats.read(FILES[name](tmp_path))
    arranged = like.arranged(decoder="unit" if like.can_be_unit() else "raw")
    trained = double(replace(arranged, format="", metadata={}, extra={}))
    noise = random(F, D, seed=5, dtype=torch.float64)
    trained = replace(trained, W_enc=trained.W_enc + 0.1 * noise, W_dec=trained.W_dec - 0.1 * noise)
    written = formats.adapt(trained, like.format, like)
    read = formats.read(formats.module(like.format).write(written, tmp_path / "back"))
    same_function(trained, read)
    assert (read.position, read.model, read.subtract_b_dec) == (like.position, like.model, like.subtract_b_dec)
    kept = {key for key in like.metadata if key not in ("dtype",)}
    assert kept - {"rescale_acts_by_decoder_norm", "k"} <= set(read.metadata)


# -------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("module", "model", "position"),
    [
        ("layers.6", None, "blocks.6.hook_resid_post"),
        ("h.11", "gpt2", "blocks.11.hook_resid_post"),
        ("transformer.h.3.mlp", "gpt2", "blocks.3.hook_mlp_out"),
        ("gpt_neox.layers.2.attention", None, "blocks.2.hook_attn_out"),
        ("layers.2.self_attn", "meta-llama/Llama-3.2-1B", "blocks.2.hook_attn_out"),
        ("layers_4", None, "blocks.4.hook_resid_post"),
        ("layers.2.mlp", "google/gemma-2-2b", None),
        ("layers.2", "google/gemma-2-2b", "blocks.2.hook_resid_post"),
        ("layers.2.mlp.act", None, None),
        ("embed_tokens", None, None),
    ],
)
def test_modules_of_hugging_face_models_have_transformer_lens_names(
    module: str, model: str | None, position: str | None
) -> None:
    assert places.of_module(module, model) == position


def test_sparsify_folders_say_where_they_sit(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model": "EleutherAI/pythia-70m"}')
    for name in ("layers.6", "layers.6/seed1"):
        sae = formats.read(sparse_coder(tmp_path / "run" / name))
        assert (sae.position, sae.model) == ("blocks.6.hook_resid_post", "EleutherAI/pythia-70m")
        (tmp_path / "run" / name / "sae.safetensors").unlink()


def test_dictionary_learning_checkpoints_find_their_settings(tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "trainer_0", top_k(), dict_class="BatchTopKSAE", k=K, lm_name="gpt2",
                        submodule_name="mlp_out_layer_4")  # fmt: skip
    (folder / "checkpoints").mkdir()
    torch.save(top_k(), folder / "checkpoints" / "ae_100.pt")
    sae = formats.read(folder / "checkpoints" / "ae_100.pt")
    assert (sae.activation, sae.position, sae.model) == ("batch_topk", "blocks.4.hook_mlp_out", "gpt2")


def test_sae_lens_says_on_which_activations_it_was_trained(tmp_path: Path) -> None:
    about = {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.hook_resid_pre"}
    for i, (kwargs, expected) in enumerate(
        [
            ({"center_writing_weights": True}, "transformer_lens"),
            ({"center_writing_weights": False}, "none"),
            ({}, "none"),
            (None, None),
        ]
    ):
        more = {} if kwargs is None else {"model_from_pretrained_kwargs": kwargs}
        assert formats.read(lens(tmp_path / str(i), metadata=about | more)).lm_processing == expected


def test_old_sae_lens_files_stay_old(tmp_path: Path) -> None:
    like = formats.read(FILES["sae_lens 3 topk"](tmp_path))
    assert (like.position, like.activation, like.k) == ("blocks.2.hook_resid_pre", "topk", K)
    cfg = formats.adapt(replace(like, k=5), "sae_lens", like).metadata
    assert cfg["activation_fn_kwargs"] == {"k": 5}
    assert "metadata" not in cfg
    assert "architecture" not in cfg


def test_one_of_several_saes_is_asked_for_by_position(tmp_path: Path) -> None:
    folder = run(tmp_path / "two", "blocks.1.hook_resid_pre", "blocks.3.hook_mlp_out")
    assert formats.read(f"{folder}::blocks.3.hook_mlp_out").position == "blocks.3.hook_mlp_out"
    for wrong in (folder, f"{folder}::blocks.2.hook_mlp_out"):
        with pytest.raises(ValueError, match=r"holds SAEs \['blocks.1.hook_resid_pre', 'blocks.3.hook_mlp_out'\]"):
            formats.read(wrong)
    with pytest.raises(ValueError, match="holds one SAE: leave out ::x"):
        formats.read(f"{lens(tmp_path / 'lens')}::x")


def test_the_authors_copies_on_the_hub_are_read(tmp_path: Path) -> None:
    torch.save(weights(*LINEAR, "decoder.bias", unit=True), tmp_path / "e2e_layer_6.pt")
    settings = {"tlens_model_name": "gpt2-small", "saes": {"sae_positions": ["blocks.6.hook_resid_pre"]}}
    (tmp_path / "e2e_layer_6.yaml").write_text(yaml.safe_dump(settings))
    sae = formats.read(tmp_path / "e2e_layer_6.pt")
    assert (sae.format, sae.position, sae.model) == ("e2e_sae", "blocks.6.hook_resid_pre", "gpt2-small")
    written = formats.write(sae, tmp_path / "run")
    assert formats.read(written).position == sae.position
    same_function(double(sae), double(formats.read(written)))


def test_a_top_k_saes_old_threshold_does_not_outlive_its_training(tmp_path: Path) -> None:
    like = formats.read(dictionary(tmp_path / "x", top_k(), dict_class="AutoEncoderTopK", k=K))
    assert like.extra["threshold"] == torch.tensor(0.3)
    back = formats.adapt(replace(like, k=4), "dictionary_learning", like)
    assert float(back.extra["threshold"]) == dictionary_learning.UNSET
    assert (int(back.extra["k"]), back.metadata["trainer"]["k"]) == (4, 4)


# ----------------------------------------------------------------------------------------------------------- refusals

GATED = ("encoder.weight", "decoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder_bias")


def torn(folder: Path, name: str, content: str) -> Path:
    """A folder of files one of which is no longer what it was."""
    (folder / name).write_text(content)
    return folder


def jump_relu(folder: Path, threshold: bool = True, **saes: Any) -> Path:
    """A run of ours, whose thresholds may be lacking, and whose settings may not say that it has some."""
    run(folder, "blocks.1.hook_resid_pre", **saes)
    extra = {"blocks-1-hook_resid_pre.log_threshold": random(F)} if threshold else {}
    torch.save(torch.load(folder / "samples_400.pt") | extra, folder / "samples_400.pt")
    return folder


AT_1 = "blocks.1.hook_resid_pre"
REFUSED: dict[str, tuple[Made, str]] = {
    "nothing": (lambda p: p / "nowhere", "no such file or folder"),
    "an empty folder": (lambda p: p, "no SAE of a known format: expected sae_weights.safetensors"),
    "gated": (
        lambda p: lens(p / "x", weights("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"), architecture="gated"),
        "gated SAE, which is not read. It computes what a jumprelu one does",
    ),
    "gated (dictionary_learning)": (lambda p: dictionary(p / "x", weights(*GATED)), "what a JumpReluAutoEncoder does"),
    "a transcoder": (lambda p: lens(p / "x", architecture="transcoder"), "architecture must be one of .'standard'"),
    "another activation": (lambda p: lens(p / "x", activation_fn_str="tanh-relu"), "must be relu or topk, got 'tanh-r"),
    "no threshold": (lambda p: lens(p / "x", architecture="jumprelu"), "lacks threshold, which jumprelu SAEs have"),
    "k too large": (lambda p: lens(p / "x", architecture="topk", k=F + 1), "k must lie in"),
    "no settings": (
        lambda p: [(lens(p / "x") / "cfg.json").unlink(), p / "x"][1], "must hold cfg.json beside sae_weights"
    ),
    "unclear class": (lambda p: dictionary(p / "x", top_k()), "may be AutoEncoderTopK or BatchTopKSAE: put con"),
    "unknown class": (lambda p: dictionary(p / "x", top_k(), dict_class="Crosscoder"), "got 'Crosscoder'"),
    "unknown tensors": (lambda p: dictionary(p / "x", weights("W_enc")), "has the tensors"),
    "a lacking tensor": (
        lambda p: dictionary(p / "x", weights(*LINEAR), dict_class="AutoEncoder"), "lacks bias, which AutoEncoder has"
    ),
    "sparsify transcoder": (lambda p: sparse_coder(p / "x", transcode=True), "transcoder \\(transcode: true\\)"),
    "sparsify skip": (lambda p: sparse_coder(p / "x", skip_connection=True), "skip_connection: true"),
    "groupmax": (lambda p: sparse_coder(p / "x", activation="groupmax"), "activation must be 'topk', got 'groupmax'"),
    "signed": (lambda p: sparse_coder(p / "x", signed=True), "got signed top-k"),
    "a k that is no number": (lambda p: sparse_coder(p / "x", k="3"), r"k must lie in \[1, 20\] for topk, got '3'"),
    "a k that is not whole": (lambda p: sparse_coder(p / "x", k=2.5), "k must be whole for topk, got 2.5"),
    "a torn YAML": (lambda p: torn(run(p / "x", AT_1), "final_config.yaml", "{a: ["), "is no readable YAML: while"),
    "a list for settings": (lambda p: torn(run(p / "x", AT_1), "final_config.yaml", "[1]"), "must hold a mapping"),
    "a word for settings": (lambda p: torn(run(p / "x", AT_1), "final_config.yaml", "saes: x"), "saes must hold set"),
    "a trainer in a word": (
        lambda p: torn(dictionary(p / "x", top_k(), k=K), "config.json", '{"trainer": "x"}'), "trainer must hold sett"
    ),
    "metadata in a word": (lambda p: lens(p / "x", metadata="x"), "metadata must hold settings of its own, got 'x'"),
    "no log_threshold": (
        lambda p: jump_relu(p / "x", False, activation="jump_relu"), "jump_relu SAEs, and they alone, have .*log_thres"
    ),
    "a log_threshold of a relu": (lambda p: jump_relu(p / "x"), "log_threshold; by saes.activation .* is a relu SAE"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_why(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        formats.read(make(tmp_path))


@pytest.mark.parametrize(
    ("cfg", "tensors", "message"),
    [
        ({"normalize_activations": "layer_norm"}, {}, "normalises its activations beyond a factor"),
        ({"normalize_activations": "expected_average_only_in"}, {}, "no activation_scaler.json beside it"),
        ({"finetuning_scaling_factor": True}, {"scaling_factor": torch.full((F,), 2.0)}, "multiply the rows of W_dec"),
    ],
)
def test_functions_that_are_none_of_ours_can_be_copied_but_not_computed(
    cfg: dict[str, Any], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    source = lens(tmp_path / "x", weights(*LENS) | tensors, **cfg)
    sae = formats.read(source)
    formats.write(sae, tmp_path / "copy")
    assert settings_of(tmp_path / "copy") == settings_of(source)
    for attempt in (lambda: sae(random(2, D)), sae.arranged, lambda: formats.adapt(sae, "e2e_sae")):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_writing_refuses_folders_in_use_and_unknown_formats(tmp_path: Path) -> None:
    sae = formats.read(lens(tmp_path / "x"))
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        formats.write(sae, tmp_path / "x")
    with pytest.raises(ValueError, match="format must be one of sae_lens, sparsify"):
        formats.write(sae, tmp_path / "y", "saelens")
    with pytest.raises(ValueError, match="position is None"):
        formats.write(replace(sae, position=None), tmp_path / "y", "e2e_sae")
    nested = formats.read(FILES["dictionary_learning Matryoshka"](tmp_path / "nested"))
    with pytest.raises(ValueError, match="nested groups are not trained here"):
        formats.adapt(nested, "dictionary_learning", nested)


def test_selections_of_the_largest_keep_rows_of_unequal_norm(tmp_path: Path) -> None:
    sae = formats.read(lens(tmp_path / "x", architecture="topk", k=K))
    assert not sae.can_be_unit()
    with pytest.raises(ValueError, match="would change which features topk selects"):
        sae.arranged(decoder="unit")


# --------------------------------------------------------------------------------------------------- the command line


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["e2e-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_convert_writes_another_librarys_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = run(tmp_path / "ours", "blocks.1.hook_resid_pre", k=K), tmp_path / "theirs"
    assert command(monkeypatch, "convert", source, target, "--to", "sparsify", "--model", "gpt2") == 0
    said = capsys.readouterr().out
    assert f"e2e_sae → sparsify: topk, {F} features of width {D}, in {target}" in said
    assert "trained on centred activations" in said
    converted = formats.read(target)
    assert (converted.position, converted.model) == ("blocks.1.hook_resid_pre", "gpt2")
    x = random(N, D, seed=9)
    torch.testing.assert_close(converted(x), formats.read(source)(x), rtol=1e-5, atol=1e-5)


def test_convert_can_tell_a_file_where_it_sits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.hook_mlp_out", "context_size": 128}
    source = lens(tmp_path / "source", metadata=about, mystery=1)
    place = ["--position", "blocks.1.hook_mlp_out", "--lm-processing", "none"]
    assert command(monkeypatch, "convert", source, tmp_path / "copy", "--to", "sae_lens", *place) == 0
    copy = formats.read(tmp_path / "copy")
    assert (copy.position, copy.lm_processing) == ("blocks.1.hook_mlp_out", "none")
    assert (copy.metadata["mystery"], copy.metadata["metadata"]["context_size"]) == (1, 128)
    assert torch.equal(copy.W_enc, formats.read(source).W_enc)


def test_convert_ends_with_one_line_and_code_2_when_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lens(tmp_path / "source")
    two = run(tmp_path / "two", "blocks.1.hook_resid_pre", "blocks.3.hook_mlp_out")
    for arguments, message in (
        ((source, tmp_path / "out", "--to", "sparsify"), "sparsify knows top-k SAEs alone, got relu"),
        ((source, tmp_path / "out", "--to", "saebench"), "format must be one of sae_lens, sparsify"),
        ((source, source, "--to", "e2e_sae"), "must be a new or empty folder"),
        ((tmp_path / "no", tmp_path / "out", "--to", "e2e_sae"), "no such file or folder"),
        ((two, tmp_path / "out", "--to", "sae_lens"), "ask for one as path::name"),
        ((source, tmp_path / "out", "--to", "e2e_sae", "--lm-processing", "x"), "--lm-processing must be one of"),
    ):
        assert command(monkeypatch, "convert", *arguments) == cli.EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_matching_reads_what_cannot_be_computed(tmp_path: Path) -> None:
    gated, _ = REFUSED["gated (dictionary_learning)"]
    assert read_dictionary(gated(tmp_path)).shape == (F, D)


def test_matching_reads_every_format(file: Path, tmp_path: Path) -> None:
    sae = formats.read(file)
    assert torch.equal(read_dictionary(file), sae.W_dec.float())
    assert torch.equal(read_dictionary(file, which="encoder"), sae.W_enc.float())


# --------------------------------------------------------------------------------- e2e_sae's own language models


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_language_models_that_e2e_sae_trained_are_run_as_they_are(tmp_path: Path) -> None:
    lens: Any = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")
    if not hasattr(lens, "HookedTransformer"):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    settings = {"d_model": 16, "n_layers": 2, "n_ctx": 12, "d_head": 8, "d_vocab": 30, "act_fn": "gelu_new"}
    theirs = lens.HookedTransformer(lens.HookedTransformerConfig(**settings, seed=0, device="cpu"))
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save(theirs.state_dict(), tmp_path / "epoch_1.pt")
    with pytest.raises(ValueError, match="must say under tlens_config"):
        load_lm(tmp_path / "epoch_1.pt")
    config = {"seed": 0, "tlens_config": settings | {"dtype": "float32", "tokenizer_name": "gpt2"}}
    (tmp_path / "final_config.yaml").write_text(yaml.safe_dump(config))
    tokens = torch.arange(24).view(2, 12)
    logits, cache = theirs.run_with_cache(tokens)
    for processing in (None, "transformer_lens", "none"):
        lm = load_lm(tmp_path / "epoch_1.pt", processing)
        original = lm.original(tokens, at=lm.positions())
        torch.testing.assert_close(original.logits(), logits, rtol=1e-5, atol=1e-5)
        for position in lm.positions():
            torch.testing.assert_close(original[position], cache[position], rtol=1e-5, atol=1e-5)
    state = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    del state["blocks.1.mlp.W_in"]
    torch.save(state, tmp_path / "epoch_2.pt")
    with pytest.raises(ValueError, match="blocks.1.mlp.W_in is lacking"):
        load_lm(tmp_path / "epoch_2.pt")
