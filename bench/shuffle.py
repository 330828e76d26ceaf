"""The control of the screen: scores that say nothing about their tokens.

Shapes: N sequences, L tokens.
"""

import time

import numpy as np

from entropy_masking import storage
from entropy_masking.shards import commit, parquet
from entropy_masking.shards.manifests import read_manifest, shard_tokenizer
from entropy_masking.shards.read import read_rows
from entropy_masking.shards.schema import Run


def shuffle_scores(source: str, target: str) -> None:
    """A shard directory with the tokens of another and its scores shuffled within each row: a control."""
    manifest = read_manifest(source)
    without_top_k = {"top_k": 0, "temperatures": []}
    fingerprint = manifest.fingerprint | {"shuffled": manifest.fingerprint_hash, **without_top_k}
    run = Run(fingerprint=fingerprint, shards=manifest.planned_shards)
    changes = {"uri": target, "fingerprint": fingerprint, "fingerprint_hash": run.fingerprint_hash, **without_top_k}
    shuffled = manifest.model_copy(update=changes)
    commit.begin_run(target, run)
    commit.save_tokenizer(shard_tokenizer(source), storage.join(target, "tokenizer"))
    originals = commit.read_records(source)
    records = commit.done_records(target, run)
    for entry in [entry for entry in manifest.shards if entry.index not in records]:
        started, rng = time.monotonic(), np.random.default_rng(entry.index)
        rows = read_rows(manifest, entry, parquet.SCORE_COLUMNS)
        scored_NL = ~np.isnan(rows["entropy"])
        order = np.lexsort((rng.random(scored_NL.shape)[scored_NL], scored_NL.nonzero()[0]))  # by row, then at random
        for name in parquet.SCORE_COLUMNS:
            rows[name] = rows[name].copy()  # what is read of Arrow cannot be written to
            rows[name][scored_NL] = rows[name][scored_NL][order]
        scores = {name: rows[name] for name in parquet.SCORE_COLUMNS}
        shard = parquet.to_table(shuffled, entry.index, rows["input_ids"], scores)
        fields = originals[entry.index].model_dump() | {"fingerprint_hash": run.fingerprint_hash}
        data = parquet.to_parquet(parquet.row_groups(shard))
        records[entry.index] = commit.commit_shard(target, entry.index, data, fields, started)
    commit.write_manifest(shuffled, records, {})
