#!/usr/bin/env python3
"""Score a corpus with a masked LM on Ray: Parquet shards of tokens, predictive entropies and top-k log-probabilities.

    python pipeline/score.py --corpus docstrings --teacher bert-base-uncased --output runs/scored
    python pipeline/score.py --corpus 'text/*.jsonl.gz' --teacher none --tokenizer runs/tokenizer --output runs/tokens
    python pipeline/score.py --corpus runs/tokens --teacher runs/reference --output runs/scored
    python pipeline/score.py --corpus runs/scored --teacher TEACHER --mask-source parquet --output runs/targets
    ray job submit --working-dir . -- python pipeline/score.py --corpus s3://… --teacher … --output s3://…

A killed run is finished by the same command: shards that are done are not scored again. See docs/scoring.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from entropy_masking.commands import console
from entropy_masking.errors import RunError, UsageError
from entropy_masking.shards import commit, parquet
from entropy_masking.shards.parquet import shard_file
from entropy_masking.shards.schema import Record
from entropy_masking.shards.targets import targets_schema
from pipeline.backends import local_records, ray_records
from pipeline.corpus.plan import Corpus, plan_corpus
from pipeline.job import Job, choose_tokenizer, new_job, try_teacher
from pipeline.options import parse


def main(argv: list[str] | None = None) -> None:
    args = parse(argv, __doc__)
    corpus = plan_corpus(
        args.corpus,
        text_column=args.text_column,
        document=args.document,
        shard_tokens=args.shard_tokens,
        limit_documents=args.limit_documents,
    )
    tokenizer = choose_tokenizer(args.tokenizer, args.teacher, corpus)
    job = new_job(args, corpus, tokenizer)
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
    if job.manifest.teacher and not any(record.scored_tokens for record in records.values()):
        raise UsageError("no token of the corpus was scored, all are special to the tokenizer; use the teacher's own")
    totals = commit.write_manifest(job.manifest, records, failed).totals
    tokens = totals["scored_tokens"] if job.manifest.masks else totals["tokens"]
    print(f"{job.output}: {len(records)} shards ({scored_now} scored now)")
    if failed:
        print(f"  given up            {len(failed)} shards ({named})")
    print(f"  sequences           {totals['sequences']:,} of {job.manifest.sequence_length} tokens")
    print(f"  {'scored positions' if job.manifest.masks else 'tokens          '}    {tokens:,}")
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
    manifest, masks = job.manifest, job.manifest.masks
    done = len(commit.done_records(job.output, len(corpus.shards), manifest.fingerprint_hash))
    schema = parquet.schema(manifest.vocab_size, manifest.scored, manifest.top_k, manifest.temperatures)
    inputs, scoring = f"{manifest.context} context, {manifest.passes} passes", "none: tokens only"
    if masks:
        schema = targets_schema(manifest.vocab_size, manifest.temperatures)
        inputs = f"{masks['variants']} masks of each sequence by --mask-source {masks['source']}"
    if manifest.teacher:
        scoring = f"{manifest.teacher}, {inputs}, top-{manifest.top_k}, {job.fingerprint['dtype']}"
    print(f"would write {job.output}: {len(corpus.shards)} shards, {done} of them done")
    print(f"  teacher    {scoring}")
    print(f"  sequences  of {manifest.sequence_length} tokens, vocabulary of {manifest.vocab_size}")
    print(f"  columns    {', '.join(schema.names)}")


if __name__ == "__main__":
    console.run(main)
