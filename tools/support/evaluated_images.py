"""The images that networks are evaluated on: which they are, and whether a network has trained on them."""

import dataclasses
import io
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Config, DataConfig
from pipeline.data.checks import SameImages, same_images
from pipeline.data.dataset import DATASETS, has_trained_on, known_images, to_evaluate
from pipeline.data.image_files import pixel_format
from pipeline.data.index import DatasetIndex
from pipeline.data.index_cache import known_cache
from pipeline.data.label_table import name_of_split
from pipeline.data.label_table_source import LabelTableSource
from pipeline.data.scan import scan_classes, scan_flat, scan_label_table
from pipeline.data.sources import open_source
from pipeline.data.splits import Split, find_splits, find_validation
from pipeline.data.table import TableSource, columns_of, is_table, is_table_by_name, splits_in
from pipeline.errors import UserError
from pipeline.weights import OwnWeights, Weights, checksum, read_file, weights_file
from tools.support.candidate import Candidate
from tools.support.label_files import find_label_file

ON_NEW_IMAGES = "new images usually have a higher error"  # than images that a network was trained on


def are_same_images(a: DataConfig, b: DataConfig) -> bool:
    fields = (
        "dataset",
        "train",
        "val",
        "val_labels",
        "depth",
        "exif_orientation",
        "labels",
        "file_column",
        "label_column",
    )
    return all(getattr(a, field) == getattr(b, field) for field in fields)


def hold_the_same(a: DatasetIndex, b: DatasetIndex) -> bool:
    """Whether two indexes are of the same images with the same labels, whatever their classes are called."""
    if a.names != b.names or not np.array_equal(a.lengths, b.lengths):
        return False
    if os.path.realpath(a.root) != os.path.realpath(b.root) and len(set(a.lengths.tolist())) == 1:  # which tell nothing
        return False
    if a.several_labels:
        return a.labels.shape == b.labels.shape and (a.classes != b.classes or np.array_equal(a.labels, b.labels))
    pairs = set(zip(a.labels.tolist(), b.labels.tolist(), strict=True))
    return len(pairs) == len({label for label, _ in pairs}) == len({label for _, label in pairs})


@dataclass(frozen=True)
class _Run:
    """A run whose images are looked for.

    Attributes:
        file: of its weights.
        data: its configuration's.
        seen: fingerprints of all its images, and of its validation images alone, as `OwnWeights` has them.
    """

    file: str
    data: DataConfig
    seen: tuple[str | None, str | None]

    @classmethod
    def of(cls, file: str, weights: Weights | OwnWeights) -> "_Run":
        return cls(file, weights.config.data, (weights.fingerprint, weights.val_fingerprint))


def trained_on(candidate: Candidate) -> str:
    """Which of the images the network was trained on, and what that means for its error, in words; empty if none of those that
    are looked at.

    They are all of them where they lie where the run's training images lay; else a few are compared with those, as long as
    these are there and it is cheap (`known_images`). So are those of the run whose weights it began with, and so on.
    """
    weights = candidate.weights
    run = _Run.of(weights.origin, weights)
    if images := _all_trained_on(run, candidate):
        return f"{images}: {ON_NEW_IMAGES}"
    if found := _compared(run, "train", candidate):
        if found.unchanged and found.same.conflicts:
            return f"{_told(found, candidate, with_classes=True)}: {found.same.effect}"
        return f"{_told(found, candidate)}: {ON_NEW_IMAGES}"
    for before in _begun_with(weights.config):
        if found := _compared(before, "train", candidate):
            told = _told(found, candidate)
            return f"{told}: so were the weights that it began with, {before.file}; {ON_NEW_IMAGES}"
    return ""


def _begun_with(config: Config) -> Iterator[_Run]:
    """The run whose weights a run began with, the one whose weights that began with, and so on, as long as the files are there,
    are of this project and have not changed."""
    seen = set()
    while config.model.weights and config.model.weights_sha256:
        try:
            file = str(weights_file(config.model.weights))
            if file in seen or checksum(file) != config.model.weights_sha256.lower():
                return
            own = read_file(Path(file))
        except (UserError, OSError):  # it has gone, or is not for this user
            return
        if not isinstance(own, OwnWeights):
            return
        yield _Run.of(file, own)
        seen.add(file)
        config = own.config


