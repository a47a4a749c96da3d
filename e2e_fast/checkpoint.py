"""Run folders: written atomically, read safely.

    {save_dir}/{run_name}_{YYYY-mm-dd_HH-MM-SS}/
        final_config.yaml          the configuration, as e2e_sae writes it
        samples_{N}.safetensors    the SAEs' weights after N sequences, under e2e_sae's keys
        resume_{N}.safetensors     what else training depends on: optimizer, random state, position in the data
        metrics.jsonl              one line a logged step
        summary.json               of a finished run: versions, tokens, seconds, the features that are alive

Every file is written beside its place, flushed to disk and renamed, so a full disk or a kill leaves the older files
intact. e2e_sae's own folders (``samples_N.pt``) are read as well; pickles only with ``weights_only=True``.

>>> import tempfile, torch
>>> folder = Path(tempfile.mkdtemp())
>>> path = save_tensors(folder / "samples_8.safetensors", {"blocks-0-hook_resid_pre.decoder.bias": torch.zeros(3)})
>>> newest(folder)[0]
8
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from e2e_fast.files import load_json, load_metadata, load_tensors, load_yaml, save_tensors, write_atomically
from e2e_fast.formats.layouts import SUMMARY

CONFIG = "final_config.yaml"
WEIGHTS = re.compile(r"samples_(\d+)\.(?:safetensors|pt)")


def newest(folder: Path) -> tuple[int, Path]:
    """(N, file) of the weights with the most samples. Raises FileNotFoundError where there are none."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))]
    if not found:
        raise FileNotFoundError(f"{folder} holds no samples_N.safetensors or samples_N.pt")
    return max(found)


def read_run(folder: Path, file: str | Path | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, weights) of a run folder, or of one of its weight files."""
    if folder.is_file():
        folder, file = folder.parent, folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run folder {folder}")
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}")
    weights = newest(folder)[1] if file is None else folder / file
    return load_yaml(config), load_tensors(weights)


def write_config(folder: Path, settings: Mapping[str, Any]) -> Path:
    """``final_config.yaml`` of a run folder."""
    return write_atomically(folder / CONFIG, yaml.safe_dump(dict(settings), sort_keys=False).encode())


def write_summary(folder: Path, summary: Mapping[str, Any]) -> Path:
    """``summary.json`` of a run folder."""
    return write_atomically(folder / SUMMARY, (json.dumps(dict(summary)) + "\n").encode())


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a run folder; empty where a run has not ended, or is none of ours."""
    path = folder / SUMMARY
    return load_json(path) if path.is_file() else {}


def save_resume(
    folder: Path,
    samples: int,
    optimizer: torch.optim.Optimizer,
    names: list[str],
    extra: Mapping[str, Tensor],
    state: Any,
) -> Path:
    """``resume_{samples}.safetensors``: the optimizer's tensors by parameter name, further tensors, and JSON state."""
    tensors = {f"extra.{key}": value for key, value in extra.items()}
    per_parameter = optimizer.state_dict()["state"]
    for index, name in enumerate(names):
        for key, value in per_parameter.get(index, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return save_tensors(folder / f"resume_{samples}.safetensors", tensors, state)


def load_resume(path: Path, optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], Any]:
    """Puts the optimizer's state back; returns (further tensors, JSON state)."""
    tensors = load_tensors(path)
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(names):
        prefix = f"optimizer.{name}."
        entry = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if entry:
            state[index] = entry
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}, load_metadata(path)


def resumable(*folders: Path) -> int | None:
    """The largest N for which both weights and resume file are there, in every folder; None when there is none."""
    return max(set.intersection(*map(_complete, folders)), default=None)


def _complete(folder: Path) -> set[int]:
    counts = {int(m[1]) for p in folder.glob("resume_*.safetensors") if (m := re.fullmatch(r"resume_(\d+)", p.stem))}
    return counts & {int(m[1]) for p in folder.glob("samples_*.safetensors") if (m := WEIGHTS.fullmatch(p.name))}


def remove_after(folder: Path, samples: int) -> None:
    """Removes what a killed process left beyond the checkpoint of ``samples``: later files, and unfinished ones."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\.(samples_\d+|resume_\d+|final_config|summary)\.\w+\.\w+", path.name):
            path.unlink(missing_ok=True)
    for path in [*folder.glob("samples_*.safetensors"), *folder.glob("resume_*.safetensors")]:
        if int(path.stem.rsplit("_", 1)[1]) > samples:
            path.unlink()


def keep_last(folder: Path, pattern: str, n: int) -> None:
    """Removes all but the ``n`` files with the most samples among ``{pattern}_{N}.safetensors``."""
    files = sorted(folder.glob(f"{pattern}_*.safetensors"), key=lambda p: int(p.stem.rsplit("_", 1)[1]))
    for path in files[:-n]:
        path.unlink(missing_ok=True)
