#!/usr/bin/env python3
"""Fine-tune models on GLUE, or on two probe tasks that need no data: tasks × seeds × models, one result file each.

BLiMP is scored without fine-tuning: one result file a model, whatever the seeds.

python glue/run.py --model runs/student --tasks glue --data hub --seeds 1,2,3,4,5 --output runs/glue/student
python glue/run.py --model runs/random runs/parquet --tasks cola,rte,stsb --data glue_data --output runs/glue
python glue/run.py --model runs/student --tasks blimp --data GLUE --output runs/glue/student
python glue/run.py --model a=runs/random b=runs/parquet --tasks probes --num-workers 4 --output runs/probes

What is done is skipped, so a run that was cut short goes on with the same command; so does one in which some failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from glue import blimp, metrics
from glue.batches import TaskTokens, encode_task
from glue.cells import Cell, CellTokens, Outcome, work_here, work_on_ray
from glue.finetune import check_model
from glue.options import parse
from glue.protocols import RECIPE, Settings, grid_of
from glue.results import check_result
from glue.tasks import ZERO_SHOT, Task, TaskData, load
from pipeline import cli, storage
from pipeline.checkpoints import load_tokenizer, local_checkpoint, resolve_dtype, weights_hash
from pipeline.cli import RunError, UsageError
from pipeline.commit import differences
from pipeline.manifests import tokenizer_hash

MOST_NAMED = 5  # of the cells that failed


@dataclass(frozen=True)
class Model:
    """A checkpoint and where its results go."""

    name: str
    path: str
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    hash: str
    output: str

    @property
    def training(self) -> dict[str, Any] | None:
        """What its own summary says of its pretraining, if it was trained by train/run.py."""
        try:
            return storage.read_json(str(self.directory / "summary.json"))
        except (FileNotFoundError, ValueError):
            return None


def main(argv: list[str] | None = None) -> None:
    args = parse(argv, __doc__)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # "some weights are newly initialized": that is the point
    models = {name: open_model(args, name, path) for name, path in args.models.items()}
    data = {task.name: load(task, args.data) for task in args.tasks if task.name not in ZERO_SHOT}
    pairs = {name: blimp.load(args.data, args.limit_pairs) for name in ZERO_SHOT if ZERO_SHOT[name] in args.tasks}
    if args.drop_overlap:
        data = {name: each.without_overlap() for name, each in data.items()}
    cells = [
        plan_scoring(args, model, task, pairs[task.name])
        if task.name in pairs
        else plan(args, model, data[task.name], seed)
        for task in args.tasks
        for seed in ([blimp.SEED] if task.name in pairs else args.seeds)
        for model in models.values()
    ]
    todo = [cell for cell in cells if args.overwrite or not is_done(cell)]
    tokens_of = shared_tokens(models, data, pairs, args.pll)
    failed: dict[str, str] = {}
    with cli.Progress(sum(cell.rows for cell in todo), "rows", "fine-tuning" if data else "scoring") as progress:
        if data:
            progress.note(f"{args.protocol}: {describe_grid(cells)}")
        for each in filter(lambda each: each.overlap, data.values()):
            progress.note(describe_overlap(each))
        if len(todo) < len(cells):
            progress.note(f"{len(cells) - len(todo)} of {len(cells)} results are there already")
        if args.num_workers > 1 and todo:
            work = work_on_ray(todo, tokens_of, progress.advance, args.num_workers, args.gpus_per_worker)
        else:
            work = work_here(todo, tokens_of, progress.advance)
        for cell, outcome in work:
            if outcome.failure:
                failed[str(cell)] = outcome.failure
                progress.note(f"{cell} failed: {outcome.failure}")
                continue
            if outcome.scores is None:
                result = report(cell, outcome, models[cell.model], data[cell.task.name])
            else:
                result = report_scores(cell, outcome, models[cell.model], pairs[cell.task.name])
            storage.write_json(cell.file, result)
            progress.note(f"{cell}: {describe(result)}")
    for model in models.values():
        done = [cell.file for cell in cells if cell.model == model.name and str(cell) not in failed]
        print_results(model.output, [storage.read_json(file) for file in done])
    if failed:
        named = "; ".join(f"{name} ({reason})" for name, reason in list(failed.items())[:MOST_NAMED])
        more = f"; and {len(failed) - MOST_NAMED} more" if len(failed) > MOST_NAMED else ""
        raise RunError(f"{len(failed)} of {len(todo)} failed: {named}{more}; the same command tries them again")


def open_model(args: argparse.Namespace, name: str, path: str) -> Model:
    """Load what is needed to know a model. Raises UsageError if it cannot be fine-tuned, or not scored, as asked."""
    directory = local_checkpoint(path)
    tokenizer = load_tokenizer(str(directory))
    if any(task.name not in ZERO_SHOT for task in args.tasks):
        check_model(directory, tokenizer, args.max_length or Settings.max_length)
    if any(task.name in ZERO_SHOT for task in args.tasks):
        blimp.check_model(directory, tokenizer, args.pll)
    words = tokenizer_hash(tokenizer)
    output = storage.join(args.output, name) if name else args.output
    both = storage.sha256_json([weights_hash(directory), words])
    return Model(name, path, directory, tokenizer, words, both, output)


def plan(args: argparse.Namespace, model: Model, data: TaskData, seed: int) -> Cell:
    """A cell under the protocol and the flags that override it."""
    task = data.task
    changes = {
        "learning_rate": args.learning_rate,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "dtype": resolve_dtype(args.dtype),
        "limit_train": args.limit_train.get(task.name),
    }
    grid = grid_of(args.protocol, task.name, changes)
    key = {
        "task": task.name,
        "seed": seed,
        "protocol": args.protocol,
        "settings": {str(number): asdict(settings) for number, settings in enumerate(grid, 1)},
        "recipe": RECIPE,
        "train_split": data.train_split,
        "data_hash": data.hash,
        "model_hash": model.hash,
    }
    file = storage.join(model.output, f"{task.name}-seed{seed}.json")
    rows = sum(settings.epochs * min(len(data.train.labels), settings.limit_train or sys.maxsize) for settings in grid)
    return Cell(model.name, model.directory, task, seed, grid, rows, file, key)


def plan_scoring(args: argparse.Namespace, model: Model, task: Task, pairs: blimp.Pairs) -> Cell:
    """The one cell of a model and BLiMP, whatever the seeds."""
    key = {
        "task": task.name,
        "seed": blimp.SEED,
        "protocol": blimp.PROTOCOL,
        "pll": args.pll,
        "limit_pairs": pairs.limit,
        "data_hash": pairs.hash,
        "model_hash": model.hash,
    }
    file = storage.join(model.output, f"{task.name}.json")
    return Cell(model.name, model.directory, task, blimp.SEED, (), 2 * len(pairs.frame), file, key)


def shared_tokens(
    models: dict[str, Model], data: dict[str, TaskData], pairs: dict[str, blimp.Pairs], form: str
) -> Callable[[Cell], CellTokens]:
    """The tokens of a cell, made once for all seeds, settings and models of the same tokenizer."""
    tokenizers = {model.tokenizer_hash: model.tokenizer for model in models.values()}

    @cache
    def encoded(tokenizer: str, task: str, max_length: int, limit_train: int | None) -> TaskTokens:
        return encode_task(data[task], tokenizers[tokenizer], max_length, limit_train)

    @cache
    def sentences(tokenizer: str, task: str) -> blimp.Sentences:
        return blimp.encode(pairs[task], tokenizers[tokenizer], form)

    def tokens_of(cell: Cell) -> CellTokens:
        if cell.task.name in pairs:
            return sentences(models[cell.model].tokenizer_hash, cell.task.name)
        settings = cell.grid[0]  # a grid is over learning rates and epochs
        return encoded(models[cell.model].tokenizer_hash, cell.task.name, settings.max_length, settings.limit_train)

    return tokens_of


def is_done(cell: Cell) -> bool:
    """Whether the result is there.

    Raises:
        UsageError: the file holds a result of another model or of other settings, or an incomplete one.
    """
    try:
        previous = storage.read_json(cell.file)
        check_result(previous)
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{cell.file} is no result of glue/run.py; choose another --output, or --overwrite") from None
    if differing := differences(previous["key"], cell.key):
        raise UsageError(
            f"{cell.file} was made otherwise ({'; '.join(differing)}); choose another --output, or pass --overwrite"
        )
    return True


def report(cell: Cell, outcome: Outcome, model: Model, data: TaskData) -> dict[str, Any]:
    """The result file: the first best of the grid by its dev score, and all of the grid beside it."""
    settings, best = max(outcome.found, key=lambda pair: pair[1].score)
    grid = [
        {**asdict(tried), "score": result.score, "metrics": result.metrics, "collapsed": result.collapsed}
        for tried, result in outcome.found
    ]
    return {
        **common(cell, outcome, model),
        "settings": asdict(settings),
        "metrics": best.metrics,
        "score": best.score,
        "collapsed": best.collapsed,
        "constant_score": best.constant_score,
        "train_split": data.train_split,
        "train_rows": best.train_rows,
        "eval_rows": best.eval_rows,
        "overlap": data.overlap,
        "grid": grid,
    }


def report_scores(cell: Cell, outcome: Outcome, model: Model, pairs: blimp.Pairs) -> dict[str, Any]:
    """BLiMP's result file."""
    assert outcome.scores is not None
    settings = {name: cell.key[name] for name in ("pll", "limit_pairs")}
    return {**common(cell, outcome, model), "settings": settings, **blimp.result(pairs, outcome.scores)}


