"""What the page of a comparison shows: sections of plots, a table, and the words to read them by. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glue import plots, tables
from glue.costs import ONLINE, number
from glue.results import evaluated_on
from glue.tables import Table, amount

STUDENTS = 64  # for so many, at least, the cost of a student is drawn
MOST_STUDENTS = 10_000
EARLY = 0.2  # of the shortest run: of no curve drawn
PANELS = ("at equal steps", "at equal seconds", "scoring included")


@dataclass(frozen=True)
class Section:
    """``plots``: SVG by heading; ``keys``: names of what is numbered in them."""

    title: str
    text: str
    plots: dict[str, str]
    table: Table | None = None
    keys: Sequence[str] = field(default=())


def sections(table: dict[str, Any], summaries: dict[str, list[dict[str, Any]]]) -> list[Section]:
    """Those that there are numbers for; arguments as of ``glue.page.page``."""
    found = [
        gains(table),
        apart(table),
        scores(table),
        quality_and_cost(table),
        amortised(table),
        training(table, summaries),
    ]
    return [each for each in found if each]


def primary(table: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What regimes are judged by: the average that was asked for, or the first there is, or the first task."""
    found = table["averages"] or {task: row["scores"] for task, row in table["tasks"].items()}
    return next(iter(found.items()))


def verdict(table: dict[str, Any]) -> dict[str, list[str]]:
    """What the intervals of the primary score say: regimes with their difference, by finding."""
    label, row = primary(table)
    baseline = table["baseline"]
    groups: dict[str, list[str]] = {}
    for name in (name for name in table["regimes"] if name != baseline):
        found = row[name]["difference"]
        if found is None:
            kind, text = f"Without a pretraining seed of {baseline}, so not compared", name
        elif found["n"] == 1:
            kind, text = "Anecdotes, of one pretraining seed each", f"{name} {tables.difference(found, 1)}"
        else:
            low, high = (found[end] or 0.0 for end in ("low", "high"))  # of pairs all alike nobody knows
            side = "above" if low > 0 else "below" if high < 0 else "not told apart from"
            kind, text = f"{label} {side} {baseline}", f"{name} {tables.difference(found, 1)}, n = {found['n']}"
        groups.setdefault(kind, []).append(text)
    return groups


def gains(table: dict[str, Any]) -> Section | None:
    label, row = primary(table)
    found = [
        plots.Row(style, name, d["mean"], d["low"], d["high"], f"{tables.difference(d, 1)}, n = {d['n']}")
        for style, name in enumerate(table["regimes"])
        if (d := row[name]["difference"])
    ]
    if not found:
        return None
    text = (
        f"A dot is a regime's {label} minus that of {table['baseline']}: the mean over pairs of the same pretraining "
        "seed, which share initial weights and the order of the data unless the next table says otherwise. The line is "
        "its 95 % interval. One that crosses zero is no evidence for either side; a hollow dot has none: it is one "
        "pair, an anecdote, or pairs that are all alike. A line without an end goes on beyond the plot, as far as its "
        "numbers say."
    )
    return Section("What is gained", text, {label: plots.forest(found)}, tables.difference_table(table))


def apart(table: dict[str, Any]) -> Section | None:
    if all(found == [] for found in table["set_apart"].values()):
        return None
    return Section("What sets them apart", "", {}, tables.apart_table(table))


def scores(table: dict[str, Any]) -> Section:
    compared: dict[str, tuple[dict[str, Any], float | None]] = {n: (row, None) for n, row in table["averages"].items()}
    compared |= {task: (row["scores"], row["constant_score"]) for task, row in table["tasks"].items()}
    drawn = {}
    for label, (row, constant) in compared.items():
        rows = []
        for style, name in enumerate(table["regimes"]):
            cell = row[name]
            collapsed = f" †{cell['collapsed']}" if cell.get("collapsed") else ""
            text = f"{cell['mean']:z.1f}{tables.interval(cell)}, n = {cell['n']}{collapsed}"
            rows.append(plots.Row(style, name, cell["mean"], cell["low"], cell["high"], text))
        drawn[label] = plots.bars(rows, constant)
    text = (
        "Means over pretraining seeds, each with its own 95 % interval. Regimes share initial weights and data, so "
        "these intervals may overlap where the paired difference above is clear. The dashed mark is the best score of "
        "a model that predicts the same for every row; runs that do so are counted behind †."
    )
    return Section("Scores, task by task", text, drawn, tables.score_table(table))


