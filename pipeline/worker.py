"""From a shard descriptor to a committed shard: read, tokenize, pack, score, write, record.

Shapes: N rows, L tokens, K masked positions.
"""

import contextlib
import errno
import faulthandler
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from tokenizers import Tokenizer

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.masking.masker import Masker
from entropy_masking.models.checkpoints import local_checkpoint, weights_hash
from entropy_masking.shards import commit, manifests, parquet, targets
from entropy_masking.shards.read import masker_of, read_rows
from entropy_masking.shards.schema import Record
from pipeline.corpus.packing import pack, text_tokenizer, tokenize
from pipeline.corpus.ranges import FileRange
from pipeline.corpus.readers import Reader, Rejects, read_documents
from pipeline.job import Failure, Job, Shard
from pipeline.masking import mask_shard, sampling_noise
from pipeline.teacher import Stopped, Teacher

SHARDS_AT_ONCE = 2  # one is read, tokenized or written while another is in the model
MIN_BATCH_TOKENS = 64


class ShardScorer:
    """Scores shards of one job; loads the tokenizer and the teacher once, at their first use.

    May be called from ``SHARDS_AT_ONCE`` threads: the forwards of one shard overlap the reading and writing of another.

    Attributes:
        model: the lock of a shard while it loads or runs the teacher.
        places: a shard takes one of them. A shard that must be alone in its process takes all.
        entrance: the lock of a shard while it takes places. Without it, two shards that hold one place each and want
            all would wait for each other for ever.
        stopped: set when the shards in progress must be dropped.
        deadlines: the deadlines of the shards in progress, for the one timer of the process.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model, self.entrance = threading.Lock(), threading.Lock()
        self.places, self.stopped = threading.Semaphore(SHARDS_AT_ONCE), threading.Event()
        self.deadlines = _Deadlines()
        torch.set_num_threads(job.threads)

    def stop(self) -> None:
        """Drop the shards in progress at the next forward. The next run scores them again."""
        self.stopped.set()

    def outcomes(self, item: list[Shard]) -> Iterator[Record | Failure]:
        """Score and commit shards in their order, with one reader; yields the outcome of each."""
        reader = Reader()
        for index, ranges in item:
            yield self(index, ranges, reader)

    def __call__(self, index: int, ranges: list[FileRange], reader: Reader) -> Record | Failure:
        """Score and commit shard ``index``; returns its record, or why there is none.

        A shard that raises an error, or ends its process, is given up after ``max_attempts`` times.
        """
        job = self.job
        try:
            # if a worker died after the commit, Ray gives the shard to another worker
            if done := commit.done_record(job.output, index, job.run):
                return done
            failed = commit.failed_attempts(job.output, index, job.run_id)
        except OSError as failure:
            return Failure(index, one_line(failure))
        outcome = Failure(index, f"its worker died or hung {failed} times")
        # After a crash each shard of that process is retried alone: we do not know which one caused it. So a shard
        # whose process died in its first attempt has a second one.
        max_attempts = max(job.max_attempts, 2) if failed == 1 else job.max_attempts
        for attempt in range(failed + 1, max_attempts + 1):
            with self._places(1 if attempt == 1 else SHARDS_AT_ONCE):
                try:
                    commit.begin_attempt(job.output, index, job.run_id, attempt)
                    record = self._score(index, ranges, reader, attempt)
                    with contextlib.suppress(OSError):  # an attempt that stays does no harm to a committed shard
                        storage.delete(commit.attempt_uri(job.output, index))
                    return record
                except UsageError as failure:
                    return Failure(index, str(failure), usage=True)
                except Exception as failure:
                    if isinstance(failure, OSError) and failure.errno in (*storage.FULL, errno.EROFS):
                        return Failure(index, f"cannot write to {job.output}: {failure.strerror}", fatal=True)
                    reason = f"{type(failure).__name__}: {one_line(failure)}"
                    outcome = Failure(index, reason, traceback=traceback.format_exc())
        return outcome

    @contextlib.contextmanager
    def _places(self, count: int) -> Iterator[None]:
        """Hold ``count`` of the ``places``."""
        with contextlib.ExitStack() as held:
            with self.entrance:
                for _ in range(count):
                    held.enter_context(self.places)
            yield

    def _score(self, index: int, ranges: list[FileRange], reader: Reader, attempt: int) -> Record:
        job, manifest, started = self.job, self.job.manifest, time.monotonic()
        if self.stopped.is_set():
            raise Stopped
        rejects, rows, scores = Rejects(), None, None
        costs: dict[str, float] = {"forward_seconds": 0.0, "flops": 0}
        with self.deadlines.within(job.shard_timeout):
            if not job.sequences:
                ids_NL = self._packed(ranges, reader, rejects)
            elif manifest.masks:
                rows, ids_NL = mask_shard(job.sequences, job.sequences.entry(index), manifest.masks, self.masker)
            else:
                ids_NL = read_rows(job.sequences, job.sequences.entry(index), [])["input_ids"]
        if manifest.teacher:
            with self.model:
                teacher = self.teacher  # loading it does not count as time of the shard
            with self.model, self.deadlines.within(job.shard_timeout):
                scores = self._in_the_model(teacher, ids_NL, rows, costs)
        with self.deadlines.within(job.shard_timeout):
            if rows and scores:
                self._check_finite(scores["topk_logprobs"][rows.positions_NK != targets.NO_POSITION])
                table = targets.targets_table(manifest, rows, scores)
                groups, counts = targets.row_groups(table, rows), targets.counts(rows)
            else:
                if scores:
                    self._check_finite(scores["entropy"][~np.isin(ids_NL, manifest.special_token_ids)])
                table = parquet.to_table(manifest, index, ids_NL, scores)
                groups, counts = parquet.row_groups(table), parquet.counts(ids_NL, manifest.special_ids["pad"], scores)
            fields: dict[str, object] = {
                **counts,
                "fingerprint_hash": manifest.fingerprint_hash,
                "attempt": attempt,
                **costs,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
                "worker": f"{platform.node()}:{os.getpid()}",
                "documents": rejects.documents,
                "longest_document": rejects.longest,
                "rejected": rejects.report(),
            }
            return commit.commit_shard(job.output, index, parquet.to_parquet(groups), fields, started)

    def _packed(self, ranges: list[FileRange], reader: Reader, rejects: Rejects) -> np.ndarray:
        """Token ids [N, L] of text."""
        ids, length = self.job.manifest.special_ids, self.job.manifest.sequence_length
        token_lists = tokenize(read_documents(ranges, reader, rejects), self.tokenizer, rejects)
        return pack(token_lists, length, ids["cls"], ids["sep"], ids["pad"])

    def _in_the_model(
        self, teacher: Teacher, ids_NL: np.ndarray, rows: targets.MaskedRows | None, costs: dict[str, float]
    ) -> parquet.Scores:
        """Scores of the sequences, or at the masked positions of ``rows``; sets ``costs``.

        If memory runs out, the batch is halved until it fits.
        """
        masks = self.job.manifest.masks
        uniform_NK = sampling_noise(rows, masks) if rows and masks and self.job.manifest.sampled else None
        seconds, flops = teacher.forward_seconds, teacher.flops
        batch_tokens = teacher.batch_tokens
        while True:
            try:
                scores = teacher.score(ids_NL, rows.positions_NK if rows else None, batch_tokens, uniform_NK)
                break
            except (RuntimeError, MemoryError) as failure:
                if not _out_of_memory(failure) or batch_tokens // 2 < MIN_BATCH_TOKENS:
                    raise
                batch_tokens //= 2
                costs["batch_tokens"] = batch_tokens  # marks a shard whose bytes another machine may not reproduce
                print(f"out of memory: continuing with batches of {batch_tokens} tokens", file=sys.stderr)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        costs["forward_seconds"] = round(teacher.forward_seconds - seconds, 3)
        costs["flops"] = teacher.flops - flops
        return scores

    def _check_finite(self, values: np.ndarray) -> None:
        """Refuse a teacher that gives NaN, because in a shard NaN means *not scored*. Raises UsageError."""
        if np.isnan(values).any():
            teacher, dtype = self.job.manifest.teacher, self.job.manifest.fingerprint["dtype"]
            raise UsageError(f"{teacher} gives NaN in {dtype}; use --dtype float32, or another teacher")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return text_tokenizer(manifests.shard_tokenizer(self.job.output))

    @cached_property
    def masker(self) -> Masker:
        assert self.job.sequences and self.job.manifest.masks
        return masker_of(self.job.sequences, self.job.manifest.masks["policy"]["unit"])

    @cached_property
    def teacher(self) -> Teacher:
        if self.stopped.is_set():
            raise Stopped
        job = self.job
        directory = local_checkpoint(job.manifest.teacher or "")
        if weights_hash(directory) != job.manifest.fingerprint["teacher"]:
            raise RunError(
                f"the weights in {directory} on {platform.node()} differ from those on the node that started the job; "
                "copy the same checkpoint to both"
            )
        compile = job.manifest.fingerprint["compile"]
        teacher = Teacher(job.manifest, directory, compile=compile, trust_remote_code=job.trust_remote_code)
        teacher.stopped = self.stopped
        return teacher


def _out_of_memory(failure: BaseException) -> bool:
    return isinstance(failure, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(failure)


class _Deadlines:
    """End the process, with a traceback, if a block takes too long: nothing else interrupts code that hangs in C."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: dict[object, float] = {}

    @contextlib.contextmanager
    def within(self, seconds: float | None) -> Iterator[None]:
        if seconds is None:
            yield
            return
        key = object()
        with self.lock:
            self.ends[key] = time.monotonic() + seconds
            self._arm()
        try:
            yield
        finally:
            with self.lock:
                del self.ends[key]
                self._arm()

    def _arm(self) -> None:
        """Set the timer of the process to the next deadline."""
        faulthandler.cancel_dump_traceback_later()
        if self.ends:
            left = max(min(self.ends.values()) - time.monotonic(), 0.001)
            faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
