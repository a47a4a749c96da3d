"""Token batches for training and evaluation, from text, files of token ids or Hugging Face datasets.

A source is an endless row of *windows* of `n_ctx` token ids: epoch 0 in its order, then epoch 1 in another, and so on.
A global batch is the next ``world_size · batch_size`` windows; rank r gets the r-th run of `batch_size` of them. So the
position of a run is (epoch, windows consumed in it), a resumed run continues with exactly the next batch, and the
ranks together see what one process with the larger batch would see.

Batches are made by a bounded background thread. What it has prepared and nobody has consumed does not count: the
position moves when a batch is handed over.

>>> config = DatasetConfig(dataset_name="embedded", tokenizer_name="embedded", split="heldout", n_ctx=64)
>>> batches = TokenBatches(config, batch_size=4, seed=0)
>>> first = next(iter(batches))
>>> first.shape, first.dtype
(torch.Size([4, 64]), torch.int64)
>>> batches.state_dict()
{'seed': 0, 'epoch': 0, 'index': 4}
>>> rows = torch.arange(12).reshape(6, 2)
>>> [batch.tolist() for batch in TokenBatches(None, batch_size=4, tokens=rows)]
[[[0, 1], [2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11]]]
"""

import json
import queue
import re
import threading
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor

from e2e_fast.optional import require

EMBEDDED = "embedded"
SEPARATOR = "<|endoftext|>"


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


