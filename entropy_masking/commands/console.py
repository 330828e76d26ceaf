"""Shared by the command lines: exit codes for errors, and progress on a terminal or in a log."""

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, Self, cast

from tqdm import tqdm

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.text import printable, single_line

LOG_SECONDS = 15.0  # between two progress lines without a terminal
FAILURES = (*storage.FULL, errno.EIO)  # of the machine; other file errors are wrong paths
ENDINGS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}  # exit code and message
AGAIN_SECONDS = 1.0  # until a signal that a library has swallowed is raised again

tqdm.monitor_interval = 0  # no thread, because loader workers are forks


class Terminated(KeyboardInterrupt):
    """SIGTERM asks this process to end. It unwinds like Ctrl-C."""


def run(main: Callable[[], int | None]) -> None:
    """Call an entry point and turn its outcome into an exit code.

    0, 1 (failure), 2 (wrong use, which includes an unusable file or directory), 130 (Ctrl-C), 143 (SIGTERM).
    """
    handle_signals(_Interruption())
    sys.stdout = cast(IO[str], _Printable(sys.stdout))  # until the end: a thread may be printing
    message = None
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except UsageError as error:
        code, message = 2, f"error: {error}"
    except RunError as error:
        code, message = 1, f"failed: {error}"
    except OSError as error:
        failure = error.errno in FAILURES or isinstance(error, ConnectionError | TimeoutError)
        fix = "; give this user permission, or name another path" if isinstance(error, PermissionError) else ""
        code, message = (1, f"failed: {one_line(error)}") if failure else (2, f"error: {one_line(error)}{fix}")
    except KeyboardInterrupt as error:
        code, message = ENDINGS[signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT]
    handle_signals(_end_now)
    sys.stdout.flush()
    if message:
        print(single_line(message), file=sys.stderr, flush=True)
    sys.exit(code)


class _Printable:
    """A stream that escapes what names and texts of others could do to a terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def check_flags(parse: Callable[[], object]) -> None:
    """Answer --help, wrong flags and signals before a script imports torch and transformers, which takes seconds."""
    handle_signals(_end_now)
    try:
        parse()
    except UsageError as error:
        print(single_line(f"error: {error}"), file=sys.stderr, flush=True)
        sys.exit(2)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Set the handler of Ctrl-C, unless this process ignores it as a job in the background does, and of SIGTERM."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (*ENDINGS, signal.SIGALRM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGALRM until the block ends. Then restore their handlers, which it may replace."""
    held: list[int] = []
    numbers = (*ENDINGS, signal.SIGALRM)
    handlers = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrived in held:
            signal.raise_signal(arrived)


def _end_now(number: int, frame: FrameType | None) -> None:
    """End this process, which has nothing to clean up: an exception could get lost in an import or at the exit."""
    code, message = ENDINGS[signal.Signals(number)]
    os.write(2, f"{message}\n".encode())
    os._exit(code)


class _Interruption:
    """Raises KeyboardInterrupt or Terminated in the main thread, again and again until it unwinds.

    One exception is not enough, because libraries swallow it in their lazy imports and in destructors.
    """

    def __init__(self) -> None:
        self.kind: type[KeyboardInterrupt] = KeyboardInterrupt
        self.process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            self.kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if os.getpid() == self.process:  # a fork has no timer
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        handled = sys.exception()
        while handled and not isinstance(handled, KeyboardInterrupt):
            handled = handled.__context__
        if not handled or number == signal.SIGINT:  # a second Ctrl-C also ends what cleans up
            raise self.kind


def note(text: str) -> None:
    """Print a line without breaking a bar."""
    tqdm.write(printable(text), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A bar on a terminal; elsewhere a line every ``LOG_SECONDS`` and one at the end. Both are tqdm's.

    Args:
        total: amount of work in ``unit``; 0 if unknown.
        done: amount that was finished before this run; it counts as progress, but not for the rate.
    """

    def __init__(self, total: int, unit: str, label: str, done: int = 0) -> None:
        self.terminal, self.last_line = sys.stderr.isatty(), time.monotonic()
        place = {"file": sys.stderr if self.terminal else io.StringIO(), "dynamic_ncols": True}
        every = 0.1 if self.terminal else LOG_SECONDS
        names = {"unit": unit, "unit_scale": True, "desc": label}
        self.bar = tqdm(total=total or None, initial=done, mininterval=every, **names, **place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if kind is None and self.bar.n != self.bar.initial:
            self._print_line()

    def advance(self, amount: int) -> None:
        """Count ``amount`` more units as done."""
        self.bar.update(amount)
        if time.monotonic() - self.last_line >= LOG_SECONDS:
            self._print_line()

    def _print_line(self) -> None:
        if not self.terminal:
            self.last_line = time.monotonic()
            print(self.bar, file=sys.stderr, flush=True)
