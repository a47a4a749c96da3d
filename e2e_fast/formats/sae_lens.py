"""SAELens: a folder with ``cfg.json`` and ``sae_weights.safetensors``.

=====================  ==========================================================================================
tensor                 meaning
=====================  ==========================================================================================
``W_enc`` [D, F]       transposed, ours is [F, D]
``b_enc`` [F]
``W_dec`` [F, D]
``b_dec`` [D]          subtracted from the input when ``apply_b_dec_to_input``
``threshold`` [F]      jumprelu
``topk_threshold`` ()  batchtopk and matryoshka_batchtopk, which exist while training alone: finished ones are jumprelu
=====================  ==========================================================================================

Configurations of SAELens 6 keep what concerns the language model under ``metadata``; older ones are flat, and call a
top-k SAE "standard" with ``activation_fn_str: topk``. Either kind is written back as what it was.

The activations: SAELens loads models without TransformerLens' processing unless ``model_from_pretrained_kwargs`` asks
for it, so an SAE saw centred ones exactly when that has ``center_writing_weights: true``. A file without the key says
nothing about it.

>>> import tempfile, torch
>>> from e2e_fast.formats.stored import StoredSAE
>>> sae = StoredSAE(torch.eye(3, 2), torch.zeros(3), torch.eye(3, 2), torch.ones(2), activation="topk", k=1)
>>> folder = write(adapt(sae), Path(tempfile.mkdtemp()))
>>> sorted(path.name for path in folder.iterdir())
['cfg.json', 'sae_weights.safetensors']
>>> read(folder).activation
'topk'
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import e2e_fast
from e2e_fast import files
from e2e_fast.formats import layouts
from e2e_fast.formats.stored import Activation, StoredSAE

NAME = "sae_lens"
SETTINGS, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SCALER = "activation_scaler.json"
BESIDE = (SPARSITY, SCALER, "activation_whitening.safetensors", "runner_cfg.json")
"""Files that describe the SAE and travel with it unchanged, until its weights change."""

ARCHITECTURES: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jump_relu",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
}
_WRITTEN = {"relu": "standard", "topk": "topk", "jump_relu": "jumprelu", "batch_topk": "jumprelu"}
_FRESH: dict[str, Any] = {
    "device": "cpu",
    "reshape_activations": "none",
    # Without a version SAELens takes a file for one of before 6.
    "metadata": {
        "sae_lens_version": "6.0.0",
        "sae_lens_training_version": None,
        "trained_with": f"e2e_fast {e2e_fast.__version__}",
    },
}
"""Settings of an SAE that was no SAELens file before."""


def detects(path: Path) -> bool:
    """Whether a path is such a folder, or its weight file."""
    return (path.parent if path.is_file() else path).joinpath(WEIGHTS).is_file() and path.name != SPARSITY


def read(path: Path) -> StoredSAE:
    """The SAE of a folder. Raises ValueError for architectures that are none of ours, and for incomplete files."""
    folder = path.parent if path.is_file() else path
    settings_file = folder / SETTINGS
    if not settings_file.is_file():
        raise ValueError(f"{folder} must hold {SETTINGS} beside {WEIGHTS}: it says what the SAE computes")
    cfg = files.load_json(settings_file)
    tensors = files.load_tensors(folder / WEIGHTS)
    architecture, k = _architecture(cfg, folder)
    lacking = [name for name in ("W_enc", "b_enc", "W_dec", "b_dec") if name not in tensors]
    activation = ARCHITECTURES[architecture]
    threshold_name = {"jump_relu": "threshold", "batch_topk": "topk_threshold"}.get(activation)
    if threshold_name is not None and threshold_name not in tensors:
        lacking.append(threshold_name)
    if lacking:
        raise ValueError(f"{folder / WEIGHTS} lacks {', '.join(lacking)}, which {architecture} SAEs have")
    about = layouts.part(cfg, "metadata") or cfg
    scale, refusal = _normalisation(cfg, tensors, folder)
    return StoredSAE(
        W_enc=tensors.pop("W_enc").T,
        b_enc=tensors.pop("b_enc"),
        W_dec=tensors.pop("W_dec"),
        b_dec=tensors.pop("b_dec"),
        activation=activation,
        k=k,
        threshold=None if threshold_name is None else tensors.pop(threshold_name),
        subtract_b_dec=cfg.get("apply_b_dec_to_input", True),
        decoder="rescaled" if cfg.get("rescale_acts_by_decoder_norm", False) else "raw",
        input_scale=scale,
        position=_position(about),
        model=about.get("model_name"),
        lm_processing=_processing(about),
        format=NAME,
        metadata=cfg,
        extra=tensors,
        files={name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()},
        refusal=refusal,
    )


def write(sae: StoredSAE, folder: Path) -> Path:
    """Writes an SAE in this format, as `read` or `adapt` gave it; returns the folder."""
    threshold_name = "topk_threshold" if sae.activation == "batch_topk" else "threshold"
    threshold = {} if sae.threshold is None else {threshold_name: sae.threshold}
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec} | threshold
    files.save_tensors(folder / WEIGHTS, tensors | sae.extra)
    files.write_atomically(folder / SETTINGS, json.dumps(sae.metadata, indent=2).encode())
    for name, data in sae.files.items():
        files.write_atomically(folder / name, data)
    return folder


def adapt(sae: StoredSAE, like: StoredSAE | None = None) -> StoredSAE:
    """An SAE in this format: its settings those of ``like``, where given, but for what the function changes.

    A batch top-k SAE becomes jumprelu with its threshold, as SAELens does it. Raises ValueError when it has none.
    """
    subtract = like.subtract_b_dec if like is not None else False
    plain = sae.arranged(subtract_b_dec=subtract, decoder="raw")
    threshold = plain.threshold
    if plain.activation in ("jump_relu", "batch_topk"):
        if threshold is None:
            raise ValueError("threshold is None: SAELens keeps batch top-k SAEs as jumprelu, which needs one")
        threshold = threshold.expand(plain.d_sae).clone()
    else:
        threshold = None
    activation: Activation = "jump_relu" if plain.activation == "batch_topk" else plain.activation
    cfg = _placed(like.metadata if like is not None and like.format == NAME else _FRESH, plain) | {
        "d_in": plain.d_in,
        "d_sae": plain.d_sae,
        "dtype": str(plain.W_dec.dtype).removeprefix("torch."),
        "apply_b_dec_to_input": subtract,
        "normalize_activations": "none",
    }
    k = None if plain.k is None else int(plain.k)
    is_old_topk = activation == "topk" and "metadata" not in cfg
    if not is_old_topk or cfg.get("architecture", "standard") not in ("standard", "topk"):
        cfg["architecture"] = _WRITTEN[activation]
    if is_old_topk:
        cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}}
    elif activation == "topk":
        cfg |= {"k": k, "rescale_acts_by_decoder_norm": False}
    else:
        for key in ("k", "rescale_acts_by_decoder_norm", "topk_threshold_lr"):
            cfg.pop(key, None)
    return replace(
        plain,
        activation=activation,
        k=plain.k if activation == "topk" else None,
        threshold=threshold,
        format=NAME,
        metadata=cfg,
        extra={},
        files={},
    )


# ---------------------------------------------------------------------------------------------------------- cfg.json


def _architecture(cfg: dict[str, Any], folder: Path) -> tuple[str, float | None]:
    """The architecture in SAELens 6's terms, and k."""
    architecture = cfg.get("architecture", "standard")
    function = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    k = cfg.get("k")
    if architecture in ("standard", "topk") and function == "topk":
        architecture, k = "topk", layouts.part(cfg, "activation_fn_kwargs").get("k", k)
    elif function not in ("relu", "topk"):
        raise ValueError(f"{folder / SETTINGS}: activation_fn must be relu or topk, got {function!r}")
    if architecture == "gated":
        raise ValueError(
            f"{folder} holds a gated SAE, which is not read. It computes what a jumprelu one does with "
            "W_enc·exp(r_mag), b_enc = b_mag and threshold = b_mag − exp(r_mag)·b_gate: save it as that"
        )
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{folder / SETTINGS}: architecture must be one of {list(ARCHITECTURES)}, got {architecture!r}"
        )
    return architecture, k if ARCHITECTURES[architecture] in ("topk", "batch_topk") else None


