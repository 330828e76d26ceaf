"""glue/compare.py as its users run it, on results that the tests write."""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import Browser, needs_browser
from harness import ROOT, refused, run
from made_results import TOKENS, summary, write_results
from scipy import stats

import glue.compare
from entropy_masking.errors import UsageError
from glue import report
from glue.records import Summary
from glue.tasks import GLUE

COMPARE = [sys.executable, str(ROOT / "glue" / "compare.py")]
LOCAL = ("cola", "sst2", "mrpc", "rte", "stsb", "qnli")
SEEDS = {"random": (1, 2, 3, 4, 5), "parquet": (2, 3, 5), "parquet+kd": (1, 2, 3), "self": (4,)}


def made(root: Path, regime: str, seed: int, **changes: Any) -> Path:
    rng = np.random.default_rng([seed, len(regime)])
    scores = {task: {1: 0.5 + rng.random() / 4, 2: 0.5 + rng.random() / 4} for task in LOCAL}
    loss = 4 + rng.random() / 10
    return write_results(root / regime / str(seed), scores, summary(regime, seed, loss, **changes))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four regimes of five, three, three seeds and one; not to be changed."""
    root = tmp_path_factory.mktemp("results")
    for regime, seeds in SEEDS.items():
        for seed in seeds:
            made(root, regime, seed)
    return root


@pytest.fixture(scope="module")
def compared(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of all four by the command; not to be changed."""
    output = tmp_path_factory.mktemp("comparison")
    names = [f"{regime}={results / regime / str(seed)}" for regime, seeds in SEEDS.items() for seed in seeds]
    printed = run(*COMPARE, *names, "--output", output)
    assert (output / "table.md").read_text() in printed
    return output


def compare_here(output: Path, *arguments: object) -> dict[str, Any]:
    glue.compare.main([*map(str, arguments), "--output", str(output)])
    return json.loads((output / "table.json").read_text())


def scores_of(results: Path, regime: str, task: str) -> dict[int, dict[int, float]]:
    return {
        seed: {
            each: json.loads((results / regime / str(seed) / f"{task}-seed{each}.json").read_text())["score"]
            for each in (1, 2)
        }
        for seed in SEEDS[regime]
    }


# --- the command -----------------------------------------------------------------------------------------------------


def test_scores_and_paired_differences(results: Path, compared: Path) -> None:
    table = json.loads((compared / "table.json").read_text())
    assert (table["baseline"], table["regimes"]) == ("random", list(SEEDS)) and set(table["averages"]) == {"local6"}
    for task in LOCAL:
        base = scores_of(results, "random", task)
        for regime, seeds in SEEDS.items():
            found, own = table["tasks"][task]["scores"][regime], scores_of(results, regime, task)
            means = {seed: statistics.fmean(by.values()) for seed, by in own.items()}
            assert found["mean"] == pytest.approx(statistics.fmean(means.values())) and found["n"] == len(seeds)
            assert found["values"] == pytest.approx({str(seed): mean for seed, mean in means.items()})
            if regime == "random":
                assert found["difference"] is None
                continue
            pairs = [(means[seed], statistics.fmean(base[seed].values())) for seed in seeds]
            difference = found["difference"]
            assert difference["n"] == len(seeds)
            assert difference["mean"] == pytest.approx(statistics.fmean(one - two for one, two in pairs))
            if len(seeds) > 1:
                expected = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval()
                assert (difference["low"], difference["high"]) == pytest.approx((expected.low, expected.high))
                assert found["sd"] == pytest.approx(statistics.stdev(means.values()))
            else:
                assert difference["low"] is difference["high"] is found["sd"] is None
    six = [
        statistics.fmean(statistics.fmean(scores_of(results, "parquet", t)[s].values()) for t in LOCAL) for s in (2,)
    ]
    assert table["averages"]["local6"]["parquet"]["values"]["2"] == pytest.approx(six[0])
    loss = table["eval_loss"]["parquet"]
    assert loss["n"] == 3 and loss["difference"]["n"] == 3 and 4 <= loss["mean"] <= 4.1


def test_tables_say_how_many_and_what_is_an_anecdote(compared: Path) -> None:
    text = (compared / "table.md").read_text()
    assert text.startswith("### Scores\n\n| cramming | **local6** | cola |") and "qnli (train_subset)" in text
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
    assert "Not computed: the average glue8 needs qqp, mnli" in text
    assert "Evaluation rows that are training rows too: stsb 6 of 24." in text
    assert ["parquet", "online teacher", "1.0", "1", "1.0", "1"] in rows
    assert ["parquet", "self", "2.8", "1"] in [row[:4] for row in rows]


