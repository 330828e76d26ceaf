"""What the benches share: the GPU's name and peak, memory, contestants timed in turns, and a table with budgets."""

import gc
import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

# dense bfloat16 FLOPs a second, by the manufacturer; the first name that fits
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "A10": 125e12, "L40S": 362e12}
GOAL = 0.45  # of the peak


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each contestant, after one round that is not counted."""
    seconds = np.empty((rounds + 1, len(contestants)))
    for turn in range(rounds + 1):
        for column, contestant in enumerate(contestants.values()):
            started = now()
            contestant()
            seconds[turn, column] = now() - started
    return dict(zip(contestants, seconds[1:].T, strict=True))


def now() -> float:
    """Seconds of a clock, once the GPU has done what it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    """Let ``peak_bytes`` forget the memory that is free now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The most memory of tensors on the GPU since ``reset_peak``; without a GPU, of the process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peak_flops(dtype: str) -> float | None:
    """FLOPs a second that the GPU can do in half precision; None where that is not known."""
    return next((flops for gpu, flops in PEAKS.items() if gpu in device_name() and dtype != "float32"), None)


@dataclass(frozen=True)
class Row:
    """One line of the table: the median of some rounds, their range, and the budget if there is one."""

    value: float
    unit: str
    low: float
    high: float
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
    """Print the settings, a line for each row, and all of it as one JSON object in the last line."""
    width = max([26, *map(len, rows)])
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))
    print(f"{'':{width}} {'median':>10} {'rounds':>18}  {'':20} budget")
    for name, line in rows.items():
        rounds = f"{_number(line.low)} .. {_number(line.high)}" if line.low != line.high else ""
        verdict = f"{line.budget} {'met' if line.met else 'MISSED'}" if line.budget else ""
        label = f"{name.replace('_', ' '):{width}}"
        print(f"{label} {_number(line.value):>10} {rounds:>18}  {line.unit:20} {verdict}".rstrip())
    print(to_json(rows, settings), flush=True)


def to_json(rows: dict[str, Row], settings: dict[str, Any]) -> str:
    return json.dumps({"settings": settings, "rows": {name: asdict(line) for name, line in rows.items()}})


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"
