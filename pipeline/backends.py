"""Two ways to run shards through ``ShardScorer``: actors on a Ray cluster, or this process. Both yield records."""

import argparse
import contextlib
import logging
import pickle
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil

from entropy_masking import storage
from entropy_masking.commands import console, ray_cluster
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.models.checkpoints import resolve_dtype
from entropy_masking.shards import commit
from entropy_masking.shards.manifests import run_uri
from entropy_masking.shards.schema import Record, Run
from pipeline.job import Failure, Job, Shard
from pipeline.options import cores

STOP_SECONDS = 10.0
START_SECONDS = 60.0  # until a free worker has started
RESOURCES = {"num_gpus": "GPU", "num_cpus": "CPU"}  # Ray's two names of each
BUSY = "`ray status` shows the cluster's nodes and who uses them"
VISIBLE_SECONDS = 60.0  # NFS shows another node's file late


def items_of(todo: list[Shard]) -> list[list[Shard]]:
    """Units of work: single shards, except that those which go on in one sequential file are together, in order."""
    items: list[list[Shard]] = []
    for index, ranges in todo:
        if items and ranges[0].continues(items[-1][-1][1][-1]):
            items[-1].append((index, ranges))
        else:
            items.append([(index, ranges)])
    return items


def dtype_of(args: argparse.Namespace) -> str:
    """``--dtype``; for ``auto`` that of a begun output, else of a worker of the cluster, else of this machine.

    Raises:
        UsageError: no worker fits the cluster.
        RunError: no worker starts.
    """
    run = commit.read_if_valid(Run, run_uri(storage.absolute(args.output)))
    if args.dtype == "auto" and run and "dtype" in run.fingerprint:
        return str(run.fingerprint["dtype"])
    if args.dtype != "auto" or args.teacher == "none" or args.backend == "local" or not ray_cluster.address():
        return resolve_dtype(args.dtype)
    ray_cluster.connect("pipeline")
    import ray

    _, resources = _fit(args.cpus_per_worker, args.gpus_per_worker)
    return str(_answer(ray.remote(**resources)(resolve_dtype).remote("auto"), "choose a dtype"))


def local_records(job: Job, todo: list[Shard]) -> Generator[Record | Failure, None, None]:
    """Score shards in this process; yields their records or failures as shards end."""
    from pipeline.worker import SHARDS_AT_ONCE, ShardScorer

    scorer = ShardScorer(job)
    outcomes = SimpleQueue[Record | Failure | BaseException]()

    def work(item: list[Shard]) -> None:
        try:
            for outcome in scorer.outcomes(item):
                outcomes.put(outcome)
        except BaseException as error:
            outcomes.put(error)

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        try:
            pool.map(work, items_of(todo))
            for _ in todo:
                if isinstance(outcome := outcomes.get(), BaseException):
                    raise outcome
                yield outcome
        except BaseException:
            scorer.stop()
            pool.shutdown(cancel_futures=True)
            raise


def ray_records(
    job: Job, todo: list[Shard], workers: int | None = None, gpus_per_worker: float | None = None
) -> Generator[Record | Failure, None, None]:
    """Score shards with an actor pool of Ray Data, on the cluster that ``ray_cluster.connect`` joins or starts.

    The items of the dataset are lists of shard descriptors. An actor commits its own files and returns only the
    records, so a retried item does no harm. The pool grows onto nodes that join later. Yields records or failures as
    shards end.

    Raises:
        UsageError: no worker fits the cluster, or a committed shard is not visible from the driver.
        RunError: no node of the cluster answers.
    """
    ray_cluster.connect("pipeline")
    import ray

    from pipeline.worker import SHARDS_AT_ONCE

    try:
        fitting, resources = _fit(job.threads, gpus_per_worker)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts tokens
        context.print_on_execution_start = False
        context.execution_options.preserve_order = False
        # the pool grows, if there is room, only when every worker has as many shards as it may have at once
        context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        context.target_max_block_size = 1  # pass each record on at once
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [{"shards": pickle.dumps(item)} for item in items_of(todo)]
        most = min(workers or len(items), len(items))
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
        what = "workers to load the teacher" if job.manifest.teacher else "workers"
        console.note(f"waiting for {what} … (Ray may log an error about constructor arguments: it is harmless)")
        seen = set[int]()  # when a worker has died, another one repeats its item, with the shards that are done
        for row in records.iter_rows():
            outcome: Record | Failure = pickle.loads(row["outcome"])
            if outcome.index in seen:
                continue
            seen.add(outcome.index)
            if isinstance(outcome, Record):
                _check_visible(job.output, outcome)
            yield outcome
    finally:
        below = psutil.Process().children(recursive=True)  # processes of a cluster that this run started
        ray_cluster.disconnect()
        psutil.wait_procs(below, timeout=STOP_SECONDS)
        commit.delete_leftovers(job.output)  # of workers that ended during a shard


