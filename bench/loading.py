#!/usr/bin/env python3
"""How fast shards become batches on one core, in how much memory, and how soon a run of a billion tokens resumes.

    python bench/loading.py --shards runs/scored

Larger corpora are the same files several times over. Each measurement has a process of its own, on one core. Prints a
table with the budgets, and as its last line the same as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
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
from entropy_masking.shards.parquet import ROW_GROUP
from entropy_masking.shards.read import Columns, masker_of
from train.data import WINDOW, TrainingSequences, whole_batch
from train.split import all_rows

COLUMNS = {"tokens": Columns(), "entropy": Columns(entropy=True), "top_k": Columns(entropy=True, top_k=True)}
BUDGETS = {"tokens": 5e6, "entropy": 5e6, "top_k": 2e6}  # tokens/s
RESUMED_AT = 0.9  # of the tokens of a resumed run
Prepare = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def main() -> None:
    args = parse()
    if args.child:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(measure(args)))
        return
    manifest = read_manifest(args.shards)
    names = list(COLUMNS)[: 1 + manifest.scored + (manifest.top_k > 0)]
    rounds = [{name: measure_in_child("--child", name) for name in names} for _ in range(args.rounds)]
    rows: dict[str, Row] = {}
    for name in names:
        unmasked, masked = np.array([rates[name] for rates in rounds]).T
        rows[name] = row(unmasked, "tokens/s", at_least=BUDGETS[name])
        rows[f"{name}_masked"] = row(masked, "tokens/s")
    once, tenfold = (measure_in_child("--child", "memory", "--windows", args.windows * times) for times in (1, 10))
    rows |= {"memory_1x": row(once / 2**20, "MiB"), "memory_10x": row(tenfold / 2**20, "MiB")}
    rows["memory_10x_to_1x"] = row(tenfold / once, "×", at_most=1.1)
    first = [measure_in_child("--child", "first") for _ in range(args.rounds)]
    rows["first_batch"] = row(np.array(first), "s", at_most=5)
    del args.child
    print_table(rows, vars(args))


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--shards", required=True, help="shard directory on this machine")
    add("--batch", type=positive, default=64, help="sequences per batch (default: 64)")
    add("--windows", type=positive, default=3, help="windows of the shuffle read in each round (default: 3)")
    add("--tokens", type=positive, default=10**9, help="tokens of the resumed run (default: 1,000,000,000)")
    add("--rounds", type=positive, default=3)
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if storage.is_remote(args.shards):
        raise UsageError(f"--shards {args.shards} is remote, but this bench measures local reading; copy it here")
    return args


def measure(args: argparse.Namespace) -> float | list[float]:
    """Seconds, bytes, or tokens a second without and with masking: by the name in ``--child``."""
    if args.child == "first":
        return first_batch(args)
    manifest = read_manifest(args.shards)
    if args.child == "memory":
        before, columns = psutil.Process().memory_info().rss, all_columns(manifest)
        read(manifest, columns, args, whole_batch, step=ROW_GROUP)  # one batch decodes a whole window
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    columns, rates = COLUMNS[args.child], []
    for prepare in (whole_batch, masking(manifest, columns)):
        started = time.perf_counter()
        tokens = read(manifest, columns, args, prepare, step=args.batch)
        rates.append(tokens / (time.perf_counter() - started))
    return rates


def read(manifest: Manifest, columns: Columns, args: argparse.Namespace, prepare: Prepare, step: int) -> int:
    """Read a batch every ``step`` sequences of the shards, repeated to fill ``--windows``; returns all their tokens."""
    groups = sum(entry.row_groups for entry in manifest.shards)
    parts = all_rows(manifest) * math.ceil(args.windows * WINDOW / groups)
    size = sum(part.rows for part in parts)
    sequences = TrainingSequences(manifest, parts, columns, size=size, seed=0, prepare=prepare)
    for start in range(0, size, step):
        sequences.__getitems__(list(range(start, min(start + args.batch, size))))
    return size * manifest.sequence_length


def first_batch(args: argparse.Namespace) -> float:
    """Seconds from the manifest to the first batch of a resumed run, by the steps of train/run.py and Trainer.

    The run is long enough because it reads the shards again and again.
    """
    started = time.perf_counter()
    manifest = read_manifest(args.shards)
    check_shards(manifest, contents=False)
    parts, columns = all_rows(manifest), all_columns(manifest)
    parts *= math.ceil(args.tokens / (sum(part.rows for part in parts) * manifest.sequence_length))
    size = sum(part.rows for part in parts)
    sequences = TrainingSequences(manifest, parts, columns, size=size, seed=0, prepare=masking(manifest, columns))
    loader = DataLoader(sequences, batch_size=args.batch, shuffle=False, collate_fn=whole_batch)
    next(iter(skip_first_batches(loader, int(RESUMED_AT * size / args.batch))))
    return time.perf_counter() - started


def all_columns(manifest: Manifest) -> Columns:
    return Columns(entropy=manifest.scored, top_k=manifest.top_k > 0)


def masking(manifest: Manifest, columns: Columns) -> Prepare:
    """Masks raw batches as a run does: by entropy if it is read, else at random."""
    masker, policy = masker_of(manifest), MaskPolicy() if columns.entropy else MaskPolicy.random()
    return lambda batch: masker(batch, policy)


if __name__ == "__main__":
    console.run(main)
