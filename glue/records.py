"""The JSON files that a comparison reads, as models: results of glue/run.py, and summaries of train/run.py in them.

A summary may come from an older version or from another program. Then a value that is missing or of a wrong type is
None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, WrapValidator, model_validator

from glue.tasks import TASKS

T = TypeVar("T")


def _none_if_wrong(value: object, validate: Callable[[object], object]) -> object:
    try:
        return validate(value)
    except ValidationError:
        return None


Known = Annotated[T | None, WrapValidator(_none_if_wrong)]
Number = Known[int | float]


class Tolerant(BaseModel):
    """A JSON file of which only the fields of the model are read."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Directory(Tolerant):
    """The shards or targets that a model was trained on. Only targets have ``source``, ``variants`` and ``policy``."""

    sequences: Number = None
    sequence_length: Number = None
    bytes: Number = None
    flops: Number = None
    worker_seconds: Number = None
    passes: Number = None
    sequences_hash: Known[str] = None
    context: object = None
    source: Known[str] = None
    variants: Known[int] = None
    policy: Known[dict[str, object]] = None


class Summary(Tolerant):
    """``summary.json`` of train/run.py: how a model was pretrained. ``history`` is its training curve."""

    regime: Known[str] = None
    model: Known[str] = None
    seed: int | None = None
    steps: Number = None
    tokens: Number = None
    seconds: Number = None
    tokens_per_second: Number = None
    training_flops: Number = None
    scoring_seconds: Number = None
    scoring_flops: Number = None
    eval_loss: Number = None
    shards: Known[Directory] = None
    targets: Known[Directory] = None
    eval_shards: Known[Directory] = None
    history: Known[list[dict[str, Number]]] = None
    flags: Known[dict[str, object]] = None


class Result(Tolerant):
    """The fields of a result file that a comparison needs."""

    task: str
    seed: int
    protocol: str
    settings: dict[str, object] = {}
    metrics: dict[str, float]
    score: float
    fields: dict[str, float] = {}
    collapsed: bool
    constant_score: float
    train_split: str
    train_rows: int
    eval_rows: int
    overlap: int
    seconds: float
    training: Summary | None
    key: dict[str, object]

    @model_validator(mode="after")
    def has_the_metrics_of_its_task(self) -> Self:
        if self.task not in TASKS or not TASKS[self.task].metric_names <= self.metrics.keys():
            raise ValueError(f"{self.task} is not a task, or lacks metrics")
        return self
