"""A corpus in any common form → a plan of shards: ranges of whole documents.

Nothing is tokenized here. The plan reads file sizes, Parquet footers, first lines (to detect a wrong text column early)
and the bytes of compressed files, for their decompressed size, and of local files, for the fingerprint.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from entropy_masking import storage
from entropy_masking.commands import console, docstrings
from entropy_masking.errors import UsageError, one_line
from entropy_masking.shards.faults import check_shards
from entropy_masking.shards.manifests import manifest_uri, read_manifest, run_uri
from entropy_masking.shards.schema import Manifest
from pipeline.corpus.content import read_contents
from pipeline.corpus.files import compression_suffix, file_format, find_files
from pipeline.corpus.formats import LONG_PARAGRAPH, array, has_blank_line, is_array, json_keys
from pipeline.corpus.ranges import COMPRESSIONS, MAX_DOCUMENT_BYTES, FileRange
from pipeline.corpus.readers import Reader, Rejects, read_documents
from pipeline.corpus.tables import check_footer, csv_rows, parquet_footer

UNITS = ("line", "paragraph", "file")  # of a document in plain text
BYTES_PER_TOKEN = 4  # of English text; only the size of shards depends on it
SHARD_TOKENS = 1 << 18
JSON_OBJECTS = 100  # this many objects are read to detect a wrong key


@dataclass(frozen=True)
class Corpus:
    """A planned corpus.

    Attributes:
        shards: the ranges of each shard; the place in the list is the shard's index.
        identity: of the corpus, for the fingerprint: names and content hashes (remote: etags) of its files in order,
            and reading options.
        shard_tokens: approximate tokens per shard of text.
        from_shards: the manifest if the corpus is a shard directory; its tokens, ids and shards are kept.
    """

    shards: list[list[FileRange]]
    identity: dict[str, object]
    shard_tokens: int
    from_shards: Manifest | None = None


def plan_corpus(
    spec: str,
    *,
    text_column: str | None = None,
    document: str | None = None,
    shard_tokens: int | None = None,
    limit_documents: int | None = None,
    max_document_bytes: int | None = None,
    hash_corpus: bool | None = None,
    output: str | None = None,
) -> Corpus:
    """Plan the shards of a corpus.

    Args:
        spec: a corpus as ``pipeline/score.py --corpus`` takes it; the next six are its flags, None if not given.
        output: the directory to write, which must be outside of the corpus.

    Raises:
        UsageError: files are missing or unreadable, there is no such text column, a shard directory is unfinished, or
            an option does not apply to the corpus.
    """
    if not _is_path(spec) and not all(part.strip() for part in spec.split(",")):
        raise UsageError(f"--corpus {spec!r} has an empty part; remove the extra comma")
    if (max_document_bytes or 0) > 1 << 31:
        raise UsageError(f"--max-document-bytes {max_document_bytes} is above 2 GiB; choose at most {1 << 31}")
    if _is_shard_directory(spec):
        flags = {"text-column": text_column, "document": document, "shard-tokens": shard_tokens}
        flags |= {"limit-documents": limit_documents, "max-document-bytes": max_document_bytes}
        flags |= {"hash-corpus": hash_corpus}
        if given := [name for name, value in flags.items() if value is not None]:
            problem = f"--{given[0]} only applies to text"
            raise UsageError(f"{problem}; {spec} is a shard directory, so leave out --{given[0]}")
        return _plan_shard_directory(spec)
    files = _files_of(spec, output)
    formats = {file_format(path) for path, _ in files}
    if document and "text" not in formats:
        raise UsageError(f"{spec} holds no plain-text files; leave out --document")
    if text_column and formats == {"text"}:
        raise UsageError(f"{spec} holds only plain-text files, which have no columns; leave out --text-column")
    text_column, shard_tokens = text_column or "text", shard_tokens or SHARD_TOKENS
    shard_bytes, most = shard_tokens * BYTES_PER_TOKEN, max_document_bytes or MAX_DOCUMENT_BYTES
    wholes = [_whole_file(path, text_column, document, most) for path, _ in files]
    contents = read_contents([whole for whole, _ in wholes], bool(hash_corpus))
    ranges: list[tuple[FileRange, int]] = []
    for (whole, texts), (_, size) in zip(wholes, contents, strict=True):
        ranges += _cut(whole, size, texts or size, shard_bytes)
    if limit_documents:
        ranges = list(_limit(ranges, limit_documents))
    shards = _group(ranges, shard_bytes)
    if not shards:
        raise UsageError(f"the corpus {spec} is empty: its files hold no documents")
    numbered = enumerate(zip(files, contents, strict=True), 1)  # their order matters, and two may have the same name
    identity = {
        "files": {f"{number} {name}": content for number, ((_, name), (content, _)) in numbered},
        "text_column": text_column,
        "document": document or ("paragraph" if "text" in formats else "line"),
        "shard_tokens": shard_tokens,
        "limit_documents": limit_documents,
        "max_document_bytes": most,
    }
    return Corpus(shards, identity, shard_tokens)


def _files_of(spec: str, output: str | None) -> list[tuple[str, str]]:
    """(path, name within the corpus) of the files of a corpus of text."""
    if spec == "docstrings":
        return [(str(docstrings.materialise()["pretrain"]), "docstrings.parquet")]
    if spec.startswith("hf:"):
        return [(str(_materialise_hub_dataset(spec)), spec)]
    parts = [spec] if _is_path(spec) else spec.split(",")
    found = [find_files(part.strip(), output) for part in parts]
    if unread := [name for _, unknown in found for name in unknown]:
        more = f" and {len(unread) - 5:,} more" if len(unread) > 5 else ""
        console.note(f"note: {', '.join(unread[:5])}{more} not read: unknown endings")
    return [file for known, _ in found for file in known]


def _whole_file(path: str, text_column: str, document: str | None, max_bytes: int) -> tuple[FileRange, int]:
    """A file as one range, and the bytes of the texts of a Parquet file (else 0).

    ``stop`` is the number of rows or elements, or None where ranges are counted in bytes.
    """
    compression = COMPRESSIONS.get(compression_suffix(path) or "")
    kind = file_format(path) or "text"
    whole = FileRange(path, kind, text_column=text_column, compression=compression, max_bytes=max_bytes)
    if kind == "parquet":
        schema, metadata = parquet_footer(path)
        _check_parquet_column(whole, schema)
        return replace(whole, stop=metadata.num_rows), check_footer(path, metadata)
    try:
        whole = replace(whole, kind=_kind_of_range(whole, document))
        _check_text_column(whole)
        return replace(whole, stop=len(array(whole)) if whole.kind == "json" else None), 0
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from None


def _cut(whole: FileRange, size: int, texts: int, shard_bytes: int) -> Iterator[tuple[FileRange, int]]:
    """(range, bytes of its texts) of the ranges of about ``shard_bytes`` of a file with ``size`` bytes in all."""
    if whole.kind == "file":
        yield whole, size
        return
    end = size if whole.stop is None else whole.stop
    cuts = min(end, max(1, round(texts / shard_bytes)))
    edges = [end * cut // cuts for cut in range(cuts + 1)] if cuts else []
    for start, stop in itertools.pairwise(edges):
        yield replace(whole, start=start, stop=stop), texts * (stop - start) // end


def _kind_of_range(file: FileRange, document: str | None) -> str:
    """The kind of a file's ranges: for plain text the unit of a document, for other files their format (``file.kind``).

    Raises:
        UsageError: it is a large text without blank lines, which would be one document, and no unit was chosen.
    """
    if file.kind == "json":
        return "json" if is_array(file) else "jsonl"
    if file.kind == "text" and not document and not has_blank_line(file):
        raise UsageError(
            f"{file.path} has no blank line in its first {LONG_PARAGRAPH >> 10} KiB, so its paragraphs are no "
            "documents; pass --document line if each line is one, or --document paragraph or file"
        )
    return document or "paragraph" if file.kind == "text" else file.kind


def _check_parquet_column(file: FileRange, schema: pa.Schema) -> None:
    path, name = file.path, file.text_column
    _check_names(file, schema.names)
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UsageError(f"column {name!r} of {path} is {kind}, not text; name another with --text-column")


def _check_text_column(file_range: FileRange) -> None:
    """Detect a wrong ``--text-column`` by the header or the first objects, before anything is scored."""
    if file_range.kind in ("json", "jsonl"):
        names = json_keys(file_range, JSON_OBJECTS) or [file_range.text_column]  # broken lines are rejected later
    elif file_range.kind in ("csv", "tsv"):
        *_, header = next(csv_rows(file_range), (0, 1, [file_range.text_column]))
        names = header if isinstance(header, list) else []
        if not names:
            raise UsageError(f"the first line of {file_range.path} does not name the columns; add a header")
    else:
        return
    _check_names(file_range, names)


def _check_names(file: FileRange, names: list[str]) -> None:
    path, name = file.path, file.text_column
    if name not in names:
        raise UsageError(f"{path} has no column {name!r}; name one of {names} with --text-column")
    if names.count(name) > 1:
        raise UsageError(f"{path} has several columns {name!r}; rename all but one, or name another")


def _limit(ranges: list[tuple[FileRange, int]], documents: int) -> Iterator[tuple[FileRange, int]]:
    """The ranges with the first ``documents`` documents. Text files are read only up to there."""
    reader = Reader()
    for file_range, size in ranges:
        if documents <= 0:
            return
        if file_range.kind == "parquet":
            rows = (file_range.stop or 0) - file_range.start
            count = min(rows, documents)
            yield replace(file_range, stop=file_range.start + count), size * count // rows
        else:
            rejects = Rejects()
            deque(read_documents([replace(file_range, limit=documents)], reader, rejects), maxlen=0)
            count = rejects.documents
            yield replace(file_range, limit=documents if count == documents else None), size
        documents -= count


def _group(ranges: list[tuple[FileRange, int]], shard_bytes: int) -> list[list[FileRange]]:
    """Join neighbouring ranges into shards of about ``shard_bytes``."""
    shards: list[list[FileRange]] = []
    filled = shard_bytes
    for file_range, size in ranges:
        if filled + size / 2 >= shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(file_range)
        filled += size
    return shards


def _is_path(spec: str) -> bool:
    """Whether the whole specification is an existing path, whatever characters it has."""
    return bool(spec.strip()) and not storage.is_remote(spec) and storage.exists(spec)


def _is_shard_directory(spec: str) -> bool:
    is_place = _is_path(spec) or (storage.is_remote(spec) and not any(character in spec for character in "*,"))
    return is_place and (storage.exists(manifest_uri(spec)) or storage.exists(run_uri(spec)))


def _plan_shard_directory(spec: str) -> Corpus:
    manifest = read_manifest(spec)
    check_shards(manifest)
    manifest = manifest.model_copy(update={"uri": storage.absolute(spec)})  # workers have other working directories
    ranges: list[list[FileRange]] = [[] for _ in range(manifest.planned_shards)]  # no ranges: the shard was given up
    for entry in manifest.shards:
        ranges[entry.index] = [FileRange(manifest.shard_uri(entry), "shard", 0, entry.rows)]
    # only the tokens matter: scoring a scored directory again means scoring its tokens
    corpus = manifest.fingerprint["corpus"]
    identity = corpus if "sequences" in corpus else {"sequences": corpus}
    return Corpus(ranges, identity, 0, manifest)


def _materialise_hub_dataset(spec: str) -> Path:
    """A Hub dataset (or a local one that ``datasets`` loads) as one Parquet file in the cache, made once."""
    import datasets

    name, config, split = ([*spec.removeprefix("hf:").split(":"), "", ""])[:3]
    if not name:
        raise UsageError("hf: needs the name of a dataset, as in hf:NAME[:CONFIG[:SPLIT]]")
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # datasets raises anything from OSError to its own classes
        raise UsageError(f"cannot load the dataset {spec}: {one_line(error)}") from None
    path = docstrings.cache_directory() / "hf" / f"{storage.sha256_json([spec, data._fingerprint])[:24]}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        data.to_parquet(temporary)
        os.replace(temporary, path)
    return path
