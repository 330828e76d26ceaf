#!/usr/bin/env python3
"""Compare regimes: scores with intervals over pretraining seeds, and costs, as tables and as a page.

python glue/compare.py random=runs/glue/random parquet=runs/glue/parquet --output runs/comparison
python glue/compare.py random=runs/glue/random-1,runs/glue/random-2 self=runs/glue/self-1 self=runs/glue/self-2 \\
    --baseline random --average local6 --output runs/comparison

A directory holds the results of one pretrained model (glue/run.py). Directories of one name are pretraining seeds of a
regime, and each is paired with the same seed of the baseline. Writes table.md, table.json, table.csv and page.html.
Refuses results of different settings or data.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import Parser
from entropy_masking.errors import UsageError
from entropy_masking.summary import Summary
from glue import tables
from glue.costs import break_evens, cost
from glue.intervals import Scores, estimate, paired_difference
from glue.metrics import AVERAGES, IncompleteAverage, averages_by_seed, tasks_of
from glue.results import Regimes, Run, evaluated_on, read_regimes, set_apart
from glue.tables import Comparison, Estimates
from glue.tasks import TASKS, ZERO_SHOT


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    from glue import report  # after --help: matplotlib is slow to import

    regimes = read_regimes(args.regimes)
    table = compare(regimes, args.baseline, args.average, teacher_summary(args.teacher))
    markdown = tables.to_markdown(table)
    files = {
        "table.md": markdown.encode(),
        "table.csv": tables.to_csv(table).encode(),
        "page.html": report.page(table, summaries_of(regimes)).encode(),
    }
    storage.write_json(storage.join(args.output, "table.json"), table)
    for name, data in files.items():
        storage.write_bytes(storage.join(args.output, name), data)
    print(markdown)
    print(f"written to {args.output}: table.json, {', '.join(files)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("glue/compare.py", __doc__)
    add = parser.add_argument
    add(
        "regimes", nargs="+", metavar="NAME=DIR[,DIR]", help="a regime: output directories of glue/run.py, one per seed"
    )
    add("--output", required=True, help="directory of the comparison")
    add("--baseline", metavar="NAME", help="the regime to compare the others with (default: the first)")
    required = "average that must be computed, or the command fails; the verdict uses the first"
    add("--average", action="append", choices=AVERAGES, default=[], help=required)
    add("--teacher", metavar="MODEL", help="the teacher, trained by train/run.py: adds its training to the costs")
    args = parser.parse_args(argv)
    pairs, args.regimes = [text.partition("=") for text in args.regimes], {}
    for name, equals, directories in pairs:
        if not (name.isprintable() and name and equals and all(directories.split(","))):
            raise UsageError(f"{name + equals + directories!r} is not NAME=DIR, such as random=runs/glue/random")
        args.regimes.setdefault(name, []).extend(directories.split(","))
    args.baseline = args.baseline or next(iter(args.regimes))
    if args.baseline not in args.regimes:
        raise UsageError(f"--baseline {args.baseline} is not one of the regimes {', '.join(args.regimes)}")
    return args


def teacher_summary(directory: str | None) -> Summary | None:
    """The summary of the teacher's training. Raises UsageError if it lacks the costs."""
    if directory is None:
        return None
    try:
        summary = Summary.model_validate(storage.read_json(storage.join(directory, "summary.json")))
    except (FileNotFoundError, ValueError):
        summary = Summary()
    if summary.training_flops is None or summary.scoring_flops is None:
        raise UsageError(
            f"--teacher {directory} has no summary.json with the costs of its training; name a directory made by "
            "train/run.py, or leave it out"
        )
    return summary


