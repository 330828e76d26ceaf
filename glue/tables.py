"""The comparison as text: one sentence, tables for Markdown and the page, and one long CSV. Pure."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_masking.text import inline, single_line
from glue.costs import ONLINE
from glue.metrics import AVERAGES

Comparison = dict[str, Any]  # what table.json holds; see glue.compare.compare
Estimates = dict[str, dict[str, Any]]  # of one score, average or loss, by regime; see glue.compare.estimates

COSTS = {  # heading: name in a regime's costs
    **{"n": "n", "steps": "steps", "tokens": "tokens", "training s": "seconds", "tokens/s": "tokens_per_second"},
    **{"training FLOPs": "training_flops", "scoring s": "scoring_seconds", "scoring FLOPs": "scoring_flops"},
    **{"total FLOPs": "total_flops", "with the teacher's": "with_teacher_flops", "bytes on disk": "bytes"},
}
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
ESTIMATE = ("mean", "sd", "low", "high", "n")


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, the rows, and the notes below them; the first ``words`` columns hold words."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    words: int = 1


def all_tables(table: Comparison) -> dict[str, Table]:
    """The non-empty tables, in the order of table.md."""
    made = {
        "scores": score_table(table),
        "differences": difference_table(table),
        "set_apart": set_apart_table(table),
        "cost": cost_table(table),
        "break_even": break_even_table(table),
    }
    return {name: own for name, own in made.items() if own.rows}


def to_markdown(table: Comparison) -> str:
    parts = [inline(verdict(table))] if verdict(table) else []
    for own in all_tables(table).values():
        parts += [f"### {inline(own.title)}", markdown(own.columns, own.rows, own.words), *map(inline, own.notes)]
    return "\n\n".join(parts) + "\n"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """The lines of a table, whose first ``words`` columns are aligned to the left, and the others to the right."""
    heading, *lines = [f"| {' | '.join(inline(text).replace('|', '/') for text in row)} |" for row in (columns, *rows)]
    return "\n".join([heading, f"|{'---|' * words}{'---:|' * (len(columns) - words)}", *lines])


def to_csv(table: Comparison) -> str:
    """One line for each regime and each task, average or loss: its numbers, and those of the paired difference."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    own = (*ESTIMATE, "fine_tuning_seeds", "fine_tuning_sd", "collapsed")
    writer.writerow(["of", "regime", *own, *(f"difference_{name}" for name in ESTIMATE)])
    for label, row in compared(table).items():
        for name, values in row.items():
            difference = values["difference"] or {}
            writer.writerow(
                [single_line(label), single_line(name), *map(values.get, own), *map(difference.get, ESTIMATE)]
            )
    return buffer.getvalue()


def primary(table: Comparison) -> tuple[str, Estimates]:
    """The main score: the first average (a requested one comes first), or else the first task."""
    rows = table["averages"] or {task: row["scores"] for task, row in table["tasks"].items()}
    return next(iter(rows.items()))


def verdict(table: Comparison) -> str:
    """Which regimes are told apart from the baseline, and by how much; empty for one regime."""
    (label, row), baseline = primary(table), table["baseline"]
    parts, alike, alone = [], [], []
    for name in table["set_apart"]:  # all but the baseline
        estimate = row[name]["difference"]
        if estimate is None:
            parts.append(f"{name} is not compared: no pretraining seed in common with {baseline}")
        elif estimate["n"] == 1:
            alone.append(f"{name} {estimate['mean']:+z.1f}")
        elif estimate["low"] is None and estimate["mean"]:
            parts.append(f"{name} differs from {baseline} by {estimate['mean']:+.1f} percentage points in every seed")
        elif (estimate["low"] or 0) <= 0 <= (estimate["high"] or 0):
            alike.append(name)
        else:
            side = "above" if estimate["mean"] > 0 else "below"
            near, far = sorted((abs(estimate["low"]), abs(estimate["high"])))
            size = f"{abs(estimate['mean']):.1f} [{near:.1f}, {far:.1f}] percentage points"
            parts.append(f"{name} is {size} {side} {baseline} (n = {estimate['n']})")
    if alike:
        parts.append(f"{_and(alike)} {'is' if len(alike) == 1 else 'are'} not told apart from {baseline}")
    if alone:
        parts.append(f"{_and(alone)} percentage points against {baseline}, with one pretraining seed (an anecdote)")
    return f"On {label}, {'; '.join(parts)}." if parts else ""


