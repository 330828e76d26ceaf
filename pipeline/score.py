#!/usr/bin/env python3
"""Score a corpus with a masked LM on Ray: Parquet shards of tokens, predictive entropies and top-k log-probabilities.

    python pipeline/score.py --corpus docstrings --teacher bert-base-uncased --output runs/scored
    python pipeline/score.py --corpus 'text/*.jsonl.gz' --teacher none --tokenizer runs/tokenizer --output runs/tokens
    python pipeline/score.py --corpus runs/tokens --teacher runs/reference --output runs/scored
    ray job submit --working-dir . -- python pipeline/score.py --corpus s3://… --teacher … --output s3://…

A killed run is finished by the same command: shards that are done are not scored again. See docs/scoring.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import RunError, UsageError
from entropy_masking.shards import commit, masks, parquet
from entropy_masking.shards.parquet import shard_file
from entropy_masking.shards.schema import Record
from pipeline.backends import local_records, ray_records
from pipeline.corpus.plan import Corpus, plan_corpus
from pipeline.job import Job, choose_tokenizer, describe, try_teacher


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    corpus = plan_corpus(
        args.corpus,
        text_column=args.text_column,
        document=args.document,
        shard_tokens=args.shard_tokens,
        limit_documents=args.limit_documents,
    )
    tokenizer = choose_tokenizer(args.tokenizer, args.teacher, corpus)
    job = describe(args, corpus, tokenizer)
    shards, fingerprint = len(corpus.shards), job.manifest.fingerprint
    commit.claim_directory(job.output, fingerprint, shards, write=False)
    records = commit.done_records(job.output, shards, job.manifest.fingerprint_hash)
    todo = [(index, ranges) for index, ranges in enumerate(corpus.shards) if ranges and index not in records]
    if todo or args.dry_run:
        try_teacher(job)  # fails here, before anything is written and before there are workers
    if args.dry_run:
        print_plan(job, corpus)
        return
    commit.claim_directory(job.output, fingerprint, shards)
    failed: dict[int, str] = {}
    if todo:
        commit.save_tokenizer(tokenizer, job.output)
        on_ray = args.backend == "ray"
        run = ray_records(job, todo, args.workers, args.gpus_per_worker) if on_ray else local_records(job, todo)
        failed = collect(run, records, shards, corpus.shard_tokens, args.max_failed_shards)
    finish(job, records, failed, args.max_failed_shards, scored_now=len(todo) - len(failed))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pipeline/score.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--corpus",
        required=True,
        help="docstrings, files, a directory, a glob, hf:NAME[:CONFIG[:SPLIT]], a shard directory",
    )
    add("--teacher", required=True, help="masked LM by path or Hub id; none writes tokens without scores")
    add("--output", required=True, help="shard directory to write, a path or an object-store URI")
    add("--tokenizer", help="path or Hub id (default: the teacher's, or the corpus' if that is a shard directory)")
    add("--text-column", help="column or key of the text (default: text)")
    add("--document", choices=["line", "file"], help="what a document is in a plain-text file (default: line)")
    add("--limit-documents", type=console.positive, help="only the first N documents of the corpus")
    add("--sequence-length", type=console.positive, help="tokens a sequence, specials included (default: 128)")
    add("--context", choices=["masked", "full"], help="hide the scored position, or not (default: masked)")
    add("--passes", type=console.positive, help="masked context: each pass hides one position in P (default: 7)")
    add("--top-k", type=console.not_negative, help="log-probabilities to keep a position, 0 for none (default: 16)")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], help="of the encoder (default: auto)")
    add("--batch-tokens", type=console.positive, help="tokens in one forward (default: 8192)")
    add("--shard-tokens", type=console.positive, help="about how many tokens a shard (default: 262144)")
    add("--temperatures", type=temperatures, help="also keep what the top-k need at these, as in 1,2 (default: 1)")
    add("--masks", help="a mask plan of train/plan.py for the corpus: predict its positions of its inputs only")
    add("--workers", type=console.positive, help="actors at most (default: as many as fit the cluster)")
    add(
        "--gpus-per-worker",
        type=console.positive_float,
        help="GPUs of an actor, fractions too (default: 1 where there are GPUs)",
    )
    add(
        "--cpus-per-worker",
        type=console.positive,
        help="threads without GPUs (default: 1; --backend local: all cores)",
    )
    add(
        "--torch-compile", action="store_true", default=None, help="compile the model: worth it on a GPU and a long run"
    )
    add("--backend", choices=["ray", "local"], default="ray", help="local scores in this process")
    add("--max-attempts", type=console.positive, default=3, help="before a shard is given up (default: 3)")
    add("--max-failed-shards", type=console.not_negative, default=0, help="shards a run may end without (default: 0)")
    add(
        "--shard-timeout",
        type=console.positive_float,
        help="seconds to read, score or write a shard before its worker is taken to hang",
    )
    add("--trust-remote-code", action="store_true", help="run model code that a checkpoint brings along")
    add("--dry-run", action="store_true", help="show the plan and stop")
    args = parser.parse_args(argv)
    scoring: dict[str, Any] = {"context": "masked", "passes": 7, "top_k": 16, "dtype": "auto", "batch_tokens": 8192}
    scoring |= {"temperatures": [1.0], "masks": None, "gpus_per_worker": None, "torch_compile": False}
    if args.teacher == "none" and (given := [name for name in scoring if getattr(args, name) is not None]):
        raise UsageError(f"--{given[0].replace('_', '-')} needs a teacher; leave it out with --teacher none")
    if args.context == "full" and args.passes is not None:
        raise UsageError("--passes only applies to --context masked; leave it out with --context full")
    if args.masks and (args.context or args.passes):
        raise UsageError("--masks says what the teacher sees; leave out --context and --passes")
    for name, default in scoring.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.masks and not args.top_k:
        raise UsageError("--masks is for the teacher's top-k; set --top-k above 0")
    if len(args.temperatures) > 1 and not args.top_k:
        raise UsageError("--temperatures are of the top-k; set --top-k above 0")
    if args.backend == "local":
        for name in ("workers", "gpus_per_worker"):
            if getattr(args, name) and not (name == "workers" and args.workers == 1):
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"--backend local has one worker, this process; leave out {flag} or use --backend ray")
        args.cpus_per_worker = args.cpus_per_worker or psutil.cpu_count(logical=False) or 1
    args.cpus_per_worker = args.cpus_per_worker or 1
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not (storage.is_remote(args.output) or args.output[:1] == "/"):
        raise UsageError(
            f"--output {args.output} would be lost with the job's directory; name an absolute path or a URI"
        )
    return args


def temperatures(text: str) -> list[float]:
    """argparse type of ``1,2``: positive numbers, ascending, 1 always among them."""
    values = {float(part) for part in text.split(",")} | {1.0}
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text} are no positive numbers")
    return sorted(values)


def collect(
    run: Iterator[Record | dict[str, Any]], records: dict[int, Record], shards: int, shard_tokens: int, allowed: int
) -> dict[int, str]:
    """Add the records that a backend yields to ``records``, showing progress in tokens; returns what failed, and why.

    Raises:
        UsageError: more shards failed than allowed, one for a reason that the user can mend; the others are done.
        RunError: nothing more can be written.
    """
    tokens = sum(record.tokens_or_positions for record in records.values())
    failed, usage = {}, []
    with console.Progress(shard_tokens * shards, "tok", "scoring", done=tokens) as progress:
        if records:
            progress.note(f"{len(records)} of {shards} shards are done already")
        try:
            for record in run:
                if isinstance(record, dict):
                    failed[record["index"]] = record["error"]
                    usage += [record["error"]] if record.get("usage") else []
                    progress.note(record.get("traceback") or f"shard {record['index']} failed: {record['error']}")
                    if record.get("fatal"):
                        raise RunError(f"{record['error']}; make room, then run the command again")
                    continue
                records[record.index] = record
                tokens += record.tokens_or_positions
                progress.total = round(tokens / len(records) * shards)  # better known with every shard
                progress.advance(record.tokens_or_positions)
        except KeyboardInterrupt:
            progress.note(f"stopped: {len(records)} of {shards} shards are done; the same command goes on")
            raise
    if usage and len(failed) > allowed:
        raise UsageError(f"{len(failed)} of {shards} shards failed, the first with: {usage[0]}")
    return failed


def finish(job: Job, records: dict[int, Record], failed: dict[int, str], allowed: int, scored_now: int) -> None:
    """Write the manifest and print what the directory holds.

    Raises:
        RunError: more shards failed than allowed; the others are kept.
        UsageError: there is nothing in the corpus.
    """
    named = "; ".join(f"{shard_file(index)}: {reason}" for index, reason in sorted(failed.items())[:5])
    if len(failed) > allowed:
        raise RunError(
            f"{len(failed)} of {job.manifest.planned_shards} shards failed ({named}); the others are done. "
            "Run the command again to retry them, or with --max-failed-shards to end without them"
        )
    if not any(record.rows for record in records.values()):
        reasons = "; ".join(sorted({reason for record in records.values() for reason in record.rejected.reasons}))
        raise UsageError(f"the corpus holds no text: every document was rejected ({reasons or 'there are none'})")
    if job.teacher and not any(record.scored_tokens for record in records.values()):
        raise UsageError("no token of the corpus was scored, all are special to the tokenizer; use the teacher's own")
    totals = commit.write_manifest(job.manifest, records, failed).totals
    tokens = totals["scored_tokens"] if job.plan else totals["tokens"]
    print(f"{job.output}: {len(records)} shards ({scored_now} scored now)")
    if failed:
        print(f"  given up            {len(failed)} shards ({named})")
    print(f"  sequences           {totals['sequences']:,} of {job.manifest.sequence_length} tokens")
    print(f"  {'scored positions' if job.plan else 'tokens          '}    {tokens:,}")
    if totals["entropy_sum"]:
        print(f"  mean entropy        {totals['entropy_sum'] / totals['scored_tokens']:.3f} nats")
    workers = f"{totals['worker_seconds']:,.1f} of {totals['workers']} workers"
    print(f"  seconds             {totals['seconds']:,.1f} ({workers})")
    rates = sorted(cost["tokens_per_second"] for cost in totals["by_worker"].values())
    by_worker = f" ({rates[0]:,.0f} to {rates[-1]:,.0f} by worker)" if len(rates) > 1 and rates[-1] else ""
    print(f"  tokens/s            {tokens / max(totals['seconds'], 1e-3):,.0f}{by_worker}")
    if totals["flops"]:
        print(f"  in the model        {totals['utilisation']:.0%} of the workers' seconds, {totals['flops']:.3g} FLOPs")
    if totals["rescued_shards"]:
        print(f"  smaller batches     {totals['rescued_shards']} shards, for want of memory")
    reasons = ", ".join(f"{count} {reason}" for reason, count in totals["rejected_reasons"].items())
    print(f"  rejected documents  {totals['rejected']:,}{f' ({reasons}), listed in _records/' if reasons else ''}")
    print(f"  bytes per token     {totals['bytes'] / tokens:.2f}")


def print_plan(job: Job, corpus: Corpus) -> None:
    """What a run would do, without doing it."""
    manifest = job.manifest
    done = len(commit.done_records(job.output, len(corpus.shards), manifest.fingerprint_hash))
    scoring = f"{job.teacher}, {manifest.context} context, {manifest.passes} passes, top-{manifest.top_k}, {job.dtype}"
    schema = parquet.schema(manifest.vocab_size, manifest.scored, manifest.top_k, manifest.temperatures)
    if job.plan:
        schema = masks.targets_schema(manifest.vocab_size, manifest.temperatures)
    print(f"would write {job.output}: {len(corpus.shards)} shards, {done} of them done")
    print(f"  teacher    {scoring if job.teacher else 'none: tokens only'}")
    print(f"  sequences  of {manifest.sequence_length} tokens, vocabulary of {manifest.vocab_size}")
    print(f"  columns    {', '.join(schema.names)}")


if __name__ == "__main__":
    console.run(main)
