"""Trials (model × task × seed): their settings, and many of them in this process or on Ray."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from entropy_masking.commands import ray_cluster
from entropy_masking.errors import RunError, UsageError, one_line
from glue import blimp, metrics
from glue.batches import TaskTokens
from glue.finetune import finetune
from glue.protocols import Settings
from glue.tasks import Task

THREADS = torch.get_num_threads()  # read at import: 1 inside a Ray worker

logging.set_verbosity_error()  # hide the warning that the weights of the head are new; Ray's workers import this too

TrialTokens = TaskTokens | blimp.Sentences
Outcome = dict[str, object] | str  # of a trial: its part of the result file, or the reason of its failure


@dataclass(frozen=True)
class Trial:
    """A model, a task and a seed, tried with each setting of a grid. A trial of minimal pairs has no grid.

    Attributes:
        key: everything that decides the result.
        file: the result file.
        rows: training rows over the whole grid; sentences of minimal pairs.
        trust_remote_code: whether code of the checkpoint may run.
    """

    model: str
    directory: Path
    task: Task
    seed: int
    grid: tuple[Settings, ...]
    rows: int
    file: str
    key: dict[str, object]
    trust_remote_code: bool

    def __str__(self) -> str:
        return f"{self.model} {self.task.name}{f' seed {self.seed}' if self.grid else ''}".strip()


def run_trial(trial: Trial, tokens: TrialTokens, advance: Callable[[int], None] = lambda rows: None) -> Outcome:
    """Fine-tune, or score sentences. A failure does not stop the other trials."""
    started = time.monotonic()
    result: dict[str, object]
    try:
        if isinstance(tokens, blimp.Sentences):
            torch.set_num_threads(THREADS)
            result = {"settings": {name: trial.key[name] for name in ("pll", "limit_pairs")}}
            result |= blimp.evaluate(trial.directory, tokens, advance, trial.trust_remote_code)
        else:
            torch.set_num_threads(1)  # several threads slow such small steps down, and round sums differently
            result = search(trial, tokens, advance)
    except Exception as error:
        kind = "" if isinstance(error, UsageError | RunError) else f"{type(error).__name__}: "
        return kind + one_line(error)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"seconds": round(time.monotonic() - started, 2), "device": device, **result}


def search(trial: Trial, tokens: TaskTokens, advance: Callable[[int], None]) -> dict[str, object]:
    """The first setting of the grid with the best dev score, and the results of the whole grid."""
    grid: list[dict[str, Any]] = []
    for settings in trial.grid:
        values, collapsed = finetune(trial.directory, tokens, settings, trial.seed, advance, trial.trust_remote_code)
        own = {"score": metrics.score(values), "metrics": values, "collapsed": collapsed}
        grid.append(asdict(settings) | own)
    number, best = max(enumerate(grid), key=lambda pair: pair[1]["score"])
    labels = [rows.labels for rows in tokens.evaluations.values()]
    return {
        "settings": asdict(trial.grid[number]),
        **{name: best[name] for name in ("metrics", "score", "collapsed")},
        "constant_score": metrics.constant_score(trial.task.metrics, labels, len(trial.task.labels)),
        "train_split": tokens.train_split,
        "train_rows": len(tokens.train),
        "eval_rows": sum(map(len, labels)),
        "overlap": tokens.overlap,
        "grid": grid,
    }


def run_on_ray(
    trials: list[Trial],
    tokens_of: Callable[[Trial], TrialTokens],
    advance: Callable[[int], None],
    workers: int,
    gpus_per_worker: float | None,
) -> Iterator[tuple[Trial, Outcome]]:
    """Run at most ``workers`` trials at once as Ray tasks, the largest first; yields them as they end.

    A task has a GPU (or a share of one) if the cluster has any, else a CPU. If a worker dies, its trial fails. Workers
    read the models from their paths; the tokens come through Ray's object store, one copy per node.

    Raises:
        UsageError: ``gpus_per_worker`` is given, but the cluster has no GPUs.
    """
    ray_cluster.connect("glue", cpus=workers)
    import ray

    try:
        on_gpus = ray.cluster_resources().get("GPU", 0) > 0
        if gpus_per_worker and not on_gpus:
            raise UsageError("--gpus-per-worker needs a cluster with GPUs; leave it out")
        resources = {"num_cpus": 0, "num_gpus": gpus_per_worker or 1} if on_gpus else {"num_cpus": 1}
        task: Any = ray.remote(**resources, max_retries=0)(run_trial)
        waiting = sorted(trials, key=lambda trial: trial.rows)  # the last one runs next
        stored: dict[int, Any] = {}  # references to tokens that are in the object store
        running: dict[Any, Trial] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                trial = waiting.pop()
                tokens = tokens_of(trial)
                if id(tokens) not in stored:
                    stored[id(tokens)] = ray.put(tokens)
                running[task.remote(trial, stored[id(tokens)])] = trial
            (ended,), _ = ray.wait(list(running), num_returns=1)
            trial = running.pop(ended)
            try:
                outcome = ray.get(ended)
            except ray.exceptions.RayError as error:
                outcome = f"its worker died ({one_line(error)})"
            advance(trial.rows)
            yield trial, outcome
    finally:
        ray_cluster.disconnect()
