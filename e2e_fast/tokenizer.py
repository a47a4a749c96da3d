"""Tokenizers by name or folder, and documents as one row of token ids.

>>> tokenizer = load_tokenizer("embedded")
>>> ids, bos = encode_documents(["def f():", "return 1"], tokenizer, "document")
>>> int((ids == tokenizer.bos_token_id).sum()), bos
(2, None)
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

EMBEDDED = "embedded"
"""The name of the embedded text, its model and its tokenizer."""

SEPARATOR = "<|endoftext|>"
"""Between documents of a text file; GPT-2's BOS and EOS."""


def load_tokenizer(name: str) -> Any:
    """A Hugging Face fast tokenizer (``PreTrainedTokenizerFast`` or what ``AutoTokenizer`` gives) of any of these:

    * ``embedded``: the embedded model's
    * a Hugging Face name, or a folder with ``tokenizer_config.json`` or ``tokenizer.json``
    * a folder with a BPE as GPT-2 publishes it: ``encoder.json`` or ``vocab.json``, and ``vocab.bpe`` or ``merges.txt``
      (a prefix such as ``gpt2-`` may stand before them)
    * a folder with only a ``vocab.json`` that maps single characters to ids: one token a character, no special tokens

    Raises FileNotFoundError where there is none of them.
    """
    if name == EMBEDDED:
        from e2e_fast import embedded

        name = embedded.path()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "tokenizer_config.json").is_file():
            return _from_pretrained(str(folder))
        if (folder / "tokenizer.json").is_file():
            return _from_tokenizer_json(folder / "tokenizer.json")
        vocabulary = next((p for end in ("encoder.json", "vocab.json") for p in sorted(folder.glob("*" + end))), None)
        merges = next((p for end in ("vocab.bpe", "merges.txt") for p in sorted(folder.glob("*" + end))), None)
        if vocabulary and merges:
            return _gpt2_bpe(vocabulary, merges)
        if vocabulary:
            return _characters(vocabulary)
        raise FileNotFoundError(
            f"tokenizer_name: {name} has no tokenizer.json, no encoder.json with vocab.bpe and no vocab.json"
        )
    if name.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"tokenizer_name: there is no folder {name!r}")
    return _from_pretrained(name)


def _from_pretrained(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"tokenizer_name: no tokenizer {name!r} ({error})") from error


def _from_tokenizer_json(path: Path) -> Any:
    """The special tokens are those whose usual names the vocabulary has."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(path))
    usual = {
        "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", SEPARATOR),
        "eos_token": ("</s>", "<eos>", "<|end_of_text|>", SEPARATOR),
    }
    found = {role: [n for n in names if tokenizer.token_to_id(n) is not None] for role, names in usual.items()}
    special = {role: names[0] for role, names in found.items() if names}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _gpt2_bpe(vocabulary: Path, merges: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR)


def _characters(vocabulary: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    if not isinstance(ids, dict) or any(len(c) != 1 or not isinstance(i, int) for c, i in ids.items()):
        raise ValueError(f"tokenizer_name: {vocabulary}, without merges, must map single characters to ids")
    tokenizer = Tokenizer(models.WordLevel(ids))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.characters = frozenset(ids)  # what it can encode: checked first, so that the error names the characters
    return fast


def encode_documents(documents: list[str], tokenizer: Any, add_bos: str) -> tuple[np.ndarray, int | None]:
    """Token ids of all documents in one row [tokens], and the id that is to stand before each window, if any.

    ``document``: BOS, where the tokenizer has one, before each document. ``window``: EOS between documents, and BOS
    returned for the windows; raises ValueError for a tokenizer without them. ``none``: documents joined as they are.
    """
    encoded = _encode(documents, tokenizer)
    if add_bos == "window":
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError('add_bos "window" needs a tokenizer with BOS and EOS; this one lacks them, use "none"')
        rows = [part for row in encoded for part in ([tokenizer.eos_token_id], row)][1:]
        return _joined(rows), tokenizer.bos_token_id
    if add_bos == "document" and tokenizer.bos_token_id is not None:
        return _joined([part for row in encoded for part in ([tokenizer.bos_token_id], row)]), None
    return _joined(encoded), None


def _joined(rows: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])


def _encode(documents: list[str], tokenizer: Any) -> list[list[int]]:
    known = getattr(tokenizer, "characters", None)
    if known is not None:
        unknown = sorted(set().union(*documents) - known)
        if unknown:
            some = "".join(unknown[:10])
            raise ValueError(f"{len(unknown)} characters are not in the vocabulary, among them {some!r}")
    return tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
