"""The study of docs/RESULTS.md: its commands are what the scripts take, and a trial of it, killed, runs to its end."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from harness import ROOT, refused, run
from made_results import summary, write_results

import glue.compare
import glue.options
import pipeline.score
import train.options
import train.plan
from bench.regimes import REGIMES, SCALES
from bench.report import decile_differences, deciles, findings
from glue.metrics import AVERAGES

STUDY = [sys.executable, str(ROOT / "bench" / "study.py")]


@pytest.fixture
def files(words: list[str], data: Path, tmp_path: Path) -> list[object]:
    """Articles, of which two are held out, and GLUE."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 2000)) for _ in range(300)]
    pl.DataFrame({"id": range(300), "text": texts}).write_parquet(tmp_path / "articles.parquet")
    (tmp_path / "ids.txt").write_text("7\n11\n")
    return ["--articles", tmp_path / "articles.parquet", "--held-out", tmp_path / "ids.txt", "--glue", data]


@pytest.mark.parametrize("scale", SCALES)
def test_its_commands_are_such_as_the_scripts_take(files: list[object], tmp_path: Path, scale: str) -> None:
    lines = run(*STUDY, *files, "--output", tmp_path / "study", "--scale", scale, "--dry-run").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ")]
    assert not (tmp_path / "study").exists()
    of = SCALES[scale]
    seeds = {each.name: of.seeds if each.replicated else of.others if each.glue else of.others[:1] for each in REGIMES}
    trained = set()
    for script, *flags in commands:
        if script == "train/run.py":
            options, args = train.options.parse(["8" if flag == "…" else flag for flag in flags], None)
            trained.add((Path(str(args.output_dir)).name, args.seed))
            assert options.num_workers == 1
        elif script == "pipeline/score.py":
            pipeline.score.parse(flags)
        elif script == "train/plan.py":
            train.plan.parse(flags)
        elif script == "glue/run.py":
            args = glue.options.parse(flags, None)
            assert set(args.limit_train) == {"sst2"} and args.drop_overlap
            if args.learning_rate is None:
                name = Path(args.model[0]).name.rpartition("-")[0]
                assert args.seeds == ([1, 2] if len(seeds[name]) > 1 else [1]), "of an anecdote, one"
        elif script == "glue/compare.py":
            compared = glue.compare.parse(flags).regimes
    assert trained - {("reference", 1)} == {(f"{name}-{seed}", seed) for name, of in seeds.items() for seed in of}
    assert {name: len(directories) for name, directories in compared.items()} == {
        regime.name: len(seeds[regime.name]) for regime in REGIMES if regime.glue and seeds[regime.name]
    }


def test_its_rows_are_written_down_with_their_flags() -> None:
    text = (ROOT / "docs" / "RESULTS.md").read_text()
    for regime in REGIMES:
        flags = regime.flags + " --max-steps EQUAL" * regime.equal_cost
        flags += f" --targets targets-{regime.targets}" * bool(regime.targets)
        flags += f" --shards {regime.shards}" * (regime.shards != "scored")
        assert any(row.startswith(f"| {regime.name} |") and f"| `{flags}` |" in row for row in text.splitlines())


def test_what_it_is_made_from_is_looked_at_first(files: list[object], tmp_path: Path) -> None:
    output = tmp_path / "study"
    (tmp_path / "other.txt").write_text("7\n300\n")
    other = [*files[:3], tmp_path / "other.txt", *files[4:]]
    assert "'300', which is no id in --articles" in refused(*STUDY, *other, "--output", output)
    binary = [*files[:3], tmp_path / "articles.parquet", *files[4:]]
    assert "--held-out cannot be read" in refused(*STUDY, *binary, "--output", output)
    nothing = [*files[:5], tmp_path / "nothing"]
    assert "nothing" in refused(*STUDY, *nothing, "--output", output)
    assert not output.exists()
    output.mkdir()
    (output / "inputs.json").write_text(json.dumps({"articles": "another", "held_out": "1", "scale": {}}))
    assert "was begun with others (articles: another → " in refused(*STUDY, *files, "--output", output)
    assert [path.name for path in output.iterdir()] == ["inputs.json"]


