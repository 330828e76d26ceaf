"""The trials of a table, model × task × seed: what decides one, and working on many, in this process or on Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entropy_masking.commands import ray_cluster
from entropy_masking.errors import RunError, UsageError, one_line
from glue import blimp
from glue.batches import TaskTokens
from glue.finetune import Result, finetune
from glue.protocols import Settings
from glue.tasks import Task

THREADS = torch.get_num_threads()  # one in a worker of Ray


@dataclass(frozen=True)
class Trial:
    """A model, a task and a seed, tried with each setting of a grid; of BLiMP a model, without a grid.

    Attributes:
        key: all that decides the result.
        file: of the result.
        rows: training rows over the whole grid, to the last batch's rounding; of BLiMP sentences.
    """

    model: str
    directory: Path
    task: Task
    seed: int
    grid: tuple[Settings, ...]
    rows: int
    file: str
    key: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.model} {self.task.name}{f' seed {self.seed}' if self.grid else ''}".strip()


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: the results of its grid, or BLiMP's scores of the sentences, or why it failed."""

    found: list[tuple[Settings, Result]] = field(default_factory=list)
    seconds: float = 0.0
    device: str = ""
    failure: str = ""
    scores: np.ndarray | None = None


Work = Iterator[tuple[Trial, Outcome]]
TrialTokens = TaskTokens | blimp.Sentences
TokensOf = Callable[[Trial], TrialTokens]


def work_on(trial: Trial, tokens: TrialTokens, advance: Callable[[int], None] = lambda rows: None) -> Outcome:
    """Fine-tune with each setting, or score sentences. What goes wrong is an outcome: the other trials go on."""
    found, scores = [], None
    started = time.monotonic()
    try:
        if isinstance(tokens, blimp.Sentences):
            torch.set_num_threads(THREADS)
            scores = blimp.score(trial.directory, tokens, advance)
        else:
            torch.set_num_threads(1)  # several slow such small steps down; and sums come out the same beside any others
            found = [
                (settings, finetune(trial.directory, tokens, settings, trial.seed, advance)) for settings in trial.grid
            ]
    except Exception as error:
        kind = "" if isinstance(error, UsageError | RunError) else f"{type(error).__name__}: "
        return Outcome(failure=kind + one_line(error))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Outcome(found, time.monotonic() - started, device, scores=scores)


def work_here(trials: list[Trial], tokens_of: TokensOf, advance: Callable[[int], None]) -> Work:
    """One trial after the other."""
    for trial in trials:
        yield trial, work_on(trial, tokens_of(trial), advance)


def work_on_ray(
    trials: list[Trial], tokens_of: TokensOf, advance: Callable[[int], None], workers: int, gpus_per_worker: float
) -> Work:
    """The largest trials first, each to an actor that is up and free; yields them as they end.

    An actor has a GPU (or a share of one) where the cluster has any, else a CPU. One that dies costs its trial.
    Workers read the models where they are; the tokens come through Ray's object store, one copy a node.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray_cluster.connect("glue", cpus=workers)
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        actor_class: Any = ray.remote(**({"num_gpus": gpus_per_worker} if gpus else {"num_cpus": 1}))(_Worker)
        waiting = sorted(trials, key=lambda trial: -trial.rows)
        shared: dict[int, Any] = {}  # tokens that are in the object store
        busy: dict[Any, tuple[Any, Trial | None]] = {}  # what an actor will return → it, and its trial

        def start_actor() -> None:
            actor = actor_class.remote()
            busy[actor.ready.remote()] = actor, None

        for _ in range(min(workers, len(trials))):
            start_actor()
        while waiting or any(trial for _, trial in busy.values()):
            (ended,), _ = ray.wait(list(busy), num_returns=1)
            actor, trial = busy.pop(ended)
            try:
                outcome = ray.get(ended)
            except ray.exceptions.RayError as error:
                if trial is None:  # it could not even start: nor would another
                    raise RunError(f"a worker did not start ({one_line(error)})") from None
                outcome, actor = Outcome(failure=f"its worker died ({one_line(error)})"), None
            if trial:
                advance(trial.rows)
                yield trial, outcome
            if waiting and actor is None:
                start_actor()
            elif waiting:
                following = waiting.pop(0)
                tokens = tokens_of(following)
                if id(tokens) not in shared:
                    shared[id(tokens)] = ray.put(tokens)
                busy[actor.work_on.remote(following, shared[id(tokens)])] = actor, following
    finally:
        ray.shutdown()


class _Worker:
    """An actor; its process keeps what it has imported for the next trial."""

    def ready(self) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def work_on(self, trial: Trial, tokens: TrialTokens) -> Outcome:
        return work_on(trial, tokens)
