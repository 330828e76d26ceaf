#!/usr/bin/env python3
"""Remake the tables of README.md and docs/ from the numbers in docs/results/.

    python bench/results.py
    python bench/results.py runs/study     # first copies the numbers of bench/study.sh to docs/results/study.json

A table follows its marker, such as <!-- table: study-front -->. A row has measures, and a measure has a value for each
trunk. docs/STUDY.md explains the analysis.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from scipy.optimize import brentq
from scipy.special import nctdtr, stdtr, stdtrit

from bench.commands import ROOT, new_parser
from bench.recipes import RECIPES
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.figures import COLOURS, INK, STYLE
from entropy_masking.errors import UsageError
from glue.intervals import Estimate, estimate
from glue.results import read_run
from glue.tables import difference, markdown

DOCS = ROOT / "docs"
MARKER = re.compile(r"(<!-- table: (\S+) -->\n)(?:\|.*(?:\n|$))*")
BASELINE = "random-r30"
FAMILY = ("random-r30-long", "random-r30+kd", "parquet", "parquet+kd", "self", "self+kd")  # corrected together (Holm)
NOISE = "random-r30-again"
CONTRASTS = (
    ("parquet", "self"),
    ("parquet+kd", "random-r30+kd"),
    ("parquet+kd", "parquet"),
    ("parquet+kd", "random-r30-long"),
)
SHARED = (1, 5, 20)  # students that share the reference and its scores
TASKS = {"SST-2": "sst2", "QQP": "qqp", "MNLI": "mnli_matched", "QNLI": "qnli"}
FOUR_TASKS = [f"{task}:{seed}" for task in TASKS.values() for seed in (1, 2, 3)]
LOSSES = {  # heading: the measures whose mean a column shows
    "all tokens": ["loss"],
    "easiest 10 %": ["decile_1"],
    "hardest 10 %": ["decile_10"],
    "hardest 30 %": ["decile_8", "decile_9", "decile_10"],
    "BLiMP": ["blimp"],
}
DECILES = {str(number): [f"decile_{number}"] for number in range(1, 11)}
MINI = {"four tasks": ["glue"], "held-out loss": ["loss"], "BLiMP": ["blimp"]}

Row = Mapping[str, Mapping[str, float]]  # the values of each measure, by trunk
Rows = Mapping[str, Row]


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
        raise UsageError(
            f"{study} has no screen/trunks/*/summary.json; name the OUT of a bench/study.sh that has a trunk"
        )
    rows: dict[str, dict[str, dict[str, float]]] = {}
    tasks: dict[str, dict[str, float]] = {}
    recipes: dict[str, str] = {}
    for directory in sorted(study.glob("screen/branches-*/*/")):
        trunk, name = directory.parent.name.partition("-")[2], directory.name
        row = name.removeprefix("study-")
        if not (directory / "summary.json").exists():
            continue
        if name in RECIPES:
            recipes[row] = RECIPES[name].flags
        measures = measures_of(study / "screen", name, trunk)
        if (tuned := study / f"glue-{trunk}" / name).exists():
            for result in read_run(name, str(tuned)):
                measures[f"{result.task}:{result.seed}"] = result.score
                tasks[result.task] = {"constant": result.constant_score, "rows": result.eval_rows}
        for measure, value in measures.items():
            rows.setdefault(row, {}).setdefault(measure, {})[trunk] = value
    reference = json.loads((study / "reference" / "summary.json").read_text())
    return {
        "recipes": recipes,
        "reference": {"loss": reference["eval_loss"], "training_flops": reference["training_flops"]},
        "trunk_flops": statistics.fmean(json.loads(path.read_text())["training_flops"] for path in trunks),
        "tasks": tasks,
        "rows": rows,
    }


def measures_of(screen: Path, name: str, trunk: str) -> dict[str, float]:
    """What a screen measured of a row's run from one trunk."""
    summary = json.loads((screen / f"branches-{trunk}" / name / "summary.json").read_text())
    values = {"loss": summary["eval_loss"], "training_flops": summary["training_flops"]}
    values["flops"] = summary["training_flops"] + summary["scoring_flops"]
    deciles = enumerate(summary["eval_loss_by_entropy_decile"] or [], 1)
    values |= {f"decile_{number}": loss for number, loss in deciles if loss is not None}
    pairs = screen / f"blimp-{trunk}" / name / "blimp.json"
    return values | ({"blimp": json.loads(pairs.read_text())["score"]} if pairs.exists() else {})


