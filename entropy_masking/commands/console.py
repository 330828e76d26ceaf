"""Shared by the command lines: exit codes for errors, and progress on a terminal or in a log."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

from tqdm import tqdm

from entropy_masking import storage
from entropy_masking.errors import RunError, UsageError, one_line

PLACE = re.compile(r"(?<![^=,])(?:file://|~(?=/|,|$))[^,]*")  # a path with ~ or a file URI, within an argument
LOG_SECONDS = 15.0  # between two progress lines without a terminal
FAILURES = (*storage.FULL, errno.EIO)  # of the machine; other file errors are wrong paths

Number = TypeVar("Number", int, float)

# when it holds; by name of a flag the only value that may be given, None for no value; the sentence for other values
Rule = tuple[bool, Mapping[str, object], str]


class Terminated(KeyboardInterrupt):
    """SIGTERM asks this process to end. It unwinds like Ctrl-C."""


def run(main: Callable[[], int | None]) -> None:
    """Call an entry point and turn its outcome into an exit code.

    0, 1 (failure), 2 (wrong use, which includes an unusable file or directory), 130 (Ctrl-C), 143 (SIGTERM).
    """
    signal.signal(signal.SIGTERM, _terminate)
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
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def flag(name: str) -> str:
    """``--mask-ratio`` of ``mask_ratio``."""
    return f"--{name.replace('_', '-')}"


def check_rules(given: Mapping[str, object], rules: Sequence[Rule], flag_of: Callable[[str], str] = flag) -> None:
    """Refuse flags that contradict others or have no effect with them. A flag that was not given is None.

    Raises:
        UsageError: the sentence of the first rule that does not hold.
    """
    for holds, allowed, sentence in rules:
        for name, value in allowed.items():
            if holds and given.get(name) not in (None, value):
                raise UsageError(sentence.format(flag=flag_of(name), given=given[name], value=value))


def option(help: str, default: object = None, **settings: object) -> Any:
    """A field of a dataclass of flags. It is None if the flag is not given and has no default."""
    return field(default=default, metadata={"help": help, **settings})


class Parser(argparse.ArgumentParser):
    """A parser whose description is shown as it is written, and whose errors are a UsageError."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter} | settings)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        texts = sys.argv[1:] if args is None else list(args)
        for before, text in zip(["", *texts], texts, strict=False):
            if not text or (text[:2] == "--" and text.find("=") == len(text) - 1):
                name = text[:-1] or (before if before[:2] == "--" else "an argument")
                raise UsageError(f"{name} is empty; give it a value, or leave it out")
        flags, unknown = self.parse_known_args(texts)
        if unknown:
            raise UsageError(self.unknown(unknown[0]))
        return flags

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """First turn file URIs and ``~`` into plain paths, also in ``--flag=~/a``, ``name=~/a`` and ``b,~/a``."""
        texts = sys.argv[1:] if args is None else args
        texts = [PLACE.sub(lambda place: storage.local_path(place[0]), text) for text in texts]
        return super().parse_known_args(texts, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def unknown(self, text: str) -> str:
        """A sentence about a flag that does not exist."""
        name = text.partition("=")[0]
        flags = [known for known in self._option_string_actions if "_" not in known]
        near = difflib.get_close_matches(name, flags, 1)
        hint = f"the nearest is {near[0]}, and --help lists all" if near else "--help lists its flags"
        return f"{name} is not a flag of {self.prog}; {hint}"


def positive(text: str) -> int:
    """argparse type of a whole number above zero."""
    return _number(int, text, lambda value: value > 0, "a whole number above 0")


def not_negative(text: str) -> int:
    """argparse type of a whole number, zero included."""
    return _number(int, text, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """argparse type of a finite number above zero."""
    return _number(float, text, lambda value: 0 < value < math.inf, "a finite number above 0")


def _number(kind: type[Number], text: str, allowed: Callable[[Number], bool], wanted: str) -> Number:
    with contextlib.suppress(ValueError):
        if allowed(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


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
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        seconds = max(self.last_line - self.started, 1e-9)
        rate = (self.count - self.initial) / seconds
        share = f"/{self.total:,} {self.unit} ({self.count / self.total:.0%})" if self.total else f" {self.unit}"
        text = f"{self.label}: {self.count:,}{share}, {rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s, {seconds:.0f} s"
        if rate and self.count < self.total:
            text += f", ETA {(self.total - self.count) / rate:.0f} s"
        print(text, file=sys.stderr, flush=True)
