"""What a scoring run lives through: killed drivers, workers, nodes; shards that kill or hang; full disks; SIGTERM."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import LENGTH, SCORE, TOP_K, command, run
from in_process import score_here
from killing import end_of, hashes, kill_with_children, records, start, wait_for
from ray.cluster_utils import Cluster
from trap import save_trap

from entropy_masking.errors import RunError
from entropy_masking.shards import commit, manifests
from entropy_masking.shards.schema import Record


@pytest.fixture
def slow(work: Path, tmp_path: Path) -> Path:
    """The world's teacher, but a forward takes its time, long enough to be killed in the middle, until ``hurry``."""
    return save_trap(work / "teacher", tmp_path / "slow" / "teacher", "none", seconds_a_forward=0.1)


def hurry(slow: Path) -> None:
    (slow.parent / "hurry").touch()


def slowly(work: Path, teacher: Path, output: Path, *more: str) -> list[str]:
    return command(work, output, "--teacher", str(teacher), "--trust-remote-code", *more)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_a_driver_killed_at_random_points(work: Path, scored: Path, slow: Path, tmp_path: Path, kills: int) -> None:
    """Each time with its cluster, as when a machine goes; what was done by then is never done again."""
    generator = random.Random(kills)
    expected = hashes(scored)
    arguments = slowly(work, slow, tmp_path / "out", "--workers", "2")
    done: dict[str, str] = {}
    for kill in range(kills):
        process = start(arguments)
        goal = len(done) + generator.randint(0, max(0, (len(expected) - len(done)) // (kills - kill) - 1))
        wait_for(process, lambda goal=goal: len(records(tmp_path / "out")) > goal)
        time.sleep(generator.random() * 0.3)
        kill_with_children(process)
        found = {path.name: path.read_text() for path in tmp_path.glob("out/_records/part-*.json")}
        assert found.items() >= done.items(), "a shard that was done was scored again"
        assert not (tmp_path / "out" / "manifest.json").exists() or len(found) == len(expected)
        done = found
    hurry(slow)
    end_of(start(arguments))
    assert hashes(tmp_path / "out") == expected
    assert {p.name for p in tmp_path.glob("out/part-*")} == expected.keys()
    found = {path.name: path.read_text() for path in tmp_path.glob("out/_records/part-*.json")}
    assert found.items() >= done.items()


def test_a_killed_worker_is_replaced(work: Path, scored: Path, slow: Path, tmp_path: Path) -> None:
    process = start(slowly(work, slow, tmp_path / "out", "--workers", "1"))
    first = wait_for(process, lambda: records(tmp_path / "out"))[0]
    os.kill(int(first["worker"].rpartition(":")[2]), signal.SIGKILL)
    hurry(slow)
    end_of(process)
    assert hashes(tmp_path / "out") == hashes(scored)
    assert len({record["worker"] for record in records(tmp_path / "out")}) == 2


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    each = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=each)
    yield cluster
    cluster.shutdown()


def test_nodes_come_and_go(work: Path, scored: Path, slow: Path, tmp_path: Path, cluster: Cluster) -> None:
    """A node that joins later is used; one that is removed with shards under way takes nothing along."""
    process = start(slowly(work, slow, tmp_path / "out", "--batch-tokens", "256"), RAY_ADDRESS=cluster.address)
    wait_for(process, lambda: records(tmp_path / "out"))
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    wait_for(process, lambda: len({record["worker"] for record in records(tmp_path / "out")}) == 2)
    cluster.remove_node(node)
    hurry(slow)
    end_of(process)
    run(*command(work, tmp_path / "local", "--batch-tokens", "256", "--backend", "local"))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "local")


