"""What looks wrong about a training and a validation set although both can be read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.archive import TarSource
from pipeline.data.arrays import ArraySource
from pipeline.data.folder import FolderSource
from pipeline.data.index import DatasetIndex
from pipeline.data.reader import read_all
from pipeline.data.synthetic import SyntheticSource
from pipeline.data.table import TableSource, is_table, lines_of_other_splits, split_like_columns
from pipeline.data.zip_archive import ZipSource
from pipeline.words import agreed, counted

COMPARED = 32  # validation images that are compared byte by byte with training images of the same length
CANDIDATES = 4  # training images of its name and length, and others of its length, that one of them is compared with
FULL = [0] * CANDIDATES

T = TypeVar("T")


def warnings_about(train: DatasetIndex, val: DatasetIndex | None, config: DataConfig) -> list[str]:
    """Return a line for each thing that a user should know before hours of training; nothing is decoded for it.

    Args:
        val: None where only one set is looked at.
        config: with the training set that was found (`find_splits`).
    """
    lines = [] if train.several_labels else [*_about_classes(train), *_about_folders(train)]
    lines += _about_columns(
        Path(train.root if isinstance(train.source, TableSource) else Path(config.dir, config.train))
    )
    if val is not None and not config.holdout:
        lines += _about_both(train, val)
    elif val is not None:
        lines += [*([] if train.several_labels else _about_held_out(train, val)), *_about_unread(val, config)]
    return lines


def _about_columns(table: Path) -> list[str]:
    """A column that says which lines are for training, but is not called so."""
    like = split_like_columns(table) if is_table(table) else []
    return [
        f"{table} has a column '{name}' of nothing but names of splits, which is not read, so that all lines are taken alike: "
        "if it says which lines are for training, call it split"
        for name in like
    ]


def untaught_rows(train: DatasetIndex, val: DatasetIndex) -> np.ndarray:
    """(N) bool: the validation images of classes of which no image is trained on."""
    return ~np.isin(val.labels, train.labels)


def _about_held_out(train: DatasetIndex, val: DatasetIndex) -> list[str]:
    untaught = untaught_rows(train, val)
    if not untaught.any():
        return []
    example = val.classes[val.labels[untaught][0]]
    return [
        f"{untaught.sum():,} of the {len(val):,} held-out images are of classes of which no image is left to train on (as "
        f"'{example}'), so that every answer to them will be wrong: lower data.holdout, or set data.val"
    ]


def _about_unread(val: DatasetIndex, config: DataConfig) -> list[str]:
    """Validation images that a table or data.val names beside those that are held out; without data.holdout a folder's `val` is
    what nobody has named."""
    table = Path(config.dir, config.train)
    lines = lines_of_other_splits(table, config) if is_table(table) else 0
    if lines:
        unread = f"of {table} the {counted(lines, 'line')} of other splits {agreed(lines, 'is', 'are')} not read"
        instead = f"to validate on those set data.val {config.train} and leave out data.holdout"
    elif config.val != "val":
        unread, instead = f"data.val {config.val} is not read", "to validate on it leave out data.holdout"
    else:
        return []
    held_out = f"{counted(len(val), 'training image')} {agreed(len(val), 'is', 'are')} held out to validate on"
    return [f"{unread}, as {held_out}: {instead}"]


def _about_classes(train: DatasetIndex) -> list[str]:
    images = np.bincount(train.labels, minlength=len(train.classes))
    if len(train.classes) == 1:
        return [
            f"{train.root} holds one class ('{train.classes[0]}'), so that every answer is right: "
            f"{_other_classes(train, 'give the folder of the class folders')}"
        ]
    if images.max() == 1:
        return [
            f"{train.root} holds one image a class ({len(images):,} of them): if these are not the classes, "
            f"{_other_classes(train, 'give one folder a class')}"
        ]
    return []


def _other_classes(train: DatasetIndex, of_folders: str) -> str:
    """What to do if the classes are others: in a table, or elsewhere, or in class folders as `of_folders` says."""
    if isinstance(train.source, TableSource):
        return "set data.label_column to the column of the classes"
    return of_folders if isinstance(train.source, FolderSource | TarSource | ZipSource) else "correct the labels"


def _about_folders(train: DatasetIndex) -> list[str]:
    """All classes have several folders of images and no image of their own, so that those may be the classes; not where a table
    or a shard says of each image which class it has."""
    if not isinstance(train.source, FolderSource | TarSource | ZipSource):
        return []
    _, first = np.unique(train.labels, return_index=True)
    if len(train.classes) == 1 or not all(_is_below(train, i) for i in first.tolist()):
        return []
    folders: dict[int, set[str]] = {}
    for i, label in enumerate(train.labels.tolist()):
        if not _is_below(train, i):
            return []
        folders.setdefault(label, set()).add(os.path.dirname(train.names[i]))
    if min(map(len, folders.values())) < 2:
        return []
    count = sum(map(len, folders.values()))
    return [
        f"every class of {train.root} holds folders of images ({count:,} in all), which count as their class's: if those are "
        "the classes, move them up"
    ]


def _is_below(index: DatasetIndex, i: int) -> bool:
    """Whether image `i` lies in a folder of its class's folder."""
    return index.names[i].count(os.sep) > 1


