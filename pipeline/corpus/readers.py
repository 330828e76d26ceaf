"""Documents out of files, one by one. An unusable document is rejected with its file and line, never silently lost."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line
from pipeline.corpus.formats import documents, text_of
from pipeline.corpus.ranges import Broken, FileRange, too_long

LISTED = 100  # rejected documents that a record names; all are counted


@dataclass(frozen=True)
class Document:
    """A text and its place: ``line`` is 1-based (see ``Rejects.add``)."""

    text: str
    file_range: FileRange
    line: int


class Rejects:
    """Counts documents, and lists the unusable ones. ``longest`` is the tokens of the longest usable one."""

    def __init__(self) -> None:
        self.documents = 0
        self.longest: int | None = None
        self.reasons: Counter[str] = Counter()
        self.listed: list[dict[str, str | int]] = []

    def add(self, file_range: FileRange, line: int, reason: str) -> None:
        """Reject the document at ``line`` of the file (a row of Parquet, an element of an array).

        If the lines before a range were not read, the line is counted from the byte ``from_byte``.
        """
        self.reasons[reason] += 1
        if len(self.listed) < LISTED:
            counted = file_range.kind == "parquet" or file_range.sequential or not file_range.start
            where = {} if counted else {"from_byte": file_range.start}
            self.listed.append({"file": file_range.path, **where, "line": line, "reason": reason})

    def report(self) -> dict[str, object]:
        """``count``, ``reasons`` with their counts, and the first hundred as ``listed``."""
        return {"count": self.reasons.total(), "reasons": dict(self.reasons), "listed": self.listed}


class Reader:
    """Reads ranges of documents. Where a file is read from its start, the next range goes on where the last one ended.

    Not for several threads at a time.
    """

    def __init__(self) -> None:
        self.file: FileRange | None = None  # whose next document begins at ``position`` or later
        self.position = 0.0
        self.rest: Iterator[tuple[int, int, Any]] = iter(())
        self.ahead: tuple[int, int, Any] | None = None

    def values(self, own: FileRange) -> Iterator[tuple[int, Any]]:
        """(line, text) of the documents of a range; instead of a text there may be ``Broken`` or any other value."""
        file = own.whole if own.sequential else own
        if file != self.file or self.position > own.start:
            self.rest, self.ahead = documents(file), None
        self.file = None  # until the end of the range, the place is not known
        stop = math.inf if own.stop is None else own.stop
        while (found := self.ahead or next(self.rest, None)) and found[0] < stop:
            self.ahead = None
            position, line, raw = found
            if position >= own.start:
                yield line, text_of(own, raw)
        self.file, self.position, self.ahead = file, stop, found


def read_documents(ranges: list[FileRange], reader: Reader, rejects: Rejects) -> Iterator[Document]:
    """The usable documents of ``ranges`` in order. Memory holds one document, or a few Parquet rows, at a time.

    Raises:
        UsageError: a file cannot be read to its end.
    """
    for file_range in ranges:
        try:
            for line, value in islice(reader.values(file_range), file_range.limit):
                rejects.documents += 1
                if reason := _why_unusable(value, file_range.max_bytes):
                    rejects.add(file_range, line, reason)
                else:
                    yield Document(value, file_range, line)
        except (OSError, EOFError, pa.ArrowException) as error:
            store_failed = isinstance(error, OSError) and storage.is_remote(file_range.path)
            if store_failed and not isinstance(error, FileNotFoundError):
                raise  # an object store may answer the next time
            raise UsageError(f"cannot read {file_range.path} to its end: {one_line(error)}") from None


def _why_unusable(value: object, max_bytes: int) -> str | None:
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
        size = len(value.encode())
    except UnicodeEncodeError:  # half a surrogate pair, from bad UTF-8 in a CSV or an escape in JSON
        return "bad UTF-8"
    return too_long(max_bytes).reason if size > max_bytes else None