def test_the_csv_has_every_number_of_the_table(compared: Path) -> None:
    table = json.loads((compared / "table.json").read_text())
    rows = list(csv.DictReader((compared / "table.csv").open()))
    assert len(rows) == (1 + len(LOCAL) + 1) * len(SEEDS)
    row = next(row for row in rows if (row["of"], row["regime"]) == ("local6", "parquet"))
    cell = table["averages"]["local6"]["parquet"]
    assert float(row["mean"]) == cell["mean"] and float(row["difference_high"]) == cell["difference"]["high"]
    alone = next(row for row in rows if (row["of"], row["regime"]) == ("local6", "self"))
    assert (alone["sd"], alone["difference_low"], alone["n"]) == ("", "", "1")


class Page(HTMLParser):
    """Which tags are open, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", text, re.S)]


def words(svg: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in svg.iter("text")]


def test_the_page_stands_alone_and_shows_it_all(compared: Path) -> None:
    text = (compared / "page.html").read_text()
    page, table = Page(text), json.loads((compared / "table.json").read_text())
    assert page.open == [] and not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "default-src 'none'" in text and "script-src" not in text, "the browser refuses the rest"
    assert not re.search(r"https?:|//|url\((?!#)|@import|\ssrc=|href=\"(?!#)", text)
    assert "prefers-color-scheme:dark" in text and "viewport" in text
    for title in ("What is gained", "Scores, task by task", "Quality against cost", "When offline scores pay"):
        assert title in page.text
    for panel in ("at equal steps", "at equal seconds", "scoring included"):
        assert f"training loss {panel}" in page.text
    # differences; an average and six tasks; quality against cost; break-even; three of curves
    found = svgs(text)
    assert len(found) == 1 + 7 + 1 + 1 + 3
    for name, svg in zip(table["averages"] | table["tasks"], found[1:], strict=False):
        row = (table["averages"] | {task: each["scores"] for task, each in table["tasks"].items()})[name]
        for regime in SEEDS:
            at = words(svg).index(regime)
            assert words(svg)[at + 1].startswith(f"{row[regime]['mean']:.1f}"), "its value beside its name"
            assert words(svg)[at + 1].endswith(f"n = {len(SEEDS[regime])}")
    for svg in found[8:]:
        assert all(any(regime in word for word in words(svg)) for regime in SEEDS), "each is named in each legend"
    for svg in found:
        width, height = map(float, svg.attrib["viewBox"].split()[2:])
        clips = [[float(rect.attrib[name]) for name in ("x", "y", "width", "height")] for rect in svg.iter("rect")]
        places = [place for x, y, w, h in clips for place in ((x, y), (x + w, y + h))]
        for parent in list(svg.iter()):
            for child in [child for child in parent if "clip-path" in child.attrib]:
                parent.remove(child)  # it ends at one of these rectangles
        drawn = [path.attrib["d"] for path in svg.iter("path") if "id" not in path.attrib]
        places += [tuple(map(float, pair)) for d in drawn for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", d)]
        places += [(float(mark.attrib["x"]), float(mark.attrib["y"])) for mark in (*svg.iter("use"), *svg.iter("text"))]
        assert len(places) > 9 and all(-1 <= x <= width + 1 and -1 <= y <= height + 1 for x, y in places)
    assert len(re.findall(r"#[0-9a-f]{6}\b", text.partition("</style>")[2])) == 0, "all colours are of the theme"


def test_intervals_are_drawn_where_the_table_has_them(compared: Path) -> None:
    """Of the differences: about zero, with two ends and a filled dot; without an interval a hollow dot."""
    table = json.loads((compared / "table.json").read_text())
    (axes,) = report.differences(table)["local6"].axes
    assert [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2] == [[0, 0]]
    low, high = axes.get_xlim()
    for regime, (dot, ends, bars) in zip(("parquet", "parquet+kd", "self"), axes.containers, strict=True):
        difference = table["averages"]["local6"][regime]["difference"]
        interval = [difference["low"], difference["high"]]
        assert list(dot.get_xdata()) == [difference["mean"]] and low < difference["mean"] < high
        hollow = dot.get_markerfacecolor() != dot.get_color()
        if regime == "self":
            assert hollow and interval == [None, None] and not ends and not bars
        else:
            assert not hollow and low < interval[0] < interval[1] < high
            assert [end.get_xdata()[0] for end in ends] == pytest.approx(interval)
            assert [x for x, _ in bars[0].get_segments()[0]] == pytest.approx(interval)
    assert len({(dot.get_marker(), dot.get_color()) for dot, *_ in axes.containers}) == 3


def test_the_same_numbers_are_the_same_bytes(compared: Path, results: Path, tmp_path: Path) -> None:
    names = [f"{regime}={results / regime / str(seed)}" for regime, seeds in SEEDS.items() for seed in seeds]
    compare_here(tmp_path, *names)
    for file in sorted(compared.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("module", ["glue.compare", "train.explore"])
def test_help_does_not_wait_for_what_draws(module: str) -> None:
    lines = [
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import {module}",
        f"try: {module}.main(['--help'])",
        "except SystemExit: print('matplotlib' in sys.modules)",
    ]
    assert run(sys.executable, "-c", "\n".join(lines)).endswith("False\n")


def test_the_training_of_the_teacher_is_shown_with_and_without(results: Path, tmp_path: Path) -> None:
    names = [f"{name}={results / name / '2'}" for name in ("random", "parquet")]
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "summary.json").write_text(json.dumps({"training_flops": 5e11, "scoring_flops": 0}))
    bills = compare_here(tmp_path / "out", *names, "--teacher", tmp_path / "teacher")["training"]
    assert bills["parquet"]["total_flops"] == 3.7e10 and bills["parquet"]["with_teacher_flops"] == 5.37e11
    assert bills["random"]["total_flops"] == bills["random"]["with_teacher_flops"] == 3e10
    assert "| 37.0 G | 537 G |" in (tmp_path / "out" / "table.md").read_text()
    for directory in (tmp_path / "nothing", results):
        with pytest.raises(UsageError, match=r"has no summary.json with the costs of its training"):
            compare_here(tmp_path / "out", *names, "--teacher", directory)


def test_names_are_text_and_the_baseline_is_a_choice(results: Path, tmp_path: Path) -> None:
    """Several directories by commas are as the name several times."""
    several = ",".join(str(results / "parquet" / str(seed)) for seed in SEEDS["parquet"])
    first = [f"<b>a & b</b>={several}", f"random={results / 'random' / '2'}", f"random={results / 'random' / '3'}"]
    first += [f"_$x_1$ #0072b2={results / 'self' / '4'}"]
    table = compare_here(tmp_path, *first, "--baseline", "random")
    assert table["averages"]["local6"]["<b>a & b</b>"]["difference"]["n"] == 2
    text = (tmp_path / "page.html").read_text()
    assert "<b>a & b</b>" not in text and "<b>a & b</b>" in Page(text).text
    assert len(svgs(text)) == 1 + 7 + 1 + 1 + 3
    for svg in svgs(text)[1:]:
        assert {"<b>a & b</b>", "_$x_1$ #0072b2"} <= {name for word in words(svg) for name in word.split(", ")}


def test_models_that_nobody_here_pretrained(tmp_path: Path) -> None:
    """All nine tasks; costs and curves are left out, not made up."""
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
    assert (tmp_path / "out" / "chart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    one = compare_here(tmp_path / "one", f"a={tmp_path / 'a'}")
    assert one["regimes"] == ["a"] and "Difference" not in (tmp_path / "one" / "table.md").read_text()


def test_summaries_of_older_programs(tmp_path: Path) -> None:
    """Without FLOPs, curve or the shards' bills: what is known is shown."""
    kept = ("regime", "steps", "tokens", "seconds", "tokens_per_second", "eval_loss", "scoring_seconds", "seed")
    for name in ("random", "parquet"):
        old = {key: value for key, value in summary(name, 1).items() if key in kept}
        write_results(tmp_path / name, {"rte": {1: 0.6}}, old | {"history": "none", "shards": None})
    table = compare_here(tmp_path / "out", *(f"{name}={tmp_path / name}" for name in ("random", "parquet")))
    assert table["training"]["parquet"]["scoring_seconds"] == 70 and table["training"]["parquet"]["total_flops"] is None
    assert len(svgs((tmp_path / "out" / "page.html").read_text())) == 1 + 1


