"""The language model and the text that need no download: a GPT-2-style model and the Python standard library.

`path()` is a Hugging Face folder (`config.json`, `tokenizer.json`, `model.safetensors`) that this project trained
itself with ``e2e-fast train-lm``; its README states the loss and the command. The text (`e2e_fast.embedded.corpus`) is
read from the running Python, so the package carries none of it. Both go by the name ``embedded`` in configurations.

>>> from e2e_fast import embedded
>>> embedded.tokens("heldout", n_ctx=128, n_samples=4).shape
torch.Size([4, 128])
>>> embedded.text("heldout").count("import ") > 100
True
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from e2e_fast.embedded import corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"  # id 0: before every document; the model's BOS and EOS


def path() -> str:
    """The model's folder, as ``load_lm`` and ``AutoModelForCausalLM.from_pretrained`` take it."""
    return str(Path(__file__).resolve().parent)


def record() -> dict[str, Any]:
    """How the weights were made and what they reach: the contents of ``training.json``."""
    return json.loads((Path(path()) / "training.json").read_text())


def text(split: str = "train") -> str:
    """Every document of `split` ("train" or "heldout"), joined by lines that hold ``<|endoftext|>``."""
    return f"\n{SEPARATOR}\n".join(document for _, document in corpus.documents(split))


def tokens(split: str = "train", n_ctx: int = 128, n_samples: int | None = None) -> Tensor:
    """Windows of token ids, [samples, n_ctx] int64: BOS before each document, all joined, cut every `n_ctx` tokens.

    The first `n_samples` windows, or all; a last shorter window is dropped. No more is tokenised than asked for; what
    has been is kept in memory. Raises ValueError when `n_ctx` or `n_samples` is not positive or more than there is.
    """
    if n_ctx < 1 or (n_samples is not None and n_samples < 1):
        raise ValueError(f"n_ctx and n_samples must be positive, got {n_ctx} and {n_samples}")
    row = ids(split, None if n_samples is None else n_samples * n_ctx)
    available = len(row) // n_ctx
    if available < (n_samples or 1):
        raise ValueError(
            f"the embedded {split} text has {len(row)} tokens, {available} samples of n_ctx={n_ctx}; "
            f"n_samples asks for {n_samples or 'at least 1'}"
        )
    n_samples = n_samples or available
    return torch.from_numpy(row[: n_samples * n_ctx].reshape(n_samples, n_ctx).astype(np.int64))


def ids(split: str = "train", at_least: int | None = None) -> np.ndarray:
    """Token ids in one row, uint16 [tokens], read-only, BOS before each document: the whole split, or its beginning of
    `at_least` tokens and a little more."""
    return _encoded(split).first(at_least)


def encode(tokenizer: "Tokenizer", split: str) -> Iterator[np.ndarray]:
    """Token ids of a split, uint16 [tokens], some documents at a time, with the separator's id before each document."""
    bos = tokenizer.token_to_id(SEPARATOR)
    documents = (document for _, document in corpus.documents(split))
    while portion := list(islice(documents, 32)):
        rows = tokenizer.encode_batch(portion, add_special_tokens=False)
        yield np.concatenate([np.array([bos, *row.ids], dtype=np.uint16) for row in rows])


class _Encoded:
    """A split, tokenised as far as somebody asked."""

    def __init__(self, split: str) -> None:
        from tokenizers import Tokenizer

        self._portions = encode(Tokenizer.from_file(str(Path(path()) / "tokenizer.json")), split)
        self._ids = np.empty(0, dtype=np.uint16)

    def first(self, at_least: int | None) -> np.ndarray:
        parts, n = [self._ids], len(self._ids)
        while (at_least is None or n < at_least) and (portion := next(self._portions, None)) is not None:
            parts.append(portion)
            n += len(portion)
        self._ids = np.concatenate(parts)
        self._ids.flags.writeable = False
        return self._ids


@lru_cache(maxsize=2)
def _encoded(split: str) -> _Encoded:
    return _Encoded(split)
