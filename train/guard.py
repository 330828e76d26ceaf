"""How a run ends early: SIGTERM, NaN, a full disk, a lost process. Each leaves a whole checkpoint and one sentence."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_masking.commands.console import Terminated
from entropy_masking.errors import RunError, UsageError, one_line
from train import resume
from train.arguments import is_of_device

STOP = ".stop"  # a file in the output directory that asks a run to stop, as SIGTERM does
STOP_SECONDS = 1.0  # between two looks for it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Agreed(RunError):
    """A failure that all ranks have come to know of at the same point."""


class Guard(TrainerCallback):
    """Ends a run at the step after SIGTERM, with a checkpoint; and before what is not finite can become one.

    A signal reaches the ranks at different steps, or one of them alone: so after each step they agree, in a group of
    their own that waits for no device. Repeated signals change nothing: launchers send them again.

    Attributes:
        stopped: the run was ended by SIGTERM.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.looked = output, 0.0
        self.asked = self.stopped = self.by_file = False
        self.group: Any = None
        self.previous: Any = None

    def __enter__(self) -> Self:
        self.by_file = threading.current_thread() is not threading.main_thread()  # Ray's workers train in another
        if not self.by_file:
            self.previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            self.group = dist.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.by_file and state.is_world_process_zero and time.monotonic() - self.looked > STOP_SECONDS:
            self.looked = time.monotonic()
            self.asked = self.asked or (self.output / STOP).exists()
        asked = torch.tensor(int(self.asked))
        if self.group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        if asked.item():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        # a mean over all ranks: each of them comes to the same end
        if logs and not math.isfinite(loss := logs.get("loss", 0.0)):
            raise Agreed(_not_finite(f"the loss is {loss}", state.global_step, self.output))


def check_finite(model: torch.nn.Module, step: int, output: Path) -> None:
    """Refuse to keep weights that are NaN or infinite; on all ranks alike, since they have the same.

    Raises:
        Agreed: some are.
    """
    with torch.no_grad():
        finite = torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()
    if not finite:
        raise Agreed(_not_finite("weights are NaN or infinite", step, output))


def _not_finite(what: str, step: int, output: Path) -> str:
    return (
        f"{what} at step {step}, so it ends here; {_standing(output)}. Train anew with a lower --learning-rate or a "
        "longer --warmup-steps"
    )


def _standing(output: Path) -> str:
    checkpoint = resume.last_checkpoint(output)
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "there was no checkpoint yet"


@contextmanager
def writing(what: str, output: Path) -> Iterator[None]:
    """Say in one sentence that a file could not be written, and where that leaves the run. Raises RunError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if _lost_loader(error) or is_of_device(error):
            raise
        # torch's writer tells the position, not the reason
        cut_short = any(sign in str(error) for sign in ("inline_container", "iostream error"))
        reason = "it was cut short" if cut_short else one_line(error)
        full = cut_short or any(os.strerror(code) in str(error) for code in FULL)
        mend = "make room, then run the command again" if full else "run the command again once it can be written"
        raise RunError(f"cannot write {what} ({reason}); {_standing(output)}; {mend}") from None


@contextmanager
def together(rank: int) -> Iterator[None]:
    """What fails on one rank fails on all, and the first says so: nobody waits for those that have gone.

    Raises:
        UsageError, Agreed, OSError: on the first rank, the error of the lowest rank that has one.
        SystemExit: on the others.
    """
    error: Exception | None = None
    try:
        yield
    except (UsageError, RunError, OSError) as failure:
        error = failure
    errors = [each for each in gather_object([error]) if each is not None]
    if errors and rank:
        raise SystemExit(2 if isinstance(errors[0], UsageError) else 1)
    if errors:
        raise Agreed(str(errors[0])) if isinstance(errors[0], RunError) else errors[0]


@contextmanager
def in_one_sentence(guard: Guard) -> Iterator[None]:
    """Errors of processes that training leans on: its loader's, and those of other ranks. Raises RunError."""
    say = sys.unraisablehook
    # torch says that a loader worker has died wherever the signal finds the process: in a destructor even, at its end
    sys.unraisablehook = lambda what: None if "DataLoader worker (pid" in str(what.exc_value) else say(what)
    try:
        with guard:
            yield
    except RunError as error:  # a loader worker's comes with its traceback
        raise type(error)(last_line(error)) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if _lost_loader(error):
            if guard.asked:  # a signal to all processes
                raise Terminated from None
            raise RunError(
                f"a loader worker was ended from outside, perhaps for want of memory ({last_line(error)}); "
                f"{_standing(guard.output)}; run the command again, with fewer --dataloader-num-workers"
            ) from None
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise RunError(f"another rank has ended; {_standing(guard.output)}; run the command again") from None
        raise
    sys.unraisablehook = say


def _lost_loader(error: Exception) -> bool:
    """Whether a loader worker has died; it may have been about to hand over a batch."""
    return isinstance(error, ConnectionError | EOFError) or "DataLoader worker (pid" in str(error)


def last_line(error: Exception) -> str:
    """What an error says, which came from another process with a traceback, without that."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix(f"{RunError.__module__}.RunError: ")


def heed_parent_only(worker: int) -> None:
    """In a loader worker: end at SIGTERM from the trainer, not at one that is sent to all processes of a run.

    The trainer still needs its batches then, up to the end of the step.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def on_first(rank: int, action: Callable[[], Any]) -> Any:
    """What ``action`` gives on the first rank, on all of them. Errors as in ``together``."""
    with together(rank):
        result = action() if rank == 0 else None
    return gather_object([result])[0]
