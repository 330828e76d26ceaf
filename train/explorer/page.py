"""The page of train/explore.py: its figures, and the colours of its text. Its sentences are in page.html."""

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from entropy_masking.commands import figures, pages
from entropy_masking.masking.policy import MaskPolicy
from train.explorer import statistics
from train.explorer.sample import Source, Token
from train.outline import mask_words

HERE = Path(__file__).parent
BIN = 0.25  # nats, of a distribution


def render(
    sources: list[Source], mask: MaskPolicy, summary: dict[str, dict[str, str]], texts: list[list[Token]]
) -> str:
    """The page of one source, or of two with frames of the same positions. ``texts`` are sequences to show."""
    frames = [source.frame for source in sources]
    spreads = [statistics.spread(frame, "entropy") for frame in frames]
    low, high = min(spread["low"] for spread in spreads), max(spread["high"] for spread in spreads)
    high = max(high, low + 0.5)
    names, vocab_size = [source.name for source in sources], sources[0].manifest.vocab_size
    return pages.render(
        HERE / "page.html",
        (HERE / "page.js").read_text(encoding="utf-8"),
        names=names,
        vocab_size=vocab_size,
        log_vocab_size=math.log(vocab_size),
        summary=summary,
        mask=mask_words(mask),
        texts=texts,
        data={"sources": names, "tokens": [asdict(token) for text in texts for token in text]},
        low=low,
        high=high,
        look=partial(look, low=low, high=high),
        distribution=by_measure(distribution, sources),
        frequency=by_measure(frequency, sources),
    )


def look(token: Token, low: float, high: float) -> tuple[str, str]:
    """CSS classes and style of a token: its place on the colour scale (0 to 1) by source, and of the difference."""
    classes, style = ["t"], []
    for view, entropy, seen in zip("ab", token.entropy, token.seen, strict=False):
        if entropy is not None:
            style.append(f"--{view}:{min(1.0, max(0.0, (entropy - low) / (high - low))):.2f}")
        if seen is not None:
            classes.append(f"m{view}")
    first, second = token.entropy if len(token.entropy) > 1 else (None, None)
    if first is not None and second is not None:
        style.append(f"--d:{min(1.0, 2 * abs(second - first) / (high - low)):.2f}")
        classes += ["less"] if second < first else []
    return " ".join(classes), ";".join(style)


def by_measure(draw: Callable[[list[Source], str], Figure], sources: list[Source]) -> dict[str, Figure]:
    """A figure for each measure that a source has."""
    known = [name for name in statistics.MEASURES if any(source.frame[name].count() for source in sources)]
    return {measure: draw(sources, measure) for measure in known}


def distribution(sources: list[Source], measure: str) -> Figure:
    bins = round(math.log(sources[0].manifest.vocab_size) / BIN) + 1
    shares = {source.name: statistics.histogram(source.frame, measure, BIN, bins) for source in sources}
    return figures.histogram([BIN * edge for edge in range(bins + 1)], shares, "nats", "% of tokens")


def frequency(sources: list[Source], measure: str) -> Figure:
    means = [statistics.by_frequency(source.frame) for source in sources]
    groups = dict(max(means, key=len).select("label", "share").iter_rows())
    values = [dict(table.select("label", measure).iter_rows()) for table in means]
    series = {source.name: [own.get(name) for name in groups] for source, own in zip(sources, values, strict=True)}
    return figures.bars([f"{name} ({share:.0%})" for name, share in groups.items()], series, "mean, nats")
