#!/usr/bin/env python3
"""Read a shard directory again (sequences, a mask plan or targets) and name every fault of it.

    python pipeline/verify.py runs/scored
    python pipeline/verify.py runs/scored --deep
    python pipeline/verify.py runs/scored --teacher bert-base-uncased --sample 32

Checks sizes, checksums, columns, row counts, sequence ids, records, manifest and tokenizer; with --deep every value;
with --teacher some sequences are scored again. Exit code 0 without faults, 1 with some. See docs/shards.md.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, count
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import RunError, UsageError
from entropy_masking.shards import commit, manifests, parquet
from entropy_masking.shards.manifests import Manifest, ShardEntry
from entropy_masking.shards.parquet import Scores
from pipeline import checks

FILES = 4  # in memory at a time
SAMPLE = 8  # sequences to score again


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    directory = storage.absolute(args.directory)
    try:
        manifest, finished = open_directory(directory)
        teacher = load_teacher(args, manifest) if args.teacher else None
        for note in notes(manifest):
            print(f"note: {note}")
        found = 0
        for file, fault in faults(manifest, finished, args.deep, teacher, args.sample or SAMPLE):
            print(f"{file}: {fault}")
            found += 1
    except OSError as error:
        raise RunError(f"cannot read {directory}: {' '.join(str(error).split())[:300]}") from None
    print(summary(manifest, finished, found, args))
    return int(found > 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pipeline/verify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("directory", help="shard directory, a path or a URI")
    add("--deep", action="store_true", help="check every value, not only the files")
    add("--teacher", help="the masked LM that scored it, by path or Hub id: score some sequences again")
    add("--sample", type=console.positive, help=f"how many sequences to score again (default: {SAMPLE})")
    add("--trust-remote-code", action="store_true", help="run model code that a checkpoint brings along")
    args = parser.parse_args(argv)
    for name in ("sample", "trust_remote_code"):
        if getattr(args, name) and not args.teacher:
            raise UsageError(f"--{name.replace('_', '-')} needs --teacher; name the one that scored the shards")
    return args


# --- opening ---------------------------------------------------------------------------------------------------------


def open_directory(uri: str) -> tuple[Manifest, bool]:
    """The manifest of a directory of any kind, and whether the run is finished; what is there of it if not.

    Raises:
        UsageError: no shard directory, or an unreadable manifest.
    """
    try:
        kind = storage.read_json(manifests.manifest_uri(uri))["kind"]
    except FileNotFoundError:
        return unfinished(uri), False
    except (ValueError, KeyError, TypeError):
        kind = "sequences"  # read_manifest says what is wrong
    return manifests.read_manifest(uri, kind if kind in manifests.MADE_BY else "sequences"), True


def unfinished(uri: str) -> Manifest:
    """What the manifest of a scoring run would be if it ended now.

    Raises:
        UsageError: there is no such run, or no shard of it.
    """
    try:
        run = storage.read_json(manifests.run_uri(uri))
        fingerprint, planned = run["fingerprint"], run["shards"]
        length, key = fingerprint["sequence_length"], storage.sha256_json(fingerprint)
        sequences_hash = manifests.sequences_hash(fingerprint)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise UsageError(f"{uri} is no shard directory; name the --output of a pipeline/score.py run") from None
    records = [record for _, record in sorted(commit.read_records(uri).items()) if record["fingerprint_hash"] == key]
    if not records:
        raise UsageError(
            f"{uri} is unfinished (none of {planned} shards); run the same pipeline/score.py command again"
        )
    try:
        tokenizer = manifests.load_tokenizer(uri)
        entries = [manifests.entry_of(record) for record in records]
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"{uri} is unfinished and cannot be read ({reason}); run pipeline/score.py again") from None
    return Manifest(
        uri=uri,
        kind="targets" if "plan" in fingerprint else "sequences",
        sequence_length=length,
        vocab_size=len(tokenizer),
        special_ids=manifests.special_ids(tokenizer),
        special_token_ids=sorted(set(tokenizer.all_special_ids)),
        scored="teacher" in fingerprint,
        top_k=fingerprint.get("top_k", 0),
        temperatures=fingerprint.get("temperatures", []),
        context=fingerprint.get("context"),
        passes=fingerprint.get("passes"),
        teacher=None,
        masks=None,
        sequences_hash=sequences_hash,
        fingerprint=fingerprint,
        fingerprint_hash=key,
        tokenizer_hash=manifests.tokenizer_hash(tokenizer),
        planned_shards=planned,
        shards=entries,
        failed={},
        totals={},
    )


def load_teacher(args: argparse.Namespace, manifest: Manifest) -> Any:
    """The teacher that scored the sequences, set as it was then.

    Raises:
        UsageError: nothing was scored that could be again, or the weights are others.
    """
    from entropy_masking.models.checkpoints import local_checkpoint, weights_hash
    from pipeline.teacher import Teacher

    if manifest.kind != "sequences" or not manifest.scored:
        holds = f"holds {manifest.kind}, not sequences" if manifest.kind != "sequences" else "has no scores"
        raise UsageError(f"{manifest.uri} {holds}; leave out --teacher")
    directory = local_checkpoint(args.teacher)
    if weights_hash(directory) != manifest.fingerprint["teacher"]:
        raise UsageError(
            f"{args.teacher} has other weights than the teacher of {manifest.uri}; name the one that scored it"
        )
    return Teacher.of(manifest, directory, trust_remote_code=args.trust_remote_code)


# --- checking --------------------------------------------------------------------------------------------------------


def notes(manifest: Manifest) -> Iterator[str]:
    """What is there and does no harm."""
    known = {entry.file for entry in manifest.shards}
    for info in storage.list_files(manifest.uri):
        if info.base_name.startswith("part-") and info.base_name not in known:
            yield f"{info.base_name} belongs to no committed shard; nobody reads it"
    if not manifests.has_records(manifest.uri):
        yield "there are no records; the shards are checked against the manifest alone"


def faults(manifest: Manifest, finished: bool, deep: bool, teacher: Any, sample: int) -> Iterator[tuple[str, str]]:
    """(file, fault) of a directory."""
    if finished:
        for fault in checks.manifest_faults(manifest):
            yield "manifest.json", fault
        yield from record_faults(manifest)
    else:
        unreadable = {manifests.record_file(index) for index in range(manifest.planned_shards)}
        unreadable -= {manifests.record_file(entry.index) for entry in manifest.shards}
        for info in storage.list_files(storage.join(manifest.uri, "_records")):
            if info.base_name in unreadable:
                yield f"_records/{info.base_name}", "is unreadable, or of another run"
    if wrong := manifests.tokenizer_fault(manifest):
        yield "tokenizer", wrong
    damaged = set()
    for file, fault in shard_faults(manifest, deep):
        damaged.add(file)
        yield file, fault
    if teacher:
        yield from rescore_faults(manifest, [e for e in manifest.shards if e.file not in damaged], teacher, sample)


def record_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Records against the manifest; a copy may do without any."""
    if not manifests.has_records(manifest.uri):
        return
    records = commit.read_records(manifest.uri)
    intact = []
    for entry in manifest.shards:
        file = f"_records/{manifests.record_file(entry.index)}"
        if (record := records.get(entry.index)) is None:
            yield file, "is missing or unreadable"
        elif differing := manifests.record_differences(manifest, entry, record):
            yield file, f"differs from the manifest in {', '.join(differing)}"
        else:
            intact.append(record)
    if len(intact) == len(manifest.shards):
        for fault in checks.totals_faults(manifest, intact):
            yield "manifest.json", fault


