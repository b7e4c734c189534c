"""The images that a run held out of its training images."""

import sys

from pipeline.config import DataConfig
from pipeline.data.dataset import fingerprint_of, open_datasets
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.weights import Weights


def open_held_out(data: DataConfig, weights: Weights) -> DatasetIndex:
    """Of the training images in `data.dir` those that the run of the weights held out, with labels in the weights' classes.

    Raises:
        UserError: the run held none out; or the images are missing, or not the run's, so that others would be taken.
    """
    if not data.holdout:
        raise UserError(f"the run of {weights.origin} held no training images out (data.holdout): leave out --held-out")
    train, held_out = open_datasets(data, None, progress=True)
    if weights.fingerprint is None:
        print(
            f"warning: {weights.origin} does not say which images its run had: whether it has trained on the "
            f"{len(held_out):,} that are taken as held out is not known",
            file=sys.stderr,
            flush=True,
        )
    elif fingerprint_of(train, held_out) != weights.fingerprint:
        raise UserError(
            f"{train.root} does not hold the images that the run of {weights.origin} had, so that it may have trained on what "
            "would be taken as held out: give the run's own images"
        )
    return held_out.with_classes(weights.classes)
