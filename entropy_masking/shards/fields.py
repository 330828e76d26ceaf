"""The numbers and dictionaries in the JSON files of a shard directory: their types, their ranges, and what must agree.

Somebody else may have written such a file. In these ranges no sum, product, time or memory overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from entropy_masking import storage
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.text import single_line

T = TypeVar("T")

Count = Annotated[int, Field(ge=0, le=1 << 53)]
Flops = Annotated[int, Field(ge=0, le=10**30)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Index = Annotated[int, Field(ge=0, lt=1 << 31)]
Length = Annotated[int, Field(ge=3, le=1 << 20)]  # [CLS], a token and [SEP]
VocabSize = Annotated[int, Field(ge=1, le=1 << 24)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]
Sum = Annotated[float, Field(ge=-1e15, le=1e15)]  # of nats
Temperature = Annotated[float, Field(gt=0, le=1e6)]

STRICT: ConfigDict = {"strict": True, "allow_inf_nan": False}
CheckedPolicy: Any = checked_dataclass(MaskPolicy, frozen=True, config={**STRICT, "extra": "forbid"})


def first_fault(error: ValidationError) -> str:
    """The first fault of a JSON file in words: where it is, and what is wrong."""
    fault = error.errors()[0]
    return single_line(" ".join([*map(str, fault["loc"]), fault["msg"].removeprefix("Value error, ")]))[:300]


def valid(kind: Callable[..., T], values: dict[str, Any]) -> T:
    """``kind(**values)``. Raises ValueError with one fault, for the validator of a larger model."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None


class _Part(BaseModel):
    """A dictionary that may have other fields too, such as those of other versions."""

    model_config = STRICT


class _Corpus(_Part):
    sequences: _Corpus | None = None  # of a shard directory: the corpus that its tokens come from
    files: dict[str, str] = {}  # content hashes


class _Masks(_Part):
    source: str
    policy: dict[str, Any]
    variants: Annotated[int, Field(ge=1, le=1 << 16)]
    positions: int


class _Fingerprint(_Part):
    corpus: _Corpus
    tokenizer: str
    sequence_length: Length
    teacher: str | None = None
    top_k: Count = 0
    sampled: bool = False
    temperatures: list[Temperature] = []
    context: str | None = None
    passes: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    batch_tokens: Annotated[int, Field(ge=1, le=1 << 53)] | None = None
    masks: _Masks | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.teacher is None and (self.top_k or self.temperatures):
            raise ValueError("it has a top k or temperatures, but no teacher")
        if self.teacher is not None and None in (self.dtype, self.batch_tokens):
            raise ValueError("it has a teacher, but no dtype or no batch_tokens")
        if self.sampled and not (self.masks and self.top_k and self.temperatures == [1]):
            raise ValueError("sampled targets need masks, a top_k above 0 and temperatures [1]")
        if self.masks:
            positions = valid(CheckedPolicy, self.masks.policy).max_masked(self.sequence_length)
            if self.masks.positions != positions:
                raise ValueError(f"its masks have {self.masks.positions} positions, but their policy {positions}")
        return self


class _Totals(_Part):
    """See ``costs.totals``."""

    sequences: Count
    tokens: Count
    scored_tokens: Count
    bytes: Count
    documents: Count
    longest_document: Count = 0
    rejected: Count
    rejected_reasons: dict[str, Count]
    flops: Flops
    entropy_sum: Sum
    workers: Count
    seconds: Seconds
    worker_seconds: Seconds
    forward_seconds: Seconds
    utilisation: Seconds
    rescued_shards: Count


# Models check these dictionaries, but return them unchanged, because they are hashed (``valid`` raises, or returns a
# model). A fingerprint is everything that determines the bytes of the shards.
Fingerprint = Annotated[dict[str, Any], AfterValidator(lambda values: valid(_Fingerprint, values) and values)]
Totals = Annotated[dict[str, Any], AfterValidator(lambda values: valid(_Totals, values) and values)]
Masks = dict[str, Any]  # of targets: source, policy, variants and positions (K), as in the fingerprint


def from_fingerprint(fingerprint: Fingerprint) -> dict[str, Any]:
    """The fields of a manifest that its fingerprint determines."""
    return {
        "kind": "targets" if fingerprint.get("masks") else "sequences",
        "sequence_length": fingerprint["sequence_length"],
        "scored": fingerprint.get("teacher") is not None,
        "top_k": fingerprint.get("top_k", 0),
        "sampled": fingerprint.get("sampled", False),
        "temperatures": fingerprint.get("temperatures", []),
        "context": fingerprint.get("context"),
        "passes": fingerprint.get("passes"),
        "masks": fingerprint.get("masks"),
        "sequences_hash": sequences_hash(fingerprint),
    }


def sequences_hash(fingerprint: Fingerprint) -> str:
    """Hash of everything that determines the tokens of a run, whether they come from text or from a shard directory."""
    corpus = fingerprint["corpus"]
    tokens = [corpus.get("sequences") or corpus, fingerprint["tokenizer"], fingerprint["sequence_length"]]
    return storage.sha256_json(tokens)
