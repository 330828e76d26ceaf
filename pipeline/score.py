#!/usr/bin/env python3
"""Score a corpus with a masked LM on Ray: Parquet shards of tokens, predictive entropies and top-k log-probabilities.

    python pipeline/score.py --corpus docstrings --teacher bert-base-uncased --output runs/scored
    python pipeline/score.py --corpus 'text/*.jsonl.gz' --teacher none --tokenizer runs/tokenizer --output runs/tokens
    python pipeline/score.py --corpus runs/tokens --teacher runs/reference --output runs/scored
    python pipeline/score.py --corpus runs/scored --teacher TEACHER --mask-source parquet --output runs/targets
    ray job submit --working-dir . -- python pipeline/score.py --corpus s3://… --teacher … --output s3://…

The same command finishes a killed run: it does not score finished shards again. See docs/scoring.md.
"""

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the checkout

from entropy_masking.commands import console
from pipeline.options import parse, text_options

if __name__ == "__main__":
    console.check_flags(lambda: parse(sys.argv[1:], __doc__))  # before the imports that take seconds

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError
from entropy_masking.shards import commit
from entropy_masking.shards.fields import Masks
from entropy_masking.shards.parquet import shard_file
from entropy_masking.shards.schema import Record
from entropy_masking.shards.spread import entropy_spread, spread_words
from pipeline.backends import dtype_of, local_records, ray_records
from pipeline.corpus.plan import Corpus, plan_corpus
from pipeline.job import Failure, Job, check_teacher_runs, choose_tokenizer, new_job
from pipeline.status import line, totals_lines


def main(argv: list[str] | None = None) -> None:
    args = parse(argv, __doc__)
    corpus = plan_corpus(args.corpus, shard_tokens=args.shard_tokens, output=args.output, **text_options(args))
    tokenizer = choose_tokenizer(args.tokenizer, args.teacher, corpus)
    args.dtype = dtype_of(args)
    job = new_job(args, corpus, tokenizer)
    commit.check_directory(job.output, job.run.fingerprint)
    records = commit.done_records(job.output, job.run)
    # a shard without ranges has no file: the corpus is a shard directory that lacks it
    todo = [(index, ranges) for index, ranges in enumerate(corpus.shards) if ranges and index not in records]
    if todo:
        check_teacher_runs(job)  # an error here comes before anything is written and before there are workers
    commit.begin_run(job.output, job.run)
    storage.write_bytes(storage.join(job.output, "flags.yaml"), args.as_yaml.encode())
    failures: list[Failure] = []
    if todo:
        commit.save_tokenizer(tokenizer, storage.join(job.output, "tokenizer"))
        on_ray = args.backend == "ray"
        outcomes = ray_records(job, todo, args.workers, args.gpus_per_worker) if on_ray else local_records(job, todo)
        failures = collect(job, corpus, outcomes, records)
    finish(job, records, failures, args.max_failed_shards, scored_now=len(todo) - len(failures))


def collect(
    job: Job, corpus: Corpus, outcomes: Generator[Record | Failure, None, None], records: dict[int, Record]
) -> list[Failure]:
    """Add the records that a backend yields to ``records``, and show progress in tokens or positions.

    Returns the failures. Raises RunError if nothing more can be written, or the directory was deleted.
    """
    shards, work = len(corpus.shards), work_of(corpus, job.manifest.masks)
    tokens = sum(record.tokens_or_positions for record in records.values())
    total = tokens + sum(own for index, own in enumerate(work) if index not in records)
    failures: list[Failure] = []
    label = "scoring" if job.manifest.teacher else "tokenizing"
    with console.Progress(total, "tok", label, done=tokens) as progress:
        if records:
            console.note(f"{len(records)} of {shards} shards are done already")
        try:
            for outcome in outcomes:
                with contextlib.suppress(OSError):  # an object store may answer the next time
                    commit.check_kept(job.output, job.run)
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    console.note(outcome.traceback or f"shard {outcome.index} failed: {outcome.error}")
                    if outcome.fatal:
                        raise RunError(f"{outcome.error}; make room, then run the command again")
                    continue
                records[outcome.index] = outcome
                tokens += outcome.tokens_or_positions
                if corpus.from_shards:
                    progress.bar.total += outcome.tokens_or_positions - work[outcome.index]
                else:
                    progress.bar.total = round(tokens / len(records) * shards)  # better known with every shard
                progress.advance(outcome.tokens_or_positions)
        except KeyboardInterrupt:
            outcomes.close()  # when all workers have ended, no other shard can follow
            done = commit.done_records(job.output, job.run)
            console.note(f"stopped: {len(done)} of {shards} shards are done; the same command resumes")
            raise
    return failures


