"""Two tasks for machines without GLUE, made from the held-out part of the docstring corpus.

``package``: which package a docstring comes from. ``adjacent``: whether the second sentence follows the first in its
docstring, or comes from another docstring of the same package. Hashes decide everything, so the same package versions
give the same rows. Training and evaluation rows never come from the same docstring.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import polars as pl

from entropy_masking.commands import docstrings

PACKAGES = docstrings.PACKAGES
# other names of packages in prose and code
ALIASES = {
    *("np", "pd", "plt", "mpl", "tf", "jnp", "nx", "pa", "pq", "pl", "hf", "sp", "py", "arrow", "pytorch", "aten"),
    *("scikit", "learn", "hugging", "face", "huggingface", "hub", "dataset", "transformer", "polar", "aio"),
}
TRAIN_ROWS, DEV_ROWS = 2000, 500
DEV_SHARE = 5  # one docstring in five
LONGEST = 400  # characters of a text
SENTENCE = range(30, 251)  # characters of a sentence of a pair

Row = dict[str, str]


def make(task: str) -> dict[str, pl.DataFrame]:
    """``train`` and ``dev`` rows of a probe: ``text`` or ``sentence1`` and ``sentence2``, and ``label``."""
    docs = pl.read_parquet(docstrings.materialise()["probes"], glob=False).to_dicts()
    parts: dict[str, list[Row]] = {"train": [], "dev": []}
    for doc in sorted(docs, key=lambda doc: _hash(doc["text"])):
        parts["train" if _hash("split" + doc["text"]) % DEV_SHARE else "dev"].append(doc)
    build = _package_rows if task == "package" else _adjacent_rows
    return {part: pl.DataFrame(build(parts[part], most)) for part, most in (("train", TRAIN_ROWS), ("dev", DEV_ROWS))}


def _package_rows(docs: list[Row], most: int) -> list[Row]:
    """Docstrings without names that reveal the package; equally many per package if there are enough."""
    by_package: dict[str, list[Row]] = {}
    for doc in docs:
        text = anonymise(doc["text"])[:LONGEST]
        if len(text) >= SENTENCE.start:
            by_package.setdefault(doc["package"], []).append({"text": text, "label": doc["package"]})
    share = max(1, most // max(1, len(by_package)))
    return _shuffled([row for rows in by_package.values() for row in rows[:share]])


def _adjacent_rows(docs: list[Row], most: int) -> list[Row]:
    """Pairs of neighbouring sentences of one docstring; every other pair gets the second sentence of another pair.

    Rows of both labels have the same kinds of sentences, so only the fit of the two sentences separates them.
    """
    by_package: dict[str, list[tuple[str, str]]] = {}
    for doc in docs:
        if pairs := list(pairwise(sentences(doc["text"]))):
            by_package.setdefault(doc["package"], []).append(pairs[_hash(doc["text"]) % len(pairs)])
    adjacent: list[Row] = []
    apart: list[Row] = []
    for pairs in by_package.values():
        kept, changed = pairs[0::2], pairs[1::2]
        if len(changed) > 1:
            adjacent += [{"sentence1": one, "sentence2": two, "label": "adjacent"} for one, two in kept[: len(changed)]]
            for (one, _), (_, two) in zip(changed, changed[1:] + changed[:1], strict=True):
                apart.append({"sentence1": one, "sentence2": two, "label": "apart"})
    return _shuffled([row for rows in (adjacent, apart) for row in _shuffled(rows)[: most // 2]])


def sentences(text: str) -> list[str]:
    """The prose sentences of a docstring in order, without very short and very long ones."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if len(sentence) in SENTENCE and letters > 0.85 * len(sentence) and sentence[-1] in ".!?":
                kept.append(sentence)
    return kept


def anonymise(text: str) -> str:
    """A docstring without dotted identifiers and without names of packages and modules."""
    text = re.sub(r"\w+(?:\.\w+)+", " ", text)
    return " ".join(re.sub(r"\w+", lambda word: "" if _names_a_package(word[0]) else word[0], text).split())


def _names_a_package(word: str) -> bool:
    word = word.lower().strip("_")
    return word in _module_names() or any(len(name) > 4 and name.strip("s") in word for name in PACKAGES)


@lru_cache(maxsize=1)
def _module_names() -> frozenset[str]:
    """Names of the packages and of the modules directly in them; nothing is imported."""
    names = {*PACKAGES, *ALIASES}
    for package in PACKAGES:
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            names |= {path.stem.strip("_").lower() for path in Path(root).iterdir() if path.suffix in ("", ".py")}
    return frozenset(names)


def _shuffled(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: _hash(*row.values()))


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")
