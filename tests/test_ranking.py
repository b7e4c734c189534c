"""AUROC, average precision and their intervals, beside their definitions in plain loops, scipy, and repeated draws."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import index_of
from scipy.stats import mannwhitneyu, norm

from pipeline.evaluation import Evaluation
from pipeline.metrics import LabelScore
from pipeline.ranking import logit_interval, mean_average_precision_interval, mean_text, rank_classes
from tools.support.label_report import describe_labels, label_lines


def draw(seed: int, images: int, classes: int = 3, ties: bool = False, shift: float = 1.0):
    """(N, K) scores and labels; a positive image's scores are higher by `shift` on average."""
    random = np.random.default_rng(seed)
    labels = (random.random((images, classes)) < [0.5, 0.2, 0.1][:classes]).astype(np.uint8)
    scores = random.normal(size=(images, classes)) + shift * labels
    return (np.round(scores * 2) / 2 if ties else scores), labels


def auroc_by_pairs(scores: np.ndarray, positive: np.ndarray) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    return sum(pairs) / len(pairs)


def precision_by_thresholds(scores: np.ndarray, positive: np.ndarray) -> float:
    """The sum over thresholds of precision times the rise in recall."""
    total = before = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        shown = scores >= threshold
        recall = (shown & positive).sum() / positive.sum()
        total += (recall - before) * (shown & positive).sum() / shown.sum()
        before = recall
    return total


def variance_by_delong(scores: np.ndarray, positive: np.ndarray) -> float:
    """From the structural components, pair by pair (DeLong et al. 1988, equation 6)."""
    wins = np.array([[(a > b) + 0.5 * (a == b) for b in scores[~positive]] for a in scores[positive]])
    m, n = wins.shape
    return wins.mean(axis=1).var(ddof=1) / m + wins.mean(axis=0).var(ddof=1) / n


@pytest.mark.parametrize("ties", [False, True])
def test_each_class_is_ranked_as_by_definition(ties):
    scores, labels = draw(0, 90, ties=ties)
    rankings, mean = rank_classes(scores.astype(np.float32), labels)
    for k, ranking in enumerate(rankings):
        column, positive = scores[:, k].astype(np.float32).astype(np.float64), labels[:, k] == 1
        assert (ranking.positives, ranking.negatives) == (positive.sum(), (~positive).sum())
        assert ranking.auroc == pytest.approx(auroc_by_pairs(column, positive), abs=1e-12)
        statistic = mannwhitneyu(column[positive], column[~positive]).statistic
        assert ranking.auroc == pytest.approx(statistic / (positive.sum() * (~positive).sum()), abs=1e-12)
        assert ranking.average_precision == pytest.approx(precision_by_thresholds(column, positive), abs=1e-12)
        deviation = math.sqrt(variance_by_delong(column, positive))
        half = norm.ppf(0.975) * deviation / (ranking.auroc * (1 - ranking.auroc))
        low, high = (math.log(x / (1 - x)) for x in ranking.auroc_interval)
        assert (high - low) / 2 == pytest.approx(half, rel=1e-9)
        precision = ranking.average_precision
        assert ranking.average_precision_interval == pytest.approx(
            logit_interval(precision, math.sqrt(precision * (1 - precision) / positive.sum()))
        )
    assert mean.classes == 3
    assert mean.auroc == pytest.approx(np.mean([r.auroc for r in rankings]))
    assert mean.average_precision == pytest.approx(np.mean([r.average_precision for r in rankings]))


