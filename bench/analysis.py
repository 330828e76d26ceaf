"""The analysis of docs/STUDY.md: differences between rows over trunks, their intervals and p-values. Pure.

Shapes: K rows, N trunks.
"""

import math
import statistics
from collections.abc import Iterable, Mapping

import numpy as np
from scipy.optimize import brentq
from scipy.special import nctdtr, stdtr, stdtrit

from glue.intervals import Estimate, estimate

Row = Mapping[str, Mapping[str, float]]  # the values of each measure, by trunk
Rows = Mapping[str, Row]


def means(row: Row, measures: Iterable[str]) -> dict[str, float]:
    """The mean of some measures, for the trunks that have them all."""
    values = [row.get(measure, {}) for measure in measures]
    shared = [trunk for trunk in values[0] if all(trunk in own for own in values)]
    return {trunk: statistics.fmean(own[trunk] for own in values) for trunk in shared}


def mean(row: Row, measures: Iterable[str]) -> float | None:
    values = means(row, measures).values()
    return statistics.fmean(values) if values else None


def paired(row: Row, baseline: Row, measures: Iterable[str]) -> Estimate | None:
    """The estimate of ``row - baseline`` by the paired t, over the trunks that both have."""
    own, other = means(row, measures), means(baseline, measures)
    differences = [own[trunk] - other[trunk] for trunk in own if trunk in other]
    return estimate(differences) if differences else None


class Layout:
    """A measure of K rows on N trunks: row effect + trunk effect + noise of one variance.

    Attributes:
        sd: standard deviation of a difference between two rows on one trunk; None if it cannot be estimated.
        degrees: of freedom, (K - 1)(N - 1).
    """

    def __init__(self, rows: Rows, measures: Iterable[str]) -> None:
        values = {name: means(row, measures) for name, row in rows.items()}
        trunks = set.intersection(*map(set, values.values())) if values else set()
        self.values_KN = np.array([[own[trunk] for trunk in sorted(trunks)] for own in values.values()])
        self.names, self.n = list(values), len(trunks)
        self.degrees = max(0, len(values) - 1) * max(0, self.n - 1)
        self.sd = None
        if self.degrees > 0:
            of_trunks_N, of_rows_K1 = self.values_KN.mean(0), self.values_KN.mean(1, keepdims=True)
            noise_KN = self.values_KN - of_trunks_N - of_rows_K1 + self.values_KN.mean()
            self.sd = math.sqrt(2 * np.square(noise_KN).sum() / self.degrees)

    def mean(self, name: str) -> float:
        return float(self.values_KN[self.names.index(name)].mean())

    def difference(self, name: str, other: str) -> Estimate:
        """Between two rows, with its 95 % interval."""
        gain = self.mean(name) - self.mean(other)
        if not self.sd:
            return Estimate(gain, None, None, None, self.n)
        half = float(stdtrit(self.degrees, 0.975)) * self.sd / math.sqrt(self.n)
        return Estimate(gain, self.sd, gain - half, gain + half, self.n)

    def p_value(self, name: str, other: str) -> float:
        """Two-sided, for the hypothesis that two rows are equal; 1 if the noise is unknown."""
        if not self.sd:
            return 1.0
        return float(2 * stdtr(self.degrees, -abs(self.difference(name, other).mean) * math.sqrt(self.n) / self.sd))

    def detectable(self, n: int, level: float, power: float = 0.8) -> float:
        """The true difference that n trunks find at this level with this power, if the noise is the same."""
        degrees = (len(self.names) - 1) * (n - 1)
        limit = float(stdtrit(degrees, 1 - level / 2))
        shift = brentq(lambda shift: 1 - nctdtr(degrees, shift, limit) - power, 0, 1000)
        return float(shift) * (self.sd or math.nan) / math.sqrt(n)


def holm(p_values: Mapping[str, float], comparisons: int) -> dict[str, float]:
    """Correct p-values by Holm's method (1979): the smallest times m comparisons, the next times m - 1, and so on.

    A corrected p-value is at most 1 and at least as large as the one before.
    """
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (comparisons - rank) * p_values[name]))
        corrected[name] = largest
    return corrected


def verdict(gain: Estimate, p_value: float, effect: float) -> str:
    """What the plan calls a row: whether it gains or loses, and whether a gain of ``effect`` is excluded."""
    result = "undecided" if p_value >= 0.05 else "gains" if gain.mean > 0 else "loses"
    return result + (", 5 % excluded" if gain.high is not None and gain.high < effect else "")
