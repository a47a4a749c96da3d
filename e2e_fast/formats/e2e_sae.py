"""e2e_sae and this library: a run folder with ``final_config.yaml`` and ``samples_N.pt`` or ``.safetensors``.

==================================  ======================================================
tensor, after the position's name   meaning
==================================  ======================================================
``encoder.0.weight`` [F, D]
``encoder.0.bias`` [F]
``decoder.weight`` [D, F]           raw: its columns are normalised whenever they are used
``decoder.bias`` [D]                not subtracted from the input
``log_threshold`` [F]               ours: jump-relu's log θ
``running_threshold`` ()            ours: batch top-k's θ outside training
==================================  ======================================================

A file may hold SAEs at several positions: ``folder::blocks.6.hook_resid_pre`` asks for one. The activations are those
of TransformerLens' processed models, unless ``lm_processing`` (a key of ours) says otherwise. The authors' copies on
the Hugging Face hub (one ``.pt`` with a ``.yaml`` of the same name) have neither position nor ``.0`` in the tensors'
names, and columns that are unit already; they are read, and written as a run folder.

e2e_sae itself knows ReLU and normalised decoders alone. Ours go beyond it with ``saes.activation``, ``k`` and
``normalize_decoder`` in the configuration; they are written only where an SAE needs them.

>>> import tempfile, torch
>>> from e2e_fast.formats.stored import StoredSAE, log_threshold
>>> sae = StoredSAE(torch.eye(3, 2), torch.zeros(3), torch.eye(3, 2), torch.ones(2), position="blocks.2.hook_resid_pre")
>>> folder = write(adapt(sae), Path(tempfile.mkdtemp()))
>>> sorted(path.name for path in folder.iterdir()), read(folder).decoder
(['final_config.yaml', 'samples_0.pt'], 'unit')
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e2e_fast import checkpoint, files
from e2e_fast.formats import layouts
from e2e_fast.formats.stored import StoredSAE, log_threshold
from e2e_fast.positions import hyphenated

NAME = "e2e_sae"
SETTINGS = "final_config.yaml"
_TENSORS = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")
_THRESHOLDS = {"jump_relu": "log_threshold", "batch_topk": "running_threshold"}
_HUB_TENSORS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}


def detects(path: Path) -> bool:
    """Whether a path is a run folder, one of its weight files, or the authors' ``.pt`` with its ``.yaml``."""
    if path.is_dir():
        return (path / SETTINGS).is_file() and any(checkpoint.WEIGHTS.fullmatch(p.name) for p in path.iterdir())
    if path.suffix not in (".pt", ".safetensors"):
        return False
    names = files.tensor_names(path)
    return any(name.endswith(f".{_TENSORS[0]}") for name in names) or (
        names == _HUB_TENSORS and path.with_suffix(".yaml").is_file()
    )


def read(path: Path, name: str | None = None) -> StoredSAE:
    """The SAE of a run, of its newest weights for a folder; ``name`` is its position where there are several.

    Raises ValueError when there are several and none is named, FileNotFoundError for a folder without weights.
    """
    file = checkpoint.newest(path)[1] if path.is_dir() else path
    state = files.load_tensors(file)
    if set(state) == _HUB_TENSORS:
        return _of_hub(file, state)
    settings: dict[str, Any] = {}
    if (file.parent / SETTINGS).is_file():
        settings = files.load_yaml(file.parent / SETTINGS)
    return _of_state(settings, state, name, str(path), file.name)


def write(sae: StoredSAE, folder: Path) -> Path:
    """Writes an SAE in this format, as `read` or `adapt` gave it; returns the folder."""
    checkpoint.write_config(folder, sae.metadata["settings"])
    files.save_tensors(folder / sae.metadata["file"], state_dict(sae))
    return folder


def state_dict(sae: StoredSAE) -> dict[str, Tensor]:
    """The tensors of such an SAE under their names in the file."""
    assert sae.position is not None
    tensors = (sae.W_enc, sae.b_enc, sae.W_dec.T, sae.b_dec)
    named = {f"{hyphenated(sae.position)}.{name}": t for name, t in zip(_TENSORS, tensors, strict=True)}
    return named | sae.extra


