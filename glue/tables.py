"""The comparison as tables: rows of text, for Markdown and the page, and one long CSV. Pure."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from glue.costs import ONLINE
from glue.metrics import AVERAGES

COSTS = {  # heading: name in a regime's bill
    **{"n": "n", "steps": "steps", "tokens": "tokens", "training s": "seconds", "tokens/s": "tokens_per_second"},
    **{"training FLOPs": "training_flops", "scoring s": "scoring_seconds", "scoring FLOPs": "scoring_flops"},
    **{"total FLOPs": "total_flops", "with the teacher's": "with_teacher_flops", "bytes on disk": "bytes"},
}
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


@dataclass(frozen=True)
class Table:
    """A heading, the names of the columns, the rows, and what has to be said of them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    words: bool = False  # rather than numbers


def all_tables(table: dict[str, Any]) -> list[Table]:
    """Those that have something to say: scores, differences, what sets regimes apart, costs, break-even."""
    found = [score_table(table)]
    if len(table["regimes"]) > 1:
        found.append(difference_table(table))
    if any(found != [] for found in table["set_apart"].values()):
        found.append(apart_table(table))
    if any(table["training"].values()):
        found.append(cost_table(table))
    if table["break_even"]:
        found.append(break_even_table(table))
    return found


def rows_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is compared, by label: averages first, tasks, and the held-out loss."""
    found = dict(table["averages"])
    for task, row in table["tasks"].items():
        found[task if row["train_split"] in ("train", "") else f"{task} ({row['train_split']})"] = row["scores"]
    return found | ({"eval loss": table["eval_loss"]} if table["eval_loss"] else {})


def score_table(table: dict[str, Any]) -> Table:
    compared, averages = rows_of(table), table["averages"]
    columns = [table["protocol"], *(f"**{name}**" if name in averages else name for name in compared), "n", "runs"]
    rows = []
    for name in table["regimes"]:
        cells = [score(row[name], digits=3 if label == "eval loss" else 1) for label, row in compared.items()]
        tuned = [row for row in table["tasks"].values() if "zero_shot" not in row]
        own = [row["scores"][name] for row in tuned or table["tasks"].values()]
        counts = sorted({each["n"] * each["fine_tuning_seeds"] for each in own})
        anecdote = " (anecdote)" if own[0]["n"] == 1 else ""
        runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        rows.append([name, *cells, f"{own[0]['n']}{anecdote}", runs])
    constants = [f"{row['constant_score']:.1f}" for row in table["tasks"].values()]
    rows.append(
        [
            "constant",
            *(constant(name, table) for name in averages),
            *constants,
            *[""] * ("eval loss" in compared),
            "",
            "",
        ]
    )
    notes = [
        "Scores in percent: mean ± sample standard deviation over n pretraining seeds, the fine-tuning seeds of each "
        "averaged first. One pretraining seed is an anecdote. runs: fine-tunings of a task.",
        "constant: the score of the best model that predicts the same for every row.",
    ]
    for task, row in table["tasks"].items():
        if how := row.get("zero_shot"):
            first = f"the first {how['limit_pairs']:,} pairs of each phenomenon" if how["limit_pairs"] else "all pairs"
            notes.append(
                f"{task}: of {row['eval_rows']:,} pairs ({first}), those whose good sentence has the higher "
                f"pseudo-log-likelihood ({how['pll']}), without fine-tuning: one run a model. Its constant is chance."
            )
    if "eval loss" in compared:
        notes.append(
            "eval loss: cross-entropy on held-out sequences after pretraining, nats; less is better. Its masks are "
            "random, as random masking trains on, and not the other regimes."
        )
    if any(row["scores"][name]["collapsed"] for row in table["tasks"].values() for name in table["regimes"]):
        notes.append(
            "† In so many runs the model predicts the same for every row; of an average: in so many of its tasks' runs."
        )
    if seen := {name: row for name, row in table["tasks"].items() if row["overlap"]}:
        counts = [f"{name} {row['overlap']:,} of {row['eval_rows']:,}" for name, row in seen.items()]
        notes.append(
            f"Evaluation rows that are training rows too: {', '.join(counts)}. Where many, a score is of memory."
        )
    if table["not_computed"]:
        notes.append(f"Not computed: {'; '.join(table['not_computed'].values())}.")
    return Table("Scores", columns, rows, notes)


def constant(name: str, table: dict[str, Any]) -> str:
    """An average of the tasks' constant scores; none where it is of single metrics."""
    parts = AVERAGES[name]
    return (
        "" if ":" in "".join(parts) else f"{statistics.fmean(table['tasks'][t]['constant_score'] for t in parts):.1f}"
    )


def score(cell: dict[str, Any], digits: int) -> str:
    text = f"{cell['mean']:z.{digits}f}" + (f" ± {cell['sd']:.{digits}f}" if cell["sd"] is not None else "")
    return text + (f" †{cell['collapsed']}" if cell.get("collapsed") else "")


