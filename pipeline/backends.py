"""Two ways to run shards through ``ShardScorer``: actors on a Ray cluster, or this process. Both yield records."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from pipeline import commit, shards, storage
from pipeline.cli import UsageError
from pipeline.documents import Piece
from pipeline.job import Job

OBJECT_STORE_BYTES = 128 << 20  # descriptors and records are small; Ray would reserve a third of the memory
CONNECT_SECONDS = 10.0
STOP_SECONDS = 10.0
VISIBLE_SECONDS = 60.0  # NFS shows another node's file late
Shard = tuple[int, list[Piece]]


def local_records(job: Job, todo: list[Shard]) -> Iterator[dict[str, Any]]:
    """Score shards in this process; yields each record (or error) as its shard ends."""
    from pipeline.worker import SHARDS_AT_ONCE, ShardScorer

    scorer, waiting = ShardScorer(job), iter(todo)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        try:
            running = {pool.submit(scorer, *shard) for _, shard in zip(range(SHARDS_AT_ONCE), waiting, strict=False)}
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(scorer, *shard) for _, shard in zip(ended, waiting, strict=False)}
                for future in ended:
                    yield future.result()
        except BaseException:
            scorer.stop()
            raise


def ray_records(
    job: Job, todo: list[Shard], workers: int | None = None, gpus_per_worker: float | None = None
) -> Iterator[dict[str, Any]]:
    """Score shards on Ray Data's actor pool, on the cluster that ``ray.init`` finds, else on a local one.

    The dataset's items are shard descriptors: an actor commits its own file and hands back the record only, so that
    a retried item can do no harm. The pool grows onto nodes that join later. Yields records (or errors) as shards end,
    in any order.

    Raises:
        UsageError: no worker fits the cluster, or a committed shard cannot be seen from here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from pipeline.worker import SHARDS_AT_ONCE

    connect("pipeline")
    try:
        fitting, resources = _fit(
            [node["Resources"] for node in ray.nodes() if node["Alive"]], job.threads, gpus_per_worker
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts tokens
        context.print_on_execution_start = False
        context.execution_options.preserve_order = False
        # every worker has all the shards that it may have at once: then the pool may grow, if there is room
        context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        most = min(workers or len(todo), len(todo))
        items = [{"index": index, "pieces": json.dumps([asdict(piece) for piece in pieces])} for index, pieces in todo]
        records = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ScoreShard,
            fn_constructor_kwargs={"job": job},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=most,
                initial_size=min(fitting, most),
                max_tasks_in_flight_per_actor=SHARDS_AT_ONCE,
                max_concurrent_calls_per_actor=SHARDS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            **resources,
        )
        records.set_name(f"score {job.output.rstrip('/').rpartition('/')[2]}")
        for row in records.iter_rows():
            record = json.loads(row["record"])
            if "error" not in record:
                _check_visible(job.output, record)
            yield record
    finally:
        below = psutil.Process().children(recursive=True)  # a cluster of this run's own
        ray.shutdown()
        psutil.wait_procs(below, timeout=STOP_SECONDS)
        commit.delete_leftovers(job.output)  # of workers that were ended in the middle of a shard


class ScoreShard:
    """Ray Data's view of ``ShardScorer``: one descriptor in, one record out, both as JSON; counts tokens for Ray."""

    def __init__(self, job: Job) -> None:
        from ray.util.metrics import Counter, Gauge

        from pipeline.worker import ShardScorer

        self.scorer = ShardScorer(job)
        tags = {"output": job.output, "worker": f"{os.uname().nodename}:{os.getpid()}"}
        self.tokens = Counter("scoring_tokens", "tokens scored and committed", tuple(tags))
        self.rate = Gauge("scoring_tokens_per_second", "tokens of the last shard over its seconds", tuple(tags))
        self.tokens.set_default_tags(tags)
        self.rate.set_default_tags(tags)
        self.last = time.monotonic()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        pieces = [Piece(**fields) for fields in json.loads(batch["pieces"][0])]
        record = self.scorer(int(batch["index"][0]), pieces)
        if tokens := record.get("scored_tokens") or record.get("tokens"):
            now = time.monotonic()
            self.tokens.inc(tokens)
            self.rate.set(tokens / max(now - self.last, 1e-3))
            self.last = now
        return {"record": [json.dumps(record)]}


def _fit(nodes: list[dict[str, float]], threads: int, gpus_per_worker: float | None) -> tuple[int, dict[str, Any]]:
    """How many workers the nodes hold now, and the resources of one; a worker lives on one node.

    Raises:
        UsageError: not even one fits.
    """
    gpus, cpus = ([node.get(name, 0) for node in nodes] for name in ("GPU", "CPU"))
    if gpus_per_worker and not any(gpus):
        raise UsageError("--gpus-per-worker needs a cluster with GPUs; leave it out")
    if any(gpus):
        each = gpus_per_worker or 1
        if each > max(gpus):
            raise UsageError(f"--gpus-per-worker {each:g} is more than a node's {max(gpus):g} GPUs")
        return sum(int(count / each) for count in gpus), {"num_gpus": each}
    threads_per_core = (psutil.cpu_count() or 1) / (psutil.cpu_count(logical=False) or 1)
    if threads > max(cpus):
        raise UsageError(f"--cpus-per-worker {threads} is more than a node's {max(cpus):g} CPUs")
    each = min(threads * threads_per_core, max(cpus))  # a hyper-thread is no core
    return sum(int(count / each) for count in cpus), {"num_cpus": each}


def _check_visible(output: str, record: dict[str, Any]) -> None:
    """A worker on another node may have written to a disk of its own."""
    uri = storage.join(output, shards.shard_file(record["index"]))
    until = time.monotonic() + VISIBLE_SECONDS
    while not _has_size(uri, record["bytes"]):
        if time.monotonic() > until:
            raise UsageError(
                f"{uri}, committed by {record['worker']}, is not visible from the driver; "
                "choose an --output on a path that all nodes share, or in an object store"
            )
        time.sleep(0.5)


def _has_size(uri: str, size: int) -> bool:
    try:
        return storage.size(uri) == size
    except OSError:
        return False  # a store may answer the next time


def connect(*packages: str, cpus: int | None = None) -> None:
    """Join the cluster of RAY_ADDRESS, of the submitted job, or of a `ray start` here; else start one for this run.

    Args:
        packages: of this project, that workers import.
        cpus: that a cluster which is started here has at least.

    Raises:
        UsageError: that cluster does not answer.

    ``address="auto"`` would also join a cluster that another run has started for itself, and end with it.
    """
    import ray
    from ray._private.services import find_bootstrap_address

    root = Path(__file__).resolve().parents[1]
    settings: dict[str, Any] = {
        "runtime_env": {"py_modules": [str(root / package) for package in packages]},
        "log_to_driver": False,
        "logging_level": "warning",
    }
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address := os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            ray.init(address=address, **settings)
        except OSError:
            raise UsageError(f"no Ray cluster answers at {address}; start it, or unset RAY_ADDRESS") from None
    else:
        cores = max(cpus, psutil.cpu_count() or 1) if cpus else None
        settings |= {"object_store_memory": OBJECT_STORE_BYTES, "num_cpus": cores}
        ray.init(address="local", include_dashboard=False, **settings)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own
