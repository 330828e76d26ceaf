"""The values of a file or a part of it, with their lines, for every file format.

In text and JSON lines, a line ends with LF or CR LF. If a file has no LF at all, it ends with CR.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, cast

from entropy_masking.errors import UsageError
from pipeline.corpus.ranges import BLOCK, Broken, FileRange, decode, open_binary
from pipeline.corpus.tables import csv_values, parquet_values

LONG_PARAGRAPH = 1 << 16  # bytes; a longer one is rather a file with a document in each line


def values(file_range: FileRange, text_column: str) -> Iterator[tuple[int, Any]]:
    """(line, text) of a range; instead of a text there may be ``Broken`` or any other value.

    Of a document with more than ``max_bytes``, only about as many are held in memory.
    """
    most = file_range.max_bytes
    if file_range.kind == "parquet":
        yield from parquet_values(file_range, text_column)
    elif file_range.kind == "file":
        yield 1, decode(_start_of(file_range, most + 1), most)
    elif file_range.kind == "line":
        yield from ((line, decode(raw, most)) for line, raw in _own_lines(file_range) if not is_blank(raw, most))
    elif file_range.kind == "paragraph":
        yield from ((line, _on_one_line(decode(raw, most))) for line, raw in _paragraphs(file_range))
    elif file_range.kind in ("csv", "tsv"):
        yield from csv_values(file_range, text_column)
    else:
        yield from ((line, _value_of(text_column, found)) for line, found in _objects(file_range))


def _start_of(file_range: FileRange, size: int) -> bytes:
    start = bytearray()
    with open_binary(file_range) as stream:
        while block := stream.read(min(BLOCK, size - len(start))):
            start += block
    return bytes(start)


def _lines(file_range: FileRange) -> Iterator[tuple[int, bytes]]:
    """(position, line without its end) of the lines that begin at the start of the range or later, up to the end.

    Of a line with more than ``max_bytes``, only the start is returned, which is also longer than that.
    """
    position, most = max(0, file_range.start - 1), file_range.max_bytes + len(b"\r\n")
    with open_binary(file_range, position) as stream:
        if file_range.start:  # a line that began earlier belongs to an earlier range
            position += _skip_line(stream, file_range.stop and file_range.stop - position)
            if file_range.stop is not None and position >= file_range.stop:
                return
        while raw := stream.readline(most):
            ended = raw.endswith(b"\n")
            if len(raw) == most and not ended:
                yield position, raw
                position += _skip_line(stream)
            elif position or ended:
                yield position, raw.rstrip(b"\r\n")
            else:  # a file without LF: the first range has all of its lines
                yield from ((0, line) for line in raw.rstrip(b"\r").split(b"\r"))
            position += len(raw)


def _skip_line(stream: BinaryIO, most: int | None = None) -> int:
    """Skip the rest of a line, or a little more than ``most`` bytes of it. Returns how many."""
    skipped, block = 0, b""
    while not block.endswith(b"\n") and (most is None or skipped <= most) and (block := stream.readline(BLOCK)):
        skipped += len(block)
    return skipped


def _own_lines(file_range: FileRange) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that begin within the range."""
    for number, (position, line) in enumerate(_lines(file_range), start=1):
        if file_range.stop is not None and position >= file_range.stop:
            return
        yield number, line


