"""The training and the validation set that a configuration names."""

import dataclasses
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.arrays import CLASSES_OF_TORCHVISION, ArraySource, index_arrays
from pipeline.data.index import DatasetIndex, cache_beside, scan_classes, scan_flat, scan_label_table
from pipeline.data.labels import labels_needed
from pipeline.data.plan import epoch_order
from pipeline.data.sources import find_source, open_source
from pipeline.data.synthetic import synthetic_index
from pipeline.data.table import SPLIT_NAMES, Columns, TableSource, is_table
from pipeline.errors import UserError, look_up

HOLDOUT_SEED = 0  # not the run's: whatever that is, runs are compared on the same images

Split = Literal["train", "val"]
Opener = Callable[[DataConfig, Split, tuple[str, ...], Path | None, bool], DatasetIndex]


def open_datasets(config: DataConfig, cache: Path | None, progress: bool) -> tuple[DatasetIndex, DatasetIndex]:
    """Index the training and the validation images.

    The classes are those of the training set; the validation set may have a part of them.

    Args:
        cache: folder for what was found, where that cannot be kept beside the images; None to write nothing anywhere.
        progress: show progress bars.

    Raises:
        UserError: see `scan_classes`, `scan_flat` and `read_arrays`; the validation set has a class that the training set has
            not; too many images are held out; or of several labels an image one of the two sets can tell nothing.
    """
    opener = _open_synthetic if config.loader == "synthetic" else look_up(DATASETS, config.dataset, "data.dataset")
    if opener is _open_files:
        config = _above_train(config)
        _check_folders(config)
    train = opener(config, "train", (), cache, progress)
    if config.holdout:
        parts = _hold_out(train, config.holdout)
        if train.several_labels:
            _check_held_out(train, *parts)
        return parts
    return train, opener(config, "val", train.classes, cache, progress)


def _open_files(
    config: DataConfig, split: Split, classes: tuple[str, ...], cache: Path | None, progress: bool
) -> DatasetIndex:
    """Files of images, in a folder or an archive, or named by a table; see `sources.SOURCES`."""
    root = Path(config.dir, config.train if split == "train" else config.val)
    if cache is not None:
        return _open_root(config, split, classes, root, _cache(root, cache), progress)
    with tempfile.TemporaryDirectory() as folder:  # what is known is used, and what is found is not kept
        copy = Path(folder, "index.jsonl")
        with suppress(OSError):
            shutil.copyfile(cache_beside(root, Path(folder)), copy)
        return _open_root(config, split, classes, root, copy, progress)


def _open_root(
    config: DataConfig, split: Split, classes: tuple[str, ...], root: Path, kept: Path, progress: bool
) -> DatasetIndex:
    if config.labels == "multi":
        return _open_label_table(config, root, classes or None, kept, progress)
    columns = Columns(config.file_column, config.label_column, split)
    source: Path | TableSource = root
    if is_table(root):
        source = TableSource(str(root), open_source(config.dir), columns)
    elif config.file_column or config.label_column:
        raise UserError(
            f"{root} is no table, and data.file_column and data.label_column are for tables: leave them out"
        )
    if split == "train":
        return scan_classes(source, kept, progress)
    if config.val_labels:
        return scan_flat(root, Path(config.dir, config.val_labels), classes, kept, progress)
    val = scan_classes(source, kept, progress, empty_classes=True)
    odd = sorted(set(val.classes) - set(classes))
    if odd and len(odd) == len(val.classes):
        raise UserError(
            f"the classes of training and validation differ: {root} has none of the training classes, but '{odd[0]}'; "
            f"{labels_needed(root)}"
        )
    if odd:
        training = Path(config.dir, config.train)
        raise UserError(
            f"the classes of training and validation differ: {training} has no class '{odd[0]}', which {root} has: remove "
            "it there, or set data.holdout to validate on training images"
        )
    if not len(val):
        raise UserError(f"{root} has class folders without images: fill them, or set data.holdout")
    lacking = sorted(set(classes) - {val.classes[k] for k in np.unique(val.labels)})
    if lacking:
        print(
            f"warning: {root} has images of {len(classes) - len(lacking)} of the {len(classes)} training classes (none of "
            f"'{lacking[0]}'): the error is over those that it has",
            file=sys.stderr,
            flush=True,
        )
    return val if val.classes == classes else val.with_classes(classes)


