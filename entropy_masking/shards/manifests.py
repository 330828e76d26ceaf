"""The manifest of a shard directory: opening one, cheap checks of what it names, and the tokenizer that it brings.

Readers trust the manifest only, so stray or late files in the directory are harmless. See docs/shards.md.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.shards.parquet import SCHEMA_VERSION, footer_rows, shard_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READERS = 16  # files read at a time: an object store answers many requests as fast as one


@dataclass(frozen=True)
class ShardEntry:
    """One committed shard, as its record and the manifest name it.

    Attributes:
        tokens: without padding; 0 in a plan and in targets.
        scored_tokens: positions that a teacher scored (in a plan: that it is to score).
    """

    index: int
    file: str
    rows: int
    tokens: int
    scored_tokens: int
    bytes: int
    sha256: str
    entropy_sum: float


@dataclass(frozen=True)
class Manifest:
    """A finished shard directory.

    Attributes:
        kind: ``sequences`` (tokens, and scores if a teacher was there), ``plan`` or ``targets`` (``shards.masks``).
        special_ids: by role; ``special_token_ids`` are all ids that are never masked.
        context, passes, top_k, temperatures: of the teacher; None, None, 0, () without one.
        masks: of a plan and its targets: ``source``, ``policy``, ``variants`` and ``positions`` (K).
        sequences_hash: what the tokens are; equal in a shard directory and the plans and targets made for it.
        planned_shards: shards of the run; ``shards`` lacks those in ``failed``, which says why.
    """

    uri: str
    kind: str
    sequence_length: int
    vocab_size: int
    special_ids: dict[str, int]
    special_token_ids: list[int]
    scored: bool
    top_k: int
    temperatures: list[float]
    context: str | None
    passes: int | None
    teacher: str | None
    masks: dict[str, Any] | None
    sequences_hash: str
    fingerprint: dict[str, Any]
    fingerprint_hash: str
    tokenizer_hash: str
    planned_shards: int
    shards: list[ShardEntry]
    failed: dict[str, str]
    totals: dict[str, Any]

    def shard_uri(self, entry: ShardEntry) -> str:
        return storage.join(self.uri, entry.file)


def record_file(index: int) -> str:
    """``part-00000.json``: its record, in ``_records/``."""
    return f"part-{index:05d}.json"


def run_uri(directory: str) -> str:
    """Where a run leaves its fingerprint and number of shards before the first shard."""
    return storage.join(directory, "_records", "run.json")


def manifest_uri(directory: str) -> str:
    return storage.join(directory, "manifest.json")


MADE_BY = {"sequences": "pipeline/score.py", "plan": "train/plan.py", "targets": "pipeline/score.py --masks"}


def read_manifest(uri: str, kind: str = "sequences") -> Manifest:
    """Open a finished shard directory.

    Raises:
        UsageError: no such directory, an unfinished run, an unreadable manifest, another schema version, another kind,
            or a file name that is not a plain shard name.
    """
    try:
        fields = storage.read_json(manifest_uri(uri))
    except FileNotFoundError:
        raise UsageError(_why_no_manifest(uri, kind)) from None
    except ValueError:
        raise UsageError(f"{manifest_uri(uri)} is not valid JSON; finish or repeat the scoring run") from None
    try:
        if fields["schema_version"] != SCHEMA_VERSION:
            raise UsageError(
                f"{uri} has shard schema version {fields['schema_version']}, this program reads {SCHEMA_VERSION}; "
                "score the corpus again"
            )
        fields["shards"] = [entry_of(entry) for entry in fields["shards"]]
        names = Manifest.__dataclass_fields__.keys() - {"uri"}
        manifest = Manifest(uri=uri, **{name: fields[name] for name in names})
        _check_types(manifest)
    except (KeyError, TypeError) as error:
        raise UsageError(f"{manifest_uri(uri)} is no shard manifest ({error}); score the corpus again") from None
    if manifest.kind != kind:
        raise UsageError(f"{uri} holds {manifest.kind}, not {kind}; name a directory made by {MADE_BY[kind]}")
    for entry in manifest.shards:
        if not re.fullmatch(r"part-\d{5,}\.parquet", str(entry.file)):
            raise UsageError(
                f"{manifest_uri(uri)} names the file {entry.file!r}; only part-NNNNN.parquet in its directory is read"
            )
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Raises TypeError or KeyError for a manifest that no program of this project wrote."""
    for kind, parts in ((Manifest, [manifest]), (ShardEntry, manifest.shards)):
        for name, hint in get_type_hints(kind).items():
            hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            plain = tuple((int, float) if each is float else get_origin(each) or each for each in hints)
            for part in parts:
                if not isinstance(value := getattr(part, name), plain):
                    raise TypeError(f"{name} is {str(value)[:40]!r}")
    for role in ("pad", "cls", "sep", "mask"):
        if not isinstance(token := manifest.special_ids[role], int):
            raise TypeError(f"the {role} token is {token!r}")


