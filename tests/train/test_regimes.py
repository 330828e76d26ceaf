"""What each regime masks, learns and writes, through run.py."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import LENGTH
from in_process import score_here, train_here, weights
from rows import slow_paper
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertForMaskedLM,
    pipeline,
)

from entropy_masking.masking.masker import Masker
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.shards.manifests import read_manifest
from entropy_masking.shards.read import read_rows
from train.evaluation import EVALUATION
from train.split import split

REGIMES = {
    "random": ["--entropy-source", "random"],
    "parquet": ["--entropy-source", "parquet"],
    "parquet+kd": ["--entropy-source", "parquet", "--distill-weight", 0.5],
    "self": ["--entropy-source", "self"],
    "self+kd": ["--entropy-source", "self", "--distill-weight", 1, "--mask-temperature", 0.5, "--hard-share", 0.8],
}


@pytest.fixture(scope="module")
def students(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of each regime; not to be changed."""
    root = tmp_path_factory.mktemp("students")
    for name, flags in REGIMES.items():
        train_here(scored, root / name, *flags, "--max-steps", 12, "--logging-steps", 1, "--save-steps", 6)
    return {name: root / name for name in REGIMES}


def test_every_regime_learns_and_sums_up(students: dict[str, Path], scored: Path) -> None:
    vocabulary = read_manifest(str(scored)).vocab_size
    for name, directory in students.items():
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["regime"] == name
        assert summary["steps"] == 12 and summary["tokens"] == 12 * 8 * LENGTH
        assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"], rel=0.05)
        assert summary["seconds"] > 0
        assert summary["seed"] == 3 and summary["flags"]["mask_ratio"] == 0.3
        assert (summary["scoring_seconds"] > 0) == (name not in ("random", "self")), (
            "only a regime that reads scores pays for them"
        )
        assert summary["shards"]["context"] == "masked" and summary["shards"]["bytes"] > 0
        cheapest = json.loads((students["random"] / "summary.json").read_text())["training_flops"]
        assert summary["training_flops"] == cheapest > 0, "self-masking has its scores from the training forward"
        assert [point["step"] for point in summary["history"] if "eval_loss" in point] == [0, 3, 6, 9, 12]
        assert summary["history"][-1]["seconds"] == pytest.approx(summary["seconds"], abs=1)
        deciles = summary["eval_loss_by_entropy_decile"]
        assert len(deciles) == 10
        assert sum(deciles) / 10 == pytest.approx(summary["eval_loss"], abs=0.05)
        history = json.loads((directory / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert summary["train_loss"] == losses[-1]
        if name == "self+kd":  # it learns from a random teacher alone
            assert losses[-1] < losses[0] / 2
        else:
            assert summary["eval_loss"] < math.log(vocabulary)


def test_entropy_masks_and_targets_each_change_what_is_learned(students: dict[str, Path]) -> None:
    learned = {name: weights(directory)["model.layers.0.mlp.Wo.weight"] for name, directory in students.items()}
    for first, second in itertools.combinations(learned, 2):
        assert not torch.allclose(learned[first], learned[second], atol=1e-5), f"{first} is {second}"


def test_regimes_start_from_the_same_weights_and_are_judged_on_the_same_masks(scored: Path, tmp_path: Path) -> None:
    still = ["--max-steps", 1, "--learning-rate", 0, "--weight-decay", 0]
    summaries = [train_here(scored, tmp_path / name, *flags, *still) for name, flags in REGIMES.items()]
    assert len({summary["eval_loss"] for summary in summaries}) == 1
    assert len({tuple(summary["eval_loss_by_entropy_decile"]) for summary in summaries}) == 1
    other = train_here(scored, tmp_path / "ratio", *REGIMES["random"], *still, "--mask-ratio", 0.4)
    assert other["eval_loss"] == summaries[0]["eval_loss"]


def test_which_sequences_and_positions_a_run_masks(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's recipe masks the highest entropies of the shards. Evaluation masks other sequences at random."""
    seen: dict[MaskPolicy, list[Any]] = {}

    def spy(masker: Masker, batch: dict[str, torch.Tensor], policy: MaskPolicy) -> dict[str, torch.Tensor]:
        masked = original(masker, batch, policy)
        seen.setdefault(policy, []).extend(
            zip(*(t.tolist() for t in (batch["sequence_id"], batch["epoch"], masked["positions_BP"])), strict=True)
        )
        return masked

    original = Masker.__call__
    monkeypatch.setattr(Masker, "__call__", spy)
    train_here(scored, tmp_path / "out", *REGIMES["parquet"], "--recipe", "paper", "--num-train-epochs", 1)
    manifest = read_manifest(str(scored))
    held_out = [sequence for sequence, *_ in seen.pop(EVALUATION)]
    ((policy, trained),) = seen.items()
    assert policy == MaskPolicy.paper(seed=3)
    made = split(manifest, 0.2)
    for sequences, parts in ((held_out, made.held_out), ([sequence for sequence, *_ in trained], made.training)):
        rows = {(part.entry.index << 32) + row for part in parts for row in range(part.start, part.stop)}
        assert set(sequences) == rows
    entropy_of = {}
    for entry in manifest.shards:
        rows = read_rows(manifest, entry, ["entropy"])
        columns = rows["entropy"].astype(float), ~np.isin(rows["input_ids"], manifest.special_token_ids)
        entropy_of |= dict(zip(rows["sequence_id"].tolist(), zip(*columns, strict=True), strict=True))
    for sequence, epoch, positions in trained:
        row = (torch.from_numpy(column)[None] for column in entropy_of[sequence])
        (expected,) = slow_paper(*row, torch.tensor([sequence]), torch.tensor([epoch]), policy)
        assert {position for position in positions if position != IGNORED} == expected


def test_shards_without_scores_train_a_reference_and_self_masking(tokens: Path, tmp_path: Path) -> None:
    summary = train_here(tokens, tmp_path / "reference", *REGIMES["random"], "--num-train-epochs", 0.1)
    assert summary["eval_loss"] > 0 and summary["eval_loss_by_entropy_decile"] is None
    assert summary["scoring_seconds"] == 0
    assert train_here(tokens, tmp_path / "self", *REGIMES["self"], "--max-steps", 2)["regime"] == "self"


def test_shards_where_nothing_is_scored_are_counted_and_trained_past(
    work: Path, sharp_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of foreign letters, which are all [UNK], beside two files of text."""
    lines = (work / "corpus.jsonl").read_text().splitlines()
    for name, text in (("a", lines[:20]), ("b", ['{"text": "é è ê é è ê é è ê é"}'] * 60), ("c", lines[20:40])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(text))
    corpus = ",".join(f"{tmp_path}/{name}.jsonl" for name in "abc")
    flags = ["--sequence-length", LENGTH, "--shard-tokens", 500, "--passes", 2, "--top-k", 4]
    directory = score_here(corpus, sharp_teacher, tmp_path / "shards", *flags)
    entries = read_manifest(str(directory)).shards
    bare = [entry.file for entry in entries if not entry.scored_tokens]
    assert 1 <= len(bare) < len(entries) and all(entry.rows for entry in entries)
    assert f"without scores      {len(bare)} shards ({bare[0]}" in capsys.readouterr().out
    masks = ["--mask-source", "parquet", "--top-k", 4]
    targets = score_here(directory, sharp_teacher, tmp_path / "targets", *masks)
    one_epoch = ["--num-train-epochs", 1, "--eval-fraction", 0.4, "--eval-strategy", "no"]
    regimes = {
        "parquet+kd": REGIMES["parquet+kd"],
        "self": REGIMES["self"],
        "step": [*REGIMES["self"], "--self-refresh", "step"],
        "predicted": [*REGIMES["parquet"], "--predict-ratio", 0.1, "--predict-by", "entropy"],
        "targets": ["--entropy-source", "parquet", "--targets", targets, "--distill-weight", 0.5],
    }
    for name, regime in regimes.items():
        summary = train_here(directory, tmp_path / "students" / name, *regime, *one_epoch)
        assert math.isfinite(summary["train_loss"]) and math.isfinite(summary["eval_loss"]), name


def test_the_result_is_a_plain_masked_lm(students: dict[str, Path], scored: Path) -> None:
    directory = students["parquet+kd"]
    model, loading = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert type(model) is ModernBertForMaskedLM
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (directory / "tokenizer.json").read_bytes() == (scored / "tokenizer" / "tokenizer.json").read_bytes()
    text = tokenizer.decode(tokenizer("abcde fghab", add_special_tokens=False).input_ids) + " [MASK]"
    guesses = pipeline("fill-mask", model=str(directory))(text)
    assert len(guesses) == 5 and all(0 < guess["score"] < 1 for guess in guesses)
    assert not [path for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth"}], "no pickle"


def test_a_student_is_the_next_teacher_and_the_next_initial_model(
    students: dict[str, Path], work: Path, tmp_path: Path
) -> None:
    sizes = ["--limit-documents", 20, "--sequence-length", LENGTH, "--shard-tokens", 400]
    shards = score_here(work / "corpus.jsonl", students["random"], tmp_path / "shards", *sizes)
    flags = [*REGIMES["parquet"], "--model", students["random"], "--max-steps", 1]
    summary = train_here(shards, tmp_path / "more", *flags)
    before, after = weights(students["random"]), weights(tmp_path / "more")
    assert before.keys() == after.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 0.01
    assert summary["model"] == str(students["random"])
