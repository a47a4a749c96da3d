"""The text of the embedded language model: the Python standard library, read from the machine at run time.

A document is one source file (code, comments and docstrings), or one page of the reference documentation that
``help()`` shows (``pydoc_data/topics.py``). A file is held out when the last byte of the SHA-256 of its path is below
13 (about one file in twenty), so a file stays on its side of the split in every Python version; the documentation is
trained on. Documents come in the order of that hash: fixed, and every prefix of it is a fair sample of the whole.

The text is meant to depend on the Python version alone (`fingerprint` tells, where a distribution has patched more than
is known here). Left out are the parts that some distributions ship apart or patch
(idlelib, tkinter, lib2to3, distutils, ensurepip, venv, turtledemo, site configuration), tests, and the tables of
`encodings`, which are no prose and no code.

>>> from e2e_fast.embedded import corpus
>>> name, document = next(corpus.documents("train"))
>>> corpus.is_heldout(name)
False
"""

import hashlib
import importlib
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

SPLITS = ("train", "heldout")
HELDOUT_BELOW = 13  # of 256
DOCUMENTATION = "pydoc_data/topics.py"

NO_SOURCE = {"__pycache__", "dist-packages", "encodings", "lib-dynload", "site-packages"}
TESTS = {"idle_test", "test", "tests"}
SHIPPED_APART = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo", "venv"}
PATCHED = {"_distutils_system_mod.py", "site.py", "sitecustomize.py", "sysconfig.py", "usercustomize.py"}
EXCLUDED = NO_SOURCE | TESTS | SHIPPED_APART | PATCHED
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars", "__phello__")


def documents(split: str) -> Iterator[tuple[str, str]]:
    """(path inside the standard library, text) of every document of `split`, "train" or "heldout".

    Raises ValueError for another split, FileNotFoundError where the standard library's source is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    for name in source_files():
        if is_heldout(name) != (split == "heldout"):
            continue
        if name == DOCUMENTATION:
            pages = importlib.import_module("pydoc_data.topics").topics
            yield from ((name, pages[page].strip() + "\n") for page in sorted(pages))
        else:
            text = (standard_library() / name).read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield name, text


def is_heldout(name: str) -> bool:
    """Whether the file of this path (with forward slashes) belongs to the held-out part."""
    return _digest(name)[-1] < HELDOUT_BELOW


@lru_cache(maxsize=1)
def source_files() -> tuple[str, ...]:
    """Paths inside the standard library of every file that counts, in the order of their hashes."""
    root = standard_library()
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if _counts(name)]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files if _counts(file)]
    names = [name for name in names if name.endswith(".py")]
    if not names:
        raise FileNotFoundError(f"the embedded text needs the standard library's .py files, none are under {root}")
    return tuple(sorted(names, key=_digest))


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def fingerprint() -> str:
    """Sixteen hexadecimal digits that are equal where the text is: of the names and texts of both splits."""
    total = hashlib.sha256()
    for split in SPLITS:
        for name, text in documents(split):
            total.update(f"{name}\0{text}\0".encode())
    return total.hexdigest()[:16]


def _counts(name: str) -> bool:
    """Whether a file or folder of this name is part of the text."""
    return name not in EXCLUDED and not name.startswith(EXCLUDED_PREFIXES)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
