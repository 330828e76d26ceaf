"""Reads tables of rows from Parquet, TSV, CSV and JSON lines. The text forms are UTF-8, with or without a mark."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from entropy_masking.errors import UsageError, one_line

ENDINGS = ("parquet", "tsv", "csv", "jsonl")


def find_file(directory: Path, *stems: str) -> Path:
    """The first existing file of these names, in any format. Raises UsageError if there is none."""
    paths = [directory / f"{stem}.{ending}" for stem in stems for ending in ENDINGS]
    if existing := [path for path in paths if path.exists()]:
        return existing[0]
    raise UsageError(f"{directory} has no {' or '.join(stems)} as {formats()}")


def formats() -> str:
    return f".{', .'.join(ENDINGS[:-1])} or .{ENDINGS[-1]}"


def read_file(path: Path) -> pl.DataFrame:
    """The table of a file; all columns of a TSV or CSV are text. Raises UsageError if it cannot be read."""
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path.read_bytes())  # polars would take some names for patterns
        if path.suffix == ".jsonl":
            return pl.DataFrame(list(_objects(path)), infer_schema_length=None, strict=False)
        if path.suffix in (".tsv", ".csv"):
            names, *rows = _rows(path)
            return pl.DataFrame(rows, dict.fromkeys(names, pl.String), orient="row")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8; save it as UTF-8") from None
    except (OSError, TypeError, csv.Error, pl.exceptions.PolarsError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from None
    raise UsageError(f"cannot read {path}: its name does not end in {formats()}")


def check_table(frame: pl.DataFrame, columns: Sequence[str], where: object) -> None:
    """Raises UsageError if one of the columns is missing or has a gap, or if there are no rows."""
    if missing := [name for name in columns if name not in frame.columns]:
        raise UsageError(f"{where} has no column {missing[0]!r}, only {', '.join(frame.columns)}")
    if not len(frame):
        raise UsageError(f"{where} has no rows")
    for name in columns:
        gaps = frame[name].is_null() | (frame[name].is_nan() if frame[name].dtype.is_float() else False)
        if gaps.any():
            raise UsageError(f"{where} has no {name} in row {1 + (gaps.arg_max() or 0)}; fill in or drop the row")


def _rows(path: Path) -> Iterator[list[str]]:
    """The names of the columns, then the rows. A blank line is no row. Raises UsageError and names the line."""
    names = None
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, fields in _csv(file) if path.suffix == ".csv" else _tsv(file):
            if fields in ([], [""]):
                continue
            if names is None:
                names = fields
                if twice := [name for name in names if names.count(name) > 1]:
                    raise UsageError(f"{path} has two columns named {twice[0]!r}; rename or remove one")
            elif len(fields) != len(names):
                raise UsageError(f"{path} has {len(fields)} fields in line {number}, but {len(names)} columns; mend it")
            yield fields
    if names is None:
        raise UsageError(f"{path} is empty; its first line names the columns")


def _tsv(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """GLUE's own files are not quoted: a quotation mark is a character."""
    return ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, 1))


def _csv(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Fields may be quoted; they are separated by semicolons if the first line has more of them than commas."""
    first = next(lines, "")
    separator = ";" if first.count(";") > first.count(",") else ","
    reader = csv.reader((line for part in ([first], lines) for line in part), delimiter=separator, strict=True)
    return ((reader.line_num, fields) for fields in reader)


def _objects(path: Path) -> Iterator[dict[str, object]]:
    """The objects of JSON lines. A blank line is no row. Raises UsageError and names the line."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                pairs = json.loads(line, object_pairs_hook=list)
                row = dict(pairs)
            except (ValueError, TypeError, RecursionError):
                raise UsageError(f"{path} has no JSON object in line {number}; mend or remove the line") from None
            if len(row) < len(pairs):
                raise UsageError(f"{path} names a column twice in line {number}; rename or remove one")
            yield row