def _normalisation(cfg: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[float, str | None]:
    """The factor on the input, or why there is no SAE of ours for this file."""
    factor = tensors.get("scaling_factor")
    if factor is not None and not bool((factor == 1).all()):
        return 1.0, (
            f"{folder} has a finetuning scaling_factor on its codes, which SAELens 6 does not load either: multiply "
            "the rows of W_dec by it and remove the tensor"
        )
    kind = cfg.get("normalize_activations") or "none"
    if kind is True or kind == "expected_average_only_in":
        scaler = folder / SCALER
        scale = files.load_json(scaler).get("scaling_factor") if scaler.is_file() else None
        if scale is None:
            return 1.0, (
                f"{folder} was trained on scaled activations (normalize_activations: {kind!r}), and no {SCALER} beside "
                "it says by how much: fold the factor with SAELens' fold_activation_norm_scaling_factor and save again"
            )
        return float(scale), None
    if kind != "none":
        return 1.0, (
            f"{folder} normalises its activations beyond a factor (normalize_activations: {kind!r}), which no SAE of "
            "ours does"
        )
    return 1.0, None


def _position(about: dict[str, Any]) -> str | None:
    name = about.get("hook_name") or about.get("hook_point")
    return name.replace("{layer}", str(about.get("hook_point_layer"))) if name else None


def _processing(about: dict[str, Any]) -> str | None:
    if "model_from_pretrained_kwargs" not in about:
        return None
    centred = layouts.part(about, "model_from_pretrained_kwargs").get("center_writing_weights", False)
    return "transformer_lens" if centred else "none"


def _placed(cfg: dict[str, Any], sae: StoredSAE) -> dict[str, Any]:
    """The settings with an SAE's place, where it is another one than they say."""
    about = dict(cfg.get("metadata") or cfg)
    if sae.model is not None:
        about["model_name"] = sae.model
    if sae.position not in (None, _position(about)):
        about |= {"hook_name": sae.position, "hook_head_index": None}
    if sae.lm_processing not in (None, _processing(about)):
        centred = {"center_writing_weights": sae.lm_processing == "transformer_lens"}
        about["model_from_pretrained_kwargs"] = (about.get("model_from_pretrained_kwargs") or {}) | centred
    return cfg | {"metadata": about} if "metadata" in cfg else about
