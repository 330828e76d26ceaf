"""Metrics against their definitions in plain Python; named averages against published rows."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from glue.metrics import (
    AVERAGES,
    IncompleteAverage,
    average,
    averages_by_seed,
    collapsed,
    constant_score,
    evaluate,
    score,
)
from glue.tasks import TASKS


def slow_counts(labels: list[int], predictions: list[int]) -> tuple[int, int, int, int]:
    pairs = list(zip(labels, predictions, strict=True))
    return tuple(sum(pair == kind for pair in pairs) for kind in ((1, 1), (0, 1), (1, 0), (0, 0)))  # type: ignore


def test_classification_metrics() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels, predictions = rng.integers(0, 2, 30), rng.integers(0, 2, 30)
        tp, fp, fn, tn = slow_counts(labels.tolist(), predictions.tolist())
        found = evaluate(("accuracy", "f1", "matthews"), labels, predictions)
        assert found["accuracy"] == pytest.approx((tp + tn) / 30)
        assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
        matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert found["matthews"] == pytest.approx(matthews)


def test_correlations() -> None:
    rng = np.random.default_rng(1)
    labels, predictions = rng.normal(size=40), rng.normal(size=40).round(1)
    found = evaluate(("pearson", "spearman"), labels, predictions)
    assert found["pearson"] == pytest.approx(np.corrcoef(labels, predictions)[0, 1])
    ranks = [[np.mean([i for i, w in enumerate(sorted(v)) if w == x]) for x in v] for v in (labels, predictions)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert evaluate(("pearson", "spearman"), labels, -3 * labels + 1) == pytest.approx({"pearson": -1, "spearman": -1})
    assert evaluate(("pearson", "spearman"), labels, np.ones(40)) == {"pearson": 0, "spearman": 0}


@pytest.mark.parametrize("kind", ["random", "one class", "the other", "all right", "all wrong", "one label"])
def test_classification_is_scikit_learns(kind: str) -> None:
    rng = np.random.default_rng(2)
    labels, predictions = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    if kind == "one label":
        labels = np.zeros(200, np.int64)
    changed = {"one class": 0 * labels, "the other": 0 * labels + 1, "all right": labels, "all wrong": 1 - labels}
    predictions = changed.get(kind, predictions)
    assert evaluate(("accuracy", "f1", "matthews"), labels, predictions) == {
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(labels, predictions)),
        "f1": pytest.approx(sklearn.metrics.f1_score(labels, predictions, zero_division=0)),
        "matthews": pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predictions)),
    }
    if kind in ("one class", "the other"):
        assert collapsed(predictions) and evaluate(("matthews",), labels, predictions) == {"matthews": 0}


@pytest.mark.parametrize("ties", [False, True])
def test_correlation_is_scipys(ties: bool) -> None:
    rng = np.random.default_rng(3)
    labels, predictions = rng.normal(size=200), rng.normal(size=200)
    if ties:
        labels, predictions = labels.round(), predictions.round()
    assert evaluate(("pearson", "spearman"), labels, predictions) == {
        "pearson": pytest.approx(scipy.stats.pearsonr(labels, predictions)[0]),
        "spearman": pytest.approx(scipy.stats.spearmanr(labels, predictions)[0]),
    }


def test_a_model_that_has_come_to_nan_has_collapsed() -> None:
    nothing = np.full(40, np.nan)
    assert collapsed(nothing)
    assert evaluate(("pearson", "spearman"), np.arange(40.0), nothing) == {"pearson": 0, "spearman": 0}


def test_a_model_that_says_the_same_of_every_row_is_told() -> None:
    assert collapsed(np.array([1, 1, 1])) and collapsed(np.array([2.5, 2.5 + 1e-9]))
    assert not collapsed(np.array([1, 0, 1])) and not collapsed(np.array([2.5, 2.51]))


def test_the_score_of_a_constant() -> None:
    labels = np.array([1, 1, 1, 0])
    assert constant_score(("accuracy",), [labels], 2) == pytest.approx(75)
    assert constant_score(("accuracy", "f1"), [labels], 2) == pytest.approx(100 * (0.75 + 6 / 7) / 2)
    assert constant_score(("matthews",), [labels], 2) == constant_score(("pearson",), [labels / 3], 0) == 0
    assert constant_score(("accuracy",), [labels, 1 - labels], 2) == pytest.approx(50), "one class for both"


def published(model: dict[str, float]) -> dict[str, dict[str, float]]:
    """A row of a paper's table as results by task."""
    results: dict[str, dict[str, float]] = {}
    for name, value in model.items():
        task, _, metric = name.partition(":")
        results.setdefault(task, {})[metric] = value / 100
    return results