def common(cell: Cell, outcome: Outcome, model: Model) -> dict[str, Any]:
    """What the result files of all tasks say: which cell, where and how long, and of which model."""
    return {
        "task": cell.task.name,
        "seed": cell.seed,
        "protocol": cell.key["protocol"],
        "seconds": round(outcome.seconds, 2),
        "device": outcome.device,
        "model": {"path": str(model.path), "hash": model.hash},
        "training": model.training,
        "key": cell.key,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
    }


def describe_overlap(data: TaskData) -> str:
    rows = sum(len(split.labels) for split in data.evaluations.values())
    return f"{data.task.name}: {data.overlap:,} of {rows:,} evaluation rows are training rows too; see --drop-overlap"


def describe_grid(cells: list[Cell]) -> str:
    size = max(len(cell.grid) for cell in cells)
    if size == 1:
        return "one setting"
    return f"a grid of {size} settings; in each run of each model the best by its dev score counts"


def describe(result: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.3f}" for name, value in result["metrics"].items())
    note = ", the same for every row" if result["collapsed"] else ""
    return f"{result['score']:.1f} ({values}{note}) in {result['seconds']:.0f} s"


def print_results(output: str, results: list[dict[str, Any]]) -> None:
    """Task by task the mean score, each raw metric's mean, seconds and the scores by seed; then the named averages."""
    print(f"{output}: {len(results)} results")
    by_task: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_task.setdefault(result["task"], {})[result["seed"]] = result
    for task, by_seed in by_task.items():
        runs = list(by_seed.values())
        raw = ", ".join(f"{name} {mean([run['metrics'][name] for run in runs]):.3f}" for name in runs[0]["metrics"])
        scores = " ".join(f"{run['score']:.1f}" for run in runs)
        collapsed = sum(run["collapsed"] for run in runs)
        note = f"   {collapsed} of {len(runs)} say the same of every row" if collapsed else ""
        print(f"  {task:<12} {mean([run['score'] for run in runs]):5.1f}   {scores}   ({raw}){note}")
        for field, value in runs[0].get("fields", {}).items():  # one run a model
            print(f"    {field:<18} {100 * value:5.1f}")
    raw_metrics = {task: {seed: run["metrics"] for seed, run in by_seed.items()} for task, by_seed in by_task.items()}
    for name in metrics.AVERAGES:
        if averages := metrics.averages_by_seed(name, raw_metrics):
            print(
                f"  {name:<12} {mean(list(averages.values())):5.1f}   {' '.join(f'{a:.1f}' for a in averages.values())}"
            )
    work = "fine-tuning" if set(by_task) - set(ZERO_SHOT) else "scoring"
    print(f"  {sum(result['seconds'] for result in results):,.0f} s of {work}")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    cli.run(main)
