"""What train/explore.py says in words: the sources, the masks, how far two sources agree; and the summary it prints."""

from __future__ import annotations

import polars as pl

from entropy_masking.masking.policy import MaskPolicy
from train import uncertainty
from train.sample import Label, Source

BLOCKS = "▁▂▃▄▅▆▇█"
CONTEXTS = {
    "masked": "each position was hidden when the model was asked about it",
    "full": "nothing was hidden, so the model saw the tokens that it was asked about and is surer than it would be",
}


def print_summary(sources: list[Source], mask: MaskPolicy, label: Label) -> None:
    for source in sources:
        frame = source.frame
        print(f"{source.manifest.uri}: {describe(source)}")
        for measure in uncertainty.MEASURES:
            if found := uncertainty.spread(frame, measure):
                shares = uncertainty.histogram(frame, measure, 0.5, 20)["share"].to_list()
                print(
                    f"  {measure:12} mean {found['mean']:.2f} nats, median {found['median']:.2f}, 80 % between "
                    f"{found['low']:.2f} and {found['high']:.2f}   0 {sparkline(shares)} 10"
                )
        print_means("by frequency", uncertainty.by_frequency(frame))
        print_means("by position", uncertainty.by_third(frame))
        print_means("by piece", uncertainty.by_piece(frame))
        found_tokens = uncertainty.by_token(frame, uncertainty.often_enough(frame))
        print_tokens("uncertain", found_tokens.head(8), "entropy", label)
        print_tokens("certain", found_tokens.reverse().head(8), "entropy", label)
        print_means("by mask", uncertainty.by_mask(frame), f" ({mask_words(mask)})")
    if len(sources) > 1:
        first, second = (source.frame for source in sources)
        print(f"{sources[0].name} → {sources[1].name}")
        print(f"  {agreement_words(first, second)}")
        rose, fell = uncertainty.movements(first, second, uncertainty.often_enough(first))
        print_tokens("rose most", rose.head(8), "rise", label)
        print_tokens("fell most", fell.head(8), "rise", label)


def print_means(title: str, found: pl.DataFrame, note: str = "") -> None:
    if len(found):
        cells = [f"{row['label']} {row['entropy']:.2f}" for row in found.iter_rows(named=True)]
        print(f"  {title:12} {', '.join(cells)}{note}")


def print_tokens(title: str, found: pl.DataFrame, column: str, label: Label) -> None:
    if len(found):
        cells = [f"{label(row['token'])[1]} {row[column]:.2f}" for row in found.iter_rows(named=True)]
        print(f"  {title:12} {', '.join(cells)}")


def sparkline(shares: list[float]) -> str:
    most = max(shares) or 1.0
    return "".join(BLOCKS[min(7, int(8 * share / most))] for share in shares)


def describe(source: Source) -> str:
    """What was scored, by whom, and how much of it was looked at."""
    manifest, frame = source.manifest, source.frame
    looked, total = frame["sequence"].n_unique(), sum(entry.rows for entry in manifest.shards)
    scored = len(frame) - frame["entropy"].null_count()
    context = f"{manifest.context} ({CONTEXTS.get(str(manifest.context), 'unknown')})"
    return (
        f"entropies by {manifest.teacher}, context {context}; {looked:,} of {total:,} sequences of "
        f"{manifest.sequence_length} tokens, {scored:,} scored"
    )


def mask_words(mask: MaskPolicy) -> str:
    """Which tokens a policy hides, in words."""
    share = f"{mask.ratio:.0%} of a sequence's {'tokens, whole words' if mask.unit == 'word' else 'tokens'}"
    if mask.uniform:
        return f"{share}, any"
    chosen = f"sampled by {mask.by} at τ = {mask.temperature:g}" if mask.temperature else f"those of highest {mask.by}"
    return f"{share}, {chosen}" + (f", {1 - mask.hard_share:.0%} of them at random" if mask.hard_share < 1 else "")


def agreement_words(first: pl.DataFrame, second: pl.DataFrame) -> str:
    """How far two sources agree: ranks within a sequence, and masks."""
    found = uncertainty.agreement(first, second)
    words = []
    if rho := uncertainty.spread(found, "correlation"):
        words.append(
            f"rank correlation within a sequence {rho['mean']:.2f} (below {rho['low']:.2f} in a tenth of them)"
        )
    if overlap := uncertainty.spread(found, "overlap"):
        by_chance = second["masked"].sum() / max(1, len(second) - second["entropy"].null_count())
        words.append(
            f"of what the first masks {overlap['mean']:.0%} is masked by the second too ({by_chance:.0%} by chance)"
        )
    return "; ".join(words)
