"""The faults in the values of a shard. A fault is a phrase that follows the file's name.

Shapes: N rows, L tokens, K masked positions, k tokens that a teacher names; P stands for L or K.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import codes
from entropy_masking.shards import parquet
from entropy_masking.shards.parquet import SCORE_COLUMNS, TOP_K_COLUMNS, Scores
from entropy_masking.shards.schema import Manifest, ShardEntry
from entropy_masking.shards.targets import NO_POSITION, predictions_of, rows_of

HALF_STEP = float(np.finfo(np.float16).eps) / 2  # of float16, relative to a value
ABOVE_ZERO = 1e-3  # rounding may put a value of exactly 0 nats, or a sum of probabilities, this far beyond its end
RESCORED_NATS = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 5e-2}  # nats: the batch changes scores by less
RESCORED_SHARE = {"float32": 0.0, "float16": 0.01, "bfloat16": 0.01}  # share of positions with larger differences

PLURALS = {"entropy": "entropies", "surprisal": "surprisals", "topk_logprobs": "log-probabilities"}

BadValues = dict[str, np.ndarray]  # fault → where it occurs, bool [N, …]
Sums = dict[str, float]


def value_faults(manifest: Manifest, entry: ShardEntry, file: pq.ParquetFile) -> list[str]:
    """Faults of all values of a file, read by row group, and of the sums in its entry."""
    check = sequence_values if manifest.kind == "sequences" else target_values
    texts: list[str] = []
    sums = {"tokens": 0.0, "scored_tokens": 0.0, "entropy_sum": 0.0}
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        if wrong := length_faults(manifest, table):
            return texts + wrong
        with np.errstate(invalid="ignore"):
            bad, group_sums = check(manifest, table)
        for text, where in bad.items():
            bad_N = where.reshape(len(table), -1).any(1)
            if bad_N.any():
                first = table["sequence_id"][int(bad_N.argmax())]
                texts.append(f"{text} ({bad_N.sum()} rows, first sequence {first})")
        sums = {name: value + group_sums.get(name, 0) for name, value in sums.items()}
    if texts:
        return texts
    for name in ("tokens", "scored_tokens"):
        if sums[name] != getattr(entry, name):
            texts.append(f"has {sums[name]:,.0f} {name.replace('_', ' ')}, not {getattr(entry, name):,}")
    rounding = entry.entropy_sum * HALF_STEP  # if all entropies were rounded in the same direction
    if not abs(sums["entropy_sum"] - entry.entropy_sum) <= rounding + 1e-6 * entry.scored_tokens:
        texts.append(f"its entropies sum to {sums['entropy_sum']:.3f} nats, not {entry.entropy_sum:.3f}")
    return texts


def first_faults(manifest: Manifest, file: pq.ParquetFile) -> list[str]:
    """Faults of the lengths and the token ids of the first row group: a check that costs little."""
    names = ["positions"] if manifest.masks else ["input_ids"]
    table = file.read_row_group(0, columns=[*names, *(["topk_ids"] if manifest.top_k else [])])
    if texts := length_faults(manifest, table):
        return texts
    ids = [table[name].combine_chunks().flatten().to_numpy() for name in table.column_names if name != "positions"]
    beyond = any(len(values) and values.max() >= manifest.vocab_size for values in ids)
    return ["has token ids outside the vocabulary"] if beyond else []


def length_faults(manifest: Manifest, table: pa.Table) -> list[str]:
    """The fault of a list column that does not have one value (or k values) per position of a row."""
    masked = manifest.kind != "sequences"
    positions_N = list_lengths(table, "positions") if masked else manifest.sequence_length
    for field in table.schema:
        width = manifest.top_k if field.name in TOP_K_COLUMNS else 1
        if pa.types.is_list(field.type) and (list_lengths(table, field.name) != width * positions_N).any():
            return [f"has {field.name} of another length than {'its positions' if masked else width * positions_N}"]
    return []


def list_lengths(table: pa.Table, name: str) -> np.ndarray:
    """Number of values in each row of a list column [N]."""
    return table[name].combine_chunks().value_lengths().to_numpy()


def sequence_values(manifest: Manifest, table: pa.Table) -> tuple[BadValues, Sums]:
    """Bad values of a table of sequences, and its sums."""
    L, k, V = manifest.sequence_length, manifest.top_k, manifest.vocab_size
    columns = {n: parquet.column_2d(table, n, L * k if n in TOP_K_COLUMNS else L) for n in table.column_names[1:]}
    ids_NL = columns["input_ids"]
    bad = {"has token ids outside the vocabulary": ids_NL >= V}
    sums: Sums = {"tokens": int((ids_NL != manifest.special_ids["pad"]).sum())}
    if not manifest.scored:
        return bad, sums
    scored_NL = ~np.isin(ids_NL, manifest.special_token_ids)
    entropy_NL, surprisal_NL = columns["entropy"].astype(np.float32), columns["surprisal"]
    for name in SCORE_COLUMNS:
        bad[f"its {name} must be NaN exactly at special tokens"] = np.isnan(columns[name]) == scored_NL
    max_entropy = np.log(V) + float(np.spacing(np.float16(np.log(V))))
    bad[f"has entropies outside 0 … {np.log(V):.2f} nats"] = (entropy_NL < -ABOVE_ZERO) | (entropy_NL > max_entropy)
    bad["has surprisals below 0"] = surprisal_NL < -ABOVE_ZERO
    if k:
        columns |= {name: columns[name].reshape(-1, L, k) for name in TOP_K_COLUMNS}
        columns["topk_logprobs"] = codes.decode(columns["topk_logprobs"])
        bad |= top_k_values(V, scored_NL, columns)
    entropy_M = entropy_NL[~np.isnan(entropy_NL)]
    return bad, sums | {"scored_tokens": len(entropy_M), "entropy_sum": float(entropy_M.sum(dtype=np.float64))}


def target_values(manifest: Manifest, table: pa.Table) -> tuple[BadValues, Sums]:
    """Bad values of a table of targets, and its number of positions."""
    counts_N = list_lengths(table, "positions")
    K = int(counts_N.max())
    max_positions = int(manifest.masks["positions"]) if manifest.masks else K
    rows = rows_of(table, K)
    kept_NK = rows.positions_NK != NO_POSITION
    bad = {
        f"masks {K} positions of a sequence, more than {max_positions}": counts_N > max_positions,
        "has positions past the end": rows.positions_NK >= manifest.sequence_length,
        "has positions that do not ascend": (np.diff(rows.positions_NK, axis=1) <= 0) & kept_NK[:, 1:],
    }
    predictions = predictions_of(table, K, manifest.top_k, manifest.temperatures)
    bad |= top_k_values(manifest.vocab_size, kept_NK, predictions)
    if manifest.sampled:
        logprobs_NKk = predictions["topk_logprobs"]
        most_NK = np.exp(logprobs_NKk + codes.rounding(logprobs_NKk)).sum(-1)
        bad["has weights of sampled tokens that sum to less than 1"] = most_NK < 1 - ABOVE_ZERO
    return bad, {"scored_tokens": int(kept_NK.sum())}


def top_k_values(V: int, scored_NP: np.ndarray, columns: dict[str, np.ndarray]) -> BadValues:
    """Bad values of the top-k columns [N, P, k], and of those for other temperatures [N, P]."""
    ids_NPk, logprobs_NPk = columns["topk_ids"], columns["topk_logprobs"]
    least_NPk = np.exp(logprobs_NPk - codes.rounding(logprobs_NPk))  # the smallest that round to these
    scored_NP1 = scored_NP[..., None]
    sorted_NPk = np.sort(ids_NPk, axis=-1)
    bad = {
        "has top-k ids outside the vocabulary": ids_NPk >= V,
        "has a top-k id twice at a position": (sorted_NPk[..., 1:] == sorted_NPk[..., :-1]) & scored_NP1,
        "its log-probabilities must be NaN exactly where there is no score": np.isnan(logprobs_NPk) == scored_NP1,
        "has log-probabilities that are not sorted": logprobs_NPk[..., :-1] < logprobs_NPk[..., 1:],
        "has probabilities that sum to more than 1": least_NPk.sum(-1) > 1 + ABOVE_ZERO,
    }
    for name in filter(lambda name: name.startswith("temperature_lse_"), columns):
        bad[f"its {name} must be finite exactly at scored positions"] = np.isfinite(columns[name]) != scored_NP
    return bad


def rescored(stored: dict[str, np.ndarray], again: Scores, dtype: str) -> list[str]:
    """Differences between the stored and the new scores of one sequence: entropy, surprisal [L], topk_* [L, k].

    ``stored`` has ``topk_logprobs`` as in shards, ``again`` in nats. The batch has a different shape than the first
    time. So in half precision one value in a hundred may differ more, and neighbours among the most probable tokens may
    have changed places.
    """
    nats, share, scored_L = RESCORED_NATS[dtype], RESCORED_SHARE[dtype], ~np.isnan(stored["entropy"])
    if not scored_L.any():
        return []
    old = {name: stored[name][scored_L] for name in (*SCORE_COLUMNS, *TOP_K_COLUMNS) if name in stored}
    new = {name: again[name][0][scored_L] for name in old}
    tolerances = {name: nats + np.spacing(np.abs(old[name])).astype(np.float32) for name in SCORE_COLUMNS}
    tolerances["surprisal"] += nats
    if "topk_logprobs" in old:  # sorted by size, so neighbours that changed places differ little
        least = codes.LOGPROBS[codes.LEAST - 1]
        old["topk_logprobs"] = codes.decode(old["topk_logprobs"]).clip(min=least)
        new["topk_logprobs"] = new["topk_logprobs"].clip(min=least)
        tolerances["topk_logprobs"] = 2 * nats + codes.rounding(old["topk_logprobs"])
    texts = []
    for name, tolerance_M in tolerances.items():
        apart_M = np.abs(old[name].astype(np.float32) - new[name])
        if not (apart_M <= tolerance_M).mean() >= 1 - share:
            texts.append(f"has {PLURALS[name]} up to {apart_M.max():.3f} nats away from the teacher's")
    if "topk_ids" in old:
        near_Mk = new["topk_logprobs"] >= new["topk_logprobs"][:, :1] - 2 * nats
        same_M = ((new["topk_ids"] == old["topk_ids"][:, :1]) & near_Mk).any(1)
        if not same_M.mean() >= 1 - share:
            texts.append(f"has a different most probable token than the teacher at {(~same_M).sum()} positions")
    return texts
