"""Targets that score.py makes with --mask-source: their masks, variants and files, and mistakes."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from harness import LENGTH, SCORE, refused
from in_process import MASKS, SEED, TOP_8, score_here

import pipeline.score
from entropy_masking.commands import console
from entropy_masking.errors import UsageError
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.shards import manifests, parquet
from entropy_masking.shards.read import masker_of, read_rows, to_tensors
from entropy_masking.shards.targets import input_crc32, rows_of
from pipeline.status import status, to_text


def small_targets(sequences: Path, teacher: Path, output: Path, *flags: object) -> manifests.Manifest:
    """The manifest of targets with one token at a position."""
    return manifests.read_manifest(str(score_here(sequences, teacher, output, "--top-k", 1, *flags)), kind="targets")


def progress(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The total and the count after each shard of the runs that follow."""
    shown = []

    class Noted(console.Progress):
        def advance(self, amount: int) -> None:
            super().advance(amount)
            shown.append((self.bar.total, self.bar.n))

    monkeypatch.setattr(console, "Progress", Noted)
    return shown


def test_targets_are_for_the_masks_of_a_run(sharp: Path, sharp_targets: Path) -> None:
    manifest = manifests.read_manifest(str(sharp_targets), kind="targets")
    sequences = manifests.read_manifest(str(sharp))
    policy = MaskPolicy.paper(ratio=0.3, temperature=1.0, seed=SEED)
    assert manifest.masks == {
        **{"source": "parquet", "policy": asdict(policy)},
        **{"variants": 4, "positions": policy.max_masked(LENGTH)},
    }
    assert manifest.sequences_hash == sequences.sequences_hash
    assert [entry.index for entry in manifest.shards] == [entry.index for entry in sequences.shards]
    masker = masker_of(sequences)
    for entry, whole in zip(manifest.shards, sequences.shards, strict=True):
        table = pq.read_table(sharp_targets / entry.file)
        assert table.schema == parquet.schema_of(manifest)
        rows, raw = rows_of(table, policy.max_masked(LENGTH)), read_rows(sequences, whole, ["entropy"])
        assert entry.rows == len(table) == 4 * whole.rows
        for variant in range(4):
            epoch = torch.full((whole.rows,), variant)
            batch = masker(to_tensors(raw) | {"epoch": epoch}, policy)
            own = rows.variant_N == variant
            np.testing.assert_array_equal(rows.sequence_id_N[own], raw["sequence_id"])
            np.testing.assert_array_equal(rows.positions_NK[own], batch["positions_BP"])
            np.testing.assert_array_equal(rows.crc32_N[own], input_crc32(batch["input_ids"].numpy()))


