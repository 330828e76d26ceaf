"""What a shard must be: pure checks, from bytes and tables to faults, each a phrase that follows the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import storage
from entropy_masking.shards import commit, manifests, masks, parquet
from entropy_masking.shards.manifests import Manifest, ShardEntry
from entropy_masking.shards.masks import NO_POSITION
from entropy_masking.shards.parquet import Scores, shard_file, temperature_column

PROBABILITY_SUM = 1.01  # float16 is good for a two-thousandth of a log-probability, and that of what it weighs
ABOVE_ZERO = 1e-3  # nats that float32 may leave of a logarithm that ought to be 0
RESCORED_NATS = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 5e-2}  # what other batches change
RESCORED_SHARE = {"float32": 0.0, "float16": 0.01, "bfloat16": 0.01}  # positions that they may change more


# --- the directory ---------------------------------------------------------------------------------------------------


def manifest_faults(manifest: Manifest) -> list[str]:
    """The manifest by itself: every planned shard accounted for once, names that fit, and hashes of what it says."""
    faults = [f"lacks {shard_file(index)}" for index in manifests.missing_shards(manifest)]
    indices = [entry.index for entry in manifest.shards]
    if indices != sorted(set(indices)) or any(index >= manifest.planned_shards for index in indices):
        faults.append(f"its shards are not each once and in order among {manifest.planned_shards}")
    faults += [
        f"calls shard {entry.index} {entry.file}" for entry in manifest.shards if entry.file != shard_file(entry.index)
    ]
    if storage.sha256_json(manifest.fingerprint) != manifest.fingerprint_hash:
        faults.append("its fingerprint does not have the hash that stands beside it")
    if manifest.kind == "sequences" and manifests.sequences_hash(manifest.fingerprint) != manifest.sequences_hash:
        faults.append("its sequences_hash is not that of its fingerprint")
    return faults


def totals_faults(manifest: Manifest, records: list[dict[str, Any]]) -> list[str]:
    """The manifest's sums against all records. Times are left out: a late writer may have done a shard again."""
    names = (
        "sequences",
        "tokens",
        "scored_tokens",
        "bytes",
        "entropy_sum",
        "documents",
        "rejected",
        "rejected_reasons",
    )
    try:
        expected = commit.totals(records)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"its records cannot be summed up ({error!r})"]
    differing = [name for name in names if manifest.totals.get(name) != expected[name]]
    return [f"its totals differ from the records' in {', '.join(differing)}"] if differing else []


# --- a file ----------------------------------------------------------------------------------------------------------


def file_faults(manifest: Manifest, entry: ShardEntry, data: bytes, deep: bool = False) -> list[str]:
    """A shard's bytes against its entry and the contract.

    Args:
        deep: look at the values too, a row group at a time.
    """
    faults = []
    if len(data) != entry.bytes:
        faults.append(f"has {len(data):,} bytes, not {entry.bytes:,}")
    elif storage.sha256_bytes(data) != entry.sha256:
        faults.append("is not the file that was committed (its SHA-256 is another)")
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            faults += layout_faults(manifest, entry, file)
            if deep and not faults:
                faults += value_faults(manifest, entry, file)
    except (pa.ArrowException, OSError) as error:
        faults = faults or [f"cannot be read as Parquet ({' '.join(str(error).split())[:200]})"]
    return faults


