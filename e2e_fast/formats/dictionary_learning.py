"""dictionary_learning: a folder with ``ae.pt`` and ``config.json``, or a checkpoint ``checkpoints/ae_N.pt`` in it.

=====================  ===========  ==========================================================  ================
``dict_class``         activation   tensors (encoder.weight [F, D], decoder.weight [D, F])      b_dec from input
=====================  ===========  ==========================================================  ================
AutoEncoder            relu         ``bias`` (our b_dec), ``encoder.*``, ``decoder.weight``     subtracted
AutoEncoderNew         relu         ``encoder.*``, ``decoder.weight``, ``decoder.bias``         no
AutoEncoderTopK        topk         ``b_dec``, ``encoder.*``, ``decoder.weight``, ``k``,        subtracted
                                    ``threshold``
BatchTopKSAE           batch_topk   the same                                                    subtracted
MatryoshkaBatchTopK…   batch_topk   ``W_enc`` [D, F], ``b_enc``, ``W_dec`` [F, D], ``b_dec``,   subtracted
                                    ``k``, ``threshold``, ``group_sizes``
JumpReluAutoEncoder    jump_relu    ``W_enc`` [D, F], ``b_enc``, ``W_dec`` [F, D], ``b_dec``,   no
                                    ``threshold`` [F]
=====================  ===========  ==========================================================  ================

``config.json`` is {"trainer": {…}, "buffer": {…}}. Files from before it existed are told apart by their tensors, where
these differ. Batch top-k SAEs compute with their threshold outside training. The threshold of a top-k SAE is an
alternative to its k that the library does not use by default: it travels along, and is −1 ("none yet") after training
with us. The activations are the raw ones.

>>> import tempfile, torch
>>> from e2e_fast.formats.stored import StoredSAE
>>> weights = torch.eye(3, 2), torch.zeros(3), torch.eye(3, 2), torch.ones(2)
>>> sae = StoredSAE(*weights, position="blocks.2.hook_resid_post")
>>> stored = read(write(adapt(sae), Path(tempfile.mkdtemp())))
>>> stored.metadata["trainer"]["dict_class"], stored.position
('AutoEncoder', 'blocks.2.hook_resid_post')
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e2e_fast import files
from e2e_fast.formats import layouts, places
from e2e_fast.formats.stored import Activation, StoredSAE

NAME = "dictionary_learning"
SETTINGS, WEIGHTS = "config.json", "ae.pt"
UNSET = -1.0
"""The threshold of a (batch) top-k SAE before one was estimated; it lets every positive code through."""


class _Class(NamedTuple):
    activation: Activation
    subtract_b_dec: bool
    names: tuple[str, str, str, str]
    """Of W_enc, b_enc, W_dec, b_dec."""
    transposed: tuple[str, ...]
    """Those that are stored as [D, F]."""
    more: tuple[str, ...] = ()


_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_NAMED = ("W_enc", "b_enc", "W_dec", "b_dec")
CLASSES = {
    "AutoEncoder": _Class("relu", True, (*_LINEAR, "bias"), ("decoder.weight",)),
    "AutoEncoderNew": _Class("relu", False, (*_LINEAR, "decoder.bias"), ("decoder.weight",)),
    "AutoEncoderTopK": _Class("topk", True, (*_LINEAR, "b_dec"), ("decoder.weight",)),
    "BatchTopKSAE": _Class("batch_topk", True, (*_LINEAR, "b_dec"), ("decoder.weight",), ("threshold",)),
    "MatryoshkaBatchTopKSAE": _Class("batch_topk", True, _NAMED, ("W_enc",), ("threshold", "group_sizes")),
    "JumpReluAutoEncoder": _Class("jump_relu", False, _NAMED, ("W_enc",), ("threshold",)),
}
_WRITTEN = {
    "relu": ("AutoEncoder", "StandardTrainer"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batch_topk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "jump_relu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}
_SUBMODULES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attention_out": "hook_attn_out"}


def detects(path: Path) -> bool:
    """Whether a path is such a folder, or a ``.pt`` file with the tensors of one of the classes."""
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    if path.suffix != ".pt":
        return False
    names = files.tensor_names(path)
    return "r_mag" in names or any(names.issuperset((*c.names, *c.more)) for c in CLASSES.values())


def read(path: Path) -> StoredSAE:
    """The SAE of a folder or of one of its ``.pt`` files.

    Raises ValueError for gated SAEs, for files whose class cannot be told, and for incomplete ones.
    """
    file = path / WEIGHTS if path.is_dir() else path
    config = _config(file)
    tensors = files.load_tensors(file)
    trainer = layouts.part(config, "trainer")
    name = trainer.get("dict_class") or _class_by_tensors(set(tensors), file)
    if name == "GatedAutoEncoder":
        raise ValueError(
            f"{file} holds a gated SAE, which is not read. It computes what a JumpReluAutoEncoder does with encoder "
            "rows times exp(r_mag), b_enc = mag_bias and threshold = mag_bias − exp(r_mag)·gate_bias: save it as that"
        )
    if name not in CLASSES:
        raise ValueError(f"{file}: dict_class must be one of {list(CLASSES)}, got {name!r}")
    kind = CLASSES[name]
    if lacking := [key for key in (*kind.names, *kind.more) if key not in tensors]:
        raise ValueError(f"{file} lacks {', '.join(lacking)}, which {name} has")
    stored = {key: tensors.pop(key) for key in kind.names}
    W_enc, b_enc, W_dec, b_dec = (t.T if key in kind.transposed else t for key, t in stored.items())
    k = None
    if kind.activation in ("topk", "batch_topk"):
        k = int(tensors["k"]) if "k" in tensors else trainer.get("k")
    ours = layouts.part(config, places.OUR_KEY)
    uses_threshold = kind.activation in ("batch_topk", "jump_relu")
    return StoredSAE(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation=kind.activation,
        k=k,
        threshold=tensors.pop("threshold") if uses_threshold else None,
        subtract_b_dec=kind.subtract_b_dec,
        position=ours.get("position") or _position(trainer),
        model=ours.get("model") or trainer.get("lm_name"),
        lm_processing=ours.get("lm_processing", "none"),
        format=NAME,
        metadata=config | ({} if "dict_class" in trainer else {"trainer": trainer | {"dict_class": name}}),
        extra=tensors,
    )


def write(sae: StoredSAE, folder: Path) -> Path:
    """Writes an SAE in this format, as `read` or `adapt` gave it; returns the folder."""
    kind = CLASSES[sae.metadata["trainer"]["dict_class"]]
    tensors: dict[str, Tensor] = {}
    for key, tensor in zip(kind.names, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), strict=True):
        tensors[key] = tensor.T if key in kind.transposed else tensor
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    files.save_tensors(folder / WEIGHTS, tensors | sae.extra)
    files.write_atomically(folder / SETTINGS, json.dumps(sae.metadata, indent=4).encode())
    return folder


def adapt(sae: StoredSAE, like: StoredSAE | None = None) -> StoredSAE:
    """An SAE in this format: ``like``'s class and settings where the activation is the same."""
    name, trainer_class = _WRITTEN[sae.activation]
    config: dict[str, Any] = {"trainer": {"trainer_class": trainer_class}, "buffer": {}}
    if like is not None and like.format == NAME:
        config = dict(like.metadata)
        if like.activation == sae.activation:
            name = config["trainer"]["dict_class"]
    if name == "MatryoshkaBatchTopKSAE":
        raise ValueError(
            "a Matryoshka SAE's nested groups are not trained here, so it is not written back as one: convert it "
            "first, e.g. to sae_lens, where it is a jumprelu SAE"
        )
    kind = CLASSES[name]
    if name == "AutoEncoder":  # whose loader would give it unit rows
        sae = sae.arranged(decoder="unit")
    plain = sae.arranged(subtract_b_dec=kind.subtract_b_dec, decoder="raw")
    threshold = plain.threshold
    extra: dict[str, Tensor] = {}
    trainer = config["trainer"] | {"dict_class": name, "activation_dim": plain.d_in, "dict_size": plain.d_sae}
    if kind.activation in ("topk", "batch_topk"):
        assert plain.k is not None
        if plain.k != int(plain.k):
            raise ValueError(f"k must be whole for {name}, got {plain.k}: write it as sae_lens")
        trainer["k"] = int(plain.k)
        extra["k"] = torch.tensor(int(plain.k), dtype=torch.int32)
    if kind.activation == "batch_topk":
        if threshold is None:
            raise ValueError(f"threshold is None: {name} computes with one outside training")
        threshold = threshold.float().reshape(()) if threshold.ndim == 0 else _only(threshold)
    elif kind.activation == "jump_relu":
        assert threshold is not None
        threshold = threshold.expand(plain.d_sae).clone()
    elif kind.activation == "topk":
        threshold, extra["threshold"] = None, torch.tensor(UNSET)
    else:
        threshold = None
    config["trainer"] = _placed(trainer, plain)
    config = places.ours(config, plain.position, plain.model, plain.lm_processing)
    return replace(plain, threshold=threshold, format=NAME, metadata=config, extra=extra, files={})


