#!/usr/bin/env python3
"""Fine-tune models on GLUE or on tasks of your own, or score minimal pairs without fine-tuning.

There is one result file per task, seed and model; of minimal pairs one per model, for any seeds.

python glue/run.py --model runs/student --tasks glue --data hub --seeds 1,2,3,4,5 --output runs/glue/student
python glue/run.py --model runs/random runs/parquet --tasks cola,rte,stsb --data glue_data --output runs/glue
python glue/run.py --model runs/student --tasks blimp --data GLUE --output runs/glue/student
python glue/run.py --model a=runs/random b=runs/parquet --tasks pairs --output runs/pairs
python glue/run.py --model runs/student --task-file mood=train.tsv,dev.tsv --seeds 1,2,3 --output runs/mood

Existing results are skipped, so the same command continues an interrupted run, and repeats failed trials.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from entropy_masking.commands import console
from glue.options import parse

if __name__ == "__main__":
    console.check_flags(lambda: parse(sys.argv[1:], __doc__))  # before the imports that take seconds

from transformers import PreTrainedTokenizerBase

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError
from entropy_masking.models import checkpoints
from entropy_masking.shards.commit import differences
from entropy_masking.shards.manifests import tokenization_hash, vocabulary_size
from entropy_masking.summary import Summary
from glue import blimp, finetune, metrics, pairs
from glue.batches import encode_task
from glue.protocols import RECIPE, Settings, grid_of
from glue.results import Result, read_result
from glue.tasks import ZERO_SHOT, Task, TaskData, load
from glue.trials import Trial, TrialTokens, run_on_ray, run_trial

MAX_NAMED = 5  # of the trials that failed

Data = Mapping[str, TaskData | blimp.Pairs]  # by task


@dataclass(frozen=True)
class Model:
    """A checkpoint and where its results go."""

    name: str
    path: str
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    tokenization_hash: str
    hash: str
    output: str
    training: object


def main(argv: list[str] | None = None) -> None:
    args = parse(argv, __doc__)
    models = {name: open_model(args, name, path) for name, path in args.models.items()}
    data = {task.name: load_data(args, task) for task in args.tasks}
    trials = [
        plan_trial(args, model, data[task.name], task, seed)
        for task in args.tasks
        for seed in ([blimp.SEED] if task.name in ZERO_SHOT else args.seeds)
        for model in models.values()
    ]
    todo = [trial for trial in trials if args.overwrite or not is_done(trial)]
    storage.write_bytes(flags := storage.join(args.output, "flags.yaml"), args.as_yaml.encode())
    tokens_of = shared_tokens(models, data, args.pll)
    failures: dict[str, str] = {}
    tunes = set(data) - set(ZERO_SHOT)
    with console.Progress(sum(trial.rows for trial in todo), "rows", "fine-tuning" if tunes else "scoring") as progress:
        for line in notes(args, data, trials, len(trials) - len(todo)):
            console.note(line)
        if args.num_workers > 1 and todo:
            outcomes = run_on_ray(todo, tokens_of, progress.advance, args.num_workers, args.gpus_per_worker)
        else:
            outcomes = ((trial, run_trial(trial, tokens_of(trial), progress.advance)) for trial in todo)
        for trial, outcome in outcomes:
            if isinstance(outcome, str):
                failures[str(trial)] = outcome
                console.note(f"{trial} failed: {outcome}")
            else:
                storage.write_json(trial.file, result := result_fields(trial, outcome, models[trial.model]))
                console.note(f"{trial}: {summary_line(result)}")
    finished = [trial for trial in trials if str(trial) not in failures]
    if lost := [file for file in (flags, *(trial.file for trial in finished)) if not storage.exists(file)]:
        raise RunError(f"{lost[0]} was deleted during the run; run the command again")
    for model in models.values():
        done = [trial.file for trial in finished if trial.model == model.name]
        print_results(model.output, [read_result(file) for file in done])
    if failures:
        named = "; ".join(f"{name} ({reason})" for name, reason in list(failures.items())[:MAX_NAMED])
        named += f"; and {len(failures) - MAX_NAMED} more" if len(failures) > MAX_NAMED else ""
        raise RunError(f"{len(failures)} of {len(todo)} failed: {named}; the same command tries them again")


def open_model(args: argparse.Namespace, name: str, path: str) -> Model:
    """Load the tokenizer and the hashes of a model. Raises UsageError if the tasks cannot be run with it."""
    directory = checkpoints.local_checkpoint(path)
    tokenizer = checkpoints.load_tokenizer(str(directory))
    vocab_size = checkpoints.load_config(directory, args.trust_remote_code).vocab_size
    size = vocabulary_size(tokenizer)
    if tokenizer.pad_token_id is None or size > vocab_size:
        raise UsageError(
            f"the tokenizer in {directory} has {size} tokens (padding: {tokenizer.pad_token}), but the model "
            f"has {vocab_size}; save the model's tokenizer there"
        )
    if any(task.name not in ZERO_SHOT for task in args.tasks):
        finetune.check_model(directory, args.max_length or Settings.max_length, args.trust_remote_code)
    if any(task.name in ZERO_SHOT for task in args.tasks):
        blimp.check_model(directory, tokenizer, args.pll, args.trust_remote_code)
    text_hash = tokenization_hash(tokenizer)
    output = storage.join(args.output, name) if name else args.output
    model_hash = storage.sha256_json([checkpoints.weights_hash(directory), text_hash])
    return Model(name, path, directory, tokenizer, text_hash, model_hash, output, read_summary(directory))


def read_summary(directory: Path) -> object:
    """The summary of a model that train/run.py pretrained; None for other models."""
    file = str(directory / "summary.json")
    try:
        summary = storage.read_json(file)
        is_ours = Summary.model_validate(summary).regime is not None
    except FileNotFoundError:
        return None
    except ValueError:
        is_ours = False
    if not is_ours:
        console.note(f"{file} is not a summary of train/run.py; the results will not contain it")
        return None
    return summary


def load_data(args: argparse.Namespace, task: Task) -> TaskData | blimp.Pairs:
    if task.name in ZERO_SHOT:
        if task.name == "pairs":
            return blimp.limited(pairs.make(), args.limit_pairs)
        return blimp.load(args.data, args.limit_pairs)
    data = load(task, args.data)
    return data.without_overlap() if args.drop_overlap else data


def plan_trial(args: argparse.Namespace, model: Model, data: TaskData | blimp.Pairs, task: Task, seed: int) -> Trial:
    """A trial under the protocol and the flags that override it; minimal pairs have one trial per model."""
    key: dict[str, object] = {"task": task.name, "seed": seed, "protocol": args.protocol}
    grid: tuple[Settings, ...] = ()
    if isinstance(data, blimp.Pairs):
        key |= {"protocol": blimp.PROTOCOL, "pll": args.pll, "limit_pairs": data.limit}
        rows, file = 2 * len(data.frame), f"{task.name}.json"
    else:
        names = ("learning_rate", "epochs", "batch_size", "max_length", "limit_train")
        changes = {name: getattr(args, name) for name in names} | {"dtype": checkpoints.resolve_dtype(args.dtype)}
        grid = grid_of(args.protocol, task.name, changes)
        key |= {"settings": {str(number): asdict(settings) for number, settings in enumerate(grid, 1)}}
        key |= {"recipe": RECIPE, "train_split": data.train_split}
        key |= {"metrics": [*data.task.metrics], "labels": [*data.task.labels]} if task.files else {}
        rows = sum(settings.epochs * min(len(data.train), settings.limit_train or sys.maxsize) for settings in grid)
        file = f"{task.name}-seed{seed}.json"
        task = data.task
    key |= {"data_hash": data.hash, "model_hash": model.hash}
    path = storage.join(model.output, file)
    return Trial(model.name, model.directory, task, seed, grid, rows, path, key, args.trust_remote_code)


def is_done(trial: Trial) -> bool:
    """Whether the result exists. Raises UsageError if its file holds another or an incomplete result."""
    try:
        previous = read_result(trial.file)
    except FileNotFoundError:
        return False
    except ValueError:
        raise UsageError(
            f"{trial.file} is not a result of glue/run.py; choose another --output, or pass --overwrite"
        ) from None
    if differing := differences(previous.key, trial.key):
        raise UsageError(
            f"{trial.file} has other settings ({'; '.join(differing)}); choose another --output, or pass --overwrite"
        )
    return True


def shared_tokens(models: Mapping[str, Model], data: Data, pll: str) -> Callable[[Trial], TrialTokens]:
    """A function that returns the tokens of a trial, made once for all trials with the same tokenizer and task."""
    made: dict[tuple[str, str], TrialTokens] = {}

    def tokens_of(trial: Trial) -> TrialTokens:
        model, own = models[trial.model], data[trial.task.name]
        key = model.tokenization_hash, trial.task.name
        if key in made:
            return made[key]
        if isinstance(own, blimp.Pairs):
            made[key] = blimp.encode(own, model.tokenizer, pll)
        else:
            settings = trial.grid[0]  # the grid varies only learning rates and epochs
            made[key] = encode_task(own, model.tokenizer, settings.max_length, settings.limit_train)
        return made[key]

    return tokens_of


def result_fields(trial: Trial, outcome: dict[str, object], model: Model) -> dict[str, object]:
    """The contents of the result file."""
    return {
        "task": trial.task.name,
        "seed": trial.seed,
        "protocol": trial.key["protocol"],
        "seconds": outcome.pop("seconds"),
        "device": outcome.pop("device"),
        "model": {"path": str(model.path), "hash": model.hash},
        "training": model.training,
        "key": trial.key,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
        **outcome,
    }


def notes(args: argparse.Namespace, data: Data, trials: list[Trial], done: int) -> list[str]:
    """The lines that are printed before the first trial."""
    lines = []
    if size := max(len(trial.grid) for trial in trials):
        grid = f"a grid of {size} settings; each trial reports the setting with the best dev score"
        lines.append(f"{args.protocol}: {grid if size > 1 else 'one setting'}")
    for name, own in data.items():
        if isinstance(own, TaskData) and own.task.files:
            classes = ", ".join(own.task.labels[:MAX_NAMED]) + ", …" * (len(own.task.labels) > MAX_NAMED)
            kind = f"{len(own.task.labels)} classes ({classes})" if classes else "a regression"
            lines.append(f"{name}: {kind}, by {' and '.join(own.task.metrics)}")
        if isinstance(own, TaskData) and own.overlap:
            rows = sum(map(len, own.evaluations.values()))
            lines.append(
                f"{name}: {own.overlap:,} of {rows:,} evaluation rows are also training rows; see --drop-overlap"
            )
    return lines + ([f"{done} of {len(trials)} results exist already"] if done else [])


def summary_line(result: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.3f}" for name, value in result["metrics"].items())
    collapsed = ", predicts the same for every row" if result["collapsed"] else ""
    return f"{result['score']:.1f} ({values}{collapsed}) in {result['seconds']:.0f} s"


def print_results(output: str, results: list[Result]) -> None:
    """Print for each task the mean score, the scores by seed and the mean of each metric; then the named averages."""
    print(f"{output}: {len(results)} results")
    by_task: dict[str, dict[int, Result]] = {}
    for result in results:
        by_task.setdefault(result.task, {})[result.seed] = result
    for task, by_seed in by_task.items():
        first, *_ = own = list(by_seed.values())
        means = {name: statistics.fmean(result.metrics[name] for result in own) for name in first.metrics}
        raw = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        collapsed = sum(result.collapsed for result in own)
        count = f"   {collapsed} of {len(own)} predict the same for every row" if collapsed else ""
        print_scores(task, [result.score for result in own], f"   ({raw}){count}")
        for field, value in first.fields.items():
            print(f"    {field:<18} {100 * value:5.1f}")
    raw_metrics = {task: {seed: result.metrics for seed, result in own.items()} for task, own in by_task.items()}
    for name in metrics.AVERAGES:
        with contextlib.suppress(metrics.IncompleteAverage):
            print_scores(name, list(metrics.averages_by_seed(name, raw_metrics).values()))
    work = "fine-tuning" if set(by_task) - set(ZERO_SHOT) else "scoring"
    print(f"  {sum(result.seconds for result in results):,.0f} s of {work}")


def print_scores(name: str, scores: list[float], more: str = "") -> None:
    print(f"  {name:<12} {statistics.fmean(scores):5.1f}   {' '.join(f'{score:.1f}' for score in scores)}{more}")


if __name__ == "__main__":
    console.run(main)
