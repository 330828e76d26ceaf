"""Processes that a server forks after it has imported everything. Each saves about five seconds of CPU time.

``run_script`` runs any script to its end; ``Run`` is train/run.py on several ranks, and can be killed at a chosen step.
"""

import atexit
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.run"])
ENVIRONMENT = dict(os.environ)  # of the server


def has_same_environment() -> bool:
    """Whether the environment is still the one in which the server made its imports."""
    changes = {name for name, _ in os.environ.items() ^ ENVIRONMENT.items()}
    return changes <= {"PYTEST_CURRENT_TEST"}


def run_script(arguments: list[str], timeout: float) -> tuple[int, str]:
    """Run ``python ARGUMENT…``: its exit code, and its standard output and error."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_run, args=(arguments, Path.cwd(), outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} did not end within {timeout:g} s")
        return process.exitcode, "".join(output.read_text() for output in outputs)


class Run:
    """A command line of train/run.py, started at once, on one rank or several.

    Args:
        log: a file for what they print.
        kill_at: the step after which the last rank sends itself ``kill_with``.
        kill_in_writing: it does so once the checkpoint of that step is written, before it has its name.
        limit: bytes that a file may have at most, which stands for a full disk.
    """

    def __init__(
        self,
        log: Path,
        *flags: object,
        ranks: int = 1,
        kill_at: int | None = None,
        kill_with: int = signal.SIGKILL,
        kill_in_writing: bool = False,
        limit: int | None = None,
    ) -> None:
        self.log, argv = log, [str(flag) for flag in flags]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            kill = (kill_at if rank == ranks - 1 else None, kill_with, kill_in_writing)
            settings = (environment if ranks > 1 else {}, str(log), argv, kill, limit)
            self.processes.append(CONTEXT.Process(target=_train, args=settings))
        for process in self.processes:
            process.start()

    def end(self) -> list[int | None]:
        """Exit codes by rank; negative ones are signals."""
        for process in self.processes:
            process.join(120)
            if process.is_alive():
                process.kill()
                raise AssertionError(f"it did not end\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def history(directory: Path, step: int) -> dict[int, tuple[float, float]]:
    """What a checkpoint knows of each step: loss and gradient norm."""
    entries: list[dict[str, Any]] = json.loads((directory / f"checkpoint-{step}" / "trainer_state.json").read_text())[
        "log_history"
    ]
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry}


def _run(arguments: list[str], directory: Path, outputs: list[Path]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in any other process
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(directory)
    sys.argv, sys.path[0:0] = arguments, [str(Path(arguments[0]).parent)]
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(
    environment: dict[str, object], log: str, argv: list[str], kill: tuple[int | None, int, bool], limit: int | None
) -> None:
    import torch

    from entropy_masking.commands import console
    from train import guard, resume, run

    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in any other process
    os.setpgrp()
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    kill_at, kill_with, in_writing = kill
    end_step, complete = guard.Guard.on_step_end, resume.complete

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        end_step(self, args, state, control, **others)
        if state.global_step == kill_at and not in_writing:
            os.kill(os.getpid(), kill_with)

    def complete_or_die(directory: Path, name: str, *others: Any) -> None:
        if in_writing and name == f"checkpoint-{kill_at}":
            os.kill(os.getpid(), kill_with)
        complete(directory, name, *others)

    guard.Guard.on_step_end, resume.complete = on_step_end, complete_or_die  # type: ignore[method-assign]
    console.run(lambda: run.main(argv))
