"""The training and the validation set that a configuration names."""

import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.arrays import CLASSES_OF_TORCHVISION, ArraySource, index_arrays
from pipeline.data.checks import untaught_rows
from pipeline.data.image_files import pixel_format
from pipeline.data.index import DatasetIndex, taken_fingerprint
from pipeline.data.index_cache import cache_beside
from pipeline.data.label_table_source import LabelTableSource
from pipeline.data.labels import labels_needed
from pipeline.data.plan import epoch_order
from pipeline.data.scan import scan_classes, scan_flat, scan_label_table
from pipeline.data.source import FileSource
from pipeline.data.sources import open_source
from pipeline.data.splits import Split, find_splits, find_validation, splits_found
from pipeline.data.synthetic import synthetic_index
from pipeline.data.table import Columns, TableSource, columns_of, is_table
from pipeline.errors import UserError, look_up

CHEAP = 32 << 20  # bytes of a kept index, of some 300,000 images
HOLDOUT_SEED = 0  # not the run's: whatever that is, runs are compared on the same images

Opener = Callable[[DataConfig, Split, tuple[str, ...], Path | None, bool], DatasetIndex]


def open_datasets(
    config: DataConfig, cache: Path | None, *, progress: bool, download: bool = True
) -> tuple[DatasetIndex, DatasetIndex]:
    """Index the training and the validation images.

    The classes are those of the training set; the validation set may have a part of them.

    Args:
        cache: folder for what was found, where that cannot be kept beside the images; None to write nothing anywhere.
        progress: show progress bars.
        download: do what config.download says; a dry run does not.

    Raises:
        UserError: see `scan_classes`, `scan_flat` and `read_arrays`; the validation set has a class that the training set has
            not; too many images are held out; or of several labels an image one of the two sets can tell nothing.
    """
    if config.download and not download:
        try:
            return open_datasets(dataclasses.replace(config, download=False), cache, progress=progress)
        except UserError as error:
            raise UserError(f"{error}; a dry run downloads nothing") from None
    opener = _open_synthetic if config.loader == "synthetic" else look_up(DATASETS, config.dataset, "data.dataset")
    if opener is _open_files:
        config = find_splits(config)
    train = opener(config, "train", (), cache, progress)
    if config.holdout:
        parts = _hold_out(train, config.holdout)
        if train.several_labels:
            _check_held_out(train, *parts)
        elif untaught_rows(*parts).all():
            raise UserError(
                f"none of the {config.holdout:,} held-out images is of a class of which other images are left to train on: "
                "lower data.holdout, or check that the classes are what they ought to be"
            )
        return parts
    return train, opener(config, "val", train.classes, cache, progress)


def source_of(config: DataConfig, split: Split) -> FileSource:
    """The images of a set, of which nothing is read yet; of a table with splits its own.

    Args:
        config: with the sets that were found (`find_splits`).

    Raises:
        UserError: as `open_source`.
    """
    root = Path(config.dir, config.train if split == "train" else config.val)
    if config.labels == "multi":
        return label_table_source(config, split, None)
    if not is_table(root):
        return open_source(root)
    columns = Columns(config.file_column, config.label_column, split)
    return TableSource(str(root), open_source(config.dir), columns, *_other_set(config, split))


def label_table_source(config: DataConfig, split: Split, classes: tuple[str, ...] | None) -> LabelTableSource:
    """The images of a set with several labels an image, and those labels.

    Args:
        classes: those that there may be, in the order of the network's outputs; None for the table's own.
    """
    root = Path(config.dir, config.train if split == "train" else config.val)
    return LabelTableSource(str(root), open_source(config.dir), classes, split, *_other_set(config, split))


def _other_set(config: DataConfig, split: Split) -> tuple[str | None, str | None]:
    """The table of the run's other set, or its place in the data folder, if it is a folder there."""
    if config.holdout:
        return None, None
    other = Path(config.dir, config.val if split == "train" else config.train)
    if is_table(other):
        return str(other), None
    place = os.path.relpath(other, config.dir)
    return None, place if other.is_dir() and place != os.curdir and not place.startswith(os.pardir) else None


def known_images(config: DataConfig, split: Split, classes: tuple[str, ...], cache: Path) -> DatasetIndex | None:
    """The images that a run has trained on, or was validated on, where it is cheap to tell: their index is kept, and has no
    more than `CHEAP` bytes.

    Args:
        config: with the sets that were found (`find_splits`).
        classes: the run's.
        cache: folder where the run has kept it, where that cannot be beside the images.

    Raises:
        UserError: as `open_datasets`.
    """
    where: Split = "train" if config.holdout else split
    kept = cache_beside(Path(config.dir, config.train if where == "train" else config.val), cache)
    if not kept.is_file() or kept.stat().st_size > CHEAP:
        return None
    index = _open_files(config, where, classes if where == "val" else (), cache, False)
    return _hold_out(index, config.holdout)[split == "val"] if config.holdout else index


