#!/usr/bin/env python3
"""How fast shards become batches on one core, in how much memory, and how soon a run of a billion tokens goes on.

    python bench/loading.py
    python bench/loading.py --shards runs/scored --batch 256 --rounds 5

Without --shards it makes its own, of random tokens and scores. A corpus of any size is the same files named again and
again. Each measurement has a process of its own, on one core. Prints a table with the budgets, and as its last line the
same as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import psutil
import torch
from accelerate import skip_first_batches
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertTokenizer

from bench.table import Row, print_table, row
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import RunError, UsageError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards import commit, manifests, parquet
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.manifests import Manifest, read_manifest
from entropy_masking.shards.parquet import ROW_GROUP, Scores
from entropy_masking.shards.read import Columns, masker_of
from entropy_masking.shards.schema import Record
from pipeline.corpus.readers import Rejects
from pipeline.tokenizer import SPECIAL_TOKENS
from train.data import WINDOW, TrainingSequences, split_shards

COLUMNS = {"tokens": Columns(), "entropy": Columns(entropy=True), "top_k": Columns(entropy=True, top_k=True)}
BUDGETS = {"tokens": 5e6, "entropy": 5e6, "top_k": 2e6}  # tokens/s
RESUMED_AT = 0.9  # of the tokens of the run that goes on
# of what is made up: one window, in shards of two row groups
MADE_UP = "made up"
SHARDS, ROWS, LENGTH, VOCABULARY, TOP_K = WINDOW // 2, 2 * ROW_GROUP, 128, 30522, 16


def main() -> None:
    args = parse()
    if args.child:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if not args.shards:
            args.shards = made_up(Path(temporary) / "shards").uri
        manifest = read_manifest(args.shards)
        names = list(COLUMNS)[: 1 + manifest.scored + (manifest.top_k > 0)]
        rounds = [{name: in_a_process(args, name) for name in names} for _ in range(args.rounds)]
        rows: dict[str, Row] = {}
        for name in names:
            rows[name] = row(np.array([each[name]["read"] for each in rounds]), "tokens/s", at_least=BUDGETS[name])
            rows[f"{name}_masked"] = row(np.array([each[name]["masked"] for each in rounds]), "tokens/s")
        memory = {times: in_a_process(args, "memory", times) for times in (1, 10)}
        for times, taken in memory.items():
            rows[f"memory_{times}x"] = row(taken / 2**20, "MiB")
        rows["memory_10x_to_1x"] = row(memory[10] / memory[1], "×", at_most=1.1)
        long = lengthened(manifest, args.tokens, Path(temporary) / "long")
        first = [in_a_process(args, "first", shards=long) for _ in range(args.rounds)]
        rows["first_batch"] = row(np.array(first), "s", at_most=5)
    del args.child
    print_table(rows, vars(args) | {"shards": args.shards if manifest.teacher != MADE_UP else MADE_UP})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shards", help="shard directory on this machine (default: made up ones)")
    add("--batch", type=console.positive, default=64, help="sequences a batch (default: 64)")
    add("--windows", type=console.positive, default=3, help="windows of the shuffle read in each round (default: 3)")
    add("--tokens", type=console.positive, default=10**9, help="of the run that goes on (default: 1,000,000,000)")
    add("--rounds", type=console.positive, default=3)
    add("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shards and storage.is_remote(args.shards):
        raise UsageError(f"--shards {args.shards} is not on this machine, whose reading is measured; copy it")
    return args


def in_a_process(args: argparse.Namespace, what: str, times: int = 1, shards: str | None = None) -> Any:
    """What ``measure`` finds in a process of its own, so that its memory is its own."""
    sizes = ["--batch", args.batch, "--windows", args.windows]
    command = [sys.executable, __file__, "--shards", shards or args.shards, *sizes, "--child", what, times]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if ran.returncode:
        raise RunError(f"measuring {what} failed: {' '.join(ran.stderr.split())[-500:]}")
    return json.loads(ran.stdout.splitlines()[-1])


# --- one measurement -------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Any:
    what, times = args.child[0], int(args.child[1])
    if what == "first":
        return first_batch(args)
    manifest = read_manifest(args.shards)
    if what == "memory":
        return memory(manifest, args, times)
    return {
        "read": rate(manifest, COLUMNS[what], args, as_it_is),
        "masked": rate(manifest, COLUMNS[what], args, Mask(manifest, COLUMNS[what])),
    }


def rate(manifest: Manifest, columns: Columns, args: argparse.Namespace, prepare: Any) -> float:
    """Tokens a second from the first batch to the last of some windows, the decoding of each included."""
    sequences = corpus(manifest, columns, args.windows, prepare)
    started = time.perf_counter()
    for start in range(0, len(sequences), args.batch):
        sequences.__getitems__(list(range(start, min(start + args.batch, len(sequences)))))
    return len(sequences) * manifest.sequence_length / (time.perf_counter() - started)


def memory(manifest: Manifest, args: argparse.Namespace, times: int) -> int:
    """Bytes that reading a corpus through takes at most, with all columns that there are."""
    before = psutil.Process().memory_info().rss
    columns = Columns(entropy=manifest.scored, top_k=manifest.top_k > 0)
    sequences = corpus(manifest, columns, args.windows * times, as_it_is)
    for start in range(0, len(sequences), ROW_GROUP):  # a batch is enough to have a window decoded
        sequences.__getitems__(list(range(start, min(start + args.batch, len(sequences)))))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before


def first_batch(args: argparse.Namespace) -> float:
    """Seconds from the manifest to the first batch of a run that goes on, as train/run.py and Trainer get there."""
    started = time.perf_counter()
    manifest = read_manifest(args.shards)
    check_shards(manifest, contents=False)
    kept, _ = split_shards(manifest, 0.01)
    columns, prepare = Columns(manifest.scored, manifest.top_k > 0), Mask(manifest, Columns(manifest.scored))
    size = sum(entry.rows for entry in kept)
    sequences = TrainingSequences(manifest, kept, columns, size=size, seed=0, prepare=prepare)
    loader = DataLoader(sequences, batch_size=args.batch, shuffle=False, collate_fn=as_it_is)
    next(iter(skip_first_batches(loader, int(RESUMED_AT * size / args.batch))))
    return time.perf_counter() - started


class Mask:
    """Masks raw batches as a run does: by the highest entropies where there are some, else at random."""

    def __init__(self, manifest: Manifest, columns: Columns) -> None:
        self.masker = masker_of(manifest)
        self.policy = MaskPolicy() if columns.entropy else MaskPolicy.random()

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.masker(batch, self.policy)


def as_it_is(batch: Any) -> Any:
    return batch


# --- what is read ----------------------------------------------------------------------------------------------------


def corpus(manifest: Manifest, columns: Columns, windows: int, prepare: Any) -> TrainingSequences:
    """One epoch over the shards, again and again until they fill so many windows."""
    groups = sum(math.ceil(entry.rows / ROW_GROUP) for entry in manifest.shards)
    entries = manifest.shards * math.ceil(windows * WINDOW / groups)
    size = sum(entry.rows for entry in entries)
    return TrainingSequences(manifest, entries, columns, size=size, seed=0, prepare=prepare)


def lengthened(manifest: Manifest, tokens: int, directory: Path) -> str:
    """A directory of so many tokens: links to the files, and a manifest that names each as often as it takes."""
    directory.mkdir()
    for name in ("tokenizer", *(entry.file for entry in manifest.shards)):
        (directory / name).symlink_to(Path(storage.absolute(manifest.uri)) / name)
    fields = storage.read_json(manifests.manifest_uri(manifest.uri))
    fields["shards"] *= math.ceil(tokens / sum(entry.rows * manifest.sequence_length for entry in manifest.shards))
    storage.write_json(manifests.manifest_uri(str(directory)), fields)
    return str(directory)


def made_up(directory: Path) -> Manifest:
    """Scored shards of random values that are about as likely, and so as compressible, as those of text."""
    rng = np.random.default_rng(0)
    words = [*SPECIAL_TOKENS, *(f"word{number}" for number in range(VOCABULARY - len(SPECIAL_TOKENS)))]
    wordpiece = BertWordPieceTokenizer(vocab={word: token for token, word in enumerate(words)})
    tokenizer = BertTokenizer(tokenizer_object=wordpiece._tokenizer)
    commit.save_tokenizer(tokenizer, str(directory))
    fingerprint = {"schema_version": parquet.SCHEMA_VERSION, "corpus": {}, "tokenizer": "", "sequence_length": LENGTH}
    empty = Manifest(
        uri=str(directory),
        kind="sequences",
        sequence_length=LENGTH,
        vocab_size=VOCABULARY,
        special_ids=manifests.special_ids(tokenizer),
        special_token_ids=sorted(set(tokenizer.all_special_ids)),
        scored=True,
        top_k=TOP_K,
        temperatures=[],
        context="masked",
        passes=1,
        teacher=MADE_UP,
        masks=None,
        sequences_hash=manifests.sequences_hash(fingerprint),
        fingerprint=fingerprint,
        fingerprint_hash=storage.sha256_json(fingerprint),
        tokenizer_hash=manifests.tokenizer_hash(tokenizer),
        planned_shards=SHARDS,
        shards=[],
        failed={},
        totals={},
    )
    return commit.write_manifest(empty, {index: made_up_shard(empty, index, rng) for index in range(SHARDS)}, {})


def made_up_shard(manifest: Manifest, index: int, rng: np.random.Generator) -> Record:
    """Write one; returns its record."""
    started, first = time.monotonic(), len(SPECIAL_TOKENS)

    def tokens(*shape: int) -> np.ndarray:
        """By Zipf's law: the probability of a token falls with its id."""
        return (first * (VOCABULARY / first) ** rng.random(shape)).astype(np.int64)

    ids_NL = tokens(ROWS, LENGTH)
    ids_NL[:, 0], ids_NL[:, -1] = manifest.special_ids["cls"], manifest.special_ids["sep"]
    entropy_NL = rng.gamma(2, 2, (ROWS, LENGTH)).astype(np.float32)
    entropy_NL[:, [0, -1]] = np.nan
    logprobs_NLK = -0.5 - rng.exponential(0.5, (ROWS, LENGTH, TOP_K)).astype(np.float32).cumsum(-1)
    scores = Scores(entropy_NL, entropy_NL, tokens(ROWS, LENGTH, TOP_K), logprobs_NLK, {})
    table = parquet.to_table(index, ids_NL, scores, VOCABULARY, TOP_K)
    fields = parquet.counts(ids_NL, manifest.special_ids["pad"], scores) | {
        "fingerprint_hash": manifest.fingerprint_hash,
        "attempt": 1,
        "forward_seconds": 0.0,
        "flops": 0,
        "device": "none",
        "worker": platform.node(),
        "documents": 0,
        "rejected": Rejects().report(),
    }
    return commit.commit_shard(manifest.uri, index, parquet.to_parquet(parquet.row_groups(table)), fields, started)


if __name__ == "__main__":
    console.run(main)
