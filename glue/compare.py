#!/usr/bin/env python3
"""Regimes side by side: a table of tasks × models with mean and standard deviation over seeds, averages, and a chart.

python glue/compare.py random=runs/glue/random parquet=runs/glue/parquet --output runs/comparison
python glue/compare.py A=runs/glue/a B=runs/glue/b --average glue8 --output runs/comparison

Writes table.md, table.json and chart.png. What was fine-tuned differently is not compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from glue.chart import draw
from glue.metrics import AVERAGES, IncompleteAverage, average, require_tasks, tasks_of
from glue.tasks import GLUE, PROBES
from pipeline import cli, storage
from pipeline.cli import UsageError
from pipeline.commit import differences

# what the table shows of the models' own summaries
TRAINING = ("regime", "steps", "tokens", "seconds", "tokens_per_second", "scoring_seconds", "eval_loss")

# what a result must have to be compared, besides the metrics of its task
FIELDS = {
    **{"task": str, "seed": int, "protocol": str, "metrics": dict, "score": float | int, "collapsed": bool},
    **{"constant_score": float | int, "train_split": str, "train_rows": int, "eval_rows": int, "key": dict},
    **{"training": dict | None},
}

Results = dict[str, dict[int, dict[str, Any]]]  # by task, by seed


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    regimes = {name: read_results(name, directory) for name, directory in args.regimes.items()}
    check_comparable(regimes)
    table = compare(regimes, args.average)
    markdown = to_markdown(table)
    storage.write_json(storage.join(args.output, "table.json"), table)
    storage.write_bytes(storage.join(args.output, "table.md"), markdown.encode())
    storage.write_bytes(storage.join(args.output, "chart.png"), draw(table))
    print(markdown)
    print(f"written to {args.output}: table.md, table.json, chart.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="glue/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("regimes", nargs="+", metavar="NAME=DIR", help="a name for the table and a directory of glue/run.py")
    add("--output", required=True, help="directory of the comparison")
    add("--average", action="append", choices=AVERAGES, default=[], help="must be computed, or it is an error")
    args = parser.parse_args(argv)
    pairs = [text.partition("=") for text in args.regimes]
    if wrong := [name for name, equals, directory in pairs if not (name and equals and directory)]:
        raise UsageError(f"{wrong[0]!r} is no NAME=DIR, as in random=runs/glue/random")
    args.regimes = {name: directory for name, _, directory in pairs}
    if len(args.regimes) < len(pairs):
        raise UsageError("two regimes have the same name; give each its own")
    return args


def read_results(name: str, directory: str) -> Results:
    """The result files of one model, by task and seed.

    Raises:
        UsageError: there are none, one cannot be read, or they are of different models.
    """
    files = [info.base_name for info in storage.list_files(directory) if info.base_name.endswith(".json")]
    results: Results = {}
    models = set()
    for file in files:
        try:
            result = storage.read_json(storage.join(directory, file))
            check_result(result)
            results.setdefault(result["task"], {})[result["seed"]] = result
            models.add(result["key"]["model_hash"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{storage.join(directory, file)} is no result of glue/run.py; remove it") from None
    if not results:
        raise UsageError(f"{directory} ({name}) holds no results; make them with glue/run.py --output {directory}")
    if len(models) > 1:
        raise UsageError(f"{directory} ({name}) holds results of {len(models)} models; keep one directory a model")
    return results


def check_result(result: Any) -> None:
    """Raises KeyError, TypeError or ValueError if a result is not whole: see ``FIELDS``."""
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(result[name], kind)]:
        raise ValueError(f"{wrong[0]} is {result[wrong[0]]!r}")
    task = (GLUE | PROBES)[result["task"]]
    for name in (metric + suffix for metric in task.metrics for suffix in task.evaluations):
        float(result["metrics"][name])


def check_comparable(regimes: dict[str, Results]) -> None:
    """Refuse to compare different tasks, seeds, settings or data.

    Raises:
        UsageError: says what differs between which two.
    """
    (first, reference), *others = regimes.items()
    for name, results in others:
        for task in sorted(reference.keys() ^ results.keys()):
            has, lacks = (first, name) if task in reference else (name, first)
            raise UsageError(f"{has} has the task {task}, {lacks} has not; run it there, or compare without it")
        for task, by_seed in results.items():
            if by_seed.keys() != reference[task].keys():
                seeds = [", ".join(map(str, sorted(found[task]))) for found in (reference, results)]
                raise UsageError(f"{task} has seeds {seeds[0]} in {first} but {seeds[1]} in {name}; run the same")
            for seed, result in by_seed.items():
                old, new = ({**found["key"], "model_hash": ""} for found in (reference[task][seed], result))
                if differing := differences(old, new):
                    raise UsageError(
                        f"{task} was fine-tuned differently in {first} and {name} ({'; '.join(differing)}); "
                        "run both alike"
                    )


def compare(regimes: dict[str, Results], required: list[str]) -> dict[str, Any]:
    """All numbers of the comparison.

    Raises:
        UsageError: a required average lacks tasks.
    """
    reference = next(iter(regimes.values()))
    tasks = [task for task in (*GLUE, *PROBES) if task in reference]
    any_result = next(iter(reference[tasks[0]].values()))
    table: dict[str, Any] = {
        "protocol": any_result["protocol"],
        "regimes": list(regimes),
        "tasks": {},
        "averages": {},
        "not_computed": {},
        "training": {},
    }
    for task in tasks:
        result = next(iter(reference[task].values()))
        rows = {name: result[name] for name in ("train_split", "train_rows", "eval_rows", "constant_score")}
        row = {name: spread([r["score"] for _, r in sorted(res[task].items())]) for name, res in regimes.items()}
        for name, results in regimes.items():
            row[name]["collapsed"] = sum(r["collapsed"] for r in results[task].values())
        table["tasks"][task] = rows | {"scores": row}
    for name in AVERAGES:
        try:
            table["averages"][name] = {regime: over_seeds(name, results) for regime, results in regimes.items()}
        except IncompleteAverage as error:
            if name in required:
                raise UsageError(f"{error}; run what is missing, or leave out --average {name}") from None
            if any(task in tasks for task in tasks_of(name)):
                table["not_computed"][name] = str(error)
    for regime, results in regimes.items():
        table["training"][regime] = next(iter(results[tasks[0]].values()))["training"]
    return table


def over_seeds(name: str, results: Results) -> dict[str, Any]:
    """An average's spread over the seeds that all of its tasks have."""
    require_tasks(name, results)
    own = {task: results[task] for task in tasks_of(name)}
    seeds = set.intersection(*(set(by_seed) for by_seed in own.values()))
    if not seeds:
        raise IncompleteAverage(f"the average {name} needs a seed that all of its tasks share")
    return spread([average(name, {task: by[seed]["metrics"] for task, by in own.items()}) for seed in sorted(seeds)])


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": deviation, "values": values}


