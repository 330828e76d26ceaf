"""Minimal pairs for machines without data: a sentence of a held-out docstring, and the same with a mistake.

Counting words does not find the mistake: either both sentences have the same words, or one word is exchanged for
another as often as the other way round. Hashes decide everything, so the same package versions give the same pairs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from itertools import chain, pairwise

import polars as pl

from entropy_masking.commands import docstrings
from glue.blimp import COLUMNS

PAIRS = 200  # of each kind of mistake; fewer if there are not enough sentences
WORDS = range(5, 19)  # words of a sentence
PROSE = re.compile(r"[A-Z](?:[\w,;'()/]|[ -](?=[\w(]))+\.")  # a sentence without code, lists and tables

ARTICLES = {"a", "an", "the"}
PREPOSITIONS = {"of", "to", "in", "for", "with", "by", "from", "on", "as", "at", "into"}
SWAPPED_BRACKETS = str.maketrans("()", ")(")
# a kind of mistake, and the words that are exchanged for each other
EXCHANGES = {
    "a/an": [("a", "an")],
    "agreement": [("is", "are"), ("was", "were"), ("has", "have"), ("this", "these")],
}


def make() -> pl.DataFrame:
    """The pairs with the columns of BLiMP. Sentences that are also in the pretraining part are left out."""
    paths = docstrings.materialise()
    known, held_out = (
        {sentence for text in pl.read_parquet(paths[part], glob=False)["text"] for sentence in sentences(text)}
        for part in ("pretrain", "probes")
    )
    return pairs_of(held_out - known)


def pairs_of(texts: Iterable[str]) -> pl.DataFrame:
    """At most ``PAIRS`` pairs of each kind, of these sentences."""
    texts = sorted(texts, key=_hash)
    kinds = {
        name: [(text, bad) for text in texts if (bad := mistake(text)) != text][:PAIRS]
        for name, mistake in (
            ("order", swap_neighbours),
            ("function words", swap_function_words),
            ("brackets", swap_brackets),
        )
    }
    for name, exchanges in EXCHANGES.items():
        kinds[name] = []
        for one, other in exchanges:
            there, back = (exchanged(texts, old, new) for old, new in ((one, other), (other, one)))
            balanced = list(zip(there, back, strict=False))[: PAIRS // (2 * len(exchanges))]
            kinds[name] += chain.from_iterable(balanced)
    rows = [(name, name, number, good, bad) for name, own in kinds.items() for number, (good, bad) in enumerate(own, 1)]
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
    places = [
        n for n, pair in enumerate(pairwise(words)) if _is_plain(pair[0]) and _is_plain(pair[1]) and len({*pair}) > 1
    ]
    return _swapped(words, place := places[_hash(text) % len(places)], place + 1) if places else text


def swap_function_words(text: str) -> str:
    """The first preposition and the first article change places."""
    words = text.split(" ")
    places = [next((n for n, word in enumerate(words) if word in own), None) for own in (PREPOSITIONS, ARTICLES)]
    return text if None in places else _swapped(words, *places)


def swap_brackets(text: str) -> str:
    """Round brackets around words turn around."""
    return text.translate(SWAPPED_BRACKETS) if re.search(r" \(\w[^()]*\w\)", text) else text


def exchanged(texts: list[str], old: str, new: str) -> list[tuple[str, str]]:
    """The texts that have a word, each with the text in which another word takes its first place."""
    return [(text, bad) for text in texts if (bad := text.replace(f" {old} ", f" {new} ", 1)) != text]


def _is_plain(word: str) -> bool:
    return word.isalpha() and word.islower()


def _swapped(words: list[str], one: int, other: int) -> str:
    words[one], words[other] = words[other], words[one]
    return " ".join(words)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
