#!/usr/bin/env python3
"""Remake the tables of README.md and docs/ from the numbers in docs/results/.

    python bench/results.py
    python bench/results.py runs/study     # first copies the numbers of bench/study.sh to docs/results/study.json

A table follows its marker, such as <!-- table: study-front -->. A row has measures, and a measure has a value for each
trunk. docs/STUDY.md explains the analysis.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from bench.analysis import Layout, Rows, holm, mean, means, paired, verdict
from bench.commands import ROOT, new_parser
from bench.recipes import RECIPES
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.figures import COLOURS, INK, STYLE
from entropy_masking.errors import UsageError
from glue.intervals import Estimate
from glue.results import read_run
from glue.tables import difference, markdown

DOCS = ROOT / "docs"
MARKER = re.compile(r"(<!-- table: (\S+) -->\n)(?:\|.*(?:\n|$))*")
BASELINE = "random-r30"
FAMILY = ("random-r30-long", "random-r30+kd", "parquet", "parquet+kd", "self", "self+kd")  # corrected together (Holm)
NOISE = "random-r30-again"
CONTRASTS = (  # exploratory, by question of docs/STUDY.md
    ("parquet+kd", "random-r30+kd"),
    ("self+kd", "random-r30+kd"),
    ("parquet", "self"),
    ("parquet+kd", "parquet"),
    ("self+kd", "self"),
    ("random-r30+kd", "random-r30-long"),
    ("parquet+kd", "random-r30-long"),
)
SHARED = (1, 5, 20)  # students that share the reference and its scores
TASKS = {"SST-2": "sst2", "QQP": "qqp", "MNLI": "mnli_matched", "QNLI": "qnli"}
BY_TASK = {heading: [f"{task}:{seed}" for seed in (1, 2, 3)] for heading, task in TASKS.items()}
FOUR_TASKS = [measure for measures in BY_TASK.values() for measure in measures]
LOSSES = {  # heading: the measures whose mean a column shows
    "all tokens": ["loss"],
    "easiest 10 %": ["decile_1"],
    "hardest 10 %": ["decile_10"],
    "hardest 30 %": ["decile_8", "decile_9", "decile_10"],
    "BLiMP": ["blimp"],
}
EFFECT = 0.05  # of the baseline's score: the gain that the paper reports
DECILES = {str(number): [f"decile_{number}"] for number in range(1, 11)}
MINI = {"four tasks": ["glue"], "held-out loss": ["loss"], "BLiMP": ["blimp"]}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("study", nargs="?", type=Path, help="OUT of bench/study.sh")
    if study := parser.parse_args().study:
        storage.write_json(str(DOCS / "results" / "study.json"), collect(study))
        draw(read("study"), DOCS / "study.svg")
    for path in (*DOCS.glob("*.md"), ROOT / "README.md"):
        text = path.read_text(encoding="utf-8")
        if (remade := remake(text)) != text:
            path.write_text(remade, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


def remake(text: str) -> str:
    """A document with the tables after its markers made anew. Raises KeyError for a marker without a table."""
    return MARKER.sub(lambda found: found[1] + TABLES[found[2]](), text)


def collect(study: Path) -> dict[str, Any]:
    """The numbers of a study as far as it has run. Raises UsageError if it has no trunk."""
    trunks = sorted(study.glob("screen/trunks/*/summary.json"))
    if not trunks:
        raise UsageError(f"{study} has no screen/trunks/*/summary.json; name the OUT of bench/study.sh")
    found, tasks = rows_of(study / "screen"), {}
    for directory in sorted(study.glob("glue-*/*/")):
        row, trunk = found[directory.name.removeprefix("study-")], directory.parent.name.removeprefix("glue-")
        for result in read_run(directory.name, str(directory)):
            row.setdefault(f"{result.task}:{result.seed}", {})[trunk] = result.score
            tasks[result.task] = {"constant": result.constant_score, "rows": result.eval_rows}
    order = ("untrained", BASELINE, NOISE, *FAMILY)
    rows = {name: found[name] for name in (*order, *found) if name in found}
    runs = {path.name for path in study.glob("screen/branches-*/*/")}
    return {
        "recipes": {name.removeprefix("study-"): RECIPES[name].described for name in RECIPES if name in runs},
        "reference": reference_of(study),
        "trunk_flops": statistics.fmean(json.loads(path.read_text())["training_flops"] for path in trunks),
        "tasks": tasks,
        "rows": rows,
        "poor": {"reference": reference_of(study / "poor"), "rows": rows_of(study / "poor" / "screen")},
    }


def reference_of(directory: Path) -> dict[str, float]:
    """The held-out loss and the cost of a finished reference."""
    if not (file := directory / "reference" / "summary.json").exists():
        return {}
    summary = json.loads(file.read_text())
    return {"loss": summary["eval_loss"], "training_flops": summary["training_flops"]}


def rows_of(screen: Path) -> dict[str, dict[str, dict[str, float]]]:
    """The finished runs of a screen."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(screen.glob("branches-*/*/summary.json")):
        name, trunk = path.parent.name, path.parent.parent.name.removeprefix("branches-")
        for measure, value in measures_of(screen, name, trunk).items():
            rows.setdefault(name.removeprefix("study-"), {}).setdefault(measure, {})[trunk] = value
    return rows


def measures_of(screen: Path, name: str, trunk: str) -> dict[str, float]:
    """What a screen measured of a row's run from one trunk."""
    summary = json.loads((screen / f"branches-{trunk}" / name / "summary.json").read_text())
    values = {"loss": summary["eval_loss"], "training_flops": summary["training_flops"]}
    values["flops"] = summary["training_flops"] + summary["scoring_flops"]
    deciles = enumerate(summary["eval_loss_by_entropy_decile"] or [], 1)
    values |= {f"decile_{number}": loss for number, loss in deciles if loss is not None}
    pairs = screen / f"blimp-{trunk}" / name / "blimp.json"
    return values | ({"blimp": json.loads(pairs.read_text())["score"]} if pairs.exists() else {})


def difference_lines(
    rows: Rows, columns: Mapping[str, list[str]], digits: int, baselines: Mapping[str, str], intervals: bool = True
) -> list[list[str]]:
    """Lines of a table: a baseline's own measures, and the other rows' differences to their baseline (paired t)."""
    lines = []
    for name, row in rows.items():
        minus = baselines.get(name, BASELINE)
        if name == minus:
            own = [mean(row, measures) for measures in columns.values()]
            texts = ["" if value is None else f"{value:.{digits}f}" for value in own]
        else:
            gains = [paired(row, rows[minus], measures) for measures in columns.values()]
            texts = [text(gain, digits, intervals) for gain in gains]
        n = len(means(row, next(iter(columns.values()))))
        lines.append([name, "" if name == minus else minus, str(n), *texts])
    return lines


def text(own: Estimate | None, digits: int, interval: bool = True) -> str:
    if own is None:
        return ""
    return difference(asdict(own), digits) if interval else f"{own.mean:+z.{digits}f}"


def screen_table(rows: Rows) -> str:
    """Losses, BLiMP and FLOPs of a screen; each recipe names its baseline."""
    baselines = {name: RECIPES[name].baseline for name in rows}
    columns = {heading: own for heading, own in LOSSES.items() if any(own[0] in row for row in rows.values())}
    lines = difference_lines(rows, columns, 3, baselines)
    for line in lines:
        row, base = rows[line[0]], rows[baselines[line[0]]]
        costs = [mean(row, [measure]) or 0.0 for measure in ("training_flops", "flops")]
        line.append(", ".join(f"{flops / (mean(base, ['flops']) or 1):.2f}" for flops in costs))
    return markdown(["recipe", "baseline", "n", *columns, "FLOPs, with scoring"], lines, words=2) + "\n"


def study_table(study: Mapping[str, Any], columns: Mapping[str, list[str]], digits: int, intervals: bool = True) -> str:
    """Differences to the baseline of the study, or to random masks of 15 % for the paper's recipe."""
    rows = {name: row for name, row in study["rows"].items() if any(own[0] in row for own in columns.values())}
    baselines = {name: "random" for name in rows if name.endswith("-paper")}
    lines = difference_lines(rows, columns, digits, baselines, intervals)
    return markdown(["row", "minus", "n", *columns], lines, words=2) + "\n"


def four_tasks(study: Mapping[str, Any]) -> Layout:
    """The primary endpoint of the rows that are fine-tuned, without the untrained one; empty without the baseline."""
    rows: Rows = {name: study["rows"].get(name, {}) for name in (BASELINE, NOISE, *FAMILY)}
    done = {name: row for name, row in rows.items() if means(row, FOUR_TASKS)}
    return Layout(done if BASELINE in done else {}, FOUR_TASKS)


def front_table(study: Mapping[str, Any]) -> str:
    """The primary endpoint, the held-out loss and the cost."""
    rows, layout = study["rows"], four_tasks(study)
    family = [name for name in FAMILY if name in layout.names]
    corrected = holm({name: layout.p_value(name, BASELINE) for name in family}, len(FAMILY))
    lines = []
    for name in ("untrained", *layout.names):
        if name == NOISE or name not in rows:
            continue
        score = layout.mean(name) if name in layout.names else mean(rows[name], FOUR_TASKS)
        gain = paired(rows[name], rows[BASELINE], FOUR_TASKS) if name == "untrained" else None
        gain = layout.difference(name, BASELINE) if name in family else gain
        loss = text(paired(rows[name], rows[BASELINE], ["loss"]), 3)
        if name == BASELINE:
            loss = f"{mean(rows[name], ['loss']):.3f}"
        found = verdict(gain, corrected[name], EFFECT * layout.mean(BASELINE)) if gain and name in family else ""
        texts = [text(gain, 1), corrected_text(corrected.get(name)), found, loss]
        costs = [f"{cost(study, name, students):.2f}" for students in (SHARED[0], SHARED[-1])]
        lines.append([name, str(gain.n if gain else layout.n), "" if score is None else f"{score:.1f}", *texts, *costs])
    headings = ["row", "n", "four tasks", f"minus {BASELINE}", "p (Holm)", "result", "held-out loss"]
    return markdown([*headings, "cost", f"cost, {SHARED[-1]} students"], lines, words=1) + "\n"


def corrected_text(p_value: float | None) -> str:
    return "" if p_value is None else "≤ 0.001" if p_value <= 0.001 else f"{p_value:.3f}"


def cost(study: Mapping[str, Any], name: str, students: int, reference: bool = True) -> float:
    """FLOPs of a student with its trunk, its scores and the reference, divided by those of the baseline.

    Args:
        students: the number that share the scores and the reference.
        reference: whether the training of the reference counts.
    """
    if name == "untrained":
        return 0.0
    own, base = study["rows"][name], study["rows"][BASELINE]
    training = mean(own, ["training_flops"]) or 0.0
    if scoring := (mean(own, ["flops"]) or 0.0) - training:
        scoring += study["reference"]["training_flops"] if reference else 0.0
    trunk = study["trunk_flops"]
    return (trunk + training + scoring / students) / (trunk + (mean(base, ["training_flops"]) or 0.0))


def cost_table(study: Mapping[str, Any]) -> str:
    """Costs with the scores, and with the reference too, by the number of students that share them."""
    lines = []
    for name in study["rows"]:
        shares = [f"{cost(study, name, students, ref):.2f}" for ref in (False, True) for students in SHARED]
        lines.append([name, f"{cost(study, name, sys.maxsize):.2f}", *shares])
    headings = [f"with {what}, {students}" for what in ("scores", "reference") for students in SHARED]
    return markdown(["row", "training", *headings], lines, words=1) + "\n"


def contrast_table(study: Mapping[str, Any]) -> str:
    """The two checks of the plan, the noise, and the differences between some pairs of rows."""
    rows, layout = study["rows"], four_tasks(study)
    lines = []
    if BASELINE in rows and "untrained" in rows:
        gaps = [paired(rows[BASELINE], rows["untrained"], measures) for measures in (FOUR_TASKS, ["loss"])]
        lines.append([f"{BASELINE} − untrained", text(gaps[0], 1), text(gaps[1], 3)])
    if BASELINE in rows and study["reference"]:
        lines.append(
            [f"reference − {BASELINE}", "", f"{study['reference']['loss'] - mean(rows[BASELINE], ['loss']):+.3f}"]
        )
    for name, other in ((NOISE, BASELINE), *CONTRASTS):
        if {name, other} <= set(layout.names):
            loss = paired(rows[name], rows[other], ["loss"])
            lines.append([f"{name} − {other}", text(layout.difference(name, other), 1), text(loss, 3)])
    return markdown(["difference", "four tasks", "held-out loss"], lines, words=1) + "\n"


def power_table(study: Mapping[str, Any]) -> str:
    """The smallest differences that some numbers of trunks show with a power of 80 %."""
    layout = four_tasks(study)
    if not layout.sd:
        return ""
    lines = [
        [f"{level_name}", *(f"{layout.detectable(n, level):.1f}" for n in (3, 5, 10))]
        for level_name, level in (("one comparison", 0.05), ("the first of Holm's", 0.05 / len(FAMILY)))
    ]
    return markdown(["four tasks, in points", "3 trunks", "5 trunks", "10 trunks"], lines, words=1) + "\n"


@matplotlib.rc_context(STYLE | {"svg.hashsalt": "study"})
def draw(study: Mapping[str, Any], path: Path) -> None:
    """Draw the gain of each row against its cost: hollow for one student, filled for 20 that share the reference.

    Rows of the same cost are moved apart.
    """
    layout = four_tasks(study)
    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    axes.axhline(0, color=INK, linewidth=1)
    drawn: list[float] = []
    for number, name in enumerate(name for name in FAMILY if name in layout.names):
        gain, colour = layout.difference(name, BASELINE), COLOURS[number]
        most, least = (cost(study, name, students) for students in (SHARED[0], SHARED[-1]))
        moved = 1.02 ** sum(abs(least - other) < 0.05 for other in drawn)  # so that no interval hides another
        drawn.append(least)
        most, least = most * moved, least * moved
        axes.plot([least, most], [gain.mean] * 2, color=colour, linewidth=1)
        axes.plot([most], [gain.mean], "o", color=colour, markerfacecolor="white")
        if gain.low is not None and gain.high is not None:
            axes.vlines(least, gain.low, gain.high, color=colour)
        axes.plot([least], [gain.mean], "o", color=colour, label=name)
    axes.set(xscale="log", xlabel=f"cost of a student, relative to {BASELINE} ")
    axes.set_ylabel("gain in points (95 % interval)")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    if drawn:
        axes.figure.legend(loc="outside right upper")
    axes.figure.savefig(path, facecolor="white", metadata={"Date": None})


def flag_table(study: Mapping[str, Any]) -> str:
    """The flags of train/run.py that make each row."""
    lines = [[name, f"`{flags}`"] for name, flags in study["recipes"].items()]
    return markdown(["row", "flags of the branch"], lines, words=2) + "\n"


def read(name: str) -> Any:
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def of_screen(name: str, scratch: bool) -> str:
    """The table of a screen's rows from random weights, or of those from a trunk."""
    return screen_table({row: own for row, own in read(name)["rows"].items() if RECIPES[row].scratch == scratch})


def mini_table() -> str:
    lines = difference_lines(
        {row: own for row, own in read("screen-mini")["rows"].items() if "glue" in own}, MINI, 2, {}
    )
    return markdown([f"minus {BASELINE}", *MINI], [[line[0], *line[3:]] for line in lines], words=1) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "screen-tiny": lambda: of_screen("screen-tiny", scratch=False),
    "screen-tiny-scratch": lambda: of_screen("screen-tiny", scratch=True),
    "screen-mini": lambda: of_screen("screen-mini", scratch=False),
    "mini-front": mini_table,
    "study-front": lambda: front_table(read("study")),
    "study-contrasts": lambda: contrast_table(read("study")),
    "study-power": lambda: power_table(read("study")),
    "study-tasks": lambda: study_table(read("study"), BY_TASK | {"all four": FOUR_TASKS}, 1),
    "study-losses": lambda: study_table(read("study"), LOSSES, 3),
    "study-deciles": lambda: study_table(read("study"), DECILES, 3, intervals=False),
    "study-poor": lambda: screen_table(read("study")["poor"]["rows"]),
    "study-costs": lambda: cost_table(read("study")),
    "study-flags": lambda: flag_table(read("study")),
}


if __name__ == "__main__":
    console.run(main)
