"""Statistics of the entropies of tokens: frames of tokens → small tables. Pure polars functions; nats.

A *frame of tokens* has one row for each position of N sequences of L tokens, in order: ``sequence`` (0 … N - 1),
``position``, ``token``, ``part`` (of ``PARTS``, null if the tokenizer does not mark words), ``entropy`` and
``surprisal`` (float32, null where not scored) and ``masked``. Frames of the same sequences have the same rows.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl

MEASURES = ("entropy", "surprisal")
PARTS = ("whole word", "first token", "continuation")  # of words of one token, and of longer words
RANKS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)  # last rank by frequency of all groups but the last
THIRDS = ("first third", "second", "last")
MAX_POINTS = 64  # points of a curve over positions


def tokens(
    ids_NL: np.ndarray,
    scores: dict[str, np.ndarray],
    masked_NL: np.ndarray,
    continues_V: np.ndarray | None,
    non_word_V: np.ndarray | None,
) -> pl.DataFrame:
    """A frame of tokens.

    Args:
        scores: by measure [N, L], any float; NaN where not scored.
        masked_NL: bool.
        continues_V, non_word_V: bool, the tokens that continue a word, and those that belong to no word, which no token
            continues (``masking.words``); None if the tokenizer does not mark words.
    """
    N, L = ids_NL.shape
    frame = pl.DataFrame(
        {
            "sequence": np.repeat(np.arange(N, dtype=np.uint32), L),
            "position": np.tile(np.arange(L, dtype=np.uint32), N),
            "token": ids_NL.ravel().astype(np.uint32),
            **{name: pl.Series(scores[name].ravel().astype(np.float32)).fill_nan(None) for name in MEASURES},
            "masked": masked_NL.ravel(),
        }
    )
    part: pl.Expr | pl.Series = pl.lit(None)
    if continues_V is not None and non_word_V is not None:
        apart_NL = non_word_V[ids_NL]
        behind_apart_NL = np.pad(apart_NL[:, :-1], ((0, 0), (1, 0)))
        continues_NL = continues_V[ids_NL] & ~apart_NL & ~behind_apart_NL
        followed_NL = np.pad(continues_NL[:, 1:], ((0, 0), (0, 1)))
        part = pl.Series("part", np.array(PARTS)[np.where(continues_NL, 2, followed_NL).ravel()])
    return frame.with_columns(part=part).cast({"part": pl.Enum(PARTS)})


def spread(frame: pl.DataFrame, column: str) -> dict[str, float]:
    """``mean``, ``median``, first decile (``low``) and last decile (``high``) of a column; empty without values."""
    values = frame[column].drop_nulls().to_numpy().astype(np.float64)
    if not len(values):
        return {}
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return {"mean": float(values.mean()), "low": low, "median": median, "high": high}


def histogram(frame: pl.DataFrame, column: str, width: float, bins: int, start: float = 0.0) -> list[float]:
    """Shares of the values in bins of ``width``; the last bin has all higher values too. Empty without values."""
    values = frame[column].drop_nulls().to_numpy()
    bin_N = np.floor((values - start) / width).clip(0, bins - 1).astype(int)
    return (np.bincount(bin_N, minlength=bins) / len(values)).tolist() if len(values) else []


def means(frame: pl.DataFrame, by: pl.Expr) -> pl.DataFrame:
    """``count``, ``share`` and mean of each measure of the scored tokens by a ``label``, sorted by it."""
    scored = frame.drop_nulls("entropy")
    averages = pl.col(MEASURES).cast(pl.Float64).mean()
    groups = scored.group_by(by.alias("label")).agg(pl.len().alias("count"), averages)
    return groups.with_columns(share=pl.col("count") / max(1, len(scored))).drop_nulls("label").sort("label")


def by_position(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` by position, or by groups of neighbours where a sequence has more than ``MAX_POINTS``."""
    step = -(-frame["position"].n_unique() // MAX_POINTS)
    return means(frame, pl.col("position") // step * step)


def by_third(frame: pl.DataFrame) -> pl.DataFrame:
    third = pl.col("position") * 3 // frame["position"].n_unique()
    return means(frame, third.replace_strict(range(3), THIRDS, return_dtype=pl.Enum(THIRDS)))


def by_part(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` by part of a word; empty if the tokenizer does not mark words."""
    return means(frame, pl.col("part"))


def by_mask(frame: pl.DataFrame) -> pl.DataFrame:
    kind = pl.when("masked").then(pl.lit("masked")).otherwise(pl.lit("left"))
    return means(frame, kind.cast(pl.Enum(["masked", "left"])))


def by_frequency(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` by group of ranks (``RANKS``); the most frequent token of the frame has rank 1."""
    scored = frame.drop_nulls("entropy")
    counts = scored.group_by("token").len().sort("len", "token", descending=[True, False])
    names = [f"{low + 1:,}–{high:,}" for low, high in pairwise((0, *RANKS))] + [f"over {RANKS[-1]:,}"]
    above = pl.sum_horizontal([pl.col("rank") > last for last in RANKS])
    group = above.replace_strict(range(len(names)), names, return_dtype=pl.Enum(names))
    return means(scored.join(counts.with_row_index("rank", 1), on="token"), group)


def by_token(frame: pl.DataFrame, least: int) -> pl.DataFrame:
    """``means`` of the tokens that occur at least ``least`` times, the most uncertain first."""
    frequent = means(frame, pl.col("token")).filter(pl.col("count") >= least)
    return frequent.sort("entropy", "label", descending=[True, False])


def often_enough(frame: pl.DataFrame) -> int:
    """How often a token must occur for a reliable mean: 10 times, and once in 20,000 tokens."""
    return max(10, len(frame) // 20_000)


def side_by_side(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    """The positions that both frames have scored: ``sequence``, ``token``, and ``first``, ``second`` (entropies)."""
    columns = first.select("sequence", "token", pl.col("entropy").alias("first"))
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


def movements(first: pl.DataFrame, second: pl.DataFrame, least: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tokens (``label``) whose mean entropy rises from first to second, and tokens whose mean entropy falls.

    The largest changes come first. Only tokens that occur at least ``least`` times count.
    """
    both = side_by_side(first, second).group_by(pl.col("token").alias("label"))
    moved = both.agg(pl.len().alias("count"), pl.col("first", "second").cast(pl.Float64).mean())
    moved = moved.filter(pl.col("count") >= least).with_columns(rise=pl.col("second") - pl.col("first"))
    moved = moved.sort("rise", "label", descending=[True, False])
    return moved.filter(pl.col("rise") > 0), moved.filter(pl.col("rise") < 0).reverse()


def joint(first: pl.DataFrame, second: pl.DataFrame, width: float, bins: int) -> pl.DataFrame:
    """``first`` and ``second`` (bins of both entropies, as in ``histogram``) and the ``share`` of tokens in them."""
    both = side_by_side(first, second)
    bin_of = (pl.col("first", "second") / width).floor().clip(0, bins - 1).cast(pl.UInt32)
    counts = both.group_by(bin_of).len()
    return counts.select("first", "second", share=pl.col("len") / max(1, len(both))).sort("first", "second")
