"""Predictions → metrics → named averages. Pure functions; every metric is in [-1, 1], every score in percent."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

OF_CLASSES = ("accuracy", "f1", "matthews")
OF_NUMBERS = ("pearson", "spearman")

# Averages differ between papers, so they have names. A part is a task (the mean of its metrics) or task:metric.
AVERAGES = {
    # the eight tasks that most papers average, without WNLI; MNLI's two evaluations count as one task
    "glue8": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"),
    # the average of the BERT paper (arXiv 1810.04805, table 1; BERT-base 79.6 on test)
    "bert9": (
        *("mnli:accuracy_matched", "mnli:accuracy_mismatched", "qqp:f1", "qnli", "sst2", "cola", "stsb:spearman"),
        *("mrpc:f1", "rte"),
    ),
    # all nine tasks, as on the leaderboard of gluebenchmark.com, without its diagnostic set
    "leaderboard9": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"),
    # the tasks without a large download: without MNLI and QQP
    "local6": ("cola", "sst2", "mrpc", "rte", "stsb", "qnli"),
    # the tasks with many training rows, which separate small models
    "large4": ("sst2", "qqp", "mnli_matched", "qnli"),
}


class IncompleteAverage(ValueError):
    """Results that an average needs are missing; the message names them."""


def evaluate(names: tuple[str, ...], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """The named metrics of predictions [N] against labels [N].

    F1 is that of class 1. A correlation with constant predictions is 0.
    """
    # slow to import, and a comparison computes no metrics
    from scipy import stats
    from sklearn import metrics as sklearn

    def correlation(function: Callable[..., tuple[float, float]]) -> float:
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nearly constant predictions give nan, which counts as no correlation
            return float(np.nan_to_num(function(labels, predictions)[0]))

    functions = {
        "accuracy": lambda: sklearn.accuracy_score(labels, predictions),
        "f1": lambda: sklearn.f1_score(labels, predictions, zero_division=0),
        "matthews": lambda: sklearn.matthews_corrcoef(labels, predictions),
        "pearson": lambda: correlation(stats.pearsonr),
        "spearman": lambda: correlation(stats.spearmanr),
    }
    return {name: float(functions[name]()) for name in names}


def collapsed(predictions: np.ndarray) -> bool:
    """Whether a model predicts the same for every row, to six digits."""
    return len(np.unique(np.round(predictions.astype(np.float64), 6))) == 1


def score(metrics: Mapping[str, float]) -> float:
    """A task's score: the mean of its metrics, in percent."""
    return 100 * sum(metrics.values()) / len(metrics)


def constant_score(names: tuple[str, ...], evaluations: Sequence[np.ndarray], classes: int) -> float:
    """The score, in percent, of the best model that predicts one class for every row; 0 for a regression.

    Args:
        names: the task's metrics.
        evaluations: labels [N] of each evaluation.
        classes: number of classes, 0 for a regression.
    """
    scores = [
        [score(evaluate(names, labels, np.full_like(labels, value))) for labels in evaluations]
        for value in range(classes)
    ]
    return max((sum(own) / len(own) for own in scores), default=0.0)


def tasks_of(name: str) -> list[str]:
    """The tasks of a named average."""
    return list(dict.fromkeys(part.partition(":")[0] for part in AVERAGES[name]))


def average(name: str, results: Mapping[str, Mapping[str, float]]) -> float:
    """A named average, in percent, of metrics by task."""
    parts = [part.partition(":") for part in AVERAGES[name]]
    scores = [100 * results[task][metric] if metric else score(results[task]) for task, _, metric in parts]
    return sum(scores) / len(scores)


def averages_by_seed(name: str, results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[int, float]:
    """A named average, in percent, for each seed that all of its tasks have. Raises IncompleteAverage.

    Args:
        results: metrics by task and seed.
    """
    tasks = tasks_of(name)
    if missing := [task for task in tasks if task not in results]:
        raise IncompleteAverage(f"the average {name} needs {', '.join(missing)}")
    if not (shared := sorted(set.intersection(*(set(results[task]) for task in tasks)))):
        raise IncompleteAverage(f"the average {name} needs a seed that all of its tasks share")
    return {seed: average(name, {task: results[task][seed] for task in tasks}) for seed in shared}
