"""Where tokens come from: given arrays, files of ids, texts and Hugging Face datasets, each cut into windows.

A source numbers the windows of an epoch in an order of its own and turns those that a rank keeps into token ids.
`TokenBatches` (data.py) makes batches of them.

>>> config = DatasetConfig(dataset_name="embedded", tokenizer_name="embedded", split="heldout", n_ctx=64)
>>> source = open_source(config, None, Order(seed=0, shuffle=False))
>>> source.stack(list(source.items(epoch=0, start=2))[:3]).shape
(3, 64)
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor

from e2e_fast.optional import require
from e2e_fast.tokenizer import EMBEDDED, SEPARATOR, encode_documents, load_tokenizer


class DatasetConfig(BaseModel):
    """Where tokens come from: e2e_sae's keys, then ours.

    `dataset_name` is ``embedded`` (the Python standard library, `e2e_fast.embedded`); a ``.npy`` file, integers
    [samples, T] or [tokens]; a ``.bin`` file of flat `token_dtype` ids; what ``datasets.load_dataset`` takes, a name, a
    folder, a ``.parquet``, ``.json``, ``.jsonl``, ``.csv`` or ``.arrow`` file; or any other file, read as UTF-8 text.
    Rows longer than `n_ctx` are cut into windows, the shorter end is dropped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset_name: str
    tokenizer_name: str
    """A Hugging Face name or folder, a folder as `load_tokenizer` reads it, or ``embedded``."""
    split: str
    """``train`` for a file, ``train`` or ``heldout`` for ``embedded``; also a slice of its windows: ``train[:90%]``."""
    n_ctx: PositiveInt
    """Tokens in a window."""
    is_tokenized: bool = True
    """Of a Hugging Face dataset: whether its rows are token ids. Text files are text, arrays are ids, regardless."""
    streaming: bool = True
    """Of a Hugging Face dataset: read as it comes (shuffled within a buffer) or download it (shuffled as a whole)."""
    seed: NonNegativeInt | None = None
    """Of the order; None takes the run's seed."""
    column_name: str = "input_ids"
    """Of a Hugging Face dataset: the column of ids; of texts when not tokenised, where the default means ``text``."""

    shuffle: bool = True
    """Whether each epoch has its own order; false keeps that of the file."""
    shuffle_buffer: PositiveInt = 1000
    """Rows of a streaming dataset held to draw from."""
    separator: str | None = SEPARATOR
    """Where a text file is split into documents; None makes it one document."""
    add_bos: Literal["auto", "document", "window", "none"] = "auto"
    """``document``: BOS, where the tokenizer has one, before each document. ``window``: documents joined by EOS, BOS at
    the start of each window, as TransformerLens' tokenize_and_concatenate does. ``none``: documents joined as they
    are. ``auto``: ``window`` for Hugging Face datasets, else ``document``."""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Of a ``.bin`` file."""


class Source(Protocol):
    """Windows, epoch by epoch. An item stands for one window; only those that a rank keeps are turned into ids."""

    name: str
    n_ctx: int

    def items(self, epoch: int, start: int) -> Iterator[Any]: ...

    def stack(self, items: list[Any]) -> np.ndarray: ...


class Order:
    """Which window comes when: a permutation an epoch, or the order of the file."""

    def __init__(self, seed: int, shuffle: bool) -> None:
        self.seed, self.shuffle = seed, shuffle

    def __call__(self, n: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)


class ArraySource:
    """Windows of an integer array [rows, T], perhaps memory-mapped: ``T // n_ctx`` a row."""

    def __init__(self, name: str, ids: np.ndarray, n_ctx: int, order: Order, bos: int | None = None) -> None:
        """`bos` is put before each window, which then takes ``n_ctx - 1`` ids of the array."""
        self.name, self.ids, self.n_ctx, self._order = name, ids, n_ctx, order
        self._bos = [] if bos is None else [bos]
        self._width = n_ctx - len(self._bos)
        self._per_row = ids.shape[1] // self._width if self._width else 0
        if self._per_row == 0 or len(ids) == 0:
            available = ids.shape[1] + len(self._bos)
            raise ValueError(f"n_ctx must be at most {available}, the tokens in {name}, got {n_ctx}")
        self._first, self._end = 0, len(ids) * self._per_row
        self.in_memory = not isinstance(ids, np.memmap) and not isinstance(ids.base, np.memmap)

    def sliced(self, first: int, end: int) -> "ArraySource":
        """Only windows [first, end)."""
        if first >= end:
            raise ValueError(f"the split of {self.name} is empty: windows {first} to {end} of {self._end}")
        self._first, self._end = first, end
        return self

    def __len__(self) -> int:
        return self._end - self._first

    def items(self, epoch: int, start: int) -> Iterator[int]:
        return map(int, self._first + self._order(len(self), epoch)[start:])

    def stack(self, items: list[int]) -> np.ndarray:
        out = np.empty((len(items), self.n_ctx), dtype=np.int64)
        for row, item in zip(out, items, strict=True):
            source_row, column = divmod(item, self._per_row)
            row[: len(self._bos)] = self._bos
            row[len(self._bos) :] = self.ids[source_row, column * self._width : (column + 1) * self._width]
        return out


