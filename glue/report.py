"""The comparison as a page and as one picture: what is drawn, and what the intervals say. Tables are glue/tables.py's.

``table`` is that of ``glue.compare.compare``; ``summaries`` are the runs' own, by regime.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from entropy_masking.commands import figures, pages
from entropy_masking.commands.figures import Line, Panel, Row
from glue import tables
from glue.costs import ONLINE, number
from glue.results import evaluated_on

STUDENTS, MOST_STUDENTS = 64, 10_000  # the cost of a student is drawn for so many at least, and at most
EARLY = 0.2  # share of the shortest run that no curve shows: its fall is the same for all, and dwarfs what differs
PANELS = {"at equal steps": "step", "at equal seconds": "seconds", "scoring included": "seconds"}

Table = dict[str, Any]
Summaries = Mapping[str, Sequence[dict[str, Any]]]
Curve = Sequence[dict[str, float]]


def page(table: Table, summaries: Summaries) -> str:
    """The HTML page."""
    how = "scored" if all("zero_shot" in row for row in table["tasks"].values()) else "fine-tuned"
    held_out, drawn = curves(table, summaries)
    return pages.render(
        Path(__file__).with_name("page.html"),
        title=f"{len(table['regimes'])} regimes, {how} by the {table['protocol']} protocol",
        verdict=verdict(table),
        primary=primary(table)[0],
        baseline=table["baseline"],
        tables=tables.all_tables(table),
        differences=differences(table),
        scores={panel.title: figures.intervals([panel]) for panel in scores(table)},
        costs=costs(table),
        break_even=break_even(table),
        held_out=held_out,
        curves=drawn,
        runs={name: [run["directory"] for run in runs] for name, runs in table["runs"].items()},
    )


def chart(table: Table) -> bytes:
    """PNG of the scores of all averages and tasks."""
    caption = (
        f"Score (%), {table['protocol']} protocol. Bar: 95 % interval over n pretraining seeds; hollow: no interval; "
        f"line: {table['baseline']}; dashed: the same answer to every row."
    )
    return figures.png(figures.intervals(scores(table), caption))


def primary(table: Table) -> tuple[str, dict[str, Any]]:
    """What regimes are judged by: the average that was asked for, or the first there is, or the first task."""
    rows = table["averages"] or {task: row["scores"] for task, row in table["tasks"].items()}
    return next(iter(rows.items()))


def verdict(table: Table) -> dict[str, list[str]]:
    """What the intervals of the primary score say: regimes with their difference, by conclusion."""
    label, row = primary(table)
    baseline, groups = table["baseline"], dict[str, list[str]]()
    for name in table["regimes"]:
        estimate = row[name]["difference"]
        if name == baseline:
            continue
        if estimate is None:
            kind, text = f"Without a pretraining seed of {baseline}, so not compared", name
        elif estimate["n"] == 1:
            kind, text = "Anecdotes, of one pretraining seed each", f"{name} {tables.difference(estimate)}"
        else:
            low, high = estimate["low"] or 0.0, estimate["high"] or 0.0  # pairs that are all alike have no interval
            side = "above" if low > 0 else "below" if high < 0 else "not told apart from"
            kind, text = f"{label} {side} {baseline}", f"{name} {tables.difference(estimate)}, n = {estimate['n']}"
        groups.setdefault(kind, []).append(text)
    return groups


def differences(table: Table) -> dict[str, Figure]:
    """The differences of the primary score to the baseline."""
    label, row = primary(table)
    rows = [
        Row(style, name, d["mean"], d["low"], d["high"], f"{tables.difference(d)}, n = {d['n']}")
        for style, name in enumerate(table["regimes"])
        if (d := row[name]["difference"])
    ]
    return {label: figures.intervals([Panel(label, rows, line=0.0)])} if rows else {}


def scores(table: Table) -> list[Panel]:
    """A panel for each average and task, about the mean of the baseline."""
    constants = {name: row["constant_score"] for name, row in table["tasks"].items()}
    estimates = table["averages"] | {name: row["scores"] for name, row in table["tasks"].items()}
    return [
        Panel(label, score_rows(table, row), row[table["baseline"]]["mean"], constants.get(label))
        for label, row in estimates.items()
    ]


def score_rows(table: Table, row: dict[str, Any]) -> list[Row]:
    rows = []
    for style, name in enumerate(table["regimes"]):
        score = row[name]
        text = f"{score['mean']:z.1f}{tables.interval(score)}, n = {score['n']}"
        text += f" †{score['collapsed']}" if score.get("collapsed") else ""
        rows.append(Row(style, name, score["mean"], score["low"], score["high"], text))
    return rows


def costs(table: Table) -> dict[str, Figure]:
    """The primary score by the FLOPs of a student, with and without those of scoring."""
    label, row = primary(table)
    known = {name: cost for name, cost in table["training"].items() if cost}
    flops = {name: (cost["total_flops"], cost["training_flops"]) for name, cost in known.items()}
    rows = [row for row in score_rows(table, row) if all(flops.get(row.name, [None]))]
    if not rows:
        return {}
    drawn = figures.scatter(rows, [flops[row.name] for row in rows], "FLOPs of one student", label)
    return {f"{label} by cost": drawn}


def break_even(table: Table) -> dict[str, Figure]:
    """FLOPs of a student by how many students share the scores; of equal curves one, with all names."""
    pays = [row for row in table["break_even"] if row["flops"]]
    last = max([STUDENTS, *(1.5 * (row["flops"]["students"] or 0) for row in pays)])
    students = [min(last, MOST_STUDENTS) ** (step / 60) for step in range(61)]
    shown = {table["baseline"]} | {row[side] for row in pays for side in ("regime", "against")}
    drawn: dict[tuple[str, ...], Line] = {}

    def add(line: Line) -> None:
        key = tuple(f"{y:.3g}" for _, y in line.points)
        same = drawn.get(key, replace(line, name="", dots=()))
        name = ", ".join(filter(None, (same.name, line.name)))
        drawn[key] = replace(same, name=name, dots=[*same.dots, *line.dots])

    for style, name in enumerate(table["regimes"]):
        cost = table["training"][name]
        if name not in shown or not cost or not cost["training_flops"]:
            continue
        once, own = cost["scoring_flops"] or 0, cost["training_flops"]
        starts = [row["flops"]["students"] or 0 for row in pays if row["regime"] == name]
        dots = [(n, own + once / n) for n in starts if 1 <= n <= students[-1]]
        add(Line(style, name, [(n, own + once / n) for n in students], dots=dots))
        if once and cost["online_flops"] and cost["tokens"]:
            taught = own + cost["online_flops"] * cost["tokens"]
            add(Line(style, f"{name}, {ONLINE}", [(n, taught) for n in students], dashed=True))
    heading = "FLOPs of a student, by how many share the scores"
    return {heading: figures.lines(list(drawn.values()), "students", "FLOPs", log=True)} if drawn else {}


def curves(table: Table, summaries: Summaries) -> tuple[bool, dict[str, Figure]]:
    """Whether the curves are of the held-out loss, as they are where all runs logged it on the same text; and them."""
    histories = {name: [curve for run in runs if (curve := history(run))] for name, runs in summaries.items()}
    every = [curve for runs in histories.values() for curve in runs]
    if not every:
        return False, {}
    held_out = all(sum("eval_loss" in point for point in curve) > 1 for curve in every)
    held_out &= len({evaluated_on(run) for runs in summaries.values() for run in runs}) == 1
    loss, label = ("eval_loss", "held-out loss") if held_out else ("loss", "training loss")
    lasts = [curve[-1]["step"] for curve in every]
    panels: dict[str, list[Line]] = {panel: [] for panel in PANELS}
    for style, name in enumerate(table["regimes"]):
        kept = [[p for p in run if loss in p and p["step"] >= EARLY * min(lasts)] for run in histories.get(name, [])]
        kept = [run for run in kept if len(run) > 1]
        for panel, by in PANELS.items() if kept else ():
            before = (table["training"][name]["scoring_seconds"] or 0.0) if panel == "scoring included" else 0.0
            lines = [[(point[by] + before, point[loss]) for point in run] for run in [mean_curve(kept, loss), *kept]]
            panels[panel].append(Line(style, name, lines[0], faint=lines[1:] if len(kept) > 1 else ()))
    if not any(cost and cost["scoring_seconds"] for cost in table["training"].values()):
        del panels["scoring included"]
    log = max(lasts) > 3 * min(lasts)
    drawn = {
        f"{label} {panel}": figures.lines(lines, "steps" if PANELS[panel] == "step" else "seconds", "nats", log=log)
        for panel, lines in panels.items()
        if lines
    }
    return held_out, drawn


def history(summary: dict[str, Any]) -> Curve:
    """The curve of a summary, as far as it is one: nothing of a run that has one step."""
    logged = summary.get("history")
    points = [point for point in logged if isinstance(point, dict)] if isinstance(logged, list) else []
    points = [point for point in points if all(number(point.get(name)) is not None for name in ("step", "seconds"))]
    return points if len({point["step"] for point in points}) > 1 else []


def mean_curve(curves: Sequence[Curve], loss: str) -> Curve:
    """The mean over seeds at the steps that all of them have."""
    by_step = [{point["step"]: point for point in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(points) for points in by_step)))
    names = ("step", "seconds", loss)
    return [{name: statistics.fmean(points[step][name] for points in by_step) for name in names} for step in shared]