def test_a_row_group_is_one_variant_of_one_row_group_of_sequences(
    sharp: Path, sharp_teacher: Path, tmp_path: Path
) -> None:
    manifest = small_targets(sharp, sharp_teacher, tmp_path, "--mask-source", "random", "--variants", 3)
    for entry in manifest.shards:
        with pq.ParquetFile(tmp_path / entry.file) as file:
            assert file.num_row_groups == 3 * -(-entry.rows // (3 * parquet.ROW_GROUP))
            for group in range(file.num_row_groups):
                assert set(file.read_row_group(group)["variant"].to_pylist()) == {group % 3}


def test_there_are_as_many_variants_as_differ(sharp: Path, sharp_teacher: Path, tmp_path: Path) -> None:
    for name, flags, variants in (
        ("sorted", ["--mask-source", "parquet", "--recipe", "paper"], 1),
        ("share", ["--mask-source", "parquet"], 4),
        ("random", ["--mask-source", "random"], 4),
    ):
        manifest = small_targets(sharp, sharp_teacher, tmp_path / name, *flags)
        assert manifest.masks and manifest.masks["variants"] == variants
        json.loads((tmp_path / name / "manifest.json").read_text(), parse_constant=pytest.fail)  # no Infinity
    assert MaskPolicy(**manifest.masks["policy"]) == MaskPolicy.random(seed=42)


def test_an_interrupted_run_resumes(
    sharp: Path,
    sharp_targets: Path,
    sharp_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = (sharp, sharp_teacher, tmp_path / "targets", *MASKS, *TOP_8)
    original = pipeline.score.local_records

    def cut_short(job: Any, todo: list[Any]) -> Iterator[Any]:
        first, _ = original(job, todo[:2])  # a worker has committed the other one meanwhile
        yield first
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.score, "local_records", cut_short)
        score_here(*argv)
    shards = len(manifests.read_manifest(str(sharp)).shards)
    stopped, status_line = capsys.readouterr().err, to_text(status(str(tmp_path / "targets"), 0.0))
    assert f"stopped: 2 of {shards} shards are done" in stopped and f"unfinished, 2 of {shards} shards" in status_line
    with pytest.raises(UsageError, match=r"unfinished \(2 of \d+ shards\); run the same .*--mask-source"):
        manifests.read_manifest(str(tmp_path / "targets"), kind="targets")
    records = {path: path.read_text() for path in (tmp_path / "targets" / "_records").glob("part-*.json")}
    shown = progress(monkeypatch)
    resumed = manifests.read_manifest(str(score_here(*argv)), kind="targets")
    whole = manifests.read_manifest(str(sharp_targets), kind="targets")
    assert [entry.sha256 for entry in resumed.shards] == [entry.sha256 for entry in whole.shards]
    assert len(records) == 2 and all(path.read_text() == text for path, text in records.items())
    totals = [total for total, _ in shown]
    assert totals == sorted(totals, reverse=True) and shown[-1][0] == shown[-1][1], "it only falls, to what is done"
    with pytest.raises(UsageError, match=r"policy\.temperature: 1.0 → 2.0"):
        score_here(*argv, "--mask-temperature", 2)


def test_the_total_of_a_corpus_of_shards_is_known_from_the_start(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = progress(monkeypatch)
    again = ["--corpus", tokens, "--teacher", "none", "--output", tmp_path / "again", "--backend", "local"]
    pipeline.score.main([str(flag) for flag in again])
    manifest = manifests.read_manifest(str(tokens))
    assert [total for total, _ in shown] == [manifest.totals["tokens"]] * len(manifest.shards)


def test_a_shard_without_text_has_no_targets(work: Path, sharp_teacher: Path, tmp_path: Path) -> None:
    lines = (work / "corpus.jsonl").read_text().splitlines()[:40]
    for name, text in (("a", lines[:20]), ("b", ['{"text": ""}'] * 300), ("c", lines[20:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(text))
    corpus = ",".join(f"{tmp_path}/{name}.jsonl" for name in "abc")
    sizes = ["--sequence-length", LENGTH, "--shard-tokens", 500]
    directory = score_here(corpus, sharp_teacher, tmp_path / "scored", *sizes, "--passes", 2)
    targets = small_targets(directory, sharp_teacher, tmp_path / "targets", *MASKS)
    rows = {entry.index: 4 * entry.rows for entry in manifests.read_manifest(str(directory)).shards}
    assert {entry.index: entry.rows for entry in targets.shards} == rows and 0 in rows.values()


def test_mistakes_are_one_sentence(
    work: Path, sharp: Path, sharp_teacher: Path, sharp_targets: Path, tmp_path: Path
) -> None:
    random, masks = ["--mask-source", "random"], ["--mask-source", "parquet"]
    for corpus, flags, sentence in (
        (sharp, [*random, "--hard-share", 0.5], "--hard-share needs scores, and --mask-source random has none"),
        (sharp, [*masks, "--mask-warmup", 0.1], "--mask-warmup is not a flag of pipeline/score.py"),
        (sharp, [*masks, "--predict-ratio", 0.1], "--predict-ratio is not a flag of pipeline/score.py"),
        (sharp, [*masks, "--mask-by", "excess"], "invalid choice: 'excess'"),
        (sharp, [*masks, "--variants", 0], "--variants 0"),
        (sharp, [*masks, "--variants", 1 << 17], "--variants 131072"),
        (sharp, [*masks, "--mask-seed=-1"], "--mask-seed -1"),
        (sharp, ["--mask-ratio", 0.2], "--mask-ratio needs --mask-source"),
        (sharp, ["--variants", 2], "--variants needs --mask-source"),
        (sharp, [*masks, "--context", "masked"], "--mask-source says what the teacher sees; leave out --context"),
        (sharp, [*masks, "--passes", 3], "leave out --context and --passes"),
        (sharp, [*masks, "--top-k", 0], "set --top-k above 0"),
        (sharp, ["--sample-k", 8], "--sample-k needs --mask-source"),
        (sharp, [*masks, "--sample-k", 8, "--top-k", 8], "--sample-k replaces --top-k"),
        (sharp, [*masks, "--sample-k", 8, "--temperatures", "1,2"], "leave out --top-k and --temperatures"),
        (sharp, [*masks, "--sample-k", 300], "--sample-k 300 is not below the vocabulary's 300 tokens"),
        (work / "corpus.jsonl", masks, "--mask-source masks a shard directory, which .* is not"),
        (sharp_targets, masks, "holds targets, not sequences"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            score_here(corpus, sharp_teacher, tmp_path / "out", *flags)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    none = ["--corpus", sharp, "--teacher", "none", "--output", tmp_path / "out"]
    assert "--mask-source needs a teacher" in refused(*SCORE, *none, *masks)