def test_curves_that_may_be_compared_are_drawn_where_they_are(tmp_path: Path) -> None:
    for name in ("random", "self"):
        for seed in (1, 2):
            history = [{"step": step, "seconds": step * 1.5, "loss": 5.0, "eval_loss": 9 / step} for step in (1, 2, 3)]
            training = summary(name, seed, history=history)
            write_results(tmp_path / name / str(seed), {"rte": {1: 0.6}}, training)
    names = [f"{name}={tmp_path / name / seed}" for name in ("random", "self") for seed in "12"]
    compare_here(tmp_path / "out", *names)
    text = (tmp_path / "out" / "page.html").read_text()
    assert "held-out loss at equal seconds" in text and "scoring included" not in text
    assert "rte not told apart from random: self +0.0 (all alike), n = 2" in Page(text).text
    (axes,) = curves(tmp_path, "at equal seconds", random="random", self="self").axes
    assert sorted(line.get_alpha() or 1 for line in axes.lines) == [0.35] * 4 + [1, 1], "seeds are faint, means are not"
    for line in axes.lines:
        assert list(zip(*line.get_data(), strict=True)) == [(step * 1.5, 9 / step) for step in (1, 2, 3)]


def curves(root: Path, panel: str, **regimes: str) -> Any:
    """The figure of curves of the comparison in ``root``/out; summaries are read from each regime's results."""
    table = json.loads((root / "out" / "table.json").read_text())
    files = {name: (root / each).rglob("rte-seed1.json") for name, each in regimes.items()}
    summaries = {
        name: [Summary(**json.loads(file.read_text())["training"]) for file in each] for name, each in files.items()
    }
    return next(figure for heading, figure in report.curves(table, summaries).items() if panel in heading)


