"""Reads tables of rows from Parquet, TSV, CSV and JSON lines. The text forms are UTF-8, with or without a mark."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyarrow import csv

from entropy_masking.errors import UsageError, one_line

ENDINGS = ("parquet", "tsv", "csv", "jsonl")
FORMATS = ".parquet, .tsv, .csv or .jsonl"


def find_file(directory: Path, *stems: str) -> Path:
    """The first existing file of these names, in any format. Raises UsageError if there is none."""
    paths = [directory / f"{stem}.{ending}" for stem in stems for ending in ENDINGS]
    if existing := [path for path in paths if path.exists()]:
        return existing[0]
    raise UsageError(f"{directory} has no {' or '.join(stems)} as {FORMATS}")


def read_file(path: Path) -> pl.DataFrame:
    """The table of a file; all columns of a TSV or CSV are text. Raises UsageError if it cannot be read."""
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path.read_bytes())  # polars would take some names for patterns
        if path.suffix == ".jsonl":
            return pl.DataFrame(list(_objects(path)), infer_schema_length=None, strict=False)
        if path.suffix in (".tsv", ".csv"):
            return pl.DataFrame(_separated(path.read_bytes(), quoted=path.suffix == ".csv"))
    except (OSError, ValueError, TypeError, OverflowError, RecursionError, pl.exceptions.PolarsError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from None
    raise UsageError(f"cannot read {path}: its name does not end in {FORMATS}")


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


def _separated(data: bytes, quoted: bool) -> pa.Table:
    """The rows of a TSV or CSV, all text. GLUE's own TSVs are not quoted: a quotation mark is a character."""
    heading = data.partition(b"\n")[0]
    separator = "\t" if not quoted else ";" if heading.count(b";") > heading.count(b",") else ","
    form = csv.ParseOptions(delimiter=separator, quote_char='"' if quoted else False, newlines_in_values=quoted)
    # a row must fit into a block
    whole = csv.ReadOptions(block_size=min(max(1 << 20, len(data)), (1 << 31) - 1), use_threads=False)
    names = csv.open_csv(pa.BufferReader(data), whole, form).schema.names
    text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return csv.read_csv(pa.BufferReader(data), whole, form, text)


def _objects(path: Path) -> Iterator[dict[str, object]]:
    """The objects of JSON lines. A blank line is no row. Raises UsageError and names the line."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise UsageError(f"{path} has no JSON object in line {number}; mend or remove the line") from None
