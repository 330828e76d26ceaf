"""The same training run in workers of a Ray cluster: the result of one process, whatever dies on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import ROOT, TRAIN, refused, run, save_student_config
from processes import Run, history
from ray.cluster_utils import Cluster

import train.run
from entropy_masking.errors import UsageError
from entropy_masking.shards.manifests import read_manifest
from train import resume

SEVERAL = ["--num-workers", 2, "--per-device-train-batch-size", 4]


@pytest.fixture(scope="module")
def flags(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    vocab_size = read_manifest(str(scored)).vocab_size
    student = save_student_config(tmp_path_factory.mktemp("student"), vocab_size)
    common = ["--shards", scored, "--model", student, "--entropy-source", "parquet", "--bf16", "false"]
    return [*common, "--eval-fraction", 0.2, "--learning-rate", 1e-3, "--logging-steps", 1, "--save-total-limit", 9]


def test_two_workers_do_what_one_process_does(flags: list[object], tmp_path: Path) -> None:
    steps = ["--max-steps", 6, "--save-steps", 3]
    output = run(*TRAIN, *flags, *steps, *SEVERAL, "--output-dir", tmp_path / "two")
    assert "step 6/6: loss" in output and "held-out loss" in output
    assert "ray" not in output.replace("starting Ray on this machine …\n", "", 1).lower(), output
    one = ["--per-device-train-batch-size", 8, "--output-dir", tmp_path / "one"]
    train.run.main([str(flag) for flag in (*flags, *steps, *one)])
    ours, theirs = history(tmp_path / "two", 6), history(tmp_path / "one", 6)
    assert [ours[step] for step in ours] == [pytest.approx(theirs[step], rel=1e-5) for step in theirs]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one")]
    assert summaries[0]["eval_loss"] == pytest.approx(summaries[1]["eval_loss"], rel=1e-5)
    assert not (tmp_path / "two" / ".ray").exists()


def test_a_finished_run_outlives_a_mistake_that_would_overwrite_it(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{}")
    argv = [*flags, "--max-steps", 6, *SEVERAL, "--output-dir", tmp_path]
    wrong = ["--overwrite", "--report-to", "nowhere"]
    assert "transformers does not accept the flags" in refused(*TRAIN, *argv, *wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json", "summary.json"]


def test_nothing_of_a_run_at_work_is_overwritten(flags: list[object], tmp_path: Path) -> None:
    argv = [*flags, "--output-dir", tmp_path / "out", "--max-steps", 100_000, "--save-steps", 3]
    first = Run(tmp_path / "log", *argv)
    while not (tmp_path / "out" / "checkpoint-3").exists():
        assert first.processes[0].is_alive(), first.output()
        time.sleep(0.02)
    os.kill(first.processes[0].pid or 0, signal.SIGSTOP)
    before = resume.checkpoints(tmp_path / "out")
    assert "another run is active" in refused(*TRAIN, *argv, *SEVERAL, "--overwrite")
    assert resume.checkpoints(tmp_path / "out") == before
    first.processes[0].kill()
    assert first.end() == [-9]


def test_two_clusters_do_not_share_a_directory(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "log").write_text("the other's")
    held = "import sys; from pathlib import Path; from train import resume\n"
    held += f"lock = resume.lock(Path({str(tmp_path)!r}), of_cluster=True); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", held], cwd=ROOT, **pipes) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        refusal = refused(*TRAIN, *flags, "--max-steps", 6, *SEVERAL, "--output-dir", tmp_path)
        other.communicate()
    assert "another run is active" in refusal
    assert (tmp_path / ".ray" / "log").read_text() == "the other's"


def test_an_output_that_would_be_lost_with_the_job(
    flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match="would be deleted with the working directory of the Ray job"):
        train.run.main([str(flag) for flag in (*flags, *SEVERAL, "--output-dir", "relative")])


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([*TRAIN, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.exhaustive
def test_a_worker_that_is_killed_changes_nothing(flags: list[object], tmp_path: Path) -> None:
    steps = ["--max-steps", 200, "--save-steps", 20, "--save-total-limit", 2]
    process = start(*flags, *steps, *SEVERAL, "--output-dir", tmp_path / "two")
    wait_for(process, tmp_path / "two" / "checkpoint-40")
    below = psutil.Process(process.pid).children(recursive=True)
    [each for each in below if "RayTrainWorker" in " ".join(each.cmdline())][-1].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming from" in output and "Traceback" not in output
    whole = ["--per-device-train-batch-size", 4, "--output-dir", tmp_path / "whole"]
    ranks = Run(tmp_path / "log", *flags, *steps, *whole, ranks=2)
    assert ranks.end() == [0, 0], ranks.output()
    assert history(tmp_path / "two", 200) == history(tmp_path / "whole", 200)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_waiting_for_a_cluster_that_is_too_small_can_be_ended(
    flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    process = start(*flags, "--max-steps", 6, *SEVERAL, "--output-dir", tmp_path / "two")
    try:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(2)]
        time.sleep(5)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        cluster.shutdown()
    assert lines[0].startswith("joining the Ray cluster at ")
    assert lines[1] == "waiting for 2 CPUs; the cluster has 1 now\n"
    assert process.returncode == code and "Traceback" not in rest, rest


@pytest.mark.exhaustive
def test_signals_end_the_workers_and_a_mistake_reaches_the_user(flags: list[object], tmp_path: Path) -> None:
    argv = [*flags, "--max-steps", 100_000, "--save-steps", 20, *SEVERAL, "--output-dir", tmp_path / "two"]
    process = start(*argv)
    wait_for(process, tmp_path / "two" / "checkpoint-20")
    process.terminate()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 143, output
    assert "the same command resumes" in output and "Traceback" not in output
    process = start(*argv)
    assert process.stdout
    assert any("resuming from" in line for line in process.stdout)
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in output, output
    refusal = run(*TRAIN, *argv, "--mask-ratio", 0.2, code=2)
    assert "mask_ratio: 0.3 → 0.2" in refusal and "Traceback" not in refusal
