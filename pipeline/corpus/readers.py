"""Documents out of files, one by one. An unusable document is rejected with its file and line, never silently lost."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line

LISTED = 100  # rejected documents that a record names; all are counted
COUNTED_BYTES = 1 << 28  # a line number needs a count of all lines before it; this bounds the count in a huge file
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
# a field is a document, for which the default of 131,072 characters is too small; an unclosed quote ends at the limit
csv.field_size_limit(1 << 26)
DIALECTS: dict[str, Any] = {"csv": {"strict": True}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}


@dataclass(frozen=True)
class FileRange:
    """A range of whole documents in one file: plain data, planned without reading the documents.

    Attributes:
        path: path or URI.
        kind: ``parquet`` (the rows from start to stop), ``text`` or ``jsonl`` (the lines that begin in the bytes from
            start to stop), ``file`` (one document), ``csv`` or ``tsv`` (the whole file), ``shard`` (of a shard
            directory).
        start, stop: the range; ``stop`` None means the end of the file.
        limit: at most this many documents of the range, rejected ones included.
        compression: ``gzip``, ``zstd`` or ``bz2``; a compressed file is never split.
    """

    path: str
    kind: str
    start: int = 0
    stop: int | None = None
    limit: int | None = None
    compression: str | None = None


@dataclass(frozen=True)
class Document:
    """A text and its place: ``line`` is 1-based within its range (a row for Parquet)."""

    text: str
    file_range: FileRange
    line: int


@dataclass(frozen=True)
class Broken:
    """Replaces a text that could not be read."""

    reason: str


class Rejects:
    """Counts documents, and lists the unusable ones."""

    def __init__(self) -> None:
        self.documents = 0
        self.reasons: Counter[str] = Counter()
        self.listed: list[dict[str, str | int]] = []

    def add(self, file_range: FileRange, line: int, reason: str) -> None:
        """Reject the document at ``line`` of ``file_range``; it is listed with its line in the file.

        Far into a large file, the line is counted from the byte ``from_byte``.
        """
        self.reasons[reason] += 1
        if len(self.listed) == LISTED:
            return
        far = file_range.kind != "parquet" and file_range.start > COUNTED_BYTES
        where = {"from_byte": file_range.start, "line": line} if far else {"line": line + lines_before(file_range)}
        self.listed.append({"file": file_range.path, **where, "reason": reason})

    def report(self) -> dict[str, object]:
        """``count``, ``reasons`` with their counts, and the first hundred as ``listed``."""
        return {"count": self.reasons.total(), "reasons": dict(self.reasons), "listed": self.listed}


def read_documents(ranges: list[FileRange], text_column: str, rejects: Rejects) -> Iterator[Document]:
    """The usable documents of ``ranges`` in order. Memory holds one document, or a few Parquet rows, at a time.

    Raises:
        UsageError: a file cannot be read to its end.
    """
    for file_range in ranges:
        try:
            for number, (line, value) in enumerate(_values(file_range, text_column)):
                if number == file_range.limit:
                    break
                rejects.documents += 1
                if reason := _why_unusable(value):
                    rejects.add(file_range, line, reason)
                else:
                    yield Document(value, file_range, line)
        except (OSError, EOFError, pa.ArrowInvalid) as error:
            store_failed = isinstance(error, OSError) and storage.is_remote(file_range.path)
            if store_failed and not isinstance(error, FileNotFoundError):
                raise  # an object store may answer the next time
            raise UsageError(f"cannot read {file_range.path} to its end: {one_line(error)}") from None


def _why_unusable(value: object) -> str | None:
    """Why a value cannot be scored as text, or None."""
    if isinstance(value, Broken):
        return value.reason
    if value is None:
        return "null text"
    if not isinstance(value, str):
        return "text is not a string"
    if not value.strip():
        return "empty text"
    if "\0" in value:
        return "NUL characters (UTF-16?)"
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from bad UTF-8 in a CSV or an escape in JSON
        return "bad UTF-8"
    return None


def _values(file_range: FileRange, text_column: str) -> Iterator[tuple[int, Any]]:
    """(line, text) of a range; instead of a text there may be ``Broken`` or any other value."""
    if file_range.kind == "parquet":
        yield from _parquet_values(file_range, text_column)
    elif file_range.kind == "file":
        with open_binary(file_range) as stream:
            yield 1, _decode(stream.read())
    elif file_range.kind in ("csv", "tsv"):
        yield from _csv_values(file_range, text_column)
    else:
        for line, raw in enumerate(_lines(file_range), start=1):
            value = _decode(raw)
            yield line, _json_value(value, text_column) if file_range.kind == "jsonl" else value


def open_binary(file_range: FileRange, start: int = 0) -> BinaryIO:
    """A buffered stream of a file's decompressed bytes from ``start`` on (0 if it is compressed)."""
    filesystem, path = storage.resolve(file_range.path)
    if file_range.compression:
        stream = filesystem.open_input_stream(path, compression=file_range.compression)
    else:
        stream = filesystem.open_input_file(path)
        stream.seek(start)
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))