class TokenBatches:
    """An iterable of int64 token batches [batch_size, n_ctx], prefetched, resumable, one part a rank.

    config       where the tokens come from; None when `tokens` is given
    batch_size   windows a batch and rank
    tokenizer    a Hugging Face tokenizer, used in place of `config.tokenizer_name` (text only)
    seed         of the order, unless `config.seed` is set
    rank, world_size   of this process among those that share the data (each reads the whole of a Hugging Face dataset)
    tokens       [samples, T] integers, used in place of what `config` names: consecutive rows, in order, as they are
    shuffle      overrides `config.shuffle`; with `tokens` the default is False
    repeat       whether to go on with the next epoch, for ever; default: yes, but no with `tokens`
    vocab_size   ids must be below it; None checks only that they are not negative
    prefetch     batches prepared ahead
    pin_memory   default: where CUDA is present

    Without `repeat` the last batch may be shorter; with several ranks it is dropped, so that all take as many steps.
    Iterating again goes on from the present position: after the last consumed batch or, at the end, with the next
    epoch. Only one iteration is alive at a time; `close`, leaving a ``with``, or dropping the iterator ends its thread.

    Raises FileNotFoundError for a missing file or dataset and ValueError for content that does not fit, naming the key;
    what only shows while reading is raised from the loop.
    """

    def __init__(
        self,
        config: DatasetConfig | None,
        batch_size: int,
        *,
        tokenizer: Any = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        tokens: Any = None,
        shuffle: bool | None = None,
        repeat: bool | None = None,
        vocab_size: int | None = None,
        prefetch: int = 4,
        pin_memory: bool | None = None,
    ) -> None:
        if config is None and tokens is None:
            raise ValueError("TokenBatches needs a config or tokens, got neither")
        for name, value in (("batch_size", batch_size), ("world_size", world_size), ("prefetch", prefetch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        if config is not None and config.seed is not None:
            seed = config.seed
        if shuffle is None:
            shuffle = tokens is None and config is not None and config.shuffle

        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.repeat = tokens is None if repeat is None else repeat
        self._source: _Source
        if tokens is not None:
            ids = token_array(tokens)
            self._source = _Array("tokens", ids, ids.shape[1], _Order(seed, shuffle))
        else:
            assert config is not None
            self._source = open_source(config, tokenizer, _Order(seed, shuffle))
        self._vocab_size, self._prefetch, self._pin_memory = vocab_size, prefetch, pin_memory
        if isinstance(self._source, _Array) and self._source.in_memory:
            _check_ids(self._source.name, self._source.ids, vocab_size)
        self._position = (0, 0)
        self._running: weakref.ref[Any] | None = None

    @property
    def n_ctx(self) -> int:
        """Tokens in a window."""
        return self._source.n_ctx

    @property
    def n_windows(self) -> int | None:
        """Windows in an epoch, over all ranks; None for a Hugging Face dataset, where only reading it tells."""
        return len(self._source) if isinstance(self._source, _Array) else None

    def __iter__(self) -> Iterator[Tensor]:
        self.close()
        iteration = self._iterate()
        self._running = weakref.ref(iteration)
        return iteration

    def _iterate(self) -> Iterator[Tensor]:
        for batch, position in _prefetched(self._batches(*self._position), self._prefetch):
            self._position = position
            if batch is not None:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Position after the last consumed batch: `epoch`, `index` (windows consumed in it, over all ranks), `seed`."""
        return {"seed": self.seed, "epoch": self._position[0], "index": self._position[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there, ending an iteration under way. Raises ValueError for other keys or another seed's state."""
        if set(state) != {"seed", "epoch", "index"}:
            raise ValueError(f"a data state has the keys seed, epoch and index, got {sorted(state)}")
        if state["seed"] != self.seed:
            raise ValueError(f"the data state was saved with seed {state['seed']}, this run has seed {self.seed}")
        self.close()
        self._position = (int(state["epoch"]), int(state["index"]))

    def close(self) -> None:
        """End the iteration under way, if any, and its thread."""
        iteration = self._running() if self._running else None
        if iteration is not None:
            iteration.close()
        self._running = None

    def __enter__(self) -> "TokenBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batches(self, epoch: int, index: int) -> Iterator[tuple[Tensor | None, tuple[int, int]]]:
        """This rank's batches from a position on, each with the position after it (the last entry has no batch)."""
        source, wanted = self._source, self.batch_size * self.world_size
        pin_memory = torch.cuda.is_available() if self._pin_memory is None else self._pin_memory

        def mine(items: list[Any]) -> Tensor:
            ids = source.stack(items[self.rank * self.batch_size : (self.rank + 1) * self.batch_size])
            _check_ids(source.name, ids, self._vocab_size)
            batch = torch.from_numpy(ids)
            return batch.pin_memory() if pin_memory else batch

        items: list[Any] = []
        while True:
            seen = index
            for item in source.items(epoch, index):
                items.append(item)
                seen += 1
                if len(items) == wanted:
                    yield mine(items), (epoch, seen)
                    items = []
            if seen == 0:
                raise ValueError(f"n_ctx: {source.name} holds no window of {source.n_ctx} tokens")
            epoch, index = epoch + 1, 0
            if not self.repeat:
                yield mine(items) if items and self.world_size == 1 else None, (epoch, 0)
                return


# ---------------------------------------------------------------------------------------------------------- sources


class _Source(Protocol):
    """Windows, epoch by epoch. An item stands for one window; only those that a rank keeps are turned into ids."""

    name: str
    n_ctx: int

    def items(self, epoch: int, start: int) -> Iterator[Any]: ...

    def stack(self, items: list[Any]) -> np.ndarray: ...


class _Order:
    """Which window comes when: a permutation an epoch, or the order of the file."""

    def __init__(self, seed: int, shuffle: bool) -> None:
        self.seed, self.shuffle = seed, shuffle

    def __call__(self, n: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)


class _Array:
    """Windows of an integer array [rows, T], perhaps memory-mapped: ``T // n_ctx`` a row."""

    def __init__(self, name: str, ids: np.ndarray, n_ctx: int, order: _Order, bos: int | None = None) -> None:
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

    def sliced(self, first: int, end: int) -> "_Array":
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


class _Dataset:
    """Windows of a Hugging Face dataset, as they are read. Resuming reads again from the epoch's start and discards:
    slower than the dataset's own state, which forgets what its shuffle buffer holds in many versions."""

    def __init__(self, name: str, dataset: Any, config: DatasetConfig, tokenizer: Any, order: _Order) -> None:
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


def open_source(config: DatasetConfig, tokenizer: Any, order: _Order) -> _Source:
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
    return _Dataset(f"dataset {name!r}", _load_dataset(name, path, config), config, tokenizer, order)


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


def _embedded(config: DatasetConfig, tokenizer: Any, order: _Order) -> _Array:
    from e2e_fast import embedded
    from e2e_fast.embedded import corpus

    first, end = _slice(config.split, corpus.SPLITS, EMBEDDED)
    split = config.split.partition("[")[0]
    name = f"the embedded {split} text"
    own_tokenizer = tokenizer is None and config.tokenizer_name in (EMBEDDED, embedded.path())
    if own_tokenizer and config.add_bos in ("auto", "document"):
        source = _Array(name, embedded.ids(split)[None], config.n_ctx, order)
    else:
        documents = [document for _, document in corpus.documents(split)]
        tokenizer = load_tokenizer(config.tokenizer_name) if tokenizer is None else tokenizer
        source = _text(name, documents, config, tokenizer, order)
    return source.sliced(first(len(source)), end(len(source)))


def _file(path: Path, config: DatasetConfig, tokenizer: Any, order: _Order) -> _Array:
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
        return _Array(name, ids if ids.ndim == 2 else ids[None], config.n_ctx, order)
    if path.suffix == ".bin":
        dtype = np.dtype(config.token_dtype)
        if path.stat().st_size % dtype.itemsize:
            raise ValueError(f"token_dtype: {name} has {path.stat().st_size} bytes, no whole number of {dtype} ids")
        return _Array(name, np.memmap(path, dtype=dtype, mode="r")[None], config.n_ctx, order)
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


def _text(name: str, documents: list[str], config: DatasetConfig, tokenizer: Any, order: _Order) -> _Array:
    try:
        ids, bos = encode_documents(documents, tokenizer, "document" if config.add_bos == "auto" else config.add_bos)
    except ValueError as error:
        raise ValueError(f"tokenizer_name: cannot tokenise {name}: {error}") from error
    return _Array(name, ids[None], config.n_ctx, order, bos)


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


def _check_ids(name: str, ids: np.ndarray, vocab_size: int | None) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        end = "∞" if vocab_size is None else vocab_size
        raise ValueError(f"token ids in {name} must lie in [0, {end}), the vocabulary, got {low if low < 0 else high}")


def _kind(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"a list of {type(value[0]).__name__}" if len(value) else "an empty list"
    return type(value).__name__


# -------------------------------------------------------------------------------------------------------- tokenizers


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


# -------------------------------------------------------------------------------------------------------- prefetching


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def _prefetched(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The same items, made by a thread that runs at most `depth` ahead; its exceptions are raised here."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for item in items:
                ready.put(item)
                if stop.is_set():
                    return
            ready.put(_END)
        except BaseException as error:
            ready.put(_Failure(error))

    thread = threading.Thread(target=work, name="e2e_fast data", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        while thread.is_alive():  # it may be waiting for room
            try:
                ready.get_nowait()
            except queue.Empty:
                thread.join(0.01)