def _and(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def compared(table: Comparison) -> dict[str, Estimates]:
    """The estimates of all regimes: first averages, then tasks, then the held-out loss."""
    rows = dict(table["averages"])
    for task, row in table["tasks"].items():
        rows[task if row["train_split"] in ("train", "") else f"{task} ({row['train_split']})"] = row["scores"]
    return rows | ({"eval loss": table["eval_loss"]} if table["eval_loss"] else {})


def score_table(table: Comparison) -> Table:
    rows, tasks = compared(table), table["tasks"]
    tuned = [row["scores"] for row in tasks.values() if "zero_shot" not in row]
    tuned = tuned or [row["scores"] for row in tasks.values()]
    lines = []
    for name in table["regimes"]:
        scores = [score(row[name], digits(label)) for label, row in rows.items()]
        counts = sorted({row[name]["n"] * row[name]["fine_tuning_seeds"] for row in tuned})
        runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines.append([name, *scores, seeds(tuned[0][name]["n"]), runs])
    constants = [constant(name, table) for name in table["averages"]]
    constants += [f"{row['constant_score']:.1f}" for row in tasks.values()]
    lines.append(["constant", *constants, *[""] * (len(rows) - len(constants)), "", ""])
    columns = [f"**{name}**" if name in table["averages"] else name for name in rows]
    return Table("Scores", [table["protocol"], *columns, "n", "runs"], lines, score_notes(table))


def score_notes(table: Comparison) -> list[str]:
    notes = [
        "Scores are in percent: the mean over n pretraining seeds ± their sample standard deviation. The fine-tuning "
        "seeds of a model are averaged first. One pretraining seed is an anecdote. runs counts the fine-tunings of a "
        "task.",
        "constant is the score of the best model that predicts the same for every row.",
    ]
    for task, row in table["tasks"].items():
        if how := row.get("zero_shot"):
            first = f"the first {how['limit_pairs']:,} pairs of each phenomenon" if how["limit_pairs"] else "all pairs"
            notes.append(
                f"{task} is the share of {row['eval_rows']:,} pairs ({first}) whose good sentence has the higher "
                f"pseudo-log-likelihood ({how['pll']}). A model has one run, without fine-tuning. The constant is "
                "chance."
            )
    if table["eval_loss"]:
        notes.append(
            "eval loss is the cross-entropy on held-out sequences after pretraining, in nats; lower is better. Its "
            "masks are random, and only random masking trains on such masks."
        )
    if any(own["collapsed"] for row in table["tasks"].values() for own in row["scores"].values()):
        notes.append(
            "† counts the runs whose model predicts the same for every row; an average counts those of its tasks."
        )
    overlaps = [(name, row["overlap"], row["eval_rows"]) for name, row in table["tasks"].items() if row["overlap"]]
    if overlaps:
        counts = ", ".join(f"{name} {overlap:,} of {rows:,}" for name, overlap, rows in overlaps)
        memory = "If there are many, the score partly measures memory."
        notes.append(f"Some evaluation rows are also training rows: {counts}. {memory}")
    if table["not_computed"]:
        notes.append(f"Not computed: {'; '.join(table['not_computed'].values())}.")
    return notes


def constant(name: str, table: Comparison) -> str:
    """The mean of the tasks' constant scores; empty for an average of single metrics."""
    if any(":" in part for part in AVERAGES[name]):
        return ""
    return f"{statistics.fmean(table['tasks'][task]['constant_score'] for task in AVERAGES[name]):.1f}"


def difference_table(table: Comparison) -> Table:
    rows, baseline, lines = compared(table), table["baseline"], []
    for name in table["set_apart"]:  # all but the baseline
        differences = {label: row[name]["difference"] for label, row in rows.items()}
        first = next(iter(differences.values()))
        texts = [difference(own, digits(label)) for label, own in differences.items()]
        lines.append([name, *texts, seeds(first["n"] if first else 0)])
    losses = " (eval loss: in nats)" if table["eval_loss"] else ""
    note = (
        f"Each value is a regime minus {baseline} in percentage points{losses}, with the 95 % interval of a paired t "
        "over the n pretraining seeds that both have. It uses only the fine-tuning seeds that both have, so it can "
        "differ from the difference of the scores above. One pretraining seed has no interval: it is an anecdote. The "
        "intervals are not corrected for multiple comparisons: of twenty true differences of zero, one interval "
        "excludes zero on average."
    )
    return Table(f"Difference to {baseline}", [f"minus {baseline}", *rows, "n"], lines, [note])


def set_apart_table(table: Comparison) -> Table:
    """The differences between each regime's pretraining and the baseline's; no rows without differences."""
    unknown = ["not known: not both were pretrained by train/run.py"]
    apart = table["set_apart"] if any(flags != [] for flags in table["set_apart"].values()) else {}
    rows = [[name, "; ".join(unknown if flags is None else flags or ["nothing"])] for name, flags in apart.items()]
    note = "The flags come from the summaries of the models, without the seeds. All other flags are the same."
    return Table("What sets them apart", ["regime", f"not as in {table['baseline']}"], rows, [note], words=2)


def cost_table(table: Comparison) -> Table:
    costs = {name: cost for name, cost in table["training"].items() if cost}
    shown = {heading: key for heading, key in COSTS.items() if any(key in cost for cost in costs.values())}
    rows = []
    for name, cost in costs.items():
        amounts = [amount(cost.get(key), exact=key in ("n", "steps", "tokens")) for key in shown.values()]
        rows.append([name, cost["regime"] or "", *amounts])
    note = (
        "The costs of one student, as means over n pretraining seeds. Scoring covers all shards and targets whose "
        "scores the student reads, as if no other student read them. total adds training and scoring; the column "
        "after it, if the teacher's training is known, adds that too. Training FLOPs count forward, backward, and the "
        "scores of self-masking. bytes on disk are those of whole directories, with the columns that the student does "
        "not read. Seconds depend on what else the machine did; FLOPs do not."
    )
    return Table("Cost", ["cost", "regime", *shown], rows, [note])


def break_even_table(table: Comparison) -> Table:
    kinds = {
        f"{name}, by {heading}": (unit, name)
        for unit, heading in (("flops", "FLOPs"), ("seconds", "seconds"))
        for name in ("epochs", "students")
    }
    rows = [
        [row["regime"], row["against"], *(when(row[unit], name) for unit, name in kinds.values())]
        for row in table["break_even"]
    ]
    note = (
        "The number of epochs of the corpus, or of students with as many tokens, from which scoring once costs less "
        f"than the alternative. {ONLINE}: a teacher in memory computes for each batch what this regime reads."
    )
    return Table("Break-even", ["offline scores pay", "against", *kinds], rows, [note])


def digits(label: str) -> int:
    return 3 if label == "eval loss" else 1


def seeds(n: int) -> str:
    return f"{n} (anecdote)" if n == 1 else f"{n}"


def score(estimate: Mapping[str, float | None], digits: int) -> str:
    text = f"{estimate['mean']:z.{digits}f}"
    text += "" if estimate["sd"] is None else f" ± {estimate['sd']:.{digits}f}"
    return text + (f" †{estimate['collapsed']}" if estimate.get("collapsed") else "")


def difference(estimate: Mapping[str, float | None] | None, digits: int = 1) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['mean']:+z.{digits}f}{interval(estimate, f'+z.{digits}f')}"


def interval(estimate: Mapping[str, float | None], form: str = "z.1f") -> str:
    """The text of an interval, to follow its mean; empty for one seed."""
    if estimate["low"] is None:
        return "" if estimate["n"] == 1 else " (all alike)"
    return f" [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def when(pays: dict[str, Any] | None, name: str) -> str:
    """The number of epochs or students from which offline scores are cheaper."""
    if pays is None or (pays["tokens"] is not None and pays[name] is None):
        return "-"
    if pays["tokens"] is None or math.isinf(pays[name]):  # infinite for absurd costs, such as those of a planted file
        return "never"
    return f"{pays[name]:.1f}" if name == "epochs" else f"{math.ceil(pays[name] - 1e-9):,}"


def amount(value: float | None, exact: bool = False) -> str:
    """A number as text: exact, or three digits with a prefix."""
    if value is None:
        return "-"
    if exact or value == 0:
        return f"{value:,.0f}"
    value = float(f"{value:.2e}")  # rounded first: 999.6 is 1.00 k
    size = min(max(0, math.floor(math.log10(abs(value)) / 3)), len(PREFIXES) - 1)
    return f"{f'{value / 1000**size:#.3g}'.rstrip('.')} {PREFIXES[size]}".strip()