def adapt(sae: StoredSAE, like: StoredSAE | None = None) -> StoredSAE:
    """An SAE in this format, with the settings of ``like`` where given; a normalised decoder wherever that is exact.

    Raises ValueError when its position is not known, or its k is not whole.
    """
    if sae.position is None:
        raise ValueError("position is None, and e2e_sae names its tensors by it: give the position (--position)")
    if sae.k is not None and sae.k != int(sae.k):
        raise ValueError(f"k must be whole, got {sae.k}: write it as sae_lens")
    plain = sae.arranged(decoder="unit" if sae.can_be_unit() else "raw")
    settings: dict[str, Any] = {"tlens_model_name": plain.model, "tlens_model_path": None}
    if like is not None and like.format == NAME:
        settings = dict(like.metadata["settings"])
    if plain.lm_processing not in (None, settings.get("lm_processing", "transformer_lens")):
        settings["lm_processing"] = plain.lm_processing
    saes: dict[str, Any] = dict(settings.get("saes") or {})
    saes |= {"sae_positions": [plain.position], "dict_size_to_input_ratio": ratio(plain.d_sae, plain.d_in)}
    for key, value, default in (
        ("k", None if plain.k is None else int(plain.k), None),
        ("activation", plain.activation, "topk" if plain.activation == "topk" else "relu"),
        ("normalize_decoder", plain.decoder == "unit", True),
    ):
        if value != default:
            saes[key] = value
        elif key in saes:
            saes[key] = default
    settings["saes"] = saes
    extra: dict[str, Tensor] = {}
    stem = hyphenated(sae.position)
    if plain.activation == "jump_relu":
        extra[f"{stem}.log_threshold"] = log_threshold(plain)
    elif plain.activation == "batch_topk":
        threshold = torch.zeros(()) if plain.threshold is None else plain.threshold.clamp(min=0)
        extra[f"{stem}.running_threshold"] = threshold
    file = "samples_0.pt" if like is None or like.format != NAME else like.metadata["file"]
    return replace(plain, format=NAME, metadata={"settings": settings, "file": file}, extra=extra, files={})


def ratio(d_sae: int, d_in: int) -> float:
    """The ``dict_size_to_input_ratio`` that gives this dictionary size: int(ratio · d_in) = d_sae."""
    exact = d_sae / d_in
    return exact if int(exact * d_in) == d_sae else (d_sae + 0.5) / d_in


def _of_state(
    settings: Mapping[str, Any], state: Mapping[str, Tensor], name: str | None, source: str, file: str
) -> StoredSAE:
    stems = [key.removesuffix(f".{_TENSORS[0]}") for key in state if key.endswith(f".{_TENSORS[0]}")]
    wanted = stems if name is None else [stem for stem in stems if stem == hyphenated(name)]
    if len(wanted) != 1:
        positions = sorted(_position(stem) for stem in stems)
        raise ValueError(f"{source} holds SAEs {positions}: ask for one as path::name")
    (stem,) = wanted
    if lacking := [f"{stem}.{tensor}" for tensor in _TENSORS if f"{stem}.{tensor}" not in state]:
        raise ValueError(f"{source} lacks {', '.join(lacking)}")
    W_enc, b_enc, W_dec, b_dec = (state[f"{stem}.{tensor}"] for tensor in _TENSORS)
    saes = layouts.part(settings, "saes")
    k = saes.get("k")
    activation = saes.get("activation") or ("relu" if k is None else "topk")
    for kind, tensor in _THRESHOLDS.items():
        if (kind == activation) != (f"{stem}.{tensor}" in state):
            raise ValueError(
                f"{source}: {kind} SAEs, and they alone, have {stem}.{tensor}; by saes.activation in {SETTINGS} this "
                f"is a {activation} SAE"
            )
    threshold = None
    if activation == "jump_relu":
        threshold = state[f"{stem}.log_threshold"].exp()
    elif activation == "batch_topk":
        threshold = state[f"{stem}.running_threshold"]
    return StoredSAE(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec.T,
        b_dec=b_dec,
        activation=activation,
        k=k,
        threshold=threshold,
        decoder="unit" if saes.get("normalize_decoder", True) else "raw",
        position=_position(stem),
        model=settings.get("tlens_model_name") or settings.get("tlens_model_path"),
        lm_processing=settings.get("lm_processing", "transformer_lens"),
        format=NAME,
        metadata={"settings": dict(settings), "file": file},
        extra={key: tensor for key, tensor in state.items() if key not in {f"{stem}.{name}" for name in _TENSORS}},
    )


def _of_hub(file: Path, state: Mapping[str, Tensor]) -> StoredSAE:
    beside = file.with_suffix(".yaml")
    settings = files.load_yaml(beside) if beside.is_file() else {}
    positions = layouts.part(settings, "saes").get("sae_positions")
    position = positions[0] if isinstance(positions, list) and len(positions) == 1 else positions
    if not isinstance(position, str):
        raise ValueError(f"{beside} must name one SAE under saes.sae_positions, got {positions!r}")
    stem = hyphenated(position)
    named = {f"{stem}.{name.replace('encoder.', 'encoder.0.')}": tensor for name, tensor in state.items()}
    return _of_state(settings, named, None, str(file), "samples_0.pt")


def _position(stem: str) -> str:
    """The position of a module name: hyphens are dots again."""
    return stem.replace("-", ".")
