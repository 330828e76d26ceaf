"""Identity and decompressed size of the files of a corpus, for which several are read at a time."""

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import UsageError, one_line
from pipeline.corpus.ranges import BLOCK, FileRange

HASHED = 1 << 30  # bytes; of a longer local file only samples are hashed
SAMPLES, SAMPLE = 64, 1 << 16  # how many, and their bytes
SHOWN = 1 << 28  # bytes to read from which on progress is shown


def read_contents(files: list[FileRange], hash_corpus: bool) -> list[tuple[str, int]]:
    """(identity, decompressed bytes) of whole files.

    Args:
        hash_corpus: hash every byte of local files, however long they are.

    Raises:
        UsageError: a compressed file cannot be read to its end.
    """
    lock, stopped, progress = threading.Lock(), threading.Event(), None

    def advance(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        if progress:
            with lock:
                progress.advance(count)

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())  # hashing and decompression release Python's lock
        sizes = list(pool.map(lambda file: storage.size(file.path) or 0, files))
        to_read = [_is_read(file, size, hash_corpus) for file, size in zip(files, sizes, strict=True)]
        if (amount := sum(itertools.compress(sizes, to_read))) >= SHOWN:
            progress = stack.enter_context(console.Progress(amount, "B", "planning"))
        try:
            return list(pool.map(partial(_content, advance=advance), files, sizes, to_read))
        except BaseException:
            stopped.set()
            raise


def _is_read(file: FileRange, size: int, hash_corpus: bool) -> bool:
    """Whether every byte of a file must be read: to decompress it, or to hash it."""
    return file.compression is not None or (not storage.is_remote(file.path) and (hash_corpus or size <= HASHED))


def _content(file: FileRange, size: int, to_read: bool, advance: Callable[[int], None]) -> tuple[str, int]:
    identity = None
    if to_read:
        try:
            identity, size = _read(file, advance)
        except (OSError, EOFError, pa.ArrowException) as error:
            if isinstance(error, PermissionError) or (isinstance(error, OSError) and storage.is_remote(file.path)):
                raise
            raise UsageError(f"cannot read {file.path} to its end: {one_line(error)}") from None
    if storage.is_remote(file.path):
        identity = _remote_identity(file.path)
    return identity or _sampled(file.path, size), size


def _read(file: FileRange, advance: Callable[[int], None]) -> tuple[str, int]:
    """The hash of a local file's bytes (meaningless for a remote file), and the decompressed size of the file."""
    hashed, size, read = hashlib.sha256(), 0, 0
    if not storage.is_remote(file.path):
        with storage.open_stream(file.path) as stream:
            while block := stream.read(BLOCK):
                hashed.update(block)
                size += len(block)
                advance(0 if file.compression else len(block))  # even 0 lets Ctrl-C end the run here
    if file.compression:
        size = 0
        with storage.open_stream(file.path) as raw, pa.CompressedInputStream(raw, file.compression) as stream:
            while block := stream.read(BLOCK):
                size += len(block)
                advance(raw.tell() - read)
                read = raw.tell()
    return hashed.hexdigest(), size


def _sampled(path: str, size: int) -> str:
    """The size of a local file with a hash of blocks that are evenly spaced, the first and the last among them."""
    samples = hashlib.sha256()
    with storage.open_stream(path) as stream:
        for number in range(SAMPLES):
            stream.seek((size - SAMPLE) * number // (SAMPLES - 1))
            samples.update(stream.read(SAMPLE))
    return f"{size}:sampled:{samples.hexdigest()}"


def _remote_identity(path: str) -> str:
    """The size and etag of a remote file (or its time without an etag)."""
    filesystem, name = storage.resolve(path)
    with filesystem.open_input_stream(name, compression=None) as stream:
        known = {str(key).lower(): str(value) for key, value in (stream.metadata() or {}).items()}
    info = filesystem.get_file_info(name)
    return f"{info.size}:{known.get('etag') or info.mtime_ns}"
