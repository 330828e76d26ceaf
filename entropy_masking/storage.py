"""Files and directories by path or URI, local or in an object store, through ``pyarrow.fs``.

Local writes are atomic (temporary name, fsync, rename). An object store shows a key only when its upload is complete,
so a file is uploaded there in one write under its final name.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import stat
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import ArrowInvalid, fs
from pydantic_core import from_json

from entropy_masking.errors import UsageError, one_line

S3_ATTEMPTS = 11  # of one request, within about fifty seconds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write to a full disk


def is_remote(uri: str) -> bool:
    """Whether ``uri`` is not a path on this machine."""
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path that ``file://…`` or ``~/…`` means; any other path or URI is returned unchanged.

    Raises UsageError if a file URI names another host.
    """
    if uri.startswith("file://"):
        host, slash, path = uri.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise UsageError(f"{uri} names the host {host}; a file URI begins with file:/// and an absolute path")
        return unquote(slash + path, errors="surrogateescape")
    return os.path.expanduser(uri) if uri == "~" or uri.startswith("~/") else uri


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of ``uri`` and the path in it; a plain path becomes absolute.

    Raises UsageError if the scheme is unknown, the URI is wrong, or a path is not UTF-8.
    """
    if not is_remote(uri):
        path = str(Path(local_path(uri)).absolute())
        try:
            path.encode()
        except UnicodeEncodeError:  # Arrow cannot open it
            raise UsageError(f"the name of {path!r} is not UTF-8; rename it") from None
        return fs.LocalFileSystem(), path
    place, question_mark, query = uri.partition("?")
    scheme, _, path = place.partition("://")
    bucket, slash, key = path.partition("/")
    try:
        if scheme in ("s3", "gs", "gcs"):
            filesystem, root = _client(f"{scheme}://{bucket}{question_mark}{query}", os.getpid())
            return filesystem, root + slash + unquote(key)
        with contextlib.suppress(ArrowInvalid):  # a scheme that only fsspec knows
            return fs.FileSystem.from_uri(uri)
        return fs.FileSystem.from_uri(f"fsspec+{uri}")
    except (ImportError, OSError, ValueError) as error:
        fix = "check the URI and the connection, or use one that pyarrow or fsspec knows"
        raise UsageError(f"cannot open {uri} ({one_line(error)}); {fix}") from None


@functools.cache
def _client(bucket: str, process: int) -> tuple[fs.FileSystem, str]:
    """The client of a bucket, and the bucket's path in it. It keeps its connections, which a fork must not share."""
    filesystem, root = fs.FileSystem.from_uri(bucket)
    if isinstance(filesystem, fs.S3FileSystem):  # it would give up after six seconds
        known = {"region": filesystem.region, "endpoint_override": os.environ.get("AWS_ENDPOINT_URL")}
        settings = {name: value for name, value in known.items() if value} | dict(parse_qsl(urlsplit(bucket).query))
        filesystem = fs.S3FileSystem(**settings, retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=S3_ATTEMPTS))
    return filesystem, root


def absolute(uri: str) -> str:
    """The absolute form of a path; a URI is returned unchanged."""
    return uri if is_remote(uri) else resolve(uri)[1]


def join(uri: str, *names: str) -> str:
    """``uri/name/…``."""
    return "/".join([uri.rstrip("/") or "/", *names]) if names else uri


def exists(uri: str) -> bool:
    """Whether ``uri`` is a file or a directory."""
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def size(uri: str) -> int | None:
    """Size of the file in bytes, or None if there is no such file."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    return info.size if info.type == fs.FileType.File else None


def list_files(uri: str) -> list[fs.FileInfo]:
    """The files directly in the directory ``uri``, by name; empty if there is no such directory."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted((info for info in infos if info.type == fs.FileType.File), key=lambda info: info.base_name)


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file. Raises OSError for anything else: a FIFO would block, and a device might never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb" if flags == os.O_RDONLY else "r+b")


def open_stream(uri: str) -> Any:  # Arrow is typed in part
    """A stream of the bytes of a file. Raises FileNotFoundError, or another OSError if it is not a regular file."""
    filesystem, path = resolve(uri)
    return filesystem.open_input_stream(path, compression=None) if is_remote(uri) else open_regular(path)


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises FileNotFoundError, or another OSError if it is not a regular file."""
    with open_stream(uri) as stream:
        return stream.read()


def check_links(directory: Path, within: Path) -> None:
    """Raises UsageError for a link out of ``within``, a FIFO or a device directly in a directory.

    A snapshot in the cache of the Hub consists of links to files of the same repository, which are allowed.
    """
    root = within.resolve()
    if snapshots := next((parent for parent in root.parents if parent.name == "snapshots"), None):
        root = snapshots.parent if (snapshots.parent / "blobs").is_dir() else root
    check_plain(directory)
    for path in [directory, *sorted(directory.iterdir())] if directory.is_dir() else []:
        if not path.resolve().is_relative_to(root):
            raise UsageError(f"{path} is a link to a file elsewhere; replace it by the file")


def check_plain(directory: Path) -> None:
    """Raises UsageError for a FIFO or a device directly in a directory: a library that opens it might wait for ever."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path} is neither a file nor a directory; delete it")


def check_folders(directory: str, *names: str) -> None:
    """Raises UsageError if a folder that a command writes to is a link: others must not choose what it overwrites."""
    for path in (Path(absolute(directory)) / name for name in names if not is_remote(directory)):
        if path.is_symlink():
            raise UsageError(f"{path} is a link; replace it by a directory of its own")


def write_bytes(uri: str, data: bytes) -> None:
    """Write ``data`` so that a reader sees either the old file or the whole new one."""
    filesystem, path = resolve(uri)
    if is_remote(uri):

        def upload() -> None:
            # one write of all bytes: if a part fails, the whole upload fails, and nothing becomes visible
            with filesystem.open_output_stream(path, compression=None, buffer_size=0) as stream:
                stream.write(data)

        # in another thread: in this one, Ctrl-C or SIGTERM would close the stream and so commit an incomplete object
        with ThreadPoolExecutor(1) as thread:
            thread.submit(upload).result()
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        if error.filename is None:  # as when the disk is full
            error.filename = path
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make a rename durable: the directory has its own cache, which the fsync of a file does not write."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(uri: str) -> Any:
    """Parse a JSON file. Raises OSError, or ValueError for broken JSON, such as one that is nested 200 deep."""
    return from_json(read_bytes(uri))


def write_json(uri: str, value: object) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_bytes(uri, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def delete(uri: str) -> None:
    """Delete a file if it exists."""
    filesystem, path = resolve(uri)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(path)


def sha256(uri: str) -> str:
    """Hex SHA-256 of a file's content, read as a stream."""
    with open_stream(uri) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
