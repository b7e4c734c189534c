"""How well scores rank the images that have a label above those that have not: AUROC and average precision, in float64.

Sources: DeLong, DeLong and Clarke-Pearson 1988 (variance of the AUROC; computed from midranks as Sun and Xu 2014 do); Boyd,
Eng and Page 2013 (interval of the average precision). Both intervals are of the logit, so that they stay within 0 and 1.
That of the mean average precision is the jackknife's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's quantile of 97.5 %
NOT_DEFINED = (math.nan, math.nan)


@dataclass(frozen=True)
class Ranking:
    """Of one class, over N images.

    Attributes:
        positives, negatives: images with and without the label.
        auroc: probability that a positive image has a higher score than a negative one, ties counted half; NaN if there is
            none of either kind.
        auroc_interval: 95 % confidence interval; NaN where it is not defined, as where no two images are ranked wrongly.
        average_precision: sum over thresholds of precision times the rise in recall, as scikit-learn computes it; NaN without
            positive images.
        average_precision_interval: likewise.
    """

    positives: int
    negatives: int
    auroc: float
    auroc_interval: tuple[float, float]
    average_precision: float
    average_precision_interval: tuple[float, float]


@dataclass(frozen=True)
class MeanRanking:
    """Means over the classes in which both are defined.

    Attributes:
        classes: how many those are.
        auroc_interval: 95 % confidence interval, which knows that the classes are ranked on the same images. NaN where the mean
            is 0 or 1, and where a class has one positive or one negative image alone: how far its AUROC would vary with
            other images cannot be told from one, and an interval without that class would be of another mean.
        single: those classes, by number.
    """

    classes: int
    auroc: float
    auroc_interval: tuple[float, float]
    average_precision: float
    single: tuple[int, ...] = ()


def rank_classes(scores: np.ndarray, labels: np.ndarray) -> tuple[tuple[Ranking, ...], MeanRanking]:
    """Rank N images by their scores for each of K classes.

    Args:
        scores: (N, K), higher for images that rather have the label. Rows that are not finite count as ranked wrongly: below
            all others where they are positive, above where they are negative.
        labels: (N, K), 0 or 1.
    """
    positive = labels.astype(bool)
    scores = _wrong_if_not_finite(scores, positive)
    rankings, influences = [], []
    for k in range(scores.shape[1]):
        ranking, influence = _rank(scores[:, k], positive[:, k])
        rankings.append(ranking)
        if influence is not None:
            influences.append(influence)
    defined = [r for r in rankings if r.positives and r.negatives]
    if not defined:
        return tuple(rankings), MeanRanking(0, math.nan, NOT_DEFINED, math.nan)
    auroc = float(np.mean([r.auroc for r in defined]))
    single = tuple(k for k, r in enumerate(rankings) if 1 in (r.positives, r.negatives) and r.positives and r.negatives)
    deviation = math.nan if single else float(np.sqrt(np.square(np.mean(influences, axis=0)).sum()))
    mean = MeanRanking(
        classes=len(defined),
        auroc=auroc,
        auroc_interval=logit_interval(auroc, deviation),
        average_precision=float(np.mean([r.average_precision for r in defined])),
        single=single,
    )
    return tuple(rankings), mean


def _wrong_if_not_finite(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The (N, K) scores in float64; see `rank_classes`."""
    finite = np.isfinite(scores).all(axis=1, keepdims=True)
    return np.where(finite, scores.astype(np.float64), np.where(positive, -np.inf, np.inf))


def logit_interval(value: float, deviation: float) -> tuple[float, float]:
    """95 % interval around a value in (0, 1) with this standard deviation, symmetric in its logit; NaN if it is not defined."""
    if not (0 < value < 1 and deviation > 0):
        return NOT_DEFINED
    middle, half = math.log(value / (1 - value)), Z95 * deviation / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in (middle - half, middle + half))
    return low, high


