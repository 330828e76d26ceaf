"""The output directory of run.py: a run in it is continued, kept, overwritten or refused."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from harness import TRAIN, refused, run
from in_process import PARQUET, RANDOM, SMALL, train_here, weights

from entropy_masking.errors import UsageError
from train import resume

STEPS = ["--max-steps", 12, "--save-steps", 6]


@pytest.fixture(scope="module")
def student(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with random masks; not to be changed."""
    directory = tmp_path_factory.mktemp("student") / "out"
    train_here(scored, directory, *RANDOM, *STEPS)
    return directory


# --- a run is continued ----------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_weights(scored: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints; self-masking, which depends on everything that a checkpoint holds."""
    flags = ["--entropy-source", "self", "--distill-weight", 1, "--mask-temperature", 0.5, "--hard-share", 0.8]
    flags += ["--max-steps", 40, "--save-steps", 5, "--mask-warmup", 0.2, "--mask-ramp", 0.4]
    flags += ["--dataloader-num-workers", 2]
    whole = train_here(scored, tmp_path / "whole", *flags)
    killed = tmp_path / "killed"
    argv = [*TRAIN, *map(str, ["--shards", scored, *SMALL, *flags, "--output-dir", killed])]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    while not list(killed.glob("checkpoint-1?/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    half = killed / "checkpoint-99"  # a checkpoint that was cut short
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    output = run(*argv)
    assert "resuming from" in output and "checkpoint-99" not in output
    assert "missing keys" not in output
    ours, theirs = weights(killed), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    resumed = json.loads((killed / "summary.json").read_text())
    assert resumed["eval_loss"] == whole["eval_loss"] is not None
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-6) and whole["train_loss"] is not None
    assert "finished already" in run(*argv)


def test_a_checkpoint_that_was_cut_short_is_passed_over(scored: Path, student: Path, tmp_path: Path) -> None:
    """So is one with a wrong byte, when a run reads it."""
    for damage in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        directory = tmp_path / damage
        shutil.copytree(student, directory)
        (directory / "summary.json").unlink()
        (directory / "checkpoint-best").mkdir()
        file = directory / "checkpoint-12" / damage
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.write_bytes(data if damage == "scheduler.pt" else data[:-100])
        assert resume.last_checkpoint(directory, contents=True) == directory / "checkpoint-6"
    train_here(scored, directory, *RANDOM, *STEPS)
    ours, theirs = weights(directory), weights(student)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- a run is kept or refused ----------------------------------------------------------------------------------------


def test_flags_that_change_no_result_may_change_and_others_may_not(
    scored: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changed in (
        ["--logging-steps", 2, "--dataloader-num-workers", 1, "--save-steps", 3],
        ["--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2],  # the same batch
    ):
        train_here(scored, student, *RANDOM, *STEPS, *changed)
        assert "finished already" in "".join(capsys.readouterr())
    same = ["--shards", scored, "--output-dir", student, *SMALL, *RANDOM, *STEPS]
    message = refused(*TRAIN, *same, "--mask-ratio", 0.2, "--learning-rate", 0.5)
    assert "mask_ratio: 0.3 → 0.2" in message and "learning_rate" in message and "--overwrite" in message


def test_an_initial_model_is_known_by_its_weights(
    scored: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(student, tmp_path / "start")
    flags = [*RANDOM, "--max-steps", 1, "--model"]
    train_here(scored, tmp_path / "out", *flags, tmp_path / "start")
    (tmp_path / "start").rename(tmp_path / "moved")
    train_here(scored, tmp_path / "out", *flags, tmp_path / "moved", "--trust-remote-code")
    assert "finished already" in "".join(capsys.readouterr())
    shutil.copy(student / "checkpoint-6" / "model.safetensors", tmp_path / "moved" / "model.safetensors")
    with pytest.raises(UsageError, match=r"model: [0-9a-f]+… → [0-9a-f]+…"):
        train_here(scored, tmp_path / "out", *flags, tmp_path / "moved")


def test_a_run_file_without_flags_is_refused(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for text in ("[1]", "{", "null"):
        (tmp_path / "out" / "run.json").write_text(text)
        with pytest.raises(UsageError, match=r"is damaged or not written by train/run.py; choose another"):
            train_here(scored, tmp_path / "out", *RANDOM, "--max-steps", 1)


def test_a_directory_with_other_files_is_refused(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("…")
    with pytest.raises(UsageError, match="holds files but no training run"):
        train_here(scored, tmp_path, *RANDOM, "--max-steps", 1)


# --- a run is overwritten --------------------------------------------------------------------------------------------


def test_a_run_without_a_checkpoint_is_overwritten(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"mask_ratio": 0.9}))
    assert train_here(scored, tmp_path / "out", *RANDOM, "--max-steps", 1)["steps"] == 1


def test_overwrite_deletes_the_checkpoints_of_the_run_before(scored: Path, tmp_path: Path) -> None:
    train_here(scored, tmp_path / "out", *RANDOM, "--max-steps", 2)
    (tmp_path / "out" / "checkpoint-best").mkdir()
    summary = train_here(scored, tmp_path / "out", *PARQUET, "--max-steps", 1, "--overwrite")
    assert summary["regime"] == "parquet" and summary["steps"] == 1
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    assert (tmp_path / "out" / "checkpoint-best").exists(), "run.py makes no checkpoint of that name"


def test_overwrite_deletes_training_runs_only(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "thesis.txt").write_text("…")
    with pytest.raises(UsageError, match="holds files but no training run"):
        train_here(scored, tmp_path / "out", *RANDOM, "--max-steps", 1, "--overwrite")
    assert (tmp_path / "out" / "checkpoint-1" / "thesis.txt").exists()
