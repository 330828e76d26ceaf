"""Committing shards: records, attempts, one fingerprint a directory, and the manifest that ends a run.

One shard is one unit of work with one file name. Its file is put whole first, its record second; a shard without a
matching record is done again. So work is never done half, and a late write of a lost worker changes nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.shards.manifests import READERS, Manifest, entry_of, manifest_uri, record_file, run_uri
from entropy_masking.shards.parquet import SCHEMA_VERSION, footer_rows, shard_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def record_uri(directory: str, index: int) -> str:
    return storage.join(directory, "_records", record_file(index))


def attempt_uri(directory: str, index: int) -> str:
    return storage.join(directory, "_attempts", record_file(index))


# --- one shard -------------------------------------------------------------------------------------------------------


def commit_shard(directory: str, index: int, data: bytes, record: dict[str, Any], started: float) -> dict[str, Any]:
    """Put a shard whole under its name, read its footer back, then write its record, which makes the shard count.

    Args:
        record: what the record says besides the file's name, size and hash and the time; ``rows`` is checked against
            the footer.
        started: ``time.monotonic()`` when work on the shard began.

    Raises:
        OSError: the file reads back with another number of rows, or cannot be written.
    """
    uri = storage.join(directory, shard_file(index))
    storage.write_bytes(uri, data)
    if (found := footer_rows(uri)) != record["rows"]:
        raise OSError(f"{uri} was written with {record['rows']} rows but reads back with {found}")
    named = {"index": index, "file": shard_file(index), "bytes": len(data), "sha256": storage.sha256_bytes(data)}
    ended = datetime.now(UTC).isoformat(timespec="milliseconds")
    record = named | record | {"seconds": round(time.monotonic() - started, 3), "finished_at": ended}
    storage.write_json(record_uri(directory, index), record)
    return record


def begin_attempt(directory: str, index: int, run: str, attempt: int, by_itself: bool) -> None:
    """Note that a worker starts on a shard.

    A process that dies leaves the note behind, so it is known how often it died of this shard: Ray retries for ever.
    """
    storage.write_json(attempt_uri(directory, index), {"run": run, "attempts": attempt, "by_itself": by_itself})


def failed_attempts(directory: str, index: int, run: str) -> tuple[int, bool]:
    """How many attempts of this run on a shard have begun and not ended well, and whether the last was by itself."""
    try:
        note = storage.read_json(attempt_uri(directory, index))
        return (int(note["attempts"]), bool(note["by_itself"])) if note["run"] == run else (0, False)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0, False


def end_attempt(directory: str, index: int) -> None:
    """The shard is committed: nothing more to remember of its attempts."""
    storage.delete(attempt_uri(directory, index))


# --- a directory -----------------------------------------------------------------------------------------------------


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Write the tokenizer's files to ``directory/tokenizer``, each atomically."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            storage.write_bytes(storage.join(directory, "tokenizer", file.name), file.read_bytes())


def claim_directory(directory: str, fingerprint: dict[str, Any], shards: int, write: bool = True) -> None:
    """Bind an output directory to one fingerprint, before anything else is written there.

    Args:
        write: False only looks whether it could be.

    Raises:
        UsageError: the directory belongs to a run with another fingerprint; says what differs.
    """
    try:
        previous = storage.read_json(run_uri(directory))["fingerprint"]
    except FileNotFoundError:
        if storage.list_files(directory):
            raise UsageError(f"{directory} holds files but no scoring run; choose an empty or a new --output") from None
        if write:
            storage.write_json(run_uri(directory), {"fingerprint": fingerprint, "shards": shards})
        return
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{run_uri(directory)} is no record of a run; choose a new --output") from None
    if differing := differences(previous, fingerprint):
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


def read_records(directory: str) -> dict[int, dict[str, Any]]:
    """All records of a directory that can be read, by index, whatever run they belong to."""
    infos = [i for i in storage.list_files(storage.join(directory, "_records")) if i.base_name.startswith("part-")]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_read_record, [storage.join(directory, "_records", info.base_name) for info in infos])
        return {record["index"]: record for record in found if record is not None}


def _read_record(uri: str) -> dict[str, Any] | None:
    try:
        record = storage.read_json(uri)
        named = record["file"] == shard_file(record["index"]) and uri.endswith(record_file(record["index"]))
        return record if named and record["bytes"] and record["fingerprint_hash"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def done_record(directory: str, index: int, fingerprint_hash: str) -> dict[str, Any] | None:
    """The record of one shard if it is done (see ``done_records``)."""
    record = _read_record(record_uri(directory, index))
    if record is None or record["fingerprint_hash"] != fingerprint_hash:
        return None
    return record if storage.size(storage.join(directory, record["file"])) == record["bytes"] else None


def done_records(directory: str, shards: int, fingerprint_hash: str) -> dict[int, dict[str, Any]]:
    """Records of the shards that are done, by index.

    A shard is done when its record is readable, carries the run's fingerprint, and the file has the record's size.
    """
    sizes = {info.base_name: info.size for info in storage.list_files(directory)}
    return {
        index: record
        for index, record in sorted(read_records(directory).items())
        if index < shards
        and record["fingerprint_hash"] == fingerprint_hash
        and sizes.get(record["file"]) == record["bytes"]
    }


# --- the end of a run ------------------------------------------------------------------------------------------------


def busy_seconds(records: list[dict[str, Any]]) -> float:
    """Seconds in which at least one shard was worked on: the wall time of a run, however often it was resumed."""
    ends = [datetime.fromisoformat(record["finished_at"]).timestamp() for record in records]
    spans = sorted((end - record["seconds"], end) for end, record in zip(ends, records, strict=True))
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def worker_costs(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By worker: shards, tokens, ``seconds`` it was busy, ``forward_seconds`` of them inside the model, and its rate.

    A worker prepares one shard while it scores another, so its seconds are the union of its shards', not their sum.
    """
    costs = {}
    for worker in sorted({record["worker"] for record in records}):
        own = [record for record in records if record["worker"] == worker]
        seconds, tokens = busy_seconds(own), sum(record["tokens"] for record in own)
        costs[worker] = {
            "shards": len(own),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "forward_seconds": round(sum(record["forward_seconds"] for record in own), 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-3), 1),
        }
    return costs


