"""A small scored shard directory, made without a model within a second."""

import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from entropy_masking.shards import commit, manifests, parquet
from entropy_masking.shards.schema import Manifest, Run

ROWS, LENGTH, VOCAB, TOP_K, SHARDS = 1100, 8, 24, 2, 2
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def tokenizer() -> PreTrainedTokenizerFast:
    names = [*SPECIAL.values(), "[MASK]", *(f"word{number}" for number in range(VOCAB - 5))]
    model = WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), mask_token="[MASK]", **SPECIAL)


def shard(manifest: Manifest, index: int, **changes: np.ndarray) -> tuple[bytes, dict[str, float]]:
    """The bytes of a shard, and the counts of its record. ``changes`` replace ids [N, L] or scores."""
    rng = np.random.default_rng(index)
    ids_NL = rng.integers(5, VOCAB, (ROWS, LENGTH))
    ids_NL[:, 0], ids_NL[:, -1] = 2, 3
    scored_NL = ids_NL > 4
    entropy_NL = np.where(scored_NL, rng.uniform(0.5, 3.0, ids_NL.shape), np.nan).astype(np.float32)
    topk_ids = np.where(scored_NL[..., None], np.arange(5, 5 + TOP_K), 0)
    logprobs = np.where(scored_NL[..., None], np.log([0.5, 0.25]), np.nan).astype(np.float32)
    columns = {"input_ids": ids_NL, "entropy": entropy_NL, "surprisal": entropy_NL}
    columns |= {"topk_ids": topk_ids, "topk_logprobs": logprobs, **changes}
    ids_NL = columns.pop("input_ids")
    table = parquet.to_table(manifest, index, ids_NL, columns)
    return parquet.to_parquet(parquet.row_groups(table)), parquet.counts(ids_NL, 0, columns)


def write_shards(directory: Path, **changes: np.ndarray) -> Path:
    """A finished directory of two shards of two row groups. ``changes`` are those of the second shard."""
    own = tokenizer()
    scoring = {"teacher": "0" * 64, "context": "masked", "passes": 2, "top_k": TOP_K, "temperatures": [1.0]}
    fingerprint = {
        **{"schema_version": 3, "corpus": {"files": {"1 text": "0"}}, "tokenizer": manifests.tokenization_hash(own)},
        **{"sequence_length": LENGTH, **scoring, "dtype": "float32", "batch_tokens": 64, "compile": False},
    }
    run = Run(fingerprint=fingerprint, shards=SHARDS)
    commit.begin_run(str(directory), run)
    commit.save_tokenizer(own, str(directory / "tokenizer"))
    empty, records = manifests.new_manifest(str(directory), run, own, teacher="teacher"), {}
    for index in range(SHARDS):
        data, counts = shard(empty, index, **changes if index else {})
        costs = {"attempt": 1, "forward_seconds": 0.5, "flops": 10, "device": "cpu", "worker": "host:1"}
        rejected = {"count": 0, "reasons": {}, "listed": []}
        fields = counts | costs | {"fingerprint_hash": run.fingerprint_hash, "documents": 9, "rejected": rejected}
        records[index] = commit.commit_shard(str(directory), index, data, fields, time.monotonic())
    commit.write_manifest(empty, records, {})
    return directory
