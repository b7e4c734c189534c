"""The training and the validation set that a configuration names."""

from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.arrays import index_arrays
from pipeline.data.index import ArraySource, DatasetIndex, cache_beside, scan_classes, scan_flat, synthetic_index
from pipeline.data.plan import epoch_order
from pipeline.errors import UserError

HOLDOUT_SEED = 0  # not the run's: whatever that is, runs are compared on the same images


def open_datasets(config: DataConfig, cache: Path, progress: bool) -> tuple[DatasetIndex, DatasetIndex]:
    """Index the training and the validation images, which must have the same classes.

    Args:
        cache: folder for what was found, where that cannot be kept beside the images.
        progress: show progress bars.

    Raises:
        UserError: see `scan_classes`, `scan_flat` and `read_arrays`; the classes differ; or too many images are held out.
    """
    train = _open_training_set(config, cache, progress)
    return (
        _hold_out(train, config.holdout)
        if config.holdout
        else (train, _open_validation_set(config, train, cache, progress))
    )


def _open_training_set(config: DataConfig, cache: Path, progress: bool) -> DatasetIndex:
    if config.loader == "synthetic":
        return synthetic_index(config.synthetic_images, config.synthetic_classes, config.resize_size, "train")
    if config.dataset != "images":
        return index_arrays(ArraySource(config.dataset, config.dir, "train", config.download))
    root = Path(config.dir, config.train)
    return scan_classes(root, cache_beside(root, cache), progress)


def _open_validation_set(config: DataConfig, train: DatasetIndex, cache: Path, progress: bool) -> DatasetIndex:
    if config.loader == "synthetic":
        images = max(1, config.synthetic_images // 4)
        return synthetic_index(images, config.synthetic_classes, config.resize_size, "val")
    if config.dataset != "images":
        return index_arrays(ArraySource(config.dataset, config.dir, "test", config.download))
    root = Path(config.dir, config.val)
    if config.val_labels:
        labels = Path(config.dir, config.val_labels)
        return scan_flat(root, labels, train.classes, cache_beside(root, cache), progress)
    val = scan_classes(root, cache_beside(root, cache), progress)
    if train.classes != val.classes:
        odd = min(set(train.classes) ^ set(val.classes))
        there, lacking = (train.root, root) if odd in train.classes else (root, train.root)
        raise UserError(
            f"the classes of training and validation differ: {lacking} has no class '{odd}', which {there} has"
        )
    return val


def _hold_out(index: DatasetIndex, images: int) -> tuple[DatasetIndex, DatasetIndex]:
    """All but a random choice of so many images, and that choice."""
    if images >= len(index):
        raise UserError(f"data.holdout {images} leaves none of the {len(index)} training images")
    order = epoch_order(len(index), HOLDOUT_SEED, epoch=0)
    return index.take(np.sort(order[images:])), index.take(np.sort(order[:images]))