class ScoreShard:
    """``ShardScorer`` for Ray Data: shards → their records or failures, one by one. Both are pickled."""

    def __init__(self, job: Job) -> None:
        from pipeline.worker import ShardScorer

        self.scorer = ShardScorer(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[bytes]]]:
        for outcome in self.scorer.outcomes(pickle.loads(batch["shards"][0])):
            yield {"outcome": [pickle.dumps(outcome)]}


def _fit(threads: int, gpus_per_worker: float | None) -> tuple[int, dict[str, Any]]:
    """The number of workers that fit the cluster's nodes, and the resources of one worker, which runs on one node.

    Says so if all of them are in use. Raises UsageError if no worker fits, and RunError if no node answers.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus, cpus = ([node["Resources"].get(name, 0) for node in nodes] for name in ("GPU", "CPU"))
    if any(gpus) or gpus_per_worker:
        count, resources = _gpu_shares(gpus, gpus_per_worker or 1)
    elif not any(cpus):  # such as a head node alone, which adds nodes when they are asked for
        count, resources = 1, {"num_cpus": threads}
    elif threads > max(cpus):
        raise UsageError(f"--cpus-per-worker {threads} is more than a node's {max(cpus):g} CPUs")
    else:  # Ray counts hyper-threads, and a worker needs whole cores
        share = min(threads * _threads_per_core(nodes[int(np.argmax(cpus))]["NodeID"]), max(cpus))
        count, resources = sum(int(own / share) for own in cpus), {"num_cpus": share}
    free = ray.available_resources()
    if any(free.get(RESOURCES[name], 0) < share for name, share in resources.items()):
        console.note(f"all workers of the cluster are in use; {BUSY}")
    return count, resources


def _gpu_shares(gpus: list[float], share: float) -> tuple[int, dict[str, Any]]:
    """``_fit`` of nodes with these numbers of GPUs."""
    if not any(gpus):
        raise UsageError("--gpus-per-worker needs a cluster with GPUs; leave it out")
    if share > max(gpus):
        raise UsageError(f"--gpus-per-worker {share:g} is more than a node's {max(gpus):g} GPUs")
    if share > 1 and share % 1:
        raise UsageError(f"--gpus-per-worker {share:g} is neither a whole number nor below 1")
    return sum(int(own) * int(1 / share) if share < 1 else int(own / share) for own in gpus), {"num_gpus": share}


@cache
def _threads_per_core(node: str) -> float:
    """Hyper-threads of each core of the node with this id. Raises RunError if the node does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def counted_here() -> float:
        return (psutil.cpu_count() or 1) / cores()

    if node == ray.get_runtime_context().get_node_id():
        return counted_here()
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return float(
        _answer(ray.remote(num_cpus=0)(counted_here).options(scheduling_strategy=there).remote(), "count cores")
    )


def _answer(task: Any, purpose: str) -> Any:
    """The result of a Ray task. Raises RunError if there is none within ``START_SECONDS``."""
    import ray

    try:
        return ray.get(task, timeout=START_SECONDS)
    except ray.exceptions.RayError as error:
        raise RunError(f"no worker of the cluster could {purpose} ({one_line(error)}); {BUSY}") from None


def _check_visible(output: str, record: Record) -> None:
    """Refuse an output on the own disk of another node. Raises UsageError."""
    uri = storage.join(output, record.file)
    until = time.monotonic() + VISIBLE_SECONDS
    while True:
        with contextlib.suppress(OSError):  # an object store may answer the next time
            # without run.json all was deleted, which the caller reports
            if storage.size(uri) == record.bytes or not storage.exists(run_uri(output)):
                return
        if time.monotonic() > until:
            problem = f"{uri}, committed by {record.worker}, is not visible from the driver"
            raise UsageError(f"{problem}; choose an --output on a path that all nodes share, or in an object store")
        time.sleep(0.5)
