"""Ctrl-C and SIGTERM, at any moment of a command."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# a command that says where it is, and swallows the first exception as some libraries do
SCRIPT = """
import sys, time
from entropy_masking.commands import console

def wait(seconds):
    print(seconds, flush=True)
    time.sleep(seconds)

def main():
    try:
        {main}
    finally:
        time.sleep(2.5)
        print("cleaned up", flush=True)

console.check_flags(lambda: None)
{imports}
console.run({command})
"""
THREAD = "__import__('threading').Thread(target=wait, args=[60]).start"  # the interpreter waits for its end
SWALLOWED = "\n        ".join(["try: wait(60)", "except BaseException: pass", "wait(59)"])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "places, cleans",
    [
        ({"imports": "wait(60)"}, False),
        ({"main": "wait(60)"}, True),
        ({"main": SWALLOWED}, True),
        ({"command": THREAD}, False),
    ],
)
def test_a_signal_ends_a_command(
    places: dict[str, str], cleans: bool, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    script = SCRIPT.format(**{"main": "pass", "imports": "", "command": "main"} | places)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "60\n"
    time.sleep(0.1)
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and err.strip() in ("interrupted", "terminated")
    assert ("cleaned up" in out) == cleans
    assert time.monotonic() - started < 8
