"""Commands of this project, each in a process of its own: several at once, written down, ended together."""

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
    """Runs commands; each is a line of ``output/commands.sh``, and what it prints is in ``output/logs``.

    Attributes:
        stopped: no more are begun.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.stopped = output, False
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()

    def run(self, name: str, script: str, *flags: object) -> None:
        """Run a command to its end; it skips what is done. For any thread.

        Raises:
            RunError: it failed, or was stopped.
        """
        line = [script, *map(str, flags)]
        shown = f"python {shlex.join(line)}"
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        log = self.output / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with self.lock, open(log, "a") as file, open(self.output / "commands.sh", "a+") as commands:
            if self.stopped:
                raise RunError(f"{name} was not begun any more")
            commands.seek(0)
            if shown not in commands.read().splitlines():
                commands.write(f"{shown}\n")
            command = [sys.executable, *line]
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=file)
            self.running.add(process)
        code = process.wait()
        self.running.discard(process)
        if code:
            raise RunError(f"{name} failed with exit code {code}; see {log}")

    def stop(self) -> None:
        """End what is under way; it has saved what it had, or saves it now."""
        with self.lock:
            self.stopped = True
            left = list(self.running)
        for process in left:
            process.terminate()
            process.wait()
