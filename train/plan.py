#!/usr/bin/env python3
"""Write the masks of a training run as data: for each epoch variant what is hidden and what stands there instead.

    python train/plan.py --shards runs/scored --entropy-source parquet --output runs/masks
    python train/plan.py --shards runs/scored --entropy-source parquet --recipe paper --output runs/masks
    python train/plan.py --shards runs/tokens --entropy-source random --output runs/masks

A teacher that scores a plan (pipeline/score.py --masks) sees exactly the inputs that a student trained on its targets
(train/run.py --targets) will see. A killed run is finished by the same command. See docs/training.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from transformers import HfArgumentParser

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.shards import commit, manifests, masks, parquet
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.manifests import Manifest, ShardEntry, read_manifest
from entropy_masking.shards.masks import MaskedRows
from entropy_masking.shards.read import Rows, read_rows, to_tensors
from entropy_masking.shards.schema import Record
from pipeline.corpus.readers import Rejects
from train.arguments import MOST_SEED
from train.data import columns_of, masker_of
from train.masks import MaskOptions, check_scored, mask_policy

VARIANTS = 4  # by default, where epochs differ
MOST_VARIANTS = 1 << 16


@dataclass(kw_only=True)
class Options(MaskOptions):
    """The flags of a plan: those of train/run.py that decide its masks."""

    shards: str = field(metadata={"help": "shard directory made by pipeline/score.py, a path or a URI"})
    entropy_source: Literal["random", "parquet"] = field(
        metadata={"help": "mask at random, or by the scores of the shards"}
    )
    output: str = field(metadata={"help": "directory of the plan, a path or a URI"})
    variants: int | None = field(
        default=None,
        metadata={"help": "R: epoch e has variant e mod R (default: 4, or 1 where all epochs hide the same positions)"},
    )
    seed: int = field(default=42, metadata={"help": "of the masks; the --seed of a run does not change them"})


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    sequences = read_manifest(options.shards)
    check(options, sequences)
    policy = mask_policy(options, options.entropy_source, options.seed, planned=True)
    masker = masker_of(sequences, policy.unit)
    plan = describe(options, sequences, policy)
    commit.claim_directory(plan.uri, plan.fingerprint, plan.planned_shards)
    records = commit.done_records(plan.uri, plan.planned_shards, plan.fingerprint_hash)
    todo = [entry for entry in sequences.shards if entry.index not in records]
    if todo:
        commit.save_tokenizer(manifests.load_tokenizer(sequences.uri), plan.uri)
        done = sum(record.rows for record in records.values())
        with console.Progress(
            sum(entry.rows for entry in sequences.shards) * variants_of(plan), "seq", "planning", done=done
        ) as progress:
            if records:
                progress.note(f"{len(records)} of {len(sequences.shards)} shards are done already")
            for entry in todo:
                records[entry.index] = plan_shard(sequences, entry, masker, policy, plan)
                progress.advance(records[entry.index].rows)
    print_summary(commit.write_manifest(plan, records, {}), len(todo))


def parse(argv: list[str] | None) -> Options:
    parser = HfArgumentParser(
        Options,  # type: ignore[arg-type]
        prog="train/plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    (options,) = parser.parse_dict(vars(parser.parse_args(argv)))
    return options


def check(options: Options, sequences: Manifest) -> None:
    """Refuse flags that contradict the shards, or are out of range."""
    check_shards(sequences)
    check_scored(options, options.entropy_source, sequences)
    if options.variants is not None and not 1 <= options.variants <= MOST_VARIANTS:
        raise UsageError(f"--variants {options.variants} is not between 1 and {MOST_VARIANTS}")
    if not 0 <= options.seed <= MOST_SEED:
        raise UsageError(f"--seed {options.seed} is not between 0 and {MOST_SEED}")


def describe(options: Options, sequences: Manifest, policy: MaskPolicy) -> Manifest:
    """The manifest of the plan, before its shards: that of the sequences, with masks in place of scores."""
    variants = options.variants or (1 if policy.repeats() else VARIANTS)
    fingerprint = {
        "schema_version": parquet.SCHEMA_VERSION,
        "shards": sequences.fingerprint_hash,
        "source": options.entropy_source,
        "policy": policy.to_json(),
        "variants": variants,
    }
    length = sequences.sequence_length
    return sequences.model_copy(
        update={
            "uri": storage.absolute(options.output),
            "kind": "plan",
            "scored": False,
            "top_k": 0,
            "temperatures": [],
            "context": None,
            "passes": None,
            "teacher": None,
            "masks": {
                "source": options.entropy_source,
                "policy": policy.to_json(),
                "variants": variants,
                "positions": min(policy.positions(length), length),
            },
            "fingerprint": fingerprint,
            "fingerprint_hash": storage.sha256_json(fingerprint),
            "shards": [],
            "totals": {},
        }
    )


def plan_shard(sequences: Manifest, entry: ShardEntry, masker: Masker, policy: MaskPolicy, plan: Manifest) -> Record:
    """Plan and commit one shard; returns its record."""
    started = time.monotonic()
    assert plan.masks
    columns = columns_of(policy, plan.fingerprint["source"])
    rows = read_rows(sequences, entry, columns)
    blocks = masks.blocks(entry.rows, plan.masks["variants"])
    planned = [masked_rows(masker, policy, {n: a[where] for n, a in rows.items()}, v) for where, v in blocks]
    tables = [masks.plan_table(each, plan.vocab_size) for each in planned]
    data = parquet.to_parquet(tables or [masks.plan_schema(plan.vocab_size).empty_table()])
    fields = {
        "rows": sum(len(table) for table in tables),
        "tokens": 0,
        "scored_tokens": sum(masks.counts(each)["scored_tokens"] for each in planned),
        "entropy_sum": 0.0,
        "fingerprint_hash": plan.fingerprint_hash,
        "attempt": 1,
        "forward_seconds": 0.0,
        "flops": 0,
        "device": platform.processor() or "cpu",
        "worker": f"{platform.node()}:{os.getpid()}",
        "documents": 0,
        "rejected": Rejects().report(),
    }
    return commit.commit_shard(plan.uri, entry.index, data, fields, started)


def masked_rows(masker: Masker, policy: MaskPolicy, rows: Rows, variant: int) -> MaskedRows:
    """One variant of some sequences: the mask that train/run.py gives them in that epoch."""
    epoch_N = torch.full((len(rows["sequence_id"]),), variant)
    masked = masker(to_tensors(rows) | {"epoch": epoch_N}, policy)
    positions_NK, inputs_NL = masked["positions_BP"], masked["input_ids"]
    corrupted_NK = inputs_NL.gather(1, positions_NK.clamp_min(0)).masked_fill(positions_NK == IGNORED, 0)
    return MaskedRows(
        rows["sequence_id"],
        np.full(len(epoch_N), variant, np.uint16),
        positions_NK.numpy(),
        corrupted_NK.numpy(),
        masks.input_crc32(inputs_NL.numpy()),
    )


def variants_of(plan: Manifest) -> int:
    return plan.masks["variants"] if plan.masks else 0


def print_summary(plan: Manifest, planned_now: int) -> None:
    totals, variants = plan.totals, variants_of(plan)
    print(f"{plan.uri}: {len(plan.shards)} shards ({planned_now} planned now)")
    print(f"  sequences         {totals['sequences'] // variants:,}, {variants} variants of each")
    print(f"  hidden positions  {totals['scored_tokens']:,}")
    print(f"  bytes a position  {totals['bytes'] / max(totals['scored_tokens'], 1):.2f}")


if __name__ == "__main__":
    console.run(main)
