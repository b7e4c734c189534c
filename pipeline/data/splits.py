"""Where the training and the validation set are, where the configuration does not name them itself."""

import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Literal

from pipeline.config import Config, DataConfig
from pipeline.data.folder import COMPRESSED_TARS
from pipeline.data.image_files import is_image_by_name
from pipeline.data.sources import find_source
from pipeline.data.split_names import SPLIT_NAMES
from pipeline.data.table import SUFFIXES
from pipeline.errors import UserError
from pipeline.paths import is_present

Split = Literal["train", "val"]

# Folders inside data.dir that may hold the splits: Hugging Face's, in a repository and as converted, and Kaggle's ImageNet.
INSIDE = ("", "data", "default", "ILSVRC/Data/CLS-LOC")
# Tables of well-known data sets, and the entry that is taken before them.
KNOWN_TABLES: dict[Split, Sequence[tuple[str, str]]] = {
    "train": [("train_test_split.txt", "train")],
    "val": [
        ("train_test_split.txt", "val"),
        ("LOC_val_solution.csv", "val"),
        ("val/val_annotations.txt", ""),
    ],
}
# ImageNet's, as they are downloaded, by the fields that take them.
IMAGENETS_ARCHIVES = {
    "data.train": "ILSVRC2012_img_train.tar",
    "data.val": "ILSVRC2012_img_val.tar",
    "data.val_labels": "ILSVRC2012_devkit_t12.tar.gz",
}
FILES = {*SUFFIXES, ".tar", ".zip", ".parquet"}  # that may be a split
NAMED = 4  # of what is there, in a message
INSTEAD = ", or data.holdout to validate on training images"


def find_splits(config: DataConfig) -> DataConfig:
    """The configuration with the sets that are there, before either is scanned, which can take an hour.

    Where data.dir is the training set itself, the folder above, which holds both sets, is taken. Where data.train or data.val
    is left at its default, and data.dir has no entry of that name but one of another usual name (valid, validation, test, ...;
    data/validation-\\*.parquet; a well-known table), that one is taken. Both are reported on stderr.

    Raises:
        UserError: a set is missing; names what is there instead.
    """
    config = _above_train(config)
    config = dataclasses.replace(config, train=_find(config, "train"))
    if config.holdout:
        return config
    config = dataclasses.replace(config, val=_find(config, "val"))
    labels = config.val_labels and Path(config.dir, config.val_labels)
    if labels and not os.path.exists(labels):
        raise UserError(f"the label file {labels} does not exist: set data.val_labels (relative to data.dir)")
    return config


def splits_found(config: DataConfig) -> DataConfig:
    """`find_splits` of sets that were opened before, when what is taken was said."""
    with redirect_stderr(io.StringIO()):
        return find_splits(config)


def with_sets_found(config: Config) -> Config:
    """The configuration with the sets that its run has found, where it names none (``data.val: test``).

    A run resumes with either: which images they are is compared, and not where they lie.
    """
    if config.data.dataset != "images" or config.data.loader == "synthetic":
        return config
    return dataclasses.replace(config, data=splits_found(config.data))


def find_validation(config: DataConfig) -> str:
    """The validation set that a run with this configuration would take in data.dir, relative to that; empty if there is none.

    What data.val names counts where it is there; left at its default, another usual name counts only beside a training set, as
    data.dir may be a folder of classes.
    """
    if not os.path.isdir(config.dir):
        return ""
    with redirect_stderr(io.StringIO()), suppress(UserError):
        if config.val == "val":
            _find(config, "train")
        return _find(config, "val")
    return ""


def _above_train(config: DataConfig) -> DataConfig:
    """The configuration with the folder that holds both sets, where data.dir is the training set itself, which is reported."""
    folder = Path(os.path.abspath(config.dir))
    above, names = folder.parent, SPLIT_NAMES["train"] if config.train == "train" else (config.train,)
    if config.labels == "multi" or not {folder.name, folder.name.lower()} & set(names):
        return config
    if os.path.lexists(folder / config.train) or _offered(folder, SPLIT_NAMES["train"], tables_only=False):
        return config  # it holds a training set
    val = os.path.lexists(above / config.val) or (
        config.val == "val" and _offered(above, SPLIT_NAMES["val"], tables_only=False)
    )
    if not (val or config.holdout):
        return config
    print(
        f"data.dir {config.dir} is the training images: {above} is taken, which holds them", file=sys.stderr, flush=True
    )
    return dataclasses.replace(config, dir=str(above), train=folder.name)


def _find(config: DataConfig, split: Split) -> str:
    folder, name, several = Path(config.dir), config.train if split == "train" else config.val, config.labels == "multi"
    found = ""
    left_to_us = name == split
    if left_to_us and not several and not (split == "val" and config.val_labels):
        tables = (
            t for t, but in KNOWN_TABLES[split] if (folder / t).is_file() and not (but and (folder / but).exists())
        )
        found = next(tables, "")
    wanted = folder / name
    if not found:
        unreadable = not _may_list(folder) and is_present(folder) and (several or not folder.is_file())
        if os.path.lexists(wanted) or unreadable or (not several and find_source(wanted)):
            return name  # what is wrong with it, the scan says
        offered = _offered(folder, SPLIT_NAMES[split], tables_only=several)
        # The first usual name that is there, if it is there once; a folder `train` given as data.dir has none inside.
        nearest = next(iter(offered.values()), [])
        if not left_to_us or len(nearest) != 1:
            _refuse(config, split, [offer for offers in offered.values() for offer in offers])
        found = nearest[0]
    print(f"data.{split} is {found}, as {folder} has no '{name}' with a folder a class", file=sys.stderr, flush=True)
    return found


