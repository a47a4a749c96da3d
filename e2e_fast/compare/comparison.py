"""Several dictionaries compared: every two of them matched exactly, and each with itself.

    between   the exact one-to-one matching (`match_dictionaries`), with what surrounds it: nearest neighbours in either
              direction, each labelled; mutual ones; the null of random dictionaries; the certificate
    within    each feature's most similar other feature of its own dictionary (`nearest_others`)

Features that a run recorded as dead are left out. What the numbers mean, and what not: docs/compare.md.

>>> import torch
>>> A = torch.eye(4)
>>> c = compare_dictionaries({"a": A, "b": A[[1, 0, 3, 2]], "c": torch.eye(3)})
>>> [(p.a, p.b, p.matching.mean) for p in c.pairs], c.left_out
([('a', 'b', 1.0)], (LeftOut(a='a', b='c', reason='d = 4 and 3'), LeftOut(a='b', b='c', reason='d = 4 and 3')))
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from e2e_fast.compare.dictionaries import (
    check_rows,
    decoder_and_encoder,
    device_of,
    kept_rows,
    read_dictionary,
    recorded_alive,
)
from e2e_fast.compare.matching import Matching, match_dictionaries
from e2e_fast.compare.nearest import Nearest, nearest_others
from e2e_fast.compare.statistics import mean_differences, null_best_mean
from e2e_fast.formats import layouts
from e2e_fast.kernels.neighbours import thread_count

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Within:
    """A dictionary, seen by itself."""

    name: str
    source: str
    """Where it was read from; its type for what was in memory."""
    n: int
    """Features as given."""
    d: int
    used: int
    """Features that took part."""
    dead: int | None
    """Features left out because they are not alive; None where nothing says which are."""
    zero: int
    """Alive features left out because their row is zero."""
    nearest: Nearest
    """Each feature's most similar other feature; NaN for those left out."""

    @property
    def similarity(self) -> np.ndarray:
        """(used,) each feature's cosine with its nearest other feature; empty for a single feature."""
        return self.nearest.similarity[~np.isnan(self.nearest.similarity)]

    def summary(self) -> dict[str, Any]:
        """The numbers that tables show, JSON-able; None where a number does not exist."""
        similarity, null = self.similarity, null_best_mean(self.used - 1, self.d)
        quantiles = np.quantile(similarity, QUANTILES).tolist() if len(similarity) else [None] * len(QUANTILES)
        return {
            "name": self.name,
            "source": self.source,
            "n": self.n,
            "d": self.d,
            "used": self.used,
            "dead": self.dead,
            "zero": self.zero,
            "within_mean": float(similarity.mean()) if len(similarity) else None,
            "within_null_mean": None if np.isnan(null) else null,
            "within_quantiles": {str(q): value for q, value in zip(QUANTILES, quantiles, strict=True)},
        }


@dataclass(frozen=True)
class Pair:
    """Two dictionaries, matched: a's features are the rows, b's the columns."""

    a: str
    b: str
    matching: Matching
    encoder: Matching | None = None
    """The matching of the encoders alone; None where it was not asked for or one has no encoder."""

    @property
    def agree(self) -> float | None:
        """Share of the pairs of `matching` that are pairs of `encoder` too; None without it, or without pairs."""
        if self.encoder is None or not len(self.matching.rows):
            return None
        pairs = [set(zip(m.rows.tolist(), m.cols.tolist(), strict=True)) for m in (self.matching, self.encoder)]
        return len(pairs[0] & pairs[1]) / len(pairs[0])

    def summary(self) -> dict[str, Any]:
        """The numbers that tables show, JSON-able: `Matching.summary`, and the encoders' agreement."""
        encoder = None if self.encoder is None else self.encoder.summary()
        return {"a": self.a, "b": self.b, **self.matching.summary(), "agree": self.agree, "encoder": encoder}


class LeftOut(NamedTuple):
    """Two dictionaries that cannot be compared."""

    a: str
    b: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """What `compare_dictionaries` finds."""

    which: str
    """Which similarity: "decoder", "encoder" or "both" (jointly)."""
    dictionaries: tuple[Within, ...]
    pairs: tuple[Pair, ...]
    """Every two dictionaries of equal d, in the order given."""
    left_out: tuple[LeftOut, ...]
    differences: Mapping[tuple[str, str], tuple[float, float, float]]
    """(a, b) → within-mean of a − of b, and a 95 % bootstrap interval over features (`statistics.mean_differences`)."""

    def widths(self, labels: Mapping[str, str] | None = None) -> str:
        """Which dictionaries have which d, in words; ``labels``: name → what to call it."""
        groups: dict[int, list[str]] = {}
        for one in self.dictionaries:
            groups.setdefault(one.d, []).append((labels or {}).get(one.name, one.name))
        return "; ".join(f"{', '.join(group)} (d = {d})" for d, group in groups.items())

    def summary(self) -> dict[str, Any]:
        """All of it as plain data, JSON-able, without the per-feature arrays."""
        differences = (
            {"a": a, "b": b, "difference": difference, "low": low, "high": high}
            for (a, b), (difference, low, high) in self.differences.items()
        )
        return {
            "which": self.which,
            "dictionaries": [dictionary.summary() for dictionary in self.dictionaries],
            "within_differences": list(differences),
            "pairs": [pair.summary() for pair in self.pairs],
            "left_out": [pair._asdict() for pair in self.left_out],
        }