def _about_both(train: DatasetIndex, val: DatasetIndex) -> list[str]:
    if (
        os.path.exists(val.root)
        and os.path.realpath(train.root) == os.path.realpath(val.root)
        and train.names == val.names
    ):
        return [
            f"training and validation images are the same ({val.root}): the error will be that of images that the network has "
            "seen; set data.val, or data.holdout"
        ]
    if not (same := same_images(train, val)):
        return []
    mend = "correct the labels, or remove them" if same.conflicts else "remove them"
    return [
        f"validation images are training images too, {same.told()}: {same.effect}; {mend} from one of the sets "
        "(python -m tools.index --verify lists all)"
    ]


@dataclass(frozen=True)
class SameImages:
    """What is known of the images that are in two sets.

    Attributes:
        text: how many they are at least, with an example.
        found: how many were found.
        conflicts: how many of those have one class each, and another one in the other set.
    """

    text: str
    found: int
    conflicts: int

    def told(self, with_classes: bool = True) -> str:
        """How many they are at least, with an example, and how many of them have another class in the other set."""
        if not with_classes or not self.conflicts:
            return self.text
        return f"{self.text} ({self.conflicts:,} of these {self.found:,} with another class there)"

    @property
    def effect(self) -> str:
        """What such validation images do to the error of a network that has trained on the training images."""
        if not self.conflicts:
            return "they make the error too low"
        if self.conflicts < self.found:
            return "those of the same class make the error too low, the others too high"
        return "they make the error too high"


def same_images(train: DatasetIndex, val: DatasetIndex) -> SameImages | None:
    """How many images of `val` are in both sets, as far as a few tell that are compared byte by byte; None if none is.

    Compared are COMPARED images evenly spread over `val`, of which the number that is in both is told apart, and as many of
    those that have the name and the length of a training image, among which the share would be too high. Each is compared with
    up to CANDIDATES images of its name and length, and as many others of its length.
    """
    candidates, spread = _alike(train, val)
    copies: dict[int, int] = {}
    conflicts = []
    for j, rows in candidates.items():
        content = _bytes(val, j)
        if same := [i for i in rows if _bytes(train, i) == content]:
            agreeing = [i for i in same if _have_one_class(train, i, val, j)]
            copies[j] = (agreeing or same)[0]
            if not agreeing:
                conflicts.append(j)
    if not copies:
        return None
    j = (conflicts or list(copies))[0]
    example, other = val.location(j), train.location(copies[j])
    copied = "" if other == example else f" is {other}"
    evenly = f" and {len(copies.keys() & spread)} of {len(spread)} taken evenly" if len(spread) < len(val) else ""
    return SameImages(
        f"at least {len(copies):,} of {len(val):,}{evenly}, as {example}{copied}", len(copies), len(conflicts)
    )


def _have_one_class(train: DatasetIndex, i: int, val: DatasetIndex, j: int) -> bool:
    """Whether two images have the same class by its name; of several labels this is not judged, and taken as so."""
    return train.several_labels or val.several_labels or train.classes[train.labels[i]] == val.classes[val.labels[j]]


def _alike(train: DatasetIndex, val: DatasetIndex) -> tuple[dict[int, list[int]], set[int]]:
    """For some rows of val the rows of train that may be the same file, as they have the same length: for those that have some
    of the same name, too, and for others, evenly spread over the validation set; and which are spread."""
    if isinstance(val.source, ArraySource | SyntheticSource):  # they are not files
        return {}, set()
    keys = [_key(val, j) for j in range(len(val))]
    spread = _spread(range(len(val)))
    wanted, named = set(keys), dict[tuple[str, int], list[int]]()
    lengths: dict[int, list[int]] = {keys[j][1]: [] for j in spread}
    for i, (name, length) in enumerate(zip(train.names, train.lengths.tolist(), strict=True)):
        key = os.path.basename(name), length
        if key in wanted and len(rows := named.setdefault(key, [])) < CANDIDATES:
            rows.append(i)
        if len(rows := lengths.get(key[1], FULL)) < CANDIDATES:
            rows.append(i)
    of_same_name = _spread([j for j, key in enumerate(keys) if key in named])
    candidates = {j: named[keys[j]] for j in of_same_name}
    for j in spread:
        first = named.get(keys[j], [])
        candidates[j] = [*first, *(i for i in lengths[keys[j][1]] if i not in first)]
    return candidates, set(spread)


def _key(index: DatasetIndex, i: int) -> tuple[str, int]:
    return os.path.basename(index.names[i]), int(index.lengths[i])


def _spread(items: Sequence[T]) -> list[T]:
    """Up to COMPARED of the items, evenly spread."""
    count = min(COMPARED, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def _bytes(index: DatasetIndex, i: int) -> bytes:
    try:
        with index.open(i) as stream:
            return read_all(stream, int(index.lengths[i])).tobytes()
    except OSError:  # the run that needs it says so
        return f"unreadable {index.location(i)}".encode()
