"""The same run in several processes on a Ray cluster: ``ray.train.torch.TorchTrainer``."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from entropy_masking import storage
from entropy_masking.commands import ray_cluster
from entropy_masking.commands.console import Terminated
from entropy_masking.errors import RunError, UsageError
from train import guard, resume
from train.options import Options

MOST_FAILURES = 3  # of workers, in one call
RELAY_SECONDS = 0.5
RAY = ".ray"  # what Ray Train writes for itself, in the output directory
TERMINATED = 143  # exit code


def run(main: Callable[[list[str]], None], argv: list[str], options: Options, args: TrainingArguments) -> None:
    """Call ``main`` in ``--num-workers`` processes, on the cluster that is there or on one that is started here.

    Each gets a GPU, where the cluster has any. When a worker dies all are started again, and go on from the last
    checkpoint. SIGTERM is passed on.

    Raises:
        UsageError, RunError, Terminated: as the workers say.
    """
    workers, output = options.num_workers, str(args.output_dir)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(output).is_absolute():
        raise UsageError(f"--output-dir {output} would be lost with the job's directory; name an absolute path")
    import ray.train.torch

    api: Any = ray.train  # whose types are still those of its first version

    directory = Path(storage.absolute(output))
    _lock = resume.lock(directory, of_cluster=True)  # until this function returns
    directory.mkdir(parents=True, exist_ok=True)
    (directory / guard.STOP).unlink(missing_ok=True)
    # the workers drop the run that is there, once they know that theirs can begin; those that are started again don't
    overwrite = directory / resume.OVERWRITE
    overwrite.touch() if options.overwrite else overwrite.unlink(missing_ok=True)
    log = directory / RAY / "log"
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    ray_cluster.connect("train", cpus=workers)

    terminated = False

    def ask_to_stop(*_: object) -> None:
        nonlocal terminated
        if terminated := not log.exists():  # no worker is there yet
            raise Terminated
        (directory / guard.STOP).touch()

    log.unlink(missing_ok=True)
    on_sigterm = signal.signal(signal.SIGTERM, ask_to_stop)
    try:
        there = ray.cluster_resources()
        gpus = there.get("GPU", 0)
        if (found := gpus or there.get("CPU", 0)) < workers:
            kind = "GPUs" if gpus else "CPUs"
            print(f"waiting for {workers} {kind}; the cluster has {found:g} now", file=sys.stderr, flush=True)
        trainer = api.torch.TorchTrainer(
            _work,
            train_loop_config={
                "main": main,
                "argv": [*argv, *_absolute(options, directory)],
                "log": log,
                "overwrite": overwrite,
            },
            torch_config=api.torch.TorchConfig(timeout_s=args.ddp_timeout),
            scaling_config=api.ScalingConfig(num_workers=workers, use_gpu=bool(gpus)),
            run_config=api.RunConfig(
                name="run",
                storage_path=str(directory / RAY),
                failure_config=api.FailureConfig(max_failures=MOST_FAILURES),
                logging_config=api.LoggingConfig(log_level="CRITICAL"),  # else the tracebacks of what is mended
            ),
        )
        trainer._register_sigint_handler = lambda _: None  # that one ends as a failure, once the workers have ended
        with _relayed(log):
            result = trainer.fit()
    except KeyboardInterrupt:  # Ray's, whatever the signal was
        raise Terminated if terminated else KeyboardInterrupt from None
    except api.TrainingFailedError as error:
        raise RunError(_reason(error)) from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
        ray.shutdown()
        (directory / guard.STOP).unlink(missing_ok=True)
        overwrite.unlink(missing_ok=True)
    code, message = result.return_value
    if code == TERMINATED:
        raise Terminated
    if code in (0, 2):
        shutil.rmtree(directory / RAY)
    if code:
        raise UsageError(message) if code == 2 else RunError(message)


def _absolute(options: Options, output: Path) -> list[str]:
    """Flags as a worker needs them, paths as they hold in any directory; they come last, and the last counts."""
    flags = ["--num-workers", "1", "--output-dir", str(output), "--shards", storage.absolute(options.shards)]
    if options.targets:
        flags += ["--targets", storage.absolute(options.targets)]
    if options.eval_shards:
        flags += ["--eval-shards", storage.absolute(options.eval_shards)]
    if Path(options.model).exists():
        flags += ["--model", str(Path(options.model).absolute())]
    return flags


def _work(config: dict[str, Any]) -> tuple[int, str]:
    """A worker: exit code and message, where all ranks come to the same end; else it raises, and Ray begins anew."""
    import ray.train

    if ray.train.get_context().get_world_rank() == 0:
        config["log"].parent.mkdir(exist_ok=True)
        sys.stdout = sys.stderr = open(config["log"], "a", buffering=1)  # noqa: SIM115
    try:
        config["main"]([*config["argv"], "--overwrite", str(config["overwrite"].exists())])
    except UsageError as error:
        return 2, str(error)
    except guard.Agreed as error:
        return 1, str(error)
    except Terminated:
        return TERMINATED, ""
    except SystemExit as error:  # another rank says why
        return int(str(error.code)), ""
    return 0, ""


@contextmanager
def _relayed(log: Path) -> Iterator[None]:
    """Show here what the first worker writes to ``log``: what Ray itself would show has the news of Ray in between."""
    ended = threading.Event()

    def relay() -> None:
        while not log.exists():  # the first worker makes it
            if ended.wait(RELAY_SECONDS) and not log.exists():
                return
        with open(log) as lines:
            last = False
            while not last:
                last = ended.wait(RELAY_SECONDS)
                sys.stderr.write(lines.read())
                sys.stderr.flush()

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _reason(error: Exception) -> str:
    """One sentence about what ended a worker for the last time."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    return f"workers died {MOST_FAILURES + 1} times, the last with: {guard.last_line(failures[0])}"