# BERT-base: test set, arXiv 1810.04805, table 1
BERT_BASE = published(
    {
        **{"mnli:accuracy_matched": 84.6, "mnli:accuracy_mismatched": 83.4, "qqp:f1": 71.2, "qnli:accuracy": 90.5},
        **{"sst2:accuracy": 93.5, "cola:matthews": 52.1, "stsb:spearman": 85.8, "mrpc:f1": 88.9, "rte:accuracy": 66.4},
    }
)
# MosaicBERT-Base: dev set, arXiv 2312.17482, one number a task
MOSAIC = published(
    {
        **{"mnli:accuracy": 84.95, "qqp:accuracy": 90.3, "qnli:accuracy": 90.7, "sst2:accuracy": 92.5},
        **{"cola:matthews": 55.1, "stsb:spearman": 89.3, "mrpc:accuracy": 90.0, "rte:accuracy": 81.4},
    }
)
# Google's miniatures (arXiv 1908.08962): the leaderboard's test scores, as their README gives them
COLUMNS = (
    *("cola:matthews", "sst2:accuracy", "mrpc:f1", "mrpc:accuracy", "stsb:pearson", "stsb:spearman", "qqp:f1"),
    *("qqp:accuracy", "mnli:accuracy_matched", "mnli:accuracy_mismatched", "qnli:accuracy", "rte:accuracy"),
    "wnli:accuracy",
)
MINIATURES = {
    "tiny": (64.2, (0.0, 83.2, 81.1, 71.1, 74.3, 73.6, 62.2, 83.4, 70.2, 70.3, 81.5, 57.2, 62.3)),
    "mini": (65.8, (0.0, 85.9, 81.1, 71.8, 75.4, 73.3, 66.4, 86.2, 74.8, 74.3, 84.1, 57.9, 62.3)),
    "small": (71.2, (27.8, 89.7, 83.4, 76.2, 78.8, 77.0, 68.1, 87.0, 77.6, 77.0, 86.4, 61.8, 62.3)),
    "medium": (73.5, (38.0, 89.6, 86.6, 81.6, 80.4, 78.4, 69.6, 87.9, 80.0, 79.1, 87.7, 62.2, 62.3)),
}


def test_averages_are_those_of_the_papers() -> None:
    assert average("bert9", BERT_BASE) == pytest.approx(79.6, abs=0.05)
    assert average("glue8", MOSAIC) == pytest.approx(84.3, abs=0.05)
    for published_average, row in MINIATURES.values():
        results = published(dict(zip(COLUMNS, row, strict=True)))
        assert average("leaderboard9", results) == pytest.approx(published_average, abs=0.1)


def test_averages_by_their_definition() -> None:
    tiny = published(dict(zip(COLUMNS, MINIATURES["tiny"][1], strict=True)))
    scores = [0.0, 83.2, (81.1 + 71.1) / 2, (74.3 + 73.6) / 2, (62.2 + 83.4) / 2, (70.2 + 70.3) / 2, 81.5, 57.2]
    assert average("glue8", tiny) == pytest.approx(sum(scores) / 8)
    assert average("leaderboard9", tiny) == pytest.approx((sum(scores) + 62.3) / 9)
    assert average("local6", tiny) == pytest.approx((0.0 + 83.2 + 76.1 + 57.2 + 73.95 + 81.5) / 6)
    assert score({"pearson": 0.5, "spearman": 0.7}) == pytest.approx(60)


def test_averages_are_over_the_seeds_that_all_tasks_have() -> None:
    tiny = published(dict(zip(COLUMNS, MINIATURES["tiny"][1], strict=True)))
    by_seed = {task: {1: found, 2: found} for task, found in tiny.items()}
    by_seed["rte"] = {2: tiny["rte"], 3: tiny["rte"]}
    assert averages_by_seed("glue8", by_seed) == {2: pytest.approx(average("glue8", tiny))}
    del by_seed["qqp"]
    with pytest.raises(IncompleteAverage, match="glue8 needs qqp"):
        averages_by_seed("glue8", by_seed)
    assert len(averages_by_seed("local6", by_seed)) == 1


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_lacks_no_task(name: str) -> None:
    tasks = {part.partition(":")[0] for part in AVERAGES[name]}
    whole = {task: dict.fromkeys(metric_names(task), 0.5) for task in tasks}
    assert average(name, whole) == pytest.approx(50)
    for task in tasks:
        with pytest.raises(IncompleteAverage, match=f"{name} needs {task}$"):
            averages_by_seed(name, {other: {1: metrics} for other, metrics in whole.items() if other != task})


def metric_names(task: str) -> list[str]:
    return [metric + suffix for metric in TASKS[task].metrics for suffix in TASKS[task].evaluations]
