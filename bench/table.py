"""What the benches share: a parser, processes, contestants in turns, and a table whose rows have budgets."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from entropy_masking.errors import RunError

PEAKS = {  # dense bfloat16 FLOPs a second, by the manufacturer; the first name that fits
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
}
# otherwise glibc hands large buffers back to the kernel at each step
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def keep_buffers() -> None:
    """Start this script again unless malloc keeps large buffers: it reads its settings once."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def last_line(name: str, script: object, *flags: object) -> str:
    """The last line that a Python script prints, in a process of its own.

    Raises:
        RunError: it failed; the message has the end of its stderr.
    """
    ran = subprocess.run([sys.executable, *map(str, (script, *flags))], capture_output=True, text=True)
    if ran.returncode:
        raise RunError(f"{name} failed: {' '.join(ran.stderr.split())[-500:]}")
    return ran.stdout.splitlines()[-1]


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            started = now()
            contestant()
            seconds[name].append(now() - started)
    return {name: np.array(times[1:]) for name, times in seconds.items()}


def now() -> float:
    """Seconds, after all that a GPU was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peak_flops(dtype: str) -> float | None:
    """FLOPs a second that the GPU can do in half precision; None where that is not known."""
    return next((flops for gpu, flops in PEAKS.items() if gpu in device_name() and dtype != "float32"), None)


@dataclass(frozen=True)
class Row:
    """One line of the table: the median of some rounds, their range, and the budget if there is one."""

    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    budget: str | None = None
    met: bool | None = None


def row(values: np.ndarray | float, unit: str, at_least: float | None = None, at_most: float | None = None) -> Row:
    """A row of one measurement, or of one for each round."""
    value, low, high = float(np.median(values)), float(np.min(values)), float(np.max(values))
    if at_least is not None:
        return Row(value, unit, low, high, f"≥ {at_least:g}", value >= at_least)
    if at_most is not None:
        return Row(value, unit, low, high, f"≤ {at_most:g}", value <= at_most)
    return Row(value, unit, low, high)


def print_table(rows: dict[str, Row], settings: dict[str, Any]) -> None:
    """The settings, a line for each row, and all of it as one JSON object in the last line."""
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))
    print(f"{'':26} {'median':>10} {'rounds':>18}  {'':20} budget")
    for name, row in rows.items():
        rounds = f"{_number(row.low)} .. {_number(row.high)}" if row.low != row.high else ""
        verdict = f"{row.budget} {'met' if row.met else 'MISSED'}" if row.budget else ""
        print(f"{name.replace('_', ' '):26} {_number(row.value):>10} {rounds:>18}  {row.unit:20} {verdict}".rstrip())
    print(json.dumps({"settings": settings, "rows": {name: asdict(row) for name, row in rows.items()}}))


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"
