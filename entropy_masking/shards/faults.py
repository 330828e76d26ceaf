"""The faults of a shard directory: one list for the start of training and for pipeline/verify.py.

A fault of a directory is a ``Fault``. A fault of one shard is a phrase that follows the file's name.

Shapes: N rows.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line
from entropy_masking.shards import commit, costs, manifests, parquet, values
from entropy_masking.shards.parquet import ROW_GROUP, Scores
from entropy_masking.shards.schema import Manifest, ShardEntry

# totals of a manifest; without times, since a late writer may have written a shard again
SUMMED = ("sequences", "tokens", "scored_tokens", "bytes", "entropy_sum", "documents", "rejected", "rejected_reasons")
VALUE_BYTES = 8  # a value takes at most these bytes, with its list levels; Parquet stores any integer in 4 or more
SMALL = 1 << 16  # bytes of a row group besides its values
DENIED = "is not readable for this user"

Fault = tuple[str, str]  # a file of the directory, and the phrase


class Depth(IntEnum):
    """How much is checked. Each depth includes the smaller ones. A manifest was checked when it was read."""

    NAMES = 0  # and sizes
    BYTES = 1  # every byte, columns and row groups, and the token ids of the first row group
    TABLES = 2  # sequence ids
    VALUES = 3  # every value


def check_shards(manifest: Manifest, contents: bool = True) -> None:
    """Check that all shards exist, that all bytes are the committed ones, and that the tokenizer made the ids.

    Without ``contents``, only names, sizes and the tokenizer are checked, for shards that were checked before. Raises
    UsageError, which names the first file that is missing, damaged, swapped, edited or unreadable.
    """
    if (fault := next(faults(manifest, Depth.BYTES if contents else Depth.NAMES), None)) is None:
        return
    file, text = fault
    raise UsageError(f"{storage.join(manifest.uri, file)} {text}; {repair(manifest, fault)}")


def repair(manifest: Manifest, fault: Fault) -> str:
    """What to do about a fault."""
    file, text = fault
    if text.startswith(DENIED):
        return "give the user permission to read it"
    if file == "tokenizer":
        return "put back the one that made the shards"
    deleted = "its record in _records/" if file.startswith("part-") else "it"
    return f"delete {deleted} and run {manifests.MADE_BY[manifest.kind]} again"


def faults(manifest: Manifest, depth: Depth, advance: Callable[[int], None] = lambda size: None) -> Iterator[Fault]:
    """All faults of a directory, quick checks first. Calls ``advance`` with the size of every shard that was read."""
    sizes = {info.base_name: info.size for info in storage.list_files(manifest.uri)}
    present = [entry for entry in manifest.shards if entry.file in sizes]
    yield from ((entry.file, "is missing") for entry in manifest.shards if entry.file not in sizes)
    for entry in present:
        if (size := sizes[entry.file]) != entry.bytes:
            yield entry.file, f"has {size:,} bytes, but its manifest says {entry.bytes:,}"
    yield from tokenizer_faults(manifest)
    if depth == Depth.NAMES:
        return
    yield from record_faults(manifest, depth)
    with ThreadPoolExecutor(commit.READERS) as pool:
        texts_of = pool.map(lambda entry: content_faults(manifest, entry, sizes[entry.file], depth), present)
        for entry, texts in zip(present, texts_of, strict=True):
            yield from ((entry.file, text) for text in texts)
            advance(entry.bytes)


def record_faults(manifest: Manifest, depth: Depth) -> Iterator[Fault]:
    """Compare records with the manifest, and its totals with their sums. A copy of a directory may have no records."""
    if not (files := manifests.record_files(manifest.uri)):
        return
    records, intact = commit.read_records(manifest.uri), []
    by_file = {manifests.record_file(entry.index): entry for entry in manifest.shards}
    for file, entry in by_file.items():
        expected = entry.model_dump() | {"fingerprint_hash": manifest.fingerprint_hash}
        if (record := records.get(entry.index)) is None:
            yield file, "is missing or unreadable"
        elif differing := [name for name, value in expected.items() if getattr(record, name) != value]:
            yield file, f"differs from the manifest in {', '.join(differing)}"
        else:
            intact.append(record)
    if depth < Depth.TABLES:
        return
    yield from ((file, "is unreadable, or of another run") for file in files if file not in by_file)
    if len(intact) == len(manifest.shards):
        sums = costs.totals(intact)
        if differing := [name for name in SUMMED if manifest.totals.get(name) != sums[name]]:
            yield "manifest.json", f"its totals differ from the records' in {', '.join(differing)}"


def tokenizer_faults(manifest: Manifest) -> Iterator[Fault]:
    """Faults of ``tokenizer/``, and of the fields of the manifest that it determines."""
    try:
        expected = manifests.from_tokenizer(manifests.shard_tokenizer(manifest.uri))
    except Exception as error:  # tokenizers raises bare Exceptions
        yield "tokenizer", unreadable(error)
        return
    if expected["tokenizer_hash"] != manifest.tokenizer_hash:
        yield "tokenizer", "is not the tokenizer that made the ids"
    elif wrong := [name for name, value in expected.items() if getattr(manifest, name) != value]:
        yield "manifest.json", f"does not match its tokenizer in {', '.join(wrong)}"


def content_faults(manifest: Manifest, entry: ShardEntry, size: int, depth: Depth) -> list[str]:
    """Faults of the bytes of a shard that has ``size`` of them."""
    uri, texts = manifest.shard_uri(entry), []
    try:
        if size == entry.bytes and storage.sha256(uri) != entry.sha256:
            texts.append("is not the file that was committed (its SHA-256 differs)")
        filesystem, path = storage.resolve(uri)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            # the values of damaged bytes are meaningless
            return texts + table_faults(manifest, entry, file, min(depth, Depth.TABLES) if texts else depth)
    except (pa.ArrowException, OSError) as error:
        return texts if texts or size != entry.bytes else [unreadable(error)]


def unreadable(error: Exception) -> str:
    return f"{DENIED if isinstance(error, PermissionError) else 'cannot be read'} ({one_line(error)})"


def table_faults(manifest: Manifest, entry: ShardEntry, file: pq.ParquetFile, depth: Depth) -> list[str]:
    """Faults of the columns, the shard and the number of rows; then of the layout; then of the values."""
    expected = parquet.schema_of(manifest)
    if not file.schema_arrow.equals(expected):
        differing = sorted({str(field.name) for field in {*expected} ^ {*file.schema_arrow}})
        return [f"does not have the expected columns ({', '.join(differing) or 'their order differs'})"]
    if texts := size_faults(manifest, file):
        return texts
    if depth >= Depth.TABLES:
        table = file.read(["sequence_id"] if manifest.kind == "sequences" else ["sequence_id", "variant"])
        shards = np.unique(table["sequence_id"].to_numpy() >> np.uint64(32)).tolist()
        if foreign := sorted({*shards} - {entry.index}):
            return [f"holds sequences of shard {foreign[0]}, not of {entry.index}"]
    if file.metadata.num_rows != entry.rows:
        return [f"has {file.metadata.num_rows:,} rows, but its manifest says {entry.rows:,}"]
    if not entry.rows:
        return []
    if texts := group_faults(manifest, entry, file):
        return texts
    if depth >= Depth.TABLES and (texts := layout_faults(manifest, entry, table)):
        return texts
    return values.value_faults(manifest, entry, file) if depth == Depth.VALUES else values.first_faults(manifest, file)


def size_faults(manifest: Manifest, file: pq.ParquetFile) -> list[str]:
    """The fault of a file that claims more bytes than its rows can have, so that nobody tries to read them.

    A position has at most one value of each column, and k token ids and k log-probabilities.
    """
    positions = manifest.masks["positions"] if manifest.masks else manifest.sequence_length
    row_bytes = VALUE_BYTES * positions * (2 * manifest.top_k + len(file.schema_arrow))
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        if not 0 <= group.total_byte_size <= group.num_rows * row_bytes + SMALL:
            return [f"claims {group.total_byte_size:,} bytes for {group.num_rows:,} rows"]
    return []


def group_faults(manifest: Manifest, entry: ShardEntry, file: pq.ParquetFile) -> list[str]:
    """Faults of the row groups, which readers address by number."""
    variants = int(manifest.masks["variants"]) if manifest.masks else 1
    if entry.rows % variants:
        return [f"has {entry.rows} rows, not {variants} variants of every sequence"]
    groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    rows = entry.rows // variants
    full, rest = divmod(rows, ROW_GROUP)
    sizes = [ROW_GROUP] * min(full, len(groups)) + [rest] * (rest > 0)  # the rows of a hostile file may be huge
    as_expected = groups == [size for size in sizes for _ in range(variants)] and sum(sizes) == rows
    return [] if as_expected else ["its row groups do not have the expected sizes"]


def layout_faults(manifest: Manifest, entry: ShardEntry, table: pa.Table) -> list[str]:
    """Faults of sequence ids and variants."""
    variants, texts = int(manifest.masks["variants"]) if manifest.masks else 1, []
    numbers = np.arange(entry.rows // variants)
    blocks = [numbers[start : start + ROW_GROUP] for start in range(0, len(numbers), ROW_GROUP)]
    rows_N = np.concatenate([block for block in blocks for _ in range(variants)])
    if (wrong_N := table["sequence_id"].to_numpy() & np.uint64(0xFFFFFFFF) != rows_N).any():
        texts.append(f"its sequence ids are not contiguous (first at row {wrong_N.argmax()})")
    variants_N = np.concatenate([np.full(len(block), variant) for block in blocks for variant in range(variants)])
    if manifest.masks and (wrong_N := table["variant"].to_numpy() != variants_N).any():
        texts.append(f"does not have variants 0 … {variants - 1} in each block (first at row {wrong_N.argmax()})")
    return texts


def rescored_faults(
    manifest: Manifest, entries: list[ShardEntry], score: Callable[[np.ndarray], Scores], sample: int
) -> Iterator[Fault]:
    """Compare stored scores of ``sample`` sequences (chosen by the fingerprint) with the teacher's scores now."""
    from entropy_masking.shards.read import read_rows  # takes seconds; only a check with a teacher needs it

    columns = [*parquet.SCORE_COLUMNS, *(parquet.TOP_K_COLUMNS if manifest.top_k else ())]
    ends = [0, *accumulate(entry.rows for entry in entries)]
    picked = random.Random(manifest.fingerprint_hash).sample(range(ends[-1]), min(sample, ends[-1]))
    for number in sorted(picked):
        shard = bisect_right(ends, number) - 1
        block, row = divmod(number - ends[shard], ROW_GROUP)
        rows = read_rows(manifest, entries[shard], columns, [block])
        stored = {name: array[row] for name, array in rows.items()}
        for text in values.rescored(stored, score(stored["input_ids"][None]), manifest.fingerprint["dtype"]):
            yield entries[shard].file, f"{text} in sequence {stored['sequence_id']}"
