"""sparsify (EleutherAI, also called sae): a folder with ``cfg.json`` and ``sae.safetensors``, named after its module.

==========================  ============================================
tensor                      meaning
==========================  ============================================
``encoder.weight`` [F, D]
``encoder.bias`` [F]
``W_dec`` [F, D]            rows of unit norm, but used as they are
``b_dec`` [D]               subtracted from the input, added to the output
==========================  ============================================

Top-k SAEs alone. The position is the folder's name, the path of a Hugging Face module (``layers.6``, ``h.3.mlp``),
beside the run's ``config.json``. The activations are the raw ones.

>>> import tempfile, torch
>>> from e2e_fast.formats.stored import StoredSAE
>>> sae = StoredSAE(torch.eye(3, 2), torch.zeros(3), torch.eye(3, 2), torch.ones(2), activation="topk", k=1)
>>> read(write(adapt(sae), Path(tempfile.mkdtemp()) / "layers.6")).position
'blocks.6.hook_resid_post'
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from e2e_fast import files
from e2e_fast.formats import layouts, places
from e2e_fast.formats.stored import StoredSAE

NAME = "sparsify"
SETTINGS, WEIGHTS = "cfg.json", "sae.safetensors"
_TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def detects(path: Path) -> bool:
    """Whether a path is such a folder, or its weight file."""
    return (path.parent if path.is_file() else path).joinpath(WEIGHTS).is_file()


def read(path: Path) -> StoredSAE:
    """The SAE of a folder. Raises ValueError for transcoders, other activations and incomplete files."""
    folder = path.parent if path.is_file() else path
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} must hold {SETTINGS} beside {WEIGHTS}: it says how many features are kept")
    cfg = files.load_json(folder / SETTINGS)
    tensors = files.load_tensors(folder / WEIGHTS)
    for key in ("transcode", "skip_connection"):
        if cfg.get(key):
            raise ValueError(f"{folder} holds a transcoder ({key}: true): its output is not its input, so it is no SAE")
    if cfg.get("activation", "topk") != "topk" or cfg.get("signed"):
        kind = "signed top-k" if cfg.get("signed") else repr(cfg["activation"])
        raise ValueError(f"{folder / SETTINGS}: activation must be 'topk', got {kind}")
    if lacking := [name for name in _TENSORS if name not in tensors]:
        raise ValueError(f"{folder / WEIGHTS} lacks {', '.join(lacking)}")
    run: dict[str, Any] = {}
    for above in (folder.parent, folder.parent.parent):  # seeds lie one folder deeper
        if not run and (above / "config.json").is_file():
            run = files.load_json(above / "config.json")
    ours = layouts.part(cfg, places.OUR_KEY)
    model = ours.get("model") or run.get("model")
    module = folder.parent.name if folder.name.startswith("seed") else folder.name
    return StoredSAE(
        W_enc=tensors.pop("encoder.weight"),
        b_enc=tensors.pop("encoder.bias"),
        W_dec=tensors.pop("W_dec"),
        b_dec=tensors.pop("b_dec"),
        activation="topk",
        k=cfg.get("k"),
        subtract_b_dec=True,
        position=ours.get("position") or places.of_module(module, model),
        model=model,
        lm_processing=ours.get("lm_processing", "none"),
        format=NAME,
        metadata=cfg,
        extra=tensors,
    )


def write(sae: StoredSAE, folder: Path) -> Path:
    """Writes an SAE in this format, as `read` or `adapt` gave it; returns the folder."""
    tensors = dict(zip(_TENSORS, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), strict=True))
    files.save_tensors(folder / WEIGHTS, tensors | sae.extra)
    files.write_atomically(folder / SETTINGS, json.dumps(sae.metadata).encode())
    return folder


def adapt(sae: StoredSAE, like: StoredSAE | None = None) -> StoredSAE:
    """An SAE in this format, with the settings of ``like`` where given. Raises ValueError unless it is top-k."""
    if sae.activation != "topk":
        raise ValueError(f"sparsify knows top-k SAEs alone, got {sae.activation}: write it as sae_lens")
    plain = sae.arranged(subtract_b_dec=True, decoder="raw")
    assert plain.k is not None
    fresh = {"activation": "topk", "normalize_decoder": True, "multi_topk": False, "skip_connection": False,
             "transcode": False}  # fmt: skip
    cfg = dict(like.metadata) if like is not None and like.format == NAME else fresh
    cfg |= {
        "expansion_factor": max(1, plain.d_sae // plain.d_in),
        "num_latents": plain.d_sae,
        "k": int(plain.k),
        "d_in": plain.d_in,
    }
    cfg = places.ours(cfg, plain.position, plain.model, plain.lm_processing)
    return replace(plain, threshold=None, format=NAME, metadata=cfg, extra={}, files={})
