"""Mistakes in the flags of run.py: one sentence each, exit code 2, and nothing written."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from pathlib import Path

import pytest
import torch
import transformers.training_args

import train.run
from entropy_masking.errors import RunError, UsageError
from train import cluster, guard
from train.arguments import training_arguments
from train.flags import TrainerFlags
from train.options import parse

BEST = ["--load-best-model-at-end", "--eval-strategy", "steps", "--eval-steps", 5, "--save-steps", 5]
RANDOM = ["--entropy-source", "random"]
PAPER = ["--entropy-source", "parquet", "--recipe", "paper"]
UNSUPPORTED = "of transformers.TrainingArguments is not supported; --help-all lists the supported flags"


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
        (["--dataloader-persistent-workers", "true"], f"--dataloader-persistent-workers {UNSUPPORTED}"),
        (["--dataloader-num-workers", 1, "--dataloader-prefetch-factor", -1], "--dataloader-prefetch-factor -1"),
        (["--lr-scheduler-type", "cosine_with_min_lr"], "min_lr"),
        (["--lr-scheduler-kwargs", "nope"], "is not a JSON object"),
        (["--lr-scheduler-kwargs", '{"nope": 1}'], "nope"),
        (["--lr-scheduler-type", "warmup_stable_decay", "--lr-scheduler-kwargs", "[1]"], "is not a JSON object"),
        (["--save-strategy", "best"], "--save-strategy: invalid choice: 'best' (choose from 'no', 'steps')"),
        (["--save-strategy", "epoch"], "--save-strategy: invalid choice: 'epoch'"),
        (["--eval-strategy", "epoch"], "--eval-strategy: invalid choice: 'epoch'"),
        (["--logging-strategy", "epoch"], "--logging-strategy: invalid choice: 'epoch'"),
        ([*BEST, "--save-steps", 7], "needs a checkpoint at each evaluation; set --save-steps to 5, or leave it out"),
        (["--load-best-model-at-end", "--eval-fraction", 0], "--load-best-model-at-end needs held-out text"),
        (["--load-best-model-at-end", "--eval-strategy", "no"], "leave out --eval-strategy no"),
        (["--load-best-model-at-end", "--save-strategy", "no"], "leave out --save-strategy no"),
        ([*BEST, "--save-total-limit", 1], "--save-total-limit 1 keeps only"),
        ([*BEST, "--metric-for-best-model", "foo"], "--metric-for-best-model: invalid choice: 'foo'"),
        (["--eval-on-start", "true", "--eval-fraction", 0], "--eval-on-start needs held-out text"),
        (["--dataloader-prefetch-factor", 0], "--dataloader-prefetch-factor 0 is out of range"),
        (["--torch-compile-mode", "foo"], "--torch-compile-mode: invalid choice: 'foo' (choose from 'default'"),
        (["--debug", "underflow_overflow"], f"--debug {UNSUPPORTED}"),
        (["--bf16-full-eval", "true"], f"--bf16-full-eval {UNSUPPORTED}"),
        (["--targets", ""], "--targets is empty"),
        (["--eval-shards", ""], "--eval-shards is empty"),
        (["--num-workers", 0], "--num-workers 0 is out of range; use at least 1"),
        (["--fsdp", "full_shard"], f"--fsdp {UNSUPPORTED}"),
        (["--deepspeed", "nowhere.json"], f"--deepspeed {UNSUPPORTED}"),
        (["--use-liger-kernel", "true"], f"--use-liger-kernel {UNSUPPORTED}"),
        (["--hub-strategy", "all_checkpoints"], f"--hub-strategy {UNSUPPORTED}"),
        (["--hub-private-repo"], "--hub-private-repo needs --push-to-hub; set it too, or leave"),
        (["--push-to-hub", "--eval-only"], "--push-to-hub has no effect with --eval-only"),
        (["--optim-target-modules", "all"], f"--optim-target-modules {UNSUPPORTED}"),
        (["--torch-compile-backend", "foo"], "FOO"),
        (["--distill-weight", 0.5, "--distill-positions", 0], "--distill-positions 0 is out of range; use more than 0"),
        (["--muon-learning-rate", 0.1, "--optim", "adamw_torch"], "--muon-learning-rate only applies to --optim muon"),
        (["--muon-learning-rate=-1"], "--muon-learning-rate -1 is out of range"),
        (["--optim", "adamw_8bit"], "bitsandbytes"),
        (["--optim", "sgd", "--optim-args", "foo"], "transformers does not accept the flags"),
        (["--accelerator-config", '{"split_batches": true}'], f"--accelerator-config {UNSUPPORTED}"),
        (["--accelerator_config={}"], f"--accelerator_config {UNSUPPORTED}"),
        (["--no-dataloader-pin-memory"], f"--no-dataloader-pin-memory {UNSUPPORTED}"),
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
        (["--optim-args", "momentum=1"], "--optim-args has no effect with Muon or AdamW; leave it out"),
        (["--model", "x/y", "--optim-args", "momentum=1"], "--optim-args has no effect with Muon or AdamW"),
        (["--entropy-source", "self", "--hard-share", 0, "--self-refresh", "step"], "no effect with --hard-share 0"),
        (["--eval-steps", 5, "--eval-fraction", 0], "--eval-steps needs held-out text; set --eval-fraction"),
        (["--eval-steps", 5, "--eval-strategy", "no"], "leave out --eval-strategy no"),
        (["--metric-for-best-model", "accuracy"], "--metric-for-best-model only applies to --load-best-model-at-end"),
        (["--save-strategy", "no", "--save-steps", 5], "--save-steps needs checkpoints; leave out --save-strategy no"),
        (["--save-strategy", "no", "--save-total-limit", 3], "--save-total-limit needs checkpoints"),
        (["--logging-strategy", "no", "--logging-steps", 3], "--logging-steps has no effect with --logging-str"),
        (["--logging-strategy", "no", "--logging-first-step"], "--logging-first-step has no effect with --logging-str"),
        (["--run-name", "x"], "--run-name names a run for --report-to"),
        (["--num-train-epochs", 3], "--num-train-epochs has no effect with --max-steps; leave one out"),
        (["--eval-strategy", "no", "--eval-delay", 3], "--eval-delay needs evaluations during the run"),
        (["--eval-fraction", 0, "--eval-delay", 2], "--eval-delay needs held-out text"),
        (["--eval-fraction", 0, "--per-device-eval-batch-size", 2], "--per-device-eval-batch-size needs held-out"),
        (["--optim", "sgd", "--adam-beta1", 0.5], "--adam-beta1 has no effect with --optim sgd; leave it out"),
        (["--lr-scheduler-type", "constant", "--warmup-steps", 5], "no effect with --lr-scheduler-type constant"),
        (["--eval-on-start", "--eval-fraction", 0], "--eval-on-start needs held-out text"),
    ],
)
def test_flags_without_effect_are_refused_before_shards_are_read(flags: list[object], sentence: str) -> None:
    assert sentence in refusal(Path("nowhere"), "out", *RANDOM, *flags)


@pytest.mark.parametrize("decay", [98, -1, '"many"'])
def test_a_decay_that_does_not_fit_into_the_steps(scored: Path, tmp_path: Path, decay: object) -> None:
    schedule = [
        "--lr-scheduler-type",
        "warmup_stable_decay",
        "--lr-scheduler-kwargs",
        f'{{"num_decay_steps": {decay}}}',
    ]
    sentence = "does not fit into 100 steps with a warm-up of 3; use a whole number of at most 97"
    assert sentence in refusal(scored, tmp_path / "out", *RANDOM, *schedule, "--max-steps", 100, "--warmup-steps", 3)


@pytest.mark.parametrize(
    "flags, steps",
    [([], 0.2), (["--save-steps", "7"], 7), (["--eval-steps", "5"], 5), (["--eval-strategy", "steps"], 50)],
)
def test_the_best_model_is_among_the_checkpoints(flags: list[str], steps: float) -> None:
    args = parsed("--load-best-model-at-end", *flags)
    assert (args.save_steps, args.eval_steps) == (steps, steps)


def test_a_schedule_may_follow_the_metric_of_evaluations() -> None:
    args = parsed("--metric-for-best-model", "accuracy", "--lr-scheduler-type", "greedy")
    assert args.metric_for_best_model == "accuracy"


def test_evaluations_may_follow_the_logging_steps_of_a_run_that_does_not_log() -> None:
    args = parsed("--logging-strategy", "no", "--logging-steps", "7", "--eval-strategy", "steps", "--eval-on-start")
    assert args.eval_steps == 7 and args.eval_on_start


def test_shards_that_are_a_file(scored: Path, tmp_path: Path) -> None:
    sentence = "manifest.json is not a shard directory (it has no manifest.json); make one with pipeline/score.py"
    assert sentence in refusal(scored / "manifest.json", tmp_path / "out", *RANDOM)


def test_help_lists_the_flags_of_transformers_that_work_and_the_others_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exited:
        parse(["--help-all"], "about")
    assert exited.value.code == 0
    listed = re.findall(r"^  --([a-z0-9-]+)", capsys.readouterr().out, re.M)
    names = {name.replace("-", "_") for name in listed}
    of_transformers = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    supported = {field.name for field in dataclasses.fields(TrainerFlags)}
    supported |= {"push_to_hub", "hub_model_id", "hub_private_repo"}  # flags of our own with the same names
    assert names & of_transformers == supported and 40 <= len(supported) <= 50
    for name in of_transformers - supported:
        with pytest.raises(UsageError, match=f"^--{name} {UNSUPPORTED}"):
            parsed(f"--{name}", "1")


def test_a_finished_run_outlives_a_mistake_that_would_overwrite_it(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{}")
    refusal(scored, tmp_path, *RANDOM, "--overwrite", "--optim", "sgd", "--optim-args", "foo")
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
    "error, sentence",
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device.*make room"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "make room"),
        (guard.SafetensorError("I/O error: File too large (os error 27)"), "make room"),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos"), "cut short.*make room"),
        (RuntimeError("basic_ios::clear: iostream error"), "cut short.*make room"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), r"x: Permission denied\).*again when .* is writable"),
    ],
)
def test_room_is_made_where_there_is_none(tmp_path: Path, error: Exception, sentence: str) -> None:
    with pytest.raises(RunError, match=f"cannot write it .*{sentence}"), guard.writing("it", tmp_path):
        raise error


def test_a_device_out_of_memory_is_no_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), guard.writing("it", tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_last_failure_of_workers_is_one_line() -> None:
    error = RuntimeError("workers")
    error.worker_failures = {1: ValueError("Traceback:\n  File x\nentropy_masking.errors.RunError: the disk is full\n")}  # type: ignore[attr-defined]
    assert cluster._reason(error) == "workers died 4 times; the last error: the disk is full"
