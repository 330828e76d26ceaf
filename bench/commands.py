"""What the command lines of the benches share, and the runs of the screen."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

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


def run_logged(output: Path, name: str, script: str, *flags: object) -> None:
    """Run a script of this project to its end, with its log in ``output/logs``. Raises RunError if it fails."""
    command = [sys.executable, script, *map(str, flags)]
    print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
    log = output / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        print(f"python {shlex.join(command[1:])}", file=file, flush=True)
        code = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=file).returncode
    if code:
        raise RunError(f"{name} failed with exit code {code}; see {log}")
