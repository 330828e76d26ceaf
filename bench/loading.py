#!/usr/bin/env python3
"""How fast shards become batches on one core and with workers, in how much memory, and how soon a long run resumes.

    python bench/loading.py --shards runs/scored

Larger corpora are the same files several times over. Each measurement has a process of its own, on one core. So has
each worker: N processes take every Nth batch at the same time. Their batches stay where they are, so the time that a
trainer needs to receive them is not measured. Prints a table with the budgets, and as its last line the same as one
JSON object.
"""

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import psutil
import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer  # noqa: F401 - train/run.py too has imported it before it opens its shards

from bench.commands import measure_in_child, new_parser
from bench.table import Row, print_table, row
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import positive
from entropy_masking.errors import UsageError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.manifests import Manifest, read_manifest
from entropy_masking.shards.parquet import TOP_K_COLUMNS
from entropy_masking.shards.read import masker_of
from train.data import LANES, TURNS, TrainingSequences, whole_batch
from train.split import all_rows

COLUMNS = {"tokens": [], "entropy": ["entropy"], "top_k": ["entropy", *TOP_K_COLUMNS]}
BUDGETS = {"tokens": 5e6, "entropy": 5e6, "top_k": 2e6}  # tokens/s
RESUMED_AT = 0.9  # of the tokens of a resumed run
Prepare = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def main() -> None:
    args = parse()
    if args.child:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0), reverse=True)
            os.sched_setaffinity(0, {cores[args.worker % len(cores)]})
        print(json.dumps(measure(args)))
        return
    manifest = read_manifest(args.shards)
    names = list(COLUMNS)[: 1 + manifest.scored + (manifest.top_k > 0)]
    counts = (1, args.workers)
    rounds = [{(name, n): rates(name, n) for name in names for n in counts} for _ in range(args.rounds)]
    rows: dict[str, Row] = {}
    for name in names:
        one, several = (np.array([found[name, n] for found in rounds]).T for n in counts)
        for suffix, alone, together in zip(("", "_masked"), one, several, strict=True):
            rows[name + suffix] = row(alone, "tokens/s", at_least=None if suffix else BUDGETS[name])
            rows[f"{name}{suffix}_workers"] = row(together, "tokens/s")
            budget = 0.9 * args.workers if suffix else None  # for masked batches, as a run reads them
            rows[f"{name}{suffix}_workers_to_1"] = row(together / alone, "×", at_least=budget)
    once, tenfold = (measure_in_child("--child", "memory", "--groups", 3 * args.groups * times) for times in (1, 10))
    rows |= {"memory_1x": row(once / 2**20, "MiB"), "memory_10x": row(tenfold / 2**20, "MiB")}
    rows["memory_10x_to_1x"] = row(tenfold / once, "×", at_most=1.1)
    first = [measure_in_child("--child", "first") for _ in range(args.rounds)]
    rows["first_batch"] = row(np.array(first), "s", at_most=5)
    del args.child, args.worker
    print_table(rows, vars(args))


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--shards", required=True, help="shard directory on this machine")
    add("--batch", type=positive, default=64, help="sequences per batch (default: 64)")
    add(
        "--groups",
        type=positive,
        default=8,
        help=f"row groups that each of the {LANES} lanes reads in a round (default: 8)",
    )
    add("--workers", type=positive, default=2, help="processes to compare with one (default: 2)")
    add("--tokens", type=positive, default=10**9, help="tokens of the resumed run (default: 1,000,000,000)")
    add("--rounds", type=positive, default=3)
    add("--child", help=argparse.SUPPRESS)
    add("--worker", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if storage.is_remote(args.shards):
        raise UsageError(f"--shards {args.shards} is remote, but this bench measures local reading; copy it here")
    return args


def measure(args: argparse.Namespace) -> float | list[float]:
    """Seconds, bytes, or tokens a second without and with masking: by the name in ``--child``."""
    if args.child == "first":
        return first_batch(args)
    manifest = read_manifest(args.shards)
    times = math.ceil(args.groups * LANES / sum(entry.row_groups for entry in manifest.shards))
    if args.child == "memory":
        before, columns = psutil.Process().memory_info().rss, all_columns(manifest)
        # few batches, of all lanes in turn
        read(repeated(manifest, times, columns, args, whole_batch), 0, 8 * TURNS + 1)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    columns, found = COLUMNS[args.child], []
    for prepare in (whole_batch, masking(manifest, columns)):
        sequences = repeated(manifest, times, columns, args, prepare)
        started = time.perf_counter()
        rows = read(sequences, args.worker, args.workers)
        found.append(rows * manifest.sequence_length / (time.perf_counter() - started))
    return found


def rates(name: str, workers: int) -> np.ndarray:
    """Tokens a second of so many processes at once, without and with masking."""
    with ThreadPoolExecutor(workers) as pool:
        shares = [("--child", name, "--workers", workers, "--worker", number) for number in range(workers)]
        return np.sum(list(pool.map(lambda flags: measure_in_child(*flags), shares)), 0)


def read(sequences: TrainingSequences, first: int, step: int) -> int:
    """Read a batch, and each ``step``-th one after it; returns the number of their rows."""
    rows = 0
    for start in range(first * sequences.batch, len(sequences), step * sequences.batch):
        indices = list(range(start, min(start + sequences.batch, len(sequences))))
        sequences.__getitems__(indices)
        rows += len(indices)
    return rows


def repeated(
    manifest: Manifest, times: int, columns: Sequence[str], args: argparse.Namespace, prepare: Prepare
) -> TrainingSequences:
    """One epoch of the shards, repeated ``times`` times."""
    parts = all_rows(manifest) * times
    size = sum(part.rows for part in parts)
    return TrainingSequences(manifest, parts, columns, size=size, batch=args.batch, seed=0, prepare=prepare)


def first_batch(args: argparse.Namespace) -> float:
    """Seconds from the manifest to the first batch of a resumed run, by the steps of train/run.py and Trainer.

    The run is long enough because it reads the shards again and again.
    """
    started = time.perf_counter()
    manifest = read_manifest(args.shards)
    check_shards(manifest, contents=False)
    columns = all_columns(manifest)
    times = math.ceil(args.tokens / manifest.sequence_length / manifest.totals["sequences"])
    sequences = repeated(manifest, times, columns, args, masking(manifest, columns))
    loader = DataLoader(sequences, batch_size=args.batch, shuffle=False, collate_fn=whole_batch)
    next(iter(skip_first_batches(loader, int(RESUMED_AT * len(sequences) / args.batch))))
    return time.perf_counter() - started


def all_columns(manifest: Manifest) -> list[str]:
    return ["entropy"] * manifest.scored + [*TOP_K_COLUMNS] * (manifest.top_k > 0)


def masking(manifest: Manifest, columns: Sequence[str]) -> Prepare:
    """Masks raw batches as a run does: by entropy if it is read, else at random."""
    masker, policy = masker_of(manifest), MaskPolicy() if "entropy" in columns else MaskPolicy.random()
    return lambda batch: masker(batch, policy)


if __name__ == "__main__":
    console.run(main)
