"""The student's own scores as a shard directory of context ``self``, by the protocol of all shards (docs/shards.md).

With a memory of scores those that were kept, NaN where a position was never scored or its sequence never trained on;
without one, a forward of the trained student on every sequence as it is, nothing hidden.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline import cli, commit, manifests, shards, storage
from pipeline.cli import UsageError
from pipeline.documents import Rejects
from pipeline.manifests import Manifest, ShardEntry
from pipeline.shards import Scores
from train.data import Columns, read_rows
from train.selfmask import Visited
from train.student import student_scores

# from sequence ids [N] and tokens [N, L] to entropies and surprisals [N, L], float32
ScoreRows = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def describe(uri: str, manifest: Manifest, flags: dict[str, Any]) -> Manifest:
    """The manifest of the export, before its shards: the run's sequences, scored by the run with these flags."""
    of_tokens = {name: manifest.fingerprint[name] for name in ("corpus", "tokenizer", "sequence_length")}
    run = storage.sha256_json(flags)
    fingerprint = of_tokens | {"schema_version": shards.SCHEMA_VERSION, "context": "self", "teacher": run, "run": flags}
    return replace(
        manifest,
        uri=storage.absolute(uri),
        scored=True,
        top_k=0,
        temperatures=[],
        context="self",
        passes=None,
        teacher=f"the student of run {run[:12]}",
        fingerprint=fingerprint,
        fingerprint_hash=storage.sha256_json(fingerprint),
        shards=[],
        totals={},
    )


def claim(export: Manifest, write: bool = True, afresh: bool = False) -> None:
    """Bind the directory to the run before it trains.

    Args:
        write: False only looks whether it could be.
        afresh: the run trains again, so forget what it exported before.

    Raises:
        UsageError: it holds the entropies of another run, or other files.
    """
    try:
        commit.claim_directory(export.uri, export.fingerprint, export.planned_shards, write)
    except UsageError as error:
        raise UsageError(f"--export-entropies: {str(error).replace('--output', 'directory')}") from None
    if afresh:
        storage.delete(manifests.manifest_uri(export.uri))
        for index in commit.done_records(export.uri, export.planned_shards, export.fingerprint_hash):
            storage.delete(commit.record_uri(export.uri, index))


def write(export: Manifest, manifest: Manifest, score: ScoreRows, rank: int = 0, ranks: int = 1) -> None:
    """Write this rank's part of the shards that are not there yet."""
    done = commit.done_records(export.uri, export.planned_shards, export.fingerprint_hash)
    todo = [entry for entry in manifest.shards if entry.index not in done][rank::ranks]
    if rank == 0:
        commit.save_tokenizer(manifests.load_tokenizer(manifest.uri), export.uri)
    with cli.Progress(sum(entry.tokens for entry in todo), "tok", "exporting") as progress:
        for entry in todo:
            write_shard(export, manifest, entry, score)
            progress.advance(entry.tokens)


def finish(export: Manifest) -> Manifest:
    """Sum up the records, once every rank has written its part."""
    return commit.write_manifest(
        export, commit.done_records(export.uri, export.planned_shards, export.fingerprint_hash), {}
    )


def write_shard(export: Manifest, manifest: Manifest, entry: ShardEntry, score: ScoreRows) -> None:
    """Score and commit one shard."""
    started = time.monotonic()
    rows = read_rows(manifest, entry, Columns())
    ids_NL, most = rows["input_ids"], float(np.log(manifest.vocab_size))
    special_NL = np.isin(ids_NL, manifest.special_token_ids)
    entropy_NL, surprisal_NL = score(rows["sequence_id"], ids_NL)
    forward_seconds = time.monotonic() - started
    scores = Scores(
        entropy_NL=np.where(special_NL, np.nan, entropy_NL.clip(0, most)),
        surprisal_NL=np.where(special_NL, np.nan, surprisal_NL),
        topk_ids_NLK=np.empty((*ids_NL.shape, 0), np.int64),
        topk_logprobs_NLK=np.empty((*ids_NL.shape, 0), np.float32),
        temperature_lse_NL={},
    )
    table = shards.to_table(entry.index, ids_NL, scores, manifest.vocab_size, top_k=0)
    record = shards.counts(ids_NL, manifest.special_ids["pad"], scores) | {
        "fingerprint_hash": export.fingerprint_hash,
        "attempt": 1,
        "forward_seconds": round(forward_seconds, 3),
        "flops": 0,
        "device": platform.processor() or "cpu",
        "worker": f"{platform.node()}:{os.getpid()}",
        "documents": 0,
        "rejected": Rejects().report(),
    }
    commit.commit_shard(export.uri, entry.index, shards.to_parquet(shards.row_groups(table)), record, started)


def kept_scores(visited: Visited, entries: list[ShardEntry]) -> ScoreRows:
    """What the memory of a run keeps of the shards that it trained on."""
    memory, trained = visited.memory, np.array([entry.index for entry in entries])
    assert memory

    def score(sequence_id_N: np.ndarray, ids_NL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nothing_NL = np.full(ids_NL.shape, np.nan, np.float32)
        if len(sequence_id_N) and (sequence_id_N[0] >> np.uint64(32)) not in trained:
            return nothing_NL, nothing_NL
        row_N = visited.rows_of(sequence_id_N.astype(np.int64))
        return memory.kept(row_N, torch.from_numpy(ids_NL.astype(np.int64))).numpy(), nothing_NL

    return score


def fresh_scores(student: Any, pad_id: int, batch_size: int) -> ScoreRows:
    """What the student says now, a batch at a time."""

    def score(sequence_id_N: np.ndarray, ids_NL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for ids_BL in torch.from_numpy(ids_NL.astype(np.int64)).split(batch_size):
            ids_BL = ids_BL.to(student.device)
            scores = student_scores(student, ids_BL, (ids_BL != pad_id).long())
            found.append([scores[name].cpu().numpy() for name in ("entropy", "surprisal")])
        if not found:
            return np.empty(ids_NL.shape, np.float32), np.empty(ids_NL.shape, np.float32)
        entropies, surprisals = zip(*found, strict=True)
        return np.concatenate(entropies), np.concatenate(surprisals)

    return score


def check_finished(export: Manifest) -> None:
    """The run is finished: so must be its export.

    Raises:
        UsageError: it is not there.
    """
    if not storage.exists(manifests.manifest_uri(export.uri)):
        raise UsageError(
            f"--export-entropies {export.uri}: the run is finished and has exported nothing there; entropies are "
            "written at the end of a run, so pass --overwrite to train it again"
        )
