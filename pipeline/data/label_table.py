"""CSV files that say which labels each image has: any number of them."""

import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.image_files import FILE_COLUMNS, is_image_by_name
from pipeline.data.parquet import read_table
from pipeline.data.source import FileSource, ImageIssue, Member
from pipeline.data.split_names import ALIKE, KNOWN_SPLITS, SPLIT_NAMES
from pipeline.errors import UserError, did_you_mean
from pipeline.words import counted

# Headers of the column with all labels of an image, in small letters.
LABEL_COLUMNS = ("labels", "label", "tags", "classes", "finding labels")
NO_LABEL = ("", "no finding")  # in small letters: ChestX-ray14 writes the latter
VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # of a column that is a class
SPLIT_COLUMNS = ("split", "subset", "data set")  # in small letters
OF_SEVERAL_SPLITS = "has lines of several splits"


@dataclass(frozen=True)
class LabelTable:
    """N rows of a CSV file: those of one split, or all.

    Attributes:
        files: as they stand there.
        labels: (N, K) uint8, 0 or 1.
        classes: names of the K classes: of labels between | sorted, of columns in their order.
        lines: their numbers in the file, from 1.
        elsewhere: the files of other splits' rows.
    """

    files: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    lines: tuple[int, ...]
    elsewhere: tuple[str, ...] = ()


def read_label_table(file: Path, classes: tuple[str, ...] | None = None, split: str | None = None) -> LabelTable:
    """Read a CSV file with a header.

    One column names the files: it is called as one of `FILE_COLUMNS`, or is the first. Either one of the others is called as
    one of `LABEL_COLUMNS` and holds names between |, perhaps none (or No Finding); then the rest is not read. Or every other
    column is a class and holds 0 or 1.

    A further column may say which split each row is for (one of `SPLIT_COLUMNS`, with names of `KNOWN_SPLITS`).

    Args:
        classes: those that there may be, in their order; None for those of the rows.
        split: whose rows are read, as `name_of_split` takes it; None: all rows.

    Raises:
        UserError: the file cannot be read, or is not of this kind; names the line.
    """
    header, rows = read_rows(file)
    of_files, of_labels, of_split = _columns(header, rows)
    every, here = range(2, len(rows) + 2), [True] * len(rows)
    if of_split is not None:
        splits = [row[of_split] for row in rows]
        here = in_split(file, splits, every, split)
        if split is None and (counts := several_splits(splits)):
            print(f"warning: {file} {OF_SEVERAL_SPLITS} ({counts}): all are taken", file=sys.stderr, flush=True)
    lines = [line for line, taken in zip(every, here, strict=True) if taken]
    elsewhere = tuple(row[of_files].strip() for row, taken in zip(rows, here, strict=True) if not taken)
    rows = [row for row, taken in zip(rows, here, strict=True) if taken]
    files = tuple(row[of_files].strip() for row in rows)
    if of_labels is not None and of_labels != of_files:
        named = [_names(row[of_labels]) for row in rows]
        refuse_other_encoding(file, zip(lines, (row[of_labels] for row in rows), strict=True))
        return LabelTable(files, *_of_names(file, named, classes, lines), tuple(lines), elsewhere)
    columns = [i for i in range(len(header)) if i not in (of_files, of_split)]
    refuse_other_encoding(file, ((1, header[i]) for i in columns))
    return LabelTable(files, *_of_columns(file, header, columns, rows, classes, lines), tuple(lines), elsewhere)


def files_in(file: Path) -> list[str]:
    """The files that a table of several labels names, in all its splits; nothing else of it is looked at.

    Raises:
        UserError: see `read_rows`.
    """
    header, rows = read_rows(file)
    column, _, _ = _columns(header, rows)
    return [row[column].strip() for row in rows]