def compare(regimes: Regimes, baseline: str, required: list[str], teacher: Summary | None = None) -> Comparison:
    """Compute all numbers of the comparison, the content of table.json.

    Args:
        required: averages that must be computed.
        teacher: the summary of the teacher's training.

    Raises:
        UsageError: a required average lacks tasks.
    """
    reference = regimes[baseline][0]
    tasks = sorted(reference.results, key=[*TASKS, *sorted(reference.results)].index)  # GLUE's, then one's own
    results = {task: next(iter(reference.results[task].values())) for task in tasks}
    table: Comparison = {
        "protocol": next(iter(results.values())).protocol,
        "baseline": baseline,
        "regimes": list(regimes),
        "runs": {name: [run.source() for run in runs] for name, runs in regimes.items()},
        "set_apart": {name: set_apart(runs[0], reference) for name, runs in regimes.items() if name != baseline},
        "averages": {},
        "not_computed": {},
        "tasks": {},
        "eval_loss": losses(regimes, baseline),
    }
    for name in dict.fromkeys([*required, *AVERAGES]):
        try:
            table["averages"][name] = estimates(regimes, baseline, partial(averages, name), tasks_of(name))
        except IncompleteAverage as error:
            if name in required:
                raise UsageError(f"{error}; run what is missing, or leave out --average {name}") from None
            if any(task in results for task in tasks_of(name)):
                table["not_computed"][name] = str(error)
    for task, result in results.items():
        names = ("train_split", "train_rows", "eval_rows", "overlap", "constant_score")
        row = {name: getattr(result, name) for name in names}
        row |= {"zero_shot": result.settings} if task in ZERO_SHOT else {}
        table["tasks"][task] = row | {"scores": estimates(regimes, baseline, partial(scores, task), [task])}
    summaries = summaries_of(regimes)
    if table["eval_loss"] is None and all(len(summaries[name]) == len(runs) for name, runs in regimes.items()):
        table["not_computed"]["eval loss"] = "the held-out loss needs runs that all have one, on the same text"
    table["training"] = {name: cost(own) for name, own in summaries.items()}
    for name, row in table["training"].items():
        if row:
            if teacher and row["total_flops"] is not None:
                flops = (teacher.training_flops or 0) + (teacher.scoring_flops or 0) if row["scoring_flops"] else 0
                row["with_teacher_flops"] = row["total_flops"] + flops
            row["eval_loss"] = (table["eval_loss"] or {}).get(name, {}).get("mean")
    table["break_even"] = break_evens(table["training"])
    return table


def summaries_of(regimes: Regimes) -> dict[str, list[Summary]]:
    """The existing summaries of pretraining by regime."""
    return {name: [run.training for run in runs if run.training] for name, runs in regimes.items()}


def scores(task: str, run: Run) -> dict[int, float]:
    """A task's scores of one model, in percent, by fine-tuning seed."""
    return {seed: run.results[task][seed].score for seed in run.seeds(task)}


def averages(name: str, run: Run) -> dict[int, float]:
    """A named average of one model, by the fine-tuning seeds that all of its tasks have. Raises IncompleteAverage."""
    metrics = {task: {seed: result.metrics for seed, result in own.items()} for task, own in run.results.items()}
    return averages_by_seed(name, metrics)


def losses(regimes: Regimes, baseline: str) -> Estimates | None:
    """The held-out loss of pretraining, in nats; None unless every summary has one, all on the same text."""
    summaries = [run.training or Summary() for runs in regimes.values() for run in runs]
    if any(summary.eval_loss is None for summary in summaries) or len(set(map(evaluated_on, summaries))) > 1:
        return None
    return estimates(regimes, baseline, lambda run: {0: float((run.training or Summary()).eval_loss or 0)})


def estimates(
    regimes: Regimes, baseline: str, value: Callable[[Run], dict[int, float]], tasks: Sequence[str] = ()
) -> Estimates:
    """Estimates of one score, average or loss, and of its difference to the baseline, by regime.

    Args:
        value: the score of a run, by fine-tuning seed.
        tasks: the tasks of the score; collapsed fine-tunings of these tasks are counted.
    """
    by_regime = {name: {run.seed: value(run) for run in runs} for name, runs in regimes.items()}

    def beside(name: str, other: str) -> Scores:
        """The scores of a regime at the seeds of another one. A model without a summary has no seed: it fits all."""
        own = by_regime[name]
        return own if regimes[name][0].training else dict.fromkeys(by_regime[other], *own.values())

    row: Estimates = {}
    for name, values in by_regime.items():
        difference = None if name == baseline else paired_difference(beside(name, baseline), beside(baseline, name))
        row[name] = estimate_of(values) | {"difference": difference and asdict(difference)}
        if tasks:
            row[name]["collapsed"] = sum(own.collapsed for run in regimes[name] for own in run if own.task in tasks)
    return row


def estimate_of(values: Scores) -> dict[str, object]:
    """Mean, deviation and interval over pretraining seeds, and the deviation between fine-tuning seeds alone."""
    means = {seed: statistics.fmean(values[seed].values()) for seed in sorted(values)}
    variances = [statistics.variance(own.values()) for own in values.values() if len(own) > 1]
    return asdict(estimate(list(means.values()))) | {
        "values": {str(seed): mean for seed, mean in means.items()},
        "fine_tuning_seeds": min(len(own) for own in values.values()),
        "fine_tuning_sd": statistics.fmean(variances) ** 0.5 if variances else None,
    }


if __name__ == "__main__":
    console.run(main)
