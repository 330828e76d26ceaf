"""What shards cost and hold in all: the totals of a manifest, and the costs by worker, from the shards' records."""

from collections import Counter
from typing import Any

from entropy_masking.shards.schema import Record


def busy_seconds(records: list[Record]) -> float:
    """Seconds in which at least one of these shards was in progress."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((record.ended - record.seconds, record.ended) for record in records):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def worker_costs(records: list[Record]) -> dict[str, dict[str, float]]:
    """By worker: shards, tokens or positions, busy ``seconds``, ``forward_seconds`` inside the model, and the rate.

    A worker prepares one shard while it scores another, so its seconds are the union of its shards' times, not the sum.
    """
    costs = {}
    for worker in sorted({record.worker for record in records}):
        own = [record for record in records if record.worker == worker]
        seconds, tokens = busy_seconds(own), sum(record.tokens_or_positions for record in own)
        costs[worker] = {
            "shards": len(own),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "forward_seconds": round(sum(record.forward_seconds for record in own), 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-3), 1),
        }
    return costs


def totals(records: list[Record]) -> dict[str, Any]:
    """The sums in a manifest and in the summary of a run."""
    workers = worker_costs(records)
    worker_seconds = sum(cost["seconds"] for cost in workers.values())
    forward = sum(cost["forward_seconds"] for cost in workers.values())
    names = ("tokens", "scored_tokens", "bytes", "entropy_sum", "documents", "flops")
    return {name: sum(getattr(record, name) for record in records) for name in names} | {
        "sequences": sum(record.rows for record in records),
        "longest_document": max((record.longest_document or 0 for record in records), default=0),
        "seconds": round(busy_seconds(records), 3),
        "worker_seconds": round(worker_seconds, 3),
        "forward_seconds": round(forward, 3),
        "utilisation": round(forward / max(worker_seconds, 1e-3), 4),
        "workers": len(workers),
        "by_worker": workers,
        "rescued_shards": sum(record.batch_tokens is not None for record in records),
        "rejected": sum(record.rejected.count for record in records),
        "rejected_reasons": dict(sum((Counter(record.rejected.reasons) for record in records), Counter())),
    }
