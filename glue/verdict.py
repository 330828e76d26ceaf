"""What a comparison shows, in one sentence, from the intervals of its main score; what its teachers lack. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entropy_masking.shards.spread import hardly_differ
from entropy_masking.summary import Summary

Comparison = dict[str, Any]  # what table.json holds; see glue.compare.compare
Estimates = dict[str, dict[str, Any]]  # of one score, average or loss, by regime; see glue.compare.estimates


def primary(table: Comparison) -> tuple[str, Estimates]:
    """The main score: the first average (a requested one comes first), or else the first task."""
    rows = table["averages"] or {task: row["scores"] for task, row in table["tasks"].items()}
    return next(iter(rows.items()))


def verdict(table: Comparison) -> str:
    """Which regimes are told apart from the baseline, and by how much; empty for one regime."""
    (label, row), baseline = primary(table), table["baseline"]
    apart, alike, alone, lacking = [], [], [], []
    for name in table["set_apart"]:  # all but the baseline
        estimate = row[name]["difference"]
        if estimate is None:
            lacking.append(name)
        elif estimate["n"] == 1:
            alone.append(f"{name} {estimate['mean']:+z.1f}")
        elif estimate["low"] is None and estimate["mean"]:
            apart.append(f"{name} differs from {baseline} by {estimate['mean']:+.1f} percentage points in every seed")
        elif (estimate["low"] or 0) <= 0 <= (estimate["high"] or 0):
            alike.append(name)
        else:
            side = "above" if estimate["mean"] > 0 else "below"
            near, far = sorted((abs(estimate["low"]), abs(estimate["high"])))
            size = f"{abs(estimate['mean']):.1f} [{near:.1f}, {far:.1f}] percentage points"
            apart.append(f"{name} is {size} {side} {baseline} (n = {estimate['n']})")
    parts = apart
    if alike:
        none = len(alike) == len(table["set_apart"]) > 1
        parts.append(f"{'no regime is' if none else f'{_and(alike)} {_is(alike)} not'} told apart from {baseline}")
    if alone:
        parts.append(f"{_and(alone)} percentage points against {baseline}, with one pretraining seed (an anecdote)")
    if lacking:
        parts.append(f"{_and(lacking)} {_is(lacking)} not compared: no pretraining seed in common with {baseline}")
    return f"On {label}, {'; '.join(parts)}." if parts else ""


def weak_teachers(summaries: Mapping[str, Sequence[Summary]], teacher: Summary | None = None) -> list[str]:
    """A sentence for each teacher of these regimes whose entropies hardly differ, and for one that has learned little.

    Args:
        summaries: of the models by regime.
        teacher: the summary of the teacher's own training, if it is known.
    """
    flat: dict[tuple[float, float], list[str]] = {}
    for name, own in summaries.items():
        for low, high in {(shards.entropy_p10, shards.entropy_p90) for run in own if (shards := run.shards)}:
            if low is not None and high is not None and hardly_differ(low, high):
                flat.setdefault((low, high), []).append(name)
    sentences = [
        f"The teacher of {_and(names)} does not tell tokens apart: 80 % of its entropies lie within "
        f"{high - low:.2f} nats ({low:.2f} to {high:.2f})."
        for (low, high), names in flat.items()
    ]
    if teacher and teacher.learned_little:
        losses = f"a held-out loss of {teacher.eval_loss:.2f} nats, and token frequencies alone one of"
        sentences.append(f"The teacher has learned little: it has {losses} {teacher.eval_unigram_loss:.2f}.")
    return sentences


def _and(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
