"""How a training run ends before its end: signals, NaN, a full disk, lost loader workers, half-written checkpoints."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from processes import Run, history
from safetensors.torch import load_file
from transformers import BertConfig

from entropy_masking.shards.manifests import read_manifest
from train import guard, resume

STEPS = 8


@pytest.fixture(scope="module")
def flags(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    student = tmp_path_factory.mktemp("student")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=read_manifest(str(scored)).vocab_size, **sizes).save_pretrained(student)
    common = ["--shards", scored, "--model", student / "config.json", "--entropy-source", "parquet", "--bf16", "false"]
    common += ["--eval-fraction", 0, "--max-steps", STEPS, "--save-steps", 3, "--logging-steps", 1]
    return [*common, "--learning-rate", 1e-3, "--per-device-train-batch-size", 4]


@pytest.fixture(scope="module")
def whole(flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    root = tmp_path_factory.mktemp("whole")
    assert Run(root / "log", *flags, "--output-dir", root / "out").end() == [0]
    return history(root / "out", STEPS)


def sentence(run: Run, code: int) -> str:
    """The one line in which a run says why it ends."""
    assert run.end() == [code], run.output()
    assert "Traceback" not in run.output()
    (line,) = [line for line in run.output().splitlines() if line.startswith(("failed: ", "error: "))]
    return line


def wait_for(run: Run, path: Path) -> None:
    while not path.exists():
        assert run.processes[0].is_alive(), run.output()
        time.sleep(0.02)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_continues(
    flags: list[object], whole: dict[int, tuple[float, float]], number: int, code: int, tmp_path: Path
) -> None:
    argv = [*flags, "--output-dir", tmp_path / "out", "--dataloader-num-workers", 1]
    stopped = Run(tmp_path / "log", *argv, kill_at=4, kill_with=number)
    assert stopped.end() == [code]
    assert "stopped after step 5 of 8; the same command resumes" in stopped.output()
    assert "Traceback" not in stopped.output()
    again = Run(tmp_path / "again", *argv)
    assert again.end() == [0] and "checkpoint-5" in again.output()
    assert history(tmp_path / "out", STEPS) == whole


def test_sigterm_at_one_rank_stops_all_at_the_same_step(flags: list[object], tmp_path: Path) -> None:
    stopped = Run(
        tmp_path / "log", *flags, "--output-dir", tmp_path / "out", ranks=2, kill_at=2, kill_with=signal.SIGTERM
    )
    assert stopped.end() == [143, 143], stopped.output()
    assert stopped.output().count("stopped after step 4 of 8") == 1
    checkpoint = resume.last_checkpoint(tmp_path / "out")
    assert checkpoint == tmp_path / "out" / "checkpoint-4"
    assert (checkpoint / "rng_state_1.pth").exists()


def test_sigterm_at_all_processes_leaves_the_loader_at_work(flags: list[object], tmp_path: Path) -> None:
    """As an init system or a batch queue sends it."""
    argv = [*flags, "--output-dir", tmp_path / "out", "--max-steps", 100_000, "--dataloader-num-workers", 2]
    stopped = Run(tmp_path / "log", *argv)
    wait_for(stopped, tmp_path / "out" / "checkpoint-6")
    workers = psutil.Process(stopped.processes[0].pid).children()
    os.killpg(stopped.processes[0].pid, signal.SIGTERM)
    assert stopped.end() == [143], stopped.output()
    assert "the same command resumes" in stopped.output() and "Traceback" not in stopped.output()
    assert len(workers) == 2 and not psutil.wait_procs(workers, 10)[1]


def test_nan_ends_a_run_and_becomes_no_checkpoint(flags: list[object], tmp_path: Path) -> None:
    more = ["--learning-rate", 1e36, "--save-steps", 1, "--save-total-limit", 9, "--logging-steps", 50]
    line = sentence(Run(tmp_path / "log", *flags, *more, "--output-dir", tmp_path / "out"), 1)
    good = resume.last_checkpoint(tmp_path / "out")
    assert good and f"the last good checkpoint is {good}" in line and "at step" in line
    for checkpoint in resume.checkpoints(tmp_path / "out"):
        assert all(weight.isfinite().all() for weight in load_file(checkpoint / "model.safetensors").values())
    assert not (tmp_path / "out" / "summary.json").exists()


def test_nan_weights_are_not_the_model_of_a_run_that_saves_nothing(flags: list[object], tmp_path: Path) -> None:
    start = flags.index("--save-steps")
    kept = flags[:start] + flags[start + 2 :]  # without --save-steps
    more = ["--learning-rate", 1e39, "--warmup-steps", 0, "--max-steps", 1, "--save-strategy", "no"]
    line = sentence(Run(tmp_path / "log", *kept, *more, "--output-dir", tmp_path / "out"), 1)
    assert "weights are NaN or infinite" in line
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_full_disk_leaves_the_last_checkpoint(
    flags: list[object], whole: dict[int, tuple[float, float]], tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: both fail a write half-way."""
    argv = [*flags, "--output-dir", tmp_path / "out"]
    assert Run(tmp_path / "log", *argv, kill_at=4).end() == [-9]
    good = tmp_path / "out" / "checkpoint-3"
    weights, optimizer = (good / name for name in ("model.safetensors", "optimizer.pt"))
    for file in (weights, optimizer):
        run = Run(tmp_path / file.name, *argv, limit=file.stat().st_size - 100)
        line = sentence(run, 1)
        assert "cannot write checkpoint-6" in line and f"the last good checkpoint is {good}" in line
        assert "make room" in line
        assert resume.checkpoints(tmp_path / "out") == [good] and not (tmp_path / "out" / resume.UNFINISHED).exists()
    assert Run(tmp_path / "again", *argv).end() == [0]
    assert history(tmp_path / "out", STEPS) == whole


