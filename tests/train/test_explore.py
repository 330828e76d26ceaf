"""train/explore.py as a command: the sequences and masks that it reads, the summary that it prints, and mistakes."""

import shutil
from pathlib import Path

import polars as pl
import pytest
from in_process import PARQUET, RANDOM, SEED, explore_here, score_here
from tables import give_up

import train.explore
from entropy_masking.errors import UsageError
from entropy_masking.shards import manifests
from entropy_masking.shards.manifests import read_manifest
from train.explorer import sample

WORDS = ["--mask-unit", "word", "--mask-temperature", 1, "--mask-ratio", 0.3]


def test_the_summary_has_the_numbers_of_the_shards(
    sharp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explore_here(sharp)
    printed = capsys.readouterr().out
    frame = pl.read_parquet(sharp / "part-*.parquet").select(pl.col("input_ids", "entropy", "surprisal").explode())
    frame = frame.with_columns(pl.col("entropy", "surprisal").cast(pl.Float64).fill_nan(None)).drop_nulls()
    for name in ("entropy", "surprisal"):
        assert f"{name:12} mean {frame[name].mean():.2f} nats, median {frame[name].median():.2f}" in printed
    assert f"{len(frame):,} scored" in printed and "context masked" in printed
    means = frame.group_by("input_ids").agg(pl.len(), pl.col("entropy").mean()).filter(pl.col("len") >= 10)
    top = means.sort("entropy", descending=True).row(0, named=True)
    tokens = manifests.shard_tokenizer(str(sharp)).convert_ids_to_tokens([top["input_ids"]])
    assert f"uncertain    {tokens[0]} {top['entropy']:.2f}" in printed
    assert not list(tmp_path.iterdir()) and "written" not in printed and "<" not in printed


def test_it_shows_the_masks_of_a_run(work: Path, sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = ["--mask-source", "parquet", "--mask-seed", SEED, *WORDS]
    directory = score_here(sharp, work / "teacher", tmp_path / "targets", *masks)
    targets = pl.read_parquet(directory / "part-*.parquet").filter(pl.col("variant") == 0)
    seen: list[sample.Source] = []
    monkeypatch.setattr(train.explore, "summarise", lambda sources, *_: seen.extend(sources) or {})
    explore_here(sharp, *PARQUET, "--seed", SEED, *WORDS)
    frame = seen[0].frame.with_columns(position=pl.int_range(pl.len()).over("sequence"))
    masked = frame.filter("masked").group_by("sequence", maintain_order=True).agg("position")
    assert masked["position"].to_list() == targets.sort("sequence_id")["positions"].to_list()


def test_a_limit_bounds_the_sequences(sharp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explore_here(sharp, "--limit", 7)
    assert "; 7 of " in capsys.readouterr().out


def test_mistakes_are_one_sentence(sharp: Path, scored: Path, tokens: Path, tmp_path: Path) -> None:
    for arguments, sentence in (
        ([tmp_path / "nowhere"], "is not a shard directory"),
        ([sharp / "manifest.json"], "manifest.json is not a shard directory"),
        ([tokens], "has no scores .*; score it with pipeline/score.py"),
        ([sharp, "--limit", 0], "--limit 0 is out of range; use at least 1"),
        ([sharp, "--sequences", 0], "--sequences 0 is out of range; use at least 1"),
        ([sharp, "--seed", -1], "--seed -1 is out of range"),
        ([sharp, "--mask-warmup", 0.5], "--mask-warmup is not a flag of train/explore.py"),
        ([sharp, "--mask-by", "excess"], "invalid choice: 'excess'"),
        ([sharp, *RANDOM, "--hard-share", 0.1], "--hard-share needs scores"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            explore_here(*arguments, "--output", tmp_path / "page.html")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--sequences only applies to the page; name its file with --output"):
        explore_here(sharp, "--sequences", 3)
    with pytest.raises(UsageError, match=r"--output .* is a directory; name a file, such as .*/page.html"):
        explore_here(tmp_path / "nowhere", "--output", tmp_path)
    with pytest.raises(UsageError, match="hold different tokens"):
        explore_here(sharp, scored)
    first, *others = [entry.file for entry in read_manifest(str(sharp)).shards]
    one, two = (Path(shutil.copytree(sharp, tmp_path / name)) for name in ("one", "two"))
    with pytest.raises(UsageError, match=r"no sequence is in .*one and .*two; finish"):
        explore_here(give_up(one, first), give_up(two, *others))
    assert not (tmp_path / "page.html").exists()