def compare_dictionaries(
    dictionaries: Mapping[str, Any],
    *,
    which: str = "decoder",
    encoder_share: float = 0.5,
    encoders: bool = False,
    alive: Mapping[str, Any] | None = None,
    keep_dead: bool = False,
    threads: int | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Matches every two of the dictionaries of equal d one to one, exactly, and measures each by itself.

    dictionaries: name → what `read_dictionary` takes. which, encoder_share, threads and device are
    `match_dictionaries`'; the dictionaries should come from the same position of the same model, which is not checked.
    encoders: match the encoders too, by themselves, and count the pairs on which the two matchings agree.
    alive: name → boolean mask. A run folder's own record is used where there is none (`recorded_alive`), unless
    ``keep_dead``. Zero rows are always left out. seed: of the bootstrap.

    Raises ValueError as `read_dictionary` and `match_dictionaries` do, with the dictionary's name, and for fewer than
    two dictionaries or for ``alive`` of an unknown name.
    """
    if len(dictionaries) < 2:
        raise ValueError(f"comparing needs at least two dictionaries, got {len(dictionaries)}")
    if encoders and which != "decoder":
        raise ValueError(f"encoders=True compares the decoders' matching with the encoders': which is {which!r}")
    if unknown := set(alive or ()) - set(dictionaries):
        raise ValueError(f"alive names {sorted(unknown)}, which are none of the dictionaries {sorted(dictionaries)}")
    tell, threads = on_progress or (lambda text: None), thread_count(threads)
    rows: dict[str, Tensor] = {}
    encoder_rows: dict[str, Tensor | None] = {}
    masks: dict[str, np.ndarray] = {}
    devices = {name: device_of(source) if device is None else device for name, source in dictionaries.items()}
    within = []
    for name, source in dictionaries.items():
        tell(f"{name}: within")
        with _naming(name):
            x = rows[name] = _checked(source, which, encoder_share)
            if encoders:
                has = decoder_and_encoder(source)[1] is not None
                encoder_rows[name] = _checked(source, "encoder", encoder_share) if has else None
            mask = (alive or {}).get(name)
            if mask is None and not keep_dead:
                mask = _recorded_mask(source, len(x))
            n_alive = len(kept_rows(x, mask, name, zero_rows="keep"))
            used = kept_rows(x, mask, name, threads=threads)
        masks[name] = np.isin(np.arange(len(x)), used)
        nearest = nearest_others(x, alive=masks[name], threads=threads, device=devices[name])
        described = str(source) if isinstance(source, str | Path) else type(source).__name__
        dead = None if mask is None else len(x) - n_alive
        n, d = x.shape
        within.append(Within(name, described, n, d, len(used), dead, n_alive - len(used), nearest))

    pairs, left_out = [], []
    for a, b in itertools.combinations(dictionaries, 2):
        if rows[a].shape[1] != rows[b].shape[1]:
            left_out.append(LeftOut(a, b, f"d = {rows[a].shape[1]} and {rows[b].shape[1]}"))
            continue
        tell(f"{a} × {b}")
        options: dict[str, Any] = {"alive": (masks[a], masks[b]), "threads": threads, "device": devices[a]}
        encoder = None
        if (left := encoder_rows.get(a)) is not None and (right := encoder_rows.get(b)) is not None:
            encoder = match_dictionaries(left, right, **options)
        pairs.append(Pair(a, b, match_dictionaries(rows[a], rows[b], **options), encoder))
    differences: dict[tuple[str, str], tuple[float, float, float]] = {}
    for d in dict.fromkeys(one.d for one in within):
        alike = {one.name: one.similarity for one in within if one.d == d}
        differences |= mean_differences(alike, seed=seed)
    return Comparison(which, tuple(within), tuple(pairs), tuple(left_out), differences)


def default_names(sources: Sequence[str | Path]) -> list[str]:
    """A short name for each path, no two alike: a run's folder or a file's stem, with as much before it as it takes.

    >>> default_names(["out/a/run_1/samples_400.safetensors", "out/b/run_1", "sae_0.pt"])
    ['a/run_1', 'b/run_1', 'sae_0']
    """
    places = [_place(source) for source in sources]

    def shortest(place: tuple[str, ...]) -> str:
        for length in range(1, len(place)):
            if len({other for other in places if other[-length:] == place[-length:]}) == 1:
                return "/".join(place[-length:])
        return "/".join(place)

    names: list[str] = []
    for name in map(shortest, places):
        again = (f"{name} ({i})" for i in itertools.count(2))
        names.append(next(new for new in itertools.chain([name], again) if new not in names))
    return names


def _place(source: str | Path) -> tuple[str, ...]:
    """The parts of a path that may name it: of a run's or a library's weight file the folder counts."""
    path, name = layouts.split_name(source)
    path = path.resolve()
    if path.stem.startswith("samples_") or path.name in layouts.FOLDER_FILES:
        path = path.parent
    last = path.name.removesuffix(path.suffix) if path.suffix in layouts.SUFFIXES else path.name
    return *path.parts[1:-1], f"{last}::{name}" if name else last


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the dictionary's name before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _checked(source: Any, which: str, encoder_share: float) -> Tensor:
    rows = read_dictionary(source, which=which, encoder_share=encoder_share)
    check_rows(rows, "the dictionary")
    return rows


def _recorded_mask(source: Any, n: int) -> np.ndarray | None:
    indices = recorded_alive(source)
    if indices is None:
        return None
    if len(indices) and not (indices.min() >= 0 and indices.max() < n):
        raise ValueError(f"the run's record lists alive features up to {indices.max()}, the dictionary has {n}")
    return np.isin(np.arange(n), indices)
