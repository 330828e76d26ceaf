"""SIGINT, SIGTERM and SIGKILL at random moments of every long command: exit codes, leftovers, the same result."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import ROOT, command, run, save_student_config

from entropy_masking.shards.manifests import read_manifest

MOMENTS = int(os.environ.get("MOMENTS", "6"))  # per command
IN_A_ROW = 3  # before the command may run to its end
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
ENDS_WITHIN = 30.0  # seconds on a busy machine
IMPORTS = 1.0  # seconds in which Python itself may still handle a signal

Outcome = dict[str, Any]


def digests(directory: Path, pattern: str) -> Outcome:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob(pattern)}


def result_of_glue(directory: Path) -> Outcome:
    """Without what differs from one time to the next."""
    results = {path.name: json.loads(path.read_text()) for path in directory.glob("*.json")}
    return {name: (value["metrics"], value["score"]) for name, value in results.items()}


@pytest.fixture(params=["train", "score local", "score on Ray", "glue"])
def long_command(
    request: pytest.FixtureRequest, work: Path, scored: Path, data: Path, tmp_path: Path
) -> tuple[Callable[[Path], list[str]], Callable[[Path], Outcome]]:
    """A command line for an output directory, and what is in this directory in the end."""
    if request.param == "train":
        student = save_student_config(tmp_path / "student", read_manifest(str(scored)).vocab_size)
        flags = ["--shards", scored, "--model", student, "--entropy-source", "self", "--eval-fraction", 0]
        flags += ["--max-steps", 200, "--save-steps", 20, "--learning-rate", 1e-3, "--bf16", "false"]
        train = [sys.executable, ROOT / "train" / "run.py", *flags, "--per-device-train-batch-size", 4, "--output-dir"]
        return lambda output: list(map(str, [*train, output])), lambda output: digests(output, "model.safetensors")
    if request.param == "glue":
        flags = ["--model", work / "teacher", "--tasks", "rte,cola", "--data", data, "--seeds", "1,2"]
        glue = [sys.executable, ROOT / "glue" / "run.py", *flags, "--dtype", "float32", "--max-length", 32, "--output"]
        return lambda output: list(map(str, [*glue, output])), result_of_glue
    backend = ["--backend", "local"] if request.param == "score local" else ["--workers", "2"]
    return lambda output: command(work, output, *backend), lambda output: digests(output, "part-*.parquet")


def processes_of(mark: str) -> list[psutil.Process]:
    """All processes whose environment has the mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MOMENT") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def interrupt(line: list[str], seconds: float, number: signal.Signals, mark: str, is_done: Callable[[], bool]) -> bool:
    """Send a signal after some seconds. False if the command has ended by itself."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(line, env=os.environ | {"MOMENT": mark}, **pipes)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        assert process.returncode == 0, process.communicate()[0]
        return False
    process.send_signal(number)
    started = time.monotonic()
    out, _ = process.communicate(timeout=2 * ENDS_WITHIN)
    took = time.monotonic() - started
    print(f"{line[1].rpartition('/')[2]} {number.name} after {seconds:.2f} s: {process.returncode} in {took:.2f} s")
    if process.returncode in (0, -number) and number != signal.SIGKILL and is_done():  # only Ray and Python had to end
        return False
    early = {-number} if seconds < IMPORTS else set()
    assert process.returncode in {CODES[number], *early}, f"{number.name} after {seconds:.2f} s\n{out}"
    assert took < ENDS_WITHIN
    assert "Traceback" not in out or seconds < IMPORTS, out
    until = time.monotonic() + ENDS_WITHIN
    while left := processes_of(mark):  # those of Ray end when they have lost their driver
        assert time.monotonic() < until, [process.cmdline() for process in left]
        time.sleep(0.2)
    return True


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_signals_at_random_moments(
    long_command: tuple[Callable[[Path], list[str]], Callable[[Path], Outcome]], tmp_path: Path
) -> None:
    line, outcome = long_command
    generator = random.Random(MOMENTS)
    started = time.monotonic()
    assert subprocess.run(line(tmp_path / "whole"), capture_output=True).returncode == 0
    length, expected = time.monotonic() - started, outcome(tmp_path / "whole")
    assert expected
    moments = [(generator.random(), number) for number in CODES for _ in range(MOMENTS // len(CODES))]
    generator.shuffle(moments)
    while moments:
        output = tmp_path / f"out{len(moments)}"
        for _ in range(min(IN_A_ROW, len(moments))):
            share, sent = moments.pop()
            done = lambda output=output: outcome(output) == expected  # noqa: E731
            if not interrupt(line(output), share * length, sent, f"{output}/{len(moments)}", done):
                break
        run(*line(output))
        assert outcome(output) == expected
        assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")], "temporary files are left"