def test_curves_of_a_longer_run_begin_where_the_others_do(tmp_path: Path) -> None:
    """They share an axis by decades, and what is left out is a fifth of the shortest."""
    for name, last in (("random", 100), ("longer", 2000)):
        history = [
            {"step": step, "seconds": step * 1.5, "loss": 5.0, "eval_loss": 5.0}
            for step in range(last // 100, last + 1, last // 100)
        ]
        write_results(tmp_path / name, {"rte": {1: 0.6}}, summary("random", 1, steps=last, history=history))
    compare_here(tmp_path / "out", *(f"{name}={tmp_path / name}" for name in ("random", "longer")))
    (axes,) = curves(tmp_path, "at equal steps", random="random", longer="longer").axes
    steps = [list(line.get_xdata()) for line in axes.lines]
    assert [len(each) for each in steps] == [81, 100] and axes.get_xscale() == "log"
    assert steps[0][0] == steps[1][0] == 20, "both from step 20"
    low, high = axes.get_xlim()
    assert low < 20 and high > 2000


def test_losses_on_other_text_are_not_compared(tmp_path: Path) -> None:
    """Held-out shards are the same if the tokens are, scored or not; or text of its own is."""
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
        assert ("eval loss" in table["not_computed"]) == (not same), "said, not dropped"


def test_an_average_takes_the_seeds_of_its_own_tasks(tmp_path: Path) -> None:
    scores = {task: {1: 0.5, 2: 0.6} for task in GLUE} | {"wnli": {1: 0.5}}
    write_results(tmp_path / "a", scores, None)
    averages = compare_here(tmp_path / "out", f"a={tmp_path / 'a'}")["averages"]
    assert [averages[name]["a"]["fine_tuning_seeds"] for name in ("glue8", "leaderboard9")] == [2, 1]
    assert averages["glue8"]["a"]["fine_tuning_sd"] == pytest.approx(statistics.stdev([50, 60]))
    assert "| 1 (anecdote) | 1 to 2 |" in (tmp_path / "out" / "table.md").read_text()
    write_results(tmp_path / "b", {task: {1 + (task == "rte"): 0.5} for task in GLUE}, None)
    with pytest.raises(UsageError, match="glue8 needs a seed that all of its tasks share; run what is missing"):
        compare_here(tmp_path / "out", f"b={tmp_path / 'b'}", "--average", "glue8")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"task": "sst3"},
        {"metrics": {"accuracy": 0.5}},
        {"metrics": {"accuracy": 0.5, "f1": None}},
        {"score": None},
        {"train_rows": ...},
        {"training": ...},
        {"training": {"seed": "one"}},
    ],
)
def test_half_a_result(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_results(tmp_path / "a", {"mrpc": {1: 0.5}}, None) / "mrpc-seed1.json"
    result = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in result.items() if value is not ...}))
    with pytest.raises(UsageError, match=r"mrpc-seed1.json is not a result of this glue/run.py"):
        compare_here(tmp_path / "out", f"a={tmp_path / 'a'}")


def test_a_name_has_one_line(tmp_path: Path) -> None:
    write_results(tmp_path / "a", {"rte": {1: 0.5}}, None)
    with pytest.raises(UsageError, match=r"is not NAME=DIR"):
        compare_here(tmp_path / "out", f"a\nb={tmp_path / 'a'}")


