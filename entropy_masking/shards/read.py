"""Rows of shards and of targets as arrays and tensors.

Shapes: N rows, L tokens, K masked positions, k tokens that a teacher names.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.words import continuing_tokens
from entropy_masking.shards.manifests import read_table, shard_tokenizer
from entropy_masking.shards.parquet import ROW_GROUP, SCORE_COLUMNS, TOP_K_COLUMNS, column_2d, temperature_column
from entropy_masking.shards.schema import Manifest, ShardEntry
from entropy_masking.shards.targets import predictions_of, rows_of

Rows = dict[str, np.ndarray]


def read_rows(
    manifest: Manifest, entry: ShardEntry, columns: Sequence[str], row_groups: list[int] | None = None
) -> Rows:
    """Rows of a shard: sequence_id [N], input_ids [N, L], and ``columns``: scores [N, L], topk_* [N, L, k].

    A column ``temperature_lse_T`` becomes ``temperature_lse``. Raises RunError if the file cannot be read.
    """
    length, k = manifest.sequence_length, manifest.top_k
    with _matching(manifest, entry):
        table = read_table(manifest, entry, ["sequence_id", "input_ids", *columns], row_groups)
        rows: Rows = {"sequence_id": table["sequence_id"].to_numpy()}
        for name in ("input_ids", *columns):
            own = "temperature_lse" if name.startswith("temperature_lse_") else name
            shape = (len(table), length, k) if name in TOP_K_COLUMNS else (len(table), length)
            rows[own] = column_2d(table, name, math.prod(shape[1:])).reshape(shape)
        _check_ids(manifest, *(rows[name] for name in ("input_ids", "topk_ids") if name in rows))
    return rows


@contextmanager
def _matching(manifest: Manifest, entry: ShardEntry) -> Iterator[None]:
    """Raises RunError for a file that cannot be read, or whose columns or values do not match its manifest."""
    uri, fix = manifest.shard_uri(entry), "run pipeline/verify.py --deep to see why"
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"cannot read {uri} ({one_line(error)}); {fix}") from None
    except (ValueError, LookupError) as error:
        raise RunError(f"{uri} does not match its manifest ({one_line(error)}); {fix}") from None


def _check_ids(manifest: Manifest, *ids: np.ndarray) -> None:
    """Raises ValueError for a token outside the vocabulary, at which a model would fail or crash."""
    if (greatest := max((int(array.max()) for array in ids if array.size), default=0)) >= manifest.vocab_size:
        raise ValueError(f"it has the token id {greatest}, but the vocabulary has {manifest.vocab_size} tokens")


def read_block(manifest: Manifest, entry: ShardEntry, columns: Sequence[str], block: int) -> Rows:
    """One row group of a shard.

    Raises RunError if it cannot be read or does not match the manifest, since files may change during a run.
    """
    rows = read_rows(manifest, entry, columns, [block])
    expected = np.arange(block * ROW_GROUP, min(entry.rows, (block + 1) * ROW_GROUP), dtype=np.uint64)
    if not np.array_equal(rows["sequence_id"], (entry.index << 32) + expected):
        raise RunError(f"{manifest.shard_uri(entry)} does not match its manifest; run pipeline/verify.py to see why")
    return rows


def read_targets(targets: Manifest, entry: ShardEntry, sequences: Rows, block: int, variant: int, T: float) -> Rows:
    """The predictions of a teacher for one variant of one row group of sequences.

    Args:
        targets: manifest of a target directory; ``entry`` is one of its shards.
        sequences: the rows of the row group ``block``.
        T: temperature of the top k.

    Returns:
        target_positions [N, K] (``NO_POSITION`` where a row masks fewer), input_crc32 [N], teacher_ids and
        teacher_logprobs [N, K, k], and with T ≠ 1 temperature_lse [N, K].

    Raises:
        RunError: the file cannot be read, or holds different rows.
    """
    assert targets.masks
    K, lse = targets.masks["positions"], [T] if T != 1 else []
    columns = ["sequence_id", "variant", "positions", *TOP_K_COLUMNS, *map(temperature_column, lse), "input_crc32"]
    with _matching(targets, entry):
        # the variants of a row group of sequences are row groups that follow each other
        table = read_table(targets, entry, columns, [block * targets.masks["variants"] + variant])
        rows, predictions = rows_of(table, K), predictions_of(table, K, targets.top_k, lse, targets.sampled)
        _check_ids(targets, predictions["topk_ids"])
    if not np.array_equal(rows.sequence_id_N, sequences["sequence_id"]) or (rows.variant_N != variant).any():
        raise RunError(f"{targets.shard_uri(entry)} does not match its sequences; make it again")
    joined = {
        "target_positions": rows.positions_NK,
        "input_crc32": rows.crc32_N,
        "teacher_ids": predictions["topk_ids"],
        "teacher_logprobs": predictions["topk_logprobs"],
    }
    return joined if T == 1 else joined | {"temperature_lse": predictions[temperature_column(T)]}


def to_tensors(rows: Rows) -> dict[str, Tensor]:
    """Rows as tensors: integers as int64, floats as float32.

    The top k keep their stored types: they are k times as large as other columns, and only a few of them are used.
    """
    wide = {name: array for name, array in rows.items() if name not in TOP_K_COLUMNS}
    tensors = {
        name: torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float32))
        for name, array in wide.items()
    }
    return tensors | {
        name: torch.from_numpy(np.require(rows[name], requirements="W")) for name in TOP_K_COLUMNS if name in rows
    }


def masker_of(manifest: Manifest, unit: str = "token") -> Masker:
    """The masker of a directory's sequences, by tokens or by words.

    Raises UsageError if the unit is the word, and the tokenizer does not mark the tokens that continue a word.
    """
    continues_V = None
    if unit == "word":
        try:
            continues_V = continuing_tokens(shard_tokenizer(manifest.uri), manifest.vocab_size)
        except ValueError as error:
            raise UsageError(f"--mask-unit word cannot be used with {manifest.uri}: {error}") from None
    return Masker(
        vocab_size=manifest.vocab_size,
        special_token_ids=manifest.special_token_ids,
        mask_id=manifest.special_ids["mask"],
        pad_id=manifest.special_ids["pad"],
        continues_V=continues_V,
    )


def columns_of(policy: MaskPolicy, source: str, top_k: bool = False, temperature: float = 1.0) -> list[str]:
    """The columns that a policy with scores from ``source`` needs, and those that distillation needs."""
    used = {"random" if policy.uniform else policy.by, "random" if policy.predicts_all else policy.predict_by}
    read = (used if source == "parquet" else set()) | ({"surprisal"} if "excess" in used else set())
    columns = [name for name in SCORE_COLUMNS if name in read]
    if top_k:
        columns += TOP_K_COLUMNS
        columns += [temperature_column(temperature)] * (temperature != 1)
    return columns