def difference_table(table: dict[str, Any]) -> Table:
    compared, baseline = rows_of(table), table["baseline"]
    rows = []
    for name in table["regimes"]:
        if name != baseline:
            found = [row[name]["difference"] for row in compared.values()]
            digits = [3 if label == "eval loss" else 1 for label in compared]
            cells = [difference(each, of) for each, of in zip(found, digits, strict=True)]
            n = found[0]["n"] if found[0] else 0
            rows.append([name, *cells, f"{n} (anecdote)" if n == 1 else str(n)])
    notes = [
        f"Regime minus {baseline}, with the 95 % interval of a paired t over the n pretraining seeds that both have, "
        "and of the fine-tuning seeds that both have: where one has more, this is not the difference of their scores "
        "above. With one pretraining seed there is no interval: an anecdote. Intervals are not corrected for how many "
        "there are: of twenty differences that are none, one appears to be."
    ]
    return Table(f"Difference to {baseline}", [f"minus {baseline}", *compared, "n"], rows, notes)


def difference(found: dict[str, Any] | None, digits: int) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:+z.{digits}f}{interval(found, f'+z.{digits}f')}"


def interval(found: dict[str, Any], form: str = "z.1f") -> str:
    """What stands behind a mean; nothing behind that of one seed."""
    if found["low"] is None:
        return "" if found["n"] == 1 else " (all alike)"
    return f" [{found['low']:{form}}, {found['high']:{form}}]"


def apart_table(table: dict[str, Any]) -> Table:
    """How each regime was pretrained otherwise than the baseline."""
    unknown = ["not known: not both were pretrained by train/run.py"]
    rows = [
        [name, "; ".join(unknown if found is None else found or ["nothing"])]
        for name, found in table["set_apart"].items()
    ]
    notes = ["As the summaries of the models say; seeds apart. What is not named is the same on both sides."]
    return Table("What sets them apart", ["regime", f"other than in {table['baseline']}"], rows, notes, words=True)


def cost_table(table: dict[str, Any]) -> Table:
    rows, bills = [], [bill for bill in table["training"].values() if bill]
    shown = {heading: key for heading, key in COSTS.items() if any(key in bill for bill in bills)}
    for name, bill in table["training"].items():
        if bill:
            values = [amount(bill.get(key), exact=key in ("n", "steps", "tokens")) for key in shown.values()]
            rows.append([name, str(bill["regime"] or ""), *values])
    notes = [
        "Of one student, a mean over n pretraining seeds. Scoring: all of the shards and targets whose scores it "
        "reads, as if no other student did. total: training and scoring; beside it, where it is known, with the "
        "teacher's own training. Training FLOPs: forward, backward, and the scores of self-masking. Bytes: of the "
        "directories that it was given, whether it reads all of their columns or not. Seconds are also of what else "
        "the machine did; FLOPs are not.",
    ]
    return Table("Cost", ["cost", "regime", *shown], rows, notes)


def break_even_table(table: dict[str, Any]) -> Table:
    columns = ["offline scores pay", "against", "epochs, by FLOPs", "students, by FLOPs", "epochs, by seconds"]
    rows = [
        [
            row["regime"],
            row["against"],
            *(when(row["flops"], name) for name in ("epochs", "students")),
            *(when(row["seconds"], name) for name in ("epochs", "students")),
        ]
        for row in table["break_even"]
    ]
    notes = [
        "From how many epochs of the corpus, or how many students of as many tokens, scoring once costs less than the "
        f"other way. {ONLINE}: a teacher in memory that makes for each batch what this regime reads.",
    ]
    return Table("Break-even", [*columns, "students, by seconds"], rows, notes)


def when(found: dict[str, Any] | None, name: str) -> str:
    if found is None or (found["tokens"] is not None and found[name] is None):
        return "-"
    if found["tokens"] is None:
        return "never"
    return f"{found[name]:.1f}" if name == "epochs" else f"{math.ceil(found[name] - 1e-9):,}"


def amount(value: float | None, exact: bool = False) -> str:
    """A number for people: exact, or to three digits with a prefix."""
    if value is None:
        return "-"
    if exact or value == 0:
        return f"{value:,.0f}"
    value = float(f"{value:.2e}")  # rounded first: 999.9 is 1.00 k
    size = min(max(0, math.floor(math.log10(abs(value)) / 3)), len(PREFIXES) - 1)
    digits = f"{value / 1000**size:#.3g}".rstrip(".")
    return f"{digits} {PREFIXES[size]}".strip()


def to_markdown(table: dict[str, Any]) -> str:
    parts = []
    for each in all_tables(table):
        rule = "---|" if each.words else "---:|"
        lines = [f"| {' | '.join(each.columns)} |", f"|---|{rule * (len(each.columns) - 1)}"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in each.rows]
        parts += [f"### {each.title}", "\n".join(lines), *each.notes]
    return "\n\n".join(parts) + "\n"


CSV_COLUMNS = ("mean", "sd", "low", "high", "n", "fine_tuning_seeds", "fine_tuning_sd")


def to_csv(table: dict[str, Any]) -> str:
    """One line for each regime and task, average or loss: its numbers, and those of the paired difference."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    of_difference = ("mean", "sd", "low", "high", "n")
    writer.writerow(["of", "regime", *CSV_COLUMNS, "collapsed", *(f"difference_{name}" for name in of_difference)])
    for label, row in rows_of(table).items():
        for name in table["regimes"]:
            cell, difference = row[name], row[name]["difference"] or {}
            values = [cell[column] for column in CSV_COLUMNS]
            writer.writerow(
                [label, name, *values, cell.get("collapsed", ""), *(difference.get(each) for each in of_difference)]
            )
    return buffer.getvalue()
