"""From a shard descriptor to a committed shard: read, tokenize, pack, score, write, record. The unit of all work."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline import commit, shards, storage
from pipeline.cli import RunError
from pipeline.documents import Piece, Rejects, read_documents
from pipeline.job import Job
from pipeline.packing import pack, tokenize
from pipeline.teacher import Teacher, local_checkpoint, weights_hash


class ShardScorer:
    """Scores shards of one job, one after the other; loads the tokenizer and the teacher once, when first needed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer: Any = None
        self.teacher: Teacher | None = None
        torch.set_num_threads(job.threads)

    def __call__(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """Score and commit shard ``index``; returns its record (see docs/shards.md)."""
        job, started = self.job, time.monotonic()
        rejects = Rejects()
        input_ids_NL = self._sequences(pieces, rejects)
        scores = self._teacher().score(input_ids_NL) if job.teacher else None
        data = shards.to_parquet(shards.to_table(index, input_ids_NL, scores, job.vocab_size, job.top_k))
        commit.commit_file(job.output, index, data, rows=len(input_ids_NL))
        scored = scores is not None and ~np.isnan(scores.entropy_NL)
        record = {
            "index": index,
            "file": shards.shard_file(index),
            "rows": len(input_ids_NL),
            "tokens": int((input_ids_NL != job.special_ids["pad"]).sum()),
            "scored_tokens": int(np.sum(scored)),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "entropy_sum": float(scores.entropy_NL[scored].sum(dtype=np.float64)) if scores else 0.0,
            "fingerprint_hash": job.fingerprint_hash,
            "attempt": 1,
            "seconds": round(time.monotonic() - started, 3),
            "finished_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "worker": f"{platform.node()}:{os.getpid()}",
            "documents": rejects.documents,
            "rejected": rejects.report(),
        }
        storage.write_json(commit.record_uri(job.output, index), record)
        return record

    def _sequences(self, pieces: list[Piece], rejects: Rejects) -> np.ndarray:
        """Token ids [N, L] of a shard: from text, or as they stand in the shard of another directory."""
        job = self.job
        if pieces[0].kind == "shard":
            filesystem, path = storage.resolve(pieces[0].path)
            table = pq.read_table(path, columns=["input_ids"], filesystem=filesystem)
            return shards.column_2d(table, "input_ids", job.sequence_length)
        if self.tokenizer is None:
            self.tokenizer = shards.load_tokenizer(job.output)
        ids = job.special_ids
        token_lists = tokenize(read_documents(pieces, job.text_column, rejects), self.tokenizer, rejects)
        return pack(token_lists, job.sequence_length, ids["cls"], ids["sep"], ids["pad"])

    def _teacher(self) -> Teacher:
        job = self.job
        if self.teacher is None:
            directory = local_checkpoint(job.teacher or "")
            if weights_hash(directory) != job.teacher_hash:
                raise RunError(f"{directory} on {platform.node()} has other weights than where the job was started")
            self.teacher = Teacher(
                directory,
                mask_id=job.special_ids["mask"],
                pad_id=job.special_ids["pad"],
                special_ids=job.special_token_ids,
                vocab_size=job.vocab_size,
                context=job.context or "masked",
                passes=job.passes or 1,
                top_k=job.top_k,
                batch_tokens=job.batch_tokens,
                dtype=job.dtype or "float32",
                trust_remote_code=job.trust_remote_code,
            )
        return self.teacher
