"""How a run ends early: Ctrl-C, SIGTERM, NaN, a full disk, a lost process. The last checkpoint stays whole.

- Signals: ``clean_ending`` handles them; after them ``Guard`` lets all ranks finish the same step and save.
- Agreement: ``on_all_ranks`` and ``on_first_rank`` let all ranks fail at the same point.
- Errors of libraries: ``writing``, ``reading`` and ``clean_ending`` turn them into one sentence.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_masking.commands.console import Terminated
from entropy_masking.errors import RunError, UsageError, one_line
from train import resume
from train.arguments import is_of_device

STOP = ".stop"  # while this file exists, a run stops as at SIGTERM (see ``train.cluster``)
AGREEMENT_STEPS = 4  # steps between two agreements of the ranks, each of which costs a round trip
LOST_WORKER = "DataLoader worker (pid"  # torch's words for a loader worker that has died
T = TypeVar("T")


class AllRanksFailed(RunError):
    """A failure that all ranks raise at the same point."""


class Guard(TrainerCallback):
    """Ends a run after Ctrl-C or SIGTERM, with a checkpoint, and at a loss that is not finite, without one.

    A signal may reach the ranks at different steps, or reach only one rank. So the ranks agree after every fourth
    step, in a separate process group that waits for no device. A repeated SIGTERM changes nothing, since launchers
    send it again.

    Attributes:
        stopped: the signal that has ended the run; 0 if none has.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.asked: int = 0
        self.stopped: int = 0
        self.group: dist.ProcessGroup | None = None
        self.previous: dict[int, Any] = {}  # handlers by signal

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handle the signals that this process does not ignore; only a main thread can."""
        for number in (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ():
            if signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.ask)
        try:
            yield
        finally:
            for handled, handler in self.previous.items():
                signal.signal(handled, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handler of Ctrl-C and SIGTERM. A second Ctrl-C ends the run at once."""
        if number == signal.SIGINT:
            if self.asked == signal.SIGINT:
                self.previous[number](number, frame)
            os.write(2, b"stopping after this step; Ctrl-C again ends the run at once, without a checkpoint\n")
        self.asked = number

    def ending(self) -> KeyboardInterrupt:
        """The exception that gives the exit code."""
        return KeyboardInterrupt() if self.asked == signal.SIGINT else Terminated()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        if args.world_size > 1:
            self.group = dist.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if (self.group or not _in_main_thread()) and state.global_step % AGREEMENT_STEPS:
            return
        if not _in_main_thread() and state.is_world_process_zero and (self.output / STOP).exists():
            self.asked = signal.SIGTERM
        asked = torch.tensor(self.asked)
        if self.group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        if asked.item():
            self.asked = self.stopped = int(asked.item())
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        # a mean over all ranks, so each of them raises
        if not math.isfinite(loss := event["logs"].get("loss", 0.0)):
            raise _not_finite(f"the loss is {loss}", state.global_step, self.output)


def _in_main_thread() -> bool:
    """False in Ray's workers, which cannot handle signals; there a file asks the run to stop."""
    return threading.current_thread() is threading.main_thread()


def check_finite(model: torch.nn.Module, step: int, output: Path) -> None:
    """Raises AllRanksFailed if weights are NaN or infinite; all ranks have the same weights."""
    with torch.no_grad():
        finite = torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()
    if not finite:
        raise _not_finite("weights are NaN or infinite", step, output)


def _not_finite(what: str, step: int, output: Path) -> AllRanksFailed:
    fix = "train again with a lower --learning-rate or a longer --warmup-steps"
    return AllRanksFailed(f"{what} at step {step}, so the run ends; {_last_good(output)}; {fix}")


def _last_good(output: Path) -> str:
    checkpoint = resume.last_checkpoint(output)
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "there was no checkpoint yet"


@contextmanager
def writing(what: str, output: Path) -> Iterator[None]:
    """Turn the error of a failed write into a RunError that names the last good checkpoint."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if _lost_loader(error) or is_of_device(error):
            raise
        fix = f"check that {output} is writable, and make room; then run the command again"
        raise RunError(f"cannot write {what} ({one_line(error)}); {_last_good(output)}; {fix}") from None


@contextmanager
def reading(output: Path) -> Iterator[None]:
    """Turn any error of a checkpoint that is read into AllRanksFailed: all ranks read the same files."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # its files may hold anything
        if is_of_device(error):
            raise
        fix = "delete it, and the same command continues from the one before"
        raise AllRanksFailed(f"cannot load {resume.last_checkpoint(output)} ({one_line(error)}); {fix}") from None


@contextmanager
def on_all_ranks(rank: int) -> Iterator[None]:
    """Let all ranks fail if one fails, so that none waits for the others.

    Rank 0 raises the error of the lowest failed rank (UsageError, AllRanksFailed or OSError), the others SystemExit.
    """
    own: Exception | None = None
    try:
        yield
    except (UsageError, RunError, OSError) as error:
        own = error
    errors = [error for error in gather_object([own]) if error is not None]
    if errors and rank:
        raise SystemExit(2 if isinstance(errors[0], UsageError) else 1)
    if errors:
        raise AllRanksFailed(str(errors[0])) if isinstance(errors[0], RunError) else errors[0]


def on_first_rank(rank: int, action: Callable[[], T]) -> T:
    """Call ``action`` on rank 0 and return its result on all ranks. Errors as in ``on_all_ranks``."""
    with on_all_ranks(rank):
        result = action() if rank == 0 else None
    return gather_object([result])[0]


@contextmanager
def clean_ending(guard: Guard) -> Iterator[None]:
    """Handle signals, and report a lost loader worker or rank in one sentence.

    Raises RunError, or the ending of ``guard`` if a signal to all processes has ended the loader workers.
    """
    report = sys.unraisablehook
    # torch reports a dead loader worker at any point where the signal arrives, even in a destructor at the end
    sys.unraisablehook = lambda what: None if LOST_WORKER in str(what.exc_value) else report(what)
    try:
        with guard.handling_signals():
            yield
        sys.unraisablehook = report
    except RunError as error:  # that of a loader worker contains a traceback
        raise type(error)(last_line(error)) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if _lost_loader(error):
            if guard.asked:
                raise guard.ending() from None
            reason = f"a loader worker was killed, perhaps for lack of memory ({last_line(error)})"
            fix = "run the command again, with fewer --dataloader-num-workers"
            raise RunError(f"{reason}; {_last_good(guard.output)}; {fix}") from None
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise RunError(f"another process has ended; {_last_good(guard.output)}; run the command again") from None
        raise


def _lost_loader(error: Exception) -> bool:
    """Whether a loader worker has died, perhaps while it sent a batch."""
    return isinstance(error, ConnectionError | EOFError) or LOST_WORKER in str(error)


def last_line(error: Exception) -> str:
    """The message of an error from another process, without its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix(f"{RunError.__module__}.RunError: ")


def ignore_signals_of_group(worker: int) -> None:
    """In a loader worker: ignore Ctrl-C, and obey SIGTERM only from the trainer.

    After a signal to the whole group the trainer still needs batches to finish its step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
