"""Images that a table names with their classes: CSV, tab-separated, parquet, and the tables of some well-known data sets.

The images lie below a folder, which is the table's own or data.dir. Known by their shape, without a header or with one:

- ``LOC_val_solution.csv`` of ImageNet at Kaggle: ``ImageId,PredictionString``, of which the first word is the class.
- ``val_annotations.txt`` of Tiny ImageNet: FILE, CLASS and a box of four numbers, with tabs.
- ``train_test_split.txt`` of CUB-200-2011, beside images.txt, image_class_labels.txt and classes.txt.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.archive import MORE_THAN_ONCE
from pipeline.data.image_files import is_image_by_name
from pipeline.data.label_table import (
    OF_SEVERAL_SPLITS,
    SPLIT_COLUMNS,
    VALUES,
    file_column,
    images_in_no_table,
    in_split,
    match_files,
    read_label_table,
    read_rows,
    refuse_other_encoding,
    several_splits,
)
from pipeline.data.parquet import is_table_of_paths
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, PlacedSource, Stream
from pipeline.data.split_names import KNOWN_SPLITS, SPLIT_NAMES
from pipeline.errors import UserError, did_you_mean

SUFFIXES = (".csv", ".tsv")
PARQUET = ".parquet"  # a table, if it holds paths and no images
CLASS_COLUMNS = ("label", "class", "labels", "class_name", "category", "target")  # in small letters, as FILE_COLUMNS


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read, and of which split its lines are.

    Attributes:
        file, label: headers; None: they are known by their names.
        split: where a table says of each line which one it is for (see `name_of_split`); None: all lines.
    """

    file: str | None = None
    label: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Entry:
    """A line of a table: its number from 1, the file and the class as they stand there, the split if it is said."""

    line: int
    file: str
    label: str
    split: str | None = None


@dataclass(frozen=True)
class TableSource:
    """The images that the table `root` names, from the place `images`.

    Attributes:
        beside: the table of the run's other set. Of images that are in neither the training's tells.
        aside: the folder of the run's other set within that place, of whose images nothing is told.
    """

    root: str
    images: FileSource
    columns: Columns = Columns()
    beside: str | None = None
    aside: str | None = None

    @classmethod
    def at(cls, root: str) -> FileSource | None:
        from pipeline.data.sources import open_source  # which has a line for this kind

        if not is_table(root):
            return None
        return cls(root, open_source(os.path.dirname(root) or os.curdir))

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        return [self.flat()], []

    def flat(self) -> Group:
        # Both splits of a table have one cache file; of a table without splits all that read it look for the same line there.
        split = self.columns.split if self.columns.split and splits_in(Path(self.root)) else None
        return Group("", self._list, labelled=True, key=split or "")

    def open(self, name: str, offset: int, length: int) -> Stream:
        return self.images.open(name, offset, length)

    def place(self, name: str, offset: int) -> tuple[str | int, int] | None:
        return self.images.place(name, offset) if isinstance(self.images, PlacedSource) else None

    def location(self, name: str) -> str:
        return self.images.location(name)

    def _list(self) -> Listing:
        table = Path(self.root)
        entries = read_table(table, self.columns)
        here = _are_of_split(table, entries, self.columns.split)
        own = [entry for entry, taken in zip(entries, here, strict=True) if taken]
        elsewhere = [entry.file for entry, taken in zip(entries, here, strict=True) if not taken]
        listing = self.images.flat().list()
        members = {member.name: member for member in listing.members}
        wanted, lines = [entry.file for entry in own], [entry.line for entry in own]
        names = match_files(table, wanted, members, self.images.root, lines)
        found = sorted(
            (
                dataclasses.replace(members[name], by_name=True, label=entry.label)
                for name, entry in zip(names, own, strict=True)
            ),
            key=lambda member: member.name,
        )
        issues = [issue for issue in listing.issues if issue.stops or issue.fault == MORE_THAN_ONCE]
        if self.columns.split is None and (counts := several_splits(_splits_of(entries))):
            issues.append(ImageIssue(self.root, f"{OF_SEVERAL_SPLITS} ({counts})", "all are taken"))
        issues += images_in_no_table(
            self.root,
            self.beside,
            self.aside,
            self.columns.split,
            self.images,
            members,
            names,
            elsewhere,
            self._files_of,
        )
        return Listing(tuple(found), tuple(issues))

    def _files_of(self, table: Path) -> list[str]:
        return [entry.file for entry in read_table(table, self.columns)]


