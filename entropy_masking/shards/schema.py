"""The JSON files of a shard directory, with fields in the order of the files. See docs/shards.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from entropy_masking import storage
from entropy_masking.shards import fields
from entropy_masking.shards.fields import STRICT, Count, Fingerprint, Index, Masks, Sum, Totals, from_fingerprint
from entropy_masking.shards.parquet import ROW_GROUP, SCHEMA_VERSION, shard_file

ROW_GROUP_BYTES = 64  # a row group takes more than this in the footer of its file
NATS = 100.0  # no vocabulary has e^100 tokens


def _check_time(text: str) -> str:
    try:
        datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError("it is not a time") from None
    return text


class OtherVersion(ValueError):
    """The format has another version."""


def _check_version(version: object) -> int:
    if version != SCHEMA_VERSION:
        named = f"its format has version {repr(version)[:40]}"  # of a run, it may be anything
        raise OtherVersion(f"{named}, but this program reads version {SCHEMA_VERSION}")
    return SCHEMA_VERSION


class JsonFile(BaseModel):
    """A JSON file, or an object in one. Messages use the title. An unknown field is an error, like a wrong type."""

    model_config = {**STRICT, "extra": "forbid", "frozen": True}


class Run(JsonFile, title="record of a run"):
    """``_records/run.json``, written first: the run to which a directory belongs."""

    fingerprint: Fingerprint
    shards: Annotated[int, Field(ge=0, le=1 << 31)]  # planned

    @model_validator(mode="after")
    def _is_readable(self) -> Self:
        _check_version(self.fingerprint.get("schema_version", SCHEMA_VERSION))
        return self

    @cached_property
    def fingerprint_hash(self) -> str:
        return storage.sha256_json(self.fingerprint)

    def has_made(self, record: Record) -> bool:
        """Whether a record can be of this run."""
        fits = record.index < self.shards and record.fits_length(self.fingerprint["sequence_length"])
        return fits and record.fingerprint_hash == self.fingerprint_hash


class Attempt(JsonFile, title="record of an attempt"):
    """``_attempts/part-00000.json``: a worker has begun a shard, for the ``attempts``-th time in this run."""

    run: str
    attempts: Count


class ShardEntry(JsonFile):
    """One committed shard, as in the manifest."""

    index: Index
    file: str
    rows: Count
    tokens: Count  # without padding; 0 in targets
    scored_tokens: Count  # positions with scores
    bytes: Count
    sha256: str
    entropy_sum: Sum  # of the scored tokens, in nats

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.file != shard_file(self.index):
            raise ValueError(f"the file of shard {self.index} is {shard_file(self.index)}, not {self.file!r}")
        if self.row_groups * ROW_GROUP_BYTES > self.bytes:
            raise ValueError(f"{self.file} cannot hold {self.rows} rows in {self.bytes} bytes")
        if abs(self.entropy_sum) > NATS * self.scored_tokens:
            raise ValueError(f"the entropies of {self.file} do not fit its scored tokens")
        return self

    def fits_length(self, length: int) -> bool:
        """Whether the rows can hold so many tokens."""
        return max(self.tokens, self.scored_tokens) <= self.rows * length

    @property
    def row_groups(self) -> int:
        """Row groups of sequences; a file of targets has one for each variant of these."""
        return math.ceil(self.rows / ROW_GROUP)


class Rejected(JsonFile):
    """The documents of a shard that were not used."""

    count: Count
    reasons: dict[str, Count]
    listed: list[dict[str, object]]  # the first hundred


class Record(ShardEntry, title="record of a shard"):
    """``_records/part-00000.json``, written after its shard: the shard's entry in the manifest, and its costs."""

    fingerprint_hash: str
    attempt: Count
    forward_seconds: fields.Seconds  # inside the model
    flops: fields.Flops
    batch_tokens: Count | None = None  # only if the memory required smaller batches
    device: str
    worker: str
    documents: Count
    longest_document: Count | None = None  # its tokens; None without documents
    rejected: Rejected
    seconds: fields.Seconds  # from the first work on the shard until ``finished_at``
    finished_at: Annotated[str, AfterValidator(_check_time)]

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
    """``manifest.json``, written last: a finished shard directory. Its values fit each other."""

    uri: str = Field("", exclude=True)  # the directory; not in the file
    schema_version: Annotated[int, AfterValidator(_check_version)] = SCHEMA_VERSION
    kind: Literal["sequences", "targets"]  # tokens, with scores if there was a teacher; or targets (``shards.targets``)
    sequence_length: fields.Length
    vocab_size: fields.VocabSize
    special_ids: dict[str, fields.TokenId]  # by role
    special_token_ids: list[fields.TokenId]  # all ids that are never masked
    scored: bool
    top_k: Count  # of the teacher, like the next five fields; 0 without a teacher
    sampled: bool  # the tokens of a position are a sample of ``top_k`` tokens, with weights (``entropy.sample``)
    temperatures: list[fields.Temperature]
    context: str | None
    passes: int | None
    teacher: str | None
    masks: Masks | None
    sequences_hash: str  # of everything that determines the tokens; sequences and their targets have the same
    fingerprint: Fingerprint
    fingerprint_hash: str
    tokenizer_hash: str
    planned_shards: Index
    shards: list[ShardEntry]
    failed: dict[str, str]  # planned shards that are not in ``shards``, and why
    totals: Totals
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for fault in (*self._vocabulary_faults(), *self._fingerprint_faults(), *self._shard_faults()):
            raise ValueError(fault)
        return self

    def _vocabulary_faults(self) -> Iterator[str]:
        if missing := {"pad", "cls", "sep", "mask"} - self.special_ids.keys():
            yield f"special_ids has no {', '.join(sorted(missing))} token"
        special = {*self.special_token_ids, *self.special_ids.values()}
        if max(special, default=0) >= self.vocab_size:
            yield f"the special token {max(special)} is outside the vocabulary of {self.vocab_size} tokens"
        if len(special) >= self.vocab_size:
            yield "all tokens of the vocabulary are special"
        if not {*self.special_ids.values()} <= {*self.special_token_ids}:
            yield "special_token_ids lacks one of special_ids"
        if self.top_k > self.vocab_size:
            yield f"the top {self.top_k} of a vocabulary of {self.vocab_size} tokens do not exist"

    def _fingerprint_faults(self) -> Iterator[str]:
        if storage.sha256_json(self.fingerprint) != self.fingerprint_hash:
            yield "its fingerprint_hash is not the hash of its fingerprint"
        expected = from_fingerprint(self.fingerprint)
        if not self.top_k:  # a control of the screen may have dropped them
            expected |= {"top_k": 0, "temperatures": self.temperatures}
        if differing := [name for name, value in expected.items() if getattr(self, name) != value]:
            yield f"it does not match its fingerprint in {', '.join(differing)}"

    def _shard_faults(self) -> Iterator[str]:
        if not any(entry.rows for entry in self.shards):
            yield "its shards have no rows"
        if any(one.index >= other.index for one, other in pairwise(self.shards)):
            yield "it does not list each shard once and in order"
        if wrong := [entry.file for entry in self.shards if not entry.fits_length(self.sequence_length)]:
            yield f"{wrong[0]} has more tokens than its rows can hold"
        known = {entry.file for entry in self.shards} | self.failed.keys()
        # planned_shards may be huge, so the loop ends at the first file that is not known
        if missing := next((file for file in map(shard_file, range(self.planned_shards)) if file not in known), None):
            yield f"it neither lists {missing} nor names it as failed"
        if len(known) != self.planned_shards or len(known) != len(self.shards) + len(self.failed):
            yield f"it names other shards than the {self.planned_shards} that were planned"
        names = {"sequences": "rows", **{name: name for name in ("tokens", "scored_tokens", "bytes", "entropy_sum")}}
        for name, field in names.items():
            found = sum(getattr(entry, field) for entry in self.shards)
            if not math.isclose(self.totals[name], found, rel_tol=1e-9, abs_tol=1e-6):
                yield f"its total of {name} is {self.totals[name]}, but its shards have {found}"

    def entry(self, index: int) -> ShardEntry:
        return next(entry for entry in self.shards if entry.index == index)

    def shard_uri(self, entry: ShardEntry) -> str:
        return storage.join(self.uri, entry.file)
