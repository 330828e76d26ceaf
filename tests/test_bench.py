"""The benches run, on a small model and little text; what they find is not for a test to say."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from harness import LENGTH, ROOT, refused
from in_process import score_here
from made_glue import write_glue
from scipy.stats import ttest_1samp

import bench.results
import bench.screen
import train.options
from bench.recipes import RECIPES
from entropy_masking.commands.mask_flags import mask_policy
from entropy_masking.errors import UsageError


def test_scoring(work: Path, scored: Path) -> None:
    files = ["--teacher", work / "teacher", "--shards", scored]
    sizes = ["--tokens", 600, "--rounds", 1, "--dtype", "float32"]
    command = [sys.executable, ROOT / "bench" / "scoring.py", *files, *sizes]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert any(line.endswith(("met", "MISSED")) for line in table)
    found = json.loads(last)
    assert found["settings"]["passes"] == 7
    rows = {name: row["value"] for name, row in found["rows"].items()}
    names = ("ours", "bare", "ours_to_bare", "peak_memory")
    speeds = [f"{name}_{context}" for name in names for context in ("masked", "full")]
    for name in [*speeds, "scan_bytes", "flops_masked"]:
        assert rows[name] > 0, name
    assert 0 <= rows["job_outside_model"] < 1


@pytest.mark.exhaustive
def test_loading(tokens: Path) -> None:
    sizes = ["--groups", 1, "--rounds", 1, "--tokens", 100_000]
    command = [sys.executable, ROOT / "bench" / "loading.py", "--shards", tokens, *sizes]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
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
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {name: row["value"] for name, row in json.loads(done.stdout.splitlines()[-1])["rows"].items()}
    for name in ("random_to_stock", "parquet_kd_step_to_random", "self_step_to_random", "muon_step_to_random"):
        assert rows[name] > 0, name


WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("ray", "datasets", "matplotlib", "polars")
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.mark.exhaustive
def test_gpu(tmp_path: Path) -> None:
    """The parts for a GPU run on a CPU without optional packages, and the file has what is printed."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = ["bash", ROOT / "bench" / "gpu.sh", "--size", "toy", "--output", tmp_path / "toy.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
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


def screen(scored: Path, directory: Path, *flags: object) -> list[str]:
    """The command of a small screen with one trunk. It evaluates on ``directory``/heldout."""
    shards = ["--shards", scored, "--eval-shards", directory / "heldout", "--output", directory / "screen"]
    sizes = ["--trunks", 1, "--trunk-steps", 4, "--branch-steps", 4, "--scratch-steps", 4, "--batch", 4]
    return [sys.executable, *map(str, (ROOT / "bench" / "screen.py", *shards, *sizes, *flags))]


@pytest.mark.exhaustive
def test_screen(work: Path, scored: Path, tmp_path: Path) -> None:
    """A screen runs to its table; again, it trains nothing anew and prints the same."""
    texts = ["".join(reversed(line)) for line in (work / "corpus.jsonl").read_text().splitlines()[:40]]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    score_here(tmp_path / "heldout.jsonl", work / "teacher", tmp_path / "heldout", "--sequence-length", LENGTH)
    (tmp_path / "blimp").mkdir()
    words = texts[0].split()
    pairs = {"UID": "a", "field": "b", "pairID": [1, 2], "sentence_good": words[:2], "sentence_bad": words[2:4]}
    pl.DataFrame(pairs).write_parquet(tmp_path / "blimp" / "blimp.parquet")
    command = screen(scored, tmp_path, "--rows", "scratch-self,parquet-h50-t0-rising-shuffled", "--blimp", tmp_path)
    *lines, last = subprocess.check_output(command, text=True).splitlines()
    found = json.loads(last)["rows"]
    scratch = ["scratch-random", "scratch-random-r30", "scratch-self"]
    assert set(found) == {*scratch, "random", "parquet-h50-t0-rising-shuffled"}
    assert all(len(row["loss"]) == 1 and row["loss"]["1"] > 0 <= row["blimp"]["1"] for row in found.values())
    assert any(line.startswith("| parquet-h50-t0-rising-shuffled | random | 1 | ") for line in lines)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("screen/branches-1/*/summary.json")}
    assert len(made) == 5 and subprocess.check_output(command, text=True).splitlines()[-1] == last
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())
    original, shuffled = (
        pl.read_parquet(directory / "part-00000.parquet")["entropy"].to_list()
        for directory in (scored, tmp_path / "screen" / "shuffled")
    )
    assert shuffled != original
    assert [sorted(map(str, row)) for row in shuffled] == [sorted(map(str, row)) for row in original]


