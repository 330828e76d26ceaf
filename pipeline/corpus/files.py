"""The files of a corpus: found by path, directory or glob, with their format."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.utils import glob_translate
from pyarrow import fs

from entropy_masking import storage
from entropy_masking.errors import UsageError
from pipeline.corpus.ranges import COMPRESSIONS

FORMATS = {
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",  # one array, or JSON lines
    ".csv": "csv",
    ".tsv": "tsv",
}


def find_files(part: str, output: str | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """The files of a path, directory or glob: (path, name within the corpus) of each, and names of unknown endings.

    An existing path is not a pattern, and neither is an existing directory at the start of a pattern.

    Raises:
        UsageError: there is no such file, or the files that a run writes to ``output`` would be among them.
    """
    filesystem, path = storage.resolve(part)
    prefix = part.split("://")[0] + "://" if storage.is_remote(part) else ""
    info, root, pattern = filesystem.get_file_info(path), path, ""
    if info.type == fs.FileType.File:
        if file_format(path) is None:
            raise UsageError(f"{part} has an unknown ending; the known endings are {_endings()}")
        return [(prefix + path, os.path.basename(path))], []
    if info.type == fs.FileType.NotFound:
        root, pattern = _split_pattern(filesystem, path)
        if not any(character in pattern for character in "*?["):
            raise UsageError(f"the corpus {part} does not exist")
    if output is not None:
        _check_outside(part, filesystem, root, pattern, output)
    names = _chosen(_names_below(filesystem, root, pattern), pattern)
    known = [name for name in names if file_format(name)]
    if not names:
        raise UsageError(f"the corpus {part} has no files; check the path")
    if not known:
        raise UsageError(f"{part} holds no text files; the known endings are {_endings()}")
    unknown = [name for name in names if not file_format(name)]
    return [(prefix + os.path.join(root, name), name) for name in known], unknown


def _split_pattern(filesystem: fs.FileSystem, path: str) -> tuple[str, str]:
    """The longest existing directory at the start of a path, and the rest."""
    root, rest = path, ""
    while "/" in root.rstrip("/") and filesystem.get_file_info(root).type != fs.FileType.Directory:
        root, name = os.path.split(root)
        rest = os.path.join(name, rest) if rest else name
    return root, rest


def _names_below(filesystem: fs.FileSystem, root: str, pattern: str) -> list[str]:
    """The names, relative to ``root``, of all files there, or of those that may match the pattern."""
    depth = pattern.count("/") + 1 if pattern and "**" not in pattern else None
    if isinstance(filesystem, fs.LocalFileSystem):
        return list(_walk(Path(root), depth, (os.path.realpath(root),)))
    found = ArrowFSWrapper(filesystem).find(root, maxdepth=depth, detail=True, on_error="raise")
    return [os.path.relpath(path, root) for path, info in found.items() if info["type"] == "file"]


def _walk(directory: Path, depth: int | None, above: tuple[str, ...]) -> Iterator[str]:
    """Names of files below a local directory. A link to a directory above itself, which would never end, is skipped."""
    for path in directory.iterdir():
        if not path.is_dir():
            if path.is_file() or path.is_symlink():  # a broken link is an error, not a shorter corpus
                yield path.name
        elif depth != 1 and (target := os.path.realpath(path)) not in above:
            yield from (f"{path.name}/{name}" for name in _walk(path, depth and depth - 1, (*above, target)))


def _chosen(names: list[str], pattern: str) -> list[str]:
    """The names that match the pattern, sorted; hidden ones only if the pattern names them."""
    matches = re.compile(glob_translate(pattern) if pattern else ".*", re.DOTALL).match
    hidden = "/." in f"/{pattern}"
    return sorted(name for name in names if matches(name) and (hidden or "/." not in f"/{name}"))


def _check_outside(part: str, filesystem: fs.FileSystem, root: str, pattern: str, output: str) -> None:
    """Raises UsageError if the corpus would contain its own shards, or the tokenizer made from it."""
    other, path = storage.resolve(output)
    if isinstance(filesystem, fs.LocalFileSystem):
        root, path = os.path.realpath(root), os.path.realpath(path)
    inside = os.path.relpath(path, root)
    written = [os.path.normpath(f"{inside}/{name}") for name in ("part-00000.parquet", "tokenizer/tokenizer.json")]
    if other == filesystem and not inside.startswith("..") and _chosen(written, pattern):
        raise UsageError(f"--output {output} is within the corpus {part}, which it would change; choose another place")


def file_format(path: str) -> str | None:
    """The format of a file by its ending, or None."""
    return FORMATS.get(Path(path.removesuffix(compression_suffix(path) or "")).suffix.lower())


def compression_suffix(path: str) -> str | None:
    """The ending of a compressed file, or None."""
    suffix = Path(path).suffix
    return suffix if suffix in COMPRESSIONS else None


def _endings() -> str:
    return f"{' '.join(FORMATS)}, the text forms also with {' '.join(COMPRESSIONS)}"