@pytest.mark.exhaustive
def test_a_head_node_without_cores_asks_another_node(work: Path, scored: Path, tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    try:
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        end_of(start(command(work, tmp_path / "out"), RAY_ADDRESS=cluster.address))
    finally:
        cluster.shutdown()
    assert hashes(tmp_path / "out") == hashes(scored)


def trapped(work: Path, tmp_path: Path, trap: str, *more: str, **settings: Any) -> list[str]:
    """Twelve documents in about as many shards, of which one springs the teacher's trap."""
    lines = (work / "corpus.jsonl").read_text().splitlines()[:12]
    lines[5] = json.dumps({"text": "abcd ü " * 20})
    # compressed, so that all shards are one item: the others must not be lost
    (tmp_path / "trapped.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    teacher = save_trap(work / "teacher", tmp_path / "teacher", trap, **settings)
    flags = ["--corpus", tmp_path / "trapped.jsonl.gz", "--teacher", teacher, "--output", tmp_path / "out"]
    sizes = ["--sequence-length", LENGTH, "--top-k", TOP_K, "--shard-tokens", 60, "--dtype", "float32"]
    return [*SCORE, *map(str, flags + sizes), "--trust-remote-code", *more]


def test_a_shard_that_ends_its_process_is_given_up(work: Path, tmp_path: Path) -> None:
    arguments = trapped(work, tmp_path, "exit", "--max-attempts", "2", "--workers", "1")
    output = run(*arguments, code=1)
    assert "its worker died or hung 2 times" in output and "Traceback" not in output.partition("failed: ")[2]
    assert not (tmp_path / "out" / "manifest.json").exists()
    (note,) = tmp_path.glob("out/_attempts/*")
    assert json.loads(note.read_text())["attempts"] == 2
    planned = json.loads((tmp_path / "out" / "_records" / "run.json").read_text())["shards"]
    assert len(records(tmp_path / "out")) == planned - 1 > 5


def test_a_shard_that_hangs_is_given_up(work: Path, tmp_path: Path) -> None:
    arguments = trapped(work, tmp_path, "hang", "--max-attempts", "1", "--shard-timeout", "5", "--workers", "1")
    output = run(*arguments, "--max-failed-shards", "1")
    manifest = manifests.read_manifest(str(tmp_path / "out"))
    assert len(manifest.failed) == 1 and len(manifest.shards) == manifest.planned_shards - 1
    assert f"given up            1 shards ({next(iter(manifest.failed))}" in output
    assert "its worker died or hung 2 times" in output, "the second time by itself"


def test_a_shard_that_raises_is_tried_again_and_named(work: Path, tmp_path: Path) -> None:
    output = run(*trapped(work, tmp_path, "error", "--backend", "local"), code=1)
    assert "1 of" in output and "a kernel that was never written" in output
    (attempts,) = [json.loads(path.read_text()) for path in tmp_path.glob("out/_attempts/*")]
    assert attempts["attempts"] == 3
    assert len(records(tmp_path / "out")) >= 5


def test_a_teacher_without_memory_gets_smaller_batches(work: Path, tmp_path: Path) -> None:
    arguments = trapped(work, tmp_path, "memory", "--backend", "local", rows_that_fit=5)
    output = run(*arguments, "--batch-tokens", str(LENGTH * 32))
    rescued = [record for record in records(tmp_path / "out") if "batch_tokens" in record]
    assert [record["batch_tokens"] for record in rescued] == [LENGTH * 4]
    assert "smaller batches     1 shards" in output
    assert all(record["scored_tokens"] for record in records(tmp_path / "out") if record["rows"])


def test_nan_is_never_stored_as_a_score(work: Path, tmp_path: Path) -> None:
    output = run(*trapped(work, tmp_path, "nan", "--backend", "local"), code=2)
    assert "gives NaN in float32" in output


def test_sigterm_ends_a_run_cleanly(work: Path, scored: Path, slow: Path, tmp_path: Path) -> None:
    for backend in ("local", "ray"):
        arguments = slowly(work, slow, tmp_path / backend, "--backend", backend)
        process = start(arguments)
        wait_for(process, lambda backend=backend: records(tmp_path / backend))
        process.terminate()
        output = end_of(process, code=143)
        assert "shards are done; the same command resumes" in output and "Traceback" not in output
        assert not list((tmp_path / backend).glob(".*.tmp"))
        assert len(records(tmp_path / backend)) < len(hashes(scored))
    hurry(slow)
    run(*slowly(work, slow, tmp_path / "local", "--backend", "local"))
    assert hashes(tmp_path / "local") == hashes(scored)


WHILE_RAY_STARTS = """
import os, runpy, sys
import ray._raylet
start_core = ray._raylet.CoreWorker
def start_core_and_signal(*settings):
    core = start_core(*settings)
    os.kill(os.getpid(), number)
    return core
ray._raylet.CoreWorker = start_core_and_signal
number, sys.argv = int(sys.argv[1]), sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)]
)
def test_a_signal_when_ray_has_replaced_the_handlers(work: Path, tmp_path: Path, number: int, code: int) -> None:
    python, *arguments = command(work, tmp_path / "out", "--workers", "1")
    output = end_of(start([python, "-c", WHILE_RAY_STARTS, str(int(number)), *arguments]), code)
    assert output.splitlines()[-1] in ("terminated", "interrupted") and "Traceback" not in output
    assert not records(tmp_path / "out")


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.exhaustive)])
def test_an_output_that_is_deleted_in_mid_run(
    work: Path, scored: Path, slow: Path, tmp_path: Path, backend: str
) -> None:
    arguments = slowly(work, slow, tmp_path / "out", "--backend", backend)
    process = start(arguments)
    wait_for(process, lambda: len(records(tmp_path / "out")) >= 2)
    subprocess.run(["rm", "-rf", tmp_path / "out"])
    output = end_of(process, code=1)
    line = next(line for line in output.splitlines() if line.startswith("failed: "))
    assert "run.json was deleted or replaced during the run; run the command again" in line
    assert "Traceback" not in output and not (tmp_path / "out" / "manifest.json").exists()
    hurry(slow)
    subprocess.run(["rm", "-rf", tmp_path / "out"])  # of what the shards in progress wrote
    run(*arguments)
    assert hashes(tmp_path / "out") == hashes(scored)


def test_a_shard_that_is_deleted_in_mid_run(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_shard = commit.commit_shard

    def delete_another(directory: str, index: int, *others: Any) -> Record:
        if index == 5:
            (tmp_path / "out" / "part-00000.parquet").unlink()
        return commit_shard(directory, index, *others)

    monkeypatch.setattr(commit, "commit_shard", delete_another)
    sizes = ["--sequence-length", LENGTH, "--top-k", TOP_K, "--shard-tokens", 1500]
    with pytest.raises(RunError, match=r"1 shards in .* were deleted or replaced during the run"):
        score_here(work / "corpus.jsonl", work / "teacher", tmp_path / "out", *sizes)
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    score_here(work / "corpus.jsonl", work / "teacher", tmp_path / "out", *sizes)
    assert (tmp_path / "out" / "part-00000.parquet").exists() and (tmp_path / "out" / "manifest.json").exists()


def test_a_full_disk_ends_the_run_at_once(work: Path, tmp_path: Path) -> None:
    """No other shard would fare better. (A limit on file size stands for the disk: both fail a write half-way.)"""
    arguments = command(work, tmp_path / "out", "--backend", "local", "--shard-tokens", "12000")
    sizes = [path.stat().st_size for path in (work / "tokenizer").iterdir()]
    limits = (max(sizes) + 100, resource.RLIM_INFINITY)
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    output = end_of(process, code=1)
    assert "make room, then run the command again" in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.tmp")) and not records(tmp_path / "out")
