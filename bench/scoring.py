#!/usr/bin/env python3
"""How near scoring comes to the teacher's own forward, and what its shards cost beside it.

    python bench/scoring.py --teacher bert-base-uncased --shards runs/scored

The shards are those of pipeline/score.py with the same tokenizer. Speeds are measured side by side in one process, in
turns, with one dtype, number of threads and malloc. Prints a table with the budgets, and as its last line the same as
one JSON object.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from bench.commands import keep_buffers, new_parser
from bench.table import GOAL, Row, device_name, in_turns, peak_bytes, peak_flops, print_table, reset_peak, row
from entropy_masking.commands import console
from entropy_masking.commands.flags import positive
from entropy_masking.errors import UsageError
from entropy_masking.models.checkpoints import local_checkpoint, resolve_dtype
from entropy_masking.models.flops import forward_flops
from entropy_masking.shards import parquet
from entropy_masking.shards.manifests import Manifest, read_manifest, read_table
from pipeline.teacher import DTYPES, Teacher


def main() -> None:
    args = parse()
    keep_buffers()
    torch.set_num_threads(args.threads)
    scan = read_manifest(args.shards)
    if not scan.scored:
        raise UsageError(f"--shards {args.shards} has no scores; score it with pipeline/score.py first")
    ids_NL = whole_sequences(scan, args.tokens)
    passes = scan.passes if scan.context == "masked" else 7
    rows = speeds("masked", passes, scan, ids_NL, args) | speeds("full", 1, scan, ids_NL, args)
    # of the job that wrote the shards
    rows["job_outside_model"] = row(1 - scan.totals["utilisation"], "of the workers' time", at_most=0.03)
    entry = scan.shards[0]
    plain = read_table(scan, entry, parquet.schema_of(scan.model_copy(update={"top_k": 0})).names)
    plain_bytes = len(parquet.to_parquet(parquet.row_groups(plain)))
    rows["scan_bytes"] = row(plain_bytes / entry.tokens, "B/token", at_most=5.1)
    rows[f"scan_top_{scan.top_k}_bytes"] = row(entry.bytes / entry.tokens, "B/token")
    print_table(rows, vars(args) | {"device": device_name(), "passes": passes, "measured_tokens": ids_NL.size})


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="masked LM by path or Hub id")
    add("--shards", required=True, help="scored shard directory; its first sequences are scored again")
    add("--batch-tokens", type=positive, default=8192, help="tokens in one of our forwards (default: 8192)")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--torch-compile", action="store_true", help="compile the teacher, also for the bare forwards")
    add("--threads", type=positive, default=1, help="torch threads of every contestant (default: 1)")
    add("--tokens", type=positive, default=2048, help="text scored in each round (default: 2048)")
    add("--rounds", type=positive, default=4)
    args = parser.parse_args()
    args.dtype = resolve_dtype(args.dtype)
    return args


def whole_sequences(scan: Manifest, tokens: int) -> np.ndarray:
    """Ids [N, L] of so many tokens, none of them padding. Raises UsageError if there are none."""
    ids_NL = parquet.column_2d(read_table(scan, scan.shards[0], ["input_ids"]), "input_ids", scan.sequence_length)
    ids_NL = ids_NL[(ids_NL != scan.special_ids["pad"]).all(1)][: max(1, tokens // scan.sequence_length)]
    if not len(ids_NL):
        raise UsageError(f"the first shard of {scan.uri} has no sequence without padding; score a larger corpus")
    return ids_NL


def speeds(
    context: str, passes: int | None, scan: Manifest, ids_NL: np.ndarray, args: argparse.Namespace
) -> dict[str, Row]:
    """Ours and the bare forwards in turns; a ratio compares times of one round."""
    fingerprint = scan.fingerprint | {"batch_tokens": args.batch_tokens, "dtype": args.dtype}
    changes = {"context": context, "passes": passes, "fingerprint": fingerprint}
    reset_peak()
    teacher = Teacher(scan.model_copy(update=changes), local_checkpoint(args.teacher), compile=args.torch_compile)
    teacher.score(ids_NL)
    rows = {f"peak_memory_{context}": row(peak_bytes() / 2**20, "MiB")}
    ours, bare = partial(teacher.score, ids_NL), partial(bare_forwards, teacher, forwards(teacher, ids_NL))
    rates = {name: ids_NL.size / own for name, own in in_turns({"ours": ours, "bare": bare}, args.rounds).items()}
    rows |= {f"{name}_{context}": row(rate, "tokens/s") for name, rate in rates.items()}
    rows[f"ours_to_bare_{context}"] = row(rates["ours"] / rates["bare"], "×", at_least=0.9)
    encoder, head = forward_flops(teacher.masked_lm, scan.sequence_length)
    flops = encoder * teacher.passes / scan.sequence_length + head
    rows[f"flops_{context}"] = row(flops, "FLOPs/token")
    if peak := peak_flops(args.dtype):
        rows[f"share_of_peak_{context}"] = row(flops * rates["ours"] / peak, "of the peak", at_least=GOAL)
    return rows


def forwards(teacher: Teacher, ids_NL: np.ndarray) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Inputs and scored positions of the forwards that the context needs, on the device."""
    on = teacher._to_device
    return [(on(batch.ids_RL), (on(batch.rows), on(batch.columns))) for batch in teacher._scan(ids_NL, None)]


@torch.inference_mode()
def bare_forwards(teacher: Teacher, batches: list[tuple[Tensor, tuple[Tensor, Tensor]]]) -> None:
    """Encoder forwards, and the head once at each scored position; the logits are thrown away."""
    for ids_RL, select in batches:
        with teacher.autocast():
            features_NH = teacher.masked_lm.features(ids_RL, None, select)
        for chunk_CH in features_NH.split(teacher._chunk):
            teacher._project(chunk_CH, teacher.projection.bias)


if __name__ == "__main__":
    console.run(main)
