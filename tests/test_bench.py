"""The benches run, on a small model and little text; what they find is not for a test to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from harness import LENGTH, ROOT, refused

import train.options
from bench.recipes import RECIPES
from entropy_masking.commands.mask_flags import mask_policy


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
    names = ("ours", "bare", "ours_to_bare", "peak_memory")
    speeds = [f"{name}_{context}" for name in names for context in ("masked", "full")]
    for name in [*speeds, "job", "scan_bytes", "targets_and_scan_bytes", "flops_masked"]:
        assert rows[name] > 0, name
    assert 0 <= rows["job_outside_model"] < 1


@pytest.mark.exhaustive
def test_loading(tokens: Path) -> None:
    sizes = ["--groups", 1, "--rounds", 1, "--tokens", 100_000]
    command = [sys.executable, ROOT / "bench" / "loading.py", "--shards", tokens, *sizes]
    bench = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    *table, last = bench.stdout.splitlines()
    assert any(line.endswith(("met", "MISSED")) for line in table)
    rows = {name: row["value"] for name, row in json.loads(last)["rows"].items()}
    rates = [
        masked + workers for masked in ("tokens", "tokens_masked") for workers in ("", "_workers", "_workers_to_1")
    ]
    for name in [*rates, "memory_10x_to_1x", "first_batch"]:
        assert rows[name] > 0, name


@pytest.mark.exhaustive
def test_training(scored: Path) -> None:
    sizes = ["--model", "tiny", "--batch", 4, "--steps", 1, "--rounds", 1, "--dtype", "float32"]
    command = [sys.executable, ROOT / "bench" / "training.py", "--shards", scored, *sizes]
    bench = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    rows = {name: row["value"] for name, row in json.loads(bench.stdout.splitlines()[-1])["rows"].items()}
    for name in ("random_to_stock", "parquet_kd_step_to_random", "self_step_to_random", "muon_step_to_random"):
        assert rows[name] > 0, name


WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Finder:
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in ("ray", "datasets", "matplotlib", "polars")
        return None if hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.mark.exhaustive
def test_gpu(tmp_path: Path) -> None:
    """The parts for a GPU run on a CPU without optional packages, and the file has what is printed."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = ["bash", ROOT / "bench" / "gpu.sh", "--size", "toy", "--output", tmp_path / "toy.json"]
    bench = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert bench.returncode == 0, bench.stdout + bench.stderr
    last = bench.stdout.splitlines()[-1]
    assert (tmp_path / "toy.json").read_text() == f"{last}\n"
    rows = {name: row["value"] for name, row in json.loads(last)["rows"].items()}
    for name in ("maths_masks_same", "maths_top_k_same", "resume_steps_same", "resume_weights_same"):
        assert rows[name] == 1, name
    for name in ("entropy_N", "loss", "gradient"):
        assert rows[f"maths_{name}_error"] < 1e-4, name
    speeds = (
        "scoring_ours_masked",
        "scoring_compiled_bare_full",
        "tiny_stock",
        "tiny_compiled_self_kd",
        "evaluation_tiny",
    )
    assert all(rows[name] > 0 for name in speeds)


def test_gpu_says_that_there_is_none(tmp_path: Path) -> None:
    assert "torch sees no GPU here" in refused(sys.executable, ROOT / "bench" / "gpu.py", "--output", tmp_path / "none")


def screen(directory: Path, *flags: object) -> list[str]:
    """The command of a screen of the smallest size with one trunk."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 6))) for _ in range(60)]
    texts = [" ".join(rng.choice(words, 500)) for _ in range(60)]
    pl.DataFrame({"id": range(60), "text": texts}).write_parquet(directory / "articles.parquet")
    (directory / "ids.txt").write_text("7\n11\n")
    files = ["--articles", directory / "articles.parquet", "--held-out", directory / "ids.txt"]
    size = ["--trunks", "1", "--size", "trial", "--output", directory / "screen"]
    return [sys.executable, *map(str, (ROOT / "bench" / "screen.py", *files, *size, *flags))]


def test_screen(tmp_path: Path) -> None:
    """A screen of the smallest size runs to its table; again, it trains nothing anew and prints the same."""
    command = screen(tmp_path, "--rows", "parquet-h50-t0-rising-shuffled")
    *lines, last = subprocess.check_output(command, text=True).splitlines()
    found = json.loads(last)["rows"]
    assert list(found) == ["random", "parquet-h50-t0-rising-shuffled"]
    assert all(len(row["loss"]) == 1 and row["loss"]["1"] > 0 for row in found.values())
    assert any(line.startswith("| parquet-h50-t0-rising-shuffled | random | 1 | ") for line in lines)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("screen/branches-1/*/summary.json")}
    assert len(made) == 2 and subprocess.check_output(command, text=True).splitlines()[-1] == last
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())
    for name in ("branches", "shuffled"):
        scores = pl.read_parquet(tmp_path / "screen" / name / "part-00000.parquet")["entropy"].to_list()
        if name == "branches":
            original = scores
    assert scores != original and [sorted(map(str, row)) for row in scores] == [sorted(map(str, r)) for r in original]
    assert "--rows names 'no-such'" in refused(*command, "--rows", "no-such")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--bimp", "x"], "error: --bimp is not a flag of bench/screen.py; the nearest is --blimp"),
        (["--blimp", "nowhere"], "nowhere/blimp has no blimp as .parquet"),
        (["--glue", "nowhere"], "nowhere/sst2 has no train or train_subset as .parquet"),
        (["--reference", "./nowhere"], "there is no model directory ./nowhere"),
    ],
)
def test_a_screen_checks_its_paths_first(tmp_path: Path, flags: list[str], sentence: str) -> None:
    assert sentence in refused(*screen(tmp_path, *flags))
    assert not (tmp_path / "screen").exists()


@pytest.mark.exhaustive
def test_screen_with_tasks(tmp_path: Path, data: Path) -> None:
    """The tasks' dev rows stay unseen: a part of the training rows is the dev set of a screen."""
    command = screen(tmp_path, "--rows", "scratch-self", "--glue", data)
    found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])["rows"]
    assert list(found) == ["scratch-random", "scratch-random-r30", "scratch-self"]
    assert all(0 < row["glue"]["1"] < 100 for row in found.values())
    rows = pl.read_parquet(data / "qqp" / "train.parquet").rows()
    for split, count in (("train", 32), ("dev", 16)):
        made = pl.read_parquet(tmp_path / "screen" / "glue-data" / "qqp" / f"{split}.parquet").rows()
        assert len(made) == count and set(made) <= set(rows)


def test_rows_of_the_screen_are_flags_of_the_trainer() -> None:
    for name, recipe in RECIPES.items():
        options, _ = train.options.parse([*recipe.flags.split(), "--shards", "x", "--output-dir", name], None)
        mask_policy(options, options.entropy_source, 1)
