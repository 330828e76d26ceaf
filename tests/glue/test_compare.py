"""The tables of glue/compare.py, on results that the tests write: scores, differences, averages and costs."""

import csv
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, run
from html_page import Page, svgs
from made_results import LOCAL, SEEDS, TOKENS, compare_here, names_of, summary, write_results
from scipy import stats

from entropy_masking.errors import UsageError
from glue.tasks import GLUE


def scores_of(results: Path, regime: str, task: str) -> dict[int, dict[int, float]]:
    return {
        seed: {
            trial: json.loads((results / regime / str(seed) / f"{task}-seed{trial}.json").read_text())["score"]
            for trial in (1, 2)
        }
        for seed in SEEDS[regime]
    }


def test_scores_and_paired_differences(results: Path, compared: Path) -> None:
    table = json.loads((compared / "table.json").read_text())
    assert (table["baseline"], table["regimes"]) == ("random", list(SEEDS)) and set(table["averages"]) == {"local6"}
    for task in LOCAL:
        base = scores_of(results, "random", task)
        for regime, seeds in SEEDS.items():
            row, own = table["tasks"][task]["scores"][regime], scores_of(results, regime, task)
            means = {seed: statistics.fmean(by.values()) for seed, by in own.items()}
            assert row["mean"] == pytest.approx(statistics.fmean(means.values())) and row["n"] == len(seeds)
            assert row["values"] == pytest.approx({str(seed): mean for seed, mean in means.items()})
            if regime == "random":
                assert row["difference"] is None
                continue
            pairs = [(means[seed], statistics.fmean(base[seed].values())) for seed in seeds]
            difference = row["difference"]
            assert difference["n"] == len(seeds)
            assert difference["mean"] == pytest.approx(statistics.fmean(one - two for one, two in pairs))
            if len(seeds) > 1:
                expected = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval()
                assert (difference["low"], difference["high"]) == pytest.approx((expected.low, expected.high))
                assert row["sd"] == pytest.approx(statistics.stdev(means.values()))
            else:
                assert difference["low"] is difference["high"] is row["sd"] is None
    six = [statistics.fmean(scores_of(results, "parquet", task)[2].values()) for task in LOCAL]
    assert table["averages"]["local6"]["parquet"]["values"]["2"] == pytest.approx(statistics.fmean(six))
    loss = table["eval_loss"]["parquet"]
    assert loss["n"] == 3 and loss["difference"]["n"] == 3 and 4 <= loss["mean"] <= 4.1


def test_tables_say_how_many_seeds_and_what_is_an_anecdote(compared: Path) -> None:
    text = (compared / "table.md").read_text()
    first, _, rest = text.partition("\n\n")
    assert re.fullmatch(
        r"On local6, .*; self [+-]\d.* points against random, with one pretraining seed \(an anecdote\).", first
    )
    assert rest.startswith("### Scores\n\n| cramming | **local6** | cola |") and "qnli (train_subset)" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    by_name = {name: [row for row in rows if row[0] == name] for name in SEEDS}
    assert by_name["random"][0][-2:] == ["5", "10"]
    scores, difference, apart, cost, *_ = by_name["parquet"]
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d", scores[1]) and scores[-2:] == ["3", "6"]
    assert re.fullmatch(r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]", difference[1]) and difference[-1] == "3"
    assert apart == ["parquet", "--entropy-source parquet"], "and nothing else"
    assert "targets of 4 variants of parquet masks" in by_name["parquet+kd"][2][1]
    assert cost[2:5] == ["3", "1,000", f"{TOKENS:,}"] and cost[-2] == "37.0 G"
    assert by_name["self"][0][-2:] == ["1 (anecdote)", "2"] and by_name["self"][1][-1] == "1 (anecdote)"
    assert "±" not in " ".join(by_name["self"][0]) and "[" not in " ".join(by_name["self"][1])
    assert "Each value is a regime minus random in percentage points (eval loss: in nats), with" in text
    assert "Not computed: the average glue8 needs qqp, mnli" in text
    assert "Some evaluation rows are also training rows: stsb 6 of 24." in text
    assert ["parquet", "online teacher", "1.0", "1", "1.0", "1"] in rows
    assert ["parquet", "self", "2.8", "1"] in [row[:4] for row in rows]