def quality_and_cost(table: dict[str, Any]) -> Section | None:
    if not any(table["training"].values()):
        return None
    label, row = primary(table)
    points = []
    for style, name in enumerate(table["regimes"]):
        bill, cell = table["training"][name], row[name]
        if bill and bill["total_flops"] and bill["training_flops"]:
            text = f"{label} {cell['mean']:z.1f}{tables.interval(cell)}, n = {cell['n']}"
            text += f"; {amount(bill['total_flops'])}FLOPs"
            spread = plots.Row(style, name, cell["mean"], cell["low"], cell["high"], text)
            points.append(plots.Point(spread, bill["total_flops"], bill["training_flops"]))
    drawn = {f"{label} by cost": plots.scatter(points, "FLOPs of one student, log", label, amount)} if points else {}
    text = (
        "Up is better, left is cheaper. A filled dot pays for its training and for all of the scoring that it reads, "
        "as if it were the only student; its hollow twin pays for training alone, as if there were ever so many. "
        "What has nothing above and to the left of it is worth having. The training of the teacher is in neither. "
        "A dot at the left edge costs less than the plot can show."
    )
    return Section("Quality against cost", text, drawn, tables.cost_table(table), table["regimes"])


def amortised(table: dict[str, Any]) -> Section | None:
    """The cost of a student by how many there are."""
    if not table["break_even"]:
        return None
    by_flops = [row for row in table["break_even"] if row["flops"]]
    last = max(STUDENTS, *(1.5 * (row["flops"]["students"] or 0) for row in by_flops), 0)
    steps = [min(last, MOST_STUDENTS) ** (step / 60) for step in range(61)]
    shown = {table["baseline"]} | {row[side] for row in by_flops for side in ("regime", "against")}
    found: dict[tuple[str, ...], plots.Line] = {}
    for style, name in enumerate(table["regimes"]):
        bill = table["training"][name]
        if name not in shown or not bill or not bill["training_flops"]:
            continue
        once, each = bill["scoring_flops"] or 0, bill["training_flops"]
        met = [row["flops"]["students"] or 0 for row in by_flops if row["regime"] == name]
        dots = [(n, each + once / n) for n in met if 1 <= n <= steps[-1]]
        line = plots.Line(style, name, f"{style + 1}", [(n, each + once / n) for n in steps], dots=dots)
        merge(found, (f"{once:.2g}", f"{each:.3g}"), line)
        if once and bill["online_flops"] and bill["tokens"]:
            taught = each + bill["online_flops"] * bill["tokens"]
            points = [(n, taught) for n in steps]
            merge(
                found, (f"{taught:.3g}",), plots.Line(style, f"{name}, {ONLINE}", f"{style + 1}", points, dashed=True)
            )
    heading = "FLOPs of a student, by how many there are"
    drawn = {heading: plots.lines(list(found.values()), "students, log", "FLOPs", "{:g}".format, amount, log=True)}
    text = (
        "A student's training and its share of the scoring, by how many students share that. What reads no scores is "
        "level; what does falls. Dashed: the same regime with its teacher in memory, asked at every batch. From "
        "a dot on, the offline scores are cheaper than that, or than self-masking. Curves that are equal are one. The "
        "table says it in epochs too: a student of many epochs shares with itself."
    )
    drawn = drawn if found else {}
    return Section("When offline scores pay", text, drawn, tables.break_even_table(table), table["regimes"])


