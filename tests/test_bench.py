"""The benches run, on a small model and little text; what they find is not for a test to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import LENGTH, ROOT


def test_scoring(work: Path) -> None:
    sizes = ["--sequence-length", LENGTH, "--tokens", 600, "--size-tokens", 600, "--rounds", 1, "--job-seconds", 0.01]
    files = ["--teacher", work / "teacher", "--corpus", work / "corpus.jsonl"]
    command = [sys.executable, ROOT / "bench" / "scoring.py", *files, *sizes, "--dtype", "float32"]
    bench = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    *table, last = bench.stdout.splitlines()
    assert any(line.endswith(("met", "MISSED")) for line in table)
    found = json.loads(last)
    assert found["settings"]["passes"] == 7
    rows = {name: row["value"] for name, row in found["rows"].items()}
    contexts = [f"{name}_{context}" for name in ("ours", "bare", "naive") for context in ("masked", "full")]
    ratios = [f"ours_to_{other}_{context}" for other in ("bare", "naive") for context in ("masked", "full")]
    for name in [*contexts, *ratios, "job_to_loop", "scan_bytes", "targets_and_scan_bytes", "flops_masked"]:
        assert rows[name] > 0, name
    assert 0 <= rows["job_outside_model"] < 1


def test_loading(scored: Path) -> None:
    sizes = ["--windows", 1, "--rounds", 1, "--tokens", 100_000]
    command = [sys.executable, ROOT / "bench" / "loading.py", "--shards", scored, *sizes]
    bench = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    *table, last = bench.stdout.splitlines()
    assert any(line.endswith(("met", "MISSED")) for line in table)
    rows = {name: row["value"] for name, row in json.loads(last)["rows"].items()}
    rates = [name + masked for name in ("tokens", "entropy", "top_k") for masked in ("", "_masked")]
    for name in [*rates, "memory_10x_to_1x", "first_batch"]:
        assert rows[name] > 0, name


@pytest.mark.exhaustive
def test_training(scored: Path) -> None:
    sizes = ["--model", "tiny", "--batch", 4, "--steps", 1, "--rounds", 1, "--dtype", "float32"]
    command = [sys.executable, ROOT / "bench" / "training.py", "--shards", scored, *sizes]
    bench = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    rows = {name: row["value"] for name, row in json.loads(bench.stdout.splitlines()[-1])["rows"].items()}
    for name in ("random_to_stock", "parquet_kd_step_to_random", "self_lagged_step_to_random", "random_backward"):
        assert rows[name] > 0, name
    assert rows["loss_difference"] < 1e-4