def is_table(path: str | Path) -> bool:
    """Whether a path is that of a file whose name or shape is that of a table of images and classes."""
    path = Path(path)
    if not os.path.isfile(path):
        return False
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (suffix == PARQUET and is_table_of_paths(str(path))) or _known_text(path) is not None


def is_table_by_name(name: str) -> bool:
    """Whether a name is that of a table, or of shards of images."""
    return Path(name).suffix.lower() in (*SUFFIXES, PARQUET)


def read_table(table: Path, columns: Columns) -> list[Entry]:
    """The lines of a table, of all its splits.

    Raises:
        UserError: the table cannot be read, or does not say what it ought to; names the line and the column.
    """
    kind = None if table.suffix.lower() in (*SUFFIXES, PARQUET) else _known_text(table)
    if kind is None:
        entries = _of_header(table, columns)
    elif columns.file or columns.label:
        raise UserError(
            f"{table} has no header, and its columns are known: leave out data.file_column and label_column"
        )
    else:
        entries = list(_tiny_imagenet(table) if kind == "tiny" else _cub(table))
    for entry in entries:
        if not entry.label:
            raise UserError(
                f"{table}, line {entry.line}: the image '{entry.file}' has no label: give one, or remove it"
            )
    refuse_other_encoding(table, ((entry.line, entry.label) for entry in entries))
    return entries


def _of_header(table: Path, columns: Columns) -> list[Entry]:
    header, rows = read_rows(table)
    if is_image_by_name(header[0]):
        raise UserError(f"{table} has no header: put a line such as 'file,label' above the first")
    small = [name.lower() for name in header]
    if small == ["imageid", "predictionstring"] and not (columns.file or columns.label):  # Kaggle's: class and boxes
        return [Entry(line, row[0], (row[1].split() or [""])[0]) for line, row in enumerate(rows, start=2)]
    split = next((small.index(name) for name in SPLIT_COLUMNS if name in small), None)
    file = _column(table, header, columns.file, "data.file_column")
    if file is None:
        file = file_column(small, split)
    label = _column(table, header, columns.label, "data.label_column")
    if label is None:
        others = [i for i in range(len(header)) if i not in (file, split)]
        label = next(
            (small.index(name) for name in CLASS_COLUMNS if name in small and small.index(name) in others), None
        )
        label = others[0] if label is None and len(others) == 1 else label
    if label is None:
        raise UserError(f"{table}: none of the columns {', '.join(header)} is called label: set data.label_column")
    if label == file:
        raise UserError(f"{table}: the column '{header[file]}' cannot be that of files and of labels: set two columns")
    return [
        Entry(line, row[file].strip(), row[label].strip(), row[split] if split is not None else None)
        for line, row in enumerate(rows, start=2)
    ]


def columns_of(table: str | Path, config: DataConfig, split: str) -> Columns:
    """The columns of a table that is not the configuration's own: the configuration's where the table has them, and the split
    where it has splits."""
    has_header = Path(table).suffix.lower() in (*SUFFIXES, PARQUET)
    header = read_rows(Path(table))[0] if has_header else []
    file, label = (name if name in header else None for name in (config.file_column, config.label_column))
    return Columns(file, label, split if splits_in(Path(table)) else None)