def _columns(header: list[str], rows: list[list[str]]) -> tuple[int, int | None, int | None]:
    """The columns of files, of labels, and of splits, of which the last two may be missing."""
    small = [name.lower() for name in header]
    of_labels = next((small.index(name) for name in LABEL_COLUMNS if name in small), None)
    of_split = next((small.index(name) for name in SPLIT_COLUMNS if name in small), None)
    if of_split is not None and of_labels is None and all(row[of_split].strip() in VALUES for row in rows):
        of_split = None  # a class of this name
    return file_column(small, of_split), of_labels, of_split


def file_column(small: Sequence[str], of_split: int | None) -> int:
    """The column of files of a header in small letters: the one that is called so, else the first that is not of splits."""
    known = [small.index(name) for name in FILE_COLUMNS if name in small]
    return [*known, *(i for i in range(len(small)) if i != of_split)][0]


def several_splits(splits: Iterable[str]) -> str:
    """How many rows are of which split, by what they say of theirs; empty if all are of one."""
    counts = Counter(cell.strip().lower() for cell in splits)
    return ", ".join(f"{counts[name]:,} of {name}" for name in sorted(counts)) if len(counts) > 1 else ""


def in_split(file: Path, splits: Sequence[str], lines: Sequence[int], split: str | None) -> list[bool]:
    """Which rows of a table are of the wanted split, by what they say of theirs; None: all.

    Raises:
        UserError: no row is of it, or one names a split that is none; names the line.
    """
    if split is None:
        return [True] * len(splits)
    said = [cell.strip().lower() for cell in splits]
    for line, cell, small in zip(lines, splits, said, strict=True):
        if small not in KNOWN_SPLITS:
            raise UserError(
                f"{file}, line {line}: '{cell}' is no split: give {', '.join(KNOWN_SPLITS)}, or call the column otherwise"
            )
    name = name_of_split(file, said, split)
    return [cell == name for cell in said]


def name_of_split(file: Path, there: Iterable[str], split: str) -> str:
    """What a table calls a split.

    Args:
        there: the names that it has, in small letters.
        split: "train" or "val", which the first of `SPLIT_NAMES` that is there stands for; or one of those names.

    Raises:
        UserError: no row is of it.
    """
    known = sorted(set(there))
    for alike in ALIKE:
        if split in alike and len(both := [name for name in known if name in alike]) > 1:
            raise UserError(f"{file} has lines of split {' and of '.join(both)}, which mean the same: call them alike")
    name = next((name for name in SPLIT_NAMES.get(split, (split,)) if name in known), None)
    if name is None:
        field = f" (data.{split})" if split in SPLIT_NAMES else ""
        raise UserError(
            f"{file} has no line of split {split}, but of {', '.join(known)}: give another table{field}, or add some"
        )
    return name


