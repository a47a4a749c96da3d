"""Pictures of trained SAEs.

>>> import tempfile
>>> points = {"local": [(40.0, 0.10), (14.0, 0.27)], "e2e": [(20.0, 0.09)]}
>>> path = pareto(points, Path(tempfile.mkdtemp()) / "pareto.png")
>>> path.stat().st_size > 1000
True
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = {"local": "#4c72b0", "e2e": "#c44e52", "e2e+downstream": "#55a868"}
"""One colour a kind of training, in every picture."""


def pareto(points: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str = "") -> Path:
    """CE increase (nats/token) against L0, one line a kind of training, as in the paper's Figure 1; writes a PNG.

    points: kind → [(L0, CE increase), …].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, pairs in points.items():
        l0, increase = zip(*sorted(pairs), strict=True)
        axes.plot(l0, increase, "o-", label=kind, color=COLOURS.get(kind), linewidth=1.5, markersize=5)
    axes.set_xlabel("L0: active features per token (fewer is better)")
    axes.set_ylabel("CE loss increase, nats/token (less is better)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