def entry_of(record: dict[str, Any]) -> ShardEntry:
    return ShardEntry(**{name: record[name] for name in ShardEntry.__dataclass_fields__})


def _why_no_manifest(uri: str, kind: str) -> str:
    try:
        total = storage.read_json(run_uri(uri))["shards"]
    except (FileNotFoundError, ValueError, KeyError):
        return f"{uri} is no shard directory (it has no manifest.json); make one with {MADE_BY[kind]}"
    done = sum(info.base_name.startswith("part-") for info in storage.list_files(storage.join(uri, "_records")))
    return f"{uri} is unfinished ({done} of {total} shards); run the same {MADE_BY[kind]} command again to finish it"


def check_shards(manifest: Manifest, contents: bool = True) -> None:
    """Before shards are read: they are all there, and every byte is what was committed.

    Each shard of the run is named or known to have failed; each file has the manifest's size, SHA-256 and rows; its
    record says what the manifest says (a copy may do without ``_records/``); the tokenizer is the one that made the
    ids. Every byte is read once, by several threads: about a second a GB, or as long as a store takes to send it.

    Args:
        contents: False, where somebody has checked them already, looks at nothing that takes longer the more shards
            there are than a list of their names and sizes, and at the tokenizer.

    Raises:
        UsageError: names the first file that is missing, damaged, swapped, edited or not to be read.
    """
    program = MADE_BY[manifest.kind]
    try:
        if fault := next(_shard_faults(manifest, contents), None):
            raise UsageError(f"{fault}; delete its record in _records/ and run {program} again")
        if fault := tokenizer_fault(manifest):
            raise UsageError(
                f"{storage.join(manifest.uri, 'tokenizer')} {fault}; put back the one that made the shards"
            )
    except PermissionError as error:
        raise UsageError(f"{manifest.uri} may not be read ({error}); allow this user to read it") from None


def _shard_faults(manifest: Manifest, contents: bool) -> Iterator[str]:
    """What is wrong with the shards, the quickest checks first. Raises PermissionError."""
    for index in missing_shards(manifest):
        yield f"{manifest_uri(manifest.uri)} lacks {shard_file(index)}"
    sizes = {info.base_name: info.size for info in storage.list_files(manifest.uri)}
    for entry in manifest.shards:
        if entry.file not in sizes:
            yield f"{manifest.shard_uri(entry)} is missing"
        elif sizes[entry.file] != entry.bytes:
            yield f"{manifest.shard_uri(entry)} has {sizes[entry.file]} bytes, its manifest says {entry.bytes}"
    if not contents:
        return
    recorded = has_records(manifest.uri)
    with ThreadPoolExecutor(READERS) as pool:
        yield from filter(None, pool.map(lambda entry: _content_fault(manifest, entry, recorded), manifest.shards))


