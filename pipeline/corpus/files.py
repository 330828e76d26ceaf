"""The files of a corpus: found by path, directory or glob, with their kind and their identity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from pyarrow import fs

from entropy_masking import storage
from entropy_masking.errors import UsageError
from pipeline.corpus.readers import COMPRESSIONS

KINDS = {
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}


def find_files(part: str) -> list[tuple[str, str]]:
    """(path, name within the corpus) of the files of a path, directory or glob, sorted by name."""
    filesystem, path = storage.resolve(part)
    prefix = part.split("://")[0] + "://" if storage.is_remote(part) else ""
    if any(character in part for character in "*?[") and not storage.exists(part):
        root, names = _glob_root(path), _matching(filesystem, path)
    else:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise UsageError(f"the corpus {part} does not exist")
        if info.type == fs.FileType.File:
            root, names = os.path.dirname(path), [path]
            if file_kind(path) is None:
                raise UsageError(f"{part} has an unknown ending; the known endings are {_endings()}")
        else:
            root, names = path, [name for name in _files_below(filesystem, path) if file_kind(name)]
    if not names:
        raise UsageError(f"{part} holds no text files; the known endings are {_endings()}")
    return [(prefix + name, os.path.relpath(name, root)) for name in sorted(names)]


def _files_below(filesystem: fs.FileSystem, root: str) -> Iterator[str]:
    """Every file below a directory, except hidden ones."""
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
        if info.type == fs.FileType.File and not _hidden(info.path, root):
            yield info.path


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(".") for part in os.path.relpath(path, root).split("/"))


def _glob_root(pattern: str) -> str:
    """The path before its first part with a wildcard."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if any(character in part for character in "*?["))
    return "/".join(parts[:first]) or "/"


def _matching(filesystem: fs.FileSystem, pattern: str) -> list[str]:
    """Files that match a shell pattern in which ``**`` stands for any directories."""
    root = _glob_root(pattern)
    if isinstance(filesystem, fs.LocalFileSystem):
        below = os.path.relpath(pattern, root)
        names = [str(path) for path in Path(root).glob(below) if path.is_file()]
        if "/." not in f"/{below}":
            names = [name for name in names if not _hidden(name, root)]
    else:
        names = [
            name
            for name in _files_below(filesystem, root)
            if fnmatchcase(name, pattern) and ("**" in pattern or name.count("/") == pattern.count("/"))
        ]
    return [name for name in names if file_kind(name)]


def file_kind(path: str) -> str | None:
    """The kind of a file by its ending, or None."""
    return KINDS.get(Path(path.removesuffix(compression_suffix(path) or "")).suffix.lower())


def compression_suffix(path: str) -> str | None:
    """The ending of a compressed file, or None."""
    suffix = Path(path).suffix
    return suffix if suffix in COMPRESSIONS else None


def _endings() -> str:
    return f"{' '.join(KINDS)}, the text forms also with {' '.join(COMPRESSIONS)}"


def content_identity(path: str) -> str:
    """For a local file the hash of its bytes, for a remote file its size and etag (or its time without an etag)."""
    if not storage.is_remote(path):
        return storage.sha256(path)
    filesystem, name = storage.resolve(path)
    with filesystem.open_input_stream(name, compression=None) as stream:
        known = {str(key).lower(): str(value) for key, value in (stream.metadata() or {}).items()}
    info = filesystem.get_file_info(name)
    return f"{info.size}:{known.get('etag') or info.mtime_ns}"