def merge(found: dict[tuple[str, ...], plots.Line], key: tuple[str, ...], line: plots.Line) -> None:
    """Add a line, or its label and dots to the one that it would cover."""
    if old := found.get(key):
        label, name = f"{old.label},{line.label}", f"{old.name}; {line.name}"
        line = replace(old, label=label, name=name, dots=[*old.dots, *line.dots])
    found[key] = line


def training(table: dict[str, Any], summaries: dict[str, list[dict[str, Any]]]) -> Section | None:
    """Curves of the held-out loss where it was logged, else of the training loss."""
    histories = {name: [curve for each in found if (curve := history(each))] for name, found in summaries.items()}
    every = [curve for found in histories.values() for curve in found]
    held_out = bool(every) and all(sum("eval_loss" in point for point in curve) > 1 for curve in every)
    held_out &= len({evaluated_on(each) for found in summaries.values() for each in found}) == 1
    loss, label = ("eval_loss", "held-out loss, nats") if held_out else ("loss", "training loss, nats")
    lasts = [curve[-1]["step"] for curve in every if curve]
    first, log = EARLY * min(lasts, default=0), max(lasts, default=0) > 3 * min(lasts, default=0)
    panels: dict[str, list[plots.Line]] = {panel: [] for panel in PANELS}
    for style, name in enumerate(table["regimes"]):
        curves = [[point for point in curve if loss in point] for curve in histories.get(name, [])]
        # the fall of the first steps is the same for all, and would leave no height to what differs
        curves = [[point for point in curve if point["step"] >= first] for curve in curves]
        curves = [curve for curve in curves if len(curve) > 1]
        if not curves:
            continue
        scoring = table["training"][name]["scoring_seconds"] or 0.0
        for panel, by, before in zip(PANELS, ("step", "seconds", "seconds"), (0.0, 0.0, scoring), strict=True):
            each = [[(point[by] + before, point[loss]) for point in curve] for curve in curves]
            mean = [(at + before, value) for at, value in mean_curve(curves, by, loss)]
            panels[panel].append(plots.Line(style, name, str(style + 1), mean, faint=each[1:] and each))
    if not any(bill and bill["scoring_seconds"] for bill in table["training"].values()):
        del panels["scoring included"]
    drawn = {
        f"{label.partition(',')[0]} {panel}": plots.lines(
            found, "steps" if panel == "at equal steps" else "seconds", label, amount, "{:.3g}".format, log=log
        )
        for panel, found in panels.items()
        if found
    }
    if not drawn:
        return None
    text = (
        "Means over pretraining seeds, with each seed drawn faintly; the first fifth of the shortest run is left out. "
    )
    if held_out:
        text += (
            "The loss is on held-out sequences under one random mask, the same for all, and the kind of mask that "
            "random masking trains on: a regime that hides other tokens is away from home here. Seconds are also of "
            "what else the machine did."
        )
    else:
        text += (
            "A regime's loss is on the tokens that it hides itself, some of them harder, and with distillation it is "
            "another loss: the shapes of these curves tell something, their heights do not. For curves that may be "
            "compared train with --eval-strategy steps; the held-out loss at the end is in the table of scores."
        )
    if "scoring included" in panels:
        text += (
            " With scoring included, a regime starts when its scores are there, the seconds of all workers added up."
        )
    return Section("Training curves", text, drawn, keys=table["regimes"])


def history(summary: dict[str, Any]) -> list[dict[str, float]]:
    """The curve of a summary, as far as it is one: nothing of a run that has one step."""
    found = summary.get("history")
    names = ("step", "seconds")
    points = [
        point
        for point in (found if isinstance(found, list) else [])
        if isinstance(point, dict) and all(number(point.get(name)) is not None for name in names)
    ]
    return points if len({point["step"] for point in points}) > 1 else []


def mean_curve(curves: Sequence[Sequence[dict[str, float]]], by: str, loss: str) -> list[tuple[float, float]]:
    """The mean over seeds at the steps that all of them have."""
    at = [{point["step"]: point for point in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(each) for each in at)))
    means = [[statistics.fmean(each[step][name] for each in at) for name in (by, loss)] for step in shared]
    return [(place, value) for place, value in means]