@pytest.mark.exhaustive
def test_study(work: Path, words: list[str], tmp_path: Path) -> None:
    """The plan of docs/STUDY.md runs to its comparison, at toy sizes; a second time it does nothing."""
    lines = (work / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(lines[:200]))
    (tmp_path / "heldout.jsonl").write_text("".join(lines[200:260]))
    write_glue(tmp_path / "data" / "glue", words)
    (tmp_path / "data" / "blimp").mkdir()
    pairs = {"UID": "a", "field": "b", "pairID": [1, 2], "sentence_good": words[:2], "sentence_bad": words[2:4]}
    pl.DataFrame(pairs).write_parquet(tmp_path / "data" / "blimp" / "blimp.parquet")
    files = {"TEXT": "text.jsonl", "HELDOUT": "heldout.jsonl", "DATA": "data", "OUT": "study"}
    sizes = {"TRUNKS": 1, "BATCH": 4, "REFERENCE_STEPS": 3, "TRUNK_STEPS": 3, "BRANCH_STEPS": 3, "VOCABULARY": 300}
    names = {
        "REFERENCE": "tiny",
        "STUDENT": "tiny",
        "FRONT": "random-r30,parquet,random-r30-double",
        "ROWS": "random-r30-again",
    }
    settings = {name: str(tmp_path / file) for name, file in files.items()} | sizes | names | {"TRAIN_ROWS": 16}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for _ in range(2):
        done = subprocess.run([ROOT / "bench" / "study.sh"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    screened = json.loads((tmp_path / "study" / "screen" / "table.json").read_text())["rows"]
    assert list(screened) == ["random", "random-r30", "parquet", "random-r30-double", "random-r30-again"]
    assert screened["random-r30-double"]["training_flops"]["1"] == 2 * screened["random-r30"]["training_flops"]["1"]
    table = json.loads((tmp_path / "study" / "comparison" / "table.json").read_text())
    assert (
        table["regimes"] == ["untrained", "random-r30", "parquet", "random-r30-double"]
        and table["baseline"] == "random-r30"
    )
    assert set(table["tasks"]) == {"sst2", "qqp", "mnli_matched", "qnli"}
    study = bench.results.collect(tmp_path / "study")
    assert study["rows"]["parquet"]["glue"]["1"] == pytest.approx(
        statistics.fmean(row["scores"]["parquet"]["mean"] for row in table["tasks"].values())
    )
    assert str(tmp_path) not in json.dumps(study)
    fronts = [line.split(" | ")[0] for line in bench.results.front_table(study).splitlines()[2:]]
    assert fronts == ["| untrained", "| random-r30", "| random-r30-double", "| parquet"]
    assert bench.results.cost(study, "parquet", 1) > bench.results.cost(study, "parquet", 5) > 1


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--bimp", "x"], "--bimp is not a flag of bench/.*; the nearest is --blimp"),
        (["--rows", "no-such"], "--rows names 'no-such'"),
        (["--blimp", "nowhere"], "nowhere/blimp has no blimp as .parquet"),
    ],
)
def test_a_screen_checks_its_flags_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", screen(tmp_path, tmp_path, *flags)[1:])
    with pytest.raises(UsageError, match=sentence):
        bench.screen.main()
    assert not (tmp_path / "screen").exists()


def test_documents_show_the_numbers_in_docs_results() -> None:
    """The tables after markers are those that bench/results.py makes."""
    texts = {path: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    assert all(bench.results.remake(text) == text for text in texts.values())
    recipes = texts[ROOT / "docs" / "RECIPES.md"]
    assert (
        bench.results.remake(recipes.replace("| random-r40 | random | 3 |", "| random-r40 | random | 4 |")) == recipes
    )


def test_front_table() -> None:
    """Gains are paired by trunk, corrected for their number, and set against the costs that students share."""
    rows = {
        "untrained": {"glue": {"1": 40.0, "2": 41.0}, "loss": {"1": 9.0, "2": 9.0}},
        "random-r30": {"glue": {"1": 60.0, "2": 62.0}, "loss": {"1": 4.0, "2": 4.2}},
        "parquet": {"glue": {"1": 61.0, "2": 63.2}, "loss": {"1": 4.1, "2": 4.3}},
        "self": {"glue": {"1": 60.0, "2": 63.0}, "loss": {"1": 4.1, "2": 4.2}},
    }
    for name, row in rows.items():
        row["training_flops"] = dict.fromkeys("12", 2.0)
        row["flops"] = dict.fromkeys("12", 12.0 if name == "parquet" else 2.0)
    study = {"rows": rows, "reference": {"training_flops": 10.0}, "trunk_flops": 8.0}
    lines = [line.strip("| ").split(" | ") for line in bench.results.front_table(study).splitlines()[2:]]
    found = {name: values for name, *values in lines}
    p_values = [ttest_1samp(differences, 0).pvalue for differences in ([1.0, 1.2], [0.0, 1.0])]
    assert found["parquet"][1] == "62.1" and found["parquet"][2].startswith("+1.1 [")
    assert found["parquet"][3:] == [f"{2 * p_values[0]:.3f}", "+0.100 (all alike)", "3.00", "1.40", "1.10"]
    assert found["self"][3] == f"{max(p_values[1], 2 * p_values[0]):.3f}" and found["self"][5:] == ["1.00"] * 3
    assert found["untrained"][3] == "" and found["untrained"][5:] == ["0.00"] * 3


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    numbers = np.random.default_rng(1)
    for _ in range(200):
        p_values = {f"{row}": p for row, p in enumerate(numbers.beta(0.3, 2, size=numbers.integers(1, 7)))}
        corrected = bench.results.holm(p_values)
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
                if p_values[name] > level / (len(p_values) - rank):
                    break
                rejected.add(name)
            assert rejected == {name for name, p in corrected.items() if p <= level}


@pytest.mark.parametrize("n", [3, 5])
def test_detectable_difference_is_found_four_times_in_five(n: int) -> None:
    numbers = np.random.default_rng(1)
    differences = numbers.normal(bench.results.detectable(0.7, n), 0.7, size=(20_000, n))
    assert (ttest_1samp(differences, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_rows_of_the_screen_are_flags_of_the_trainer() -> None:
    for name, recipe in RECIPES.items():
        options, _ = train.options.parse([*recipe.flags.split(), "--shards", "x", "--output-dir", name], None)
        mask_policy(options, options.entropy_source, 1)