def test_the_csv_has_every_number_of_the_table(compared: Path) -> None:
    table = json.loads((compared / "table.json").read_text())
    rows = list(csv.DictReader((compared / "table.csv").open()))
    assert len(rows) == (1 + len(LOCAL) + 1) * len(SEEDS)
    row = next(row for row in rows if (row["of"], row["regime"]) == ("local6", "parquet"))
    average = table["averages"]["local6"]["parquet"]
    assert float(row["mean"]) == average["mean"] and float(row["difference_high"]) == average["difference"]["high"]
    alone = next(row for row in rows if (row["of"], row["regime"]) == ("local6", "self"))
    assert (alone["sd"], alone["difference_low"], alone["n"]) == ("", "", "1")


def test_the_same_numbers_are_the_same_bytes(compared: Path, results: Path, tmp_path: Path) -> None:
    compare_here(tmp_path, *names_of(results))
    for file in sorted(compared.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("module", ["glue.compare", "train.explore"])
def test_help_does_not_import_matplotlib(module: str) -> None:
    lines = [
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import {module}",
        f"try: {module}.main(['--help'])",
        "except SystemExit: print('matplotlib' in sys.modules)",
    ]
    assert run(sys.executable, "-c", "\n".join(lines)).endswith("False\n")


def test_costs_are_shown_with_and_without_the_training_of_the_teacher(results: Path, tmp_path: Path) -> None:
    names = [f"{name}={results / name / '2'}" for name in ("random", "parquet")]
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "summary.json").write_text(json.dumps({"training_flops": 5e11, "scoring_flops": 0}))
    costs = compare_here(tmp_path / "out", *names, "--teacher", tmp_path / "teacher")["training"]
    assert costs["parquet"]["total_flops"] == 3.7e10 and costs["parquet"]["with_teacher_flops"] == 5.37e11
    assert costs["random"]["total_flops"] == costs["random"]["with_teacher_flops"] == 3e10
    assert "| 37.0 G | 537 G |" in (tmp_path / "out" / "table.md").read_text()
    for directory in (tmp_path / "nothing", results):
        with pytest.raises(UsageError, match=r"has no summary.json with the costs of its training"):
            compare_here(tmp_path / "out", *names, "--teacher", directory)


def test_models_without_a_training_run_of_this_project(tmp_path: Path) -> None:
    """All nine tasks, without costs and without curves."""
    scores = {task: {1: 0.5, 2: 0.25} for task in GLUE}
    for name in ("a", "b"):
        write_results(tmp_path / name, scores, None, collapsed=("rte",))
    table = compare_here(tmp_path / "out", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}")
    assert set(table["averages"]) == {"glue8", "bert9", "leaderboard9", "local6"}
    assert table["not_computed"] == {"large4": "the average large4 needs mnli_matched"}
    assert table["training"] == {"a": None, "b": None} and table["break_even"] == [] and table["eval_loss"] is None
    assert table["averages"]["glue8"]["b"]["difference"] == {
        **{"mean": 0.0, "sd": None, "low": None, "high": None, "n": 1},
    }
    assert (
        table["tasks"]["rte"]["scores"]["a"]["collapsed"] == 2 and "†2" in (tmp_path / "out" / "table.md").read_text()
    )
    text = (tmp_path / "out" / "page.html").read_text()
    assert "n = 1 †2" in text and "Cost" not in Page(text).text and len(svgs(text)) == 1 + 4 + 9
    one = compare_here(tmp_path / "one", f"a={tmp_path / 'a'}")
    assert one["regimes"] == ["a"] and "Difference" not in (tmp_path / "one" / "table.md").read_text()


