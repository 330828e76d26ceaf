"""What a comparison is computed with: intervals against scipy, costs by hand, axes of plots."""

from __future__ import annotations

import statistics
from xml.etree import ElementTree

import numpy as np
import pytest
from made_results import LENGTH, SEQUENCES, TOKENS, summary
from scipy import stats

from glue import costs, plots
from glue.intervals import estimate, paired_difference, seed_means
from glue.tables import amount

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
    assert seed_means(one)[0] == pytest.approx(statistics.fmean(one[0].values()))


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


def test_the_bill_of_a_student() -> None:
    bill = costs.cost([summary("parquet", 1), summary("parquet", 3)])
    assert bill and bill["total_flops"] == 3e10 + 7e9 and bill["seconds"] == 102 and bill["total_seconds"] == 172
    assert bill["corpus_tokens"] == SEQUENCES * LENGTH and bill["bytes"] == 1 << 20
    assert bill["online_flops"] == 7e9 / (SEQUENCES * LENGTH), "seven passes, to rank a row"
    exact = costs.cost([summary("parquet+kd", 1)])
    assert exact and exact["online_flops"] == 8e9 / (SEQUENCES * LENGTH), "and one of four variants"
    scan = costs.cost([summary("self", 1) | {"regime": "self+kd", "scoring_flops": 7_000_000_000}])
    assert scan and scan["online_flops"] == 1e9 / (SEQUENCES * LENGTH), "one pass, to distil"
    kept = costs.cost([summary("parquet+kd", 1) | {"targets": None}])
    assert kept and kept["online_flops"] == 7e9 / (SEQUENCES * LENGTH), "the passes that rank a row have its top-k too"
    assert exact["bytes"] == (1 << 20) + (1 << 19)
    alone = costs.cost([summary("random", 1)])
    assert alone and alone["online_flops"] is None and alone["total_flops"] == alone["training_flops"]
    assert costs.cost([]) is None
    old = costs.cost([{"regime": "parquet", "steps": 3, "scoring_flops": 7}])
    assert old and old["steps"] == 3 and old["total_flops"] is None and old["bytes"] is None


def test_when_offline_scores_pay() -> None:
    bills = {name: costs.cost([summary(name, 1)]) for name in ("random", "parquet", "parquet+kd", "self")}
    rows = {(row["regime"], row["against"]): row for row in costs.break_evens(bills)}
    assert set(rows) == {("parquet", costs.ONLINE), ("parquet", "self"), ("parquet+kd", costs.ONLINE)}
    online = rows["parquet", costs.ONLINE]["flops"]
    assert online["epochs"] == pytest.approx(1), "each epoch would cost as much"
    assert online["students"] == pytest.approx(1 / 4), "each of four epochs"
    exact = rows["parquet+kd", costs.ONLINE]["flops"]
    assert exact["epochs"] == pytest.approx(11 / 8), "seven passes and four variants; seven and one at each epoch"
    assert rows["parquet", "self"]["flops"]["students"] == pytest.approx(0.7)
    assert rows["parquet", "self"]["flops"]["tokens"] == pytest.approx(0.7 * TOKENS)
    assert rows["parquet", "self"]["seconds"]["tokens"] is None, "self-masking took no longer"


# --- plots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 2), (0, 100), (3.9, 4.1), (1e9, 3e12), (52, 52.5)])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_within_and_few(low: float, high: float, log: bool) -> None:
    axis = plots.axis([low, high], 0, 100, log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 7 and all(-0.1 <= axis(tick) <= 100.1 for tick in ticks)
    assert axis(high) > axis(max(low, 1e-3 if log and low <= 0 else low)) - 1e-9


def test_an_interval_that_is_too_wide_leaves_the_plot() -> None:
    """It has no end there, and the others are seen."""
    rows = [plots.Row(0, "a", 1.0, 0.0, 2.0, ""), plots.Row(1, "b", 2.0, -60.0, 64.0, "")]
    svg = ElementTree.fromstring(plots.forest(rows))
    narrow, wide = ([line.attrib for line in group.findall("line")] for group in svg.findall("g"))
    assert len(narrow) == 3 and float(narrow[0]["x2"]) - float(narrow[0]["x1"]) > plots.WIDTH / 3
    assert len(wide) == 1 and (float(wide[0]["x1"]), float(wide[0]["x2"])) == (8, plots.WIDTH - 12)


def test_numbers_for_people() -> None:
    amounts = [amount(value) for value in (None, 0, 5, 999.4, 999.6, 1234, 4.1e10, 7.5e26)]
    assert amounts == ["-", "0", "5.00", "999", "1.00 k", "1.23 k", "41.0 G", "750 Y"]
    assert amount(512_000, exact=True) == "512,000"


def test_labels_keep_their_order_and_a_distance() -> None:
    heights = sorted(np.random.default_rng(0).uniform(60, 218, 12).tolist())
    found = plots._apart(heights)
    assert (np.diff(found) >= plots.LINE - 1e-9).all()
    assert found[-1] < plots.BOTTOM and plots._apart([50.0, 100.0]) == [50.0, 100.0]
    assert plots._apart([100.0, 101.0]) == [95.0, 106.0]
    assert plots._apart([6.0] * 3)[0] > plots.LINE / 2, "below the top"
    assert plots._apart([50.0, *[plots.BOTTOM - 1] * 3])[0] == 50.0, "the axis pushes up those above it, and no other"


def test_ticks_of_an_axis_by_decades_have_room() -> None:
    for low, high in ((400, 9900), (6e9, 6e13), (1, 64), (9e12, 6e13), (1, 3)):
        axis = plots.axis([low, high], plots.LEFT, plots.RIGHT, log=True, margin=0)
        assert min(np.diff([axis(tick) for tick in axis.ticks()])) > 35, (low, high)


def test_what_costs_next_to_nothing_leaves_room_for_the_rest() -> None:
    costs = {"a": 1e9, "b": 1e13, "c": 5e13}
    points = [
        plots.Point(plots.Row(style, name, style, None, None, ""), cost, cost)
        for style, (name, cost) in enumerate(costs.items())
    ]
    svg = ElementTree.fromstring(plots.scatter(points, "FLOPs", "local6", str))
    places = [float(circle.attrib["cx"]) for circle in svg.iter("circle")]
    assert places[0] < places[1] and places[2] - places[1] > plots.WIDTH / 3
    assert [text.text for text in svg.iter("text") if "number" in text.attrib["class"]] == ["3", "2", "1"]