def means(row: Row, measures: Iterable[str]) -> dict[str, float]:
    """The mean of some measures, for the trunks that have them all."""
    values = [row.get(measure, {}) for measure in measures]
    shared = [trunk for trunk in values[0] if all(trunk in own for own in values)]
    return {trunk: statistics.fmean(own[trunk] for own in values) for trunk in shared}


def mean(row: Row, measures: Iterable[str]) -> float | None:
    values = means(row, measures).values()
    return statistics.fmean(values) if values else None


def paired(row: Row, baseline: Row, measures: Iterable[str]) -> Estimate | None:
    """The estimate of ``row - baseline`` by the paired t, over the trunks that both have."""
    own, other = means(row, measures), means(baseline, measures)
    differences = [own[trunk] - other[trunk] for trunk in own if trunk in other]
    return estimate(differences) if differences else None


class Layout:
    """A measure of K rows on N trunks: row effect + trunk effect + noise of one variance.

    Attributes:
        sd: standard deviation of a difference between two rows on one trunk; None if it cannot be estimated.
        degrees: of freedom, (K - 1)(N - 1).
    """

    def __init__(self, rows: Rows, measures: Iterable[str]) -> None:
        values = {name: means(row, measures) for name, row in rows.items()}
        trunks = set.intersection(*map(set, values.values())) if values else set()
        self.values_KN = np.array([[own[trunk] for trunk in sorted(trunks)] for own in values.values()])
        self.names, self.n = list(values), len(trunks)
        self.degrees = (len(values) - 1) * (self.n - 1)
        self.sd = None
        if self.degrees > 0:
            of_trunks_N, of_rows_K1 = self.values_KN.mean(0), self.values_KN.mean(1, keepdims=True)
            noise_KN = self.values_KN - of_trunks_N - of_rows_K1 + self.values_KN.mean()
            self.sd = math.sqrt(2 * np.square(noise_KN).sum() / self.degrees)

    def difference(self, name: str, other: str) -> Estimate:
        """Between two rows, with its 95 % interval."""
        first, second = (self.values_KN[self.names.index(row)].mean() for row in (name, other))
        gain = float(first - second)
        if not self.sd:
            return Estimate(gain, None, None, None, self.n)
        half = float(stdtrit(self.degrees, 0.975)) * self.sd / math.sqrt(self.n)
        return Estimate(gain, self.sd, gain - half, gain + half, self.n)

    def p_value(self, name: str, other: str) -> float:
        """Two-sided, for the hypothesis that two rows are equal; 1 if the noise is unknown."""
        if not self.sd:
            return 1.0
        return float(2 * stdtr(self.degrees, -abs(self.difference(name, other).mean) * math.sqrt(self.n) / self.sd))

    def detectable(self, n: int, level: float, power: float = 0.8) -> float:
        """The true difference that n trunks find at this level with this power, if the noise is the same."""
        degrees = (len(self.names) - 1) * (n - 1)
        limit = float(stdtrit(degrees, 1 - level / 2))
        shift = brentq(lambda shift: 1 - nctdtr(degrees, shift, limit) - power, 0, 1000)
        return float(shift) * (self.sd or math.nan) / math.sqrt(n)


def holm(p_values: Mapping[str, float], comparisons: int) -> dict[str, float]:
    """Correct p-values by Holm's method (1979): the smallest times m comparisons, the next times m - 1, and so on.

    A corrected p-value is at most 1 and at least as large as the one before.
    """
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (comparisons - rank) * p_values[name]))
        corrected[name] = largest
    return corrected


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
        lines.append([name, "" if name == minus else minus, str(len(row["loss"])), *texts])
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
    """The primary endpoint of the rows that are fine-tuned, without the untrained one."""
    rows: Rows = {name: study["rows"].get(name, {}) for name in (BASELINE, NOISE, *FAMILY)}
    return Layout({name: row for name, row in rows.items() if means(row, FOUR_TASKS)}, FOUR_TASKS)


