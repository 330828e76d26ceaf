"""Metrics against their definitions in plain Python; named averages against published rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glue.metrics import AVERAGES, IncompleteAverage, average, collapsed, constant_score, evaluate, score
from glue.tasks import GLUE


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


# test-set rows of arXiv 1810.04805 (BERT-base) and of the table of Google's miniatures, arXiv 1908.08962
BERT_BASE = published(
    {
        **{"mnli:accuracy_matched": 84.6, "mnli:accuracy_mismatched": 83.4, "qqp:f1": 71.2, "qnli:accuracy": 90.5},
        **{"sst2:accuracy": 93.5, "cola:matthews": 52.1, "stsb:spearman": 85.8, "mrpc:f1": 88.9, "rte:accuracy": 66.4},
    }
)
BERT_TINY = published(
    {
        **{"cola:matthews": 0.0, "sst2:accuracy": 83.2, "mrpc:f1": 81.1, "mrpc:accuracy": 71.1, "stsb:pearson": 74.3},
        **{"stsb:spearman": 73.6, "qqp:f1": 62.2, "qqp:accuracy": 83.4, "mnli:accuracy_matched": 70.2},
        **{"mnli:accuracy_mismatched": 70.3, "qnli:accuracy": 81.5, "rte:accuracy": 57.2, "wnli:accuracy": 62.3},
    }
)


def test_averages_are_those_of_the_papers() -> None:
    assert average("bert9", BERT_BASE) == pytest.approx(79.6, abs=0.05)
    tiny = [0.0, 83.2, (81.1 + 71.1) / 2, (74.3 + 73.6) / 2, (62.2 + 83.4) / 2, (70.2 + 70.3) / 2, 81.5, 57.2]
    assert average("glue8", BERT_TINY) == pytest.approx(sum(tiny) / 8)
    assert average("leaderboard9", BERT_TINY) == pytest.approx((sum(tiny) + 62.3) / 9)
    assert average("local6", BERT_TINY) == pytest.approx((0.0 + 83.2 + 76.1 + 57.2 + 73.95 + 81.5) / 6)
    assert score({"pearson": 0.5, "spearman": 0.7}) == pytest.approx(60)


@pytest.mark.parametrize("name", [name for name in AVERAGES if name != "probes"])
def test_an_average_lacks_no_task(name: str) -> None:
    tasks = {part.partition(":")[0] for part in AVERAGES[name]}
    whole = {task: dict.fromkeys(metric_names(task), 0.5) for task in tasks}
    assert average(name, whole) == pytest.approx(50)
    for task in tasks:
        with pytest.raises(IncompleteAverage, match=f"{name} needs {task}$"):
            average(name, {other: metrics for other, metrics in whole.items() if other != task})


def metric_names(task: str) -> list[str]:
    return [metric + suffix for metric in GLUE[task].metrics for suffix in GLUE[task].evaluations]