def to_markdown(table: dict[str, Any]) -> str:
    regimes = table["regimes"]
    columns = [*regimes, "constant", "seeds"]
    lines = [f"| {table['protocol']} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    notes = []
    for task, row in table["tasks"].items():
        label = task if row["train_split"] == "train" else f"{task} ({row['train_split']})"
        cells = [cell(row["scores"][name]) for name in regimes]
        seeds = len(row["scores"][regimes[0]]["values"])
        lines.append(f"| {label} | {' | '.join(cells)} | {row['constant_score']:.1f} | {seeds} |")
    for name, row in table["averages"].items():
        seeds = len(row[regimes[0]]["values"])
        lines.append(f"| **{name}** | {' | '.join(cell(row[regime]) for regime in regimes)} | | {seeds} |")
    notes.append("Scores in percent, mean ± standard deviation over the seeds.")
    notes.append("constant: the score of the best model that says the same of every row.")
    if any(row["scores"][name]["collapsed"] for row in table["tasks"].values() for name in regimes):
        notes.append("† In some runs the model says the same of every row.")
    if table["not_computed"]:
        notes.append(f"Not computed: {'; '.join(table['not_computed'].values())}.")
    parts = ["\n".join(lines), *notes]
    if any(table["training"].values()):
        parts.append(training_table(table["training"]))
    return "\n\n".join(parts) + "\n"


def cell(value: dict[str, Any]) -> str:
    text = f"{value['mean']:.1f}" + (f" ± {value['sd']:.1f}" if value["sd"] is not None else "")
    return text + (" †" if value.get("collapsed") else "")


def training_table(training: dict[str, dict[str, Any] | None]) -> str:
    """What each model's pretraining took, as far as its summary says."""
    lines = [f"| pretraining | {' | '.join(name.replace('_', ' ') for name in TRAINING)} |", "|---" * 8 + "|"]
    for regime, summary in training.items():
        values = [(summary or {}).get(name) for name in TRAINING]
        lines.append(f"| {regime} | {' | '.join(number(value) for value in values)} |")
    return "\n".join(lines)


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    cli.run(main)