def _rank(scores: np.ndarray, positive: np.ndarray) -> tuple[Ranking, np.ndarray | None]:
    """One class, (N) each, and the influence (N) of each image on its AUROC, whose squares add up to DeLong's variance."""
    m, n = int(positive.sum()), int((~positive).sum())
    precision = _average_precision(scores, positive) if m else math.nan
    of_precision = logit_interval(precision, math.sqrt(precision * (1 - precision) / m)) if m else NOT_DEFINED
    if not m or not n:
        return Ranking(m, n, math.nan, NOT_DEFINED, precision, of_precision), None
    ranks = _midranks(scores)
    above = (ranks[positive] - _midranks(scores[positive])) / n  # share of negatives below each positive
    below = 1 - (ranks[~positive] - _midranks(scores[~positive])) / m  # share of positives above each negative
    auroc = float(above.mean())
    if m < 2 or n < 2:
        return Ranking(m, n, auroc, NOT_DEFINED, precision, of_precision), None
    influence = np.empty(len(scores))
    influence[positive] = (above - auroc) / math.sqrt(m * (m - 1))
    influence[~positive] = (below - auroc) / math.sqrt(n * (n - 1))
    interval = logit_interval(auroc, float(np.sqrt(np.square(influence).sum())))
    return Ranking(m, n, auroc, interval, precision, of_precision), influence


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    _, hits, last = _sorted(scores, positive)
    found, shown = np.cumsum(hits)[last], np.flatnonzero(last) + 1
    return float(np.sum(np.diff(found, prepend=0) * found / shown) / found[-1])


def _sorted(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images by falling score: their numbers, whether they are positive, and whether they are the last of their score."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    return order, positive[order], np.append(ranked[1:] != ranked[:-1], True)


def mean_text(mean: MeanRanking, classes: Sequence[object]) -> str:
    """The means in a few words."""
    low, high = mean.auroc_interval
    interval = f" (95 % interval {low:.4f} to {high:.4f})" if low == low else ""
    interval = f" ({no_interval_text([classes[k] for k in mean.single])})" if mean.single else interval
    of = (
        ""
        if mean.classes == len(classes)
        else f", over the {mean.classes} of {len(classes)} classes that have both kinds"
    )
    return f"mean AUROC {mean.auroc:.4f}{interval}, mean average precision {mean.average_precision:.4f}{of}"


def no_interval_text(single: Sequence[object]) -> str:
    """Why the means have no interval: these classes have one image with or without them."""
    others = f" and {len(single) - 1} more" if len(single) > 1 else ""
    return f"no interval: '{single[0]}'{others} with one image, or all but one"


def mean_average_precision_interval(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean average precision, from its values without each of the images (the jackknife).

    They give its variance, and by how much it is too high on average: a good score of a few positive images weighs more than
    a bad one. The interval is that of the logit around the mean without this bias (Efron and Tibshirani 1993, chapter 11).
    Where labels are rare and classes many it may not hold the mean itself.

    Args:
        scores, labels: (N, K) as in `rank_classes`; classes without images of both kinds count in no mean.

    Returns:
        It; NaN where it is not defined: a class has one image with or without it, or no image is ranked wrongly.
    """
    positive = labels.astype(bool)
    scores = _wrong_if_not_finite(scores, positive)
    defined = np.flatnonzero(positive.any(axis=0) & ~positive.all(axis=0)).tolist()
    kinds = positive[:, defined].sum(axis=0), (~positive[:, defined]).sum(axis=0)
    if not defined or min(map(min, kinds)) < 2:
        return NOT_DEFINED
    n = len(scores)
    mean = np.mean([_average_precision(scores[:, k], positive[:, k]) for k in defined])
    without = np.mean([_precision_without_each(scores[:, k], positive[:, k]) for k in defined], axis=0)
    bias = (n - 1) * (without.mean() - mean)
    deviation = math.sqrt((n - 1) * np.square(without - without.mean()).mean())
    return logit_interval(float(mean - bias), deviation)


def _precision_without_each(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(N) average precision of all other images, where two or more are positive.

    Images of one score are a threshold. Without an image nothing changes at the thresholds above it, and at those from its own
    on one image less is found, which may be a positive one.
    """
    order, hits, last = _sorted(scores, positive)
    found, shown = np.cumsum(hits)[last].astype(float), np.flatnonzero(last) + 1.0
    rise, fewer = np.diff(found, prepend=0), np.maximum(shown - 1, 1)
    threshold = np.cumsum(np.append(0, last[:-1]))  # of each image
    above = np.append(0, np.cumsum(rise * found / shown)[:-1])
    without_negative = above + _sums_from(rise * found / fewer)
    below = np.append(_sums_from(rise * (found - 1) / fewer)[1:], 0)
    without_positive = above + (rise - 1) * (found - 1) / fewer + below
    values = np.empty(len(scores))
    values[order] = np.where(
        hits, without_positive[threshold] / (found[-1] - 1), without_negative[threshold] / found[-1]
    )
    return values


def _sums_from(values: np.ndarray) -> np.ndarray:
    """The sum of each value and those after it."""
    return np.cumsum(values[::-1])[::-1]
