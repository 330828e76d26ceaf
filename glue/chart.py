"""The comparison as a bar chart."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

# of Okabe and Ito, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def draw(table: dict[str, Any]) -> bytes:
    """PNG of the scores: a group of bars a task and average, a bar a regime, with 95 % intervals where there are any.

    Args:
        table: of ``glue.compare.compare``.
    """
    groups = {name: row["scores"] for name, row in table["tasks"].items()} | table["averages"]
    regimes = table["regimes"]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(groups) * (len(regimes) / 4 + 0.6)), 4), dpi=150)
    width = 0.8 / len(regimes)
    for number, regime in enumerate(regimes):
        places = np.arange(len(groups)) + (number - (len(regimes) - 1) / 2) * width
        means = [row[regime]["mean"] for row in groups.values()]
        count = len(table["runs"][regime])
        highs = [row[regime]["high"] for row in groups.values()]
        halves = [0.0 if high is None else high - mean for mean, high in zip(means, highs, strict=True)]
        colour = COLOURS[number % len(COLOURS)]
        bars = axes.bar(
            places, means, width * 0.92, yerr=halves, label=f"{regime} (n = {count})", color=colour, capsize=2
        )
        axes.bar_label(bars, labels=[f"{mean:.1f}" for mean in means], fontsize=6, padding=2)
    constants = [row["constant_score"] for row in table["tasks"].values()]
    centres = np.arange(len(constants))
    axes.hlines(
        constants, centres - 0.45, centres + 0.45, color="#555555", linestyle="--", linewidth=0.8, label="constant"
    )
    axes.axvline(len(table["tasks"]) - 0.5, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("score (%)")
    axes.set_ylim(*np.clip(axes.get_ylim(), -105, 110))  # of two seeds an interval is wider than all scores
    axes.set_title(f"fine-tuned by the {table['protocol']} protocol", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        ncols=min(5, len(regimes) + 1), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1)
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