def front_table(study: Mapping[str, Any]) -> str:
    """The primary endpoint, the held-out loss and the cost."""
    rows, layout = study["rows"], four_tasks(study)
    family = [name for name in FAMILY if name in layout.names]
    corrected = holm({name: layout.p_value(name, BASELINE) for name in family}, len(FAMILY))
    lines = []
    for name in ("untrained", BASELINE, *family):
        row, score = rows[name], mean(rows[name], FOUR_TASKS)
        gain = paired(row, rows[BASELINE], FOUR_TASKS) if name == "untrained" else None
        gain = layout.difference(name, BASELINE) if name in family else gain
        loss = paired(row, rows[BASELINE], ["loss"])
        texts = [text(gain, 1), corrected_text(corrected.get(name)), text(loss, 3)]
        if name == BASELINE:
            texts = ["", "", f"{mean(row, ['loss']):.3f}"]
        costs = [f"{cost(study, name, students):.2f}" for students in (SHARED[0], SHARED[-1])]
        lines.append([name, str(layout.n), "" if score is None else f"{score:.1f}", *texts, *costs])
    headings = ["row", "n", "four tasks", f"minus {BASELINE}", "p (Holm)", "held-out loss"]
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
    """The noise, and the differences between some pairs of rows."""
    rows, layout = study["rows"], four_tasks(study)
    pairs = [(NOISE, BASELINE), *CONTRASTS]
    lines = [
        [
            f"{name} − {other}",
            text(layout.difference(name, other), 1),
            text(paired(rows[name], rows[other], ["loss"]), 3),
        ]
        for name, other in pairs
        if name in layout.names and other in layout.names
    ]
    return markdown(["difference", "four tasks", "held-out loss"], lines, words=1) + "\n"


def power_table(study: Mapping[str, Any]) -> str:
    """The smallest differences that some numbers of trunks show with a power of 80 %."""
    layout = four_tasks(study)
    lines = [
        [f"{level_name}", *(f"{layout.detectable(n, level):.1f}" for n in (3, 5, 10))]
        for level_name, level in (("one comparison", 0.05), ("the first of Holm's", 0.05 / len(FAMILY)))
    ]
    return markdown(["four tasks, in points", "3 trunks", "5 trunks", "10 trunks"], lines, words=1) + "\n"


@matplotlib.rc_context(STYLE | {"svg.hashsalt": "study"})
def draw(study: Mapping[str, Any], path: Path) -> None:
    """Draw the gain of each row against its cost: hollow for one student, filled for 20 that share the reference."""
    layout = four_tasks(study)
    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    axes.axhline(0, color=INK, linewidth=1)
    for number, name in enumerate(name for name in FAMILY if name in layout.names):
        gain, colour = layout.difference(name, BASELINE), COLOURS[number]
        # moved by 3 % each, because intervals at one cost would hide each other
        most, least = (cost(study, name, students) * 1.03**number for students in (SHARED[0], SHARED[-1]))
        axes.plot([least, most], [gain.mean] * 2, color=colour, linewidth=1)
        axes.plot([most], [gain.mean], "o", color=colour, markerfacecolor="white")
        if gain.low is not None and gain.high is not None:
            axes.vlines(least, gain.low, gain.high, color=colour)
        axes.plot([least], [gain.mean], "o", color=colour, label=name)
    axes.set(xscale="log", xlabel=f"cost of a student, relative to {BASELINE}", ylabel="gain in points (95 % interval)")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
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
    "study-tasks": lambda: study_table(
        read("study"), {heading: [f"{task}:{seed}" for seed in (1, 2, 3)] for heading, task in TASKS.items()}, 1
    ),
    "study-losses": lambda: study_table(read("study"), LOSSES, 3),
    "study-deciles": lambda: study_table(read("study"), DECILES, 3, intervals=False),
    "study-costs": lambda: cost_table(read("study")),
    "study-flags": lambda: flag_table(read("study")),
}


if __name__ == "__main__":
    console.run(main)
