"""Which classes are taken for which: the confusion matrix, and groups of classes where there are too many to show each."""

import itertools

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import coo_array, csr_array
from scipy.spatial.distance import squareform

MOST_ALONE = 40  # classes that are shown one by one; more are shown in groups
GROUPS = 20
MOST_ORDERED = 4000  # classes that are ordered by their confusions, which takes memory for each two of them


def confusion_matrix(labels: np.ndarray, answers: np.ndarray, classes: int) -> csr_array:
    """(classes, classes) int64: images of the row's class to which the column's was answered.

    Args:
        labels: (n) int64.
        answers: (n) int64; -1 where there is none, which is left out.
    """
    given = answers >= 0
    ones = np.ones(int(given.sum()), np.int64)
    return coo_array((ones, (labels[given], answers[given])), shape=(classes, classes)).tocsr()


def group_classes(matrix: csr_array) -> list[np.ndarray]:
    """The classes that have images or were answered, each alone in their order; many of them in groups of about equal size.

    A group holds classes that are confused with each other: neighbours in a hierarchical clustering (average linkage) of the
    shares of their images that are, cut where neighbours have least to do with each other.
    """
    used = np.flatnonzero((matrix.sum(axis=1) > 0) | (matrix.sum(axis=0) > 0))
    if len(used) <= MOST_ALONE:
        return [used[i : i + 1] for i in range(len(used))]
    cuts = np.linspace(0, len(used), GROUPS + 1).round().astype(int)
    if len(used) <= MOST_ORDERED:
        counts = matrix[used][:, used].toarray().astype(np.float64)
        images = np.maximum(counts.sum(axis=1), 1)
        shared = (counts + counts.T) / (images[:, None] + images[None])
        np.fill_diagonal(shared, 1)
        order = leaves_list(linkage(squareform(1 - shared, checks=False), "average"))
        used, beside = used[order], shared[order[:-1], order[1:]]  # what a class has to do with the next one
        reach = len(used) // GROUPS // 4
        for k in range(1, GROUPS):
            low = cuts[k] - reach
            cuts[k] = low + np.argmin(beside[low - 1 : cuts[k] + reach])
    return [used[a:b] for a, b in itertools.pairwise(cuts)]


def between_groups(matrix: csr_array, groups: list[np.ndarray]) -> np.ndarray:
    """(groups, groups) int64: images of the row's classes to which one of the column's was answered."""
    classes, members = matrix.shape[0], np.concatenate(groups)
    numbers = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    indicator = coo_array((np.ones(len(members), np.int64), (members, numbers)), shape=(classes, len(groups))).tocsr()
    return (indicator.T @ matrix @ indicator).toarray()
