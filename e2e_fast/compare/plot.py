"""One picture of a matching: matched similarities, each row's best, and the null.

>>> import torch
>>> from e2e_fast.compare import match_dictionaries
>>> figure = plot_matching(match_dictionaries(torch.randn(30, 8), torch.randn(30, 8)))
>>> figure.axes[0].get_xlabel()
'cosine similarity'
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from e2e_fast.compare.matching import Matching, match_dictionaries

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def random_matching(m: Matching, *, seed: int = 0, threads: int | None = None) -> Matching:
    """The matching of two dictionaries of random directions with as many features as took part in m: the null."""
    n_rows, n_cols, d = m.shape
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n_rows - len(m.left_out_rows), d, generator=generator)
    B = torch.randn(n_cols - len(m.left_out_cols), d, generator=generator)
    return match_dictionaries(A, B, threads=threads)


def cosine_edges(bins: int, *samples: np.ndarray) -> list[float]:
    """Edges of equal bins from 0 to 1, or as far as the samples go: equal rows' cosines exceed 1 by rounding.

    >>> cosine_edges(2, np.array([0.3, 1.0000000000000002]))[::2]
    [0.0, 1.0000000000000002]
    """
    ends = np.concatenate([[0.0, 1.0], *samples])
    return np.linspace(ends.min(), ends.max(), bins + 1).tolist()


def plot_matching(m: Matching, null: Matching | None = None) -> "Figure":
    """Histograms of the matched similarities, of each row's best with replacement, and of `null` (`random_matching`).

    Without `null` its expected mean alone is drawn. Uses no display: save the figure with ``.savefig(path)``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    row_best = m.row_best_similarity[~np.isnan(m.row_best_similarity)]
    bins = cosine_edges(80, m.similarity, row_best, *([] if null is None else [null.similarity]))
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(m.similarity, bins=bins, color="#3b6ea5", label=f"matched one to one (mean {m.mean:.3f})")
    axes.hist(
        row_best, bins=bins, histtype="step", color="#d07a1f", linewidth=1.6,
        label=f"best of each row, with replacement (mean {row_best.mean():.3f})",
    )  # fmt: skip
    if null is not None:
        axes.hist(
            null.similarity, bins=bins, histtype="step", color="0.35", linestyle="--", linewidth=1.4,
            label=f"random dictionaries, matched (mean {null.mean:.3f})",
        )  # fmt: skip
    elif not np.isnan(m.null_mean):
        axes.axvline(m.null_mean, color="0.35", linestyle="--", label=f"random dictionaries' mean ({m.null_mean:.3f})")
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("pairs")
    proof = "optimal, proven" if m.certified else f"within {m.gap:.3g} of the optimum"
    axes.set_title(f"{len(m.rows):,} pairs of {m.shape[0]:,} × {m.shape[1]:,} features: {proof}", fontsize=11)
    # Room above the bars, so that the legend covers none.
    axes.set_ylim(0, axes.get_ylim()[1] * 1.28)
    axes.legend(frameon=False, fontsize=9, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
