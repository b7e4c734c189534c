"""Images in Hugging Face's parquet files: a column of images (bytes and path) and one of labels, read by pyarrow.

pyarrow is no requirement of training; it is asked for where such a file is given. Class names are those in the file's
metadata, else the labels as they stand there. Files are given as ``data/train-*.parquet``, as a folder that holds nothing
else, or as one file. (Format: huggingface.co/docs/datasets, features Image and ClassLabel.)

A parquet file is compressed by row groups, so that an image is no range of its bytes: a row group is read and decompressed
as a whole, and the last few are kept. Random access therefore reads many times what it needs, about as many as a row group
has images; tools.pack writes shards, which are read by position.
"""

import bisect
import io
import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from pipeline.data.image_files import FILE_COLUMNS
from pipeline.data.shards import expand
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member, Stream
from pipeline.errors import UserError

LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
SUFFIX = ".parquet"
KEPT_ROW_GROUPS = 16


class ParquetSource:
    """The images of the parquet files `files`, which the user calls `root`; an image's offset is its row over all files."""

    def __init__(self, root: str, files: list[str]):
        self.root = root
        self._files = files
        folder = os.path.commonpath([os.path.dirname(file) or os.curdir for file in files])
        self._names = [os.path.relpath(file, folder) for file in files]
        self._row_groups: list[tuple[int, int]] = []  # file and number in it
        rows: list[int] = []
        self._first_rows: list[int] = []
        for i, file in enumerate(files):
            metadata = _open(file).metadata
            self._first_rows.append(sum(rows))
            for k in range(metadata.num_row_groups):
                self._row_groups.append((i, k))
                rows.append(metadata.row_group(k).num_rows)
        self._starts = [0, *itertools.accumulate(rows)]
        self._columns = _columns(files[0])
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[int, Any] = {}
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_opened", "_kept")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    @classmethod
    def at(cls, root: str) -> FileSource | None:
        """The source of these files; a file of paths alone is a table, which comes before this kind."""
        files = [root] if os.path.isfile(root) else _in_folder(root) if os.path.isdir(root) else expand(root)
        return cls(root, files) if files and files[0].endswith(SUFFIX) else None

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        """A group of labelled images for each file."""
        groups = [
            Group(name, partial(self._list, i), self._stamp(i), labelled=True) for i, name in enumerate(self._names)
        ]
        return groups, []

    def flat(self) -> Group:
        def list_all() -> Listing:
            listings = [self._list(i, labelled=False) for i in range(len(self._files))]
            members = [
                Member(os.path.join(name, member.name), member.offset, member.length)
                for name, listing in zip(self._names, listings, strict=True)
                for member in listing.members
            ]
            issues = [issue for listing in listings for issue in listing.issues]
            return Listing(tuple(sorted(members, key=lambda member: member.name)), tuple(issues))

        return Group("", list_all, " ".join(map(self._stamp, range(len(self._files)))))

    def _stamp(self, i: int) -> str:
        status = os.stat(self._files[i])
        return f"{status.st_mtime_ns} {status.st_size} {self._first_rows[i]}"

    def open(self, name: str, offset: int, length: int) -> Stream:
        k = bisect.bisect_right(self._starts, offset) - 1
        return io.BytesIO(self._images(k)[offset - self._starts[k]].as_buffer())

    def location(self, name: str) -> str:
        return f"{name} in {self.root}"

    def _images(self, k: int) -> Any:
        """The bytes of the images of row group `k`, a pyarrow array; one thread reads at a time.

        Raises:
            OSError: they cannot be read.
        """
        with self._lock:
            if k not in self._kept:
                i, number = self._row_groups[k]
                if i not in self._opened:
                    self._opened[i] = _open(self._files[i])
                image = self._columns[0]
                with _damage_as(OSError, f"row group {number} of {self._files[i]} cannot be read"):
                    table = self._opened[i].read_row_group(number, columns=[f"{image}.bytes"])
                self._kept[k] = table.column(image).combine_chunks().field("bytes")
                if len(self._kept) > KEPT_ROW_GROUPS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(k)
            return self._kept[k]

    def _list(self, i: int, labelled: bool = True) -> Listing:
        """The images of one file, in the order of its rows."""
        image, label, names = self._columns
        file = _open(self._files[i])
        row = self._first_rows[i]
        members: list[Member] = []
        issues: list[ImageIssue] = []
        for number in range(file.metadata.num_row_groups):
            fault = f"row group {number} of {self._files[i]} cannot be read"
            with _damage_as(UserError, fault, "download the file again"):
                table = file.read_row_group(number, columns=[f"{image}.bytes", f"{image}.path", label])
                images = table.column(image).combine_chunks()
                paths, values = images.field("path").to_pylist(), table.column(label).to_pylist()
            for content, path, value in zip(images.field("bytes"), paths, values, strict=True):
                name = f"{row:09d}_{os.path.basename(path or '')}"  # in the order of the rows of all files
                location = self.location(os.path.join(self._names[i], name))
                if not content.is_valid:
                    issues.append(
                        ImageIssue(location, "has no bytes", "give files with the images in them", stops=True)
                    )
                elif labelled and not _class_of(value, names):
                    fault = f"has no label ({label} is {value!r})"
                    issues.append(ImageIssue(location, fault, "give a split with labels", stops=True))
                else:
                    own = _class_of(value, names) if labelled else ""
                    members.append(Member(name, row, len(content.as_buffer()), label=own))
                row += 1
        return Listing(tuple(members), tuple(issues))