def test_a_checkpoint_of_others_is_compared_with_every_seed(tmp_path: Path) -> None:
    """It has no pretraining seed. So domain adaptation is compared with its start, whatever its seeds are."""
    names = [f"base={write_results(tmp_path / 'base', {'rte': {1: 0.5, 2: 0.6}}, None)}"]
    for seed, gain in ((42, 0.1), (43, 0.2)):
        scores = {"rte": {1: 0.5 + gain, 2: 0.6 + gain}}
        names.append(f"adapted={write_results(tmp_path / str(seed), scores, summary('parquet', seed))}")
    for baseline, mean in (("base", 15), ("adapted", -15)):
        table = compare_here(tmp_path / "out" / baseline, *names, "--baseline", baseline)
        (other,) = {"base", "adapted"} - {baseline}
        difference = table["tasks"]["rte"]["scores"][other]["difference"]
        assert difference["mean"] == pytest.approx(mean) and difference["n"] == 2


def test_summaries_of_older_programs(tmp_path: Path) -> None:
    """Without FLOPs, without curves and without the costs of the shards: the rest is shown."""
    kept = ("regime", "steps", "tokens", "seconds", "tokens_per_second", "eval_loss", "scoring_seconds", "seed")
    for name in ("random", "parquet"):
        old = {key: value for key, value in summary(name, 1).items() if key in kept}
        write_results(tmp_path / name, {"rte": {1: 0.6}}, old | {"history": "none", "shards": None})
    table = compare_here(tmp_path / "out", *(f"{name}={tmp_path / name}" for name in ("random", "parquet")))
    assert table["training"]["parquet"]["scoring_seconds"] == 70 and table["training"]["parquet"]["total_flops"] is None
    assert len(svgs((tmp_path / "out" / "page.html").read_text())) == 1 + 1


def test_losses_on_other_text_are_not_compared(tmp_path: Path) -> None:
    """Held-out text is the same if its tokens are, with or without scores."""
    shards, other = {"sequences_hash": "a", "fingerprint_hash": "1"}, {"sequences_hash": "b"}
    cases: list[tuple[bool, dict[str, Any]]] = [
        (True, {"shards": shards | {"fingerprint_hash": "2"}, "flags": {"eval_fraction": 0.1}}),
        (False, {"shards": shards, "flags": {"eval_fraction": 0.2}}),
        (False, {"shards": other, "flags": {"eval_fraction": 0.1}}),
        (False, {"shards": shards, "flags": {"eval_fraction": 0.1}, "eval_shards": other}),
    ]
    first = summary("random", 1) | {"shards": summary("random", 1)["shards"] | shards, "flags": {"eval_fraction": 0.1}}
    write_results(tmp_path / "random", {"rte": {1: 0.6}}, first)
    for number, (same, changes) in enumerate(cases):
        training = summary("parquet", 1)
        training |= changes | {"shards": training["shards"] | changes["shards"]}
        name = str(number)
        write_results(tmp_path / name, {"rte": {1: 0.6}}, training)
        table = compare_here(tmp_path / "out" / name, f"random={tmp_path / 'random'}", f"parquet={tmp_path / name}")
        assert (table["eval_loss"] is not None) == same, number
        assert ("eval loss" in table["not_computed"]) == (not same), "the table says so"


def test_an_average_uses_the_seeds_that_its_own_tasks_share(tmp_path: Path) -> None:
    scores = {task: {1: 0.5, 2: 0.6} for task in GLUE} | {"wnli": {1: 0.5}}
    write_results(tmp_path / "a", scores, None)
    averages = compare_here(tmp_path / "out", f"a={tmp_path / 'a'}")["averages"]
    assert [averages[name]["a"]["fine_tuning_seeds"] for name in ("glue8", "leaderboard9")] == [2, 1]
    assert averages["glue8"]["a"]["fine_tuning_sd"] == pytest.approx(statistics.stdev([50, 60]))
    assert "| 1 (anecdote) | 1 to 2 |" in (tmp_path / "out" / "table.md").read_text()
    write_results(tmp_path / "b", {task: {1 + (task == "rte"): 0.5} for task in GLUE}, None)
    with pytest.raises(UsageError, match="glue8 needs a seed that all of its tasks share; run what is missing"):
        compare_here(tmp_path / "out", f"b={tmp_path / 'b'}", "--average", "glue8")
