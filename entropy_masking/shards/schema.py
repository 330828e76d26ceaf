"""The JSON files of a shard directory, with fields in the order of the files. See docs/shards.md."""

from __future__ import annotations

import math
import re
from datetime import datetime
from types import UnionType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from entropy_masking import storage
from entropy_masking.shards.parquet import ROW_GROUP, SCHEMA_VERSION


def _with(**kinds: type | UnionType) -> AfterValidator:
    """Refuses a dictionary in which one of these is missing or of another type."""

    def check(values: dict[str, Any]) -> dict[str, Any]:
        if wrong := [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]:
            raise ValueError(f"it has no valid {', '.join(wrong)}")
        return values

    return AfterValidator(check)


# everything that determines the bytes of the shards
Fingerprint = Annotated[dict[str, Any], _with(corpus=dict, tokenizer=str, sequence_length=int)]
# of targets; positions is K
Masks = Annotated[dict[str, Any], _with(source=str, policy=dict, variants=int, positions=int)]
_counts = ("sequences", "tokens", "scored_tokens", "bytes", "documents", "rejected", "flops", "workers")
_costs = ("entropy_sum", "seconds", "worker_seconds", "forward_seconds", "utilisation", "rescued_shards")
_numbers = dict.fromkeys((*_counts, *_costs), int | float)
Totals = Annotated[dict[str, Any], _with(**_numbers, rejected_reasons=dict)]  # see ``costs.totals``


def _check_file(file: str) -> str:
    if not re.fullmatch(r"part-\d{5,}\.parquet", file):
        raise ValueError(f"{file!r} is not a file name of the form part-NNNNN.parquet")
    return file


def _check_special_ids(special_ids: dict[str, int]) -> dict[str, int]:
    if missing := {"pad", "cls", "sep", "mask"} - special_ids.keys():
        raise ValueError(f"it has no {', '.join(sorted(missing))} token")
    return special_ids


class JsonFile(BaseModel):
    """A JSON file, or an object in one. Messages use the title. An unknown field is an error, like a wrong type."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def first_fault(error: ValidationError) -> str:
    """The first fault of a JSON file in words: where it is, and what is wrong."""
    fault = error.errors()[0]
    return " ".join([*map(str, fault["loc"]), fault["msg"].removeprefix("Value error, ")])


class Run(JsonFile, title="record of a run"):
    """``_records/run.json``, written first: the run to which a directory belongs."""

    fingerprint: Fingerprint
    shards: int  # planned

    @property
    def fingerprint_hash(self) -> str:
        return storage.sha256_json(self.fingerprint)


class Attempt(JsonFile, title="record of an attempt"):
    """``_attempts/part-00000.json``: a worker has begun a shard, for the ``attempts``-th time in this run."""

    run: str
    attempts: int


class ShardEntry(JsonFile):
    """One committed shard, as in the manifest."""

    index: int
    file: Annotated[str, AfterValidator(_check_file)]
    rows: int
    tokens: int  # without padding; 0 in targets
    scored_tokens: int  # positions with scores
    bytes: int
    sha256: str
    entropy_sum: float  # of the scored tokens, in nats

    @property
    def row_groups(self) -> int:
        """Row groups of sequences; a file of targets has one for each variant of these."""
        return math.ceil(self.rows / ROW_GROUP)


class Rejected(JsonFile):
    """The documents of a shard that were not used."""

    count: int
    reasons: dict[str, int]
    listed: list[dict[str, object]]  # the first hundred


class Record(ShardEntry, title="record of a shard"):
    """``_records/part-00000.json``, written after its shard: the shard's entry in the manifest, and its costs."""

    fingerprint_hash: str
    attempt: int
    forward_seconds: float  # inside the model
    flops: int
    batch_tokens: int | None = None  # only if the memory required smaller batches
    device: str
    worker: str
    documents: int
    longest_document: int | None = None  # its tokens; None without documents
    rejected: Rejected
    seconds: float  # from the first work on the shard until ``finished_at``
    finished_at: str

    @property
    def entry(self) -> ShardEntry:
        return ShardEntry(**{name: getattr(self, name) for name in ShardEntry.model_fields})

    @property
    def ended(self) -> float:
        """``finished_at`` in seconds of the epoch."""
        return datetime.fromisoformat(self.finished_at).timestamp()

    @property
    def tokens_or_positions(self) -> int:
        """The work of a shard: tokens, or positions for targets, which hold no tokens."""
        return self.tokens or self.scored_tokens

    def to_json(self) -> dict[str, object]:
        """The fields in the order of the file, in which name, size and hash come first."""
        fields = self.model_dump(exclude_none=True)
        return {name: fields[name] for name in ("index", "file", "bytes", "sha256")} | fields


class Manifest(JsonFile, title="shard manifest"):
    """``manifest.json``, written last: a finished shard directory."""

    uri: str = Field("", exclude=True)  # the directory; not in the file
    schema_version: Literal[2] = SCHEMA_VERSION
    kind: Literal["sequences", "targets"]  # tokens, with scores if there was a teacher; or targets (``shards.targets``)
    sequence_length: PositiveInt
    vocab_size: int
    special_ids: Annotated[dict[str, int], AfterValidator(_check_special_ids)]  # by role
    special_token_ids: list[int]  # all ids that are never masked
    scored: bool
    top_k: int  # of the teacher, like the next four fields; 0 without a teacher
    temperatures: list[float]
    context: str | None
    passes: int | None
    teacher: str | None
    masks: Masks | None
    sequences_hash: str  # of everything that determines the tokens; sequences and their targets have the same
    fingerprint: Fingerprint
    fingerprint_hash: str
    tokenizer_hash: str
    planned_shards: int
    shards: list[ShardEntry]
    failed: dict[str, str]  # planned shards that are not in ``shards``, and why
    totals: Totals
    versions: dict[str, str] = {}

    def entry(self, index: int) -> ShardEntry:
        return next(entry for entry in self.shards if entry.index == index)

    def shard_uri(self, entry: ShardEntry) -> str:
        return storage.join(self.uri, entry.file)
