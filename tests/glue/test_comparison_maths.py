"""What a comparison is computed with: intervals against scipy, costs by hand, axes of figures."""

import statistics
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from made_results import LENGTH, SEQUENCES, TOKENS, summary
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

from entropy_masking.commands import figures
from entropy_masking.commands.figures import Line, Row
from entropy_masking.summary import Summary
from glue import costs
from glue.intervals import estimate, paired_difference
from glue.tables import amount, verdict

# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_an_estimate_is_that_of_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(70, 3, n)
    found, expected = estimate(values.tolist()), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.sd, found.n) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)), n)


def test_one_value_has_no_interval_and_none_no_estimate() -> None:
    found = estimate([3.0])
    assert (found.mean, found.sd, found.low, found.high, found.n) == (3.0, None, None, None, 1)
    with pytest.raises(ValueError, match="needs a value"):
        estimate([])


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_paired_difference_is_that_of_scipy(n: int) -> None:
    """Fine-tuning seeds averaged first; what only one side has is left out."""
    rng = np.random.default_rng(n)
    one = {seed: {each: rng.normal(70, 3) for each in (1, 2, 3)} for seed in range(n + 2)}
    two = {seed: {each: rng.normal(71, 3) for each in (2, 3, 9)} for seed in range(2, n + 4)}
    shared = range(2, n + 2)
    means = [[statistics.fmean(side[seed][each] for each in (2, 3)) for seed in shared] for side in (one, two)]
    found, expected = paired_difference(one, two), stats.ttest_rel(*means).confidence_interval(0.95)
    assert found and (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.n == n


def test_what_shares_no_seed_has_no_difference() -> None:
    assert paired_difference({1: {1: 70.0}}, {2: {1: 71.0}}) is None
    assert paired_difference({1: {1: 70.0}}, {1: {2: 71.0}}) is None


def test_what_is_all_alike_has_no_interval() -> None:
    """Also where only rounding tells: one row of 277 more, in each of three pairs."""
    counts = {1: 150, 2: 147, 3: 161}
    one, two = ({seed: {1: 100 * (count + more) / 277} for seed, count in counts.items()} for more in (3, 0))
    found = paired_difference(one, two)
    assert found and found.mean == pytest.approx(300 / 277) and found.n == 3
    assert (found.sd, found.low, found.high) == (0.0, None, None)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [estimate(values) for values in rng.normal(1.0, 2.0, (4000, 3)).tolist()]
    covered = np.mean([low <= 1.0 <= high for low, high in ((each.low, each.high) for each in found)])
    assert covered == pytest.approx(0.95, abs=0.015)


# --- costs -----------------------------------------------------------------------------------------------------------


def test_break_even_by_hand() -> None:
    assert costs.break_even(once=700.0, extra=1.0) == 700
    assert costs.break_even(once=700.0, extra=0.0) is None and costs.break_even(once=700.0, extra=-1.0) is None
    assert costs.break_even(once=0.0, extra=1.0) == 0


def cost(*summaries: dict[str, Any]) -> dict[str, Any] | None:
    return costs.cost([Summary(**each) for each in summaries])


def test_the_cost_of_a_student() -> None:
    found = cost(summary("parquet", 1), summary("parquet", 3))
    assert found and found["total_flops"] == 3e10 + 7e9 and found["seconds"] == 102 and found["total_seconds"] == 172
    assert found["corpus_tokens"] == SEQUENCES * LENGTH and found["bytes"] == 1 << 20
    assert found["online_flops"] == 7e9 / (SEQUENCES * LENGTH), "seven passes, to rank a row"
    exact = cost(summary("parquet+kd", 1))
    assert exact and exact["online_flops"] == 8e9 / (SEQUENCES * LENGTH), "and one of four variants"
    scan = cost(summary("self", 1) | {"regime": "self+kd", "scoring_flops": 7_000_000_000})
    assert scan and scan["online_flops"] == 1e9 / (SEQUENCES * LENGTH), "one pass, to distil"
    kept = cost(summary("parquet+kd", 1) | {"targets": None})
    assert kept and kept["online_flops"] == 7e9 / (SEQUENCES * LENGTH), "the passes that rank a row have its top-k too"
    assert exact["bytes"] == (1 << 20) + (1 << 19)
    alone = cost(summary("random", 1))
    assert alone and alone["online_flops"] is None and alone["total_flops"] == alone["training_flops"]
    assert costs.cost([]) is None
    old = cost({"regime": "parquet", "steps": 3, "scoring_flops": 7})
    assert old and old["steps"] == 3 and old["total_flops"] is None and old["bytes"] is None


def test_when_offline_scores_pay() -> None:
    known = {name: cost(summary(name, 1)) for name in ("random", "parquet", "parquet+kd", "self")}
    rows = {(row["regime"], row["against"]): row for row in costs.break_evens(known)}
    assert set(rows) == {("parquet", costs.ONLINE), ("parquet", "self"), ("parquet+kd", costs.ONLINE)}
    online = rows["parquet", costs.ONLINE]["flops"]
    assert online["epochs"] == pytest.approx(1), "each epoch would cost as much"
    assert online["students"] == pytest.approx(1 / 4), "each of four epochs"
    exact = rows["parquet+kd", costs.ONLINE]["flops"]
    assert exact["epochs"] == pytest.approx(11 / 8), "seven passes and four variants; seven and one at each epoch"
    assert rows["parquet", "self"]["flops"]["students"] == pytest.approx(0.7)
    assert rows["parquet", "self"]["flops"]["tokens"] == pytest.approx(0.7 * TOKENS)
    assert rows["parquet", "self"]["seconds"]["tokens"] is None, "self-masking took no longer"


# --- figures ---------------------------------------------------------------------------------------------------------


def ticks(figure: Any) -> list[Any]:
    """Where the labels of the horizontal axis are, in pixels, from left to right."""
    FigureCanvasAgg(figure).draw()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return sorted((label.get_window_extent() for label in shown if label.get_text()), key=lambda box: box.x0)


def apart(boxes: list[Any], room: float) -> bool:
    return all(left.x1 + room <= right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 2), (0, 100), (3.9, 4.1), (1e9, 3e12), (52, 52.5)])
