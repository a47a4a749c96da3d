"""Pictures of trained SAEs.

>>> import tempfile
>>> points = {"local": [(40.0, 0.10), (14.0, 0.27)], "e2e": [(20.0, 0.09)]}
>>> path = pareto(points, Path(tempfile.mkdtemp()) / "pareto.png")
>>> path.stat().st_size > 1000
True
"""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from e2e_fast.compare.plot import cosine_edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"local": "#4c72b0", "e2e": "#c44e52", "e2e+downstream": "#55a868"}
"""One colour a kind of training, in every picture."""
OTHERS = ("#8172b3", "#ccb974", "#64b5cd", "#937860", "#da8bc3")
"""For kinds beyond those, in the order in which they come."""
_INK = "#010203"
"""Drawn by matplotlib where the page's own text colour is meant, light or dark."""


def colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for each kind."""
    others = [kind for kind in dict.fromkeys(kinds) if kind not in COLOURS]
    return COLOURS | {kind: OTHERS[i % len(OTHERS)] for i, kind in enumerate(others)}


def pareto(points: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str = "") -> Path:
    """CE increase (nats/token) against L0, one line a kind of training, as in the paper's Figure 1; writes a PNG.

    points: kind → [(L0, CE increase), …].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw_pareto(axes, points)
    if title:
        axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_pareto(
    axes: "Axes",
    points: Mapping[str, Sequence[tuple[float, float]]],
    labels: Mapping[tuple[float, float], str] | None = None,
) -> None:
    """The picture of `pareto`; ``labels`` are written beside the points."""
    colour = colours(list(points))
    for kind, pairs in points.items():
        l0, increase = zip(*sorted(pairs), strict=True)
        axes.plot(l0, increase, "o-", label=kind, color=colour[kind], linewidth=1.5, markersize=5)
    for i, (point, label) in enumerate(sorted((labels or {}).items())):
        # Alternately above and below: runs that differ in their seed alone lie close to one another.
        axes.annotate(label, point, xytext=(4, 5 if i % 2 == 0 else -11), textcoords="offset points", fontsize=9)
    axes.set_xlabel("L0: active features per token (fewer is better)")
    axes.set_ylabel("CE loss increase, nats/token (less is better)")
    # Noise may put a good SAE below zero.
    axes.set_ylim(bottom=min(0.0, *(increase for pairs in points.values() for _, increase in pairs)))
    axes.set_xlim(left=0)
    _plain(axes)
    axes.legend(frameon=False)


def draw_curves(
    axes: "Axes", curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], ylabel: str, *, log: bool = False
) -> None:
    """Lines over the sequences seen; curves: (label, kind, [(sequences, value), …]). ``log``: of the values."""
    from matplotlib.ticker import LogLocator, NullLocator

    colour = colours([kind for _, kind, _ in curves])
    styles = ("-", "--", ":", "-.")
    drawn: dict[str, int] = {}
    for label, kind, points in curves:
        x, y = zip(*points, strict=True)
        style = styles[drawn.get(kind, 0) % len(styles)]
        drawn[kind] = drawn.get(kind, 0) + 1
        axes.plot(x, y, style, label=label, color=colour[kind], linewidth=1.3, marker="o" if len(x) < 3 else None)
    if log and all(value > 0 for _, _, points in curves for _, value in points):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sequences")
    axes.set_ylabel(ylabel)
    axes.ticklabel_format(axis="x", style="plain")
    axes.locator_params(axis="x", nbins=5)
    _plain(axes)
    axes.legend(frameon=False, fontsize=9, ncols=2, handlelength=2.6, loc="lower left", bbox_to_anchor=(0, 1))


def draw_similarities(
    axes: "Axes",
    similarity: np.ndarray,
    ylabel: str,
    *,
    random: np.ndarray | None = None,
    random_mean: float | None = None,
    colour: str = "#4c72b0",
) -> None:
    """Histogram of cosines as shares; outlined the same of random dictionaries, or dashed its mean alone."""
    bins = cosine_edges(50, similarity, *([] if random is None else [random]))
    axes.hist(similarity, bins=bins, weights=_shares(similarity), histtype="stepfilled", color=colour, alpha=0.85)
    if random is not None:
        axes.hist(random, bins=bins, weights=_shares(random), histtype="step", color=_INK, linewidth=1.2)
    if random_mean is not None:
        axes.axvline(random_mean, color=_INK, linestyle="--", linewidth=1.2)
    axes.set_xlim(bins[0], 1)
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel(ylabel)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.locator_params(axis="y", nbins=4)
    _plain(axes)


def inline_svg(draw: Callable[["Axes"], None], label: str, *, size: tuple[float, float] = (4.6, 3.2)) -> str:
    """What ``draw`` puts on axes as an ``<svg>`` element for a page: no ids in common with others, nothing to load.

    Text is text, in the page's colour; it scales with the page. ``label`` is read out in its place. size: inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style: Any = dict.fromkeys(ink, _INK) | {"svg.fonttype": "none", "svg.hashsalt": label}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-label="{html.escape(label)}">', svg, count=1)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # speaks of the whole page
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    return re.sub(r"(\d\.\d\d)\d+", r"\1", re.sub(r"\s+", " ", svg)).strip()


def _shares(values: np.ndarray) -> np.ndarray:
    return np.full(len(values), 1 / len(values))


def _plain(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
