"""Statistics of error rates: confidence intervals, and tests of two networks on the same images or from the same seeds."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import binomtest, t

from pipeline.ranking import Z95


def wilson_interval(wrong: int, images: int) -> tuple[float, float]:
    """95 % confidence interval of an error rate, in percent (Wilson 1927)."""
    rate, z2 = wrong / images, Z95**2
    middle = (rate + z2 / (2 * images)) / (1 + z2 / images)
    half = Z95 * math.sqrt(rate * (1 - rate) / images + z2 / (4 * images**2)) / (1 + z2 / images)
    return max(0.0, 100 * (middle - half)), min(100.0, 100 * (middle + half))


def mcnemar(only_first_wrong: int, only_second_wrong: int) -> float:
    """McNemar's exact test (1947): the two-sided p-value of this split if both networks were equally good."""
    differing = only_first_wrong + only_second_wrong
    return float(binomtest(only_first_wrong, differing).pvalue) if differing else 1.0


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences, and half of its 95 % confidence interval (Student's t).

    The half is infinite for one difference, of which nothing can be said.
    """
    n = len(differences)
    if n < 2:
        return statistics.mean(differences), math.inf
    return statistics.mean(differences), float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