def test_ticks_are_few_and_have_room(low: float, high: float) -> None:
    found = ticks(figures.lines([Line(0, "a", [(low, 1), (high, 2)])], "x", "y"))
    assert 2 <= len(found) <= 10 and apart(found, 4)
    rows = [Row(0, "a", low, None, None, ""), Row(1, "b", high, None, None, "")]
    found = ticks(figures.intervals(rows, low))
    assert 2 <= len(found) <= 7 and apart(found, 4)


@pytest.mark.parametrize("low, high", [(400, 9900), (6e9, 6e13), (1, 64), (9e12, 6e13), (1, 3), (1e-3, 1), (52, 53)])
def test_ticks_of_an_axis_by_decades_have_room(low: float, high: float) -> None:
    found = ticks(figures.lines([Line(0, "a", [(low, 1), (high, 2)])], "x", "y", log=True))
    assert 1 <= len(found) <= 7 and apart(found, 4)


def test_an_interval_that_is_too_wide_leaves_the_figure() -> None:
    """It has no end there, and the others can be seen."""
    rows = [Row(0, "a", 1.0, 0.0, 2.0, ""), Row(1, "b", 2.0, -60.0, 64.0, "")]
    (axes,) = figures.intervals(rows, 0.0).axes
    low, high = axes.get_xlim()
    (_, ends, narrow), (_, beyond, wide) = axes.containers
    assert [x for x, _ in narrow[0].get_segments()[0]] == [0, 2] and (high - low) / 3 < 2
    assert all(low < end.get_xdata()[0] < high for end in ends)
    assert [x for x, _ in wide[0].get_segments()[0]] == [-60, 64] and wide[0].get_clip_on()
    assert all(not low < end.get_xdata()[0] < high and end.get_clip_on() for end in beyond)