def layout_faults(manifest: Manifest, entry: ShardEntry, file: pq.ParquetFile) -> list[str]:
    """Columns, number of rows, sequence ids, variants, and row groups, which readers address by number."""
    if not file.schema_arrow.equals(expected := contract(manifest)):
        differing = [str(field.name) for field in {*expected} ^ {*file.schema_arrow}]
        return [f"has other columns than the contract ({', '.join(sorted(set(differing))) or 'in another order'})"]
    masked = manifest.kind != "sequences"
    table = file.read(["sequence_id", "variant"] if masked else ["sequence_id"])
    ids_N = table["sequence_id"].to_numpy()
    if foreign := sorted(set(np.unique(ids_N >> np.uint64(32)).tolist()) - {entry.index}):
        return [f"holds sequences of shard {foreign[0]}, not of {entry.index}"]
    if len(ids_N) != entry.rows:
        return [f"has {len(ids_N):,} rows, not {entry.rows:,}"]
    if not entry.rows:
        return []
    variants = variants_of(manifest, ids_N) if masked else 1
    if entry.rows % variants:
        return [f"has {entry.rows} rows, which are not {variants} variants of every sequence"]
    blocks = masks.blocks(entry.rows // variants, variants)
    faults = []
    rows_N = ids_N & np.uint64(0xFFFFFFFF)
    if (wrong_N := rows_N != np.concatenate([rows for rows, _ in blocks])).any():
        faults.append(f"its sequence ids are not contiguous (first at row {wrong_N.argmax()})")
    expected_N = np.concatenate([np.full(len(rows), variant) for rows, variant in blocks])
    if masked and (wrong_N := table["variant"].to_numpy() != expected_N).any():
        faults.append(f"its variants are not 0 … {variants - 1} of each block (first at row {wrong_N.argmax()})")
    groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    if groups != [len(rows) for rows, _ in blocks]:
        faults.append("its row groups are cut elsewhere than the contract says")
    return faults


def contract(manifest: Manifest) -> pa.Schema:
    """The schema of every shard of a directory."""
    if manifest.kind == "plan":
        return masks.plan_schema(manifest.vocab_size)
    if manifest.kind == "targets":
        return masks.targets_schema(manifest.vocab_size, manifest.temperatures)
    return parquet.schema(manifest.vocab_size, manifest.scored, manifest.top_k, manifest.temperatures)


def variants_of(manifest: Manifest, ids_N: np.ndarray) -> int:
    """R; an unfinished directory does not say it, so there it is what the first sequence has."""
    return int(manifest.masks["variants"]) if manifest.masks else int((ids_N == ids_N[0]).sum())


# --- values ----------------------------------------------------------------------------------------------------------


def value_faults(manifest: Manifest, entry: ShardEntry, file: pq.ParquetFile) -> list[str]:
    """Every value of a file, and the sums that its entry gives of them."""
    check = sequence_faults if manifest.kind == "sequences" else masked_faults
    faults: list[str] = []
    sums: dict[str, float] = {"tokens": 0, "scored_tokens": 0, "entropy_sum": 0.0, "rounding": 0.0}
    for group in range(file.num_row_groups if entry.rows else 0):
        found, part = check(manifest, file.read_row_group(group))
        faults += found
        sums = {name: value + part.get(name, 0) for name, value in sums.items()}
    if faults:
        return faults
    faults += [
        f"has {sums[name]:,} {name.replace('_', ' ')}, not {getattr(entry, name):,}"
        for name in ("tokens", "scored_tokens")
        if sums[name] != getattr(entry, name)
    ]
    if not abs(sums["entropy_sum"] - entry.entropy_sum) <= sums["rounding"] + 1e-6 * abs(entry.entropy_sum):
        faults.append(f"its entropies sum to {sums['entropy_sum']:.3f} nats, not {entry.entropy_sum:.3f}")
    return faults


Checked = tuple[list[str], dict[str, float]]


def sequence_faults(manifest: Manifest, table: pa.Table) -> Checked:
    """Faults of a table of sequences, and its sums; ``rounding`` is what float16 can change of ``entropy_sum``."""
    L, k = manifest.sequence_length, manifest.top_k
    widths = {name: L * k if name in parquet.TOP_K_COLUMNS else L for name in table.column_names[1:]}
    if wrong := [name for name, width in widths.items() if (list_lengths(table, name) != width).any()]:
        return [f"has {wrong[0]} of another length than {widths[wrong[0]]}"], {}
    sequence_id_N = table["sequence_id"].to_numpy()
    columns = {name: parquet.column_2d(table, name, width) for name, width in widths.items()}
    ids_NL = columns["input_ids"]
    faults = [*_where(ids_NL >= manifest.vocab_size, sequence_id_N, "has token ids outside the vocabulary")]
    sums: dict[str, float] = {"tokens": int((ids_NL != manifest.special_ids["pad"]).sum())}
    if not manifest.scored:
        return faults, sums
    scored_NL = ~np.isin(ids_NL, manifest.special_token_ids)
    for name in parquet.SCORE_COLUMNS:
        missing_NL = np.isnan(columns[name])
        faults += _where(missing_NL == scored_NL, sequence_id_N, f"has {name} at a special token, or none elsewhere")
    entropy_NL, surprisal_NL = columns["entropy"].astype(np.float32), columns["surprisal"]
    most = np.log(manifest.vocab_size)
    step = float(np.spacing(np.float16(most)))
    with np.errstate(invalid="ignore"):
        outside_NL = (entropy_NL < -ABOVE_ZERO) | (entropy_NL > most + step)
        faults += _where(outside_NL, sequence_id_N, f"has entropies outside 0 … {most:.2f} nats")
        faults += _where(surprisal_NL < -ABOVE_ZERO, sequence_id_N, "has surprisals below 0")
    if k:
        topk_ids_NLK, logprobs_NLK = (columns[name].reshape(-1, L, k) for name in parquet.TOP_K_COLUMNS)
        lse = {t: columns[temperature_column(t)] for t in manifest.temperatures if t != 1}
        faults += top_k_faults(manifest, sequence_id_N, scored_NL, topk_ids_NLK, logprobs_NLK, lse)
    entropy_M = columns["entropy"][scored_NL & ~np.isnan(columns["entropy"])]
    sums |= {
        "scored_tokens": len(entropy_M),
        "entropy_sum": float(entropy_M.sum(dtype=np.float64)),
        "rounding": float(np.spacing(np.abs(entropy_M)).sum(dtype=np.float64)) / 2,  # if all were rounded the same way
    }
    return faults, sums


def masked_faults(manifest: Manifest, table: pa.Table) -> Checked:
    """Faults of rows of a plan or of targets, and their ``scored_tokens``."""
    counts_N, sequence_id_N = list_lengths(table, "positions"), table["sequence_id"].to_numpy()
    lists = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
    widths = {name: manifest.top_k if name in parquet.TOP_K_COLUMNS else 1 for name in lists}
    if wrong := [n for n, width in widths.items() if (list_lengths(table, n) != width * counts_N).any()]:
        return [f"has {wrong[0]} of another length than its positions"], {}
    most = int(manifest.masks["positions"]) if manifest.masks else int(counts_N.max(initial=0))
    if counts_N.max(initial=0) > most:
        return [f"hides {counts_N.max()} positions of a sequence, more than {most}"], {}
    rows = masks.rows_of(table, most)
    kept_NK = rows.positions_NK != NO_POSITION
    faults = [*_where(rows.positions_NK >= manifest.sequence_length, sequence_id_N, "has positions past the end")]
    falling_NK = (np.diff(rows.positions_NK, axis=1) <= 0) & kept_NK[:, 1:]
    faults += _where(falling_NK, sequence_id_N, "has positions that do not ascend")
    if manifest.kind == "plan":
        faults += _where(rows.corrupted_NK >= manifest.vocab_size, sequence_id_N, "has ids outside the vocabulary")
    else:
        targets = masks.targets_of(table, most, manifest.top_k, manifest.temperatures)
        faults += top_k_faults(
            manifest,
            sequence_id_N,
            kept_NK,
            targets.topk_ids_NKT,
            targets.topk_logprobs_NKT,
            targets.temperature_lse_NK,
        )
    return faults, {"scored_tokens": int(kept_NK.sum())}


def top_k_faults(
    manifest: Manifest,
    sequence_id_N: np.ndarray,
    scored_NP: np.ndarray,
    ids_NPK: np.ndarray,
    logprobs_NPK: np.ndarray,
    lse: dict[float, np.ndarray],
) -> list[str]:
    """Faults of the k most probable tokens of N·P positions, and of what they need at other temperatures [N, P]."""
    scored_NP1 = scored_NP[..., None]
    logprobs_NPK = logprobs_NPK.astype(np.float32)
    sorted_NPK = np.sort(ids_NPK, axis=-1)
    with np.errstate(invalid="ignore"):
        found = {
            "has top-k ids outside the vocabulary": ids_NPK >= manifest.vocab_size,
            "has a top-k id twice at a position": (sorted_NPK[..., 1:] == sorted_NPK[..., :-1]) & scored_NP1,
            "has log-probabilities where nothing is scored, or none elsewhere": np.isnan(logprobs_NPK) == scored_NP1,
            "has log-probabilities above 0": logprobs_NPK > ABOVE_ZERO,
            "has log-probabilities that are not sorted": logprobs_NPK[..., :-1] < logprobs_NPK[..., 1:],
            "has probabilities that sum to more than 1": np.exp(logprobs_NPK).sum(-1) > PROBABILITY_SUM,
        }
    for temperature, lse_NP in lse.items():
        found[f"has {temperature_column(temperature)} that is not finite exactly where it is scored"] = (
            np.isfinite(lse_NP) != scored_NP
        )
    return [fault for text, bad in found.items() for fault in _where(bad, sequence_id_N, text)]


def list_lengths(table: pa.Table, name: str) -> np.ndarray:
    """Number of values in each row of a list column."""
    return table[name].combine_chunks().value_lengths().to_numpy()


def _where(bad: np.ndarray, sequence_id_N: np.ndarray, text: str) -> Iterator[str]:
    """One fault if any value of ``bad`` [N, …] is true; says in how many rows, and which sequence is the first."""
    bad_N = bad.reshape(len(bad), -1).any(1)
    if bad_N.any():
        yield f"{text} ({bad_N.sum()} rows, first sequence {sequence_id_N[bad_N.argmax()]})"


# --- scored again ----------------------------------------------------------------------------------------------------


def rescored_faults(stored: Scores, again: Scores, dtype: str) -> list[str]:
    """What a teacher says now against what is stored, of one sequence [1, L] or more.

    The batch has another shape than the first time, so a few positions in a hundred may lie further apart in half
    precision, and neighbours among the most probable tokens may have changed places.
    """
    nats, scored_NL = RESCORED_NATS[dtype], ~np.isnan(stored.entropy_NL)
    if not scored_NL.any():
        return []
    pairs = {
        "entropies": (stored.entropy_NL[scored_NL], again.entropy_NL[scored_NL], nats),
        "surprisals": (stored.surprisal_NL[scored_NL], again.surprisal_NL[scored_NL], 2 * nats),
        # in order of size: neighbours that changed places differ by little
        "log-probabilities": (stored.topk_logprobs_NLK[scored_NL], again.topk_logprobs_NLK[scored_NL], 2 * nats),
    }
    faults = []
    for name, (stored_M, again_M, most) in pairs.items():
        apart_M = np.abs(stored_M.astype(np.float32) - again_M)
        step_M = np.spacing(np.abs(stored_M.astype(np.float16))).astype(np.float32)
        if apart_M.size and not (apart_M <= most + step_M).mean() >= 1 - RESCORED_SHARE[dtype]:
            faults.append(f"has {name} up to {apart_M.max():.3f} nats from what the teacher says")
    if stored.topk_ids_NLK.shape[-1]:
        first_M = stored.topk_ids_NLK[scored_NL][:, 0]
        ids_MK, logprobs_MK = again.topk_ids_NLK[scored_NL], again.topk_logprobs_NLK[scored_NL]
        near_MK = logprobs_MK >= logprobs_MK[:, :1] - 2 * nats
        same_M = ((ids_MK == first_M[:, None]) & near_MK).any(1)
        if not same_M.mean() >= 1 - RESCORED_SHARE[dtype]:
            faults.append(f"names another most probable token than the teacher at {(~same_M).sum()} positions")
    return faults
