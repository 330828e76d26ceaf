"""The texts of CSV and Parquet files."""

import csv
import io
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line
from pipeline.corpus.ranges import BLOCK, Broken, FileRange, decode, open_binary, too_long

csv.field_size_limit((1 << 31) - 1)  # csv_rows limits whole rows
DIALECTS: dict[str, Any] = {"csv": {"strict": True}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
READ_AGAIN = 8  # times the length of the file that the lines after broken CSV rows are read again
BATCH_ROWS = 16  # Parquet rows in memory; each may be as long as all pages of its row group
BATCH_BYTES = 1 << 26
# What a Parquet file of texts cannot claim: more rows than it has bytes, or that it was compressed by more than this.
# A small file, which needs little memory, may.
MOST_COMPRESSED = 1000
FEW_ROWS, FEW_BYTES = 1 << 20, 1 << 28


def csv_rows(file_range: FileRange) -> Iterator[tuple[int, int, list[str] | Broken]]:
    """(position, first line, fields) of each row, the header first; ``Broken`` instead of the fields of a broken row.

    A row ends at a line end outside quotes. An unclosed quotation mark must not swallow the rows after it. So only the
    first line of a broken row is dropped, and the lines after it are read again. If too much was read again, a row has
    one line only. A row of more than ``max_bytes`` characters is broken. Blank lines are no rows.
    """
    most, dialect = file_range.max_bytes, DIALECTS[file_range.kind]
    again: deque[str] = deque()  # lines to read again
    line, position, read_again, width = 1, 0, 0, None
    with open_binary(file_range) as stream:
        # bytes that are not UTF-8 become lone surrogates, so only their own row is rejected
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        while True:
            lines, row = _csv_row(text, again, most, dialect, alone=read_again > most + READ_AGAIN * position)
            if not lines:
                return
            if row is None or (row and width is not None and len(row) != width):
                is_long = len(lines[0]) > most + len("\r\n")
                yield position, line, too_long(most) if is_long else Broken("broken CSV row")
                again.extendleft(reversed(lines[1:]))
                read_again += sum(map(len, lines[1:]))
                del lines[1:]
            elif row or width is None:
                yield position, line, row
            line += len(lines)
            position += sum(map(_size, lines))
            width = len(row or []) if width is None else width


def _csv_row(
    text: io.TextIOWrapper, again: deque[str], most: int, dialect: dict[str, Any], alone: bool
) -> tuple[list[str], list[str] | None]:
    """(lines, fields) of the next row: no fields if it is broken, and no lines at the end of the file.

    With ``alone``, it is taken to be one line.
    """
    lines: list[str] = []

    def of_row() -> Iterator[str]:
        size = 0
        while line := again.popleft() if again else _csv_line(text, most):
            lines.append(line)
            size += len(line)
            if size > most + len("\r\n"):
                raise csv.Error
            yield line
            if alone:
                return

    try:
        return lines, next(csv.reader(of_row(), **dialect), None)
    except csv.Error:
        return lines, None


def _size(line: str) -> int:
    """Bytes of a line in its file (without those that ``_csv_line`` has cut)."""
    return len(line) if line.isascii() else len(line.encode(errors="surrogateescape"))


def _csv_line(text: io.TextIOWrapper, most: int) -> str:
    """A line with its end; of a line with more than ``most`` characters only the start, which is also longer."""
    line = rest = text.readline(most + len("\r\n") + 1)
    while len(line) > most + len("\r\n") and rest and not rest.endswith(("\n", "\r")):
        rest = text.readline(BLOCK)
    return line


def csv_values(file_range: FileRange) -> Iterator[tuple[int, int, str | Broken]]:
    rows, name = csv_rows(file_range), file_range.text_column
    _, _, header = next(rows, (0, 1, []))
    column = header.index(name) if isinstance(header, list) and name in header else None
    for position, line, row in rows:
        if isinstance(row, Broken):
            yield position, line, row
        else:
            yield position, line, Broken(f"no column {name!r}") if column is None else row[column]


def parquet_footer(path: str) -> tuple[pa.Schema, pq.FileMetaData]:
    """Schema and metadata of a Parquet file. Raises UsageError: it is none."""
    filesystem, name = storage.resolve(path)
    try:
        with pq.ParquetFile(name, filesystem=filesystem) as file:
            return file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as Parquet: {one_line(error)}") from None


def check_footer(path: str, metadata: pq.FileMetaData) -> int:
    """Bytes of a Parquet file without compression, as encoded; at least one for each row, as equal rows may take less.

    Raises:
        UsageError: the footer claims more rows or text than a file of its size can hold.
    """
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    rows_G = [group.num_rows for group in groups]
    # of all columns: in a damaged footer, a look at one column would end the process
    texts_G = [group.total_byte_size for group in groups]
    if min([*rows_G, *texts_G], default=0) < 0 or sum(rows_G) != metadata.num_rows:
        raise UsageError(f"{path} is damaged: its footer has impossible numbers of rows or bytes")
    rows, texts, size = sum(rows_G), sum(texts_G), storage.size(path) or 0
    if rows > max(size, FEW_ROWS) or texts > max(MOST_COMPRESSED * size, FEW_BYTES):
        raise UsageError(
            f"{path} claims {rows:,} rows with {texts:,} bytes of text, more than a file of {size:,} bytes can hold; "
            "it is damaged or not a corpus of text"
        )
    return max(rows, texts)


def parquet_values(file_range: FileRange) -> Iterator[tuple[int, int, str | Broken | None]]:
    filesystem, path = storage.resolve(file_range.path)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        metadata, ends = file.metadata, [0]
        for group in range(file.num_row_groups):
            ends.append(ends[-1] + metadata.row_group(group).num_rows)
        stop = ends[-1] if file_range.stop is None else file_range.stop
        groups = [g for g in range(file.num_row_groups) if ends[g] < stop and ends[g + 1] > file_range.start]
        row = ends[groups[0]] if groups else stop
        # an encoding can make every row as long as all that is stored
        longest = max((metadata.row_group(g).total_byte_size for g in groups), default=0)
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(longest, 1)))
        for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=[file_range.text_column]):
            for raw in _as_bytes(batch.column(0)):
                if file_range.start <= row < stop:
                    yield row, row + 1, None if raw is None else decode(raw, file_range.max_bytes)
                row += 1
        if row < stop:
            raise UsageError(f"{file_range.path} is damaged: it has fewer rows than its footer claims")


def _as_bytes(column: pa.Array) -> Iterator[bytes | None]:
    """The texts of a column as bytes, because one bad text must not make its batch fail."""
    texts = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    binary = pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary()
    return (value.as_py() for value in texts.cast(binary))