def to_evaluate(root: str | Path, config: DataConfig, images: Path | None = None, split: str = "val") -> FileSource:
    """The images at a path that is not the configuration's, to be evaluated: of a table with splits those of one, by the
    configuration's columns.

    Args:
        split: as `label_table.name_of_split` takes it.
        images: where those of a table lie; None: beside it.

    Raises:
        UserError: as `open_source`.
    """
    if not is_table(root):
        return open_source(root)
    source = open_source(images or os.path.dirname(root) or os.curdir)
    return TableSource(str(root), source, columns_of(root, config, split))


def images_text(train: DatasetIndex, val: DatasetIndex, config: DataConfig) -> str:
    """How many images a run has, whether those for validation are held out, and which folder of others it then leaves aside."""
    numbers = f"{len(train):,} training and {len(val):,} validation images"
    if not config.holdout:
        return numbers
    aside = _validation_folder(config) if config.dataset == "images" and config.loader != "synthetic" else None
    return f"{numbers} (held out of the training images{f'; {aside} is not read' if aside else ''})"


def _validation_folder(config: DataConfig) -> Path | None:
    """The folder of validation images beside a folder of training images; tables say themselves which images are read."""
    config = splits_found(config)
    folders = [Path(config.dir, name) for name in (config.train, find_validation(config))]
    train, val = (Path(os.path.realpath(folder)) for folder in folders)
    apart = train not in (val, *val.parents) and val not in train.parents
    return folders[1] if train.is_dir() and val.is_dir() and apart else None


def fingerprint_of(train: DatasetIndex, val: DatasetIndex) -> str:
    """SHA-256 of what the two sets of a run hold; see `DatasetIndex.fingerprint`."""
    return _of_both(train.fingerprint, val.fingerprint)


def seen_held_out(held_out: DatasetIndex, others: int, holdout: int, seen: tuple[str | None, str | None]) -> int:
    """How many of the images that a run holds out another run has trained on, as far as its fingerprints tell.

    On all of them if it trained on the whole set; if it held out fewer images of that, on the rest, as the same ones come first
    (`_hold_out`).

    Args:
        others: how many training images are left to this run.
        holdout: how many the other run held out.
        seen: the fingerprints of the other run's images (`fingerprint_of`), and of its validation images alone.
    """
    both, of_validation = seen
    if not (held_out.whole and both and of_validation):
        return 0
    if not holdout:
        return len(held_out) if _of_both(held_out.whole, of_validation) == both else 0
    if holdout >= len(held_out):
        return 0
    order = epoch_order(len(held_out) + others, HOLDOUT_SEED, epoch=0)
    theirs = taken_fingerprint(held_out.whole, np.sort(order[:holdout]))
    return len(held_out) - holdout if theirs == of_validation else 0


def has_trained_on(train: DatasetIndex, seen: tuple[str | None, str | None]) -> bool:
    """Whether another run's training images were these.

    Args:
        seen: as `seen_held_out` takes it.
    """
    both, of_validation = seen
    return both is not None and of_validation is not None and _of_both(train.fingerprint, of_validation) == both


def _of_both(train: str, val: str) -> str:
    return hashlib.sha256((train + val).encode()).hexdigest()


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
        return _open_label_table(config, split, root, classes or None, kept, progress)
    if (config.file_column or config.label_column) and not is_table(root):
        raise UserError(
            f"{root} is no table, and data.file_column and data.label_column are for tables: leave them out"
        )
    if split == "val" and config.val_labels:
        labels = Path(config.dir, config.val_labels)
        return scan_flat(root, labels, classes, kept, progress=progress, pixel_format=pixel_format(config))
    source = source_of(config, split)
    if split == "train":
        return scan_classes(
            source, kept, progress=progress, pixel_format=pixel_format(config), corrupt_images=config.corrupt_images
        )
    val = scan_classes(
        source,
        kept,
        progress=progress,
        empty_classes=True,
        pixel_format=pixel_format(config),
        labels_field="data.val_labels",
    )
    odd = sorted(set(val.classes) - set(classes))
    if odd and len(odd) == len(val.classes):
        raise UserError(
            f"the classes of training and validation differ: {root} has none of the training classes, but '{odd[0]}'; "
            f"{labels_needed(root, 'data.val_labels')}"
        )
    if odd:
        training = Path(config.dir, config.train)
        one_table = training == root
        trained = f"of {root} training's lines have" if one_table else f"{training} has"
        validated = "validation's have" if one_table else f"{root} has"
        raise UserError(
            f"the classes of training and validation differ: {trained} no class '{odd[0]}', which {validated}: remove it "
            "there, or set data.holdout to validate on training images"
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
    config: DataConfig, split: Split, table: Path, classes: tuple[str, ...] | None, cache: Path, progress: bool
) -> DatasetIndex:
    """Images in data.dir with the labels of a CSV file."""
    if table.is_dir():
        raise UserError(
            f"{table} is a folder: with data.labels multi data.train and data.val are CSV files in data.dir, which name the "
            "images and their labels"
        )
    corrupt_images = config.corrupt_images if split == "train" else None
    source = label_table_source(config, split, classes)
    index = scan_label_table(
        source, cache, progress=progress, pixel_format=pixel_format(config), corrupt_images=corrupt_images
    )
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