class DatasetSource:
    """Windows of a Hugging Face dataset, as they are read. Resuming reads again from the epoch's start and discards:
    slower than the dataset's own state, which forgets what its shuffle buffer holds in many versions."""

    def __init__(self, name: str, dataset: Any, config: DatasetConfig, tokenizer: Any, order: Order) -> None:
        self.name, self.n_ctx = name, config.n_ctx
        self._config, self._tokenizer, self._order = config, tokenizer, order
        self._add_bos = "window" if config.add_bos == "auto" else config.add_bos
        self._column = config.column_name
        if not config.is_tokenized and config.column_name == "input_ids":
            self._column = "text"
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name} has no rows in split {config.split!r}")
        if self._column not in first:
            columns = ", ".join(sorted(first))
            raise ValueError(f"column_name: {name} has no column {self._column!r}, its columns are {columns}")
        if config.is_tokenized:
            self._row(first)
        elif not isinstance(first[self._column], str):
            kind = _kind(first[self._column])
            raise ValueError(f"column {self._column!r} of {name} must hold text when is_tokenized is false, got {kind}")
        self._dataset = dataset.select_columns([self._column])

    def items(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        return islice(self._windows(epoch), start, None)

    def stack(self, items: list[np.ndarray]) -> np.ndarray:
        return np.stack(items).astype(np.int64)

    def _windows(self, epoch: int) -> Iterator[np.ndarray]:
        rows = iter(self._epoch(epoch))
        if self._config.is_tokenized:
            for row in rows:
                yield from _cut(self._row(row), self.n_ctx)
            return
        while documents := [row[self._column] for row in islice(rows, 1000)]:  # TransformerLens' portion
            ids, bos = encode_documents(documents, self._tokenizer, self._add_bos)
            if bos is None:
                yield from _cut(ids, self.n_ctx)
            elif self.n_ctx > 1:
                yield from np.insert(_cut(ids, self.n_ctx - 1), 0, bos, axis=1)

    def _epoch(self, epoch: int) -> Iterable[dict[str, Any]]:
        """The dataset in this epoch's order: e2e_sae's shuffle in the first, seeds counted up from there."""
        if not self._order.shuffle:
            return self._dataset
        seed = self._order.seed + epoch
        if self._config.streaming:
            return self._dataset.shuffle(seed=seed, buffer_size=self._config.shuffle_buffer)
        return self._dataset.shuffle(seed=seed)

    def _row(self, row: dict[str, Any]) -> np.ndarray:
        ids = np.asarray(row[self._column]) if not isinstance(row[self._column], str) else np.empty(0, dtype=object)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"column {self._column!r} of {self.name} must hold lists of token ids when is_tokenized is true, "
                f"got {_kind(row[self._column])}"
            )
        if len(ids) < self.n_ctx:
            raise ValueError(f"n_ctx must be at most {len(ids)}, the length of a row of {self.name}, got {self.n_ctx}")
        return ids


def open_source(config: DatasetConfig, tokenizer: Any, order: Order) -> Source:
    """The source that `config.dataset_name` names. Reads and tokenises text files at once; arrays stay on disk."""
    name, path = config.dataset_name, Path(config.dataset_name).expanduser()
    if name == EMBEDDED:
        return _embedded(config, tokenizer, order)
    if path.is_file() and path.suffix not in _DATASET_FILES:
        first, end = _slice(config.split, ("train",), name)
        source = _file(path, config, tokenizer, order)
        return source.sliced(first(len(source)), end(len(source)))
    if not path.exists() and (path.suffix in _FILES or name.startswith(("/", "./", "../", "~"))):
        raise FileNotFoundError(f"dataset_name: there is no file or folder {name!r}")
    if not config.is_tokenized and tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer_name)
    return DatasetSource(f"dataset {name!r}", _load_dataset(name, path, config), config, tokenizer, order)


def token_array(tokens: Any) -> np.ndarray:
    """A tensor, array or list of rows as an array of integers [samples, T]; raises ValueError for anything else."""
    try:
        ids = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asanyarray(tokens)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"tokens must be [samples, T], got no array ({error})") from error
    _check_array("tokens", ids)
    if ids.ndim != 2:
        raise ValueError(f"tokens must be [samples, T], got shape {list(ids.shape)}")
    if 0 in ids.shape:
        raise ValueError(f"tokens must hold at least one sample of one token, got shape {list(ids.shape)}")
    return ids


