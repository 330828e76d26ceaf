"""What may be chosen freely changes nothing: how a batch is split, who loads it, where the head runs."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import TRAIN, run, save_student_config
from processes import Run, history
from torch.nn import functional as F

import train.run
from entropy_masking.masking.masker import IGNORED_LABEL, Masker
from entropy_masking.shards.manifests import read_manifest
from train import resume
from train.trainer import MaskedLMTrainer

STEPS = 4


@pytest.fixture(scope="module")
def flags(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    vocab_size = read_manifest(str(scored)).vocab_size
    student = save_student_config(tmp_path_factory.mktemp("student"), vocab_size)
    common = ["--shards", scored, "--model", student, "--bf16", "false", "--eval-fraction", 0]
    return [*common, "--max-steps", STEPS, "--logging-steps", 1, "--learning-rate", 1e-3]


PARQUET, RANDOM = ["--entropy-source", "parquet"], ["--entropy-source", "random"]
EIGHT, FOUR = ["--per-device-train-batch-size", 8], ["--per-device-train-batch-size", 4]

Masks = dict[int, list[int]]


@pytest.fixture
def train_here(flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run.py in this process: losses and norms by step, and what was hidden of each sequence."""
    original = Masker.__call__

    def call(*more: object) -> tuple[dict[int, tuple[float, float]], Masks]:
        masks: Masks = {}

        def spy(masker: Masker, batch: dict[str, torch.Tensor], policy: Any) -> dict[str, torch.Tensor]:
            masked = original(masker, batch, policy)
            masks.update(zip(batch["sequence_id"].tolist(), masked["positions_BP"].tolist(), strict=True))
            return masked

        monkeypatch.setattr(Masker, "__call__", spy)
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        train.run.main([str(flag) for flag in (*flags, *more, "--output-dir", output)])
        return history(output, STEPS), masks

    return call


def close(ours: dict[int, tuple[float, float]], theirs: dict[int, tuple[float, float]]) -> bool:
    """The first loss to 1e-6; later ones as far as rounding lets them drift."""
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
    return [*ours.values()] == [pytest.approx(each, rel=1e-4) for each in theirs.values()]


# at the end of its warm-up the first of two ranks masks at random, the second does not
SELF = ["--entropy-source", "self", "--mask-warmup", 11.5 / (8 * STEPS), "--mask-ramp", 0.2, "--hard-share", 1]


@pytest.mark.parametrize("source", [PARQUET, SELF, [*RANDOM, "--optim", "muon"]], ids=["parquet", "self", "muon"])
def test_how_a_batch_is_split_and_loaded(
    train_here: Any, flags: list[object], tmp_path: Path, source: list[object]
) -> None:
    whole, masks = train_here(*source, *EIGHT)
    accumulated, same = train_here(*source, *FOUR, "--gradient-accumulation-steps", 2)
    assert same == masks and len(masks) == 8 * STEPS
    assert close(accumulated, whole)
    loaded, _ = train_here(*source, *EIGHT, "--dataloader-num-workers", 2)
    assert loaded == whole
    ranks = Run(tmp_path / "log", *flags, *source, *FOUR, "--output-dir", tmp_path / "ranks", ranks=2)
    assert ranks.end() == [0, 0], ranks.output()
    assert close(history(tmp_path / "ranks", STEPS), whole)


@pytest.mark.exhaustive
def test_torchrun(train_here: Any, flags: list[object], tmp_path: Path) -> None:
    """What the others do in forked processes, as its users do it; and what it passes on when it is to end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone", TRAIN[1]]
    argv = [*torchrun, *flags, *PARQUET, *FOUR]
    run(*argv, "--output-dir", tmp_path / "two")
    whole, _ = train_here(*PARQUET, *EIGHT)
    assert close(history(tmp_path / "two", STEPS), whole)

    more = ["--max-steps", 100_000, "--save-steps", 10, "--output-dir", tmp_path / "stopped"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([str(each) for each in (*argv, *more)], **pipes)  # type: ignore[call-overload]
    while not (tmp_path / "stopped" / "checkpoint-10").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    (step,) = re.findall(r"stopped after step (\d+) of 100000; the same command resumes", output)
    assert resume.last_checkpoint(tmp_path / "stopped") == tmp_path / "stopped" / f"checkpoint-{step}"


def test_hard_share_zero_is_random(train_here: Any) -> None:
    random, masks = train_here(*RANDOM, *EIGHT)
    for source in ("parquet", "self"):
        assert train_here("--entropy-source", source, *EIGHT, "--hard-share", 0) == (random, masks)


def test_the_head_at_masked_positions_is_the_head_at_all(train_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, masks = train_here(*PARQUET, *EIGHT)

    def full(trainer: MaskedLMTrainer, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        logits_BLV = model(inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits
        positions_BK, labels_BK = inputs["positions_BP"], inputs["labels_BP"]
        where_BKV = positions_BK.clamp_min(0)[..., None].expand(-1, -1, logits_BLV.shape[2])
        logits_NV, labels_N = logits_BLV.gather(1, where_BKV).flatten(0, 1), labels_BK.flatten()
        return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="sum") / len(labels_N)

    monkeypatch.setattr(MaskedLMTrainer, "compute_loss", full)
    everywhere, same = train_here(*PARQUET, *EIGHT)
    assert same == masks
    assert close(everywhere, sparse)
