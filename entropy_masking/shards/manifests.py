"""Opening a shard directory: its manifest, the run that it belongs to, and its tokenizer.

Readers trust the manifest only, so stray or late files in the directory are harmless. See docs/shards.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from entropy_masking import storage
from entropy_masking.errors import UsageError
from entropy_masking.shards import costs
from entropy_masking.shards.fields import first_fault, from_fingerprint
from entropy_masking.shards.schema import JsonFile, Manifest, OtherVersion, Run, ShardEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MADE_BY = {"sequences": "pipeline/score.py", "targets": "pipeline/score.py --mask-source"}
AnyFile = TypeVar("AnyFile", bound=JsonFile)
T = TypeVar("T")

SAMPLED = 16


def manifest_uri(directory: str) -> str:
    return storage.join(directory, "manifest.json")


def run_uri(directory: str) -> str:
    return storage.join(directory, "_records", "run.json")


def record_file(index: int) -> str:
    """``_records/part-00000.json``."""
    return f"_records/part-{index:05d}.json"


def record_files(directory: str) -> list[str]:
    """The existing records. A copy of the shards may have none."""
    names = [info.base_name for info in storage.list_files(storage.join(directory, "_records"))]
    return [f"_records/{name}" for name in names if name.startswith("part-")]


def read_json_file(kind: type[AnyFile], uri: str) -> AnyFile | None:
    """The JSON file at ``uri``; None if there is none. Raises UsageError if its content is wrong."""
    try:
        return kind.model_validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        if isinstance(cause := error.errors()[0].get("ctx", {}).get("error"), OtherVersion):
            raise UsageError(f"{uri} cannot be read: {cause}; make the directory again, under another name") from None
        title = kind.model_config["title"]
        problem = f"{uri} cannot be read: it is not a {title} ({first_fault(error)})"
        raise UsageError(f"{problem}; restore it or make it again") from None


def find_manifest(uri: str) -> Manifest | None:
    """The manifest of a directory of any kind; None if no run has ended there. Raises UsageError if it is broken."""
    manifest = read_json_file(Manifest, manifest_uri(uri))
    return manifest and manifest.model_copy(update={"uri": uri})


def read_manifest(uri: str, kind: str = "sequences") -> Manifest:
    """Open a finished shard directory.

    Raises UsageError if it does not exist or is unfinished, or if its manifest is broken, of another version or kind.
    """
    if manifest := find_manifest(uri):
        if manifest.kind != kind:
            raise UsageError(f"{uri} holds {manifest.kind}, not {kind}; name a directory made by {MADE_BY[kind]}")
        return manifest
    if run := read_json_file(Run, run_uri(uri)):
        done = f"{len(record_files(uri))} of {run.shards} shards"
        raise UsageError(f"{uri} is unfinished ({done}); run the same {MADE_BY[kind]} command again to finish it")
    missing = "has no manifest.json" if storage.exists(uri) else "does not exist"
    raise UsageError(f"{uri} is not a shard directory (it {missing}); make one with {MADE_BY[kind]}")


def read_table(
    manifest: Manifest, entry: ShardEntry, columns: list[str], row_groups: list[int] | None = None
) -> pa.Table:
    """Columns of one shard, of all or of some row groups (of ``ROW_GROUP`` rows each; the last may be shorter)."""
    filesystem, path = storage.resolve(manifest.shard_uri(entry))
    # request all columns from an object store at once
    with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=storage.is_remote(manifest.uri)) as file:
        if row_groups is None:
            row_groups = list(range(file.num_row_groups))
        # one thread: loader workers call this, which run in parallel already and may be forks
        return file.read_row_groups(row_groups, columns=columns, use_threads=False)


def sampled(shards: list[T]) -> list[T]:
    """At most ``SAMPLED`` shards, evenly spread; the first row group of each is enough for statistics."""
    return shards[:: max(1, len(shards) // SAMPLED)][:SAMPLED]


def shard_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """The tokenizer that made the shards in ``directory``. Raises ValueError if it needs code of its own."""
    from transformers import AutoTokenizer  # takes seconds, and most readers of shards need none

    with tempfile.TemporaryDirectory() as temporary:
        copy_tokenizer(directory, Path(temporary))
        try:
            return AutoTokenizer.from_pretrained(temporary, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise ValueError("it brings its own code") from None
            raise


def copy_tokenizer(directory: str, destination: Path) -> None:
    """Copy the tokenizer's files of a shard directory to a local directory, unchanged.

    Raises UsageError if one is a link to a file elsewhere: it might be a secret, and the copy might be published.
    """
    destination.mkdir(parents=True, exist_ok=True)
    source = storage.join(directory, "tokenizer")
    if not storage.is_remote(directory):
        storage.check_links(Path(storage.absolute(source)), within=Path(storage.absolute(directory)))
    for info in storage.list_files(source):
        (destination / info.base_name).write_bytes(storage.read_bytes(storage.join(source, info.base_name)))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the tokenizer's special tokens by role (pad, cls, sep, mask, unk)."""
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("pad", "cls", "sep", "mask", "unk")}
    return {role: token for role, token in ids.items() if token is not None}


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The greatest id + 1. ``len(tokenizer)`` is less if ids have gaps, as after a line that vocab.txt has twice."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the meaning of token ids: the vocabulary and the special ids."""
    return storage.sha256_json([tokenizer.get_vocab(), special_ids(tokenizer)])


def tokenization_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the conversion of text to ids: the fast tokenizer's whole definition without truncation and padding."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return storage.sha256_json([definition | {"truncation": None, "padding": None}, tokenizer_hash(tokenizer)])


def new_manifest(
    uri: str,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    teacher: str | None = None,
    failed: dict[str, str] | None = None,
    versions: dict[str, str] | None = None,
) -> Manifest:
    """The manifest of a scoring run without shards, from its fingerprint and its tokenizer.

    Args:
        teacher: its path or Hub id; the fingerprint has only the hash of its weights.
        failed: by file, why the corpus lacks shards.
        versions: by package, of those that make the shards.
    """
    return Manifest.model_construct(  # not validated: it has no shards yet
        uri=uri,
        teacher=teacher,
        fingerprint=run.fingerprint,
        fingerprint_hash=run.fingerprint_hash,
        planned_shards=run.shards,
        shards=[],
        failed=failed or {},
        totals=costs.totals([]),
        versions=versions or {},
        **from_fingerprint(run.fingerprint),
        **from_tokenizer(tokenizer),
    )


def from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of a manifest that its tokenizer determines."""
    return {
        "vocab_size": vocabulary_size(tokenizer),
        "special_ids": special_ids(tokenizer),
        "special_token_ids": sorted(set(tokenizer.all_special_ids)),
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }
