"""A corpus without a download: docstrings of the Python packages that this project depends on.

The sources are parsed, not imported. The corpus is written once, as Parquet in the cache, so workers parse no sources.
The same package versions give the same files.
"""

import ast
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError, one_line

PACKAGES = (
    *("torch", "transformers", "ray", "datasets", "pyarrow", "polars", "numpy", "scipy", "sklearn", "pandas"),
    *("matplotlib", "sympy", "networkx", "accelerate", "huggingface_hub", "fsspec", "aiohttp"),
)
FORMAT = 2  # increase it when the extraction changes
BYTES_PER_PACKAGE = 3_000_000  # so that no package dominates the corpus
SHORTEST = 120  # characters; shorter docstrings are left out
PAIRS_SHARE = 10  # one source file in ten is kept for the minimal pairs
ROW_GROUP = 512
SURROGATE = re.compile("[\ud800-\udfff]")  # has no UTF-8
SKIPPED = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|third_?party(_files)?|extern(al|s)?|_private|generated)/")


def cache_directory() -> Path:
    """The directory of materialised corpora: ``$ENTROPY_MASKING_CACHE``, or ``~/.cache/entropy-masking``."""
    return Path(os.environ.get("ENTROPY_MASKING_CACHE") or Path.home() / ".cache" / "entropy-masking").expanduser()


def materialise() -> dict[str, Path]:
    """Paths of the parts ``pretrain`` and ``pairs``: Parquet with the column ``text``.

    All docstrings of a source file are in the same part. Of texts with the same beginning only the first is kept, so
    the parts share no text. Rows are sorted by a hash, which mixes the packages. Raises UsageError if the cache
    directory cannot be made.
    """
    installed = [name for name in PACKAGES if find_spec(name)]
    versions = {name: version(packages_distributions()[name][0]) for name in installed}
    key = storage.sha256_json([FORMAT, versions, BYTES_PER_PACKAGE, SHORTEST])[:16]
    directory = cache_directory() / f"docstrings-{key}"
    paths = {part: directory / f"{part}.parquet" for part in ("pretrain", "pairs")}
    if not all(path.exists() for path in paths.values()):
        try:
            directory.mkdir(parents=True, exist_ok=True)  # an error here comes before the work, not after it
        except OSError as error:
            raise UsageError(f"{one_line(error)}; set ENTROPY_MASKING_CACHE to a writable directory") from None
        texts = _collect(installed)
        for part, path in paths.items():
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({"text": texts[part]}), sink, row_group_size=ROW_GROUP, compression="zstd")
            storage.write_bytes(str(path), sink.getvalue().to_pybytes())
    return paths


def _collect(packages: list[str]) -> dict[str, list[str]]:
    """The texts of each part."""
    seen: set[str] = set()
    texts: dict[str, list[str]] = {"pretrain": [], "pairs": []}
    with console.Progress(len(packages), "packages", "collecting docstrings") as progress:
        for package in packages:
            size = 0
            for file, text in _docstrings(package):
                beginning = re.sub(r"\W+", " ", text.lower())[:SHORTEST]
                if beginning not in seen:
                    seen.add(beginning)
                    texts["pretrain" if _hash(f"{package}/{file}") % PAIRS_SHARE else "pairs"].append(text)
                    size += len(text.encode())
                if size > BYTES_PER_PACKAGE:
                    break
            progress.advance(1)
    return {part: sorted(own, key=_hash) for part, own in texts.items()}


def _docstrings(package: str) -> Iterator[tuple[str, str]]:
    """(file, docstring) of a package. Files are sorted by a hash, so a limit takes a fair sample."""
    spec = find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        files = {str(path.relative_to(root)): path for path in Path(root).rglob("*.py")}
        for name in sorted(files, key=lambda name: _hash(f"{package}/{name}")):
            if not SKIPPED.search(Path(name).as_posix()):
                yield from ((name, text) for text in _docstrings_of(files[name].read_bytes()))


def _docstrings_of(source: bytes) -> list[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in these sources
        try:
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        except (SyntaxError, ValueError, RecursionError):
            return []
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [text for text in texts if len(text) >= SHORTEST and not SURROGATE.search(text)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