def _only(threshold: Tensor) -> Tensor:
    if not bool((threshold == threshold[0]).all()):
        raise ValueError("BatchTopKSAE has one threshold for all features, got different ones: write it as sae_lens")
    return threshold[0].float()


# ------------------------------------------------------------------------------------------------------- config.json


def _config(file: Path) -> dict[str, Any]:
    """The settings beside a weight file, or above ``checkpoints/``; {} where there are none."""
    for folder in (file.parent, file.parent.parent):
        if (folder / SETTINGS).is_file():
            return files.load_json(folder / SETTINGS)
    return {}


def _class_by_tensors(names: set[str], file: Path) -> str:
    if "r_mag" in names:
        return "GatedAutoEncoder"
    fitting = [name for name, kind in CLASSES.items() if names.issuperset((*kind.names, *kind.more))]
    if "MatryoshkaBatchTopKSAE" in fitting:
        return "MatryoshkaBatchTopKSAE"
    if len(fitting) == 1:
        return fitting[0]
    what = f"may be {' or '.join(fitting)}" if fitting else f"has the tensors {sorted(names)}"
    raise ValueError(f'{file} {what}: put {SETTINGS} with {{"trainer": {{"dict_class": …, "k": …}}}} beside it')


def _position(trainer: dict[str, Any]) -> str | None:
    match = re.fullmatch(r"(resid_post|mlp_out|attention_out)_layer_(\d+)", trainer.get("submodule_name") or "")
    return f"blocks.{match[2]}.{_SUBMODULES[match[1]]}" if match else None


def _placed(trainer: dict[str, Any], sae: StoredSAE) -> dict[str, Any]:
    """The trainer's settings with the layer, the module and the model, where they have none."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", sae.position or "")
    if "layer" not in trainer and match is not None:
        layer, stage = int(match[1]), match[2]
        if stage == "hook_resid_pre" and layer > 0:  # the output of the block before
            layer, stage = layer - 1, "hook_resid_post"
        names = {hook: name for name, hook in _SUBMODULES.items()}
        trainer |= {"layer": layer} | ({"submodule_name": f"{names[stage]}_layer_{layer}"} if stage in names else {})
    if "lm_name" not in trainer and sae.model is not None:
        trainer["lm_name"] = sae.model
    return trainer
