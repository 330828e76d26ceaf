"""Two ways to run shards through ``ShardScorer``: actors on a Ray cluster, or this process. Both yield records."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from pipeline.cli import UsageError
from pipeline.documents import Piece
from pipeline.job import Job

OBJECT_STORE_BYTES = 128 << 20  # descriptors and records are small; Ray would reserve a third of the memory
Shard = tuple[int, list[Piece]]


def local_records(job: Job, todo: list[Shard], workers: int | None = None) -> Iterator[dict[str, Any]]:
    """Score shards in this process, in order; yields each record as its shard is committed."""
    from pipeline.worker import ShardScorer

    scorer = ShardScorer(replace(job, threads=psutil.cpu_count(logical=False) or 1))
    for index, pieces in todo:
        yield _record_or_error(scorer, index, pieces)


def ray_records(job: Job, todo: list[Shard], workers: int | None = None) -> Iterator[dict[str, Any]]:
    """Score shards on Ray Data's actor pool, on the cluster that ``ray.init`` finds, else on a local one.

    The dataset's items are shard descriptors: an actor commits its own file and hands back the record only, so that
    a retried item can do no harm. Yields records as shards are committed, in any order.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    _connect()
    try:
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1)
        threads_per_core = (psutil.cpu_count() or 1) / (psutil.cpu_count(logical=False) or 1)
        fitting = gpus or max(1, int(cpus / threads_per_core))
        pool = min(workers or fitting, len(todo))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts tokens
        context.print_on_execution_start = False
        context.execution_options.preserve_order = False
        items = [{"index": index, "pieces": json.dumps([asdict(piece) for piece in pieces])} for index, pieces in todo]
        records = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            RayShardScorer,
            fn_constructor_kwargs={"job": job},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=min(pool, fitting), max_size=pool),
            num_gpus=1 if gpus else None,
            num_cpus=None if gpus else min(threads_per_core, cpus / pool),
        )
        for row in records.iter_rows():
            yield json.loads(row["record"])
    finally:
        ray.shutdown()


class RayShardScorer:
    """Ray Data's view of ``ShardScorer``: one descriptor in, one record out, both as JSON."""

    def __init__(self, job: Job) -> None:
        from pipeline.worker import ShardScorer

        self.scorer = ShardScorer(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        pieces = [Piece(**fields) for fields in json.loads(batch["pieces"][0])]
        return {"record": [json.dumps(_record_or_error(self.scorer, int(batch["index"][0]), pieces))]}


def _record_or_error(scorer: Any, index: int, pieces: list[Piece]) -> dict[str, Any]:
    """A shard that raises must not end the others: its error comes back in place of its record."""
    try:
        return scorer(index, pieces)
    except UsageError as error:
        return {"index": index, "error": str(error), "usage": True}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return {"index": index, "error": reason, "traceback": traceback.format_exc()}


def _connect() -> None:
    """Join the cluster of RAY_ADDRESS, of the submitted job or of this machine; else start one for this run."""
    import ray

    settings: dict[str, Any] = {
        "runtime_env": {"py_modules": [str(Path(__file__).resolve().parent)]},
        "log_to_driver": False,
        "logging_level": "warning",
    }
    try:
        ray.init(address="auto", **settings)
    except ConnectionError:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **settings)
