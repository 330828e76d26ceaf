"""The summary of train/explore.py as text: the sources, the masks, and the agreement of two sources."""

from collections.abc import Callable

import polars as pl

from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards.spread import spread_words
from train.explorer import statistics
from train.explorer.sample import Source
from train.outline import mask_words

MAX_TOKENS = 8
Label = Callable[[int], tuple[str, str]]  # token → its text and its label


def summarise(sources: list[Source], mask: MaskPolicy, label: Label) -> dict[str, dict[str, str]]:
    """Lines of text by title and name. Each source has a title, and so has the comparison of two sources."""
    summary = {f"{source.manifest.uri}: {describe(source)}": of_source(source, mask, label) for source in sources}
    if len(sources) > 1:
        first, second = (source.frame for source in sources)
        summary[f"{sources[0].name} → {sources[1].name}"] = {"agreement": agreement_words(first, second)}
    return {title: {name: text for name, text in lines.items() if text} for title, lines in summary.items()}


def of_source(source: Source, mask: MaskPolicy, label: Label) -> dict[str, str]:
    frame, lines = source.frame, {}
    for measure in statistics.MEASURES:
        if numbers := statistics.spread(frame, measure):
            lines[measure] = (
                f"mean {numbers['mean']:.2f} nats, median {numbers['median']:.2f}, "
                f"{spread_words(numbers['low'], numbers['high'], measure)}"
            )
    by_token = statistics.by_token(frame)
    return lines | {
        "by frequency": mean_words(statistics.by_frequency(frame)),
        "uncertain": token_words(by_token, label),
        "certain": token_words(by_token.reverse(), label),
        "by mask": f"{mean_words(statistics.by_mask(frame))} ({mask_words(mask)})",
    }


def mean_words(means: pl.DataFrame) -> str:
    return ", ".join(f"{name} {entropy:.2f}" for name, entropy in means.select("label", "entropy").iter_rows())


def token_words(tokens: pl.DataFrame, label: Label) -> str:
    rows = tokens.select("label", "entropy").head(MAX_TOKENS).iter_rows()
    return ", ".join(f"{label(token)[1]} {value:.2f}" for token, value in rows)


def describe(source: Source) -> str:
    """The teacher, its context, and the size of the sample."""
    manifest, frame = source.manifest, source.frame
    sampled, total = frame["sequence"].n_unique(), sum(entry.rows for entry in manifest.shards)
    return (
        f"entropies by {manifest.teacher}, context {manifest.context}; {sampled:,} of {total:,} sequences of "
        f"{manifest.sequence_length} tokens, {frame['entropy'].count():,} scored"
    )


def agreement_words(first: pl.DataFrame, second: pl.DataFrame) -> str:
    """The agreement of two sources: ranks within a sequence, and masks."""
    agreement, words = statistics.agreement(first, second), []
    if rho := statistics.spread(agreement, "correlation"):
        words.append(
            f"rank correlation within a sequence {rho['mean']:.2f} (below {rho['low']:.2f} in a tenth of them)"
        )
    if overlap := statistics.spread(agreement, "overlap"):
        by_chance = second["masked"].sum() / max(1, second["entropy"].count())
        words.append(
            f"the second masks {overlap['mean']:.0%} of the tokens that the first masks ({by_chance:.0%} by chance)"
        )
    return "; ".join(words)
