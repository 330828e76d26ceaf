"""The ways to hand a scoring job to a Ray cluster that asks for a token, and the mistakes in joining it."""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests
from harness import LENGTH, ROOT, SCORE, run, shell

README = (ROOT / "README.md").read_text()


class Head(NamedTuple):
    """A one-node cluster on loopback: where jobs are submitted, where drivers connect, and the home of a token."""

    dashboard: str
    address: str
    home: Path

    def shell(self, line: str, directory: Path, code: int = 0, **environment: str) -> str:
        """Run a line as the owner of the token, after `export RAY_AUTH_MODE=token`."""
        return shell(line, directory, code, **{"HOME": str(self.home), "RAY_AUTH_MODE": "token"} | environment)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        port, dashboard = one.getsockname()[1], two.getsockname()[1]
    home = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets lie below it
    ray = str(Path(sys.executable).parent / "ray")
    token = secrets.token_hex(32)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(token)
    flags = f"--head --block --port {port} --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 --num-cpus 2"
    # the agent's own port would be that of the agent of any other cluster here, and without it a node runs no jobs
    flags += f" --dashboard-port {dashboard} --dashboard-agent-listen-port 0 --object-store-memory 100000000"
    # as after `source .venv/bin/activate`
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_TMPDIR": str(home)}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token"}
    with open(home / "output", "w") as output:
        process = subprocess.Popen([ray, "start", *flags.split()], stdout=output, stderr=output, env=environment)
    try:
        for _ in range(20):
            assert process.poll() is None, (home / "output").read_text()
            # no dashboard yet, then nothing to run jobs
            with contextlib.suppress(requests.RequestException):
                job = {"entrypoint": "true"}
                headers = {"Authorization": f"Bearer {token}"}
                if requests.post(f"http://127.0.0.1:{dashboard}/api/jobs/", json=job, headers=headers, timeout=15).ok:
                    break
            time.sleep(2)
        else:
            pytest.fail(f"the head node takes no jobs\n{(home / 'output').read_text()}")
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", home)
    finally:
        nodes = [process, *psutil.Process(process.pid).children(recursive=True)]
        for each in nodes:  # at once: a terminated node waits for its idle workers
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(30)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def shared(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage that all nodes see: texts, a teacher, and the shards of the local backend to compare with."""
    shared = tmp_path_factory.mktemp("shared")
    (shared / "texts").mkdir()
    shutil.copy(work / "corpus.jsonl", shared / "texts")
    shutil.copytree(work / "teacher", shared / "teacher")
    local = ["--corpus", shared / "texts", "--teacher", shared / "teacher", "--output", shared / "local"]
    run(*SCORE, *local, *SIZES.split(), "--backend", "local")
    return shared


SIZES = f"--sequence-length {LENGTH} --shard-tokens 4000 --dtype float32 --top-k 4"


def hashes(directory: Path) -> list[str]:
    return [entry["sha256"] for entry in json.loads((directory / "manifest.json").read_text())["shards"]]


def test_submitting_a_checkout(head: Head, shared: Path) -> None:
    """The command of the README; `ray job submit` would take the job's flags for its own without the `--`."""
    line = next(line for line in README.splitlines() if line.startswith("ray job submit"))
    head.shell(f"{line.replace('/shared', str(shared))} {SIZES}", ROOT, RAY_ADDRESS=head.dashboard)
    assert hashes(shared / "scored") == hashes(shared / "local") and len(hashes(shared / "local")) > 1


@pytest.mark.exhaustive
def test_submitting_the_script_that_the_cluster_has(head: Head, shared: Path, tmp_path: Path) -> None:
    flags = f"--corpus {shared}/texts --teacher {shared}/teacher --output {shared}/bare {SIZES}"
    head.shell(f"ray job submit -- {ROOT}/pipeline/score.py {flags}", tmp_path, RAY_ADDRESS=head.dashboard)
    assert hashes(shared / "bare") == hashes(shared / "local")


def test_a_driver_beside_the_cluster(head: Head, shared: Path, tmp_path: Path) -> None:
    flags = f"--corpus {shared}/texts --teacher {shared}/teacher --output {shared}/driver {SIZES}"
    line = f"env --unset=RAY_AUTH_MODE python {ROOT}/pipeline/score.py {flags}"  # score.py sends the token by itself
    head.shell(line, tmp_path, RAY_ADDRESS=head.address)
    assert hashes(shared / "driver") == hashes(shared / "local")


def test_an_output_that_would_be_lost_with_the_job(head: Head, shared: Path, tmp_path: Path) -> None:
    flags = f"--corpus {shared}/texts --teacher {shared}/teacher --output relative {SIZES}"
    line = f"ray job submit --working-dir {ROOT} -- python pipeline/score.py {flags}"
    output = head.shell(line, tmp_path, code=1, RAY_ADDRESS=head.dashboard)
    assert "would be deleted with the working directory of the Ray job" in output and "Traceback" not in output


def refusal(head: Head, home: Path, before: str = "", **environment: str) -> str:
    """The one sentence in which a command refuses to join the cluster; ``before`` is Python code that runs first."""
    code = f"{before}\nfrom entropy_masking.commands import console, ray_cluster\nconsole.run(ray_cluster.connect)"
    environment = {"HOME": str(home), "RAY_ADDRESS": head.address, "PYTHONPATH": str(ROOT)} | environment
    unset = "" if "RAY_AUTH_MODE" in environment else "--unset=RAY_AUTH_MODE"
    output = shell(f"env {unset} python -c {shlex.quote(code)}", home, code=2, **environment)
    assert "Traceback" not in output
    (sentence,) = (line for line in output.splitlines() if line.startswith("error: "))
    return sentence


def test_why_a_cluster_cannot_be_joined(head: Head, tmp_path: Path) -> None:
    refused = f"the Ray cluster at {head.address}"
    assert "RAY_AUTH_MODE is token, but this user has no token" in refusal(head, tmp_path, RAY_AUTH_MODE="token")
    message = refusal(head, tmp_path, RAY_AUTH_TOKEN="7" * 64)
    assert f"{refused} asks for a token, and this user's is missing or wrong; set RAY_AUTH_TOKEN" in message
    message = refusal(head, head.home, "import ray\nray.__version__ = '2.59.0'", RAY_AUTH_MODE="token")
    assert f"{refused} refuses the connection (Version mismatch" in message and "the same versions" in message
    for address in "ray://127.0.0.1:10001", head.dashboard, "127.0.0.1":
        assert f"RAY_ADDRESS {address} is not HOST:PORT" in refusal(head, head.home, RAY_ADDRESS=address)


def test_a_last_cluster_that_has_died(head: Head, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    message = refusal(head, tmp_path, RAY_ADDRESS="", RAY_TMPDIR=str(tmp_path))
    assert "nothing answers at 127.0.0.1:9" in message and "`ray stop`" in message


@pytest.mark.exhaustive
def test_a_service_that_is_no_head(head: Head) -> None:
    message = refusal(head, head.home, RAY_ADDRESS=head.dashboard.removeprefix("http://"))
    assert "does not answer as the head of a Ray cluster" in message
