"""The page of train/explore.py: one HTML file, no network, no library, dark and light. The frame of it is page.html."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import polars as pl

from entropy_masking.masking.policy import MaskPolicy
from train import charts, uncertainty
from train.sample import Label, Source, Token
from train.summary import agreement_words, describe, mask_words

HERE = Path(__file__).parent
ROWS = 15  # of a table of tokens
BIN = 0.25  # nats, of the distributions
CELL = 0.5  # nats, of the density of two sources


def render(sources: list[Source], mask: MaskPolicy, texts: list[list[Token]], label: Label) -> str:
    """The page.

    Args:
        sources: one, or two with frames of the same positions.
        mask: what the frames and texts were masked by.
        texts: sequences to show, tokens with scores and predictions a source.
    """
    names = [source.name for source in sources]
    title = " and ".join(f"Entropies of {name}" if not place else name for place, name in enumerate(names))
    parts = [
        f"<h1>{escape(title)}</h1>",
        facts(sources),
        text_section(sources, mask, texts),
        distribution_section(sources),
        frequency_section(sources),
        piece_section(sources),
        position_section(sources),
        token_section(sources, label),
    ]
    if len(sources) > 1:
        parts.append(difference_section(sources, label))
    script = (HERE / "page.js").read_text(encoding="utf-8")
    data = {"sources": names, "tokens": [as_data(token) for text in texts for token in text]}
    values = {
        "title": escape(title),
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "body": "\n".join(parts),
        "data": json.dumps(data).replace("<", "\\u003c"),  # or a token could end the element
        "script": script,
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(values[str(match[1])]), template)  # once: values may hold braces


# --- sections --------------------------------------------------------------------------------------------------------


def facts(sources: list[Source]) -> str:
    lines = [f"<p><b>{escape(source.name)}</b>: {escape(describe(source))}.</p>" for source in sources]
    rows = []
    for source in sources:
        for measure in uncertainty.MEASURES:
            if found := uncertainty.spread(source.frame, measure):
                values = [f"{found[name]:.2f}" for name in ("mean", "median", "low", "high")]
                rows.append([f"{source.name}, {measure}" if len(sources) > 1 else measure, *values])
    head = ["nats", "mean", "median", "10 %", "90 %"]
    read = (
        "Entropy says how unsure the prediction of a token is, before anybody looks at the token: 0 for certainty, "
        f"{_log_v(sources[0]):.1f} nats for a vocabulary of {sources[0].manifest.vocab_size:,} equally likely tokens. "
        "Surprisal, −log p, says how wrong it was about the token that stands there. A model that knows how unsure it "
        "is has the same mean of both; one that is too sure of itself has the higher surprisal. A tenth of "
        "the tokens lies below the value at 10 %, a tenth above that at 90 %."
    )
    return "".join(lines) + table(head, rows) + reading(read)


def text_section(sources: list[Source], mask: MaskPolicy, texts: list[list[Token]]) -> str:
    values = [score for source in sources if (score := uncertainty.spread(source.frame, "entropy"))]
    low, high = min(found["low"] for found in values), max(found["high"] for found in values)
    scale = low, max(high, low + 0.5)
    hidden = f'<span class="sample solid">Framed</span>: hidden in the first epoch ({escape(mask_words(mask))}).'
    lines = [
        f'<p class="only {view} read">{escape(source.name)}: entropy of {scale[0]:.1f} nats or less '
        f'<span class="scale"></span> {scale[1]:.1f} or more. {hidden}</p>'
        for view, source in zip("ab", sources, strict=False)
    ]
    views = ""
    if len(sources) > 1:
        first, second = (escape(source.name) for source in sources)
        reach = (scale[1] - scale[0]) / 2
        lines.append(
            f'<p class="only d read">{second} less {first}: −{reach:.1f}<span class="scale both"></span>'
            f'+{reach:.1f} nats. <span class="sample solid">Framed</span>: hidden by both; '
            f'<span class="sample dotted">dotted</span>: by {first} alone; '
            f'<span class="sample dashed">dashed</span>: by {second} alone ({escape(mask_words(mask))}).</p>'
        )
        options = [("a", first), ("b", second), ("d", "difference")]
        views = '<fieldset class="views">' + "".join(
            f'<label><input type="radio" name="view" value="{view}"{" checked" * (view == "a")}>{name}</label>'
            for view, name in options
        )
        views += "</fieldset>"
    number = 0
    for text in texts:
        spans = []
        for token in text:
            spans.append(("" if token.continues else " ") + span(token, number, scale))
            number += 1
        lines.append(f'<p class="text" tabindex="0">{"".join(spans).strip()}</p>')
    read = "Point at a token, or tap it, for what was predicted there; the arrow keys go on from it, Escape closes it."
    return f"<h2>In the text</h2>{reading(read)}{views}{''.join(lines)}"


def span(token: Token, number: int, scale: tuple[float, float]) -> str:
    """A token of the text: coloured by entropy, from none at the lower end of the scale to all at the upper."""
    if token.special:
        return f'<span class="x">{escape(token.text)}</span>'
    low, width = scale[0], scale[1] - scale[0]
    entropies, style, kinds = token.scores["entropy"], [], ["t"]
    for view, entropy, hidden in zip("ab", entropies, token.hidden, strict=False):
        style += [f"--{view}:{min(1.0, max(0.0, (entropy - low) / width)):.2f}"] if entropy is not None else []
        kinds += [f"m{view}"] if hidden is not None else []
    if len(entropies) > 1 and entropies[0] is not None and entropies[1] is not None:
        rise = entropies[1] - entropies[0]
        style.append(f"--d:{min(1.0, abs(rise) / (width / 2)):.2f}")
        kinds += ["less"] * (rise < 0)
    return f'<span class="{" ".join(kinds)}" data-i="{number}" style="{";".join(style)}">{escape(token.text)}</span>'


def as_data(token: Token) -> dict[str, object]:
    """What the card of a token shows."""
    hidden = [
        None
        if seen is None
        else "hidden, and left as it is"
        if seen == token.label
        else f"hidden: the student sees {seen}"
        for seen in token.hidden
    ]
    top = [[[label, round(p, 4)] for label, p in each[:10]] for each in token.top]
    return {"text": token.label, **token.scores, "hidden": hidden, "top": top}


def distribution_section(sources: list[Source]) -> str:
    bins = round((_log_v(sources[0]) + BIN) / BIN)

    def chart(measure: str) -> str:
        shares = {
            s.name: uncertainty.histogram(s.frame, measure, BIN, bins)["share"].to_list() if known(s, measure) else []
            for s in sources
        }
        return charts.histogram(BIN, shares, f"{measure}, nats")

    read = (
        "How many tokens have which value. On the left are those that the model is sure of; random masking spends its "
        "targets in these proportions. What is beyond the axis counts in the last bin."
    )
    return section("Distribution", read, sources, chart)


def frequency_section(sources: list[Source]) -> str:
    read = (
        "Tokens by how often they stand in this sample: on the left the most frequent ones, mostly function words and "
        "punctuation, on the right the rare ones. The share of all tokens that a group makes up comes with each bar."
    )
    return section(
        "By frequency",
        read,
        sources,
        lambda measure: bars(sources, measure, uncertainty.by_frequency, "rank by frequency, up to"),
    )


def piece_section(sources: list[Source]) -> str:
    if sources[0].frame["piece"].null_count() == len(sources[0].frame):
        return "<h2>By piece of a word</h2>" + reading("The tokens of this tokenizer do not say where words begin.")
    read = (
        "A word that is one token, the first piece of a longer one, and the pieces that go on with it. Long words are "
        "rarer, so their pieces are harder to tell; the more so, the fewer of them the model could see."
    )
    return section(
        "By piece of a word", read, sources, lambda measure: bars(sources, measure, uncertainty.by_piece, "piece")
    )


def position_section(sources: list[Source]) -> str:
    def chart(measure: str) -> str:
        found = [uncertainty.by_position(source.frame).select("position", measure) for source in sources]
        places = sorted(set().union(*(each["position"] for each in found)))
        series = {
            s.name: [dict(each.iter_rows()).get(p) for p in places] for s, each in zip(sources, found, strict=True)
        }
        return charts.curve(places, series, "position in the sequence", "nats")

    read = (
        "Tokens near the ends have context on one side only: there a model is less sure. Between, expect a flat line."
    )
    return section("By position", read, sources, chart)


def token_section(sources: list[Source], label: Label) -> str:
    parts = []
    for source in sources:
        found = uncertainty.by_token(source.frame, uncertainty.often_enough(source.frame))
        columns, whose = ["entropy", "surprisal"], f"{source.name}: " if len(sources) > 1 else ""
        sides = {f"{whose}most uncertain": found, f"{whose}least uncertain": found.reverse()}
        parts.append(token_tables(sides, columns, columns, label))
    read = (
        "Means over all places where a token stands, of tokens that stand here at least "
        f"{uncertainty.often_enough(sources[0].frame)} times. ## marks a piece that goes on with a word."
    )
    return f"<h2>Tokens</h2>{reading(read)}{''.join(parts)}"


def difference_section(sources: list[Source], label: Label) -> str:
    first, second = sources
    frames = first.frame, second.frame
    bins = round(_log_v(first) / CELL) + 1
    cells = uncertainty.joint(*frames, CELL, bins).rows()
    ranks = uncertainty.agreement(*frames).select(pl.col("correlation") + 1)
    shares = uncertainty.histogram(ranks, "correlation", 0.1, 20)["share"].to_list()
    drawn = [
        charts.density(CELL, bins, cells, f"entropy of {first.name}, nats", f"entropy of {second.name}, nats"),
        charts.histogram(0.1, {"sequences": shares}, "rank correlation within a sequence", -1.0, "% of sequences"),
    ]
    rose, fell = uncertainty.movements(*frames, uncertainty.often_enough(first.frame))
    head = [first.name, second.name, "rise"]
    tables = token_tables({"rose most": rose, "fell most": fell}, ["first", "second", "rise"], head, label)
    read = (
        "First, each token by both entropies: on the diagonal they agree. Then, whether both rank the tokens of a "
        "sequence alike (Spearman), which is what masks depend on: 1 is the same order, 0 none in common. "
        f"Here: {agreement_words(*frames)}."
    )
    title = f"{second.name} against {first.name}"
    return f'<h2>{escape(title)}</h2>{reading(read)}<div class="pair">{"".join(drawn)}</div>{tables}'


# --- elements --------------------------------------------------------------------------------------------------------


def known(source: Source, measure: str) -> bool:
    """Whether a source has a measure at all: kept self-scores have no surprisals."""
    return bool(uncertainty.spread(source.frame, measure))


def section(title: str, read: str, sources: list[Source], chart: Callable[[str], str]) -> str:
    """Words and a chart a measure, side by side where there is room."""
    drawn = [f"<div><h3>{m}</h3>{chart(m)}</div>" for m in uncertainty.MEASURES if any(known(s, m) for s in sources)]
    return f'<h2>{title}</h2>{reading(read)}{key(sources)}<div class="pair">{"".join(drawn)}</div>'


def bars(sources: list[Source], measure: str, by: Callable[[pl.DataFrame], pl.DataFrame], x_title: str) -> str:
    found = [by(source.frame).with_columns(pl.col("label").cast(pl.String)) for source in sources]
    labels, shares = max(found, key=len).select("label", "share")
    values = [dict(each.select("label", measure).iter_rows()) for each in found]
    series = {source.name: [each.get(name) for name in labels] for source, each in zip(sources, values, strict=True)}
    notes = [f"{share:.1%} of the tokens" for share in shares]
    ticks = [name.rpartition("–")[2].replace(",000", "k") for name in labels]  # of ranks, where a group ends
    return charts.bars(labels.to_list(), series, x_title, "nats", ticks, notes)


def key(sources: list[Source]) -> str:
    if len(sources) < 2:
        return ""
    items = [f'<span><i style="background:var(--s{i})"></i>{escape(s.name)}</span>' for i, s in enumerate(sources)]
    return f'<p class="key">{"".join(items)}</p>'


def reading(text: str) -> str:
    return f'<p class="read">{escape(text)}</p>'


def token_tables(sides: dict[str, pl.DataFrame], columns: Sequence[str], head: Sequence[str], label: Label) -> str:
    """The first rows of tables of tokens, side by side, by title; none of an empty one."""
    parts = []
    for title, found in sides.items():
        if found.is_empty():
            continue
        rows = []
        for row in found.head(ROWS).iter_rows(named=True):
            numbers = ["–" if row[name] is None else f"{row[name]:.2f}" for name in columns]
            rows.append([label(row["token"])[1], f"{row['count']:,}", *numbers])
        parts.append(f"<div><h3>{escape(title)}</h3>{table(['token', 'times', *head], rows)}</div>")
    return f'<div class="pair">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is words, the others numbers."""
    kinds = ["w", *["n"] * (len(head) - 1)]
    top = "".join(f'<th class="{kind}">{escape(cell)}</th>' for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _log_v(source: Source) -> float:
    return math.log(source.manifest.vocab_size)
