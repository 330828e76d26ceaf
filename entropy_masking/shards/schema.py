"""The JSON files of a shard directory as models, their fields in the order of the files. See docs/shards.md."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from entropy_masking import storage
from entropy_masking.shards.parquet import SCHEMA_VERSION, shard_file


def _check_file(file: str) -> str:
    if not re.fullmatch(r"part-\d{5,}\.parquet", file):
        raise ValueError(f"{file!r} is not read, only part-NNNNN.parquet in its directory")
    return file


def _check_special_ids(special_ids: dict[str, int]) -> dict[str, int]:
    if missing := {"pad", "cls", "sep", "mask"} - special_ids.keys():
        raise ValueError(f"it has no {', '.join(sorted(missing))} token")
    return special_ids


class Model(BaseModel):
    """A file, or a part of one. A wrong type, a missing or an unknown field raises a ValidationError."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Run(Model):
    """``_records/run.json``, written first: all that decides the bytes of the shards, and how many are planned."""

    fingerprint: dict[str, Any]
    shards: int


class Attempt(Model):
    """``_attempts/part-00000.json``: a worker has begun a shard, for the ``attempts``-th time in this run."""

    run: str
    attempts: int
    by_itself: bool = False


class ShardEntry(Model):
    """One committed shard, as the manifest names it.

    Attributes:
        tokens: without padding; 0 in a plan and in targets.
        scored_tokens: positions that a teacher scored (in a plan: that it is to score).
        entropy_sum: of their predictive entropies, in nats.
    """

    index: int
    file: Annotated[str, AfterValidator(_check_file)]
    rows: int
    tokens: int
    scored_tokens: int
    bytes: int
    sha256: str
    entropy_sum: float


class Rejected(Model):
    """The documents of a shard that were not used: how many, for which reasons, and the first hundred of them."""

    count: int
    reasons: dict[str, int]
    listed: list[dict[str, Any]]


class Record(ShardEntry):
    """``_records/part-00000.json``, written after its shard: what the manifest says of it, and what it cost.

    Attributes:
        forward_seconds: inside the model; ``seconds`` are those from the first work on the shard to ``finished_at``.
        batch_tokens: only where memory asked for smaller batches.
    """

    fingerprint_hash: str
    attempt: int
    forward_seconds: float
    flops: int
    batch_tokens: int | None = None
    device: str
    worker: str
    documents: int
    rejected: Rejected
    seconds: float
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
        """The work of a shard. Plans and targets hold no tokens of their own: there it is counted in positions."""
        return self.tokens or self.scored_tokens

    def to_json(self) -> dict[str, Any]:
        """The fields in the order of the file, where name, size and hash come first."""
        fields = self.model_dump(exclude_none=True)
        return {name: fields[name] for name in ("index", "file", "bytes", "sha256")} | fields


class Manifest(Model):
    """``manifest.json``, written last: a finished shard directory.

    Attributes:
        uri: the directory; not in the file.
        kind: ``sequences`` (tokens, and scores if a teacher was there), ``plan`` or ``targets`` (``shards.masks``).
        special_ids: by role; ``special_token_ids`` are all ids that are never masked.
        context, passes, top_k, temperatures: of the teacher; None, None, 0, [] without one.
        masks: of a plan and its targets: ``source``, ``policy``, ``variants`` and ``positions`` (K).
        sequences_hash: what the tokens are; equal in a shard directory and the plans and targets made for it.
        planned_shards: shards of the run; ``shards`` lacks those in ``failed``, which says why.
    """

    uri: str = Field("", exclude=True)
    schema_version: Literal[2] = SCHEMA_VERSION
    kind: Literal["sequences", "plan", "targets"]
    sequence_length: int
    vocab_size: int
    special_ids: Annotated[dict[str, int], AfterValidator(_check_special_ids)]
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
    versions: dict[str, str] = {}

    def shard_uri(self, entry: ShardEntry) -> str:
        return storage.join(self.uri, entry.file)

    def missing_shards(self) -> list[int]:
        """Shards of the run that the manifest neither holds nor names as failed."""
        known = {entry.file for entry in self.shards} | self.failed.keys()
        return [index for index in range(self.planned_shards) if shard_file(index) not in known]
