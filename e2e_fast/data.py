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

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from e2e_fast.sources import ArraySource, DatasetConfig, Order, Source, check_ids, open_source, token_array

__all__ = ["DatasetConfig", "TokenBatches"]


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
        self._source: Source
        if tokens is not None:
            ids = token_array(tokens)
            self._source = ArraySource("tokens", ids, ids.shape[1], Order(seed, shuffle))
        else:
            assert config is not None
            self._source = open_source(config, tokenizer, Order(seed, shuffle))
        self._vocab_size, self._prefetch, self._pin_memory = vocab_size, prefetch, pin_memory
        if isinstance(self._source, ArraySource) and self._source.in_memory:
            check_ids(self._source.name, self._source.ids, vocab_size)
        self._position = (0, 0)
        self._running: weakref.ref[Any] | None = None

    @property
    def n_ctx(self) -> int:
        """Tokens in a window."""
        return self._source.n_ctx

    @property
    def n_windows(self) -> int | None:
        """Windows in an epoch, over all ranks; None for a Hugging Face dataset, where only reading it tells."""
        return len(self._source) if isinstance(self._source, ArraySource) else None

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
            check_ids(source.name, ids, self._vocab_size)
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