def _embedded(config: DatasetConfig, tokenizer: Any, order: Order) -> ArraySource:
    from e2e_fast import embedded
    from e2e_fast.embedded import corpus

    first, end = _slice(config.split, corpus.SPLITS, EMBEDDED)
    split = config.split.partition("[")[0]
    name = f"the embedded {split} text"
    own_tokenizer = tokenizer is None and config.tokenizer_name in (EMBEDDED, embedded.path())
    if own_tokenizer and config.add_bos in ("auto", "document"):
        source = ArraySource(name, embedded.ids(split)[None], config.n_ctx, order)
    else:
        documents = [document for _, document in corpus.documents(split)]
        tokenizer = load_tokenizer(config.tokenizer_name) if tokenizer is None else tokenizer
        source = _text(name, documents, config, tokenizer, order)
    return source.sliced(first(len(source)), end(len(source)))


def _file(path: Path, config: DatasetConfig, tokenizer: Any, order: Order) -> ArraySource:
    name = str(path)
    if path.stat().st_size == 0:
        raise ValueError(f"dataset_name: {name} is empty")
    if path.suffix == ".npy":
        try:
            ids = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"dataset_name: {name} is no readable array of integers ({error})") from error
        _check_array(name, ids)
        if ids.ndim not in (1, 2):
            raise ValueError(f"dataset_name: {name} must be [samples, T] or [tokens], got shape {list(ids.shape)}")
        return ArraySource(name, ids if ids.ndim == 2 else ids[None], config.n_ctx, order)
    if path.suffix == ".bin":
        dtype = np.dtype(config.token_dtype)
        if path.stat().st_size % dtype.itemsize:
            raise ValueError(f"token_dtype: {name} has {path.stat().st_size} bytes, no whole number of {dtype} ids")
        return ArraySource(name, np.memmap(path, dtype=dtype, mode="r")[None], config.n_ctx, order)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset_name: {name} is no UTF-8 text ({error})") from error
    documents = text.split(config.separator) if config.separator else [text]
    documents = [document.strip("\r\n") for document in documents]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"dataset_name: {name} holds no text")
    tokenizer = load_tokenizer(config.tokenizer_name) if tokenizer is None else tokenizer
    return _text(name, documents, config, tokenizer, order)


def _text(name: str, documents: list[str], config: DatasetConfig, tokenizer: Any, order: Order) -> ArraySource:
    try:
        ids, bos = encode_documents(documents, tokenizer, "document" if config.add_bos == "auto" else config.add_bos)
    except ValueError as error:
        raise ValueError(f"tokenizer_name: cannot tokenise {name}: {error}") from error
    return ArraySource(name, ids[None], config.n_ctx, order, bos)


_FILES = (".txt", ".md", ".npy", ".bin", ".parquet", ".json", ".jsonl", ".csv", ".arrow")
_DATASET_FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


def _load_dataset(name: str, path: Path, config: DatasetConfig) -> Any:
    datasets = require("datasets", f"dataset_name {name!r}", extra="data")
    try:
        if path.is_file():
            kind = _DATASET_FILES[path.suffix]
            return datasets.load_dataset(kind, data_files=str(path), split=config.split, streaming=config.streaming)
        return datasets.load_dataset(
            str(path) if path.exists() else name, split=config.split, streaming=config.streaming
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"dataset_name: there is no dataset {name!r} ({error})") from error
    except ConnectionError as error:
        raise ConnectionError(f"dataset_name: {name!r} is not here and the hub cannot be reached ({error})") from error
    except ValueError as error:
        raise ValueError(f"dataset {name!r}, split {config.split!r}: {error}") from error


def _slice(split: str, known: tuple[str, ...], name: str) -> tuple[Any, Any]:
    """``train[10%:]`` → functions from the number of windows to the first and the end."""
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if match is None or match[1] not in known:
        expected = " or ".join(known)
        raise ValueError(f"split of {name} must be {expected}, or a slice like {known[0]}[:90%], got {split!r}")

    def bound(text: str | None, default: float) -> Any:
        if text is None:
            return lambda n: round(default * n)
        if text.endswith("%"):
            return lambda n: round(int(text[:-1]) / 100 * n)
        return lambda n: min(int(text), n)

    return bound(match[2], 0.0), bound(match[3], 1.0)


def _cut(ids: np.ndarray, width: int) -> np.ndarray:
    """[windows, width], the shorter end dropped."""
    return ids[: len(ids) // width * width].reshape(-1, width)


def _check_array(name: str, ids: np.ndarray) -> None:
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integer token ids, got {ids.dtype}")


def check_ids(name: str, ids: np.ndarray, vocab_size: int | None) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        end = "∞" if vocab_size is None else vocab_size
        raise ValueError(f"token ids in {name} must lie in [0, {end}), the vocabulary, got {low if low < 0 else high}")


def _kind(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"a list of {type(value[0]).__name__}" if len(value) else "an empty list"
    return type(value).__name__
