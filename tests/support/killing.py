"""Scoring runs in the background, to be killed, and what they have done."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from entropy_masking.shards import manifests

PATIENCE = 240  # seconds


def hashes(directory: Path) -> dict[str, str]:
    return {entry.file: entry.sha256 for entry in manifests.read_manifest(str(directory)).shards}


def records(directory: Path) -> list[dict[str, Any]]:
    """The records that are there; each is whole, since records are written atomically."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("_records/part-*.json"))]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, env=os.environ | environment, start_new_session=True, **pipes)


def wait_for(process: subprocess.Popen[str], reached: Callable[[], Any]) -> Any:
    """What ``reached`` gives, once it gives something; the process must still be at work then."""
    until = time.monotonic() + PATIENCE
    while not (found := reached()):
        assert process.poll() is None, f"it ended too early\n{end_of(process, process.returncode)}"
        if time.monotonic() > until:
            pytest.fail(f"it is stuck\n{kill_with_children(process)}")
        time.sleep(0.05)
    return found


def end_of(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it does not end\n{kill_with_children(process)}")
    assert process.returncode == code, f"exit code {process.returncode}\n{output}"
    return output


def kill_with_children(process: subprocess.Popen[str]) -> str:
    """SIGKILL to the driver first, then to what it had started; what they had printed."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    return process.communicate(timeout=PATIENCE)[0]
