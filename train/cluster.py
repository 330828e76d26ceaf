"""The same run in several processes on a Ray cluster: ``ray.train.torch.TorchTrainer``.

The command and its workers share the output directory, and these files in it:

- ``.ray/log``: what the first worker prints; the command shows it.
- ``.stop``: the command creates it at SIGTERM. The workers then save a checkpoint and end (``train.guard``).
- ``.overwrite``: the command creates it for ``--overwrite``. When the new run can begin, the workers delete the old run
  and then this file (``train.resume``). So workers that are started again resume the new run.
"""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from entropy_masking import storage
from entropy_masking.commands import ray_cluster
from entropy_masking.commands.console import Terminated
from entropy_masking.errors import RunError, UsageError
from entropy_masking.text import printable
from train import guard, resume
from train.options import Options

MAX_FAILURES = 3  # of workers, in one call
POLL_SECONDS = 0.5  # between two reads of the first worker's log
RAY = ".ray"  # Ray Train's own files, in the output directory
TERMINATED = 143  # exit code


def run(main: Callable[[list[str]], None], options: Options, args: TrainingArguments) -> None:
    """Call ``main`` in ``--num-workers`` processes, on a running cluster or on one that is started here.

    Each worker gets a GPU if the cluster has any. If a worker dies, all start again from the last checkpoint. SIGTERM
    is passed on.

    Raises:
        UsageError, RunError, Terminated: as the workers say.
    """
    output = Path(str(args.output_dir))
    ray_cluster.check_kept("--output-dir", str(output))
    directory = output.absolute()
    _lock = resume.lock(directory, of_cluster=True)  # until this function returns
    directory.mkdir(parents=True, exist_ok=True)
    log, stop, overwrite = directory / RAY / "log", directory / guard.STOP, directory / resume.OVERWRITE
    for file in (log, stop, overwrite):
        file.unlink(missing_ok=True)
    if options.overwrite:
        overwrite.touch()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    ray_cluster.connect("train", cpus=options.num_workers)

    def ask_to_stop(*_: object) -> None:
        stop.touch()
        if not log.exists():  # no worker has started
            raise Terminated

    previous = signal.signal(signal.SIGTERM, ask_to_stop)
    try:
        argv = [*options.argv, *_for_workers(options, directory)]
        config = {"main": main, "argv": argv, "log": log, "overwrite": overwrite}
        code, message = _fit(config, options.num_workers, args.ddp_timeout)
    except KeyboardInterrupt:  # Ray raises it in place of Terminated
        if stop.exists():
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        ray_cluster.disconnect()
        stop.unlink(missing_ok=True)
        overwrite.unlink(missing_ok=True)
    if code == TERMINATED:
        raise Terminated
    if (given := directory / resume.GIVEN).exists():  # the workers had other flags
        storage.write_bytes(str(given), options.as_yaml.encode())
    if code in (0, 2):
        shutil.rmtree(directory / RAY)
    if code:
        raise UsageError(message) if code == 2 else RunError(message)


def _fit(config: dict[str, Any], workers: int, timeout: float) -> tuple[int, str]:
    """The result of ``_work``; meanwhile shows the output of the first worker. Raises RunError."""
    import ray
    import ray.train.torch

    api: Any = ray.train  # its types are still those of its first version
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
            failure_config=api.FailureConfig(max_failures=MAX_FAILURES),
            # other levels show tracebacks of failures that a restart repairs
            logging_config=api.LoggingConfig(log_level="CRITICAL"),
        ),
    )
    # let Ctrl-C raise KeyboardInterrupt in fit(); Ray's own handler ends the process with exit code 1
    trainer._register_sigint_handler = lambda _controller: None
    ended = threading.Event()
    printer = threading.Thread(target=_show, args=(config["log"], ended))
    printer.start()
    try:
        return trainer.fit().return_value
    except api.TrainingFailedError as error:
        raise RunError(_reason(error)) from None
    finally:
        ended.set()
        printer.join()


def _show(log: Path, ended: threading.Event) -> None:
    """Print the lines of ``log`` until ``ended`` is set. Ray's own way would add its messages."""
    position, last = 0, False
    while not last:
        last = ended.wait(POLL_SECONDS)
        if log.exists():  # the first worker creates it
            with open(log) as lines:
                lines.seek(position)
                sys.stderr.write(printable(lines.read()))
                position = lines.tell()
            sys.stderr.flush()


def _for_workers(options: Options, output: Path) -> list[str]:
    """Flags for the workers, with absolute paths. They come last, so they override earlier ones."""
    argv = ["--num-workers", "1", "--output-dir", str(output)]
    for name, uri in (
        ("--shards", options.shards),
        ("--targets", options.targets),
        ("--eval-shards", options.eval_shards),
        ("--model", options.model if Path(options.model).exists() else None),
    ):
        argv += [name, storage.absolute(uri)] if uri else []
    return argv


def _work(config: dict[str, Any]) -> tuple[int, str]:
    """A worker: exit code and message if all ranks end in the same way. Otherwise it raises, and Ray restarts all."""
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
    except SystemExit as error:  # rank 0 says why
        return int(str(error.code)), ""
    return 0, ""


def _reason(error: Exception) -> str:
    """One sentence about the last failure of a worker."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    return f"workers died {MAX_FAILURES + 1} times; the last error: {guard.last_line(failures[0])}"
