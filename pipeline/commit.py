"""Committing shards: records, the binding of a directory to one fingerprint, and the manifest that ends a run.

One shard is one unit of work with one file name. Its file is put whole first, its record second; a shard without a
matching record is done again. So work is never done half, and a late write of a lost worker changes nothing.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import storage
from pipeline.cli import UsageError
from pipeline.job import Job
from pipeline.shards import SCHEMA_VERSION, Manifest, entry_of, footer_rows, manifest_uri, run_uri, shard_file


def record_uri(directory: str, index: int) -> str:
    return storage.join(directory, "_records", f"part-{index:05d}.json")


def commit_file(directory: str, index: int, data: bytes, rows: int) -> None:
    """Put a shard whole under its name and read its footer back. The shard counts only once its record exists."""
    uri = storage.join(directory, shard_file(index))
    storage.write_bytes(uri, data)
    if (found := footer_rows(uri)) != rows:
        raise OSError(f"{uri} was written with {rows} rows but reads back with {found}")


def read_record(directory: str, index: int, fingerprint_hash: str) -> dict[str, Any] | None:
    """The record of a finished shard, or None if the shard is to be (re)done.

    A shard is done when its record is readable, carries the run's fingerprint, and the file has the record's size.
    """
    try:
        record = storage.read_json(record_uri(directory, index))
        same = record["fingerprint_hash"] == fingerprint_hash and record["file"] == shard_file(index)
        size = record["bytes"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return record if same and storage.size(storage.join(directory, shard_file(index))) == size else None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Write the tokenizer's files to ``directory/tokenizer``, each atomically."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            storage.write_bytes(storage.join(directory, "tokenizer", file.name), file.read_bytes())


def claim_directory(directory: str, fingerprint: dict[str, Any], shards: int) -> None:
    """Bind an output directory to one fingerprint, before anything else is written there.

    Raises:
        UsageError: the directory belongs to a run with another fingerprint; says what differs.
    """
    try:
        previous = storage.read_json(run_uri(directory))
    except FileNotFoundError:
        if storage.list_files(directory):
            raise UsageError(f"{directory} holds files but no scoring run; choose an empty or a new --output") from None
        storage.write_json(run_uri(directory), {"fingerprint": fingerprint, "shards": shards})
        return
    except ValueError:
        raise UsageError(f"{run_uri(directory)} is not readable JSON; choose a new --output") from None
    if differing := differences(previous["fingerprint"], fingerprint):
        raise UsageError(
            f"{directory} was made with other settings ({'; '.join(differing)}); "
            "choose a new --output, or delete this one, or repeat the old command"
        )


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two fingerprints, as ``name: old → new``."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {_short(before)} → {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def done_records(directory: str, shards: int, fingerprint_hash: str) -> dict[int, dict[str, Any]]:
    """Records of the shards that are done, by index."""
    found = ((index, read_record(directory, index, fingerprint_hash)) for index in range(shards))
    return {index: record for index, record in found if record is not None}


def busy_seconds(records: list[dict[str, Any]]) -> float:
    """Seconds in which at least one worker was scoring: the wall time of a run, however often it was resumed."""
    ends = [datetime.fromisoformat(record["finished_at"]).timestamp() for record in records]
    spans = sorted((end - record["seconds"], end) for end, record in zip(ends, records, strict=True))
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def write_manifest(job: Job, records: dict[int, dict[str, Any]]) -> Manifest:
    """Sum up the records of a complete run and write ``manifest.json``, which makes the directory a finished one."""
    ordered = [records[index] for index in sorted(records)]
    entries = [entry_of(record) for record in ordered]
    totals: dict[str, Any] = {
        "sequences": sum(entry.rows for entry in entries),
        "tokens": sum(entry.tokens for entry in entries),
        "scored_tokens": sum(entry.scored_tokens for entry in entries),
        "bytes": sum(entry.bytes for entry in entries),
        "entropy_sum": sum(entry.entropy_sum for entry in entries),
        "worker_seconds": round(sum(record["seconds"] for record in ordered), 3),
        "seconds": round(busy_seconds(ordered), 3),
        "documents": sum(record["documents"] for record in ordered),
        "rejected": sum(record["rejected"]["count"] for record in ordered),
        "rejected_reasons": dict(sum((Counter(record["rejected"]["reasons"]) for record in ordered), Counter())),
    }
    manifest = Manifest(
        uri=job.output,
        sequence_length=job.sequence_length,
        vocab_size=job.vocab_size,
        special_ids=job.special_ids,
        special_token_ids=job.special_token_ids,
        scored=job.teacher is not None,
        top_k=job.top_k,
        context=job.context,
        passes=job.passes,
        teacher=job.teacher,
        fingerprint=job.fingerprint,
        fingerprint_hash=job.fingerprint_hash,
        tokenizer_hash=job.tokenizer_hash,
        shards=entries,
        totals=totals,
    )
    fields = asdict(manifest)
    del fields["uri"]
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow", "ray")}
    storage.write_json(manifest_uri(job.output), {"schema_version": SCHEMA_VERSION, **fields, "versions": versions})
    return manifest
