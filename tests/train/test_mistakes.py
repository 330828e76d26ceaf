"""Mistakes in the flags of run.py: one sentence each, exit code 2, and nothing written."""

import errno
from pathlib import Path

import pytest
import torch
import transformers.training_args

import train.run
from entropy_masking.errors import RunError, UsageError
from train import cluster, guard
from train.arguments import training_arguments
from train.options import parse

RANDOM = ["--entropy-source", "random"]
PAPER = ["--entropy-source", "parquet", "--recipe", "paper"]


def refusal(shards: Path, output: object, *flags: object) -> str:
    """What run.py, in this process, has against flags."""
    argv = ["--shards", shards, "--output-dir", output, "--model", "tiny", "--max-steps", 1, "--bf16", "false", *flags]
    with pytest.raises(UsageError) as caught:
        train.run.main([str(flag) for flag in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--warmup-steps", "nan"], "--warmup-steps nan is out of range; use at least 0 and at most"),
        (["--num-train-epochs", "1e300"], "--num-train-epochs 1e+300 is out of range"),
        (["--max-steps", 10**22], f"--max-steps {10**22} is out of range; use at least 1 and at most"),
        (["--max-steps", 10**400], "is out of range"),
        (["--logging-steps", "inf"], "--logging-steps inf is out of range"),
        (["--save-total-limit", -1], "--save-total-limit -1 is out of range"),
        (["--per-device-train-batch-size", 10**7], "use at least 1 and at most 1000000"),
        (["--report-to", "wandb"], "wandb"),
        (["--optim", "sgd"], "--optim: invalid choice: 'sgd' (choose from 'muon', 'adamw_torch', 'adamw_torch_fused')"),
        (["--lr-scheduler-type", "greedy"], "--lr-scheduler-type: invalid choice: 'greedy'"),
        (["--fsdp", "full_shard"], "--fsdp is not a flag of train/run.py"),
        (["--save-strategy", "best"], "--save-strategy: invalid choice: 'best' (choose from 'no', 'steps')"),
        (["--save-strategy", "epoch"], "--save-strategy: invalid choice: 'epoch'"),
        (["--eval-strategy", "epoch"], "--eval-strategy: invalid choice: 'epoch'"),
        (["--eval-on-start", "true", "--eval-fraction", 0], "--eval-on-start has no effect without held-out text"),
        (["--targets", ""], "--targets is empty"),
        (["--eval-shards", ""], "--eval-shards is empty"),
        (["--num-workers", 0], "--num-workers 0 is out of range; use at least 1"),
        (["--distill-weight", 0.5, "--distill-positions", 0], "--distill-positions 0 is out of range; use more than 0"),
        (["--muon-learning-rate", 0.1, "--optim", "adamw_torch"], "--muon-learning-rate has no effect without"),
        (["--muon-learning-rate=-1"], "--muon-learning-rate -1 is out of range"),
        (["--maximal-steps", 3], "is not a flag of train/run.py; the nearest is --max-steps, and --help-all"),
        (["--zzz"], "--zzz is not a flag of train/run.py; --help-all lists its flags"),
        (["--max-steps", "three"], "--max-steps: invalid int value: 'three'"),
        ([*PAPER, "--predict-by", "entropy"], "--predict-by contradicts --recipe paper, which predicts all masked"),
        (["--output-dir", "s3://bucket/x"], "--output-dir s3://bucket/x is a URI; use a path"),
    ],
)
def test_flags_that_no_trainer_can_be_made_of(scored: Path, tmp_path: Path, flags: list[object], sentence: str) -> None:
    assert sentence in refusal(scored, tmp_path / "out", *RANDOM, *flags)
    assert not list(tmp_path.glob("out/*")), "nothing is written"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--entropy-source", "self", "--hard-share", 0, "--self-refresh", "step"], "no effect with --hard-share 0"),
        (
            ["--eval-steps", 5, "--eval-fraction", 0],
            "--eval-steps has no effect without held-out text (--eval-fraction",
        ),
        (["--eval-steps", 5, "--eval-strategy", "no"], "--eval-steps has no effect with --eval-strategy no"),
        (["--save-strategy", "no", "--save-steps", 5], "--save-steps has no effect with --save-strategy no"),
        (["--save-strategy", "no", "--save-total-limit", 3], "--save-total-limit has no effect with"),
        (["--num-train-epochs", 3], "--num-train-epochs has no effect with --max-steps; leave it out"),
        (["--eval-fraction", 0, "--per-device-eval-batch-size", 2], "--per-device-eval-batch-size has no effect"),
        (["--lr-scheduler-type", "constant", "--warmup-steps", 5], "no effect with --lr-scheduler-type constant"),
        (["--eval-on-start", "--eval-fraction", 0], "--eval-on-start has no effect without held-out text"),
    ],
)
def test_flags_without_effect_are_refused_before_shards_are_read(flags: list[object], sentence: str) -> None:
    assert sentence in refusal(Path("nowhere"), "out", *RANDOM, *flags)


def test_shards_that_are_a_file(scored: Path, tmp_path: Path) -> None:
    sentence = "manifest.json is not a shard directory (it has no manifest.json); make one with pipeline/score.py"
    assert sentence in refusal(scored / "manifest.json", tmp_path / "out", *RANDOM)


def test_a_finished_run_outlives_a_mistake_that_would_overwrite_it(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{}")
    refusal(scored, tmp_path, *RANDOM, "--overwrite", "--report-to", "nowhere")
    assert (tmp_path / "summary.json").exists()


def test_ray_starts_no_processes_under_torchrun(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    message = refusal(scored, tmp_path / "out", *RANDOM, "--num-workers", 2)
    assert "--num-workers 2 has no effect under torchrun, which has started 2 processes; leave it out" in message


def parsed(*flags: str) -> transformers.TrainingArguments:
    needed = ["--shards", "S", *RANDOM, "--output-dir", "O", "--bf16", "false"]
    return training_arguments(*parse([*needed, *flags], None))


def test_an_accelerator_is_not_waited_for() -> None:
    for flags, workers, non_blocking in (
        ([], 0, False),
        (["--use-cpu", "false"], 2, True),
        (["--use-cpu", "false", "--dataloader-num-workers", "0"], 0, True),
    ):
        args = parsed("--use-cpu", "true", *flags)
        assert args.dataloader_num_workers == workers
        assert args.accelerator_config.non_blocking == non_blocking


def test_apple_gpus_make_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.training_args, "is_torch_mps_available", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parsed().device.type == "cpu"
    with pytest.raises(UsageError, match="no float64"):
        parsed("--use-cpu", "false")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        guard.SafetensorError("I/O error: File too large (os error 27)"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_room_is_made_where_there_is_none(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(RunError, match=r"cannot write it \(.*\); there was no checkpoint yet; .* make room"):  # noqa: SIM117
        with guard.writing("it", tmp_path):
            raise error


def test_a_device_out_of_memory_is_no_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), guard.writing("it", tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_last_failure_of_workers_is_one_line() -> None:
    error = RuntimeError("workers")
    error.worker_failures = {1: ValueError("Traceback:\n  File x\nentropy_masking.errors.RunError: the disk is full\n")}  # type: ignore[attr-defined]
    assert cluster._reason(error) == "workers died 4 times; the last error: the disk is full"
