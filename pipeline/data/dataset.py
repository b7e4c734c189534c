"""The training and the validation set that a configuration names."""

from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex, cache_beside, scan_classes, scan_flat, synthetic_index
from pipeline.errors import UserError


def open_datasets(config: DataConfig, cache: Path, progress: bool) -> tuple[DatasetIndex, DatasetIndex]:
    """Index the training and the validation images, which must have the same classes.

    Args:
        cache: folder for what was found, where that cannot be kept beside the images.
        progress: show progress bars.

    Raises:
        UserError: see `scan_classes` and `scan_flat`; or the classes differ.
    """
    if config.loader == "synthetic":
        classes, size = config.synthetic_classes, config.resize_size
        return (
            synthetic_index(config.synthetic_images, classes, size, "train"),
            synthetic_index(max(1, config.synthetic_images // 4), classes, size, "val"),
        )
    train_root, val_root = Path(config.dir, config.train), Path(config.dir, config.val)
    train = scan_classes(train_root, cache_beside(train_root, cache), progress)
    val_cache = cache_beside(val_root, cache)
    if config.val_labels:
        return train, scan_flat(val_root, Path(config.dir, config.val_labels), train.classes, val_cache, progress)
    val = scan_classes(val_root, val_cache, progress)
    if train.classes != val.classes:
        odd = min(set(train.classes) ^ set(val.classes))
        there, lacking = (train_root, val_root) if odd in train.classes else (val_root, train_root)
        raise UserError(
            f"the classes of training and validation differ: {lacking} has no class '{odd}', which {there} has"
        )
    return train, val
