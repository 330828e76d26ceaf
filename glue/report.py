"""The comparison as a page and as one picture: what is drawn, and what the intervals say. Tables are glue/tables.py's.

``table`` is that of ``glue.compare.compare``; ``summaries`` are the runs' own, by regime.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from entropy_masking.commands import figures, pages
from entropy_masking.commands.figures import Line, Panel, Row
from glue import tables
from glue.costs import ONLINE, number
from glue.results import evaluated_on

STUDENTS, MOST_STUDENTS = 64, 10_000  # that are drawn to share scores: so many at least, and at most
EARLY = 0.2  # share of the shortest run that no curve shows: its fall is the same for all, and dwarfs what differs

Table = dict[str, Any]
Summaries = Mapping[str, Sequence[dict[str, Any]]]
Curve = Sequence[dict[str, float]]  # points with step, seconds and losses


def page(table: Table, summaries: Summaries) -> str:
    """The HTML page."""
    how = "scored" if all("zero_shot" in row for row in table["tasks"].values()) else "fine-tuned"
    return pages.render(
        Path(__file__).with_name("page.html"),
        title=f"{len(table['regimes'])} regimes, {how} by the {table['protocol']} protocol",
        table=table,
        primary=primary(table)[0],
        verdict=verdict(table),
        tables=tables.all_tables(table),
        differences=differences(table),
        scores={panel.title: figures.intervals([panel]) for panel in scores(table)},
        costs=costs(table),
        break_even=break_even(table),
        curves=curves(table, summaries),
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
    (label, row), baseline = primary(table), table["baseline"]
    groups: dict[str, list[str]] = {}
    for name in (name for name in table["regimes"] if name != baseline):
        estimate = row[name]["difference"]
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
    panels = [Panel(name, score_rows(row), row[table["baseline"]]["mean"]) for name, row in table["averages"].items()]
    for name, task in table["tasks"].items():
        mean = task["scores"][table["baseline"]]["mean"]
        panels.append(Panel(name, score_rows(task["scores"]), mean, dashed=task["constant_score"]))
    return panels


def score_rows(row: dict[str, Any]) -> list[Row]:
    rows = []
    for style, (name, score) in enumerate(row.items()):
        text = f"{score['mean']:z.1f}{tables.interval(score)}, n = {score['n']}"
        text += f" †{score['collapsed']}" if score.get("collapsed") else ""
        rows.append(Row(style, name, score["mean"], score["low"], score["high"], text))
    return rows


def costs(table: Table) -> dict[str, Figure]:
    """The primary score by the FLOPs of a student, with and without those of scoring."""
    label, row = primary(table)
    flops = {name: (cost["total_flops"], cost["training_flops"]) for name, cost in table["training"].items() if cost}
    rows = [row for row in score_rows(row) if all(flops.get(row.name, [None]))]
    if not rows:
        return {}
    return {f"{label} by cost": figures.scatter(rows, [flops[row.name] for row in rows], "FLOPs of one student", label)}


def break_even(table: Table) -> dict[str, Figure]:
    """FLOPs of a student by how many students share the scores; of equal curves one, with all names."""
    if not table["break_even"]:
        return {}
    names: dict[tuple[float, float], list[tuple[int, str]]] = {}  # by FLOPs of scoring and of each student
    for style, (name, cost) in enumerate(table["training"].items()):
        if cost and cost["training_flops"]:
            once, own = cost["scoring_flops"] or 0, cost["training_flops"]
            names.setdefault((once, own), []).append((style, name))
            if once and cost["online_flops"] and cost["tokens"]:
                taught = own + cost["online_flops"] * cost["tokens"]
                names.setdefault((0, taught), []).append((style, f"{name}, {ONLINE}"))
    pays = [row["flops"]["students"] or 0 for row in table["break_even"] if row["flops"]]
    most = min(MOST_STUDENTS, max([STUDENTS, *(1.5 * students for students in pays)]))
    students = [most ** (step / 60) for step in range(61)]
    drawn = []
    for (once, own), same in names.items():
        name, dashed = "; ".join(name for _, name in same), same[0][1].endswith(ONLINE)
        drawn.append(Line(same[0][0], name, [(n, own + once / n) for n in students], dashed=dashed))
    heading = "FLOPs of a student, by how many share the scores"
    return {heading: figures.lines(drawn, "students", "FLOPs", log=True)} if drawn else {}


def curves(table: Table, summaries: Summaries) -> dict[str, Figure]:
    """Losses by heading: held-out ones, where all runs logged them on the same text, else those of training."""
    histories = {name: [curve for run in runs if (curve := history(run))] for name, runs in summaries.items()}
    every = [curve for runs in histories.values() for curve in runs]
    if not every:
        return {}
    held_out = all(sum("eval_loss" in point for point in curve) > 1 for curve in every)
    held_out &= len({evaluated_on(run) for runs in summaries.values() for run in runs}) == 1
    loss, label = ("eval_loss", "held-out loss") if held_out else ("loss", "training loss")
    lasts = [curve[-1]["step"] for curve in every]
    log = max(lasts) > 3 * min(lasts)
    waits = {name: (cost or {}).get("scoring_seconds") or 0.0 for name, cost in table["training"].items()}
    none = dict.fromkeys(waits, 0.0)
    panels = {"at equal steps": ("step", none), "at equal seconds": ("seconds", none)}
    panels |= {"scoring included": ("seconds", waits)} if any(waits.values()) else {}
    drawn: dict[str, list[Line]] = {panel: [] for panel in panels}
    for style, name in enumerate(table["regimes"]):
        kept = [[p for p in run if loss in p and p["step"] >= EARLY * min(lasts)] for run in histories.get(name, [])]
        if kept := [run for run in kept if len(run) > 1]:
            for panel, (by, before) in panels.items():
                runs = [[(point[by] + before[name], point[loss]) for point in run] for run in kept]
                mean = [(point[by] + before[name], point[loss]) for point in mean_curve(kept, loss)]
                drawn[panel].append(Line(style, name, mean, faint=runs if len(runs) > 1 else ()))
    return {
        f"{label} {panel}": figures.lines(lines, panels[panel][0].replace("step", "steps"), "nats", log)
        for panel, lines in drawn.items()
        if lines
    }


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