def _open_label_table(
    config: DataConfig, table: Path, classes: tuple[str, ...] | None, cache: Path, progress: bool
) -> DatasetIndex:
    """Images in data.dir with the labels of a CSV file."""
    if table.is_dir():
        raise UserError(
            f"{table} is a folder: with data.labels multi data.train and data.val are CSV files in data.dir, which name the "
            "images and their labels"
        )
    index = scan_label_table(config.dir, table, classes, cache, progress)
    lacking = _of_one_kind(index)
    if len(lacking) == len(index.classes):
        raise UserError(f"{table}: no class has images with and images without it: nothing can be learnt or measured")
    if lacking:
        _warn_of_one_kind(f"in {table}", lacking, index)
    return index


def _check_held_out(whole: DatasetIndex, train: DatasetIndex, val: DatasetIndex) -> None:
    """Refuse parts of a table that can tell nothing, and warn of classes that have both kinds of images in the table alone."""
    for part, words, change in ((train, "images left for training", "lower"), (val, "held-out images", "raise")):
        lacking = _of_one_kind(part)
        if len(lacking) == len(part.classes):
            raise UserError(
                f"among the {len(part):,} {words} no class has images with and images without it: {change} data.holdout"
            )
        if lost := [name for name in lacking if name not in _of_one_kind(whole)]:
            _warn_of_one_kind(f"of the {len(part):,} {words}", lost, part)


def _of_one_kind(index: DatasetIndex) -> list[str]:
    """Classes that all images of a table have, or none."""
    positives = index.labels.sum(axis=0, dtype=np.int64).tolist()
    return [name for name, n in zip(index.classes, positives, strict=True) if n in (0, len(index))]


def _warn_of_one_kind(where: str, lacking: list[str], index: DatasetIndex) -> None:
    print(
        f"warning: {where} all images or none have '{lacking[0]}' ({len(lacking)} of {len(index.classes)} classes are so): "
        "it counts in no mean over classes",
        file=sys.stderr,
        flush=True,
    )


def _open_arrays(
    config: DataConfig, split: Split, classes: tuple[str, ...], cache: Path | None, progress: bool
) -> DatasetIndex:
    """A data set of torchvision's, in memory."""
    return index_arrays(
        ArraySource(config.dataset, config.dir, "train" if split == "train" else "test", config.download)
    )


