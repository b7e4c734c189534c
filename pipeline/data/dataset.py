"""The training and the validation set that a configuration names."""

from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex, scan_class_folders, scan_flat_folder, synthetic_index
from pipeline.errors import UserError


def open_datasets(config: DataConfig, cache: Path, progress: bool) -> tuple[DatasetIndex, DatasetIndex]:
    """Index the training and the validation images, which must have the same classes.

    Args:
        cache: folder for what a later scan need not read again.
        progress: show progress bars.

    Raises:
        UserError: see `scan_class_folders` and `scan_flat_folder`; or the classes differ.
    """
    if config.loader == "synthetic":
        classes, size = config.synthetic_classes, config.resize_size
        return (
            synthetic_index(config.synthetic_images, classes, size, "train"),
            synthetic_index(max(1, config.synthetic_images // 4), classes, size, "val"),
        )
    train_folder, val_folder = Path(config.dir, config.train), Path(config.dir, config.val)
    train = scan_class_folders(train_folder, cache / "train.npz", progress)
    if config.val_labels:
        labels_file = Path(config.dir, config.val_labels)
        return train, scan_flat_folder(val_folder, labels_file, train.classes, cache / "val.npz", progress)
    val = scan_class_folders(val_folder, cache / "val.npz", progress)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[0]
        there, lacking = (train_folder, val_folder) if odd in train.classes else (val_folder, train_folder)
        raise UserError(
            f"the classes of training and validation differ: {lacking} has no class '{odd}', which {there} has"
        )
    return train, val