def _content_fault(manifest: Manifest, entry: ShardEntry, recorded: bool) -> str | None:
    uri = manifest.shard_uri(entry)
    try:
        if recorded:
            record = storage.read_json(storage.join(manifest.uri, "_records", record_file(entry.index)))
            if differing := record_differences(manifest, entry, record):
                return f"the manifest and the record of {uri} differ in {', '.join(differing)}"
    except (FileNotFoundError, ValueError):
        return f"the record of {uri} is missing or unreadable"
    try:
        if storage.sha256(uri) != entry.sha256:
            return f"{uri} is not the file that was committed (its SHA-256 is another)"
        if (rows := footer_rows(uri)) != entry.rows:
            return f"{uri} has {rows} rows, its manifest says {entry.rows}"
    except PermissionError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        return f"{uri} cannot be read ({' '.join(str(error).split())[:200]})"
    return None


def has_records(directory: str) -> bool:
    """Whether the records of the shards are there: people copy shards without them."""
    return any(info.base_name.startswith("part-") for info in storage.list_files(storage.join(directory, "_records")))


def missing_shards(manifest: Manifest) -> list[int]:
    """Shards of the run that the manifest neither holds nor names as failed."""
    known = {entry.file for entry in manifest.shards} | manifest.failed.keys()
    return [index for index in range(manifest.planned_shards) if shard_file(index) not in known]


def record_differences(manifest: Manifest, entry: ShardEntry, record: Any) -> list[str]:
    """Names of what a shard's record says otherwise than the manifest."""
    expected = asdict(entry) | {"fingerprint_hash": manifest.fingerprint_hash}
    given = record if isinstance(record, dict) else {}
    return [name for name, value in expected.items() if given.get(name) != value]


def tokenizer_fault(manifest: Manifest) -> str | None:
    """What is wrong with ``tokenizer/``; a plan may do without one. Raises PermissionError."""
    if manifest.kind == "plan" and not storage.exists(storage.join(manifest.uri, "tokenizer")):
        return None
    try:
        found = tokenizer_hash(load_tokenizer(manifest.uri))
    except PermissionError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        return f"cannot be loaded ({' '.join(str(error).split())[:200]})"
    return None if found == manifest.tokenizer_hash else "is not the tokenizer that made the ids"


def load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """The tokenizer that made the shards in ``directory``."""
    from transformers import AutoTokenizer  # takes seconds, and most readers of shards need none

    with tempfile.TemporaryDirectory() as temporary:
        copy_tokenizer(directory, Path(temporary))
        return AutoTokenizer.from_pretrained(temporary)


def copy_tokenizer(directory: str, destination: Path) -> None:
    """Copy the tokenizer's files of a shard directory to a local directory, unchanged."""
    destination.mkdir(parents=True, exist_ok=True)
    source = storage.join(directory, "tokenizer")
    for info in storage.list_files(source):
        (destination / info.base_name).write_bytes(storage.read_bytes(storage.join(source, info.base_name)))


def sequences_hash(fingerprint: dict[str, Any]) -> str:
    """What decides the tokens of a run, whether they came from text or from a shard directory."""
    corpus = fingerprint["corpus"]
    tokens = [corpus.get("sequences", corpus), fingerprint["tokenizer"], fingerprint["sequence_length"]]
    return storage.sha256_json(tokens)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the special tokens by role (pad, cls, sep, mask, unk), those that the tokenizer has."""
    roles = ("pad", "cls", "sep", "mask", "unk")
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in roles}
    return {role: token for role, token in ids.items() if token is not None}


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what token ids mean: the vocabulary and the special ids. Equal hashes can share shards."""
    return storage.sha256_json([tokenizer.get_vocab(), special_ids(tokenizer)])


def read_table(
    manifest: Manifest, entry: ShardEntry, columns: list[str], row_groups: list[int] | None = None
) -> pa.Table:
    """Columns of one shard, all of it or some row groups (each of ``ROW_GROUP`` rows, the last one shorter)."""
    filesystem, path = storage.resolve(manifest.shard_uri(entry))
    # a store is asked for all columns at once
    with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=storage.is_remote(manifest.uri)) as file:
        if row_groups is None:
            row_groups = list(range(file.num_row_groups))
        # one thread: readers are loader workers, which are parallel already and may be forks
        return file.read_row_groups(row_groups, columns=columns, use_threads=False)
