"""Minimal pairs for machines without data: a sentence of a held-out docstring, and the same with a mistake.

Both sentences have the same words and signs in another order, so their frequencies do not tell which one is correct.
Hashes decide everything, so the same package versions give the same pairs.
"""

import hashlib
import re
from collections.abc import Iterable

import polars as pl

from entropy_masking.commands import docstrings
from glue.blimp import COLUMNS

PAIRS = 200  # of each kind of mistake; fewer if there are not enough sentences
WORDS = range(5, 19)  # words of a sentence
PROSE = re.compile(r"[A-Z](?:[\w,;'()/]|[ -](?=[\w(]))+\.")  # a sentence without code, lists and tables

ARTICLES = {"a", "an", "the"}
PREPOSITIONS = {"of", "to", "in", "for", "with", "by", "from", "on", "as", "at", "into"}
SWAPPED_BRACKETS = str.maketrans("()", ")(")


def make() -> pl.DataFrame:
    """The pairs with the columns of BLiMP. Sentences that are also in the pretraining part are left out."""
    paths = docstrings.materialise()
    known, held_out = (
        {sentence for text in pl.read_parquet(paths[part], glob=False)["text"] for sentence in sentences(text)}
        for part in ("pretrain", "pairs")
    )
    return pairs_of(held_out - known)


def pairs_of(texts: Iterable[str]) -> pl.DataFrame:
    """At most ``PAIRS`` pairs for each kind of mistake, of these sentences."""
    texts = sorted(texts, key=_hash)
    mistakes = {"brackets": swap_brackets, "function words": swap_function_words, "order": swap_neighbours}
    rows = []
    for kind, mistake in mistakes.items():
        pairs = [(text, bad) for text in texts if (bad := mistake(text)) != text][:PAIRS]
        rows += [(kind, kind, number, *pair) for number, pair in enumerate(pairs, 1)]
    return pl.DataFrame(rows, COLUMNS, orient="row")


def sentences(text: str) -> list[str]:
    """The prose sentences of a docstring, without very short and very long ones."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            if sentence.count(" ") + 1 in WORDS and PROSE.fullmatch(sentence):
                kept.append(sentence)
    return kept


def swap_neighbours(text: str) -> str:
    """Two neighbouring lower-case words change places."""
    words = text.split(" ")
    plain = [word.isalpha() and word.islower() for word in words]
    places = [n for n in range(len(words) - 1) if plain[n] and plain[n + 1] and words[n] != words[n + 1]]
    return _swapped(words, place := places[_hash(text) % len(places)], place + 1) if places else text


def swap_function_words(text: str) -> str:
    """The first preposition and the first article change places."""
    words = text.split(" ")
    first = [next((n for n, word in enumerate(words) if word in own), 0) for own in (PREPOSITIONS, ARTICLES)]
    return _swapped(words, *first) if all(first) else text


def swap_brackets(text: str) -> str:
    """Round brackets around words turn around."""
    return text.translate(SWAPPED_BRACKETS) if re.search(r" \(\w[^()]*\w\)", text) else text


def _swapped(words: list[str], one: int, other: int) -> str:
    words[one], words[other] = words[other], words[one]
    return " ".join(words)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
