"""The page of glue/compare.py: it stands alone, and its figures show the numbers of the tables."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needs_browser
from html_page import Page, svgs, words
from made_results import SEEDS, compare_here, summary, write_results

from entropy_masking.summary import Summary
from glue import report


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
        assert f"held-out loss {panel}" in page.text
    # differences; an average and six tasks; quality against cost; break-even; curves
    figures = svgs(text)
    assert len(figures) == 1 + 7 + 1 + 1 + 3
    for name, svg in zip(table["averages"] | table["tasks"], figures[1:], strict=False):
        row = (table["averages"] | {task: row["scores"] for task, row in table["tasks"].items()})[name]
        for regime in SEEDS:
            at = words(svg).index(regime)
            assert words(svg)[at + 1].startswith(f"{row[regime]['mean']:.1f}"), "its value beside its name"
            assert words(svg)[at + 1].endswith(f"n = {len(SEEDS[regime])}")
    for svg in figures[8:]:
        drawn = {regime for regime in SEEDS for word in words(svg) if regime in re.split("[,;] ", word)}
        assert drawn == SEEDS.keys(), "every legend names every regime"
    for svg in figures:
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


def test_a_name_may_hold_any_characters(results: Path, tmp_path: Path) -> None:
    """A name with several directories, separated by commas, is the same as the name several times."""
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


def test_intervals_are_drawn_where_the_table_has_them(compared: Path) -> None:
    """A difference has two ends and a filled dot; without an interval it is a hollow dot."""
    table = json.loads((compared / "table.json").read_text())
    (axes,) = report.differences(table)["local6, percentage points"].axes
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


def curves(root: Path, panel: str, **regimes: str) -> Any:
    """The figure of curves of the comparison in ``root``/out. The directories hold the results of each regime."""
    table = json.loads((root / "out" / "table.json").read_text())
    files = {name: (root / directory).rglob("rte-seed1.json") for name, directory in regimes.items()}
    summaries = {
        name: [Summary(**json.loads(file.read_text())["training"]) for file in paths] for name, paths in files.items()
    }
    return next(figure for heading, figure in report.curves(table, summaries).items() if panel in heading)


def test_curves_show_the_losses_of_every_seed_and_their_means(tmp_path: Path) -> None:
    for name in ("random", "self"):
        for seed in (1, 2):
            history = [{"step": step, "seconds": step * 1.5, "loss": 5.0, "eval_loss": 9 / step} for step in (1, 2, 3)]
            training = summary(name, seed, history=history, warnings=["the masks are odd"] if name == "self" else [])
            write_results(tmp_path / name / str(seed), {"rte": {1: 0.6}}, training)
    names = [f"{name}={tmp_path / name / seed}" for name in ("random", "self") for seed in "12"]
    compare_here(tmp_path / "out", *names)
    text = (tmp_path / "out" / "page.html").read_text()
    assert "held-out loss at equal seconds" in text and "scoring included" not in text
    assert "On rte, self is not told apart from random." in Page(text).text
    assert "Warning of self, seed 2: the masks are odd." in Page(text).text and "Warning of random" not in text
    (axes,) = curves(tmp_path, "at equal seconds", random="random", self="self").axes
    assert sorted(line.get_alpha() or 1 for line in axes.lines) == [0.35] * 4 + [1, 1], "seeds are faint, means are not"
    for line in axes.lines:
        assert list(zip(*line.get_data(), strict=True)) == [(step * 1.5, 9 / step) for step in (1, 2, 3)]
    untrained = write_results(tmp_path / "untrained", {"rte": {1: 0.6}}, summary("random", 1, history=[]))
    compare_here(tmp_path / "more", *names, f"untrained={untrained}")
    assert "held-out loss at equal seconds" in (tmp_path / "more" / "page.html").read_text(), "it has no curve"


def test_curves_of_a_longer_run_begin_where_the_others_do(tmp_path: Path) -> None:
    """The axis is logarithmic. Of all curves the first fifth of the shortest is left out."""
    for name, last in (("random", 100), ("longer", 2000)):
        history = [
            {"step": step, "seconds": step * 1.5, "loss": 5.0, "eval_loss": 5.0}
            for step in range(last // 100, last + 1, last // 100)
        ]
        write_results(tmp_path / name, {"rte": {1: 0.6}}, summary("random", 1, steps=last, history=history))
    compare_here(tmp_path / "out", *(f"{name}={tmp_path / name}" for name in ("random", "longer")))
    (axes,) = curves(tmp_path, "at equal steps", random="random", longer="longer").axes
    steps = [list(line.get_xdata()) for line in axes.lines]
    assert [len(curve) for curve in steps] == [81, 100] and axes.get_xscale() == "log"
    assert steps[0][0] == steps[1][0] == 20, "both from step 20"
    low, high = axes.get_xlim()
    assert low < 20 and high > 2000


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (390, False), (1100, True), (1100, False)])
def test_the_page_in_a_browser(browser: Browser, compared: Path, width: int, dark: bool) -> None:
    browser.open_alone(compared / "page.html", width, dark)
    table = json.loads((compared / "table.json").read_text())
    text = browser.js("document.body.innerText")
    difference = table["averages"]["local6"]["parquet"]["difference"]
    shown = f"{difference['mean']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}], n = 3"
    assert shown in text.replace("−", "-"), "the difference, with its interval and its n"
    assert re.search(
        r"self [+-][\d.]+ percentage points against random, with one pretraining seed \(an anecdote\)\.", text
    )
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
    (scores,) = (text for text in tables if text.startswith("cramming"))
    (own,) = (line.split("\t") for line in scores.splitlines() if line.startswith("random\t"))
    assert f"{table['averages']['local6']['random']['mean']:.1f} ±" in own[1] and own[-2:] == ["5", "10"]