def _lines(file_range: FileRange) -> Iterator[bytes]:
    """The lines that begin within the range, without line ends."""
    position = max(0, file_range.start - 1)
    with open_binary(file_range, position) as stream:
        if file_range.start:
            position += len(stream.readline())  # a line that began earlier belongs to the previous range
        for raw in stream:
            if file_range.stop is not None and position >= file_range.stop:
                return
            position += len(raw)
            yield raw.rstrip(b"\r\n")


@lru_cache(maxsize=64)
def lines_before(file_range: FileRange) -> int:
    """Number of lines (rows) of the file before the range; reads the file up to the range."""
    if file_range.kind == "parquet":
        return file_range.start
    position, lines = 0, 0
    with open_binary(file_range) as stream:
        while position < file_range.start and (block := stream.read(min(1 << 20, file_range.start - position))):
            position += len(block)
            lines += block.count(b"\n")
            ends_line = block.endswith(b"\n")
    return lines if not position or ends_line else lines + 1


def json_keys(file_range: FileRange, lines: int) -> list[str]:
    """The keys of the objects in the first ``lines`` lines of JSON lines."""
    values = (_json_object(_decode(raw)) for raw in islice(_lines(file_range), lines))
    return list(dict.fromkeys(key for value in values if isinstance(value, dict) for key in value))


def _decode(raw: bytes) -> str | Broken:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return Broken("bad UTF-8")


def _json_object(line: str | Broken) -> object:
    """The object of a line; ``Broken`` if there is none, "" for a blank line."""
    if isinstance(line, Broken):
        return line
    if not line.strip():
        return ""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return Broken("broken JSON")
    return value if isinstance(value, dict) else Broken("not a JSON object")


def _json_value(line: str | Broken, key: str) -> object:
    value = _json_object(line)
    if not isinstance(value, dict):
        return value
    return value[key] if key in value else Broken(f"no key {key!r}")


def csv_rows(file_range: FileRange) -> Iterator[tuple[int, list[str] | None]]:
    """(first line, fields) of each row, the header first; None instead of the fields of a broken row.

    A row ends at a line end outside quotes. An unclosed quotation mark must not swallow the rows after it. So only the
    first line of a broken row is dropped, and the lines after it are read again.
    """
    with open_binary(file_range) as stream:
        # bytes that are not UTF-8 become lone surrogates, so only their own row is rejected
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        of_row: list[str] = []
        again: deque[str] = deque()

        def next_line() -> str:
            of_row.append(again.popleft() if again else text.readline())
            return of_row[-1]

        line, width = 1, None
        while True:
            of_row.clear()
            try:
                row = next(csv.reader(iter(next_line, ""), **DIALECTS[file_range.kind]), None)
            except csv.Error:
                row = None
            if of_row == [""]:
                return
            if row is None or (row and width is not None and len(row) != width):
                yield line, None
                again.extendleft(reversed(of_row[1:]))
                line += 1
            else:
                yield line, row
                line += len(of_row)
            width = len(row or []) if width is None else width


def _csv_values(file_range: FileRange, text_column: str) -> Iterator[tuple[int, str | Broken]]:
    rows = csv_rows(file_range)
    _, header = next(rows, (1, None))
    column = header.index(text_column) if header and text_column in header else None
    for line, row in rows:
        if row is None:
            yield line, Broken("broken CSV row")
        elif column is None:
            yield line, Broken(f"no column {text_column!r}")
        else:
            yield line, row[column] if row else ""


def _parquet_values(file_range: FileRange, text_column: str) -> Iterator[tuple[int, str | Broken | None]]:
    filesystem, path = storage.resolve(file_range.path)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        ends = [0]
        for group in range(file.num_row_groups):
            ends.append(ends[-1] + file.metadata.row_group(group).num_rows)
        stop = ends[-1] if file_range.stop is None else file_range.stop
        groups = [g for g in range(file.num_row_groups) if ends[g] < stop and ends[g + 1] > file_range.start]
        row = ends[groups[0]] if groups else stop
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[text_column]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
            for raw in column.cast(binary).to_pylist():  # as bytes: one bad text must not make its batch fail
                if file_range.start <= row < stop:
                    yield row - file_range.start + 1, None if raw is None else _decode(raw)
                row += 1