def test_its_tables(tmp_path: Path) -> None:
    """Numbers of the comparison, costs as multiples of the baseline's training, intervals where there are several."""
    summaries: dict[str, list[dict[str, Any]]] = {}
    for name, seeds in (("random", (1, 2, 3)), ("parquet", (1, 2, 3)), ("self", (2,))):
        for seed in seeds:
            worse = (seed + 1) / 15 * (name == "parquet")  # 2, 3 and 4 fifteenths: 0.2 on average
            by_decile = [seed + decile + worse for decile in range(10)]
            training = summary(name, seed, 4 + seed / 10, eval_loss_by_entropy_decile=by_decile)
            scores = {task: {1: 0.5 + seed * len(name) / 100} for task in AVERAGES["local6"]}
            write_results(tmp_path / f"{name}-{seed}", scores, training)
            summaries.setdefault(name, []).append(training)
    names = [f"{name}={tmp_path / name}-{each['seed']}" for name, found in summaries.items() for each in found]
    glue.compare.main([*names, "--output", str(tmp_path / "out")])
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in findings(table, "local6").splitlines()[2:]]
    assert [row[:2] for row in rows] == [["random", "3"], ["parquet", "3"], ["self", "1 (anecdote)"]]
    found = table["averages"]["local6"]["parquet"]["difference"]
    assert rows[1][3] == f"+{found['mean']:.1f} [{found['low']:+.1f}, {found['high']:+.1f}]" and rows[0][3] == ""
    assert rows[2][2:4] == ["58.0", "-4.0"], "of one seed, nothing but the mean"
    assert [row[5:] for row in rows] == [["1.0"] * 3, ["1.0", "1.2", "1.2"], ["1.3"] * 3]
    of_deciles = [line.strip("| ").split(" | ") for line in deciles(summaries).splitlines()[2:]]
    for row, more in zip(of_deciles, (2, 2.2, 2), strict=True):
        assert row[4:14] == [f"{more + decile:.2f}" for decile in range(10)]
    differences = [line.strip("| ").split(" | ") for line in decile_differences(summaries, "random").splitlines()[2:]]
    assert [row[:2] for row in differences] == [["parquet", "3"], ["self", "1 (anecdote)"]]
    assert differences[0][2] == "+0.20 [+0.03, +0.37]" and differences[1][2:] == ["+0.00"] * 10
    assert of_deciles[0][2:4] == ["4.20", "[3.95, 4.45]"] and of_deciles[2][2:4] == ["4.20", "anecdote"]


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_killed_trial_goes_on_to_its_end(files: list[object], tmp_path: Path) -> None:
    output = tmp_path / "study"
    command = [str(part) for part in (*STUDY, *files, "--output", output, "--scale", "trial", "--jobs", 2)]
    study = subprocess.Popen(command, start_new_session=True)
    while not list(output.glob("students/*/summary.json")):
        assert study.poll() is None
        time.sleep(0.2)
    study.send_signal(signal.SIGTERM)
    study.wait(120)
    # one that fails is named, and the others go on
    obstacle = output / "students" / "self-step-1"
    assert not obstacle.exists()
    obstacle.mkdir()
    (obstacle / "note.txt").write_text("mine")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert (
        failed.returncode == 1 and "not every student is finished: self-step-1 failed with exit code 2" in failed.stderr
    )
    assert {path.parent.name for path in output.glob("students/*/summary.json")} == {
        f"{regime.name}-1" for regime in REGIMES if regime.replicated and regime.name != "self-step"
    }
    shutil.rmtree(obstacle)
    made = {path: path.stat().st_mtime_ns for path in output.glob("students/*/summary.json")}
    for _ in range(2):  # to its end, and then once more
        subprocess.run(command, check=True)
        assert all(path.stat().st_mtime_ns == written for path, written in made.items())
        made = {path: path.stat().st_mtime_ns for path in output.glob("students/*/summary.json")}
    table = json.loads((output / "comparison" / "table.json").read_text())
    main = [regime for regime in REGIMES if regime.replicated]
    assert table["regimes"] == [regime.name for regime in main] and set(table["averages"]) >= {"local6"}
    costs = {name: row["total_flops"] for name, row in table["training"].items()}
    assert costs["random-equal-cost"] == pytest.approx(costs["parquet+kd"], rel=0.02)
    held_out = json.loads((output / "heldout" / "manifest.json").read_text())
    assert held_out["totals"]["documents"] == 2
    tables = (output / "results.md").read_text().split("\n\n")
    assert len(tables) == 4
    for text in tables[:3]:
        assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:]] == [regime.name for regime in main]
    assert "| anecdote |" in tables[2] and "[" not in tables[0].partition("\n")[2]