def splits_in(table: Path) -> list[str]:
    """The splits that a table's lines are of, by their names there in small letters, sorted; none of a table without splits."""
    status = os.stat(table)
    return list(_splits_in(table, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=4)  # a table of a million lines takes seconds to read
def _splits_in(table: Path, *_: int) -> list[str]:
    if _known_text(table) == "cub":
        return sorted(set(_splits_of(list(_cub(table)))))
    if table.suffix.lower() not in (*SUFFIXES, PARQUET):
        return []
    header, rows = read_rows(table)
    column = next((i for i, name in enumerate(header) if name.lower() in SPLIT_COLUMNS), None)
    cells = set() if column is None else {row[column].strip().lower() for row in rows}
    return [] if cells <= VALUES.keys() else sorted(cells)  # 0 and 1: a class of this name


def split_like_columns(table: Path) -> list[str]:
    """The columns of a table without splits that look like them: of nothing but names of splits, the training's among them."""
    status = os.stat(table)
    return list(_split_like_columns(table, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=4)
def _split_like_columns(table: Path, *_: int) -> list[str]:
    if table.suffix.lower() not in (*SUFFIXES, PARQUET) or _splits_in(table, *_):
        return []
    header, rows = read_rows(table)
    known = set(KNOWN_SPLITS)
    cells = ({row[i].strip().lower() for row in rows} for i in range(len(header)))
    pairs = zip(header, cells, strict=True)
    return [name for name, there in pairs if there <= known and there & set(SPLIT_NAMES["train"]) and len(there) > 1]


def lines_of_other_splits(table: Path, config: DataConfig) -> int:
    """How many lines of the table that a configuration trains on are for another split.

    Raises:
        UserError: as of `read_table` and `read_label_table`.
    """
    if config.labels == "multi":
        return len(read_label_table(table, split="train").elsewhere)
    entries = read_table(table, Columns(config.file_column, config.label_column))
    return _are_of_split(table, entries, "train").count(False)


def _are_of_split(table: Path, entries: list[Entry], split: str | None) -> list[bool]:
    """Which entries are of the wanted split; all of a table without splits."""
    splits = _splits_of(entries)
    return in_split(table, splits, [entry.line for entry in entries], split) if splits else [True] * len(entries)


def _splits_of(entries: list[Entry]) -> list[str]:
    """What the entries say of theirs; empty of a table without splits."""
    return [entry.split for entry in entries if entry.split is not None]


def _column(table: Path, header: list[str], wanted: str | None, field: str) -> int | None:
    if wanted is None:
        return None
    if wanted not in header:
        there = did_you_mean(wanted, header) or f": it has {', '.join(header)}"
        raise UserError(f"{table} has no column '{wanted}' ({field}){there}")
    return header.index(wanted)


def _known_text(file: Path) -> str | None:
    """Which of the known tables without a header a text file is."""
    if file.name == "train_test_split.txt":
        return "cub"
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as stream:
            fields = stream.readline(4096).rstrip("\n").split("\t") if file.suffix == ".txt" else []
    except OSError:
        return None
    boxes = len(fields) == 6 and is_image_by_name(fields[0]) and all(field.isdigit() for field in fields[2:])
    return "tiny" if boxes else None


def _tiny_imagenet(table: Path) -> Iterator[Entry]:
    for line, text in _lines(table):
        fields = text.split("\t")
        if len(fields) < 2:
            raise UserError(f"{table}, line {line}: expected FILE, CLASS and a box, with tabs between: mend it")
        yield Entry(line, fields[0], fields[1])


def _cub(table: Path) -> Iterator[Entry]:
    """Four files of lines ``NUMBER VALUE``: images by number, their classes, the classes' names, 1 for training."""
    parts = {}
    for name in ("images.txt", "image_class_labels.txt", "classes.txt"):
        if not (file := table.with_name(name)).is_file():
            raise UserError(f"{table} is CUB's, and {file} beside it is missing: put it there")
        parts[name] = {key: value for _, key, value in _numbered(file)}
    images, labels, classes = parts.values()
    for line, key, training in _numbered(table):
        try:
            yield Entry(line, f"images/{images[key]}", classes[labels[key]], "train" if training == "1" else "test")
        except KeyError as error:
            raise UserError(
                f"{table}, line {line}: the number {error.args[0]} is missing in the files beside it: download them again"
            ) from None


def _numbered(file: Path) -> Iterator[tuple[int, str, str]]:
    for line, text in _lines(file):
        number, _, value = text.partition(" ")
        if not value:
            raise UserError(f"{file}, line {line}: expected NUMBER VALUE: download it again")
        yield line, number, value


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the table {file}: {error.strerror}: check its permissions") from None
    return ((number, line.rstrip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
