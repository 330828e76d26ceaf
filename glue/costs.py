"""What a regime costs: training, scoring, storage; and when scores that are made once pay. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

# numbers of a run's summary, averaged over its pretraining seeds
NUMBERS = ("steps", "tokens", "seconds", "tokens_per_second", "training_flops", "scoring_seconds", "scoring_flops")
ONLINE = "online teacher"
UNITS = {"flops": ("training_flops", "scoring_flops"), "seconds": ("seconds", "scoring_seconds")}


def cost(summaries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The bill of one student of a regime, a mean over its pretraining seeds; None without summaries.

    Besides ``NUMBERS`` it has, None where a summary does not say:

    - ``total_flops``, ``total_seconds``: training, and all of the scoring, as if there were no other student;
    - ``bytes``: of the shards and targets that the run was given;
    - ``corpus_tokens``: of the shards, padding and held-out ones included;
    - ``online_flops``, ``online_seconds``: of a teacher in memory, a token of a student's batch. To mask by its scores
      it makes all the passes over a row that the shards took, and has their top-k from the same passes. To distil from
      exact targets it makes one more over the student's input, at what they cost a token and variant; a student that
      masks otherwise and distils from the shards has one of their passes made, which hides about as many positions.

    Scores are made once for all seeds; the scoring of targets that each seed has of its own is averaged.
    """
    if not summaries:
        return None
    found: dict[str, Any] = {name: summaries[0].get(name) for name in ("regime", "model")} | {"n": len(summaries)}
    found |= {name: _mean([number(summary.get(name)) for summary in summaries]) for name in NUMBERS}
    parts = [_of_directories(summary) for summary in summaries]
    found |= {name: _mean([part.get(name) for part in parts]) for name in ("bytes", "corpus_tokens")}
    for unit, (training, scoring) in UNITS.items():
        found[f"total_{unit}"] = _sum(found[training], found[scoring])
        found[f"online_{unit}"] = _mean([part.get(f"online_{unit}") for part in parts])
    return found


def _of_directories(summary: dict[str, Any]) -> dict[str, float | None]:
    shards, targets = _dict(summary.get("shards")), _dict(summary.get("targets"))
    size = number(shards.get("bytes"))
    found: dict[str, float | None] = {
        "bytes": None if size is None else size + (number(targets.get("bytes")) or 0),
        "corpus_tokens": _tokens(shards),
    }
    source, _, distils = str(summary.get("regime")).partition("+")
    for unit, name in (("flops", "flops"), ("seconds", "worker_seconds")):
        row = _ratio(number(shards.get(name)), found["corpus_tokens"])
        needs = [row] if source == "parquet" else []
        if distils and targets:
            needs.append(_ratio(number(targets.get(name)), _tokens(targets)))
        elif distils and not needs:
            needs.append(_ratio(row, shards.get("passes")))
        found[f"online_{unit}"] = _sum(*needs) if needs else None
    return found


def _tokens(directory: dict[str, Any]) -> float | None:
    rows, length = number(directory.get("sequences")), number(directory.get("sequence_length"))
    return None if rows is None or length is None else rows * length


def break_even(once: float, extra: float) -> float | None:
    """How much has to be trained, over all epochs and students, until what is paid once is cheaper.

    Args:
        once: what is paid before.
        extra: what the other way costs more, a token trained.

    Returns:
        Tokens; 0 if it is cheaper from the start, None if it never is.
    """
    if once <= 0:
        return 0.0 if extra >= 0 else None
    return once / extra if extra > 0 else None


def break_evens(costs: dict[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """For each regime that reads scores: when they are cheaper than a teacher in memory, or than self-masking.

    The teacher in memory makes at each batch what the regime would read. Self-masking is any regime that masks by the
    student's own scores, with distillation or without, as the other. In FLOPs and in seconds: ``tokens`` (see
    ``break_even``), ``epochs`` of the corpus and ``students`` of as many tokens as this one.
    """
    rows = []
    for name, own in costs.items():
        if not own or not own["scoring_flops"]:
            continue
        source, _, distils = str(own["regime"]).partition("+")
        others = {
            other: row
            for other, row in costs.items()
            if row and source == "parquet" and str(row["regime"]).partition("+")[::2] == ("self", distils)
        }
        for against in (ONLINE, *others):
            row: dict[str, Any] = {"regime": name, "against": against}
            for unit, (training, scoring) in UNITS.items():
                if against == ONLINE:
                    once, extra = own[scoring], own[f"online_{unit}"]
                else:
                    once = _sum(own[scoring], _negative(others[against][scoring]))
                    extra = _sum(_a_token(others[against], training), _negative(_a_token(own, training)))
                row[unit] = None
                if once is not None and extra is not None:
                    tokens = break_even(once, extra)
                    row[unit] = {
                        "once": once,
                        "extra_per_token": extra,
                        "tokens": tokens,
                        "epochs": _ratio(tokens, own["corpus_tokens"]),
                        "students": _ratio(tokens, own["tokens"]),
                    }
            rows.append(row)
    return rows


def number(value: Any) -> float | None:
    """A number of a summary; None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    mean = statistics.fmean(known)
    return int(mean) if all(isinstance(value, int) for value in known) and mean == int(mean) else mean


def _sum(*values: float | None) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def _a_token(row: dict[str, Any], name: str) -> float | None:
    return _ratio(row[name], row["tokens"])
