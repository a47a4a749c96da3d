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
from functools import lru_cache
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

    The first `n_samples` windows, or all; a last shorter window is dropped. The text is tokenised once a process.
    Raises ValueError when `n_ctx` or `n_samples` is not positive or more than there is.
    """
    row = ids(split)
    if not 1 <= n_ctx <= len(row):
        raise ValueError(f"n_ctx must lie in [1, {len(row)}], the tokens of the embedded {split} text, got {n_ctx}")
    available = len(row) // n_ctx
    if n_samples is not None and not 1 <= n_samples <= available:
        raise ValueError(f"n_samples must lie in [1, {available}] for {split!r} at n_ctx={n_ctx}, got {n_samples}")
    n_samples = available if n_samples is None else n_samples
    return torch.from_numpy(row[: n_samples * n_ctx].reshape(n_samples, n_ctx).astype(np.int64))


def encode(tokenizer: "Tokenizer", split: str) -> np.ndarray:
    """Token ids of a whole split, uint16 [tokens], with the separator's id before each document."""
    bos = tokenizer.token_to_id(SEPARATOR)
    documents = [document for _, document in corpus.documents(split)]
    rows = tokenizer.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.array([bos, *row.ids], dtype=np.uint16) for row in rows])


@lru_cache(maxsize=2)
def ids(split: str = "train") -> np.ndarray:
    """Token ids of a whole split in one row, uint16 [tokens]; read-only, kept in memory."""
    from tokenizers import Tokenizer

    row = encode(Tokenizer.from_file(str(Path(path()) / "tokenizer.json")), split)
    row.flags.writeable = False
    return row