def chosen_by(candidate: Candidate) -> str:
    """Which of the images the run's best epoch was chosen by, in words, where they are not just those that it was validated on;
    empty if these are not the best epoch's weights, or none of the images that are looked at is among those.

    They are compared as in `trained_on`.
    """
    weights = candidate.weights
    if not weights.is_best or weights.config.optim.epochs < 2 or candidate.index.fingerprint == weights.val_fingerprint:
        return ""
    found = _compared(_Run.of(weights.origin, weights), "val", candidate)
    return _told(found, candidate) if found else ""


def _all_trained_on(run: _Run, candidate: Candidate) -> str:
    """That all images lie where the run's training images lay, in words; else empty."""
    index, data = candidate.index, run.data
    if not _has_files(run, candidate) or isinstance(index.source, TableSource) or index.several_labels:
        return ""  # of a table they are perhaps the lines of another split
    with redirect_stderr(io.StringIO()), suppress(UserError):  # the run has said where it found them; they may be gone
        data = find_splits(data)
        if os.path.realpath(index.root) == os.path.realpath(os.path.join(data.dir, data.train)):
            held = (
                f" (but for {data.holdout:,}; --data {data.dir} --held-out evaluates those alone)"
                if data.holdout
                else ""
            )
            return f"the images in {index.root}{held}"
    return ""


@dataclass(frozen=True)
class _Found:
    """Images of a run among those that are evaluated.

    Attributes:
        same: what is known of them.
        run: whose they are.
        split: of which of its sets.
        unchanged: that set is what it was, and does not just lie where it lay; None: that is not known.
    """

    same: SameImages
    run: _Run
    split: Split
    unchanged: bool | None

    @property
    def provided(self) -> str:
        """Under which condition it holds of the images that the run had; empty where it is known to hold."""
        if self.unchanged:
            return ""
        changed = "" if self.unchanged is None else f" (the images of the run of {self.run.file} have changed since)"
        if not self.run.data.holdout:
            return f", if they were there then{changed}"
        held_out = "and not held out" if self.split == "train" else "and held out"  # others may be now
        return f", if they were there then {held_out}{changed}"


def _compared(run: _Run, split: Split, candidate: Candidate) -> _Found | None:
    """Which of the images a run has trained on, or was validated on, as far as a few tell; None if none."""
    if not _has_files(run, candidate):
        return None
    # Classes may have been given other names since.
    classes = candidate.weights.run_classes or candidate.weights.classes
    index = dataclasses.replace(candidate.index, classes=classes)
    with redirect_stderr(io.StringIO()), suppress(UserError):  # the run has said where it found them; they may be gone
        cache = Path(run.file).parent.parent / "index"
        known = known_images(find_splits(run.data), split, classes, cache)
        if known and (same := same_images(known, index)):
            as_before = has_trained_on(known, run.seen) if split == "train" else known.fingerprint == run.seen[1]
            return _Found(same, run, split, None if None in run.seen else as_before)
    return None


def _told(found: _Found, candidate: Candidate, with_classes: bool = False) -> str:
    """In words, which images they are.

    Args:
        with_classes: also how many have another class.
    """
    return f"images in {candidate.index.root}, {found.same.told(with_classes)}{found.provided}"


def _has_files(run: _Run, candidate: Candidate) -> bool:
    """Whether the images of the run and of the candidate are files, which can be compared."""
    return run.data.dataset == candidate.data.dataset == "images" and run.data.loader != "synthetic"


