"""Target shards: the predictions of a teacher at the masked positions of exactly the inputs that a student will see.

Targets (``score.py --mask-source``) have the same shards as the sequences that they were made for, one file per shard.
A row is one variant of one sequence. Each row group of the sequences becomes a block of R row groups, one per variant.
So to train on one variant, a loader reads one row group per block. See docs/shards.md.

Shapes: N rows, L tokens, K masked positions, k tokens that a teacher names.
"""

import zlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from entropy_masking import codes
from entropy_masking.shards import parquet
from entropy_masking.shards.parquet import ROW_GROUP, Scores
from entropy_masking.shards.schema import Manifest

NO_POSITION = -1  # fills the positions of a row that masks fewer than K


@dataclass(frozen=True)
class MaskedRows:
    """N masked sequences.

    Attributes:
        sequence_id_N: uint64.
        variant_N: uint16.
        positions_NK: masked positions, ascending, int64; a row that masks fewer than K ends in ``NO_POSITION``.
        crc32_N: ``input_crc32`` of the student's input, uint32.
    """

    sequence_id_N: np.ndarray
    variant_N: np.ndarray
    positions_NK: np.ndarray
    crc32_N: np.ndarray


def input_crc32(inputs_NL: np.ndarray) -> np.ndarray:
    """CRC-32 (uint32, as zlib's) of each row of ids as little-endian uint32."""
    rows = np.ascontiguousarray(inputs_NL, dtype="<u4")
    return np.fromiter((zlib.crc32(row.data) for row in rows), np.uint32, count=len(rows))


def targets_table(manifest: Manifest, rows: MaskedRows, scores: Scores) -> pa.Table:
    """Arrow table of a target shard; ``scores`` are those of the masked positions [N, K]."""
    columns = {"sequence_id": rows.sequence_id_N, "variant": rows.variant_N, "input_crc32": rows.crc32_N}
    columns |= {"positions": rows.positions_NK, **scores}
    return parquet.table_of(manifest, columns, rows.positions_NK != NO_POSITION)


def rows_of(table: pa.Table, max_positions: int) -> MaskedRows:
    """The rows of a target table, with up to ``max_positions`` positions each. Raises ValueError if one has more."""
    return MaskedRows(
        table["sequence_id"].to_numpy(),
        table["variant"].to_numpy(),
        _padded(table, _values(table, "positions"), max_positions, NO_POSITION),
        table["input_crc32"].to_numpy(),
    )


def predictions_of(
    table: pa.Table, max_positions: int, top_k: int, temperatures: list[float], sampled: bool = False
) -> dict[str, np.ndarray]:
    """The predictions in a target table.

    Args:
        sampled: the tokens are a sample. Their weights are scaled so that they sum to 1, as before rounding.

    Returns:
        ``topk_ids`` [N, K, k] int64, ``topk_logprobs`` [N, K, k] and ``temperature_lse_T`` [N, K] float32, in nats.
        Without a position, ids are 0 and the others NaN.

    Raises:
        ValueError: a column has another number of values than the positions need.
    """
    ids_Mk = _values(table, "topk_ids", top_k)
    logprobs_Mk = codes.decode(_values(table, "topk_logprobs", top_k))
    if sampled:
        logprobs_Mk -= np.log(np.exp(logprobs_Mk).sum(1, keepdims=True))
    lse = [parquet.temperature_column(temperature) for temperature in temperatures if temperature != 1]
    floats = {"topk_logprobs": logprobs_Mk} | {name: _values(table, name) for name in lse}
    columns = {name: _padded(table, values_M, max_positions, np.nan) for name, values_M in floats.items()}
    return {"topk_ids": _padded(table, ids_Mk, max_positions, 0), **columns}


def _values(table: pa.Table, name: str, width: int | None = None) -> np.ndarray:
    """A list column of all M positions, as an array [M] or [M, width]."""
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    positions = len(table["positions"].combine_chunks().flatten())
    if len(flat) != positions * (width or 1):
        raise ValueError(f"it has {len(flat)} {name} for {positions} positions")
    return flat.reshape(-1, width) if width else flat


def _padded(table: pa.Table, values_M: np.ndarray, max_positions: int, fill: float) -> np.ndarray:
    """Values [M, …] of all positions as an array [N, K, …]."""
    counts_N = table["positions"].combine_chunks().value_lengths().to_numpy()
    if counts_N.max(initial=0) > max_positions:
        raise ValueError(f"it has {counts_N.max()} positions in a row, not at most {max_positions}")
    kept_NK = np.arange(max_positions) < counts_N[:, None]
    out = np.full((*kept_NK.shape, *values_M.shape[1:]), fill, np.float32 if values_M.dtype.kind == "f" else np.int64)
    out[kept_NK] = values_M
    return out


def counts(rows: MaskedRows) -> dict[str, float]:
    """The counts in the record of a target shard."""
    scored = int((rows.positions_NK != NO_POSITION).sum())
    return {"rows": len(rows.variant_N), "tokens": 0, "scored_tokens": scored, "entropy_sum": 0.0}


def row_groups(table: pa.Table, rows: MaskedRows) -> list[pa.Table]:
    """A table cut into the row groups of its file, at each change of the variant or the block."""
    row_numbers = (rows.sequence_id_N & np.uint64(0xFFFFFFFF)).astype(np.int64)
    cuts = [*np.flatnonzero(row_numbers % ROW_GROUP == 0).tolist(), len(table)]
    return [table.slice(a, b - a) for a, b in pairwise(cuts)] or [table]
