"""Other libraries' SAE files, in and out: e2e_sae, SAELens, dictionary_learning and sparsify.

    stored = formats.read("gpt2_layer6")            which library wrote it is seen from the files
    sae = stored.to_sae()                           our SAE, the same function
    formats.write(stored, "copy")                   the same tensors, bit for bit, and the same settings
    formats.write(stored, "theirs", "sae_lens")     the same function in another library's terms

What one library computes and another cannot is a ValueError that says why. What each format holds, what is folded into
the weights on the way and what is refused: docs/formats.md.

>>> import tempfile, torch
>>> weights = torch.eye(3, 2), torch.zeros(3), torch.eye(3, 2), torch.ones(2)
>>> sae = StoredSAE(*weights, position="blocks.6.hook_resid_post")
>>> folder = write(sae, Path(tempfile.mkdtemp()) / "mine", "dictionary_learning")
>>> detect(folder), read(folder).position
('dictionary_learning', 'blocks.6.hook_resid_post')
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from e2e_fast.formats.layouts import split_name
from e2e_fast.formats.stored import StoredSAE

FORMATS = ("sae_lens", "sparsify", "e2e_sae", "dictionary_learning")
"""Each a module here, with ``detects``, ``read``, ``adapt`` and ``write``; `detect` tries them in this order."""

__all__ = ["FORMATS", "StoredSAE", "adapt", "detect", "is_run", "module", "read", "write"]


def detect(path: str | Path) -> str:
    """The format of a folder or weight file, ``path::name`` included.

    Raises FileNotFoundError when there is nothing, ValueError when it is none of `FORMATS`.
    """
    place, _ = split_name(path)
    if not place.exists():
        raise FileNotFoundError(f"no such file or folder: {place}")
    for name in FORMATS:
        if module(name).detects(place):
            return name
    raise ValueError(
        f"{place} is no SAE of a known format: expected sae_weights.safetensors (sae_lens), sae.safetensors "
        "(sparsify), final_config.yaml with samples_N weights (e2e_sae) or ae.pt (dictionary_learning)"
    )


def is_run(path: str | Path) -> bool:
    """Whether a path is a whole run of ours or of e2e_sae (or one of its weight files), with its configuration."""
    place, name = split_name(path)
    folder = place if place.is_dir() else place.parent
    if name is not None or not place.exists() or not (folder / "final_config.yaml").is_file():
        return False
    return not any(module(format).detects(place) for format in FORMATS if format != "e2e_sae")


def read(path: str | Path) -> StoredSAE:
    """The SAE of a folder or weight file; ``path::position`` for one of several (e2e_sae).

    Raises ValueError for what cannot be read, with the reason, FileNotFoundError for a path without files.
    """
    place, name = split_name(path)
    format = detect(place)
    if format == "e2e_sae":
        return module(format).read(place, name)
    if name is not None:
        raise ValueError(f"{place} is a {format} file, which holds one SAE: leave out ::{name}")
    return module(format).read(place)


def write(sae: StoredSAE, folder: str | Path, format: str | None = None) -> Path:
    """Writes an SAE into a folder; returns the folder. ``format=None``: the one that it came in.

    In its own format nothing changes. Raises ValueError where the format cannot hold the function (see `adapt`), and
    when the folder already holds files.
    """
    folder = Path(folder)
    format = format or sae.format
    if format != sae.format:
        sae = adapt(sae, format)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} must be a new or empty folder, but holds files")
    return module(format).write(sae, folder)


def adapt(sae: StoredSAE, format: str, like: StoredSAE | None = None) -> StoredSAE:
    """The same function in another format's terms, ready to be written.

    ``like`` is an SAE of that format whose settings are kept, but for what the function decides: so a trained SAE goes
    back into the kind of file that it came from. Raises ValueError where the format cannot hold the function.
    """
    return module(format).adapt(sae, like)


def module(format: str) -> ModuleType:
    """The module of a format, for what `write` does not do: its ``write`` puts an SAE into a folder already in use."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return import_module(f"e2e_fast.formats.{format}")