def test_numbers_for_people() -> None:
    amounts = [amount(value) for value in (None, 0, 5, 999.4, 999.6, 1234, 4.1e10, 7.5e26)]
    assert amounts == ["-", "0", "5.00", "999", "1.00 k", "1.23 k", "41.0 G", "750 Y"]
    assert amount(512_000, exact=True) == "512,000"


@pytest.mark.parametrize("length", [3, 20, 70])
def test_names_of_curves_keep_their_order_and_a_distance(length: int) -> None:
    names = [f"{number:02} {'word ' * (length // 5)}".strip() for number in range(12)]
    curves = [Line(number, name, [(0, number), (1, number / 2)]) for number, name in enumerate(names)]
    figure = figures.lines(curves, "x", "y")
    FigureCanvasAgg(figure).draw()
    texts = figure.legends[0].get_texts()
    assert [text.get_text().replace("\n", " ") for text in texts] == names
    boxes = [text.get_window_extent() for text in texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes), "within the figure"
    assert all(box.y1 <= figure.axes[0].bbox.y0 for box in boxes), "below the axes"
    assert not any(one.overlaps(two) for number, one in enumerate(boxes) for two in boxes[:number])
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == len(names), "no two look alike"


def test_what_costs_next_to_nothing_leaves_room_for_the_rest() -> None:
    costs = {"a": 1e9, "b": 1e13, "c": 5e13}
    rows = [Row(style, name, style, None, None, "") for style, name in enumerate(costs)]
    figure = figures.scatter(rows, [(cost, cost) for cost in costs.values()], "FLOPs", "local6")
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    places = [
        axes.transAxes.inverted().transform(axes.transData.transform(line.get_xydata()[0]))
        for line, *_ in axes.containers
    ]
    across, up = zip(*places, strict=True)
    assert 0 <= across[0] < across[1] and across[2] - across[1] > 1 / 3
    assert list(up) == sorted(up) and [text.get_text() for text in figure.legends[0].get_texts()] == list(costs)


def test_a_figure_is_the_same_bytes_each_time_and_takes_the_colours_of_the_page() -> None:
    one, two = (figures.svg(figures.lines([Line(0, "a", [(1, 2), (3, 4)])], "x", "y"), "a line") for _ in range(2))
    assert one == two and "var(--c0)" in one and ": #" not in one


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ({}, ""),
        ({"a": (1.24, 0.3, 2.1, 3)}, "On rte, a is 1.2 [0.3, 2.1] percentage points above random (n = 3)."),
        ({"a": (-1.2, -2.1, -0.3, 4)}, "On rte, a is 1.2 [0.3, 2.1] percentage points below random (n = 4)."),
        ({"a": (0.2, -0.3, 0.7, 3)}, "On rte, a is not told apart from random."),
        ({"a": (0.2, -0.3, 0.7, 3), "b": (0.0, None, None, 2)}, "On rte, a and b are not told apart from random."),
        ({"a": (4.0, None, None, 2)}, "On rte, a differs from random by +4.0 percentage points in every seed."),
        (
            {"a": (1.0, 0.5, 1.5, 2), "b": (0.2, -0.3, 0.7, 2), "c": (0.2, -0.3, 0.7, 2)},
            "On rte, a is 1.0 [0.5, 1.5] percentage points above random (n = 2); b and c are not told "
            "apart from random.",
        ),
        (
            {"a": (1.23, None, None, 1), "b": (-0.4, None, None, 1), "c": None},
            "On rte, c is not compared: no pretraining seed in common with random; a +1.2 and b -0.4 percentage points "
            "against random, with one pretraining seed (an anecdote).",
        ),
    ],
)
def test_the_verdict(differences: dict[str, tuple[float, ...] | None], sentence: str) -> None:
    names = ("mean", "low", "high", "n")
    row = {name: {"difference": d and dict(zip(names, d, strict=True))} for name, d in differences.items()}
    tasks = {"rte": {"scores": row}}
    assert verdict({"averages": {}, "tasks": tasks, "baseline": "random", "set_apart": differences}) == sentence