def test_the_means_interval_of_one_class_is_the_classes_and_of_equal_classes_too():
    scores, labels = draw(1, 80, classes=1)
    ((ranking,), mean) = rank_classes(scores, labels)
    assert mean.auroc_interval == pytest.approx(ranking.auroc_interval)
    _, thrice = rank_classes(np.repeat(scores, 3, axis=1), np.repeat(labels, 3, axis=1))
    assert thrice.auroc_interval == pytest.approx(ranking.auroc_interval)  # they tell no more than one does


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Over 200 draws of 150 images; the truth of normal scores is known, that of the precision is of 100,000 images."""
    truth = norm.cdf(1 / math.sqrt(2))
    _, large = rank_classes(*draw(10**6, 100_000))
    of_class, of_mean, of_precision = [], [], []
    for seed in range(200):
        scores, labels = draw(seed, 150)
        rankings, mean = rank_classes(scores, labels)
        of_class.append(inside(truth, rankings[0].auroc_interval))
        of_mean.append(inside(truth, mean.auroc_interval))
        of_precision.append(inside(large.average_precision, mean_average_precision_interval(scores, labels)))
    assert 0.91 <= np.mean(of_class) <= 0.99 and 0.91 <= np.mean(of_mean) <= 0.99
    assert 0.91 <= np.mean(of_precision) <= 0.99


def inside(value: float, interval: tuple[float, float]) -> bool:
    return interval[0] <= value <= interval[1]


@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_of_the_mean_precision_is_the_jackknifes(ties):
    scores, labels = draw(3, 60, ties=ties)

    def mean(scores: np.ndarray, labels: np.ndarray) -> float:
        return np.mean([precision_by_thresholds(scores[:, k], labels[:, k] == 1) for k in range(3)])

    found, n = mean(scores, labels), 60
    without = np.array([mean(np.delete(scores, i, axis=0), np.delete(labels, i, axis=0)) for i in range(n)])
    center = n * found - (n - 1) * without.mean()
    deviation = math.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    assert mean_average_precision_interval(scores, labels) == pytest.approx(logit_interval(center, deviation), rel=1e-9)


def test_the_interval_of_the_mean_precision_misses_on_both_sides_and_is_none_of_too_few_images():
    """Of rare labels and few images, where the mean is too high on average."""
    truth = rank_classes(*draw(10**6, 100_000, shift=0.3))[1].average_precision
    found = [mean_average_precision_interval(*draw(seed, 100, shift=0.3)) for seed in range(200)]
    below, above = (sum(wrong) for wrong in zip(*((high < truth, low > truth) for low, high in found), strict=True))
    assert below + above <= 18 and max(below, above) <= 3 * min(below, above)
    scores, labels = draw(0, 100)
    labels[:, 2] = np.arange(100) == 7
    perfect = (scores > 0).astype(np.uint8)
    assert all(math.isnan(mean_average_precision_interval(scores, truth)[0]) for truth in (labels, perfect))


def test_what_is_not_defined_is_not_a_number():
    scores, labels = draw(2, 30)
    labels[:, 1] = 0
    labels[:, 2] = scores[:, 2] > np.median(scores[:, 2])
    (first, none, perfect), mean = rank_classes(scores, labels)
    assert math.isnan(none.auroc) and math.isnan(none.average_precision)
    assert perfect.auroc == 1 and math.isnan(perfect.auroc_interval[0])
    assert mean.classes == 2 and mean.auroc == pytest.approx((first.auroc + 1) / 2)


def test_answers_that_are_not_finite_count_as_ranked_wrongly():
    scores, labels = np.array([[0.9], [0.8], [0.2], [0.1]]), np.array([[1], [1], [0], [0]], np.uint8)
    assert rank_classes(scores, labels)[1].auroc == 1
    scores[0] = np.nan
    assert rank_classes(scores, labels)[1].auroc == 0.5
    scores[3] = np.inf
    assert rank_classes(scores, labels)[1].auroc == 0.25


def test_a_mean_without_an_interval_names_the_class_and_prints_no_words_of_an_interval():
    scores, labels = draw(3, 60)
    names = ("cat", "dog", "wolf")
    rare = labels.copy()
    rare[:, 1] = np.arange(60) == 7
    rare[:, 2] = np.arange(60) != 8
    cases = {"plenty": labels, "rare": rare, "perfect": (scores > 0).astype(np.uint8)}
    said = {}
    for case, truth in cases.items():
        rankings, mean = rank_classes(scores, truth)
        score = LabelScore(60, names, 90, 1.0, rankings, mean)
        evaluation = Evaluation(score, np.empty(0), np.empty(0), np.empty(0), scores, 0)
        index = dataclasses.replace(index_of([(1, 1)] * 60), labels=truth, classes=names)
        result = {**describe_labels(evaluation, index), "images": 60, "classes": 3, "published": []}
        said[case] = mean_text(mean, names), label_lines(result)[0]
    assert all("95 % interval" in line and "no interval" not in line for line in said["plenty"])
    assert all("no interval: 'dog' and 1 more" in line and "95 %" not in line for line in said["rare"])
    assert all("interval" not in line for line in said["perfect"])
    assert all("mean AUROC 1.0000" in line for line in said["perfect"])
