#!/usr/bin/env python3
"""Remake the tables of docs/ and docs/study.svg from the numbers in docs/results/.

    python bench/results.py                # no other argument is needed
    python bench/results.py runs/study     # first copy the numbers of a study (bench/study.sh) to docs/results/

A table follows its marker, a line such as <!-- table: study-front -->.

A row has measures, and a measure has a value for each trunk.
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

from scipy.optimize import brentq
from scipy.special import nctdtr, stdtr, stdtrit

from bench.commands import ROOT, new_parser
from bench.recipes import RECIPES
from entropy_masking import storage
from entropy_masking.commands import console
from glue.intervals import Estimate, estimate
from glue.tables import difference, markdown

DOCS = ROOT / "docs"
MARKER = re.compile(r"(<!-- table: (\S+) -->\n)(?:\|.*\n)*")
TASKS = {"SST-2": "sst2", "QQP": "qqp", "MNLI": "mnli_matched", "QNLI": "qnli"}
DECILES = {f"{number}": f"decile_{number}" for number in range(1, 11)}  # of the reference's entropy, lowest first
MINI = {"four tasks": "glue", "held-out loss": "loss", "BLiMP": "blimp"}
BASELINE = "random-r30"
CORRECTED = ("random-r30-double", "parquet", "parquet+kd", "self", "self+kd")  # by Holm's method
FRONT = ("untrained", BASELINE, *CORRECTED)
SHARED = (1, 5, 20)  # students that share the reference and its scores
LOSSES = {  # heading: the measures whose mean a column shows
    "all tokens": ["loss"],
    "easiest 10 %": ["decile_1"],
    "hardest 10 %": ["decile_10"],
    "hardest 30 %": ["decile_8", "decile_9", "decile_10"],
    "BLiMP": ["blimp"],
}

Row = Mapping[str, Mapping[str, float]]  # the values of each measure, by trunk
Rows = Mapping[str, Row]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("study", nargs="?", type=Path, help="OUT of bench/study.sh")
    if study := parser.parse_args().study:
        storage.write_json(str(DOCS / "results" / "study.json"), collect(study))
    for path in (*DOCS.glob("*.md"), ROOT / "README.md"):
        text = path.read_text(encoding="utf-8")
        if (remade := remake(text)) != text:
            path.write_text(remade, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


def remake(text: str) -> str:
    """A document with the tables after its markers made anew. Raises KeyError for a marker without a table."""
    return MARKER.sub(lambda found: found[1] + TABLES[found[2]](), text)


def collect(study: Path) -> dict[str, Any]:
    """The numbers of a study: of its screen, its fine-tunings and its costs."""
    screen, tuned, reference, *trunks = (
        json.loads(path.read_text())
        for path in (
            study / "screen" / "table.json",
            study / "comparison" / "table.json",
            study / "reference" / "summary.json",
            *sorted(study.glob("screen/trunks/*/summary.json")),
        )
    )
    rows = screen["rows"]
    for name in tuned["regimes"]:
        row = rows.setdefault(name, {"loss": tuned["eval_loss"][name]["values"]})
        row |= {task: tuned["tasks"][task]["scores"][name]["values"] for task in TASKS.values()}
        row["glue"] = means(row, TASKS.values())
    return {
        "settings": {name: value for name, value in screen["settings"].items() if not str(value).startswith("/")},
        "recipes": screen["recipes"],
        "reference": {"loss": reference["eval_loss"], "training_flops": reference["training_flops"]},
        "trunk_flops": statistics.fmean(trunk["training_flops"] for trunk in trunks),
        "rows": rows,
    }


def means(row: Row, measures: Iterable[str]) -> dict[str, float]:
    """The mean of some measures by trunk; empty if the row lacks one of them."""
    values = [row.get(measure, {}) for measure in measures]
    shared = [trunk for trunk in values[0] if all(trunk in own for own in values)]
    return {trunk: statistics.fmean(own[trunk] for own in values) for trunk in shared}


def paired(row: Row, baseline: Row, measures: Iterable[str]) -> Estimate | None:
    """The estimate of ``row - baseline`` over the trunks that both have; None without such trunks."""
    own, other = means(row, list(measures)), means(baseline, list(measures))
    differences = [own[trunk] - other[trunk] for trunk in own if trunk in other]
    return estimate(differences) if differences else None


def p_value(own: Estimate) -> float | None:
    """Of the two-sided paired t-test that the mean is 0; None for fewer than two values, or equal ones."""
    if not own.sd:
        return None
    return float(2 * stdtr(own.n - 1, -abs(own.mean) * math.sqrt(own.n) / own.sd))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values corrected for their number (Holm, 1979): the smallest m times, the next m - 1 times, and so on."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return corrected


def detectable(sd: float, n: int, power: float = 0.8) -> float:
    """The true difference that a two-sided paired t-test at 5 % finds with this power.

    Args:
        sd: standard deviation of the n paired differences.
    """
    limit = float(stdtrit(n - 1, 0.975))
    shift = brentq(lambda shift: 1 - nctdtr(n - 1, shift, limit) - power, 0, 100)
    return float(shift) * sd / math.sqrt(n)


def screen_table(rows: Rows) -> str:
    """Losses, BLiMP and FLOPs as Markdown: a baseline's own, and the differences of the others to their baseline."""
    columns = {heading: own for heading, own in LOSSES.items() if any(own[0] in row for row in rows.values())}
    lines = []
    for name, row in rows.items():
        minus = RECIPES[name].baseline
        baseline = rows[minus]
        if name == minus:
            minus, texts = "", [f"{mean(row, own):.3f}" for own in columns.values()]
        else:
            differences = [paired(row, baseline, own) for own in columns.values()]
            texts = [difference(asdict(own), digits=3) if own else "" for own in differences]
        training, scored, base = mean(row, ["training_flops"]), mean(row, ["flops"]), mean(baseline, ["flops"])
        lines.append([name, minus, str(len(row["loss"])), *texts, f"{training / base:.2f}, {scored / base:.2f}"])
    return markdown(["recipe", "baseline", "n", *columns, "FLOPs, with scoring"], lines, words=2) + "\n"


