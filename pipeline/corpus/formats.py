"""The documents of a file or a part of it, with their places, for every file format.

In text and JSON lines, a line ends with LF or CR LF.
"""

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from entropy_masking.errors import UsageError, one_line
from pipeline.corpus.ranges import BLOCK, Broken, FileRange, decode, open_binary
from pipeline.corpus.tables import csv_values, parquet_values

LONG_PARAGRAPH = 1 << 16  # bytes; a longer one is rather a file with a document in each line


def documents(file_range: FileRange) -> Iterator[tuple[int, int, Any]]:
    """(position, line, what ``text_of`` makes a text of) of the documents from the start of a range on.

    They do not stop at the end of the range; ``Reader`` stops there. For a sequential file, ``Reader`` asks for the
    whole file and drops the documents before the range. Of a document with more than ``max_bytes``, only about as many
    are held in memory.
    """
    most = file_range.max_bytes
    if file_range.kind == "parquet":
        yield from parquet_values(file_range)
    elif file_range.kind in ("csv", "tsv"):
        yield from csv_values(file_range)
    elif file_range.kind == "json":
        yield from ((number, number + 1, value) for number, value in enumerate(array(file_range)))
    elif file_range.kind == "file":
        yield 0, 1, _start_of(file_range, most + 1)
    elif file_range.kind == "paragraph":
        yield from _paragraphs(file_range)
    else:
        lines = enumerate(_lines(file_range), start=1)
        yield from ((position, line, raw) for line, (position, raw) in lines if not is_blank(raw, most))


def text_of(file_range: FileRange, found: Any) -> Any:
    """The text of a document; ``Broken`` or any other value if it has none."""
    if file_range.kind in ("json", "jsonl"):
        return _value_of(file_range.text_column, _object(found, file_range.max_bytes))
    text = decode(found, file_range.max_bytes) if isinstance(found, bytes) else found
    if file_range.kind == "paragraph" and isinstance(text, str):
        return " ".join(map(str.strip, text.split("\n")))
    return text


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
            if len(raw) == most and not raw.endswith(b"\n"):
                yield position, raw
                position += _skip_line(stream)
            else:
                yield position, raw.rstrip(b"\r\n")
            position += len(raw)


def _skip_line(stream: BinaryIO, most: int | None = None) -> int:
    """Skip the rest of a line, or a little more than ``most`` bytes of it. Returns how many."""
    skipped, block = 0, b""
    while not block.endswith(b"\n") and (most is None or skipped <= most) and (block := stream.readline(BLOCK)):
        skipped += len(block)
    return skipped


def _paragraphs(file_range: FileRange) -> Iterator[tuple[int, int, bytes]]:
    """(position of the blank line before it, number of the first line, lines) of the paragraphs of the range.

    The last one may end after the range.
    """
    begin, first, paragraph, size = None if file_range.start else 0, 1, list[bytes](), 0
    for number, (position, line) in enumerate(_lines(file_range), start=1):
        outside = file_range.stop is not None and position >= file_range.stop
        if is_blank(line, file_range.max_bytes):
            if paragraph and begin is not None:
                yield begin, first, b"\n".join(paragraph)
            if outside:
                return
            begin, paragraph, size = position, [], 0
        elif begin is not None:
            first = first if paragraph else number
            if size <= file_range.max_bytes + 1:  # else it is rejected
                paragraph.append(line)
                size += len(line) + 1
        elif outside:  # the range has no blank line, so the paragraph belongs to an earlier range
            return
    if paragraph and begin is not None:
        yield begin, first, b"\n".join(paragraph)


def is_blank(line: bytes, max_bytes: int) -> bool:
    """Whether a line is empty or has only white space, such as no-break spaces. A longer line counts as text."""
    return len(line) <= max_bytes and not line.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()


def json_keys(file_range: FileRange, objects: int) -> list[str]:
    """The keys of the first ``objects`` objects of JSON lines or of a JSON array."""
    found = (_object(raw, file_range.max_bytes) for _, _, raw in islice(documents(file_range), objects))
    return list(dict.fromkeys(key for value in found if isinstance(value, dict) for key in value))


def array(file_range: FileRange) -> list[object]:
    """A JSON array, which is read as a whole. Raises UsageError if it is broken or longer than ``max_bytes``."""
    path, most = file_range.path, file_range.max_bytes
    raw = _start_of(file_range, most + 1)
    if len(raw) > most:
        fix = "convert it to JSON lines (.jsonl), or raise --max-document-bytes"
        raise UsageError(f"{path} is a JSON array of more than {most:,} bytes; {fix}")
    try:
        found: list[object] = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} has broken JSON ({one_line(error)}); correct it") from None
    return found


def has_blank_line(file_range: FileRange) -> bool:
    """Whether the first ``LONG_PARAGRAPH`` bytes of a text have a blank line. True if the whole text is shorter."""
    with open_binary(file_range) as stream:
        start = stream.read(LONG_PARAGRAPH)
    return len(start) < LONG_PARAGRAPH or any(is_blank(line, LONG_PARAGRAPH) for line in start.splitlines())


def is_array(file_range: FileRange) -> bool:
    """Whether a JSON file is an array, not JSON lines."""
    with open_binary(file_range) as stream:
        return stream.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _object(found: object, max_bytes: int) -> object:
    """The object of a line, or the element of an array; ``Broken`` if it is none."""
    if isinstance(found, bytes):
        found = decode(found, max_bytes)
        if isinstance(found, Broken):
            return found
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            return Broken("broken JSON")
    return found if isinstance(found, dict) else Broken("not a JSON object")


def _value_of(key: str, value: object) -> object:
    if not isinstance(value, dict):
        return value
    return value[key] if key in value else Broken(f"no key {key!r}")