def read_rows(file: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the other rows of a CSV file, of one with tabs if it is called .tsv, or of a parquet file.

    Raises:
        UserError: the file cannot be read, has no rows or one column, or a row of another length; names the line.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            rows = read_table(str(file))
        else:
            with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
                rows = list(csv.reader(stream, delimiter="\t" if suffix == ".tsv" else ","))
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read the label file {file}: {getattr(error, 'strerror', None) or error}") from None
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    if len(rows) < 2 or len(rows[0]) < 2:
        raise UserError(
            f"{file} is no table of labels: give a CSV file with a header, a column of files and one of labels"
        )
    header, rows = [cell.strip() for cell in rows[0]], rows[1:]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(
                f"{file}, line {number} has {counted(len(row), 'column')}, and the header has {len(header)}: mend it"
            )
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice:
        raise UserError(f"{file} has two columns '{twice[0]}': give each a name of its own")
    return header, rows


def refuse_other_encoding(file: Path, cells: Iterable[tuple[int, str]]) -> None:
    """Refuse names of classes that are not in UTF-8; file names are read as they are.

    Args:
        cells: the number of a line, and what it says.
    """
    for line, cell in cells:
        if not cell.isascii() and any("\udc80" <= character <= "\udcff" for character in cell):
            raise UserError(
                f"{file}, line {line}: '{cell.encode(errors='backslashreplace').decode()}' is not in UTF-8: save the table in "
                "that encoding (in Excel: CSV UTF-8)"
            )


def match_files(
    file: Path, wanted: Sequence[str], names: Iterable[str], root: str, lines: Sequence[int] = ()
) -> list[str]:
    """The image that each entry of a table's column of files means, by its name in the source.

    An entry is a path. It may lack folders at its start, or the suffix that names an image, or both, where that leaves one
    image. What it has must be the image's: neither another folder nor another suffix will do.

    Args:
        names: of all images, as the source has them.
        root: the source's. Entries may be relative to it or to the table's folder, or absolute.
        lines: the number of each entry's line; none: from 2 on, after a header.

    Raises:
        UserError: there is no such image, or several, or two entries mean the same one.
    """
    names = list(names)
    found: dict[str, int] = {}
    numbers = lines or range(2, len(wanted) + 2)
    for number, entry, images in zip(numbers, wanted, _meant(file, wanted, names, root), strict=True):
        if len(images) != 1:
            fault = "it is not clear which image is" if images else "there is no image"
            place = os.path.abspath(file.parent / entry)
            if not images and os.path.isfile(place) and not place.startswith(os.path.join(os.path.abspath(root), "")):
                raise UserError(
                    f"{file}, line {number}: '{entry}' is not in the folder of the images: give that folder as data.dir, or to "
                    "tools.index and tools.evaluate with the table as --labels"
                )
            raise UserError(f"{file}, line {number}: {fault} '{entry}': {_remedy(entry, images, names)}")
        (image,) = images
        if image in found:
            raise UserError(
                f"{file}, line {number}: a second line for the image '{entry}' (line {found[image]}): remove one"
            )
        found[image] = number
    return list(found)


def images_elsewhere(
    file: Path, elsewhere: Sequence[str], names: Iterable[str], root: str, trained_on: Iterable[str] = ()
) -> set[str]:
    """The images that entries of a table's other splits, or of another table, mean, where they are there.

    Args:
        trained_on: the images of the training split, which may be of no other.

    Raises:
        UserError: an image is trained on, and of another split too.
    """
    others = {image for images in _meant(file, elsewhere, list(names), root) if len(images) == 1 for image in images}
    if both := sorted(others & set(trained_on)):
        raise UserError(
            f"{file} has lines of two splits for the image '{both[0]}', one of them for training: remove those of one"
        )
    return others


def images_in_no_table(
    table: str,
    beside: str | None,
    aside: str | None,
    split: str | None,
    source: FileSource,
    members: Mapping[str, Member],
    named: Collection[str],
    elsewhere: Sequence[str],
    files_of: Callable[[Path], Sequence[str]],
) -> list[ImageIssue]:
    """What to tell of the images that no table names; where the run's other set has a table too, the training's tells.

    Args:
        beside: the table of the run's other set, perhaps the same; None: there is none.
        aside: the folder of the run's other set, by its name in the source; None: there is none.
        split: whose lines are taken; None: all.
        members: all files of the source, by name.
        named: the images that those lines mean.
        elsewhere: the files of the table's other lines.
        files_of: reads which files the other table names, in all its splits.

    Raises:
        UserError: see `images_elsewhere` and `files_of`.
    """
    if beside is not None and split != "train":
        return []
    trained_on = named if split == "train" else ()
    known = {*named, *images_elsewhere(Path(table), elsewhere, members, source.root, trained_on)}
    tables = [table]
    if beside not in (None, table):
        tables.append(beside)
        known |= images_elsewhere(Path(beside), files_of(Path(beside)), members, source.root)
    others = (member for member in members.values() if not aside or not member.name.startswith(os.path.join(aside, "")))
    return not_in_table(tables, source, others, known)


def not_in_table(
    tables: Sequence[str], source: FileSource, members: Iterable[Member], known: Collection[str]
) -> list[ImageIssue]:
    """What to tell of the images beside those that the lines of a table mean.

    Args:
        tables: the table, or those of training and validation.
        members: all files of the source.
        known: the names of those that the tables have, in whatever split.
    """
    odd = [member.name for member in members if member.by_name and member.name not in known]
    told = f"is not in the table {' nor in '.join(dict.fromkeys(tables))}"
    return [ImageIssue(source.location(odd[0]), told, "left out", count=len(odd))] if odd else []


def _meant(file: Path, wanted: Sequence[str], names: list[str], root: str) -> Iterator[list[str]]:
    """The images that each entry may mean."""
    known = set(names)
    # By the form that entries have: images, by their names in that form.
    shorter: dict[tuple[int, bool], dict[str, list[str]]] = {}
    for form in set(map(_form, wanted)):
        alike = shorter[form] = {}
        for name in names:
            alike.setdefault(_in_form(name, *form), []).append(name)
    beside, above = os.path.abspath(file.parent), os.path.join(os.path.abspath(root), "")
    for entry in wanted:
        place = os.path.normpath(os.path.join(beside, entry))
        paths = [os.path.normpath(entry), *([place[len(above) :]] if place.startswith(above) else [])]
        alike = shorter[_form(entry)]
        exact = list(dict.fromkeys(path for path in paths if path in known))  # two: it is right from both places
        yield exact or next((alike[path] for path in paths if path in alike), [])


def _form(entry: str) -> tuple[int, bool]:
    """Of how many parts (folders and file) an entry is, and whether it has a suffix that names an image."""
    return os.path.normpath(entry).count(os.sep) + 1, is_image_by_name(entry)


def _in_form(path: str, parts: int, suffix: bool) -> str:
    """The last parts of a path, with or without the suffix that names an image."""
    path = os.sep.join(path.split(os.sep)[-parts:])
    return path if suffix or not is_image_by_name(path) else os.path.splitext(path)[0]


def _remedy(entry: str, images: list[str], names: list[str]) -> str:
    """What to do about an entry that means several images, or none."""
    if images:
        return f"it may be {' or '.join(images[:2])}: give paths that only one image has, as from the data folder"
    stem = _in_form(entry, 1, suffix=False)
    near = next((name for name in names if _in_form(name, 1, suffix=False) == stem), None)
    return (
        f"there is '{near}': correct or " if near else ""
    ) + "remove the line, or give the folder that the images are in"


def _names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split("|") if name.strip().lower() not in NO_LABEL]


