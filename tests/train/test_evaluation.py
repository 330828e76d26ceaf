"""Evaluation of run.py: on which text, the loss by decile of entropy, and at which steps."""

import json
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import LENGTH, TOP_K
from in_process import PARQUET, RANDOM, score_here, tokenize_here, train_here
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from entropy_masking.errors import UsageError
from entropy_masking.masking.masker import IGNORED_LABEL
from entropy_masking.masking.policy import MaskPolicy
from entropy_masking.masking.selection import IGNORED
from entropy_masking.shards.manifests import read_manifest
from entropy_masking.shards.read import masker_of, read_rows, to_tensors
from train import evaluation
from train.arguments import training_arguments
from train.evaluation import EVALUATION
from train.options import parse
from train.split import all_rows, split
from train.student import build_student


def test_evaluation_on_shards_of_other_text(work: Path, scored: Path, tokens: Path, tmp_path: Path) -> None:
    """The run trains on all of its shards; loss, positions and deciles are those of the other directory."""
    text = tmp_path / "other.jsonl"
    text.write_text("".join((work / "corpus.jsonl").read_text().splitlines(True)[:90]))
    sizes = ["--sequence-length", LENGTH, "--top-k", TOP_K, "--shard-tokens", 1500]
    other = score_here(text, work / "teacher", tmp_path / "other", *sizes)
    flags = [*PARQUET, "--num-train-epochs", 1, "--eval-fraction", 0]
    summary = train_here(scored, tmp_path / "out", *flags, "--eval-shards", other)
    sequences = json.loads((scored / "manifest.json").read_text())["totals"]["sequences"]
    assert summary["steps"] == math.ceil(sequences / 8)
    manifest = read_manifest(str(other))
    masks = MaskPolicy.paper().max_masked(LENGTH)
    padded = sum(entry.tokens < entry.rows * LENGTH for entry in manifest.shards)
    whole = sum(entry.rows for entry in manifest.shards) - padded
    assert masks * whole < summary["eval_positions"] <= masks * (whole + padded)
    deciles = summary["eval_loss_by_entropy_decile"]
    assert len(deciles) == 10 and min(deciles) < summary["eval_loss"] < max(deciles)
    assert summary["eval_shards"]["fingerprint_hash"] == manifest.fingerprint_hash

    plain = tokenize_here(text, work / "tokenizer", tmp_path / "tokens", "--sequence-length", LENGTH)
    train_here(scored, tmp_path / "out", *flags, "--eval-shards", plain)  # the same run, which is finished
    flags = [*PARQUET, "--max-steps", 2, "--eval-fraction", 0]
    summary = train_here(scored, tmp_path / "plain", *flags, "--eval-shards", plain)
    assert summary["eval_loss"] and summary["eval_loss_by_entropy_decile"] is None

    long = tokenize_here(text, work / "tokenizer", tmp_path / "long", "--sequence-length", 2 * LENGTH)
    for shards, fraction, sentence in (
        (scored, 0, "holds text of --shards"),
        (tokens, 0, "holds text of --shards"),
        (long, 0, "sequences of 64 tokens"),
        (tmp_path / "nowhere", 0, "nowhere"),
        (other, 0.2, "use one"),
    ):
        mistake = ["--eval-shards", shards, "--eval-fraction", fraction]
        with pytest.raises(UsageError, match=sentence):
            train_here(scored, tmp_path / "wrong", *RANDOM, *mistake)


def test_the_loss_by_decile_is_computed_by_the_shards_entropy(scored: Path, tmp_path: Path) -> None:
    """Against one sequence at a time, with everything sorted in Python."""
    summary = train_here(scored, tmp_path / "out", *RANDOM, "--max-steps", 12)
    manifest = read_manifest(str(scored))
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    losses = []
    for part in split(manifest, 0.2).held_out:
        shard = read_rows(manifest, part.entry, ["entropy"])
        rows = {name: array[part.start : part.stop] for name, array in shard.items()}
        batch = masker_of(manifest)(to_tensors(rows) | {"epoch": torch.zeros(part.rows, dtype=torch.long)}, EVALUATION)
        for row, sequence in enumerate(rows["sequence_id"].tolist()):
            attended = torch.from_numpy(rows["input_ids"][row].astype("int64"))[None] != manifest.special_ids["pad"]
            with torch.no_grad():
                logits_LV = model(batch["input_ids"][row : row + 1], attention_mask=attended.long()).logits[0]
            log_q_LV = logits_LV.log_softmax(-1)
            predicted = zip(batch["positions_BP"][row].tolist(), batch["labels_BP"][row].tolist(), strict=True)
            for position, label in predicted:
                if position != IGNORED:
                    entropy = float(rows["entropy"][row, position])
                    losses.append((entropy, sequence, position, -float(log_q_LV[position, label])))
    losses.sort()
    share, more = divmod(len(losses), 10)
    expected = []
    for decile in range(10):
        size = share + (decile < more)
        part, losses = losses[:size], losses[size:]
        expected.append(sum(loss for *_, loss in part) / size)
    assert summary["eval_loss_by_entropy_decile"] == pytest.approx(expected, abs=1e-4)


def test_chunks_of_logits_give_the_same_bits(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of all logits at once."""
    manifest = read_manifest(str(scored))
    model = build_student("tiny", manifest, seed=0).eval()
    raw = next(evaluation.batches(manifest, all_rows(manifest)[:1], ["entropy"], 8))
    masker = masker_of(manifest)
    with torch.no_grad():
        whole = evaluation.outcomes(model, masker, raw, ExitStack)
        monkeypatch.setattr(evaluation, "LOGITS_PER_CHUNK", 3 * manifest.vocab_size)
        chunked = evaluation.outcomes(model, masker, raw, ExitStack)
        batch = masker(raw | {"epoch": torch.zeros_like(raw["sequence_id"])}, EVALUATION)
        labels_N = batch.pop("labels_BP").flatten()
        logits_NV = model(**batch)["logits"].flatten(0, 1)
    real_N = labels_N != IGNORED_LABEL
    loss_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="none")[real_N]
    assert all(np.array_equal(one, other) for one, other in zip(whole, chunked, strict=True))
    assert np.array_equal(whole[2], loss_N.numpy())
    assert np.array_equal(whole[3], (logits_NV.argmax(1) == labels_N)[real_N].numpy()) and len(loss_N) > 3


def test_evaluations_by_default_and_as_asked() -> None:
    needed = ["--shards", "S", *RANDOM, "--output-dir", "O"]
    for more, expected in (
        ([], ("steps", 0.2, True)),
        (["--eval-shards", "E"], ("steps", 0.2, True)),
        (["--eval-fraction", "0"], ("no", 0.2, False)),
        (["--eval-on-start", "false"], ("steps", 0.2, False)),
        (["--eval-steps", "7"], ("steps", 7, True)),
        (["--eval-strategy", "no"], ("no", 0.2, False)),
        (["--eval-strategy", "steps", "--eval-steps", "7"], ("steps", 7, True)),
    ):
        args = training_arguments(*parse([*needed, *more], None))
        assert (args.eval_strategy, args.eval_steps, args.eval_on_start) == expected, more
