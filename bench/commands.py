"""Command lines of the benches, and the scripts that they run in processes of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from entropy_masking.commands.flags import Parser
from entropy_masking.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
# otherwise glibc hands large buffers back to the kernel at each step
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | MALLOC


def new_parser(description: str | None) -> Parser:
    """A parser whose help begins with the docstring of a bench."""
    return Parser(f"bench/{Path(sys.argv[0]).name}", description)


def keep_buffers() -> None:
    """Start this script again unless malloc was told to keep large buffers: it reads its settings once."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def run_script(script: object, *flags: object) -> str:
    """What a Python script prints. Raises RunError if it fails."""
    command = [sys.executable, str(script), *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RunError(f"{shlex.join(command[1:])} failed: {' '.join(result.stderr.split())[-500:]}")
    return result.stdout


def measure_in_child(*flags: object) -> Any:
    """What this script prints as JSON when it runs with more flags, in a process that shares no memory with others."""
    return json.loads(run_script(*sys.argv, *flags).splitlines()[-1])


class Commands:
    """Runs scripts of this project, several at once: lines of ``output/commands.sh``, with logs in ``output/logs``."""

    def __init__(self, output: Path) -> None:
        self.output, self.stopped = output, False
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()

    def run(self, name: str, script: str, *flags: object) -> None:
        """Run a script, which skips what is done, to its end. For any thread. Raises RunError if it fails."""
        command = [sys.executable, script, *map(str, flags)]
        line = f"python {shlex.join(command[1:])}"
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        log = self.output / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with self.lock, open(log, "a") as file, open(self.output / "commands.sh", "a+") as commands:
            if self.stopped:
                raise RunError(f"{name} was not started, because another command failed or was interrupted")
            commands.seek(0)
            if line not in commands.read().splitlines():
                commands.write(f"{line}\n")
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=file)
            self.running.add(process)
        code = process.wait()
        self.running.discard(process)
        if code:
            raise RunError(f"{name} failed with exit code {code}; see {log}")

    def stop(self) -> None:
        """End all that is running, which has saved its work or does so now, and start nothing more."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        for process in running:
            process.terminate()
            process.wait()
