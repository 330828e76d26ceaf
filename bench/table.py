"""What the benches share: contestants timed in turns, and a table whose rows know their budget."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

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


def keep_buffers() -> None:
    """Start this script again unless malloc was told to keep large buffers: it reads its settings once."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each, after one round that is not counted."""
    seconds = np.empty((rounds + 1, len(contestants)))
    for each in seconds:
        for column, contestant in enumerate(contestants.values()):
            started = time.perf_counter()
            contestant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            each[column] = time.perf_counter() - started
    return dict(zip(contestants, seconds[1:].T, strict=True))


def peak_flops(dtype: str) -> float | None:
    """FLOPs a second that the GPU can do in half precision; None where that is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for gpu, flops in PEAKS.items() if gpu in name and dtype != "float32"), None)


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
    rounds = np.atleast_1d(values)
    value, low, high = float(np.median(rounds)), float(rounds.min()), float(rounds.max())
    if at_least is not None:
        return Row(value, unit, low, high, f"≥ {at_least:g}", value >= at_least)
    if at_most is not None:
        return Row(value, unit, low, high, f"≤ {at_most:g}", value <= at_most)
    return Row(value, unit, low, high)


def print_table(rows: dict[str, Row], settings: dict[str, Any]) -> None:
    """The settings, a line for each row, and all of it as one JSON object in the last line."""
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))
    print(f"{'':26} {'median':>10} {'rounds':>18}  {'':20} budget")
    for name, each in rows.items():
        rounds = f"{_number(each.low)} .. {_number(each.high)}" if each.low != each.high else ""
        verdict = f"{each.budget} {'met' if each.met else 'MISSED'}" if each.budget else ""
        print(f"{name.replace('_', ' '):26} {_number(each.value):>10} {rounds:>18}  {each.unit:20} {verdict}".rstrip())
    print(json.dumps({"settings": settings, "rows": {name: asdict(each) for name, each in rows.items()}}))


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"