def totals(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums that a manifest and a summary show."""
    workers = worker_costs(records)
    worker_seconds = sum(cost["seconds"] for cost in workers.values())
    forward = sum(cost["forward_seconds"] for cost in workers.values())
    names = ("rows", "tokens", "scored_tokens", "bytes", "entropy_sum", "documents", "flops")
    sums = {name: sum(record[name] for record in records) for name in names}
    sums["sequences"] = sums.pop("rows")
    return sums | {
        "seconds": round(busy_seconds(records), 3),
        "worker_seconds": round(worker_seconds, 3),
        "forward_seconds": round(forward, 3),
        "utilisation": round(forward / max(worker_seconds, 1e-3), 4),
        "workers": len(workers),
        "by_worker": workers,
        "rescued_shards": sum("batch_tokens" in record for record in records),
        "rejected": sum(record["rejected"]["count"] for record in records),
        "rejected_reasons": dict(sum((Counter(r["rejected"]["reasons"]) for r in records), Counter())),
    }


def write_manifest(empty: Manifest, records: dict[int, dict[str, Any]], failed: dict[int, str]) -> Manifest:
    """Sum up the records of a run and write ``manifest.json``, which makes the directory a finished one.

    Args:
        empty: all that is known of the directory before its shards.
        failed: reasons of the shards that the run was allowed to end without, besides those that ``empty`` names.
    """
    ordered = [records[index] for index in sorted(records)]
    manifest = replace(
        empty,
        shards=[entry_of(record) for record in ordered],
        failed=empty.failed | {shard_file(index): reason for index, reason in sorted(failed.items())},
        totals=totals(ordered),
    )
    fields = asdict(manifest)
    del fields["uri"]
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow", "ray")}
    storage.write_json(manifest_uri(empty.uri), {"schema_version": SCHEMA_VERSION, **fields, "versions": versions})
    delete_leftovers(empty.uri)
    return manifest


def delete_leftovers(uri: str) -> None:
    """Delete the temporary files that killed workers have left in a shard directory."""
    for folder in ([], ["_records"], ["_attempts"]):
        storage.delete_temporaries(storage.join(uri, *folder))
