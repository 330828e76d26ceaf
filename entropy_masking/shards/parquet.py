"""The Parquet format of shards: schema, tables, bytes, and reading. See docs/shards.md.

Shapes: N rows, L tokens, P positions of a row, k tokens that a teacher names.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import codes
from entropy_masking.errors import UsageError

if TYPE_CHECKING:
    from entropy_masking.shards.schema import Manifest

SCHEMA_VERSION: Final = 3
ROW_GROUP = 1024
# 9 is 3 to 6 % smaller than pyarrow's 1, for 1 µs per token; 15 makes ids 5 % smaller again, for 6 µs: too long for all
# tokens that a fast GPU scores
ZSTD_LEVEL, ZSTD_LEVEL_OF_TARGETS = 9, 15
SCORE_COLUMNS = ("entropy", "surprisal")
TOP_K_COLUMNS = ("topk_ids", "topk_logprobs")


# The predictions of a teacher by column: entropy, surprisal and temperature_lse_T [N, L], topk_* [N, L, k], float32 and
# int. Targets have K chosen positions instead of L. Natural logarithms; where a position is not scored NaN, and id 0.
Scores = dict[str, np.ndarray]


def shard_file(index: int) -> str:
    """``part-00000.parquet``: every writer uses the same name for a shard."""
    return f"part-{index:05d}.parquet"


def list_of(value: pa.DataType) -> pa.DataType:
    """A list column. Inner fields are not nullable: nullability alone costs a third of the bytes."""
    return pa.list_(pa.field("element", value, nullable=False))


def temperature_column(temperature: float) -> str:
    """``temperature_lse_2``: the column of one temperature."""
    return f"temperature_lse_{temperature:g}"


def schema_of(manifest: Manifest) -> pa.Schema:
    """Arrow schema of every shard of a directory, of sequences or of targets."""
    ids, scores = list_of(pa.uint16() if manifest.vocab_size <= 1 << 16 else pa.uint32()), list_of(pa.float16())
    columns = {"sequence_id": pa.uint64()}
    if manifest.masks:
        columns |= {"variant": pa.uint16(), "positions": list_of(pa.uint16())}
    else:
        columns |= {"input_ids": ids, **dict.fromkeys(SCORE_COLUMNS if manifest.scored else (), scores)}
    if manifest.masks or manifest.top_k:
        columns |= {"topk_ids": ids, "topk_logprobs": list_of(pa.uint8())}
        columns |= {temperature_column(t): scores for t in manifest.temperatures if t != 1}
    if manifest.masks:
        columns["input_crc32"] = pa.uint32()
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def to_table(manifest: Manifest, index: int, input_ids_NL: np.ndarray, scores: Scores | None) -> pa.Table:
    """Arrow table of one shard of sequences; sequence ids are ``index << 32 | row``.

    Raises UsageError for more values than an Arrow list can hold.
    """
    rows, length = input_ids_NL.shape
    if rows * length * max(1, manifest.top_k) >= 1 << 31:  # offsets of an Arrow list are int32
        raise UsageError(f"shard {index} has {rows * length:,} tokens, too many for one file; split its text file")
    ids_N = (np.uint64(index) << np.uint64(32)) + np.arange(rows, dtype=np.uint64)
    columns: dict[str, np.ndarray] = {"sequence_id": ids_N, "input_ids": input_ids_NL, **(scores or {})}
    return table_of(manifest, columns, np.ones((rows, length), bool))


def table_of(manifest: Manifest, columns: dict[str, np.ndarray], kept_NP: np.ndarray) -> pa.Table:
    """Arrow table of N rows. A list column [N, P] or [N, P, k] holds the values of the kept positions, in order.

    ``topk_logprobs`` are stored in 8 bits (``codes``).
    """
    arrays, schema = [], schema_of(manifest)
    for field in schema:
        values, kind = columns[field.name], field.type
        if pa.types.is_list(kind):
            values = codes.encode(values[kept_NP]) if field.name == "topk_logprobs" else values[kept_NP]
            lengths_N = kept_NP.sum(1) * (values.shape[1] if values.ndim == 2 else 1)
            offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
            flat = pa.array(values.reshape(-1).astype(kind.value_type.to_pandas_dtype()))
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind))
        else:
            arrays.append(pa.array(values, type=kind))
    return pa.Table.from_arrays(arrays, schema=schema)


def to_parquet(groups: Sequence[pa.Table]) -> bytes:
    """Parquet bytes of a shard, one row group per table: a pure function of the tables (and of the Arrow version).

    Integer columns are split by byte, because their upper bytes are mostly zero; ascending positions are stored as
    differences. Floats stay plain, because DuckDB cannot read a split float16.
    """
    arrow_schema = groups[0].schema
    encodings = {}
    for field in arrow_schema:
        listed = pa.types.is_list(field.type)
        integer = pa.types.is_integer(field.type.value_type if listed else field.type)
        encodings[f"{field.name}.list.element" if listed else field.name] = "BYTE_STREAM_SPLIT" if integer else "PLAIN"
    if targets := "positions" in arrow_schema.names:
        encodings["positions.list.element"] = "DELTA_BINARY_PACKED"
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        arrow_schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL_OF_TARGETS if targets else ZSTD_LEVEL,
        use_dictionary=False,
        column_encoding=encodings,
        write_statistics=["sequence_id"],
    ) as writer:
        for table in groups:
            writer.write_table(table, row_group_size=max(1, len(table)))
    return sink.getvalue()


def row_groups(table: pa.Table) -> list[pa.Table]:
    """A table cut into the row groups of a shard of sequences."""
    return [table.slice(start, ROW_GROUP) for start in range(0, len(table), ROW_GROUP)] or [table]


def counts(input_ids_NL: np.ndarray, pad_id: int, scores: Scores | None) -> dict[str, float]:
    """The counts in the record of a shard of sequences."""
    entropy = scores["entropy"][~np.isnan(scores["entropy"])] if scores else np.empty(0)
    return {
        "rows": len(input_ids_NL),
        "tokens": int((input_ids_NL != pad_id).sum()),
        "scored_tokens": len(entropy),
        "entropy_sum": float(entropy.sum(dtype=np.float64)),
    }


def column_2d(table: pa.Table, name: str, width: int) -> np.ndarray:
    """A list column as an array [rows, width], without a loop over values; width is L, or L·k for top-k columns.

    Raises ValueError if a row has another number of values.
    """
    column = table.column(name).combine_chunks()
    if (column.value_lengths().to_numpy() != width).any():
        raise ValueError(f"a row does not have {width} {name}")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
