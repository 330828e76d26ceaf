"""Committing shards: records, attempts, one fingerprint per directory, and the manifest that ends a run.

One shard is one unit of work with one file name. Its file is written first, as a whole, and its record second. A shard
without a matching record is scored again. So no shard is half done, and a late write of a lost worker changes nothing.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from entropy_masking import storage
from entropy_masking.cards import dataset_card
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.shards import manifests
from entropy_masking.shards.costs import totals
from entropy_masking.shards.fields import Fingerprint
from entropy_masking.shards.manifests import AnyFile, manifest_uri, record_file, run_uri
from entropy_masking.shards.parquet import shard_file
from entropy_masking.shards.schema import Attempt, Manifest, Record, Run
from entropy_masking.text import single_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATTEMPTS = "_attempts"  # folder of a shard directory
READERS = 16  # files that are read at once: an object store answers many requests as fast as one


def commit_shard(directory: str, index: int, data: bytes, fields: dict[str, object], started: float) -> Record:
    """Write a shard, read its footer back, then write its record, which marks the shard as done.

    Args:
        fields: the fields of the record, without the file's name, size and hash and without times. ``rows`` is checked
            against the footer.
        started: ``time.monotonic()`` when work on the shard began.

    Raises:
        OSError: the file reads back with another number of rows, or cannot be written.
    """
    uri = storage.join(directory, shard_file(index))
    storage.write_bytes(uri, data)
    filesystem, path = storage.resolve(uri)
    if (rows := pq.read_metadata(path, filesystem=filesystem).num_rows) != fields["rows"]:
        raise OSError(f"{uri} was written with {fields['rows']} rows but reads back with {rows}")
    sha256 = hashlib.sha256(data).hexdigest()
    named = {"index": index, "file": shard_file(index), "bytes": len(data), "sha256": sha256}
    ended = datetime.now(UTC).isoformat(timespec="milliseconds")
    times = {"seconds": round(time.monotonic() - started, 3), "finished_at": ended}
    record = Record.model_validate(fields | named | times)
    storage.write_json(storage.join(directory, record_file(index)), record.to_json())
    return record


def attempt_uri(directory: str, index: int) -> str:
    return storage.join(directory, ATTEMPTS, f"part-{index:05d}.json")


def begin_attempt(directory: str, index: int, run: str, attempt: int) -> None:
    """Write the number of the attempt. Without it, Ray would retry a shard that crashes its worker for ever."""
    storage.write_json(attempt_uri(directory, index), Attempt(run=run, attempts=attempt).model_dump())


def failed_attempts(directory: str, index: int, run: str) -> int:
    """The number of failed attempts of this run on a shard."""
    last = read_if_valid(Attempt, attempt_uri(directory, index))
    return last.attempts if last and last.run == run else 0


def read_if_valid(kind: type[AnyFile], uri: str) -> AnyFile | None:
    """The JSON file at ``uri``; None if it is missing or damaged. Then the work is done again."""
    try:
        return manifests.read_json_file(kind, uri)
    except UsageError:
        return None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Write the tokenizer's files to a directory, each atomically."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            tokenizer.save_pretrained(temporary)
        except Exception as error:  # tokenizers raises nothing more specific
            raise RunError(f"cannot write to {temporary}: {one_line(error)}; make room, or set TMPDIR") from None
        for file in sorted(Path(temporary).iterdir()):
            storage.write_bytes(storage.join(directory, file.name), file.read_bytes())


def check_directory(directory: str, fingerprint: Fingerprint) -> None:
    """Check that a run may write to a directory.

    Raises UsageError if it holds other files, or belongs to a run with another fingerprint. Then the message says what
    differs.
    """
    storage.check_folders(directory, "_records", ATTEMPTS, "tokenizer")
    previous = manifests.read_json_file(Run, run_uri(directory))
    if previous is None:
        if storage.list_files(directory):
            raise UsageError(f"{directory} holds files but no scoring run; choose an empty or a new --output")
    elif differing := differences(previous.fingerprint, fingerprint):
        if any(text.startswith(("corpus.files", "corpus.sequences")) for text in differing):
            differing = ["another corpus", *(text for text in differing if not text.startswith("corpus."))]
        problem = f"{directory} was made with other settings ({'; '.join(differing)})"
        raise UsageError(f"{problem}; choose a new --output, or delete this one, or repeat the old command")


def begin_run(directory: str, run: Run) -> None:
    """Write the record of a run, which binds a directory to its fingerprint. Raises like ``check_directory``."""
    check_directory(directory, run.fingerprint)
    if not storage.exists(run_uri(directory)):
        storage.write_json(run_uri(directory), run.model_dump())


def check_kept(directory: str, run: Run) -> None:
    """Raises RunError if a directory no longer belongs to a run, as after ``rm -rf`` during the run."""
    if read_if_valid(Run, run_uri(directory)) != run:
        fix = "run the command again with an empty --output"
        raise RunError(f"{run_uri(directory)} was deleted or replaced during the run; {fix}")


def differences(old: dict[str, object], new: dict[str, object], prefix: str = "") -> list[str]:
    """The differences between two fingerprints, as ``name: old → new``."""
    differing = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            differing += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            differing.append(f"{prefix}{name}: {_short(before)} → {_short(after)}")
    return differing


def _short(value: object) -> str:
    text = single_line(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def read_records(directory: str) -> dict[int, Record]:
    """All readable records of a directory, of any run, by index."""
    with ThreadPoolExecutor(READERS) as pool:
        records = pool.map(lambda file: _read_record(directory, file), manifests.record_files(directory))
        return {record.index: record for record in records if record}


def _read_record(directory: str, file: str) -> Record | None:
    record = read_if_valid(Record, storage.join(directory, file))
    return record if record and record_file(record.index) == file else None


def done_record(directory: str, index: int, run: Run) -> Record | None:
    """The record of one shard if it is done (see ``done_records``)."""
    record = _read_record(directory, record_file(index))
    if record is None or not run.has_made(record):
        return None
    return record if storage.size(storage.join(directory, record.file)) == record.bytes else None


def done_records(directory: str, run: Run) -> dict[int, Record]:
    """Records of the shards that are done, by index.

    A shard is done when its record is readable and of this run, and the file has the record's size.
    """
    records = {index: record for index, record in sorted(read_records(directory).items()) if run.has_made(record)}
    return with_files(directory, records)


def with_files(directory: str, records: dict[int, Record]) -> dict[int, Record]:
    """The records whose files exist with the size that they say."""
    sizes = {info.base_name: info.size for info in storage.list_files(directory)}
    return {index: record for index, record in records.items() if sizes.get(record.file) == record.bytes}


def write_manifest(empty: Manifest, records: dict[int, Record], failed: dict[int, str]) -> Manifest:
    """Write ``manifest.json``, which marks the directory as finished.

    Args:
        empty: the manifest without shards.
        records: of the finished shards, by index.
        failed: by index, why shards are missing, in addition to those that ``empty`` names.
    """
    ordered = [records[index] for index in sorted(records)]
    lost = empty.failed | {shard_file(index): reason for index, reason in sorted(failed.items())}
    shards = {"shards": [record.entry for record in ordered], "failed": lost, "totals": totals(ordered)}
    manifest = empty.model_copy(update=shards)
    storage.write_bytes(storage.join(empty.uri, "README.md"), dataset_card(manifest).encode())
    storage.write_json(manifest_uri(empty.uri), manifest.model_dump())
    delete_leftovers(empty.uri)
    return manifest


def delete_leftovers(uri: str) -> None:
    """Delete the temporary files of killed workers. If a process still writes there, its write fails."""
    if not storage.is_remote(uri):
        directory = Path(storage.absolute(uri))
        for temporary in (*directory.glob(".*.tmp"), *directory.glob("_*/.*.tmp")):
            temporary.unlink(missing_ok=True)