def _open_synthetic(
    config: DataConfig, split: Split, classes: tuple[str, ...], cache: Path | None, progress: bool
) -> DatasetIndex:
    """Generated images, of which no file exists."""
    images = config.synthetic_images if split == "train" else max(1, config.synthetic_images // 4)
    return synthetic_index(images, config.synthetic_classes, config.resize_size, split)


# How data.dataset is opened: (configuration, split, training classes, cache folder, show progress).
DATASETS: dict[str, Opener] = {
    "images": _open_files,
    **dict.fromkeys(CLASSES_OF_TORCHVISION, _open_arrays),
}


def _above_train(config: DataConfig) -> DataConfig:
    """The configuration with the folder that holds both splits, where data.dir is the training split itself; it is told."""
    folder = Path(os.path.abspath(config.dir))
    above = folder.parent
    if folder.name != config.train or os.path.lexists(folder / config.train):
        return config
    if not config.holdout and not os.path.lexists(above / config.val):
        return config
    print(
        f"data.dir {config.dir} is the training images: {above} is taken, which holds them", file=sys.stderr, flush=True
    )
    return dataclasses.replace(config, dir=str(above))


def _check_folders(config: DataConfig) -> None:
    """Refuse a missing split before the other one is scanned, which can take an hour.

    Raises:
        UserError: names what is there instead.
    """
    folder = Path(config.dir)
    if config.labels == "multi":
        _check_table(folder, config.train, "data.train", "")
        if not config.holdout:
            _check_table(folder, config.val, "data.val", ", or data.holdout to validate on training images")
        return
    _check_split(folder, config.train, "data.train", SPLIT_NAMES["train"], "")
    if not config.holdout:
        _check_split(
            folder, config.val, "data.val", SPLIT_NAMES["val"], ", or data.holdout to validate on training images"
        )
        labels = config.val_labels and folder / config.val_labels
        if labels and not os.path.exists(labels):
            raise UserError(f"the label file {labels} does not exist: set data.val_labels (relative to data.dir)")


def _check_split(folder: Path, name: str, field: str, usual: tuple[str, ...], otherwise: str) -> None:
    wanted = folder / name
    if os.path.lexists(wanted) or not _may_list(folder) or find_source(wanted):
        return  # what is wrong with it, the scan says
    there = _entries(folder)
    below = [os.path.join("data", entry) for entry in _entries(folder / "data")]  # as Hugging Face lays them
    offered = list(dict.fromkeys(offer for entry in there + below if (offer := _offer(entry, usual)) and offer != name))
    if folder.name == name:
        remedy = f"data.dir is the folder above: set it to {folder.parent}"
    elif len(offered) == 1:
        remedy = f"there is {offered[0]}: set {field} {offered[0]}{otherwise}"
    else:
        found = f" (data.dir holds {', '.join(there[:4])}{', ...' if len(there) > 4 else ''})" if there else ""
        remedy = f"set data.dir, or {field}{otherwise}{found}"
    raise UserError(f"the data folder {wanted} does not exist: {remedy}")


def _entries(folder: Path) -> list[str]:
    return sorted(e for e in os.listdir(folder) if not e.startswith(".")) if _may_list(folder) else []


def _offer(entry: str, usual: tuple[str, ...]) -> str | None:
    """What to give for an entry of data.dir if its name is that of the split: its name, or a pattern if it is a shard."""
    folder, name = os.path.split(entry)
    if shard := re.fullmatch(r"(.+?)-\d+(?:-of-\d+)?\.(tar|parquet)", name):
        pattern = f"'{os.path.join(folder, shard[1])}-*.{shard[2]}'"
        return pattern if shard[1].lower() in usual else None
    return entry if name.split(".")[0].lower() in usual else None


def _check_table(folder: Path, name: str, field: str, otherwise: str) -> None:
    """As `_check_split`, for a table of several labels an image."""
    wanted = folder / name
    if os.path.lexists(wanted) or not _may_list(folder):
        return  # what is wrong with it, the scan says
    there = sorted(
        entry for entry in os.listdir(folder) if entry.lower().endswith(".csv") and not entry.startswith(".")
    )
    offered = f" to {' or '.join(there[:4])}{' or another' if len(there) > 4 else ''}, which data.dir holds"
    none = f" to a CSV file (data.dir, {folder}, holds none)"
    raise UserError(
        f"the table {wanted} does not exist: with data.labels multi, set {field}{offered if there else none}{otherwise}"
    )


def _may_list(folder: Path) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)


def _cache(root: Path, folder: Path) -> Path:
    """The cache file for `root`, and a line on stderr if the one beside it belongs to someone else."""
    cache = cache_beside(root, folder)
    if cache.parent == folder and os.access(root.parent, os.W_OK):
        print(
            f"warning: the index cache beside {root} cannot be read and written by this user: {cache} is used instead",
            file=sys.stderr,
            flush=True,
        )
    return cache


def _hold_out(index: DatasetIndex, images: int) -> tuple[DatasetIndex, DatasetIndex]:
    """All but a random choice of so many images, and that choice."""
    if images >= len(index):
        raise UserError(f"data.holdout {images} leaves none of the {len(index)} training images: lower it")
    order = epoch_order(len(index), HOLDOUT_SEED, epoch=0)
    return index.take(np.sort(order[images:])), index.take(np.sort(order[:images]))
