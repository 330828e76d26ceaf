"""Ranges of documents in files, and their bytes."""

from __future__ import annotations

import codecs
import io
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

from entropy_masking import storage

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BLOCK = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 25  # a longer document is rejected, by default


@dataclass(frozen=True)
class FileRange:
    """A range of whole documents in one file: plain data, planned without reading the documents.

    Attributes:
        path: path or URI.
        kind: ``parquet`` (the rows from start to stop), ``json`` (the elements of an array), ``shard`` (of a shard
            directory), ``file`` (one document), or the documents that begin in the decompressed bytes from start to
            stop: ``line`` or ``jsonl`` (lines), ``csv`` or ``tsv`` (rows), ``paragraph`` (a paragraph begins with the
            blank line before it).
        start, stop: the range; ``stop`` None means the end of the file.
        text_column: column or key of the text.
        limit: at most this many documents of the range, rejected ones included.
        compression: ``gzip``, ``zstd`` or ``bz2``.
        max_bytes: a longer document (in JSON lines, CSV and TSV: a longer line or row) is rejected.
    """

    path: str
    kind: str
    start: int = 0
    stop: int | None = None
    text_column: str = "text"
    limit: int | None = None
    compression: str | None = None
    max_bytes: int = MAX_DOCUMENT_BYTES

    @property
    def sequential(self) -> bool:
        """Whether it can only be found by reading the file from its start."""
        return self.compression is not None or self.kind in ("csv", "tsv", "json")

    @property
    def whole(self) -> FileRange:
        """The whole file, without a limit."""
        return replace(self, start=0, stop=None, limit=None)

    def continues(self, other: FileRange) -> bool:
        """Whether one reader should read both, because it must pass ``other`` anyway."""
        return self.sequential and self.start > 0 and self.whole == other.whole


@dataclass(frozen=True)
class Broken:
    """Replaces a text that could not be read."""

    reason: str


def open_binary(file_range: FileRange, start: int = 0) -> BinaryIO:
    """A buffered stream of a file's decompressed bytes, from ``start`` on if the file is not compressed."""
    filesystem, path = storage.resolve(file_range.path)
    if file_range.compression:
        stream = filesystem.open_input_stream(path, compression=file_range.compression)
    else:
        stream = filesystem.open_input_file(path)
        stream.seek(start)
    return cast(BinaryIO, io.BufferedReader(stream, BLOCK))


def decode(raw: bytes, max_bytes: int) -> str | Broken:
    """The text of UTF-8 bytes without a byte order mark; ``Broken`` if they are not UTF-8 or too many."""
    if len(raw) > max_bytes:
        return too_long(max_bytes)
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return Broken("bad UTF-8")


def too_long(max_bytes: int) -> Broken:
    return Broken(f"longer than {max_bytes:,} bytes")
