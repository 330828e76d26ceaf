"""Statistics of the entropies of tokens: frames of tokens → small tables. Pure polars functions; nats.

A *frame of tokens* has one row for each position of N sequences of L tokens, in order: ``sequence`` (0 … N - 1),
``token``, ``entropy`` and ``surprisal`` (float32, null where not scored) and ``masked``. Frames of the same sequences
have the same rows.
"""

from itertools import pairwise

import numpy as np
import polars as pl

MEASURES = ("entropy", "surprisal")
RANKS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)  # last rank by frequency of all groups but the last


def tokens(ids_NL: np.ndarray, scores: dict[str, np.ndarray], masked_NL: np.ndarray) -> pl.DataFrame:
    """A frame of tokens. ``scores`` are any floats by measure [N, L], NaN where not scored; ``masked_NL`` is bool."""
    N, L = ids_NL.shape
    return pl.DataFrame(
        {
            "sequence": np.repeat(np.arange(N, dtype=np.uint32), L),
            "token": ids_NL.ravel().astype(np.uint32),
            **{name: pl.Series(scores[name].ravel().astype(np.float32)).fill_nan(None) for name in MEASURES},
            "masked": masked_NL.ravel(),
        }
    )


def spread(frame: pl.DataFrame, column: str) -> dict[str, float]:
    """``mean``, ``median``, first decile (``low``) and last decile (``high``) of a column; empty without values."""
    values = frame[column].drop_nulls().to_numpy().astype(np.float64)
    if not len(values):
        return {}
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return {"mean": float(values.mean()), "low": low, "median": median, "high": high}


def histogram(frame: pl.DataFrame, column: str, width: float, bins: int) -> list[float]:
    """Shares of the values in bins of ``width``; the last bin has all higher values too. Empty without values."""
    values = frame[column].drop_nulls().to_numpy()
    bin_N = np.floor(values / width).clip(0, bins - 1).astype(int)
    return (np.bincount(bin_N, minlength=bins) / len(values)).tolist() if len(values) else []


def means(frame: pl.DataFrame, by: pl.Expr) -> pl.DataFrame:
    """``count``, ``share`` and mean of each measure of the scored tokens by a ``label``, sorted by it."""
    scored = frame.drop_nulls("entropy")
    averages = pl.col(MEASURES).cast(pl.Float64).mean()
    groups = scored.group_by(by.alias("label")).agg(pl.len().alias("count"), averages)
    return groups.with_columns(share=pl.col("count") / max(1, len(scored))).drop_nulls("label").sort("label")


def by_mask(frame: pl.DataFrame) -> pl.DataFrame:
    kind = pl.when("masked").then(pl.lit("masked")).otherwise(pl.lit("unmasked"))
    return means(frame, kind.cast(pl.Enum(["masked", "unmasked"])))


def by_frequency(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` by group of ranks (``RANKS``); the most frequent token of the frame has rank 1."""
    scored = frame.drop_nulls("entropy")
    counts = scored.group_by("token").len().sort("len", "token", descending=[True, False])
    names = [f"{low + 1:,}–{high:,}" for low, high in pairwise((0, *RANKS))] + [f"over {RANKS[-1]:,}"]
    above = pl.sum_horizontal([pl.col("rank") > last for last in RANKS])
    group = above.replace_strict(range(len(names)), names, return_dtype=pl.Enum(names))
    return means(scored.join(counts.with_row_index("rank", 1), on="token"), group)


def by_token(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` of the tokens that are not rare (10 times, and once per 20,000 tokens), the most uncertain first."""
    frequent = means(frame, pl.col("token")).filter(pl.col("count") >= max(10, len(frame) // 20_000))
    return frequent.sort("entropy", "label", descending=[True, False])


def side_by_side(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    """The positions that both frames have scored: ``sequence``, and ``first``, ``second`` (entropies)."""
    columns = first.select("sequence", pl.col("entropy").alias("first"))
    return columns.with_columns(second["entropy"].alias("second")).drop_nulls()


def agreement(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    """By ``sequence``: Spearman's ``correlation`` of the entropies (null if undefined), and ``overlap`` of the masks.

    The overlap is the share of the first frame's masked positions that the second frame masks too.
    """
    correlation = pl.corr("first", "second", method="spearman").fill_nan(None)
    ranks = side_by_side(first, second).group_by("sequence").agg(correlation=correlation)
    masks = first.select("sequence", "masked", pl.Series("other", second["masked"])).group_by("sequence")
    overlap = (pl.col("masked") & pl.col("other")).sum() / pl.col("masked").sum()
    return masks.agg(overlap=overlap.fill_nan(None)).join(ranks, on="sequence", how="left").sort("sequence")
