"""The comparison as a page. Tables are in tables.py.

``table`` comes from ``glue.compare.compare``; ``summaries`` are the models' summaries by regime.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from entropy_masking.commands import figures, pages
from entropy_masking.commands.figures import Line, Row
from entropy_masking.summary import Summary
from glue import tables
from glue.costs import ONLINE
from glue.results import evaluated_on
from glue.tables import Comparison, Estimates, primary

STUDENTS, MAX_STUDENTS = 64, 10_000  # the axis ends between these
EARLY = 0.2  # share of the shortest run that is left out of curves: losses fall there much more than they differ

Summaries = Mapping[str, Sequence[Summary]]


def page(table: Comparison, summaries: Summaries) -> str:
    """The HTML page."""
    how = "scored" if all("zero_shot" in row for row in table["tasks"].values()) else "fine-tuned"
    return pages.render(
        Path(__file__).with_name("page.html"),
        title=f"{len(table['regimes'])} regimes, {how} by the {table['protocol']} protocol",
        table=table,
        primary=primary(table)[0],
        verdict=tables.verdict(table),
        warnings=warnings(summaries),
        tables=tables.all_tables(table),
        differences=differences(table),
        scores=scores(table),
        costs=costs(table),
        break_even=break_even(table),
        curves=curves(table, summaries),
    )


def differences(table: Comparison) -> dict[str, Figure]:
    """The primary score of each regime minus that of the baseline."""
    label, row = primary(table)
    rows = [
        Row(style, name, d["mean"], d["low"], d["high"], f"{tables.difference(d)}, n = {d['n']}")
        for style, name in enumerate(table["regimes"])
        if (d := row[name]["difference"])
    ]
    return {f"{label}, percentage points": figures.intervals(rows, line=0.0)} if rows else {}


def scores(table: Comparison) -> dict[str, Figure]:
    """A figure for each average and task, with a line at the mean of the baseline."""
    rows = table["averages"] | {task: row["scores"] for task, row in table["tasks"].items()}
    constants = {task: row["constant_score"] for task, row in table["tasks"].items()}
    return {
        name: figures.intervals(score_rows(row), row[table["baseline"]]["mean"], constants.get(name))
        for name, row in rows.items()
    }


def score_rows(row: Estimates) -> list[Row]:
    rows = []
    for style, (name, score) in enumerate(row.items()):
        text = f"{score['mean']:z.1f}{tables.interval(score)}, n = {score['n']}"
        text += f" †{score['collapsed']}" if score.get("collapsed") else ""
        rows.append(Row(style, name, score["mean"], score["low"], score["high"], text))
    return rows


def costs(table: Comparison) -> dict[str, Figure]:
    """The primary score against the FLOPs of a student, with and without those of scoring."""
    label, row = primary(table)
    flops = {name: (cost["total_flops"], cost["training_flops"]) for name, cost in table["training"].items() if cost}
    rows = [row for row in score_rows(row) if all(flops.get(row.name, [None]))]
    if not rows:
        return {}
    return {f"{label} by cost": figures.scatter(rows, [flops[row.name] for row in rows], "FLOPs of one student", label)}


def break_even(table: Comparison) -> dict[str, Figure]:
    """FLOPs of a student against the number of students that share the scores. Equal curves are drawn once."""
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
    most = min(MAX_STUDENTS, max([STUDENTS, *(1.5 * students for students in pays)]))
    students = [most ** (step / 60) for step in range(61)]
    drawn = []
    for (once, own), same in names.items():
        name, dashed = "; ".join(name for _, name in same), same[0][1].endswith(ONLINE)
        drawn.append(Line(same[0][0], name, [(n, own + once / n) for n in students], dashed=dashed))
    heading = "FLOPs of a student, by how many share the scores"
    return {heading: figures.lines(drawn, "students", "FLOPs", log=True)} if drawn else {}


def curves(table: Comparison, summaries: Summaries) -> dict[str, Figure]:
    """Curves of the held-out loss by heading, of the runs that logged it; none if their texts differ."""
    histories = {name: [frame for run in runs if len(frame := history(run)) > 1] for name, runs in summaries.items()}
    every = [frame for frames in histories.values() for frame in frames]
    texts = {evaluated_on(run) for runs in summaries.values() for run in runs if len(history(run)) > 1}
    if not every or len(texts) > 1:
        return {}
    lasts = [frame["step"][-1] for frame in every]
    waits = {name: (cost or {}).get("scoring_seconds") or 0.0 for name, cost in table["training"].items()}
    panels = {"at equal steps": "step", "at equal seconds": "seconds"}
    panels |= {"scoring included": "with_scoring"} if any(waits.values()) else {}
    drawn: dict[str, list[Line]] = {panel: [] for panel in panels}
    for style, name in enumerate(table["regimes"]):
        runs = [frame.with_columns(with_scoring=pl.col("seconds") + waits[name]) for frame in histories.get(name, [])]
        runs = [frame.filter(pl.col("step") >= EARLY * min(lasts)) for frame in runs]
        if runs:
            means = pl.concat(runs).group_by("step").agg(pl.len(), pl.exclude("step").mean())
            mean = means.filter(pl.col("len") == len(runs)).sort("step")  # only at steps that all seeds have
            for panel, by in panels.items():
                points, *seeds = [frame.select(by, "eval_loss").rows() for frame in (mean, *runs)]
                drawn[panel].append(Line(style, name, points, faint=seeds if len(seeds) > 1 else ()))
    log = max(lasts) > 3 * min(lasts)
    whose = f": {drawn['at equal steps'][0].name}" if len(drawn["at equal steps"]) == 1 else ""  # there is no legend
    return {
        f"held-out loss {panel}{whose}": figures.lines(lines, "steps" if by == "step" else "seconds", "nats", log=log)
        for (panel, by), lines in zip(panels.items(), drawn.values(), strict=True)
    }


def warnings(summaries: Summaries) -> dict[str, list[str]]:
    """The warnings of pretraining by regime and seed."""
    return {
        f"{name}, seed {summary.seed}": list(summary.warnings)
        for name, own in summaries.items()
        for summary in own
        if summary.warnings
    }


def history(summary: Summary) -> pl.DataFrame:
    """The held-out losses of a run: step, seconds and eval_loss."""
    columns = {"step": pl.Float64, "seconds": pl.Float64, "eval_loss": pl.Float64}
    return pl.DataFrame(summary.history or [], columns, strict=False).drop_nulls()