def work_of(corpus: Corpus, masks: Masks | None) -> list[int]:
    """Tokens to score of each shard: estimated for text, else known; of targets, the most masked positions."""
    if not corpus.from_shards:
        return [corpus.shard_tokens] * len(corpus.shards)
    work = [0] * len(corpus.shards)  # a shard that was given up has none
    for entry in corpus.from_shards.shards:
        work[entry.index] = entry.rows * masks["variants"] * masks["positions"] if masks else entry.tokens
    return work


def finish(job: Job, records: dict[int, Record], failures: list[Failure], max_failed: int, scored_now: int) -> None:
    """Write the manifest, and print the contents of the directory.

    Raises:
        RunError: more than ``max_failed`` shards failed, and the others are kept; or files were deleted during the run.
        UsageError: a shard failed by a mistake of the user; or the corpus has no text, or no token to score.
    """
    commit.check_kept(job.output, job.run)
    if lost := len(records) - len(commit.with_files(job.output, records)):
        raise RunError(f"{lost} shards in {job.output} were deleted or replaced during the run; run the command again")
    failed = {failure.index: failure.error for failure in failures}
    named = "; ".join(f"{shard_file(index)}: {reason}" for index, reason in sorted(failed.items())[:5])
    if len(failed) > max_failed and (usage := [failure.error for failure in failures if failure.usage]):
        raise UsageError(f"{len(failed)} of {job.run.shards} shards failed; the first error: {usage[0]}")
    if len(failed) > max_failed:
        raise RunError(
            f"{len(failed)} of {job.manifest.planned_shards} shards failed ({named}); the others are done. "
            "Run the command again to retry them, or with --max-failed-shards to end without them"
        )
    if not any(record.rows for record in records.values()):
        reasons = "; ".join(sorted({reason for record in records.values() for reason in record.rejected.reasons}))
        raise UsageError(f"the corpus holds no usable text ({reasons or 'no documents'}); choose another --corpus")
    if job.manifest.teacher and not any(record.scored_tokens for record in records.values()):
        raise UsageError("no token of the corpus was scored: all are special tokens; use the teacher's own tokenizer")
    manifest = commit.write_manifest(job.manifest, records, failed)
    totals = manifest.totals
    made = "scored" if job.manifest.teacher else "written"
    print(f"{job.output}: {len(records)} shard{'s' * (len(records) != 1)} ({scored_now} {made} now)")
    if failed:
        print(line("given up", f"{len(failed)} shards ({named})"))
    if job.manifest.teacher and (bare := [shard_file(i) for i, record in records.items() if not record.scored_tokens]):
        named = ", ".join(bare[:5]) + " …" * (len(bare) > 5)
        print(line("without scores", f"{len(bare)} shards ({named}): all tokens are special or [UNK]"))
    print(line("sequences", f"{totals['sequences']:,} of {job.manifest.sequence_length} tokens"))
    print("\n".join(totals_lines(totals)))
    if manifest.kind == "sequences" and (spread := entropy_spread(manifest)):
        print(line("entropies", spread_words(*spread)))


if __name__ == "__main__":
    console.run(main)
