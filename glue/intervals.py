"""Means, deviations and 95 % intervals over pretraining seeds. Pure.

The unit is the pretrained model: the scores of its fine-tuning seeds are averaged first, for they share its weights and
are no independent evidence about how it was trained.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats is slow to import

CONFIDENCE = 0.95

Scores = Mapping[int, Mapping[int, float]]  # by pretraining seed, by fine-tuning seed


@dataclass(frozen=True)
class Estimate:
    """Mean of n values, their sample standard deviation, and the interval of the mean.

    Of one value there is only the mean. Values that are all alike, as where every run collapsed, have no interval: one
    of no width would claim to know.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and its interval by Student's t with n - 1 degrees of freedom.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an estimate needs a value")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    sd = statistics.stdev(values)
    if sd <= 1e-9 * max(1.0, abs(mean)):  # rounding
        return Estimate(mean, 0.0, None, None, n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(n)
    return Estimate(mean, sd, mean - half, mean + half, n)


def seed_means(scores: Scores) -> dict[int, float]:
    """One value a pretraining seed: the mean of its fine-tuning seeds."""
    return {seed: statistics.fmean(scores[seed].values()) for seed in sorted(scores)}


def paired_difference(scores: Scores, baseline: Scores) -> Estimate | None:
    """Estimate of ``scores - baseline`` by the paired t over the pretraining seeds that both have.

    Within a pair the fine-tuning seeds count that both have. None where nothing can be paired.
    """
    differences = []
    for seed in sorted(scores.keys() & baseline.keys()):
        shared = sorted(scores[seed].keys() & baseline[seed].keys())
        if shared:
            differences.append(statistics.fmean(scores[seed][each] - baseline[seed][each] for each in shared))
    return estimate(differences) if differences else None