def is_table_of_paths(file: str) -> bool:
    """Whether a parquet file names images and does not hold them.

    Raises:
        UserError: it is no parquet file, or pyarrow is not installed.
    """
    opened = _open(file)
    return len(_leaves(opened)) > 1 and not _leaf_of_images(opened)


def read_table(file: str) -> list[list[str]]:
    """The header and then the rows of a parquet file of paths, as a CSV file would have them.

    An image is its path, a class its name where the file's metadata have names, several labels are joined by |.

    Raises:
        UserError: it is no whole parquet file, or has bytes in a column; or pyarrow is not installed.
    """
    opened = _open(file)
    features = _features(opened.schema_arrow)
    if (leaf := _leaf_of_images(opened)) and not leaf.endswith(".bytes"):
        raise UserError(f"{file} has bytes in the column {leaf}: give a table with the paths of image files there")
    columns, of_bytes = [], _leaves_of_bytes(opened)
    with _damage_as(UserError, f"{file} cannot be read", "download it again"):
        table = opened.read(columns=[path for path in _leaves(opened) if path not in of_bytes])
        for name in table.column_names:
            names = _class_names(features.get(name))
            columns.append([_text(value, names) for value in table.column(name).to_pylist()])
    return [list(table.column_names), *map(list, zip(*columns, strict=True))]


def _leaves(opened: Any) -> list[str]:
    return [opened.schema.column(i).path for i in range(len(opened.schema))]


def _leaves_of_bytes(opened: Any) -> list[str]:
    """The columns whose values are neither text nor numbers."""
    columns = [opened.schema.column(i) for i in range(len(opened.schema))]
    return [c.path for c in columns if c.physical_type.endswith("BYTE_ARRAY") and c.logical_type.type == "NONE"]


def _leaf_of_images(opened: Any) -> str:
    """The column that holds images as bytes where a table has their paths; empty if none does."""
    leaves = _leaves(opened)
    for path in _leaves_of_bytes(opened):
        of_files = path.endswith(".bytes") or path.lower() in FILE_COLUMNS or path == leaves[0]
        if of_files and _holds_any(opened, path):
            return path
    return ""


def _holds_any(opened: Any, path: str) -> bool:
    """Whether a column has a value in any row, as far as the file tells without being read."""
    metadata = opened.metadata
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == path)
    for k in range(metadata.num_row_groups):
        statistics = metadata.row_group(k).column(column).statistics
        if statistics is None or statistics.null_count != metadata.row_group(k).num_rows:
            return True
    return False


def _text(value: Any, names: list[str]) -> str:
    """A value as it would stand in a CSV file."""
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, list):
        return "|".join(_text(one, names) for one in value)
    if names and type(value) is int and 0 <= value < len(names):
        return names[value]
    return "" if value is None else str(int(value) if isinstance(value, bool) else value)


def _class_of(value: Any, names: list[str]) -> str:
    """The class that a label stands for; empty if it is none."""
    if names:
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else ""
    return "" if value is None or not str(value).strip() else str(value)


def _columns(file: str) -> tuple[str, str, list[str]]:
    """The names of the columns of images and of labels, and the class names, none if the metadata have none.

    Raises:
        UserError: there are no such columns, or an image has several labels.
    """
    schema = _open(file).schema_arrow
    arrow = _pyarrow(file)
    structs = [field.name for field in schema if arrow.types.is_struct(field.type)]
    image = next((name for name in structs if schema.field(name).type.get_field_index("bytes") >= 0), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        lacking = "images (bytes and path)" if image is None else f"labels ({', '.join(LABEL_COLUMNS)})"
        raise UserError(f"{file} has no column of {lacking}, but {', '.join(schema.names)}: give another file")
    if arrow.types.is_nested(schema.field(label).type):
        raise UserError(
            f"{file} has several labels an image in the column {label}: set data.labels multi, with tables of labels that "
            "name image files"
        )
    return image, label, _class_names(_features(schema).get(label))


def _features(schema: Any) -> dict[str, Any]:
    """Hugging Face's description of the columns, empty if there is none."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return stored.get("info", {}).get("features", {})


def _class_names(feature: Any) -> list[str]:
    """The names of the classes that a column's numbers, or the numbers in its lists, stand for; none if it has none."""
    if not isinstance(feature, dict):
        return []
    inner = feature.get("feature")
    return list(feature.get("names") or (inner.get("names") if isinstance(inner, dict) else None) or [])


def _open(file: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: it is none, or pyarrow is not installed.
    """
    arrow = _pyarrow(file)
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file)
    except (arrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # of the system, and not of the file's content
            raise
        raise UserError(f"{file} is not a whole parquet file ({_one_line(error)}): download it again") from None


@contextmanager
def _damage_as(kind: type[Exception], fault: str, remedy: str = "") -> Iterator[None]:
    """Raise as an error of this kind what pyarrow says of damage, which it does in several ways."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeDecodeError, KeyError) as error:  # the last of a column that is not there
        raise kind(f"{fault} ({_one_line(error)}){remedy and f': {remedy}'}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _pyarrow(file: str) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types
    except ImportError:
        raise UserError(f"{file} is a parquet file, and pyarrow is not installed: pip install pyarrow") from None
    return pyarrow


def _in_folder(folder: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
    whole = names and all(name.endswith(SUFFIX) for name in names)
    return [os.path.join(folder, name) for name in names] if whole else []
