#!/usr/bin/env python3
"""How fast shards become batches, as they are and with masks, with one loader worker and with several; and how soon a
run of 1,000,000,000 tokens resumes.

    python bench/loading.py --shards runs/scored

A small corpus is read again and again. Each worker has one core. The batches stay in the workers, so the time that a
trainer needs to receive them is not measured. Each round begins and ends in the middle of row groups, so no worker
decodes ahead while another one is timed. Prints a table with the budgets, and as its last line the same as one JSON
object.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from accelerate import skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader

from bench.commands import new_parser
from bench.table import Row, in_turns, print_table, row
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.commands.flags import positive
from entropy_masking.errors import UsageError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.manifests import Manifest, read_manifest
from entropy_masking.shards.parquet import ROW_GROUP, TOP_K_COLUMNS
from entropy_masking.shards.read import masker_of
from train.data import LANES, TrainingSequences, whole_batch
from train.split import all_rows

COLUMNS = {"tokens": [], "entropy": ["entropy"], "top_k": ["entropy", *TOP_K_COLUMNS]}
TOKENS, RESUMED_AT = 10**9, 0.9  # of the run that resumes
BUDGETS = {"tokens": 5e6, "entropy": 5e6, "top_k": 2e6}  # tokens/s


def main() -> None:
    args = parse()
    manifest, rows = read_manifest(args.shards), dict[str, Row]()
    for name in list(COLUMNS)[: 1 + manifest.scored + (manifest.top_k > 0)]:
        rows |= speeds(name, manifest, args)
    seconds = in_turns({"first_batch": partial(first_batch, args)}, args.rounds)["first_batch"]
    rows["first_batch"] = row(seconds, "s", at_most=5)
    print_table(rows, vars(args))


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--shards", required=True, help="shard directory on this machine")
    add("--batch", type=positive, default=64, help="sequences per batch (default: 64)")
    add("--workers", type=positive, default=2, help="loader workers to compare with one (default: 2)")
    add("--rounds", type=positive, default=3)
    args = parser.parse_args()
    if storage.is_remote(args.shards):
        raise UsageError(f"--shards {args.shards} is remote, but this bench measures local reading; copy it here")
    return args


def speeds(name: str, manifest: Manifest, args: argparse.Namespace) -> dict[str, Row]:
    """Tokens a second of one loader worker and of several, without and with masks: by entropy, or else at random."""
    columns = COLUMNS[name]
    parts = all_rows(manifest) * math.ceil(LANES / sum(entry.row_groups for entry in manifest.shards))
    batches = math.ceil(LANES * ROW_GROUP / args.batch)  # of a round: a row group of each lane
    policy = MaskPolicy() if "entropy" in columns else MaskPolicy.random()
    inputs = {name: whole_batch, f"{name}_masked": partial(masker_of(manifest), policy=policy)}
    readers = {}
    for own, prepare in inputs.items():
        for label, workers in ((own, 1), (f"{own}_workers", args.workers)):
            size = (2 + args.rounds) * batches * args.batch  # with half a round, and one that is not counted
            data = TrainingSequences(manifest, parts, columns, size=size, batch=args.batch, seed=0, prepare=prepare)
            loader = DataLoader(data, args.batch, num_workers=workers, collate_fn=row_count, worker_init_fn=pin)
            row_counts = iter(loader)
            read(row_counts, batches // 2)
            readers[label] = partial(read, row_counts, batches)
    tokens = batches * args.batch * manifest.sequence_length
    rates = {label: tokens / seconds for label, seconds in in_turns(readers, args.rounds).items()}
    rows = {label: row(rate, "tokens/s", at_least=BUDGETS.get(label)) for label, rate in rates.items()}
    for own in inputs:
        budget = None if own == name else 0.9 * args.workers  # for masked batches, as a run reads them
        rows[f"{own}_workers_to_1"] = row(rates[f"{own}_workers"] / rates[own], "×", at_least=budget)
    return rows


def first_batch(args: argparse.Namespace) -> None:
    """From the manifest to the first batch of a run that resumes at 90 % of its tokens, as train/run.py and Trainer do.

    The run is long enough because it reads the shards again and again.
    """
    manifest = read_manifest(args.shards)
    check_shards(manifest, contents=False)
    columns = list(COLUMNS.values())[manifest.scored + (manifest.top_k > 0)]
    prepare = partial(masker_of(manifest), policy=MaskPolicy() if "entropy" in columns else MaskPolicy.random())
    size, parts = TOKENS // manifest.sequence_length, all_rows(manifest)
    data = TrainingSequences(manifest, parts, columns, size=size, batch=args.batch, seed=0, prepare=prepare)
    loader = DataLoader(data, args.batch, collate_fn=whole_batch)
    next(iter(skip_first_batches(loader, int(RESUMED_AT * size / args.batch))))


def pin(worker: int) -> None:
    """Give a loader worker one core."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


def row_count(batch: dict[str, Tensor]) -> int:
    """A collator: only this number leaves the worker."""
    return len(batch["input_ids"])


def read(row_counts: Iterator[int], batches: int) -> None:
    for _ in range(batches):
        next(row_counts)


if __name__ == "__main__":
    console.run(main)