def test_killed_while_a_checkpoint_is_written(
    flags: list[object], whole: dict[int, tuple[float, float]], tmp_path: Path
) -> None:
    argv = [*flags, "--output-dir", tmp_path / "out"]
    assert Run(tmp_path / "log", *argv, kill_at=6, kill_in_writing=True).end() == [-9]
    assert (tmp_path / "out" / resume.UNFINISHED / "checkpoint-6").exists()
    assert resume.checkpoints(tmp_path / "out") == [tmp_path / "out" / "checkpoint-3"]
    again = Run(tmp_path / "again", *argv)
    assert again.end() == [0] and "checkpoint-3" in again.output()
    assert history(tmp_path / "out", STEPS) == whole
    assert not (tmp_path / "out" / resume.UNFINISHED).exists()


def test_a_loader_worker_that_is_killed_ends_the_run(flags: list[object], tmp_path: Path) -> None:
    argv = [*flags, "--output-dir", tmp_path / "out", "--max-steps", 100_000, "--dataloader-num-workers", 2]
    run = Run(tmp_path / "log", *argv)
    wait_for(run, tmp_path / "out" / "checkpoint-6")
    workers = psutil.Process(run.processes[0].pid).children()
    workers[0].kill()
    line = sentence(run, 1)
    assert "a loader worker was killed" in line and "--dataloader-num-workers" in line
    assert len(workers) == 2 and not psutil.wait_procs(workers, 10)[1], "a loader worker is left behind"
    assert resume.last_checkpoint(tmp_path / "out")


def test_two_runs_do_not_share_a_directory(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / resume.LOCK).touch()  # of a run that was killed before it had begun
    argv = [*flags, "--output-dir", tmp_path / "out", "--max-steps", 100_000, "--save-total-limit", 1]
    first = Run(tmp_path / "log", *argv)
    wait_for(first, tmp_path / "out" / "checkpoint-6")
    line = sentence(Run(tmp_path / "second", *argv), 2)
    assert line == f"error: another run is active in {tmp_path}/out; wait for its end, or end it"
    first.processes[0].kill()
    assert first.end() == [-9]
    third = Run(tmp_path / "third", *flags, "--output-dir", tmp_path / "out", "--overwrite")
    assert third.end() == [0], third.output()


def test_a_directory_that_is_deleted_in_mid_run_ends_the_run(flags: list[object], tmp_path: Path) -> None:
    argv = [*flags, "--output-dir", tmp_path / "out"]
    run = Run(tmp_path / "log", *argv, "--max-steps", 100_000, "--save-steps", 40)
    wait_for(run, tmp_path / "out" / "checkpoint-40")
    subprocess.run(["rm", "-rf", tmp_path / "out"])
    line = sentence(run, 1)
    assert line.startswith(f"failed: {tmp_path}/out/run.json was deleted or replaced during the run; run the command")
    assert Run(tmp_path / "again", *argv).end() == [0], "nothing that it has left is in the way"


def test_a_run_notices_at_its_end_that_its_directory_was_deleted(flags: list[object], tmp_path: Path) -> None:
    argv = [*flags, "--output-dir", tmp_path / "out", "--max-steps", 60, "--save-strategy", "no"]
    start = argv.index("--save-steps")
    run = Run(tmp_path / "log", *argv[:start], *argv[start + 2 :])
    wait_for(run, tmp_path / "out" / resume.GIVEN)
    subprocess.run(["rm", "-rf", tmp_path / "out"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / resume.RUN).write_text("{}")  # of another run
    line = sentence(run, 1)
    fix = "run the command again with an empty --output-dir"
    assert line == f"failed: {tmp_path}/out/run.json was deleted or replaced during the run; {fix}"
    assert not (tmp_path / "out" / "summary.json").exists()


def test_what_asked_workers_of_a_cluster_to_stop_stops_no_other_run(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / guard.STOP).touch()
    assert Run(tmp_path / "log", *flags, "--output-dir", tmp_path / "out").end() == [0]
