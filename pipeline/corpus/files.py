"""The files of a corpus: found by path, directory or glob, with their kind and their identity."""

from __future__ import annotations

import os
from pathlib import Path

from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from entropy_masking import storage
from entropy_masking.errors import UsageError
from pipeline.corpus.formats import COMPRESSIONS

KINDS = {
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


def find_files(part: str) -> list[tuple[str, str]]:
    """(path, name within the corpus) of the files of a path, directory or glob, sorted by name."""
    filesystem, path = storage.resolve(part)
    prefix = part.split("://")[0] + "://" if storage.is_remote(part) else ""
    walker = ArrowFSWrapper(filesystem)
    if any(character in part for character in "*?[") and not storage.exists(part):
        root, found = _glob_root(path), walker.glob(path, detail=True, on_error="raise")
    elif (info := filesystem.get_file_info(path)).type == fs.FileType.NotFound:
        raise UsageError(f"the corpus {part} does not exist")
    elif info.type == fs.FileType.File:
        if file_kind(path) is None:
            raise UsageError(f"{part} has an unknown ending; the known endings are {_endings()}")
        return [(prefix + path, os.path.basename(path))]
    else:
        root, found = path, walker.find(path, detail=True, on_error="raise")
    names = {name: os.path.relpath(name, root) for name, info in found.items() if info["type"] == "file"}
    with_hidden = "/." in path.removeprefix(root)  # a pattern names them
    names = {path: name for path, name in names.items() if file_kind(path) and (with_hidden or "/." not in f"/{name}")}
    if not names:
        raise UsageError(f"{part} holds no text files; the known endings are {_endings()}")
    return [(prefix + path, name) for path, name in sorted(names.items())]


def _glob_root(pattern: str) -> str:
    """The path before its first part with a wildcard."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if any(character in part for character in "*?["))
    return "/".join(parts[:first]) or "/"


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