def mean(row: Row, measures: Iterable[str]) -> float:
    return statistics.fmean(means(row, list(measures)).values())


def front_table(study: Mapping[str, Any]) -> str:
    """The primary endpoint, the held-out loss and the cost of the rows that are fine-tuned."""
    rows = {name: study["rows"][name] for name in FRONT if "glue" in study["rows"].get(name, {})}
    gains = {name: paired(row, rows[BASELINE], ["glue"]) for name, row in rows.items() if name != BASELINE}
    seen = {name: p_value(gain) for name, gain in gains.items() if name in CORRECTED and gain}
    corrected = holm({name: p for name, p in seen.items() if p is not None})
    lines = []
    for name, row in rows.items():
        gain = gains.get(name)
        loss = paired(row, rows[BASELINE], ["loss"]) if gain else None
        lines.append(
            [
                name,
                str(len(row["glue"])),
                f"{mean(row, ['glue']):.1f}",
                difference(asdict(gain)) if gain else "",
                f"{corrected[name]:.3f}" if name in corrected else "",
                difference(asdict(loss), digits=3) if loss else f"{mean(row, ['loss']):.3f}",
                *(f"{cost(study, name, students):.2f}" for students in SHARED),
            ]
        )
    gained = [f"minus {BASELINE}", "p (Holm)", "held-out loss"]
    shared = [f"cost, {students} student{'s' * (students > 1)}" for students in SHARED]
    return markdown(["row", "n", "four tasks", *gained, *shared], lines, words=1) + "\n"


def cost(study: Mapping[str, Any], name: str, students: int) -> float:
    """FLOPs of a student, divided by those of the baseline.

    Args:
        students: the number that share the reference and its scores.
    """
    rows, trunk = study["rows"], study["trunk_flops"]
    if name == "untrained":
        return 0.0
    training = mean(rows[name], ["training_flops"])
    scoring = mean(rows[name], ["flops"]) - training
    shared = (scoring + study["reference"]["training_flops"]) / students if scoring else 0.0
    return (trunk + training + shared) / (trunk + mean(rows[BASELINE], ["training_flops"]))


def differences_table(rows: Rows, columns: Mapping[str, str], digits: int, intervals: bool = True) -> str:
    """Some measures of the rows that have them all: the baseline's own, and the differences of the others to it."""
    lines = []
    for name, row in rows.items():
        if not all(measure in row for measure in columns.values()):
            continue
        texts = [f"{mean(row, [measure]):.{digits}f}" for measure in columns.values()]
        if name != BASELINE:
            gains = [paired(row, rows[BASELINE], [measure]) for measure in columns.values()]
            shown = [asdict(gain) | ({} if intervals else {"low": None, "n": 1}) for gain in gains if gain]
            texts = [difference(own, digits) for own in shown]
        lines.append([name, *texts])
    return markdown([f"minus {BASELINE}", *columns], lines, words=1) + "\n"


def flag_table(study: Mapping[str, Any]) -> str:
    """The flags of train/run.py that make each row."""
    lines = [[name, f"`{flags}`"] for name, flags in study["recipes"].items()]
    return markdown(["row", "flags"], lines, words=2) + "\n"


def power_table(study: Mapping[str, Any]) -> str:
    """The smallest differences that some numbers of trunks show, from the spread of those that were seen."""
    rows, lines = study["rows"], []
    for heading, measure, digits in (("four tasks", "glue", 1), ("held-out loss", "loss", 3), ("BLiMP", "blimp", 1)):
        gains = [paired(rows[name], rows[BASELINE], [measure]) for name in CORRECTED if name in rows]
        sds = [gain.sd for gain in gains if gain and gain.sd]
        if not sds:
            continue
        sd = statistics.fmean(own**2 for own in sds) ** 0.5
        noise = paired(rows.get(f"{BASELINE}-again", {}), rows[BASELINE], [measure])
        seen = [f"{detectable(sd, n):.{digits}f}" for n in (3, 5, 10)]
        lines.append([heading, f"{sd:.{digits}f}", *seen, difference(asdict(noise), digits) if noise else ""])
    return markdown(["", "sd", "3 trunks", "5 trunks", "10 trunks", "other noise"], lines, words=1) + "\n"


def read(name: str) -> Any:
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def of_screen(name: str, scratch: bool) -> str:
    """The table of a screen's rows from random weights, or of those from a trunk."""
    return screen_table({row: own for row, own in read(name)["rows"].items() if RECIPES[row].scratch == scratch})


TABLES: dict[str, Callable[[], str]] = {
    "screen-tiny": lambda: of_screen("screen-tiny", scratch=False),
    "screen-tiny-scratch": lambda: of_screen("screen-tiny", scratch=True),
    "screen-mini": lambda: of_screen("screen-mini", scratch=False),
    "mini-front": lambda: differences_table(read("screen-mini")["rows"], MINI, 2),
    "study-front": lambda: front_table(read("study")),
    "study-losses": lambda: screen_table({name: row for name, row in read("study")["rows"].items() if name in RECIPES}),
    "study-deciles": lambda: differences_table(read("study")["rows"], DECILES, 3, intervals=False),
    "study-tasks": lambda: differences_table(read("study")["rows"], TASKS, 1),
    "study-power": lambda: power_table(read("study")),
    "study-flags": lambda: flag_table(read("study")),
}


if __name__ == "__main__":
    console.run(main)
