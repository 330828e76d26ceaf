"""The values of a file or a part of it, with their lines, for every file format.

In text and JSON lines, a line ends with LF or CR LF. If a file has no LF at all, it ends with CR.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import storage
from entropy_masking.errors import UsageError

LONG_PARAGRAPH = 1 << 16  # bytes; a longer one is rather a file with a document in each line
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
# a field is a document, for which the default of 131,072 characters is too small; an unclosed quote ends at the limit
csv.field_size_limit(1 << 26)
DIALECTS: dict[str, Any] = {"csv": {"strict": True}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}


@dataclass(frozen=True)
class FileRange:
    """A range of whole documents in one file: plain data, planned without reading the documents.

    Attributes:
        path: path or URI.
        kind: ``parquet`` (the rows from start to stop), ``line`` or ``jsonl`` (the lines that begin in the bytes from
            start to stop), ``paragraph`` (the paragraphs after the blank lines among these, and the first of the file),
            ``file`` (one document), ``json`` (an array), ``csv`` or ``tsv`` (the whole file), ``shard`` (of a shard
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
class Broken:
    """Replaces a text that could not be read."""

    reason: str


def values(file_range: FileRange, text_column: str) -> Iterator[tuple[int, Any]]:
    """(line, text) of a range; instead of a text there may be ``Broken`` or any other value."""
    if file_range.kind == "parquet":
        yield from _parquet_values(file_range, text_column)
    elif file_range.kind == "file":
        with open_binary(file_range) as stream:
            yield 1, _decode(stream.read())
    elif file_range.kind == "line":
        yield from ((line, _decode(raw)) for line, raw in _own_lines(file_range) if not is_blank(raw))
    elif file_range.kind == "paragraph":
        yield from ((line, _on_one_line(_decode(raw))) for line, raw in _paragraphs(file_range))
    elif file_range.kind in ("csv", "tsv"):
        yield from _csv_values(file_range, text_column)
    else:
        yield from ((line, _value_of(text_column, found)) for line, found in _objects(file_range))


def open_binary(file_range: FileRange, start: int = 0) -> BinaryIO:
    """A buffered stream of a file's decompressed bytes from ``start`` on (0 if it is compressed)."""
    filesystem, path = storage.resolve(file_range.path)
    if file_range.compression:
        stream = filesystem.open_input_stream(path, compression=file_range.compression)
    else:
        stream = filesystem.open_input_file(path)
        stream.seek(start)
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))


def _lines(file_range: FileRange) -> Iterator[tuple[int, bytes]]:
    """(position, line without its end) of the lines that begin at the start of the range or later, up to the end."""
    position = max(0, file_range.start - 1)
    with open_binary(file_range, position) as stream:
        if file_range.start:
            position += len(stream.readline())  # a line that began earlier belongs to the previous range
        for raw in stream:
            if position or raw.endswith(b"\n"):
                yield position, raw.rstrip(b"\r\n")
            else:  # a file without LF: the first range has all of its lines
                yield from ((0, line) for line in raw.rstrip(b"\r").split(b"\r"))
            position += len(raw)


def _own_lines(file_range: FileRange) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that begin within the range."""
    for number, (position, line) in enumerate(_lines(file_range), start=1):
        if file_range.stop is not None and position >= file_range.stop:
            return
        yield number, line


def _paragraphs(file_range: FileRange) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, lines) of the paragraphs of the range; the last one may end after the range."""
    first, paragraph, after_blank = 1, list[bytes](), not file_range.start
    for number, (position, line) in enumerate(_lines(file_range), start=1):
        outside = file_range.stop is not None and position >= file_range.stop
        if is_blank(line):
            if paragraph:
                yield first, b"\n".join(paragraph)
            if outside:
                return
            paragraph, after_blank = [], True
        elif after_blank:
            first = first if paragraph else number
            paragraph.append(line)
        elif outside:  # the range has no blank line, so the paragraph belongs to an earlier range
            return
    if paragraph:
        yield first, b"\n".join(paragraph)


def is_blank(line: bytes) -> bool:
    """Whether a line is empty or has only white space, such as no-break spaces."""
    return not line.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()


def _on_one_line(text: str | Broken) -> str | Broken:
    return text if isinstance(text, Broken) else " ".join(line.strip() for line in text.split("\n"))


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


def json_keys(file_range: FileRange, objects: int) -> list[str]:
    """The keys of the first ``objects`` objects of JSON lines or of a JSON array."""
    found = [value for _, value in islice(_objects(file_range), objects) if isinstance(value, dict)]
    return list(dict.fromkeys(key for value in found for key in value))


def _decode(raw: bytes) -> str | Broken:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return Broken("bad UTF-8")


def _objects(file_range: FileRange) -> Iterator[tuple[int, object]]:
    """(line, object) of JSON lines or of a JSON array; ``Broken`` if there is no object, "" for a blank line."""
    if file_range.kind == "json":
        yield from _array(file_range)
    else:
        yield from ((line, _json_object(_decode(raw))) for line, raw in _own_lines(file_range))


def _array(file_range: FileRange) -> Iterator[tuple[int, object]]:
    with open_binary(file_range) as stream:
        text = _decode(stream.read())
    if isinstance(text, Broken):
        raise UsageError(f"{file_range.path} is not UTF-8; convert it")
    separator, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    place = text.index("[") + 1
    line = 1 + text.count("\n", 0, place)
    while True:
        start = cast(re.Match[str], separator.match(text, place)).end()
        line += text.count("\n", place, start)
        if text.startswith("]", start):
            break
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            raise UsageError(f"{file_range.path} has broken JSON from line {line} on; correct it") from None
        yield line, value if isinstance(value, dict) else Broken("not a JSON object")
        line += text.count("\n", start, place)
    if text[start + 1 :].strip():
        raise UsageError(f"{file_range.path} has more after its JSON array, from line {line} on; make it one array")


def has_blank_line(file_range: FileRange) -> bool:
    """Whether the first ``LONG_PARAGRAPH`` bytes of a text have a blank line. True if the whole text is shorter."""
    with open_binary(file_range) as stream:
        start = stream.read(LONG_PARAGRAPH)
    return len(start) < LONG_PARAGRAPH or any(map(is_blank, start.splitlines()))


def is_array(file_range: FileRange) -> bool:
    """Whether a JSON file is an array, not JSON lines."""
    with open_binary(file_range) as stream:
        return stream.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


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


def _value_of(key: str, value: object) -> object:
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
