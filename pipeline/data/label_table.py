"""CSV files that say which labels each image has: any number of them."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.data.image_files import is_image_by_name
from pipeline.data.parquet import read_table
from pipeline.errors import UserError, did_you_mean

# Headers of the column with all labels of an image, in small letters.
LABEL_COLUMNS = ("labels", "label", "tags", "classes", "finding labels")
FILE_COLUMNS = ("file", "filename", "file_name", "image", "images", "path", "image index", "image_id", "id", "name")
NO_LABEL = ("", "no finding")  # in small letters: ChestX-ray14 writes the latter


@dataclass(frozen=True)
class LabelTable:
    """N rows of a CSV file.

    Attributes:
        files: as they stand there.
        labels: (N, K) uint8, 0 or 1.
        classes: names of the K classes: of labels between | sorted, of columns in their order.
    """

    files: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]


def read_label_table(file: Path, classes: tuple[str, ...] | None = None) -> LabelTable:
    """Read a CSV file with a header.

    One column names the files: it is called as one of `FILE_COLUMNS`, or is the first. Either one of the others is called as
    one of `LABEL_COLUMNS` and holds names between |, perhaps none (or No Finding); then the rest is not read. Or every other
    column is a class and holds 0 or 1.

    Args:
        classes: those that there may be, in their order; None for those of the file.

    Raises:
        UserError: the file cannot be read, or is not of this kind; names the line.
    """
    header, rows = read_rows(file)
    small = [name.lower() for name in header]
    of_files = next((small.index(name) for name in FILE_COLUMNS if name in small), 0)
    of_labels = next((small.index(name) for name in LABEL_COLUMNS if name in small), None)
    files = tuple(row[of_files].strip() for row in rows)
    if of_labels is not None and of_labels != of_files:
        named = [_names(row[of_labels]) for row in rows]
        return LabelTable(files, *_of_names(file, named, classes))
    columns = [i for i in range(len(header)) if i != of_files]
    return LabelTable(files, *_of_columns(file, header, columns, rows, classes))


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
            raise UserError(f"{file}, line {number} has {len(row)} columns, and the header has {len(header)}: mend it")
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice:
        raise UserError(f"{file} has two columns '{twice[0]}': give each a name of its own")
    return header, rows


def match_files(
    file: Path, wanted: Sequence[str], names: Iterable[str], prefix: str, lines: Sequence[int] = ()
) -> list[str]:
    """The image that each entry of a table's column of files means, by its name in the source.

    An entry is a path. It may lack folders at its start, or the suffix that names an image, or both, where that leaves one
    image. What it has must be the image's: neither another folder nor another suffix will do.

    Args:
        names: of all images, as the source has them.
        prefix: the table's folder, relative to the source's root; entries may be relative to it, or absolute.
        lines: the number of each entry's line; none: from 2 on, after a header.

    Raises:
        UserError: there is no such image, or several, or two entries mean the same one.
    """
    names = list(names)
    known = set(names)
    # By the form that entries have: images, by their names in that form.
    shorter: dict[tuple[int, bool], dict[str, list[str]]] = {}
    for form in set(map(_form, wanted)):
        alike = shorter[form] = {}
        for name in names:
            alike.setdefault(_in_form(name, *form), []).append(name)
    found: dict[str, int] = {}
    for number, entry in zip(lines or range(2, len(wanted) + 2), wanted, strict=True):
        below = os.path.relpath(entry, file.parent) if os.path.isabs(entry) else entry
        paths = [os.path.normpath(path) for path in (entry, os.path.join(prefix, below))]
        alike = shorter[_form(entry)]
        exact = [[path] for path in paths if path in known]
        images = next(chain(exact, (alike[path] for path in paths if path in alike)), [])
        if len(images) != 1:
            raise UserError(f"{file}, line {number}: there is no image '{entry}': {_remedy(entry, images, names)}")
        (image,) = images
        if image in found:
            raise UserError(
                f"{file}, line {number}: a second line for the image '{entry}' (line {found[image]}): remove one"
            )
        found[image] = number
    return list(found)


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
        return "several are called so: give their paths"
    stem = _in_form(entry, 1, suffix=False)
    near = next((name for name in names if _in_form(name, 1, suffix=False) == stem), None)
    return (
        f"there is '{near}': correct or " if near else ""
    ) + "remove the line, or give the folder that the images are in"


def _names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split("|") if name.strip().lower() not in NO_LABEL]


def _of_names(
    file: Path, named: list[list[str]], classes: tuple[str, ...] | None
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
                    f"{file}, line {i + 2}: the label '{name}' is none of the training set's or network's"
                    f"{did_you_mean(name, classes)}"
                )
            labels[i, position[name]] = 1
    return labels, classes


def _of_columns(
    file: Path, header: list[str], columns: list[int], rows: list[list[str]], classes: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    named = {header[i]: i for i in columns}
    classes = classes or tuple(named)
    if set(named) != set(classes):
        lacking, odd = sorted(set(classes) - set(named)), sorted(set(named) - set(classes))
        what = f"has no column '{lacking[0]}'" if lacking else f"has the column '{odd[0]}'"
        raise UserError(f"{file} {what}, and the training set or network has other classes: give the same columns")
    values = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
    labels = np.zeros((len(rows), len(classes)), np.uint8)
    for i, row in enumerate(rows):
        for k, name in enumerate(classes):
            value = values.get(row[named[name]].strip())
            if value is None:
                raise UserError(
                    f"{file}, line {i + 2}: '{row[named[name]]}' in the column '{name}' is not 0 or 1: mend or remove the "
                    "column, or call one with names between | 'labels'"
                )
            labels[i, k] = value
    return labels, classes