def _offered(folder: Path, usual: tuple[str, ...], tables_only: bool) -> dict[str, list[str]]:
    """What to give for a split, by its usual name, in the order of those: names of entries, or patterns of shards."""
    found: dict[str, list[str]] = {}
    for inside in INSIDE:
        for entry in _entries(folder / inside):
            suffix = os.path.splitext(entry)[1].lower()
            if not (suffix in SUFFIXES if tables_only else suffix in FILES or (folder / inside / entry).is_dir()):
                continue
            name, offer = _offer(os.path.join(inside, entry))
            if name in usual and offer not in found.setdefault(name, []):
                found[name].append(offer)
    return {name: found[name] for name in usual if name in found}


def _offer(entry: str) -> tuple[str, str]:
    """The split that an entry of data.dir may be, and what to give for it: its name, or a pattern if it is a shard."""
    folder, name = os.path.split(entry)
    if shard := re.fullmatch(r"(.+?)-\d+(?:-of-\d+)?\.(tar|parquet)", name):
        return shard[1].lower(), f"{os.path.join(folder, shard[1])}-*.{shard[2]}"
    return name.split(".")[0].lower(), entry


def _refuse(config: DataConfig, split: Split, offered: list[str]) -> None:
    folder, name, field = Path(config.dir), config.train if split == "train" else config.val, f"data.{split}"
    instead = INSTEAD if split == "val" else ""
    there = _entries(folder)
    if config.labels == "multi":
        tables = [entry for entry in there if os.path.splitext(entry)[1].lower() in SUFFIXES]
        some = f" to {' or '.join(tables[:4])}{' or another' if len(tables) > 4 else ''}, which data.dir holds"
        none = f" to a CSV file (data.dir, {folder}, holds none)"
        raise UserError(
            f"the table {folder / name} does not exist: with data.labels multi, set {field}{some if tables else none}{instead}"
        )
    if folder.is_file():
        remedy = f"data.dir is a file: set data.dir {folder.parent} and {field} {folder.name}"
    elif IMAGENETS_ARCHIVES[field] in there:
        remedy = f"ImageNet's archives are read as they are: set {_imagenets_archives(split, there)}"
    elif folder.name == name:
        remedy = f"data.dir is the folder above: set it to {folder.parent}"
    elif split == "train" and config.holdout and name == "train" and _holds_classes(folder):
        remedy = f"if {folder} holds the classes, set data.dir {folder.parent} and data.train {folder.name}"
    elif len(offered) == 1:
        quoted = f"'{offered[0]}'" if "*" in offered[0] else offered[0]
        remedy = f"there is {quoted}: set {field} {quoted}{instead}"
    elif len(offered) > 1:
        several = f"{', '.join(offered[:NAMED])}{', ...' if len(offered) > NAMED else ''}"
        remedy = f"there are {several}: set {field} to one of them{instead}"
    elif split == "train" and (tables := [entry for entry in there if os.path.splitext(entry)[1].lower() in SUFFIXES]):
        remedy = f"if {' or '.join(tables[:NAMED])} names the images and their classes, set data.train {tables[0]}"
    elif packed := [e for e in there if _offer(e)[0] in SPLIT_NAMES[split] and e.lower().endswith(COMPRESSED_TARS)]:
        remedy = f"there is {packed[0]}, of which no image can be read by itself: unpack it"
    else:
        found = f" (data.dir holds {', '.join(there[:NAMED])}{', ...' if len(there) > NAMED else ''})" if there else ""
        remedy = f"set data.dir, or {field}{instead}{found}"
    raise UserError(f"the data folder {folder / name} does not exist: {remedy}")


def _imagenets_archives(split: Split, there: list[str]) -> str:
    """The fields to set for those that are there, from this split on, and which are not there."""
    wanted = {field: name for field, name in IMAGENETS_ARCHIVES.items() if split == "train" or field != "data.train"}
    fields = ", ".join(f"{field} {name}" for field, name in wanted.items() if name in there)
    lacking = " and ".join(name for name in wanted.values() if name not in there)
    return f"{fields} (for validation add {lacking}{INSTEAD})" if lacking else fields


def _holds_classes(folder: Path) -> bool:
    """Whether the first folder in it holds images."""
    first = next((entry for entry in _entries(folder) if (folder / entry).is_dir()), None)
    return first is not None and any(map(is_image_by_name, _entries(folder / first)))


def _entries(folder: Path) -> list[str]:
    return sorted(e for e in os.listdir(folder) if not e.startswith(".")) if _may_list(folder) else []


def _may_list(folder: Path) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)
