"""Two tasks for machines without GLUE, made from the held-out part of the docstring corpus.

``package``: which package a docstring comes from. ``adjacent``: whether the second sentence follows the first in its
docstring, or comes from another one of the same package. Everything is decided by hashes, so the same package versions
give the same rows; training and evaluation rows never come from the same docstring.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import polars as pl

from entropy_masking import docstrings

PACKAGES = docstrings.PACKAGES
# what else a package is called in prose and code
ALIASES = {
    *("np", "pd", "plt", "mpl", "tf", "jnp", "nx", "pa", "pq", "pl", "hf", "sp", "py", "arrow", "pytorch", "aten"),
    *("scikit", "learn", "hugging", "face", "huggingface", "hub", "dataset", "transformer", "polar", "aio"),
}
TRAIN_ROWS, DEV_ROWS = 2000, 500
DEV_SHARE = 5  # one docstring in five
LONGEST = 400  # characters of a text
SENTENCE = range(30, 251)  # characters of a sentence that a pair is made of


def make(task: str) -> dict[str, pl.DataFrame]:
    """``train`` and ``dev`` rows of a probe: ``text`` or ``sentence1`` and ``sentence2``, and ``label``."""
    rows = pl.read_parquet(docstrings.materialise()["probes"]).to_dicts()
    rows.sort(key=lambda row: _hash(row["text"]))
    parts = {
        "train": [row for row in rows if _hash("split" + row["text"]) % DEV_SHARE],
        "dev": [row for row in rows if not _hash("split" + row["text"]) % DEV_SHARE],
    }
    build = _package_rows if task == "package" else _adjacent_rows
    return {part: pl.DataFrame(build(parts[part], most)) for part, most in (("train", TRAIN_ROWS), ("dev", DEV_ROWS))}


def _package_rows(rows: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """Docstrings without the names that would give them away, evenly many a package as far as they go."""
    by_package: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        text = anonymise(row["text"])[:LONGEST]
        if len(text) >= SENTENCE.start:
            by_package.setdefault(row["package"], []).append({"text": text, "label": row["package"]})
    share = max(1, most // max(1, len(by_package)))
    return _shuffled([row for found in by_package.values() for row in found[:share]])


def _adjacent_rows(rows: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """Pairs of neighbouring sentences; in every other one the second sentence is replaced by the next pair's but one.

    Both kinds of rows are made of the same kinds of sentences, so only their fit tells them apart.
    """
    by_package: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if pairs := list(pairwise(sentences(row["text"]))):
            first, second = pairs[_hash(row["text"]) % len(pairs)]
            by_package.setdefault(row["package"], []).append((first, second))
    made = []
    for pairs in by_package.values():
        kept, changed = pairs[0::2], pairs[1::2]
        if len(changed) < 2:
            continue
        others = [second for _, second in changed[1:] + changed[:1]]
        made += [{"sentence1": a, "sentence2": b, "label": "adjacent"} for a, b in kept[: len(changed)]]
        made += [{"sentence1": a, "sentence2": b, "label": "apart"} for (a, _), b in zip(changed, others, strict=True)]
    rows_by_label = [[row for row in _shuffled(made) if row["label"] == label] for label in ("adjacent", "apart")]
    return _shuffled([row for found in rows_by_label for row in found[: most // 2]])


def sentences(text: str) -> list[str]:
    """The prose sentences of a docstring's paragraphs that are neither very short nor very long, in order."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if len(sentence) in SENTENCE and letters > 0.85 * len(sentence) and sentence[-1] in ".!?":
                found.append(sentence)
    return found


def anonymise(text: str) -> str:
    """A docstring without dotted identifiers, package names and names of modules."""
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


def _shuffled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(rows, key=lambda row: _hash(*row.values()))


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")
