"""Shared by the command lines: exit codes for errors, and progress on a terminal or in a log."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import IO, Any, Self, cast

from tqdm import tqdm

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError, one_line
from entropy_masking.text import printable, single_line

LOG_SECONDS = 15.0  # between two progress lines without a terminal
FAILURES = (*storage.FULL, errno.EIO)  # of the machine; other file errors are wrong paths


class Terminated(KeyboardInterrupt):
    """SIGTERM asks this process to end. It unwinds like Ctrl-C."""


def run(main: Callable[[], int | None]) -> None:
    """Call an entry point and turn its outcome into an exit code.

    0, 1 (failure), 2 (wrong use, which includes an unusable file or directory), 130 (Ctrl-C), 143 (SIGTERM).
    """
    signal.signal(signal.SIGTERM, _terminate)
    message = None
    try:
        with contextlib.redirect_stdout(cast(IO[str], _Printable(sys.stdout))):
            code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except UsageError as error:
        code, message = 2, f"error: {error}"
    except RunError as error:
        code, message = 1, f"failed: {error}"
    except PermissionError as error:
        code, message = 2, f"error: {one_line(error)}; give this user permission, or name another path"
    except OSError as error:
        failure = error.errno in FAILURES or isinstance(error, ConnectionError | TimeoutError)
        code, message = (1, f"failed: {one_line(error)}") if failure else (2, f"error: {one_line(error)}")
    except Terminated:
        code, message = 143, "terminated"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
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
    """Answer --help and wrong flags before a script imports torch and transformers, which takes seconds."""
    try:
        parse()
    except UsageError as error:
        print(single_line(f"error: {error}"), file=sys.stderr, flush=True)
        sys.exit(2)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def note(text: str) -> None:
    """Print a line without breaking a bar."""
    tqdm.write(printable(text), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A tqdm bar on a terminal; elsewhere a line every ``LOG_SECONDS`` and one at the end, with rate and ETA.

    Args:
        total: amount of work in ``unit``; 0 if unknown.
        unit: of the amounts, e.g. ``"tok"``.
        label: names the work, e.g. ``"scoring"``.
        done: amount that was finished before this run; it counts as progress, but not for the rate.
    """

    def __init__(self, total: int, unit: str, label: str, done: int = 0) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.initial = self.count = done
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            options = {"initial": done, "unit_scale": True, "dynamic_ncols": True}
            self.bar = tqdm(total=total or None, unit=unit, desc=label, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None and self.count != self.initial:
            self._print_line()

    def advance(self, amount: int) -> None:
        """Count ``amount`` more units as done."""
        self.count += amount
        if self.bar is not None:
            self.bar.total = self.total or None
            self.bar.update(amount)
        elif time.monotonic() - self.last_line >= LOG_SECONDS:
            self._print_line()

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        note(text)

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        seconds = max(self.last_line - self.started, 1e-9)
        rate = (self.count - self.initial) / seconds
        share = f"/{self.total:,} {self.unit} ({self.count / self.total:.0%})" if self.total else f" {self.unit}"
        text = f"{self.label}: {self.count:,}{share}, {rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s, {seconds:.0f} s"
        if rate and self.count < self.total:
            text += f", ETA {(self.total - self.count) / rate:.0f} s"
        print(text, file=sys.stderr, flush=True)
