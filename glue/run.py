#!/usr/bin/env python3
"""Fine-tune a model on GLUE, or on two probe tasks that need no data: tasks × seeds, one result file each.

python glue/run.py --model runs/student --tasks glue --data hub --seeds 1,2,3,4,5 --output runs/glue/student
python glue/run.py --model runs/student --tasks cola,rte,stsb --data glue_data --output runs/glue/student
python glue/run.py --model runs/student --tasks probes --output runs/probes/student

What is done is skipped, so a run that was cut short goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers.utils import logging

from glue.finetune import Result, Settings, check_model, finetune, trained_rows
from glue.tasks import PROBES, Task, TaskData, choose, load
from pipeline import cli, storage
from pipeline.checkpoints import load_tokenizer, local_checkpoint, resolve_dtype, weights_hash
from pipeline.cli import UsageError
from pipeline.commit import differences


@dataclass(frozen=True)
class Protocol:
    """How every task is fine-tuned; of several settings the best on dev counts. ``limits``: training rows by task."""

    grid: tuple[Settings, ...]
    limits: dict[str, int]


PROTOCOLS = {
    # one setting for all tasks: Geiping and Goldstein 2023, arXiv 2212.14034
    "cramming": Protocol((Settings(4e-5, 5, 16, scheduler="cosine"),), {}),
    # Devlin et al. 2019, arXiv 1810.04805, with the learning rates of its appendix and of its code
    "bert-grid": Protocol(
        tuple(Settings(rate, epochs, 32) for rate in (5e-5, 4e-5, 3e-5, 2e-5) for epochs in (3, 4)), {}
    ),
    # the fine-tuning of the BabyLM challenge of 2025
    "babylm": Protocol((Settings(3e-5, 10, 32),), {"mnli": 10_000, "qqp": 10_000}),
}


@dataclass(frozen=True)
class Run:
    """One task with one seed: what goes into its result file, and what decides it."""

    task: Task
    seed: int
    grid: tuple[Settings, ...]
    file: str
    key: dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    directory = local_checkpoint(args.model)
    check_model(directory, args.max_length or Settings.max_length)
    tokenizer = load_tokenizer(str(directory))
    data = {task.name: load(task, args.data) for task in args.tasks}
    model = {"path": str(args.model), "hash": weights_hash(directory)}
    runs = [plan(args, task, seed, model, data[task.name]) for task in args.tasks for seed in args.seeds]
    todo = [run for run in runs if args.overwrite or not is_done(run)]
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # "some weights are newly initialized": that is the point
    total = sum(trained_rows(data[run.task.name], settings) for run in todo for settings in run.grid)
    with cli.Progress(total, "rows", "fine-tuning") as progress:
        if len(todo) < len(runs):
            progress.note(f"{len(runs) - len(todo)} of {len(runs)} results are there already")
        for run in todo:
            started = time.monotonic()
            found = [
                (settings, finetune(directory, tokenizer, data[run.task.name], settings, run.seed, progress.advance))
                for settings in run.grid
            ]
            result = report(run, found, model, training_of(directory), time.monotonic() - started)
            storage.write_json(run.file, result)
            progress.note(f"{run.task.name} seed {run.seed}: {describe(result)}")
    print_results([storage.read_json(run.file) for run in runs], args.output)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="glue/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="pretrained masked LM with its tokenizer, by path or Hub id")
    add("--tasks", required=True, help="comma-separated; glue and probes stand for all of theirs")
    add("--data", help="directory with TASK/train.parquet|tsv|jsonl and dev.…, or hub")
    add("--seeds", default="1", help="comma-separated (default: 1)")
    add("--protocol", choices=PROTOCOLS, default="cramming", help="(default: cramming)")
    add("--output", required=True, help="directory of the results, one JSON a task and seed")
    add("--learning-rate", type=cli.positive_float, help="instead of the protocol's")
    add("--epochs", type=cli.positive, help="instead of the protocol's")
    add("--batch-size", type=cli.positive, help="instead of the protocol's")
    add("--max-length", type=cli.positive, help="tokens of a text or pair (default: 128)")
    add("--limit-train", type=cli.positive, help="at most so many training rows, the same for every seed")
    add(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="auto: bfloat16 where the hardware has it",
    )
    add("--overwrite", action="store_true", help="do results again that are there already")
    args = parser.parse_args(argv)
    args.tasks = choose(args.tasks)
    if args.data and all(task.name in PROBES for task in args.tasks):
        raise UsageError("the probes are made from installed packages; leave out --data")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {args.seeds} is no list of whole numbers, as in --seeds 1,2,3") from None
    if wrong := [seed for seed in args.seeds if not 0 <= seed < 1 << 32]:
        raise UsageError(f"--seeds {wrong[0]} is not between 0 and {(1 << 32) - 1}")
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds {','.join(map(str, args.seeds))} names a seed twice; each makes one result")
    return args


def plan(args: argparse.Namespace, task: Task, seed: int, model: dict[str, str], data: TaskData) -> Run:
    """The settings of a task under the protocol and the flags that override it."""
    protocol = PROTOCOLS[args.protocol]
    changes = {
        "learning_rate": args.learning_rate,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "dtype": resolve_dtype(args.dtype),
        "limit_train": args.limit_train or protocol.limits.get(task.name),
    }
    given = {name: value for name, value in changes.items() if value is not None}
    grid = tuple(dict.fromkeys(replace(settings, **given) for settings in protocol.grid))
    key = {
        "task": task.name,
        "seed": seed,
        "protocol": args.protocol,
        "settings": {str(number): asdict(settings) for number, settings in enumerate(grid, 1)},
        "train_split": data.train_split,
        "data_hash": data.hash,
        "model_hash": model["hash"],
    }
    return Run(task, seed, grid, storage.join(args.output, f"{task.name}-seed{seed}.json"), key)


def is_done(run: Run) -> bool:
    """Whether the result is there.

    Raises:
        UsageError: a result of another model or of other settings is in its place.
    """
    try:
        previous = storage.read_json(run.file)["key"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError):
        raise UsageError(f"{run.file} is no result of glue/run.py; choose another --output, or --overwrite") from None
    if differing := differences(previous, run.key):
        raise UsageError(
            f"{run.file} was made otherwise ({'; '.join(differing)}); choose another --output, or pass --overwrite"
        )
    return True


def report(
    run: Run,
    found: list[tuple[Settings, Result]],
    model: dict[str, str],
    training: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """The result file: the best of the grid by its dev score, and all of the grid beside it."""
    settings, best = max(found, key=lambda pair: pair[1].score)
    return {
        "task": run.task.name,
        "seed": run.seed,
        "protocol": run.key["protocol"],
        "settings": asdict(settings),
        "metrics": best.metrics,
        "score": best.score,
        "collapsed": best.collapsed,
        "constant_score": best.constant_score,
        "train_split": run.key["train_split"],
        "train_rows": best.train_rows,
        "eval_rows": best.eval_rows,
        "seconds": round(seconds, 2),
        "grid": [{**asdict(settings), "score": result.score} for settings, result in found],
        "model": model,
        "training": training,
        "key": run.key,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
    }


def training_of(directory: Path) -> dict[str, Any] | None:
    """What the model's own summary says of its pretraining, if it was trained by train/run.py."""
    try:
        return storage.read_json(str(directory / "summary.json"))
    except (FileNotFoundError, ValueError):
        return None


def describe(result: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.3f}" for name, value in result["metrics"].items())
    note = ", the same for every row" if result["collapsed"] else ""
    return f"{result['score']:.1f} ({values}{note}) in {result['seconds']:.0f} s"


def print_results(results: list[dict[str, Any]], output: str) -> None:
    print(f"{output}: {len(results)} results")
    for task in dict.fromkeys(result["task"] for result in results):
        scores = [result["score"] for result in results if result["task"] == task]
        print(f"  {task:<10} {sum(scores) / len(scores):5.1f}   {' '.join(f'{score:.1f}' for score in scores)}")


if __name__ == "__main__":
    cli.run(main)
