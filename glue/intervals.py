"""Means, deviations and 95 % intervals over pretraining seeds. Pure.

The unit is the pretrained model. The scores of its fine-tuning seeds are averaged first: they share its weights, so
they are not independent evidence about pretraining.
"""

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

    One value has only a mean. Equal values (every run collapsed, say) have no interval.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and its interval by Student's t with n - 1 degrees of freedom. Raises ValueError without values."""
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


def paired_difference(scores: Scores, baseline: Scores) -> Estimate | None:
    """Estimate of ``scores - baseline`` by the paired t, over the pretraining and fine-tuning seeds that both have.

    None if they share no seeds.
    """
    differences = []
    for seed in sorted(scores.keys() & baseline.keys()):
        own, other = scores[seed], baseline[seed]
        if shared := sorted(own.keys() & other.keys()):
            differences.append(statistics.fmean(own[tuning] - other[tuning] for tuning in shared))
    return estimate(differences) if differences else None