def test_what_cannot_be_compared(results: Path, tmp_path: Path) -> None:
    """Each is one sentence with the thing and the mend, exit code 2."""
    two = {"cola": {1: 0.5, 2: 0.5}, "rte": {1: 0.5, 2: 0.5}}

    def case(name: str, scores: dict[str, dict[int, float]] = two, training: Any = None, **key: Any) -> str:
        return f"{name.split('/')[0]}={write_results(tmp_path / name, scores, training, **key)}"

    one = case("one")
    other = summary("parquet", 2)
    other["flags"]["learning_rate"] = 2e-3
    mixed = case("mixed")
    path = tmp_path / "mixed" / "cola-seed2.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"key": {**result["key"], "model_hash": "x"}}))
    epochs = {"settings": {"1": {"learning_rate": 4e-5, "epochs": 6}}}
    seeded = case("seeded/1", training=summary("parquet", 1))
    taught = case("taught/1", training=summary("parquet+kd", 1))
    fewer = summary("parquet+kd", 2)["targets"] | {"variants": 1}
    cases: list[tuple[list[str], str]] = [
        ([one, "--average", "local6"], "the average local6 needs sst2, mrpc, stsb, qnli; run what is missing"),
        ([one, case("tasks", {"cola": two["cola"]})], "one has the task rte, but tasks does not"),
        ([one, case("seeds", {task: {3: 0.5} for task in two})], "cola has seeds 1, 2 in one but 3 in seeds"),
        (
            [one, case("epochs", **epochs)],
            r"cola was fine-tuned differently in one and epochs \(settings.1.epochs: 5 → 6\)",
        ),
        ([one, case("data", data_hash="x")], "fine-tuned differently in one and data"),
        ([mixed], "results of 2 models"),
        ([f"none={tmp_path / 'nothing'}"], "holds no results"),
        ([str(results)], "is not NAME=DIR"),
        (["a=b,"], "is not NAME=DIR"),
        ([one, "--baseline", "two"], "--baseline two is not one of the regimes one"),
        ([one, case("one/again")], "does not say how its model was pretrained"),
        ([seeded, case("seeded/2", training=summary("parquet", 1))], "are both of pretraining seed 1"),
        ([seeded, case("seeded/3", training=other)], r"pretrained differently \(learning_rate: 0.001 → 0.002\)"),
        (
            [seeded, case("seeded/5", training=summary("parquet", 2, training_flops=10**15))],
            r"pretrained differently \(training_flops: 30000000000 → 1000000000000000\)",
        ),
        (
            [taught, case("taught/2", training=summary("parquet+kd", 2) | {"targets": fewer})],
            r"pretrained differently \(targets.variants: 4 → 1\)",
        ),
        (
            [seeded, case("seeded/4", {"cola": two["cola"], "rte": {1: 0.5}}, summary("parquet", 3))],
            "rte has seeds 1, 2 in .*seeded/1 but 1 in .*seeded/4; run the same",
        ),
    ]
    for arguments, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            compare_here(tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    assert "fine-tuned differently" in refused(*COMPARE, one, f"epochs={tmp_path / 'epochs'}", "--output", tmp_path)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (390, False), (1100, True), (1100, False)])
def test_the_page_in_a_browser(browser: Browser, compared: Path, width: int, dark: bool) -> None:
    browser.open_alone(compared / "page.html", width, dark)
    table = json.loads((compared / "table.json").read_text())
    text = browser.js("document.body.innerText")
    difference = table["averages"]["local6"]["parquet"]["difference"]
    shown = f"{difference['mean']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}], n = 3"
    assert shown in text.replace("−", "-"), "what is found, with its interval and its n"
    assert re.search(r"Anecdotes, of one pretraining seed each: self [+-−][\d.]+[^;]*\.", text)
    sizes = browser.js("[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().toJSON())")
    assert len(sizes) >= 5
    assert all(size["width"] > 250 and size["height"] > 80 and size["right"] <= width for size in sizes)
    # in every plot words are as large as on the page, nearly, whatever its width
    letters = browser.js(
        "[...document.querySelectorAll('figure svg')].flatMap(svg => [...svg.querySelectorAll('text')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * svg.getScreenCTM().a))"
    )
    assert min(letters) >= 9
    tables = browser.js("[...document.querySelectorAll('table')].map(table => table.innerText)")
    (scores,) = (each for each in tables if each.startswith("cramming"))
    (own,) = (line.split("\t") for line in scores.splitlines() if line.startswith("random\t"))
    assert f"{table['averages']['local6']['random']['mean']:.1f} ±" in own[1] and own[-2:] == ["5", "10"]
