"""What the entropies of tokens look like: frames of tokens → small tables. Pure polars functions; nats.

A *frame of tokens* has a row a position of N sequences of L tokens, in order: ``sequence`` (0 … N - 1), ``position``,
``token``, ``piece`` (of ``PIECES``, null where the tokenizer does not say), ``entropy`` and ``surprisal`` (float32,
null where not scored) and ``masked``. Frames of the same sequences, one a source of entropies, have the same rows.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl

MEASURES = ("entropy", "surprisal")
PIECES = ("whole word", "first piece", "continuation")  # of a word of one token, or of several
RANKS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)  # the last rank by frequency of each group but one
THIRDS = ("first third", "second", "last")
MOST_POSITIONS = 64  # points of a curve over positions


def tokens(
    ids_NL: np.ndarray,
    scores: dict[str, np.ndarray],
    masked_NL: np.ndarray,
    continues_V: np.ndarray | None,
    apart_V: np.ndarray | None,
    first: int = 0,
) -> pl.DataFrame:
    """A frame of tokens.

    Args:
        scores: by measure [N, L], any float; NaN where not scored.
        masked_NL: bool.
        continues_V: bool, the tokens that continue a word (``masking.words``); None where that is not known.
        apart_V: bool, the tokens that are no part of a word, so none goes on with them or after them; None likewise.
        first: number of the first sequence.
    """
    N, L = ids_NL.shape
    pieces = np.full(ids_NL.shape, -1)
    if continues_V is not None and apart_V is not None:
        apart_NL = apart_V[ids_NL]
        behind_NL = np.pad(apart_NL[:, :-1], ((0, 0), (1, 0)))
        continues_NL = continues_V[ids_NL] & ~apart_NL & ~behind_NL
        followed_NL = np.pad(continues_NL[:, 1:], ((0, 0), (0, 1)))
        pieces = np.where(continues_NL, 2, np.where(followed_NL, 1, 0))
    names = np.array([*PIECES, None], dtype=object)
    return pl.DataFrame(
        {
            "sequence": np.repeat(np.arange(first, first + N, dtype=np.uint32), L),
            "position": np.tile(np.arange(L, dtype=np.uint32), N),
            "token": ids_NL.ravel().astype(np.uint32),
            "piece": pl.Series(names[pieces.ravel()].tolist(), dtype=pl.Enum(PIECES)),
            **{name: pl.Series(scores[name].ravel().astype(np.float32)).fill_nan(None) for name in MEASURES},
            "masked": masked_NL.ravel(),
        }
    )


def spread(frame: pl.DataFrame, measure: str) -> dict[str, float]:
    """``mean`` and ``median`` of a column, and what a tenth of it is below (``low``) and above; empty without any."""
    column = frame[measure].drop_nulls()
    if not len(column):
        return {}
    low, median, high = (float(column.quantile(q, "linear") or 0) for q in (0.1, 0.5, 0.9))
    return {"mean": float(column.to_numpy().mean(dtype=np.float64)), "low": low, "median": median, "high": high}


def histogram(frame: pl.DataFrame, measure: str, width: float, bins: int) -> pl.DataFrame:
    """``bin`` (from 0, of ``width`` nats; the last takes all above) and ``share`` of the scored tokens in it."""
    number = (pl.col(measure) / width).floor().clip(0, bins - 1).cast(pl.UInt32)
    counts = frame.drop_nulls(measure).group_by(number.alias("bin")).len()
    every = pl.DataFrame({"bin": pl.Series(range(bins), dtype=pl.UInt32)})
    share = pl.col("len").fill_null(0) / max(1, counts["len"].sum())
    return every.join(counts, on="bin", how="left").sort("bin").select("bin", share=share)


def means(frame: pl.DataFrame, by: str | pl.Expr) -> pl.DataFrame:
    """``count``, ``share``, mean ``entropy`` and mean ``surprisal`` of the scored tokens by a column, sorted by it."""
    scored = frame.drop_nulls("entropy")
    averages = [pl.col(name).cast(pl.Float64).mean() for name in MEASURES]
    found = scored.group_by(by).agg(pl.len().alias("count"), *averages)
    found = found.with_columns(share=pl.col("count") / max(1, len(scored)))
    return found.drop_nulls(found.columns[0]).sort(found.columns[0])


def by_position(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` by ``position``, neighbours together where a sequence has more than ``MOST_POSITIONS``."""
    length = 1 + int(frame["position"].max() or 0)  # type: ignore[arg-type]
    step = -(-length // MOST_POSITIONS)
    return means(frame, (pl.col("position") // step * step).alias("position"))


def by_third(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` by third of the sequence, with a ``label``."""
    length = 1 + int(frame["position"].max() or 0)  # type: ignore[arg-type]
    third = (pl.col("position") * 3 // length).replace_strict(dict(enumerate(THIRDS)), return_dtype=pl.Enum(THIRDS))
    return means(frame, third.alias("label"))


def by_piece(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` by ``label``, of ``PIECES``; empty where the tokenizer does not say."""
    return means(frame, pl.col("piece").alias("label"))


def by_mask(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` of what is masked and what is left, with a ``label``."""
    kind = pl.when("masked").then(pl.lit("masked")).otherwise(pl.lit("left"))
    return means(frame, kind.cast(pl.Enum(["masked", "left"])).alias("label"))


def by_frequency(frame: pl.DataFrame) -> pl.DataFrame:
    """``means`` by group of ranks (``RANKS``), 1 being the token that stands here most often, with a ``label``."""
    scored = frame.drop_nulls("entropy")
    ranks = scored.group_by("token").len().sort("len", "token", descending=[True, False]).with_row_index("rank", 1)
    names = [f"{low + 1:,}–{high:,}" for low, high in pairwise((0, *RANKS))] + [f"over {RANKS[-1]:,}"]
    above = pl.sum_horizontal([pl.col("rank") > last for last in RANKS])
    group = above.replace_strict(range(len(names)), names, return_dtype=pl.Enum(names))
    return means(scored.join(ranks.select("token", label=group), on="token"), "label")


def by_token(frame: pl.DataFrame, least: int) -> pl.DataFrame:
    """``means`` of tokens that stand there at least so often, the most uncertain first."""
    found = means(frame, "token").filter(pl.col("count") >= least)
    return found.sort("entropy", "token", descending=[True, False])


def often_enough(frame: pl.DataFrame) -> int:
    """How often a token must stand there for its mean to say something: 10 times, or once in 20,000 tokens."""
    return max(10, len(frame) // 20_000)


# --- two sources -----------------------------------------------------------------------------------------------------


def side_by_side(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    """The positions that both have scored: ``sequence``, ``token``, and ``first``, ``second`` (entropies)."""
    columns = first.select("sequence", "token", pl.col("entropy").alias("first"))
    return columns.with_columns(second["entropy"].alias("second")).drop_nulls()


def agreement(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    """By ``sequence``: Spearman's ``correlation`` of the entropies, null where there is none, and mask ``overlap``.

    The overlap is the share of what the first masks that the second masks too.
    """
    correlation = pl.corr("first", "second", method="spearman").fill_nan(None)
    ranks = side_by_side(first, second).group_by("sequence").agg(correlation=correlation)
    masks = first.select("sequence", "masked", pl.Series("other", second["masked"])).group_by("sequence")
    overlap = (pl.col("masked") & pl.col("other")).sum() / pl.col("masked").sum()
    return masks.agg(overlap=overlap.fill_nan(None)).join(ranks, on="sequence", how="left").sort("sequence")


def movements(first: pl.DataFrame, second: pl.DataFrame, least: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tokens that stand there at least so often whose mean entropy rises from first to second, those that rise most
    first; and those whose entropy falls likewise.
    """
    both = side_by_side(first, second).group_by("token")
    found = both.agg(pl.len().alias("count"), pl.col("first", "second").cast(pl.Float64).mean())
    found = found.filter(pl.col("count") >= least).with_columns(rise=pl.col("second") - pl.col("first"))
    found = found.sort("rise", "token", descending=[True, False])
    return found.filter(pl.col("rise") > 0), found.filter(pl.col("rise") < 0).reverse()


def joint(first: pl.DataFrame, second: pl.DataFrame, width: float, bins: int) -> pl.DataFrame:
    """``x``, ``y`` (bins of both entropies, as in ``histogram``) and ``share`` of the tokens in each cell."""
    cell = [
        (pl.col(name) / width).floor().clip(0, bins - 1).cast(pl.UInt32).alias(axis)
        for axis, name in (("x", "first"), ("y", "second"))
    ]
    found = side_by_side(first, second).group_by(cell).len()
    return found.select("x", "y", share=pl.col("len") / max(1, found["len"].sum())).sort("x", "y")
