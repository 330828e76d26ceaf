"""The tables of the study that its comparison has not: what was found in one, and the held-out loss by decile. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from glue.intervals import estimate, paired_difference
from glue.tables import difference, score

DECILES = 10


def findings(table: dict[str, Any], average: str) -> str:
    """A row a regime of the comparison: the average, its difference, the held-out loss, the cost. As Markdown.

    Args:
        table: of ``glue.compare.compare``, with ``average``.
    """
    baseline, scores, losses = table["baseline"], table["averages"][average], table["eval_loss"]
    rows = []
    for name in table["regimes"]:
        bill, base = table["training"][name], table["training"][baseline]
        costs = [bill["training_flops"], bill["total_flops"], bill.get("with_teacher_flops", bill["total_flops"])]
        n = scores[name]["n"]
        rows.append(
            [
                name,
                f"{n} (anecdote)" if n == 1 else str(n),
                score(scores[name], digits=1),
                "" if name == baseline else difference(scores[name]["difference"], digits=1),
                score(losses[name], digits=2),
                *(f"{cost / base['training_flops']:.1f}" for cost in costs),
            ]
        )
    costs = ["training FLOPs", "with its scores", "and the reference"]
    return _markdown(["regime", "n", average, f"minus {baseline} [95 %]", "held-out loss", *costs], rows)


def deciles(summaries: dict[str, list[dict[str, Any]]]) -> str:
    """Held-out loss by decile of the reference's entropy: the mean over a regime's students. As Markdown.

    Args:
        summaries: of the students, by regime.
    """
    rows = []
    for name, found in summaries.items():
        loss = estimate([summary["eval_loss"] for summary in found])
        by_decile = np.mean([summary["eval_loss_by_entropy_decile"] for summary in found], axis=0)
        interval = "anecdote" if loss.low is None else f"[{loss.low:.2f}, {loss.high:.2f}]"
        cells = [str(loss.n), f"{loss.mean:.2f}", interval, *(f"{each:.2f}" for each in by_decile)]
        rows.append([name, *cells, f"{found[0]['steps']:,}"])
    columns = ["regime", "n", "loss", "95 % interval", *map(str, range(1, DECILES + 1)), "steps"]
    return _markdown(columns, rows)


def decile_differences(summaries: dict[str, list[dict[str, Any]]], baseline: str) -> str:
    """The held-out loss by decile minus the baseline's, with the interval of a paired t over seeds. As Markdown."""

    def by_seed(name: str, decile: int) -> dict[int, dict[int, float]]:
        return {each["seed"]: {0: each["eval_loss_by_entropy_decile"][decile]} for each in summaries[name]}

    rows = []
    for name in summaries:
        found = [paired_difference(by_seed(name, decile), by_seed(baseline, decile)) for decile in range(DECILES)]
        if name != baseline and found[0]:
            n = found[0].n
            cells = [difference(asdict(each) if each else None, digits=2) for each in found]
            rows.append([name, f"{n} (anecdote)" if n == 1 else str(n), *cells])
    return _markdown([f"minus {baseline}", "n", *map(str, range(1, DECILES + 1))], rows)


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
