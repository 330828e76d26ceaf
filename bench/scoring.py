#!/usr/bin/env python3
"""How near scoring comes to the teacher's own forward, what a job adds to it, and how small its shards are.

    python bench/scoring.py --teacher bert-base-uncased --corpus docstrings

Speeds are measured side by side in one process, in turns, with one dtype, number of threads and malloc. Prints a table
with the budgets, and as its last line the same as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bench.commands import ROOT, keep_buffers, new_parser, run_script
from bench.table import GOAL, Row, device_name, in_turns, peak_bytes, peak_flops, print_table, reset_peak, row
from entropy_masking.commands import console
from entropy_masking.commands.flags import positive
from entropy_masking.errors import UsageError
from entropy_masking.models.checkpoints import load_tokenizer, local_checkpoint, resolve_dtype
from entropy_masking.models.flops import forward_flops
from entropy_masking.shards import commit, parquet
from entropy_masking.shards.manifests import Manifest, read_manifest, read_table
from pipeline.corpus.packing import text_tokenizer, tokenize
from pipeline.corpus.plan import plan_corpus
from pipeline.corpus.readers import Rejects, read_documents
from pipeline.teacher import DTYPES, Teacher

MASKS = ["--mask-source", "parquet", "--mask-temperature", 1, "--mask-ratio", 0.15, "--variants", 4, "--top-k", 12]


def main() -> None:
    args = parse()
    keep_buffers()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if args.scan:
            scan = read_manifest(args.scan)
        else:
            tokenizer = load_tokenizer(args.teacher)
            texts = write_texts(max(args.size_tokens, args.tokens + args.sequence_length), tokenizer, args, work)
            one_shard = ("--sequence-length", args.sequence_length, "--shard-tokens", 1 << 30, "--backend", "local")
            scan = score(texts, work / "scan", args, *one_shard)
        ids_NL = whole_sequences(scan, args)
        rows = speeds("masked", scan.passes, scan, ids_NL, args) | speeds("full", 1, scan, ids_NL, args)
        if not args.scan:
            if args.job_seconds:
                rows |= overhead(round(args.job_seconds * rows["ours_masked"].value), tokenizer, args, work)
            rows |= sizes(scan, args, work)
    print_table(rows, vars(args) | {"device": device_name(), "passes": scan.passes, "measured_tokens": ids_NL.size})


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="masked LM by path or Hub id")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--corpus", help="texts, as for pipeline/score.py; its first documents are scored")
    texts.add_argument("--scan", help="a shard directory; measure only the speed on its first sequences")
    add("--text-column", default="text")
    add("--sequence-length", type=positive, default=128)
    add("--batch-tokens", type=positive, default=8192, help="tokens in one of our forwards (default: 8192)")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--torch-compile", action="store_true", help="compile the teacher, also for the bare forwards")
    add("--threads", type=positive, default=1, help="torch threads of every contestant (default: 1)")
    add("--tokens", type=positive, default=2048, help="text scored in each round (default: 2048)")
    add("--rounds", type=positive, default=4)
    add("--job-seconds", type=float, default=300, help="approximate seconds of the job; 0 skips it (default: 300)")
    add("--size-tokens", type=positive, default=16384, help="tokens in the measured shards (default: 16384)")
    args = parser.parse_args()
    args.dtype = resolve_dtype(args.dtype)
    return args


def write_texts(tokens: int, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, work: Path) -> Path:
    """Write the first documents of the corpus, as many as have so many tokens."""
    corpus, rejects, count = plan_corpus(args.corpus, text_column=args.text_column), Rejects(), 0
    if corpus.from_shards:
        raise UsageError(f"--corpus {args.corpus} is a shard directory, but this bench also reads text; name texts")
    documents = (document for ranges in corpus.shards for document in read_documents(ranges, args.text_column, rejects))
    with open(work / f"{tokens}.jsonl", "w") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text}) + "\n")
            count += sum(len(ids) + 1 for ids in tokenize([document], text_tokenizer(tokenizer), rejects))
            if count >= tokens:
                break
    return Path(file.name)


def score(corpus: Path, output: Path, args: argparse.Namespace, *flags: object, kind: str = "sequences") -> Manifest:
    """Run pipeline/score.py with the teacher as it is measured here."""
    files = ("--corpus", corpus, "--teacher", args.teacher, "--output", output)
    settings = ("--dtype", args.dtype, "--batch-tokens", args.batch_tokens, "--cpus-per-worker", args.threads)
    run_script(ROOT / "pipeline" / "score.py", *files, *settings, *flags)
    return read_manifest(str(output), kind)


def overhead(tokens: int, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, work: Path) -> dict[str, Row]:
    """A job of one worker on Ray: its rate, and its share of seconds outside the model, by its own records."""
    texts, job = write_texts(tokens, tokenizer, args, work), work / "job"
    sizes = ("--sequence-length", args.sequence_length, "--shard-tokens", max(1, tokens // 10))
    totals = score(texts, job, args, *sizes, "--workers", 1).totals
    records = list(commit.read_records(str(job)).values())
    begun = min(record.ended - record.seconds for record in records)
    wall = max(record.ended for record in records) - begun  # of the one worker, with its pauses
    return {
        "job_seconds": row(wall, "s"),
        "job_shards": row(len(records), "shards"),
        "job_outside_model": row(1 - totals["forward_seconds"] / wall, "of the worker's time", at_most=0.03),
        "job": row(totals["tokens"] / wall, "tokens/s"),
    }


def sizes(scan: Manifest, args: argparse.Namespace, work: Path) -> dict[str, Row]:
    """Bytes a token of a scan, with and without top-k log-probabilities, and of exact targets with the scan."""
    targets = score(Path(scan.uri), work / "targets", args, *MASKS, "--backend", "local", kind="targets")
    (entry,) = scan.shards
    plain = read_table(scan, entry, parquet.schema(scan.vocab_size, scored=True, top_k=0).names)
    plain_bytes, target_bytes = len(parquet.to_parquet(parquet.row_groups(plain))), targets.totals["bytes"]
    return {
        "scan_top_k_bytes": row(entry.bytes / entry.tokens, "B/token"),
        "scan_bytes": row(plain_bytes / entry.tokens, "B/token", at_most=5.1),
        "targets_bytes": row(target_bytes / entry.tokens, "B/token"),
        "targets_and_scan_bytes": row((target_bytes + plain_bytes) / entry.tokens, "B/token", at_most=24),
    }


def whole_sequences(scan: Manifest, args: argparse.Namespace) -> np.ndarray:
    """Ids [N, L] of ``--tokens`` tokens, none of them padding. Raises UsageError if there are none."""
    ids_NL = parquet.column_2d(read_table(scan, scan.shards[0], ["input_ids"]), "input_ids", scan.sequence_length)
    ids_NL = ids_NL[(ids_NL != scan.special_ids["pad"]).all(1)][: max(1, args.tokens // scan.sequence_length)]
    if not len(ids_NL):
        raise UsageError(f"{args.corpus or args.scan} has no whole sequence; name a larger one")
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
