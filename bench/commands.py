"""Runs commands of this project, each in its own process: several at a time, all recorded, all ended on request."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.table import MALLOC
from entropy_masking.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | MALLOC


class Commands:
    """Runs commands, of which each is a line of ``output/commands.sh`` and prints to a file in ``output/logs``."""

    def __init__(self, output: Path) -> None:
        self.output, self.stopped = output, False
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()

    def run(self, name: str, command: str) -> None:
        """Run a command to its end, in any thread; the command itself skips finished work.

        Raises:
            RunError: it failed, or was stopped.
        """
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        log = self.output / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with self.lock, open(log, "a") as file, open(self.output / "commands.sh", "a+") as commands:
            if self.stopped:
                raise RunError(f"{name} did not start, because the screen was stopped")
            commands.seek(0)
            if f"python {command}" not in commands.read().splitlines():
                commands.write(f"python {command}\n")
            line, environment = [sys.executable, *shlex.split(command)], os.environ | ENVIRONMENT
            process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=file, stderr=file)
            self.running.add(process)
        code = process.wait()
        self.running.discard(process)
        if code:
            raise RunError(f"{name} failed with exit code {code}; see {log}")

    def stop(self) -> None:
        """Start no more commands, and end the running ones, which save their work."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        for process in running:
            process.terminate()
            process.wait()