def _paragraphs(file_range: FileRange) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, lines) of the paragraphs of the range; the last one may end after the range."""
    first, paragraph, after_blank, size = 1, list[bytes](), not file_range.start, 0
    for number, (position, line) in enumerate(_lines(file_range), start=1):
        outside = file_range.stop is not None and position >= file_range.stop
        if is_blank(line, file_range.max_bytes):
            if paragraph:
                yield first, b"\n".join(paragraph)
            if outside:
                return
            paragraph, after_blank, size = [], True, 0
        elif after_blank:
            first = first if paragraph else number
            if size <= file_range.max_bytes + 1:  # else it is rejected
                paragraph.append(line)
                size += len(line) + 1
        elif outside:  # the range has no blank line, so the paragraph belongs to an earlier range
            return
    if paragraph:
        yield first, b"\n".join(paragraph)


def is_blank(line: bytes, max_bytes: int) -> bool:
    """Whether a line is empty or has only white space, such as no-break spaces. A longer line counts as text."""
    return len(line) <= max_bytes and not line.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()


def _on_one_line(text: str | Broken) -> str | Broken:
    return text if isinstance(text, Broken) else " ".join(line.strip() for line in text.split("\n"))


@lru_cache(maxsize=64)
def lines_before(file_range: FileRange) -> int:
    """Number of lines (rows) of the file before the range; reads the file up to the range."""
    if file_range.kind == "parquet":
        return file_range.start
    position, lines, ends_line = 0, 0, True
    with open_binary(file_range) as stream:
        while position < file_range.start and (block := stream.read(min(BLOCK, file_range.start - position))):
            position += len(block)
            lines += block.count(b"\n")
            ends_line = block.endswith(b"\n")
    return lines if ends_line else lines + 1


def json_keys(file_range: FileRange, objects: int) -> list[str]:
    """The keys of the first ``objects`` objects of JSON lines or of a JSON array."""
    found = [value for _, value in islice(_objects(file_range), objects) if isinstance(value, dict)]
    return list(dict.fromkeys(key for value in found for key in value))


def _objects(file_range: FileRange) -> Iterator[tuple[int, object]]:
    """(line, object) of JSON lines or of a JSON array; ``Broken`` if there is no object, "" for a blank line."""
    if file_range.kind == "json":
        yield from _array(file_range)
    else:
        lines = _own_lines(file_range)
        yield from ((line, _json_object(decode(raw, file_range.max_bytes))) for line, raw in lines)


def _array(file_range: FileRange) -> Iterator[tuple[int, object]]:
    path, most, white_space = file_range.path, file_range.max_bytes, re.compile(r"[\s,]*")
    with open_binary(file_range) as stream:
        source = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        text = _read_text(source, path)
        place = text.index("[") + 1
        line = 1 + text.count("\n", 0, place)
        while True:
            start = cast(re.Match[str], white_space.match(text, place)).end()
            line += text.count("\n", place, start)
            if text.startswith("]", start):
                break
            value, place = _value_at(text, start)
            # what was read may end within a value, even within a number that is a value already
            if place >= len(text) and (more := _read_text(source, path, len(text) - start)):
                if len(text) - start > most:
                    raise UsageError(
                        f"{path} has an object of more than {most:,} bytes, or broken JSON, from line {line} on; "
                        "correct it, or raise --max-document-bytes"
                    )
                text, place = text[start:] + more, 0
                continue
            if place > len(text):
                raise UsageError(f"{path} has broken JSON from line {line} on; correct it")
            yield line, value if isinstance(value, dict) else Broken("not a JSON object")
            line += text.count("\n", start, place)
        rest = text[start + 1 :]
        while not rest.strip():
            if not (rest := _read_text(source, path)):
                return
    raise UsageError(f"{path} has more after its JSON array, from line {line} on; make it one array")


def _value_at(text: str, start: int) -> tuple[object, int]:
    """A JSON value and its end, which is beyond the text if there is no value in it."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, len(text) + 1


def _read_text(source: io.TextIOWrapper, path: str, size: int = 0) -> str:
    try:
        return source.read(max(size, BLOCK))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8; convert it") from None


def has_blank_line(file_range: FileRange) -> bool:
    """Whether the first ``LONG_PARAGRAPH`` bytes of a text have a blank line. True if the whole text is shorter."""
    with open_binary(file_range) as stream:
        start = stream.read(LONG_PARAGRAPH)
    return len(start) < LONG_PARAGRAPH or any(is_blank(line, LONG_PARAGRAPH) for line in start.splitlines())


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
