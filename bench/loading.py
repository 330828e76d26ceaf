#!/usr/bin/env python3
"""How fast one core turns shards into batches, in how much memory, and how soon a resumed billion-token run starts.

    python bench/loading.py
    python bench/loading.py --shards runs/scored --batch 256 --rounds 5

Without --shards it makes shards of random tokens and scores. A large corpus names the same files several times. Each
measurement has a process of its own, on one core. Prints a table with the budgets, and as its last line the same as one
JSON object.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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

from bench.table import Row, last_line, parser, print_table, row
from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards import commit, manifests, parquet
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.manifests import Manifest, read_manifest
from entropy_masking.shards.parquet import ROW_GROUP, Scores
from entropy_masking.shards.read import Columns
from entropy_masking.shards.schema import Run
from pipeline.corpus.readers import Rejects
from pipeline.tokenizer import SPECIAL_TOKENS
from train.data import WINDOW, TrainingSequences, masker_of, split_shards

Prepare = Callable[[dict[str, Tensor]], dict[str, Tensor]]

COLUMNS = {"tokens": Columns(), "entropy": Columns(entropy=True), "top_k": Columns(entropy=True, top_k=True)}
BUDGETS = {"tokens": 5e6, "entropy": 5e6, "top_k": 2e6}  # tokens/s
RESUMED_AT = 0.9  # of the tokens of the resumed run
MADE_UP = "made up"
SHARDS, ROWS = WINDOW // 2, 2 * ROW_GROUP  # of the made up corpus: one window, in shards of two row groups
LENGTH, VOCABULARY, TOP_K = 128, 30522, 16


def main() -> None:
    args = parse()
    if args.child:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(measure(args.child[0], int(args.child[1]), args))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if not args.shards:
            args.shards = make_up(Path(temporary) / "shards").uri
        manifest = read_manifest(args.shards)
        long = lengthen(manifest, args.tokens, Path(temporary) / "long")

        def rounds(what: str, shards: str = args.shards, times: int = 1, count: int = args.rounds) -> np.ndarray:
            """What ``measure`` gives, in processes of their own, so that their memory is their own."""
            flags = ["--shards", shards, "--batch", args.batch, "--windows", args.windows, "--child", what, times]
            return np.array([float(last_line(f"measuring {what}", __file__, *flags)) for _ in range(count)])

        rows: dict[str, Row] = {}
        for name in list(COLUMNS)[: 1 + manifest.scored + (manifest.top_k > 0)]:
            rows[name] = row(rounds(name), "tokens/s", at_least=BUDGETS[name])
            rows[f"{name}_masked"] = row(rounds(f"{name}_masked"), "tokens/s")
        memory = {times: float(rounds("memory", times=times, count=1)[0]) for times in (1, 10)}
        rows |= {f"memory_{times}x": row(size / 2**20, "MiB") for times, size in memory.items()}
        rows["memory_10x_to_1x"] = row(memory[10] / memory[1], "×", at_most=1.1)
        rows["first_batch"] = row(rounds("first", long), "s", at_most=5)
    del args.child
    print_table(rows, vars(args) | {"shards": args.shards if manifest.teacher != MADE_UP else MADE_UP})


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    add = flags.add_argument
    add("--shards", help="shard directory on this machine (default: made up ones)")
    add("--batch", type=console.positive, default=64, help="sequences a batch (default: 64)")
    add("--windows", type=console.positive, default=3, help="windows of the shuffle read in each round (default: 3)")
    add("--tokens", type=console.positive, default=10**9, help="of the resumed run (default: 1,000,000,000)")
    add("--rounds", type=console.positive, default=3)
    add("--child", nargs=2, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.shards and storage.is_remote(args.shards):
        raise UsageError(f"--shards {args.shards} is not on this machine; copy it, because local reading is measured")
    return args


# --- one measurement -------------------------------------------------------------------------------------------------


def measure(what: str, times: int, args: argparse.Namespace) -> float:
    if what == "first":
        return first_batch(args)
    manifest = read_manifest(args.shards)
    if what == "memory":
        return memory(manifest, args, times)
    columns = COLUMNS[what.removesuffix("_masked")]
    sequences = corpus(manifest, columns, args.windows, mask(manifest) if what.endswith("_masked") else as_it_is)
    started = time.perf_counter()
    for start in range(0, len(sequences), args.batch):
        sequences.__getitems__(list(range(start, min(start + args.batch, len(sequences)))))
    return len(sequences) * manifest.sequence_length / (time.perf_counter() - started)


def memory(manifest: Manifest, args: argparse.Namespace, times: int) -> int:
    """The most bytes that reading a corpus takes, with all columns that there are."""
    before = psutil.Process().memory_info().rss
    columns = Columns(entropy=manifest.scored, top_k=manifest.top_k > 0)
    sequences = corpus(manifest, columns, args.windows * times, as_it_is)
    for start in range(0, len(sequences), ROW_GROUP):  # one batch makes the loader decode its window
        sequences.__getitems__(list(range(start, min(start + args.batch, len(sequences)))))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before


def first_batch(args: argparse.Namespace) -> float:
    """Seconds from the manifest to the first batch of a resumed run, on the way of train/run.py and Trainer."""
    started = time.perf_counter()
    manifest = read_manifest(args.shards)
    check_shards(manifest, contents=False)
    entries, _ = split_shards(manifest, 0.01)
    columns, size = Columns(manifest.scored, manifest.top_k > 0), sum(entry.rows for entry in entries)
    sequences = TrainingSequences(manifest, entries, columns, size=size, seed=0, prepare=mask(manifest))
    loader = DataLoader(sequences, batch_size=args.batch, shuffle=False, collate_fn=as_it_is)
    next(iter(skip_first_batches(loader, int(RESUMED_AT * size / args.batch))))
    return time.perf_counter() - started


def mask(manifest: Manifest) -> Prepare:
    """Masks raw batches as a run does: by the highest entropies if a batch has some, else at random."""
    masker = masker_of(manifest)
    return lambda batch: masker(batch, MaskPolicy() if "entropy" in batch else MaskPolicy.random())


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


# --- what is read ----------------------------------------------------------------------------------------------------


def corpus(manifest: Manifest, columns: Columns, windows: int, prepare: Prepare) -> TrainingSequences:
    """One epoch over the shards, repeated until they fill so many windows."""
    groups = sum(math.ceil(entry.rows / ROW_GROUP) for entry in manifest.shards)
    entries = manifest.shards * math.ceil(windows * WINDOW / groups)
    size = sum(entry.rows for entry in entries)
    return TrainingSequences(manifest, entries, columns, size=size, seed=0, prepare=prepare)


def lengthen(manifest: Manifest, tokens: int, directory: Path) -> str:
    """A directory of so many tokens: links to the files, and a manifest that repeats their names."""
    directory.mkdir()
    for name in ("tokenizer", *(entry.file for entry in manifest.shards)):
        (directory / name).symlink_to(Path(storage.absolute(manifest.uri)) / name)
    fields = storage.read_json(manifests.manifest_uri(manifest.uri))
    fields["shards"] *= math.ceil(tokens / sum(entry.rows * manifest.sequence_length for entry in manifest.shards))
    storage.write_json(manifests.manifest_uri(str(directory)), fields)
    return str(directory)


def make_up(directory: Path) -> Manifest:
    """Scored shards of random values that are about as likely, and so as compressible, as those of text."""
    words = [*SPECIAL_TOKENS, *(f"word{number}" for number in range(VOCABULARY - len(SPECIAL_TOKENS)))]
    wordpiece = BertWordPieceTokenizer(vocab={word: token for token, word in enumerate(words)})
    tokenizer = BertTokenizer(tokenizer_object=wordpiece._tokenizer)
    commit.save_tokenizer(tokenizer, str(directory))
    fingerprint = {"schema_version": parquet.SCHEMA_VERSION, "corpus": {}, "tokenizer": "", "sequence_length": LENGTH}
    fingerprint |= {"teacher": MADE_UP, "top_k": TOP_K, "temperatures": [], "context": "masked", "passes": 1}
    run = Run(fingerprint=fingerprint, shards=SHARDS)
    manifest = manifests.new_manifest(str(directory), run, tokenizer, MADE_UP)
    rng, first = np.random.default_rng(0), len(SPECIAL_TOKENS)

    def tokens(*shape: int) -> np.ndarray:
        """By Zipf's law: the probability of a token falls with its id."""
        return (first * (VOCABULARY / first) ** rng.random(shape)).astype(np.int64)

    records = {}
    for index in range(SHARDS):
        started, ids_NL = time.monotonic(), tokens(ROWS, LENGTH)
        ids_NL[:, 0], ids_NL[:, -1] = manifest.special_ids["cls"], manifest.special_ids["sep"]
        entropy_NL = rng.gamma(2, 2, (ROWS, LENGTH)).astype(np.float32)
        entropy_NL[:, [0, -1]] = np.nan
        logprobs_NLK = -0.5 - rng.exponential(0.5, (ROWS, LENGTH, TOP_K)).astype(np.float32).cumsum(-1)
        scores = Scores(entropy_NL, entropy_NL, tokens(ROWS, LENGTH, TOP_K), logprobs_NLK, {})
        data = parquet.to_parquet(parquet.row_groups(parquet.to_table(index, ids_NL, scores, VOCABULARY, TOP_K)))
        fields = parquet.counts(ids_NL, manifest.special_ids["pad"], scores)
        fields |= {"fingerprint_hash": run.fingerprint_hash, "attempt": 1, "forward_seconds": 0.0, "flops": 0}
        fields |= {"device": "none", "worker": platform.node(), "documents": 0, "rejected": Rejects().report()}
        records[index] = commit.commit_shard(str(directory), index, data, fields, started)
    return commit.write_manifest(manifest, records, {})


if __name__ == "__main__":
    console.run(main)
