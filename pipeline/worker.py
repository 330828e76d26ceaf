"""From a shard descriptor to a committed shard: read, tokenize, pack, score, write, record. The unit of all work."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.models.checkpoints import local_checkpoint, weights_hash
from entropy_masking.shards import commit, manifests, masks, parquet
from entropy_masking.shards.masks import MaskedRows
from entropy_masking.shards.schema import Record
from pipeline.corpus.packing import pack, tokenize
from pipeline.corpus.readers import FileRange, Rejects, read_documents
from pipeline.job import Job
from pipeline.teacher import Stopped, Teacher

SHARDS_AT_ONCE = 2  # one is read, tokenized or written while another is in the model
LEAST_BATCH_TOKENS = 64


class ShardScorer:
    """Scores shards of one job; loads the tokenizer and the teacher once, when first needed.

    May be called from ``SHARDS_AT_ONCE`` threads: the forwards of one shard overlap the reading and writing of another.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = threading.Lock()
        self.stopped = threading.Event()
        self.company, self.deadlines = _Company(), _Deadlines()
        self.tokenizer: Any = None
        self.teacher: Teacher | None = None
        torch.set_num_threads(job.threads)

    def __call__(self, index: int, ranges: list[FileRange]) -> Record | dict[str, Any]:
        """Score and commit shard ``index``; returns its record (see docs/shards.md), or what went wrong.

        A shard that raises is tried again up to ``max_attempts`` times, and one that ended its process so often is
        given up. Neither ends the other shards: in place of its record comes ``{"index", "error"}``, with ``usage`` if
        the user can mend it, and ``fatal`` if no other shard would fare better.
        """
        job = self.job
        try:
            done, (failed, by_itself) = self._known(index)
        except OSError as failure:
            return {"index": index, "error": one_line(failure)}
        if done:
            return done
        error: dict[str, Any] = {"index": index, "error": f"its worker died or hung {failed} times"}
        # What ended a process once may do so again. It must not take an innocent shard with it, and one that died in
        # company may be that innocent: it gets another attempt, by itself.
        most = job.max_attempts if by_itself else max(job.max_attempts, failed + 1)
        with self.company.alone() if failed else self.company.among_others():
            for attempt in range(failed + 1, most + 1):
                try:
                    commit.begin_attempt(job.output, index, job.run, attempt, by_itself=failed > 0)
                    record = self._score(index, ranges, attempt)
                    with contextlib.suppress(OSError):  # a note that stays does no harm to what is committed
                        commit.end_attempt(job.output, index)
                    return record
                except UsageError as failure:
                    return {"index": index, "error": str(failure), "usage": True}
                except Exception as failure:
                    if isinstance(failure, OSError) and storage.is_exhausted(failure):
                        return {
                            "index": index,
                            "error": f"cannot write to {job.output}: {failure.strerror}",
                            "fatal": True,
                        }
                    reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}"
                    error = {"index": index, "error": reason, "traceback": traceback.format_exc()}
        return error

    def _known(self, index: int) -> tuple[Record | None, tuple[int, bool]]:
        """The record of a shard that is done, and its failed attempts; a store that does not answer is asked again.

        A worker that died after its commit could not say so, and Ray gives the shard to another.
        """
        for patience in range(self.job.max_attempts):
            try:
                done = commit.done_record(self.job.output, index, self.job.manifest.fingerprint_hash)
                return done, commit.failed_attempts(self.job.output, index, self.job.run)
            except OSError:
                if patience + 1 == self.job.max_attempts:
                    raise
                time.sleep(2.0**patience)
        raise AssertionError

    def _score(self, index: int, ranges: list[FileRange], attempt: int) -> Record:
        job, started = self.job, time.monotonic()
        if self.stopped.is_set():
            raise Stopped
        rejects, scored = Rejects(), {"forward_seconds": 0.0, "flops": 0}
        with self.deadlines.within(job.shard_timeout):
            input_ids_NL = self._sequences(ranges, rejects)
            plan = self._plan(index, input_ids_NL) if job.plan else None
        scores = targets = None
        if job.teacher:
            with self.model:
                self._teacher()  # loading it is no part of a shard's time
            with self.model, self.deadlines.within(job.shard_timeout):
                if plan:
                    inputs_NL = masks.apply_mask(input_ids_NL[masks.row_numbers(plan)], plan)
                    targets = self._in_the_model(
                        lambda t, b: t.score_positions(inputs_NL, plan.positions_NK, b), scored
                    )
                else:
                    scores = self._in_the_model(lambda t, b: t.score(input_ids_NL, b), scored)
        with self.deadlines.within(job.shard_timeout):
            if plan and targets:
                self._check_finite(targets.topk_logprobs_NKT[plan.positions_NK >= 0])
                data = parquet.to_parquet(
                    masks.row_groups(masks.targets_table(plan, targets, job.manifest.vocab_size), plan)
                )
                counts = masks.counts(plan)
            else:
                if scores:
                    self._check_finite(scores.entropy_NL[~np.isin(input_ids_NL, job.manifest.special_token_ids)])
                table = parquet.to_table(index, input_ids_NL, scores, job.manifest.vocab_size, job.manifest.top_k)
                data = parquet.to_parquet(parquet.row_groups(table))
                counts = parquet.counts(input_ids_NL, job.manifest.special_ids["pad"], scores)
            fields = {
                **counts,
                "fingerprint_hash": job.manifest.fingerprint_hash,
                "attempt": attempt,
                **scored,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
                "worker": f"{platform.node()}:{os.getpid()}",
                "documents": rejects.documents,
                "rejected": rejects.report(),
            }
            return commit.commit_shard(job.output, index, data, fields, started)

    def _sequences(self, ranges: list[FileRange], rejects: Rejects) -> np.ndarray:
        """Token ids [N, L] of a shard: from text, or as they stand in the shard of another directory."""
        manifest = self.job.manifest
        if ranges[0].kind == "shard":
            filesystem, path = storage.resolve(ranges[0].path)
            table = pq.read_table(path, columns=["input_ids"], filesystem=filesystem)
            return parquet.column_2d(table, "input_ids", manifest.sequence_length)
        if self.tokenizer is None:
            self.tokenizer = manifests.load_tokenizer(self.job.output)
        ids = manifest.special_ids
        token_lists = tokenize(read_documents(ranges, self.job.text_column, rejects), self.tokenizer, rejects)
        return pack(token_lists, manifest.sequence_length, ids["cls"], ids["sep"], ids["pad"])

    def _plan(self, index: int, input_ids_NL: np.ndarray) -> MaskedRows:
        """The rows of the mask plan for shard ``index``."""
        plan = self.job.plan
        assert plan and plan.masks
        entry = next(entry for entry in plan.shards if entry.index == index)
        columns = masks.plan_schema(plan.vocab_size).names
        rows = masks.rows_of(manifests.read_table(plan, entry, columns), plan.masks["positions"])
        if len(rows.variant_N) != plan.masks["variants"] * len(input_ids_NL):
            raise UsageError(f"{plan.shard_uri(entry)} has not as many rows as its sequences; make the plan anew")
        return rows

    def _in_the_model(self, call: Any, scored: dict[str, Any]) -> Any:
        """Call with the teacher, again with half the batch where memory does not suffice; costs go to ``scored``."""
        teacher = self._teacher()
        seconds, flops = teacher.forward_seconds, teacher.flops
        batch_tokens = self.job.batch_tokens
        while True:
            try:
                result = call(teacher, batch_tokens)
                break
            except (RuntimeError, MemoryError) as failure:
                if not _out_of_memory(failure) or batch_tokens // 2 < LEAST_BATCH_TOKENS:
                    raise
                batch_tokens //= 2
                scored["batch_tokens"] = batch_tokens  # marks a shard whose bytes another machine may not repeat
                print(f"out of memory: going on with batches of {batch_tokens} tokens", file=sys.stderr)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        scored["forward_seconds"] = round(teacher.forward_seconds - seconds, 3)
        scored["flops"] = teacher.flops - flops
        return result

    def _check_finite(self, values: np.ndarray) -> None:
        """A NaN in a shard means *not scored*; a teacher must not write one.

        Raises:
            UsageError: it would.
        """
        if np.isnan(values).any():
            teacher, dtype = self.job.teacher, self.job.dtype
            raise UsageError(f"{teacher} gives NaN in {dtype}; use --dtype float32, or another teacher")

    def _teacher(self) -> Teacher:
        job = self.job
        if self.stopped.is_set():
            raise Stopped
        if self.teacher is None:
            directory = local_checkpoint(job.teacher or "")
            if weights_hash(directory) != job.teacher_hash:
                raise RunError(f"{directory} on {platform.node()} has other weights than where the job was started")
            self.teacher = Teacher.of(
                job.manifest, directory, compile=job.compile, trust_remote_code=job.trust_remote_code
            )
            self.teacher.stopped = self.stopped
        return self.teacher

    def stop(self) -> None:
        """Drop the shards under way at the next forward: nothing of them is lost that a rerun does not do again."""
        self.stopped.set()