def shard_faults(manifest: Manifest, deep: bool) -> Iterator[tuple[str, str]]:
    """Each file, read once and whole, as it was written."""

    def check(entry: ShardEntry) -> list[str]:
        try:
            return checks.file_faults(manifest, entry, storage.read_bytes(manifest.shard_uri(entry)), deep)
        except FileNotFoundError:
            return ["is missing"]
        except OSError as error:
            return [f"cannot be read ({' '.join(str(error).split())[:200]})"]

    total = sum(entry.bytes for entry in manifest.shards)
    with ThreadPoolExecutor(FILES) as pool, console.Progress(total, "B", "verifying") as progress:
        for start in range(0, len(manifest.shards), 4 * FILES):
            entries = manifest.shards[start : start + 4 * FILES]
            for entry, found in zip(entries, pool.map(check, entries), strict=True):
                for fault in found:
                    yield entry.file, fault
                progress.advance(entry.bytes)


def rescore_faults(
    manifest: Manifest, entries: list[ShardEntry], teacher: Any, sample: int
) -> Iterator[tuple[str, str]]:
    """Sequences that a hash picks, scored again."""
    dtype, L, k = manifest.fingerprint["dtype"], manifest.sequence_length, manifest.top_k
    for entry, row in picked(manifest.fingerprint_hash, entries, sample):
        table = manifests.read_table(manifest, entry, contract_columns(manifest), [row // parquet.ROW_GROUP])
        table = table.slice(row % parquet.ROW_GROUP, 1)
        columns = {name: parquet.column_2d(table, name, L) for name in ("input_ids", *parquet.SCORE_COLUMNS)}
        top = {name: parquet.column_2d(table, name, L * k).reshape(1, L, k) for name in parquet.TOP_K_COLUMNS if k}
        stored = Scores(
            columns["entropy"],
            columns["surprisal"],
            top.get("topk_ids", np.empty((1, L, 0), np.int64)),
            top.get("topk_logprobs", np.empty((1, L, 0), np.float32)),
            {},
        )
        for fault in checks.rescored_faults(stored, teacher.score(columns["input_ids"]), dtype):
            yield entry.file, f"{fault} in sequence {table['sequence_id'][0]}"


def contract_columns(manifest: Manifest) -> list[str]:
    return checks.contract(manifest).names


def picked(key: str, entries: list[ShardEntry], sample: int) -> Iterator[tuple[ShardEntry, int]]:
    """(shard, row) of ``sample`` sequences, or of all if there are fewer: a function of the fingerprint."""
    ends = list(accumulate(entry.rows for entry in entries))
    total = ends[-1] if ends else 0
    numbers: set[int] = set()
    for draw in count():
        if len(numbers) == min(sample, total):
            break
        numbers.add(int(storage.sha256_bytes(f"{key}:{draw}".encode()), 16) % total)
    for number in sorted(numbers):
        shard = bisect_right(ends, number)
        yield entries[shard], number - ends[shard] + entries[shard].rows


def summary(manifest: Manifest, finished: bool, found: int, args: argparse.Namespace) -> str:
    """What was looked at and what came of it, in a line."""
    done, rows = len(manifest.shards), sum(entry.rows for entry in manifest.shards)
    state = "" if finished else f"unfinished, {done:,} of {manifest.planned_shards:,} shards; "
    state += f"{len(manifest.failed)} shards were given up; " if manifest.failed else ""
    looked = "every value" if args.deep else "files"
    looked += f" and {args.sample or SAMPLE} sequences with the teacher" if args.teacher else ""
    mend = f"; delete the records of bad shards in _records/ and run {manifests.MADE_BY[manifest.kind]} again"
    outcome = f"{found:,} fault{'s' * (found != 1)}{mend}" if found else "no faults"
    return f"{args.directory}: {state}{done:,} shards, {rows:,} rows of {manifest.kind}, checked {looked}: {outcome}"


if __name__ == "__main__":
    console.run(main)
