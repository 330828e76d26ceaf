"""``summary.json`` as a model: how a student was trained, its results and its costs. See docs/training.md.

train/run.py writes it, and glue/ reads it. A file that is read may come from an older version or from another program.
Then a value that is missing or of a wrong type is None.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator

T = TypeVar("T")
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
LEARNED = 0.3  # a model has learned something if its loss is this many nats below that of the token frequencies
LARGEST = 1e30  # larger numbers cannot be measurements, and would overflow later


def _none_if_wrong(value: object, validate: Callable[[object], object]) -> object:
    try:
        return validate(value)
    except ValidationError:
        return None


Known = Annotated[T | None, WrapValidator(_none_if_wrong)]
Number = Known[Annotated[int | float, Field(ge=-LARGEST, le=LARGEST)]]


class Tolerant(BaseModel):
    """A JSON file of which only the fields of the model are read."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Directory(Tolerant):
    """The shards or targets that a model was trained or evaluated on, and their costs."""

    uri: Known[str] = None
    fingerprint_hash: Known[str] = None
    sequences_hash: Known[str] = None
    passes: Number = None
    sequence_length: Number = None
    sequences: Number = None
    bytes: Number = None
    flops: Number = None
    worker_seconds: Number = None
    context: object = None  # of shards, like the next two fields
    teacher: Known[str] = None
    scores_read: Known[bool] = None
    source: Known[str] = None  # of targets, like the next three fields
    policy: Known[dict[str, object]] = None
    variants: Known[int] = None
    positions: Known[int] = None


class Summary(Tolerant):
    """``summary.json``, with fields in the order of the file."""

    regime: Known[str] = None
    model: Known[str] = None
    steps: Number = None
    tokens: Number = None
    seconds: Number = None
    tokens_per_second: Number = None
    train_loss: Number = None
    eval_loss: Number = None
    eval_accuracy: Number = None
    eval_positions: Number = None
    eval_unigram_loss: Number = None
    eval_loss_by_entropy_decile: Known[Sequence[Number]] = None
    training_flops: Number = None
    scoring_seconds: Number = None
    scoring_flops: Number = None
    shards: Known[Directory] = None
    targets: Known[Directory] = None
    eval_shards: Known[Directory] = None
    seed: Known[Seed] = None
    warnings: Known[Sequence[str]] = None
    history: Known[Sequence[Mapping[str, Number]]] = None  # the losses as a curve
    flags: Known[dict[str, object]] = None
    versions: Known[dict[str, str]] = None

    @property
    def learned_little(self) -> bool:
        """Whether the held-out loss is not much lower than that of the token frequencies alone."""
        loss, guess = self.eval_loss, self.eval_unigram_loss
        return loss is not None and guess is not None and loss > guess - LEARNED
