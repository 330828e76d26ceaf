"""Masks as data: mask plans, the targets that a teacher gives for them, and the checksum that holds the two together.

A *mask plan* (``train/plan.py``) says for each sequence of a shard directory and each of R variants which positions are
hidden and what stands there instead. A *target shard* (``score.py --masks``) is what the teacher predicts at exactly
those positions of exactly those inputs. Both keep the shards of the directory that they belong to, one file each, and
within a file block by block: R row groups, one a variant, for each row group of the sequences. So to train on variant v
of a row group is to read one row group. See docs/shards.md.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from entropy_masking.shards.parquet import ROW_GROUP, list_of, temperature_column, token_type

NO_POSITION = -1  # fills the positions of a row that hides fewer than K


@dataclass(frozen=True)
class MaskedRows:
    """N rows of a mask plan.

    Attributes:
        sequence_id_N: uint64.
        variant_N: uint16.
        positions_NK: hidden positions, ascending, int64; a row that hides fewer than K ends in ``NO_POSITION``.
        corrupted_NK: the ids at those positions in the student's input, int64; 0 where there is no position.
        crc32_N: ``input_crc32`` of the student's input, uint32.
    """

    sequence_id_N: np.ndarray
    variant_N: np.ndarray
    positions_NK: np.ndarray
    corrupted_NK: np.ndarray
    crc32_N: np.ndarray


@dataclass(frozen=True)
class Targets:
    """What a teacher says of the K hidden positions of N rows; natural logarithms, NaN where there is no position.

    Attributes:
        topk_ids_NKT: most probable first, int64; 0 where there is no position.
        topk_logprobs_NKT: log-probabilities under the softmax over the whole vocabulary, float32.
        temperature_lse_NK: by temperature T ≠ 1, ``log Σ e^{z/T} - (1/T)·log Σ e^z``, float32: the top-k of the
            distribution at T are ``topk_logprobs / T - temperature_lse``.
    """

    topk_ids_NKT: np.ndarray
    topk_logprobs_NKT: np.ndarray
    temperature_lse_NK: dict[float, np.ndarray]


def input_crc32(inputs_NL: np.ndarray) -> np.ndarray:
    """CRC-32 (uint32, as zlib's) of each row of ids, taken as little-endian uint32."""
    rows = np.ascontiguousarray(inputs_NL, dtype="<u4")
    return np.fromiter((zlib.crc32(row.data) for row in rows), np.uint32, count=len(rows))


def apply_mask(input_ids_NL: np.ndarray, rows: MaskedRows) -> np.ndarray:
    """The student's inputs [N, L]: the corrupted ids put in their positions.

    Raises:
        ValueError: an input's checksum is not the plan's, so the plan belongs to other sequences.
    """
    inputs_NL = input_ids_NL.copy()
    row, column = np.nonzero(rows.positions_NK != NO_POSITION)
    inputs_NL[row, rows.positions_NK[row, column]] = rows.corrupted_NK[row, column]
    if (wrong := input_crc32(inputs_NL) != rows.crc32_N).any():
        raise ValueError(f"the masked input of sequence {rows.sequence_id_N[wrong.argmax()]} is not the plan's")
    return inputs_NL


# --- schemas ---------------------------------------------------------------------------------------------------------


def plan_schema(vocab_size: int) -> pa.Schema:
    """Arrow schema of a mask plan."""
    return _schema({"positions": list_of(pa.uint16()), "corrupted_ids": list_of(token_type(vocab_size))})


def targets_schema(vocab_size: int, temperatures: list[float]) -> pa.Schema:
    """Arrow schema of a target shard; top-k columns are position-major over ``positions``."""
    lse = {temperature_column(t): list_of(pa.float16()) for t in temperatures if t != 1}
    top = {"topk_ids": list_of(token_type(vocab_size)), "topk_logprobs": list_of(pa.float16())}
    return _schema({"positions": list_of(pa.uint16()), **top, **lse})


def _schema(lists: dict[str, pa.DataType]) -> pa.Schema:
    columns = {"sequence_id": pa.uint64(), "variant": pa.uint16(), **lists, "input_crc32": pa.uint32()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


# --- tables ----------------------------------------------------------------------------------------------------------


def plan_table(rows: MaskedRows, vocab_size: int) -> pa.Table:
    """Arrow table of a mask plan."""
    return _table(plan_schema(vocab_size), rows, {"corrupted_ids": rows.corrupted_NK})


def targets_table(rows: MaskedRows, targets: Targets, vocab_size: int) -> pa.Table:
    """Arrow table of a target shard."""
    lse = {temperature_column(t): values for t, values in targets.temperature_lse_NK.items()}
    schema = targets_schema(vocab_size, list(targets.temperature_lse_NK))
    top = {"topk_ids": targets.topk_ids_NKT, "topk_logprobs": targets.topk_logprobs_NKT}
    return _table(schema, rows, {**top, **lse})


def _table(schema: pa.Schema, rows: MaskedRows, lists: dict[str, np.ndarray]) -> pa.Table:
    kept_NK = rows.positions_NK != NO_POSITION
    counts_N = kept_NK.sum(1)
    fixed = {"sequence_id": rows.sequence_id_N, "variant": rows.variant_N, "input_crc32": rows.crc32_N}
    arrays = []
    for field in schema:
        if field.name in fixed:
            arrays.append(pa.array(fixed[field.name], type=field.type))
            continue
        values = {"positions": rows.positions_NK, **lists}[field.name][kept_NK]
        width = values.shape[1] if values.ndim == 2 else 1
        offsets = np.concatenate([[0], np.cumsum(counts_N * width)]).astype(np.int32)
        flat = pa.array(values.reshape(-1).astype(field.type.value_type.to_pandas_dtype()))
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), flat, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def rows_of(table: pa.Table, most: int) -> MaskedRows:
    """Rows of a plan, or of targets (then ``corrupted_NK`` is 0), with up to ``most`` positions each."""
    kept_NK = _kept(table, most)
    corrupted = "corrupted_ids" in table.column_names
    return MaskedRows(
        table["sequence_id"].to_numpy(),
        table["variant"].to_numpy(),
        _padded(table, "positions", kept_NK, NO_POSITION),
        _padded(table, "corrupted_ids", kept_NK, 0) if corrupted else np.zeros(kept_NK.shape, np.int64),
        table["input_crc32"].to_numpy(),
    )


def targets_of(table: pa.Table, most: int, top_k: int, temperatures: list[float]) -> Targets:
    """What a teacher says, out of target rows read with ``rows_of``'s table."""
    kept_NK = _kept(table, most)
    return Targets(
        _padded(table, "topk_ids", kept_NK, 0, top_k),
        _padded(table, "topk_logprobs", kept_NK, np.nan, top_k),
        {t: _padded(table, temperature_column(t), kept_NK, np.nan) for t in temperatures if t != 1},
    )


def _kept(table: pa.Table, most: int) -> np.ndarray:
    """Which of the K places of a row are filled [N, K]."""
    counts_N = table["positions"].combine_chunks().value_lengths().to_numpy()
    return np.arange(most) < counts_N[:, None]


def _padded(table: pa.Table, name: str, kept_NK: np.ndarray, fill: float, width: int | None = None) -> np.ndarray:
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    kind = np.float32 if flat.dtype.kind == "f" else np.int64
    out = np.full((*kept_NK.shape, width) if width else kept_NK.shape, fill, kind)
    out[kept_NK] = flat.reshape(-1, width) if width else flat
    return out


def row_numbers(rows: MaskedRows) -> np.ndarray:
    """The row of each row's sequence within its shard."""
    return (rows.sequence_id_N & np.uint64(0xFFFFFFFF)).astype(np.int64)


def counts(rows: MaskedRows) -> dict[str, Any]:
    """What a record says of the rows of a plan or a target shard."""
    scored = int((rows.positions_NK != NO_POSITION).sum())
    return {"rows": len(rows.variant_N), "tokens": 0, "scored_tokens": scored, "entropy_sum": 0.0}


def blocks(sequences: int, variants: int) -> list[tuple[np.ndarray, int]]:
    """(row numbers of the sequences, variant) of each row group of a plan or target file, in order."""
    starts = range(0, sequences, ROW_GROUP)
    return [(np.arange(s, min(s + ROW_GROUP, sequences)), v) for s in starts for v in range(variants)]


def row_groups(table: pa.Table, rows: MaskedRows) -> list[pa.Table]:
    """A table of plan or target rows cut into the row groups of its file: where the variant or the block changes."""
    starts = row_numbers(rows) % ROW_GROUP == 0
    cuts = [*np.flatnonzero(starts).tolist(), len(table)]
    return [table.slice(a, b - a) for a, b in pairwise(cuts)] or [table]


def row_group(block: int, variant: int, variants: int) -> int:
    """The row group of a plan or target file that holds one variant of one block."""
    return block * variants + variant
