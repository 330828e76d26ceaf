"""What a comparison shows, in one sentence, from the intervals of its main score. Pure."""

from collections.abc import Sequence
from typing import Any

Comparison = dict[str, Any]  # what table.json holds; see glue.compare.compare
Estimates = dict[str, dict[str, Any]]  # of one score, average or loss, by regime; see glue.compare.estimates


def primary(table: Comparison) -> tuple[str, Estimates]:
    """The main score: the first average (a requested one comes first), or else the first task."""
    rows = table["averages"] or {task: row["scores"] for task, row in table["tasks"].items()}
    return next(iter(rows.items()))


def verdict(table: Comparison) -> str:
    """Which regimes are told apart from the baseline, and by how much; empty for one regime."""
    (label, row), baseline = primary(table), table["baseline"]
    parts, alike, alone = [], [], []
    for name in table["set_apart"]:  # all but the baseline
        estimate = row[name]["difference"]
        if estimate is None:
            parts.append(f"{name} is not compared: no pretraining seed in common with {baseline}")
        elif estimate["n"] == 1:
            alone.append(f"{name} {estimate['mean']:+z.1f}")
        elif estimate["low"] is None and estimate["mean"]:
            parts.append(f"{name} differs from {baseline} by {estimate['mean']:+.1f} percentage points in every seed")
        elif (estimate["low"] or 0) <= 0 <= (estimate["high"] or 0):
            alike.append(name)
        else:
            side = "above" if estimate["mean"] > 0 else "below"
            near, far = sorted((abs(estimate["low"]), abs(estimate["high"])))
            size = f"{abs(estimate['mean']):.1f} [{near:.1f}, {far:.1f}] percentage points"
            parts.append(f"{name} is {size} {side} {baseline} (n = {estimate['n']})")
    if alike:
        parts.append(f"{_and(alike)} {'is' if len(alike) == 1 else 'are'} not told apart from {baseline}")
    if alone:
        parts.append(f"{_and(alone)} percentage points against {baseline}, with one pretraining seed (an anecdote)")
    return f"On {label}, {'; '.join(parts)}." if parts else ""


def _and(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