def _out_of_memory(failure: BaseException) -> bool:
    return isinstance(failure, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(failure)


class _Deadlines:
    """End the process, with a traceback, if a body takes too long: nothing else interrupts what hangs in C."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: dict[object, float] = {}

    @contextlib.contextmanager
    def within(self, seconds: float | None) -> Iterator[None]:
        key = object()
        try:
            with self.lock:
                if seconds is not None:
                    self.ends[key] = time.monotonic() + seconds
                    self._arm()
            yield
        finally:
            with self.lock:
                if self.ends.pop(key, None):
                    self._arm()

    def _arm(self) -> None:
        """There is one timer a process: it is for the next end."""
        faulthandler.cancel_dump_traceback_later()
        if self.ends:
            left = max(min(self.ends.values()) - time.monotonic(), 0.001)
            faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)


class _Company:
    """Many may be among others; one that wants to be alone waits until they are gone, and holds up who comes."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.others = 0
        self.solitary = False

    @contextlib.contextmanager
    def among_others(self) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.solitary)
            self.others += 1
        try:
            yield
        finally:
            with self.changed:
                self.others -= 1
                self.changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.solitary)
            self.solitary = True
            self.changed.wait_for(lambda: not self.others)
        try:
            yield
        finally:
            with self.changed:
                self.solitary = False
                self.changed.notify_all()
