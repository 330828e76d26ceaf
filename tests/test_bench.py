"""The benches run, on a small model and little text; what they find is not for a test to say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats
from harness import LENGTH, ROOT, refused
from in_process import score_here
from made_glue import write_glue

import bench.results
import bench.screen
import train.options
from bench.recipes import RECIPES
from entropy_masking.commands.mask_flags import mask_policy
from entropy_masking.errors import UsageError
from entropy_masking.shards.manifests import read_manifest
from glue.intervals import Estimate


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
    command = [sys.executable, ROOT / "bench" / "loading.py", "--shards", tokens, "--rounds", 1]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {name: row["value"] for name, row in json.loads(done.stdout.splitlines()[-1])["rows"].items()}
    rates = {own + ending for own in ("tokens", "tokens_masked") for ending in ("", "_workers", "_workers_to_1")}
    assert rows.keys() == rates | {"first_batch"} and min(rows.values()) > 0


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
    """The plan of docs/STUDY.md runs to its tables, at toy sizes."""
    lines = (work / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(lines[:200]))
    (tmp_path / "heldout.jsonl").write_text("".join(lines[200:260]))
    write_glue(tmp_path / "data" / "glue", words)
    (tmp_path / "data" / "blimp").mkdir()
    pairs = {"UID": "a", "field": "b", "pairID": [1, 2], "sentence_good": words[:2], "sentence_bad": words[2:4]}
    pl.DataFrame(pairs).write_parquet(tmp_path / "data" / "blimp" / "blimp.parquet")
    files = {"TEXT": "text.jsonl", "HELDOUT": "heldout.jsonl", "DATA": "data", "OUT": "study"}
    sizes = {"TRUNKS": 2, "BATCH": 4, "REFERENCE_STEPS": 3, "TRUNK_STEPS": 3, "BRANCH_STEPS": 4, "VOCABULARY": 300}
    sizes |= {"POOR_DOCUMENTS": 50, "POOR_REFERENCE_STEPS": 2, "POOR_STEPS": 3, "TRAIN_ROWS": 16}
    rows = {"FRONT": "random-r30,random-r30-again,study-parquet", "ROWS": "random-r30-long"}
    names = rows | {"REFERENCE": "tiny", "STUDENT": "tiny"}
    settings = {name: str(tmp_path / file) for name, file in files.items()} | sizes | names
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run([ROOT / "bench" / "study.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    study = bench.results.collect(tmp_path / "study")
    assert str(tmp_path) not in json.dumps(study)
    tuned = {"untrained", "random-r30", "random-r30-again", "parquet"}
    assert set(study["rows"]) == tuned | {"random", "random-r30-long"}
    assert "0.4286" in study["recipes"]["parquet"]
    manifests = {name: read_manifest(str(tmp_path / "study" / name)) for name in ("tokens", "scored-tokens")}
    for row, read in (("random-r30", "tokens"), ("study-parquet", "scored-tokens")):
        identity = json.loads((tmp_path / "study" / "screen" / "branches-1" / row / "run.json").read_text())
        assert identity["shards"] == manifests[read].fingerprint_hash
    for name, row in study["rows"].items():
        assert all(set(own) == {"1", "2"} for own in row.values())
        assert (name in tuned) == all(f"{task}:3" in row for task in ("sst2", "qqp", "mnli_matched", "qnli"))
    assert set(study["poor"]["rows"]) >= {"scratch-random-r30", "scratch-parquet", "scratch-self", "scratch-parquet+kd"}
    flops = {name: study["rows"][name]["training_flops"]["1"] for name in ("random-r30", "random-r30-long")}
    assert flops["random-r30-long"] == flops["random-r30"] * 6 / 4  # round(1.57 * 4) steps
    check_tables(study, tmp_path)
    fronts = [line.split(" | ")[:2] for line in bench.results.front_table(study).splitlines()[2:]]
    assert fronts == [["| untrained", "2"], ["| random-r30", "2"], ["| parquet", "2"]]
    assert "random-r30-again − random-r30" in bench.results.contrast_table(study)


def check_tables(study: dict[str, Any], directory: Path) -> None:
    """All tables of a study, and its figure, can be made."""
    study = json.loads(json.dumps(study))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.results, "read", lambda name: study)
        made = {name: make() for name, make in bench.results.TABLES.items() if name.startswith("study-")}
    for table in made.values():
        assert len({line.count("|") for line in table.splitlines()}) <= 1
    bench.results.draw(study, directory / "figure.svg")


@pytest.mark.parametrize(
    "missing",
    [
        {},
        {"untrained": "123"},
        {"random-r30": "123"},
        {"random-r30": "123", "parquet": "123", "self": "123"},
        dict.fromkeys(("untrained", "random-r30", "parquet", "self"), "23"),
        {"parquet": "3"},
    ],
)
def test_an_unfinished_study_has_tables(missing: dict[str, str], tmp_path: Path) -> None:
    study = made_study()
    for name, trunks in missing.items():
        for measure in bench.results.FOUR_TASKS:
            for trunk in trunks:
                del study["rows"][name][measure][trunk]
    check_tables(study, tmp_path)


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


@pytest.mark.parametrize("name", ["random-r30", "self", "self-paper", "parquet", "random-r30+kd", "predict-excess"])
def test_rows_without_scores(name: str) -> None:
    assert RECIPES[name].reads_scores == (name not in ("random-r30", "self", "self-paper"))


def test_documents_show_the_numbers_in_docs_results() -> None:
    """The tables after markers are those that bench/results.py makes."""
    texts = {path.name: path.read_text() for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md")}
    assert all(bench.results.remake(text) == text for text in texts.values())
    recipes = texts["RECIPES.md"]
    assert bench.results.remake(recipes.replace("| random-r40 | random | 3", "| random-r40 | random | 4")) == recipes


def made_study() -> dict[str, Any]:
    """Three trunks of four rows: `parquet` is better than `random-r30` by 3, 2 and 4 points."""
    scores = {"untrained": [40, 41, 42], "random-r30": [60, 62, 64], "parquet": [63, 64, 68], "self": [60, 63, 64]}
    rows = {}
    for name, values in scores.items():
        measures = {measure: values for measure in bench.results.FOUR_TASKS} | {
            "loss": [4.0, 4.2, 4.1],
            "blimp": [51.0, 52.0, 53.0],
        }
        measures |= {f"decile_{number}": [1.0, 1.1, 1.2] for number in range(1, 11)}
        measures |= {"training_flops": [2.0] * 3, "flops": [12.0 if name == "parquet" else 2.0] * 3}
        rows[name] = {measure: dict(zip("123", own, strict=True)) for measure, own in measures.items()}
    reference = {"loss": 3.0, "training_flops": 10.0}
    return {"rows": rows, "reference": reference, "trunk_flops": 8.0, "recipes": {"self": ""}, "poor": {"rows": {}}}


def test_front_table() -> None:
    lines = bench.results.front_table(made_study()).splitlines()[2:]
    found = {name: values for name, *values in (line.strip("| ").split(" | ") for line in lines)}
    assert found["untrained"][:2] == ["3", "41.0"] and found["untrained"][-2:] == ["0.00", "0.00"]
    assert found["parquet"][1] == "65.0" and found["parquet"][2].startswith("+3.0 [")
    assert found["parquet"][4] == "undecided" and found["self"][4] == "undecided, 5 % excluded"
    assert found["parquet"][-2:] == ["3.00", "1.10"]  # 8 + 2 of training, 10 of scores and 10 of the reference
    assert found["self"][-2:] == ["1.00", "1.00"]


@pytest.mark.parametrize(
    "mean, high, p_value, result",
    [(2, 3, 0.04, "gains"), (-2, -1, 0.04, "loses, 5 % excluded"), (2, 4, 0.05, "undecided"), (1, 2, 0.04, "gains")],
)
def test_verdict(mean: float, high: float, p_value: float, result: str) -> None:
    estimate = Estimate(mean, 1.0, mean - 1, high, 3)
    assert bench.results.verdict(estimate, p_value, 3 if mean == 2 else 2) == result


def test_the_figure_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        bench.results.draw(made_study(), tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and ">parquet</text>" in drawn


def test_layout_is_a_linear_model_of_rows_and_trunks() -> None:
    layout = bench.results.four_tasks(made_study())
    values = [(row, trunk, score) for row, own in enumerate(layout.values_KN) for trunk, score in enumerate(own)]
    design = np.zeros((9, 5))  # three rows; two trunks beside the first
    for line, (row, trunk, _) in enumerate(values):
        design[line, row] = 1
        if trunk:
            design[line, 2 + trunk] = 1
    scores = np.array([score for *_, score in values])
    effects, (squares,), *_ = np.linalg.lstsq(design, scores)
    names = layout.names
    contrast = np.zeros(5)
    contrast[names.index("parquet")], contrast[names.index("random-r30")] = 1, -1
    error = np.sqrt(squares / 4 * contrast @ np.linalg.inv(design.T @ design) @ contrast)
    gain = layout.difference("parquet", "random-r30")
    assert layout.degrees == 4 and gain.mean == pytest.approx(contrast @ effects) == 3
    assert gain.high - gain.mean == pytest.approx(scipy.stats.t.ppf(0.975, 4) * error)
    p_value = 2 * scipy.stats.t.sf(3 / error, 4)
    assert layout.p_value("parquet", "random-r30") == pytest.approx(p_value)


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    numbers = np.random.default_rng(1)
    for _ in range(200):
        p_values = {f"{row}": p for row, p in enumerate(numbers.beta(0.3, 2, size=numbers.integers(1, 7)))}
        corrected = bench.results.holm(p_values, 7)
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
                if p_values[name] > level / (7 - rank):
                    break
                rejected.add(name)
            assert rejected == {name for name, p in corrected.items() if p <= level}


def test_detectable_difference_is_found_four_times_in_five() -> None:
    numbers = np.random.default_rng(1)
    layout = bench.results.four_tasks(made_study())
    size, noise = layout.detectable(3, 0.05), layout.sd / np.sqrt(2)
    found = 0
    for _ in range(2000):
        values = np.add(numbers.normal(0, noise, size=(3, 3)), [[0], [size], [0]])
        rows = {name: {"loss": dict(enumerate(own))} for name, own in zip("abc", values, strict=True)}
        found += bench.results.Layout(rows, ["loss"]).p_value("b", "a") < 0.05
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_rows_of_the_screen_are_flags_of_the_trainer() -> None:
    for name, recipe in RECIPES.items():
        options, _ = train.options.parse([*recipe.flags.split(), "--shards", "x", "--output-dir", name], None)
        mask_policy(options, options.entropy_source, 1)
