"""The costs of a regime (training, scoring, storage), and when offline scores pay. Pure.

A missing number is nan during the computation, so everything computed from it is nan too. In the result nan is None.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from entropy_masking.summary import Directory, Summary

# numbers of a run's summary, averaged over its pretraining seeds
NUMBERS = ("steps", "tokens", "seconds", "tokens_per_second", "training_flops", "scoring_seconds", "scoring_flops")
ONLINE = "online teacher"
UNITS = {"flops": ("training_flops", "scoring_flops"), "seconds": ("seconds", "scoring_seconds")}

Cost = dict[str, Any]


def cost(summaries: Sequence[Summary]) -> Cost | None:
    """The cost of one student of a regime, a mean over its pretraining seeds; None without summaries.

    It has ``NUMBERS`` and these numbers, which are None if a summary lacks them:

    - ``bytes`` of the shards and targets of the run; ``corpus_tokens`` of the shards, with padding;
    - ``total_flops``, ``total_seconds``: training and the whole scoring, as if there were no other student;
    - ``online_flops``, ``online_seconds`` of a teacher in memory per token of a student's batch: see ``_online``.
    """
    if not summaries:
        return None
    each = [_numbers(summary) for summary in summaries]
    means = {name: statistics.mean([own[name] for own in each]) for name in each[0]}  # of equal integers, the integer
    row: Cost = {"regime": summaries[0].regime, "model": summaries[0].model, "n": len(summaries)}
    return row | {name: _or_none(value) for name, value in means.items()}


def _numbers(summary: Summary) -> dict[str, float]:
    """The numbers of ``cost`` for one run."""
    shards, targets = summary.shards or Directory(), summary.targets or Directory()
    numbers = {name: _known(getattr(summary, name)) for name in NUMBERS}
    numbers |= {"bytes": _known(shards.bytes) + (targets.bytes or 0), "corpus_tokens": _tokens(shards)}
    for unit, (training, scoring) in UNITS.items():
        numbers[f"total_{unit}"] = numbers[training] + numbers[scoring]
        numbers[f"online_{unit}"] = _online(summary, unit)
    return numbers


def break_even(once: float, extra: float) -> float | None:
    """The number of trained tokens from which a cost ``once`` is lower than a cost ``extra`` per token.

    0 if it is cheaper from the start, None if it never is.
    """
    if once <= 0:
        return 0.0 if extra >= 0 else None
    return once / extra if extra > 0 else None


def break_evens(costs: Mapping[str, Cost | None]) -> list[dict[str, object]]:
    """For each regime that reads scores: when they become cheaper than a teacher in memory, or than self-masking.

    Self-masking means all regimes that mask by the student's own scores and distil exactly if this one does. Each row
    has, in FLOPs and in seconds, ``tokens`` (see ``break_even``), ``epochs`` of the corpus and ``students`` with the
    tokens of one student of this regime.
    """
    rows: list[dict[str, object]] = []
    for name, own in costs.items():
        if not own or not own["scoring_flops"]:
            continue
        source, distils = _source(own["regime"])
        rivals = {other: row for other, row in costs.items() if row and _source(row["regime"]) == ("self", distils)}
        others = {ONLINE: None} | (rivals if source == "parquet" else {})
        for against, other in others.items():
            pays = {unit: _pays(own, other, unit) for unit in UNITS}
            rows.append({"regime": name, "against": against, **pays})
    return rows


def _pays(own: Cost, other: Cost | None, unit: str) -> dict[str, float | None] | None:
    """When a regime becomes cheaper than another, or than an online teacher; None if a cost is unknown."""
    training, scoring = UNITS[unit]
    once, extra = _known(own[scoring]), _known(own[f"online_{unit}"])
    if other:
        once -= _known(other[scoring])
        extra = _ratio(other[training], other["tokens"]) - _ratio(own[training], own["tokens"])
    if math.isnan(once + extra):
        return None
    tokens = break_even(once, extra)
    return {
        "once": once,
        "extra_per_token": extra,
        "tokens": tokens,
        "epochs": _or_none(_ratio(tokens, own["corpus_tokens"])),
        "students": _or_none(_ratio(tokens, own["tokens"])),
    }


def _online(summary: Summary, unit: str) -> float:
    """Cost of a teacher in memory per token of a batch; nan for a regime without a teacher.

    Masks by its scores need as many passes over a row as the shards did; they give the top-k too. Exact targets need
    one more pass over the student's input, which costs what the targets cost per token and variant. A student that
    distils from the shards but masks in another way needs one pass of the shards.
    """
    name = "worker_seconds" if unit == "seconds" else unit
    source, distils = _source(summary.regime)
    shards, targets = summary.shards or Directory(), summary.targets
    row = _ratio(getattr(shards, name), _tokens(shards))
    if distils and targets:
        exact = _ratio(getattr(targets, name), _tokens(targets))
        return row + exact if source == "parquet" else exact
    if source == "parquet":
        return row
    return _ratio(row, shards.passes) if distils else math.nan


def _source(regime: object) -> tuple[str, bool]:
    """The source of the masks of a regime such as ``parquet+kd``, and whether it distils."""
    source, plus, _ = str(regime).partition("+")
    return source, bool(plus)


def _tokens(directory: Directory) -> float:
    return _known(directory.sequences) * _known(directory.sequence_length)


def _ratio(value: float | None, by: float | None) -> float:
    return _known(value) / by if by else math.nan


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
