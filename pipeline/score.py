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
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline import cli, commit
from pipeline.backends import local_records, ray_records
from pipeline.cli import RunError, UsageError
from pipeline.corpus import Corpus, plan_corpus
from pipeline.job import Job, choose_tokenizer, describe
from pipeline.shards import schema
from pipeline.teacher import load_masked_lm, local_checkpoint


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
    if args.dry_run:
        print_plan(job, corpus)
        return
    commit.claim_directory(job.output, job.fingerprint, len(corpus.shards))
    records = commit.done_records(job.output, len(corpus.shards), job.fingerprint_hash)
    todo = [(index, pieces) for index, pieces in enumerate(corpus.shards) if index not in records]
    if todo:
        if job.teacher:
            load_masked_lm(local_checkpoint(job.teacher), job.trust_remote_code)  # fails here, before there are workers
        commit.save_tokenizer(tokenizer, job.output)
        run = ray_records if args.backend == "ray" else local_records
        collect(run(job, todo, args.workers), records, len(corpus.shards), args.shard_tokens)
    finish(job, records, scored_now=len(todo))


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
    add("--text-column", default="text", help="column or key of the text (default: text)")
    add("--document", choices=["line", "file"], default="line", help="what a document is in a plain-text file")
    add("--limit-documents", type=cli.positive, help="only the first N documents of the corpus")
    add("--sequence-length", type=cli.positive, help="tokens a sequence, specials included (default: 128)")
    add("--context", choices=["masked", "full"], help="hide the scored position, or not (default: masked)")
    add("--passes", type=cli.positive, help="masked context: each pass hides one position in P (default: 7)")
    add("--top-k", type=int, help="log-probabilities to keep a position, 0 for none (default: 16)")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], help="of the encoder (default: auto)")
    add("--batch-tokens", type=cli.positive, help="tokens in one forward (default: 8192)")
    add("--shard-tokens", type=cli.positive, default=1 << 18, help="about how many tokens a shard (default: 262144)")
    add("--workers", type=cli.positive, help="actors (default: one a GPU, or one a physical core)")
    add("--backend", choices=["ray", "local"], default="ray", help="local scores in this process")
    add("--trust-remote-code", action="store_true", help="run model code that a checkpoint brings along")
    add("--dry-run", action="store_true", help="show the plan and stop")
    args = parser.parse_args(argv)
    scoring = {"context": "masked", "passes": 7, "top_k": 16, "dtype": "auto", "batch_tokens": 8192}
    if args.teacher == "none" and (given := [name for name in scoring if getattr(args, name) is not None]):
        raise UsageError(f"--{given[0].replace('_', '-')} needs a teacher; leave it out with --teacher none")
    if args.context == "full" and args.passes is not None:
        raise UsageError("--passes only applies to --context masked; leave it out with --context full")
    for name, default in scoring.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.workers and args.workers > 1 and args.backend == "local":
        raise UsageError("--backend local has one worker, this process; leave out --workers or use --backend ray")
    return args


def collect(run: Iterator[dict[str, Any]], records: dict[int, dict[str, Any]], shards: int, shard_tokens: int) -> None:
    """Add the records that a backend yields to ``records``, showing progress in tokens.

    Raises:
        UsageError: a shard failed for a reason that the user can mend.
        RunError: shards failed; every other shard is done by then.
    """
    tokens = sum(record["tokens"] for record in records.values())
    failed = []
    with cli.Progress(shard_tokens * shards, "tok", "scoring", done=tokens) as progress:
        if records:
            progress.note(f"{len(records)} of {shards} shards are done already")
        for record in run:
            if "error" in record:
                failed.append(record)
                progress.note(record.get("traceback") or "")
                continue
            records[record["index"]] = record
            tokens += record["tokens"]
            progress.total = round(tokens / len(records) * shards)  # better known with every shard
            progress.advance(record["tokens"])
    if failed:
        sentence = f"{len(failed)} of {shards} shards failed, the first with: {failed[0]['error']}"
        raise UsageError(sentence) if failed[0].get("usage") else RunError(f"{sentence}; run the command again")


def finish(job: Job, records: dict[int, dict[str, Any]], scored_now: int) -> None:
    """Write the manifest and print what the directory holds."""
    if not any(record["rows"] for record in records.values()):
        reasons = "; ".join(sorted({reason for record in records.values() for reason in record["rejected"]["reasons"]}))
        raise UsageError(f"the corpus holds no text: every document was rejected ({reasons or 'there are none'})")
    totals = commit.write_manifest(job, records).totals
    print(f"{job.output}: {len(records)} shards ({scored_now} scored now)")
    print(f"  sequences           {totals['sequences']:,} of {job.sequence_length} tokens")
    print(f"  tokens              {totals['tokens']:,}")
    if totals["scored_tokens"]:
        print(f"  mean entropy        {totals['entropy_sum'] / totals['scored_tokens']:.3f} nats")
    print(f"  seconds             {totals['seconds']:,.1f} ({totals['worker_seconds']:,.1f} of workers)")
    print(f"  tokens/s            {totals['tokens'] / max(totals['seconds'], 1e-3):,.0f}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in totals["rejected_reasons"].items())
    print(f"  rejected documents  {totals['rejected']:,}{f' ({reasons}), listed in _records/' if reasons else ''}")
    print(f"  bytes per token     {totals['bytes'] / totals['tokens']:.2f}")


def print_plan(job: Job, corpus: Corpus) -> None:
    """What a run would do, without doing it."""
    done = len(commit.done_records(job.output, len(corpus.shards), job.fingerprint_hash))
    scoring = f"{job.teacher}, {job.context} context, {job.passes} passes, top-{job.top_k}, {job.dtype}"
    print(f"would write {job.output}: {len(corpus.shards)} shards, {done} of them done")
    print(f"  teacher    {scoring if job.teacher else 'none: tokens only'}")
    print(f"  sequences  of {job.sequence_length} tokens, vocabulary of {job.vocab_size}")
    print(f"  columns    {', '.join(schema(job.vocab_size, job.teacher is not None, job.top_k).names)}")


if __name__ == "__main__":
    cli.run(main)