def _of_names(
    file: Path, named: list[list[str]], classes: tuple[str, ...] | None, lines: Sequence[int]
) -> tuple[np.ndarray, tuple[str, ...]]:
    classes = classes or tuple(sorted({name for names in named for name in names}))
    if not classes:
        raise UserError(f"{file} holds no label: give names between | in the column of labels")
    position = {name: k for k, name in enumerate(classes)}
    labels = np.zeros((len(named), len(classes)), np.uint8)
    for i, names in enumerate(named):
        for name in names:
            if name not in position:
                raise UserError(
                    f"{file}, line {lines[i]}: the label '{name}' is none of the training set's or network's"
                    f"{did_you_mean(name, classes)}"
                )
            labels[i, position[name]] = 1
    return labels, classes


def _of_columns(
    file: Path,
    header: list[str],
    columns: list[int],
    rows: list[list[str]],
    classes: tuple[str, ...] | None,
    lines: Sequence[int],
) -> tuple[np.ndarray, tuple[str, ...]]:
    named = {header[i]: i for i in columns}
    classes = classes or tuple(named)
    if set(named) != set(classes):
        lacking, odd = sorted(set(classes) - set(named)), sorted(set(named) - set(classes))
        what = f"has no column '{lacking[0]}'" if lacking else f"has the column '{odd[0]}'"
        raise UserError(f"{file} {what}, and the training set or network has other classes: give the same columns")
    labels = np.zeros((len(rows), len(classes)), np.uint8)
    for i, row in enumerate(rows):
        for k, name in enumerate(classes):
            value = VALUES.get(row[named[name]].strip())
            if value is None:
                raise UserError(
                    f"{file}, line {lines[i]}: '{row[named[name]]}' in the column '{name}' is not 0 or 1: mend or remove the "
                    "column, or call one with names between | 'labels'"
                )
            labels[i, k] = value
    return labels, classes