def open_images(
    data: DataConfig, labels_file: str | None, classes: tuple[str, ...], split: str | None = None
) -> DatasetIndex:
    """Index `data.dir`, one of `sources.SOURCES`: by class, a data set with a validation set in it, or flat with a label file;
    or the test images of one of torchvision's data sets.

    The validation set in a folder is what the run has as data.val, or would find there; it is reported if it is not ``val``.

    Args:
        split: of a table that says which split each line is for; None for the validation split. Which one is taken is said.
    """
    folder, read_as = Path(data.dir), pixel_format(data)
    labels_file = find_label_file(labels_file, folder)
    if data.dataset != "images":
        if split:
            raise UserError(f"--split is for a table of image files, and {data.dataset} has a test set: leave it out")
        if labels_file:
            raise UserError(
                f"--labels is for image files, and {data.dataset} has labels of its own: give --dataset images"
            )
        return DATASETS[data.dataset](data, "val", classes, folder, True).with_classes(classes)
    place = folder
    if not labels_file and (own := own_validation_set(data, classes)):
        place = folder / own
        if own != "val":
            print(f"of {folder} {own} is taken (data.val)", file=sys.stderr, flush=True)
        labels = place if data.labels == "multi" else folder / data.val_labels if data.val_labels else None
        labels_file = str(labels) if labels and labels.exists() else None
    if data.labels == "multi":
        if not labels_file:
            raise UserError("the network gives several labels an image: give the CSV file of them as --labels")
        cache = known_cache(Path(labels_file))
        _say_split(Path(labels_file), split)
        of_labels = LabelTableSource(labels_file, open_source(folder), classes, split or "val")
        return scan_label_table(of_labels, cache, progress=True, pixel_format=read_as)
    if labels_file and place == folder and _is_of_a_table(Path(labels_file), data):
        _say_split(Path(labels_file), split)
        of_split = TableSource(labels_file, open_source(folder), columns_of(labels_file, data, split or "val"))
        return scan_classes(of_split, known_cache(Path(labels_file)), progress=True, pixel_format=read_as).with_classes(
            classes
        )
    cache = known_cache(place)
    if labels_file:
        if split:
            raise UserError(
                f"--split {split} is for a table, and {labels_file} has a line for each image: leave it out"
            )
        return scan_flat(place, labels_file, classes, cache, progress=True, pixel_format=read_as)
    _say_split(place, split)
    source = to_evaluate(place, data, folder if place != folder else None, split or "val")
    try:
        index = scan_classes(source, cache, progress=True, pixel_format=read_as, labels_field="--labels")
        return index.with_classes(classes)
    except UserError as error:
        tables = [name for name in (data.val, data.train) if is_table_by_name(name)]
        if tables and place == folder and folder.is_dir():
            table, why = folder / tables[0], f"the run had its images from the table {tables[0]}"
            if not table.exists():
                remedy = f"{why}, which is not in {folder}: give that table, or another, as --data"
            elif os.path.realpath(table.parent) == os.path.realpath(folder):
                remedy = f"{why}: give {table} as --data"
            elif not is_table(table):
                remedy = f"{why}: give {os.path.normpath(table)} as --data"
            else:
                remedy = f"{why}: add --labels {os.path.normpath(table)}"
            raise UserError(f"{error}; {remedy}") from None
        raise


def _is_of_a_table(labels_file: Path, data: DataConfig) -> bool:
    """Whether a file of labels is a table as training takes it: its lines say which split they are for, or the run has had its
    images from one. Else it has a line for each image."""
    if not is_table(labels_file):
        return False
    if any(map(is_table_by_name, (data.train, data.val))):
        return True
    with suppress(UserError):  # lines of labels, without a header
        return bool(splits_in(labels_file))
    return False


def _say_split(place: Path, split: str | None) -> None:
    """Say which split of a table is taken, where it has several, or one is asked for.

    Raises:
        UserError: that is not there.
    """
    there = splits_in(place) if is_table(place) else []
    if split and not there:
        raise UserError(
            f"--split {split} is for a table whose lines say which split they are for, and {place} is none: give "
            "the table as --data"
        )
    if split or len(there) > 1:
        name = name_of_split(place, there, split or "val")
        print(f"of {place} the split {name} is taken (there are {', '.join(there)})", file=sys.stderr, flush=True)


def own_validation_set(data: DataConfig, classes: tuple[str, ...]) -> str:
    """What in the folder `data.dir` is evaluated, relative to it; empty if all of it is."""
    own = find_validation(data)
    if os.path.isabs(own) or os.pardir in Path(own).parts:  # not in it, whatever is given as --data
        own = ""
    if data.labels == "multi":
        return own if own and (Path(data.dir) / own).is_file() else ""
    if not own and (Path(data.dir) / "val").is_dir():
        own = "val"
    return "" if own.split(os.sep)[0] in classes else own


def where(candidate: Candidate, labels_file: str | None, held_out: bool, split: str | None) -> str:
    """Where the images are, and which of those that are there they are.

    Args:
        labels_file: that was given.
        held_out: they are those that the run held out.
        split: that was asked for.
    """
    index = candidate.index
    if held_out:
        return f"{index.root}, held out of its images"
    if index.several_labels:
        own = own_validation_set(candidate.data, candidate.weights.classes)
        table = find_label_file(labels_file, Path(index.root)) or os.path.join(index.root, own)
        return f"{index.root}, labels of {labels_file or own}{_of_split(Path(table), split or 'val')}"
    if isinstance(index.source, TableSource) and index.source.columns.split:
        return f"{index.root}{_of_split(Path(index.root), index.source.columns.split)}"
    return index.root


def _of_split(table: Path, split: str) -> str:
    there = splits_in(table) if is_table(table) else []
    return f", its split {name_of_split(table, there, split)}" if there else ""
