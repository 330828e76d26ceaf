"""The same run in several processes on a Ray cluster: ``ray.train.torch.TorchTrainer``."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
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
LOOK_SECONDS = 0.5  # between two looks at what the first worker has written
RAY = ".ray"  # what Ray Train writes for itself, in the output directory
TERMINATED = 143  # exit code


def run(main: Callable[[list[str]], None], argv: list[str], options: Options, args: TrainingArguments) -> None:
    """Call ``main`` in ``--num-workers`` processes, on the cluster that is there or on one that is started here.

    Each gets a GPU, where the cluster has any. When a worker dies all are started again, and go on from the last
    checkpoint. SIGTERM is passed on.

    Raises:
        UsageError, RunError, Terminated: as the workers say.
    """
    output = Path(str(args.output_dir))
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not output.is_absolute():
        raise UsageError(f"--output-dir {output} would be lost with the job's directory; name an absolute path")
    import ray

    directory = output.absolute()
    _lock = resume.lock(directory, of_cluster=True)  # until this function returns
    directory.mkdir(parents=True, exist_ok=True)
    log, stop, overwrite = directory / RAY / "log", directory / guard.STOP, directory / resume.OVERWRITE
    for file in (log, stop, overwrite):
        file.unlink(missing_ok=True)
    if options.overwrite:  # the workers drop the run, once they know that theirs can begin, and delete this file
        overwrite.touch()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    ray_cluster.connect("train", cpus=options.num_workers)

    def ask_to_stop(*_: object) -> None:
        if not log.exists():  # no worker is there yet
            raise Terminated
        stop.touch()

    on_sigterm = signal.signal(signal.SIGTERM, ask_to_stop)
    try:
        config = {"main": main, "argv": [*argv, *_absolute(options, directory)], "log": log, "overwrite": overwrite}
        code, message = _fit(config, options.num_workers, args.ddp_timeout)
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
        ray.shutdown()
        stop.unlink(missing_ok=True)
        overwrite.unlink(missing_ok=True)
    if code == TERMINATED:
        raise Terminated
    if code in (0, 2):
        shutil.rmtree(directory / RAY)
    if code:
        raise UsageError(message) if code == 2 else RunError(message)


def _fit(config: dict[str, Any], workers: int, timeout: float) -> tuple[int, str]:
    """What ``_work`` gives; meanwhile shows what the first worker writes. Raises RunError."""
    import ray
    import ray.train.torch

    api: Any = ray.train  # whose types are still those of its first version
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    if (available := resources.get(kind, 0)) < workers:
        print(f"waiting for {workers} {kind}s; the cluster has {available:g} now", file=sys.stderr, flush=True)
    trainer = api.torch.TorchTrainer(
        _work,
        train_loop_config=config,
        torch_config=api.torch.TorchConfig(timeout_s=timeout),
        scaling_config=api.ScalingConfig(num_workers=workers, use_gpu=kind == "GPU"),
        run_config=api.RunConfig(
            name="run",
            storage_path=str(config["log"].parent),
            failure_config=api.FailureConfig(max_failures=MOST_FAILURES),
            logging_config=api.LoggingConfig(
                log_level="CRITICAL"
            ),  # else the tracebacks of failures that a restart cures
        ),
    )
    result: Future[Any] = Future()

    def fit() -> None:
        try:
            result.set_result(trainer.fit())
        except Exception as error:
            result.set_exception(error)

    # called from the main thread, Ray Train would take over Ctrl-C
    threading.Thread(target=fit, daemon=True).start()
    _show(config["log"], result)
    try:
        return result.result().return_value
    except api.TrainingFailedError as error:
        raise RunError(_reason(error)) from None


def _show(log: Path, result: Future[Any]) -> None:
    """Print what is written to ``log`` until there is a result: what Ray itself would show has its news in between."""
    shown, ended = 0, False
    while not ended:
        ended = bool(wait([result], LOOK_SECONDS).done)
        if log.exists():  # the first worker makes it
            with open(log) as lines:
                lines.seek(shown)
                sys.stderr.write(lines.read())
                shown = lines.tell()
            sys.stderr.flush()


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
    """A worker: exit code and message, where all ranks come to the same end; else it raises, and Ray starts again."""
    import ray.train

    if ray.train.get_context().get_world_rank() == 0:
        config["log"].parent.mkdir(exist_ok=True)
        sys.stdout = sys.stderr = open(config["log"], "a", buffering=1)  # noqa: SIM115
    try:
        config["main"]([*config["argv"], "--overwrite", str(config["overwrite"].exists())])
    except UsageError as error:
        return 2, str(error)
    except guard.AllRanksFailed as error:
        return 1, str(error)
    except Terminated:
        return TERMINATED, ""
    except SystemExit as error:  # another rank says why
        return int(str(error.code)), ""
    return 0, ""


def _reason(error: Exception) -> str:
    """One sentence about what ended a worker for the last time."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    return f"workers died {MOST_FAILURES + 1} times, the last with: {guard.last_line(failures[0])}"
