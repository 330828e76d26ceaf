"""The comparison as one picture."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

INK, BASELINE, CONSTANT = "#0072B2", "#999999", "#D55E00"


def draw(table: dict[str, Any]) -> bytes:
    """PNG of the scores: a panel for each average and task, a row for each regime, with 95 % intervals.

    A hollow dot has no interval: it is of one pretraining seed, or all seeds are alike. Marked in each panel are the
    baseline's mean and, where it is in sight, the score of a model that predicts the same for every row.

    Args:
        table: of ``glue.compare.compare``.
    """
    panels = table["averages"] | {name: row["scores"] for name, row in table["tasks"].items()}
    regimes = table["regimes"]
    rows = range(len(regimes))
    size = (1.7 + 1.5 * len(panels), 1.1 + 0.3 * len(regimes))
    figure, every = pyplot.subplots(1, len(panels), figsize=size, dpi=150, sharey=True, squeeze=False)
    for axes, (name, scores) in zip(every[0], panels.items(), strict=True):
        found = [scores[regime] for regime in regimes]
        for row, score in zip(rows, found, strict=True):
            if score["high"] is not None:
                axes.plot([score["low"], score["high"]], [row, row], color=INK, linewidth=1.5, solid_capstyle="butt")
            face = INK if score["high"] is not None else "white"
            axes.plot(score["mean"], row, "o", color=INK, markerfacecolor=face, markersize=4, zorder=4)
            axes.annotate(
                f"{score['mean']:.1f}",
                (score["mean"], row),
                xytext=(0, 4.5),
                textcoords="offset points",
                ha="center",
                fontsize=6,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )
        axes.axvline(scores[table["baseline"]]["mean"], color=BASELINE, linewidth=0.8, zorder=0)
        # an interval of two seeds is wider than all scores: the dots decide what is seen
        means = [score["mean"] for score in found]
        middle, half = (max(means) + min(means)) / 2, max(2.0, 1.2 * (max(means) - min(means)))
        axes.set_xlim(middle - half, middle + half)
        constant = table["tasks"][name]["constant_score"] if name in table["tasks"] else None
        if constant is not None and abs(constant - middle) < half:
            axes.axvline(constant, color=CONSTANT, linestyle="--", linewidth=0.8, zorder=0)
        axes.set_title(name, fontsize=9, fontweight="bold" if name in table["averages"] else "normal")
        axes.tick_params(labelsize=7, length=2)
        axes.spines[["top", "right", "left"]].set_visible(False)
    counts = [len(table["runs"][regime]) for regime in regimes]
    names = [f"{regime} (n = {count})" for regime, count in zip(regimes, counts, strict=True)]
    every[0, 0].set_yticks(rows, names, fontsize=8)
    every[0, 0].set_ylim(len(regimes) - 0.4, -0.7)
    figure.supxlabel(
        f"score (%), {table['protocol']} protocol\n"
        "bar: 95 % interval over n pretraining seeds; hollow: one seed, or all alike; "
        f"grey: {table['baseline']}; dashed: the same answer to every row",
        fontsize=7,
    )
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
