"""Minimal pairs made from docstrings: what differs within a pair, and which sentences are used."""

from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from entropy_masking.commands import docstrings
from glue import pairs

MADE = [
    f"{start} {noun} {number} {end}"
    for number in range(12)
    for noun in ("value", "array")
    for start, end in (
        ("Return a copy of the", "if the index is sorted."),
        ("Raise an error in the", "when values are missing."),
        ("Use this name for the", "(or a list) that was given."),
        ("These names of the", "were made when a row has no label."),
        ("All of these in the", "have an order."),
    )
]


def test_both_sentences_of_a_pair_have_the_same_words() -> None:
    frame = pairs.pairs_of(MADE)
    assert set(frame["UID"]) == {"order", "function words", "brackets"}
    for kind, good, bad in frame.select("UID", "sentence_good", "sentence_bad").rows():
        assert good in MADE and good != bad and sorted(good) == sorted(bad)
        moved = sum(old != new for old, new in zip(good.split(), bad.split(), strict=True))
        assert kind == "brackets" or (moved == 2 and sorted(good.split()) == sorted(bad.split()))
    assert pairs.pairs_of(reversed(MADE)).equals(frame)


@pytest.mark.parametrize(
    ("mistake", "text", "expected"),
    [
        (pairs.swap_neighbours, "Return values (all of) them.", "Return values (all of) them."),
        (pairs.swap_neighbours, "The old files.", "The old files."),
        (pairs.swap_neighbours, "The old new Files.", "The new old Files."),
        (pairs.swap_function_words, "Return a copy of the array.", "Return of copy a the array."),
        (pairs.swap_function_words, "Return all values.", "Return all values."),
        (pairs.swap_brackets, "Give a name (or two) here.", "Give a name )or two( here."),
        (pairs.swap_brackets, "Call run() here.", "Call run() here."),
    ],
)
def test_a_mistake(mistake: object, text: str, expected: str) -> None:
    assert callable(mistake) and mistake(text) == expected


def test_sentences_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence that the pretraining part has too is in no pair; neither is one that is no prose, or too long."""
    odd = [
        "Too short.",
        "No full stop at the end of a text",
        "x = [1, 2, 3] + [4, 5, 6] + y[0] of a.",
        "Word " * 30 + ".",
    ]
    parts = {"pretrain": MADE[::2], "pairs": [*MADE, *odd]}
    for part, texts in parts.items():
        pl.DataFrame({"text": [f"{one}\n\n{two}" for one, two in pairwise(texts)]}).write_parquet(
            tmp_path / f"{part}.parquet"
        )
    monkeypatch.setattr(docstrings, "materialise", lambda: {part: tmp_path / f"{part}.parquet" for part in parts})
    used = set(pairs.make()["sentence_good"])
    assert used and used <= set(MADE[1::2])
