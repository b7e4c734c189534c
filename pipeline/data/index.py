"""Which images there are: names, labels, sizes and where their bytes lie, found by one scan.

The scan is parallel. It keeps what it finds in a cache file, one line for each group (a class, or a flat folder): a scan
that was interrupted resumes there, and a later one reads only what has changed.
"""

import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.data.image_files import (
    RefusedImageError,
    is_image_by_content,
    issues_of,
    no_image,
    open_image,
    unreadable,
)
from pipeline.data.label_table import match_files, read_label_table
from pipeline.data.labels import find_classes, labels_needed, read_labels
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member, Source, Stream
from pipeline.data.sources import open_source
from pipeline.errors import UserError

THREADS = 16  # listing folders and reading headers waits for the disk, or for the network behind it
HEADER_BYTES = 16384  # what is read of an image at once to find its size
RULE = "2"  # which rule of image_files.py a cached row follows; that of a folder shows in its files
NAMED = 5  # of what stops, that an error names
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class DatasetIndex:
    """The images of one data set, in an order that depends on their names alone.

    Attributes:
        names: (N) ``CLASS/IMAGE``, sorted within each class, or ``IMAGE`` in a flat set.
        labels: (N) int64, index into `classes`; or, of images with several labels, (N, classes) uint8, 0 or 1.
        sizes: (N, 2) int32, height and width in pixels as stored (EXIF orientation is not applied).
        classes: class names; for class folders the folders' names, sorted.
        fingerprint: SHA-256 of class names, image names, labels and lengths; of images in memory, of their pixels too.
        offsets, lengths: (N) int64, the image's bytes, as `Source.open` takes them.
        source: opens the images.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    offsets: np.ndarray
    lengths: np.ndarray
    source: Source

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def several_labels(self) -> bool:
        """Whether an image may have any number of labels."""
        return self.labels.ndim == 2

    @property
    def root(self) -> str:
        """The folder or archive, as the user calls it."""
        return self.source.root

    def open(self, i: int) -> Stream:
        """Open the file of image `i` as a stream that can seek.

        Raises:
            OSError: it cannot be opened.
        """
        return self.source.open(self.names[i], int(self.offsets[i]), int(self.lengths[i]))

    def location(self, i: int) -> str:
        """Where image `i` lies, for people: its path, or its name and its archive."""
        return self.source.location(self.names[i])

    def take(self, rows: np.ndarray) -> "DatasetIndex":
        """Return the index of these rows, (n) int64."""
        digest = hashlib.sha256(self.fingerprint.encode() + rows.astype("<i8").tobytes())
        parts = {name: getattr(self, name)[rows] for name in ("labels", "sizes", "offsets", "lengths")}
        names = tuple(self.names[row] for row in rows.tolist())
        return dataclasses.replace(self, names=names, fingerprint=digest.hexdigest(), **parts)

    def with_classes(self, classes: tuple[str, ...]) -> "DatasetIndex":
        """Return this index with labels that count in `classes`, of which its own may be a part.

        Where they are not the same, names are compared by their letters and digits alone: no folder is called T-shirt/top.
        Numbers are taken as positions; see `find_classes`.

        Raises:
            UserError: an image's class is not among `classes`.
        """
        position = {name: i for i, name in enumerate(classes)}
        names = [name if name in position else _called_alike(name, classes) for name in self.classes]
        if len(set(names)) < len(names):  # two of them are alike
            names = list(self.classes)
        own = np.array([position[name] for name in find_classes(self.root, names, classes)], np.int64)
        if self.several_labels:
            labels = np.zeros((len(self), len(classes)), np.uint8)
            labels[:, own] = self.labels
            return dataclasses.replace(self, labels=labels, classes=classes)
        return dataclasses.replace(self, labels=own[self.labels], classes=classes)


def _called_alike(name: str, classes: tuple[str, ...]) -> str:
    """The only one of `classes` with the same letters and digits, else `name`."""
    key = _letters_and_digits(name)
    alike = [other for other in classes if key and _letters_and_digits(other) == key]
    return alike[0] if len(alike) == 1 else name


def _letters_and_digits(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def scan_classes(
    root: str | Path | FileSource, cache: Path | None = None, progress: bool = False, empty_classes: bool = False
) -> DatasetIndex:
    """Index images by class: ``CLASS/IMAGE`` in a folder or an archive, ImageNet's tar of tars, or images with labels.

    Labels that lie with the images are class names: sorted, or in the order of numbers where all are numbers.

    What is left out (hidden files, files that are no images) is told on stderr when it is first found.

    Args:
        cache: file that keeps what was found; groups whose files have changed are read again.
        progress: show a progress bar on a terminal.
        empty_classes: a class may have no images, as in a validation set.

    Raises:
        UserError: `root` cannot be read, holds no classes, holds parts of a data set, or folders of classes; or something in
            it stops the index: an image or a folder that cannot be read, a class without images.
    """
    source = open_source(root) if isinstance(root, str | Path) else root
    root = source.root
    groups, beside = source.groups()
    if not groups and not any(issue.stops for issue in beside):
        raise UserError(
            f"{root} holds no class folders with images: expected CLASS/IMAGE.jpg (or CLASS.tar in an archive); "
            f"{labels_needed(Path(root))}"
        )
    names = {group.name for group in groups}
    if names <= SPLITS and names & {"train", "training"}:
        parts = " and ".join(sorted(names))
        raise UserError(
            f"{root} holds {parts}: parts of a data set, which are no classes: give one of them, as "
            f"{os.path.join(root, max(names))}"
        )
    rows = _scan(source, groups, beside, cache, progress, empty_classes)
    if groups and groups[0].labelled:
        return _labelled_index(source, groups, rows)
    _refuse_nested(source, groups, rows)
    labels = np.repeat(np.arange(len(groups)), [len(row["names"]) for row in rows])
    return _index(source, groups, rows, labels, tuple(group.name for group in groups))


def scan_flat(
    root: str | Path,
    labels_file: str | Path,
    classes: Iterable[str],
    cache: Path | None = None,
    progress: bool = False,
) -> DatasetIndex:
    """Index a folder or tar archive of images whose labels are in a file (see `labels.read_labels`).

    Args:
        classes: the class names that labels may take, in the order of the network's outputs.

    Raises:
        UserError: the images or the file are missing, cannot be read or do not match.
    """
    source, classes = open_source(root), tuple(classes)
    group = source.flat()
    (row,) = _scan(source, [group], [], cache, progress, labels_file=labels_file)
    if not row["names"]:
        raise UserError(f"{root} holds no images: check its path")
    found = read_labels(Path(labels_file), row["names"], classes)
    position = {name: i for i, name in enumerate(classes)}
    return _index(source, [group], [row], np.array([position[name] for name in found]), classes)


def scan_label_table(
    root: str | Path,
    table: str | Path,
    classes: tuple[str, ...] | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> DatasetIndex:
    """Index the images of a folder or tar archive that a CSV file of labels names; see `label_table.read_label_table`.

    Other images below `root` are left out, and their number is told on stderr when that is found out.

    Args:
        classes: those that there may be, in the order of the network's outputs; None for the table's own.

    Raises:
        UserError: the images or the table are missing, cannot be read or do not match.
    """
    source, table = open_source(root), Path(table)
    read = read_label_table(table, classes)
    listing = source.flat().list()
    members = {member.name: member for member in listing.members}
    prefix = os.path.relpath(table.parent, root)
    names = match_files(table, read.files, members, prefix)
    order = sorted(range(len(names)), key=names.__getitem__)
    listed = Listing(tuple(members[names[i]] for i in order), tuple(issue for issue in listing.issues if issue.stops))
    group = Group("", lambda: listed)
    (row,) = _scan(source, [group], [], cache, progress)
    if len(row["names"]) < len(names):
        odd = next(names[i] for i in order if names[i] not in set(row["names"]))
        raise UserError(f"{table} names {source.location(odd)}, which is no image: remove the line")
    others = sum(member.by_name for member in listing.members) - len(names)
    if others and progress:
        print(f"{others:,} images below {root} are not in {table}: left out", file=sys.stderr, flush=True)
    return _index(source, [group], [row], read.labels[order], read.classes)


def images_of(source: FileSource, group: Group) -> tuple[list[tuple[str, Member]], list[ImageIssue]]:
    """The images of a group as (name, member), sorted, and what there is to tell of the other files."""
    listing = group.list()
    images, issues = [], list(listing.issues)
    for member in listing.members:
        name = os.path.join(group.name, member.name)
        issue = None if member.by_name else _issue_if_no_image(source, name, member)
        if issue:
            issues.append(issue)
        else:
            images.append((name, member))
    return images, issues


def find_images(root: str | Path) -> list[str]:
    """The locations of all images in a folder or archive and below, sorted; what is left out is told on stderr.

    Raises:
        UserError: something cannot be read.
    """
    source = open_source(root)
    images, issues = images_of(source, source.flat())
    _stop_at(source, issues)
    return [source.location(name) for name, _ in images]


def cache_beside(root: Path, otherwise: Path) -> Path:
    """The cache file for `root`: beside it, or beside the file that it is a part of; or in the folder `otherwise` if it cannot
    be read and written there."""
    # not a folder inside a zip file
    folder = next((above for above in root.parents if os.path.isdir(above)), root.parent)
    name = f".{'.'.join(root.relative_to(folder).parts)}.index.jsonl"
    beside = folder / name
    return beside if os.access(beside if _exists(beside) else folder, os.R_OK | os.W_OK) else otherwise / name


def known_cache(root: Path) -> Path | None:
    """The cache file beside `root`, if there is one that this user may read and write."""
    cache = cache_beside(root, otherwise=root.parent)
    return cache if _exists(cache) and os.access(cache, os.R_OK | os.W_OK) else None


def _exists(path: Path) -> bool:
    with suppress(OSError):  # of a folder that this user may not enter
        return path.exists()
    return False


def _scan(
    source: FileSource,
    groups: list[Group],
    beside: list[ImageIssue],
    cache: Path | None,
    progress: bool,
    empty_classes: bool = False,
    labels_file: str | Path = "",
) -> list[dict[str, Any]]:
    """Names, offsets, lengths and sizes of each group's images.

    Args:
        labels_file: lies perhaps among the images, and is not told as left out.

    Raises:
        UserError: something stops the index. All is read before that is said, so that all can be named.
    """
    known, kept = _read_cache(cache), True
    rows: list[dict[str, Any]] = []
    issues: list[ImageIssue] = []
    any_new = False
    with ThreadPoolExecutor(THREADS) as group_pool, ThreadPoolExecutor(THREADS) as header_pool:
        try:
            found = group_pool.map(
                lambda group: _scan_group(source, group, known.get(group.key or group.name), header_pool), groups
            )
            bar = tqdm(
                found,
                f"index {source.root}",
                len(groups),
                unit=" classes",
                disable=None if progress else True,
                leave=False,
            )
            for group, (row, of_group) in zip(groups, bar, strict=True):
                new, stops = row is not known.get(group.key or group.name), any(issue.stops for issue in of_group)
                issues += of_group if new else [issue for issue in of_group if issue.stops]
                any_new = any_new or new
                if group.name and not group.labelled and not row["names"] and not stops and not empty_classes:
                    where = f"the class {group.name} in {source.root}"
                    issues.append(ImageIssue(where, "has no images", "fill or remove it", stops=True))
                if cache and new and not stops and kept:
                    kept = _append(cache, row)
                rows.append(row)
        except (MemoryError, RuntimeError) as error:
            group_pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, RuntimeError) and "thread" not in str(error):
                raise
            raise UserError(
                f"not enough memory or threads to index {source.root}: raise the limits on them (ulimit -v, ulimit -u, or "
                "the job's)"
            ) from None
        except BaseException:
            group_pool.shutdown(wait=False, cancel_futures=True)
            raise
    issues += beside if any_new else [issue for issue in beside if issue.stops]
    issues = [
        issue for issue in issues if not labels_file or os.path.abspath(issue.location) != os.path.abspath(labels_file)
    ]
    _stop_at(source, issues)
    return rows


def _stop_at(source: FileSource, issues: list[ImageIssue]) -> None:
    """Tell on stderr what is left out, a line for each kind, and raise what stops.

    Raises:
        UserError: names the first few things that stop, and the number of others.
    """
    kinds: dict[tuple[str, str], list[ImageIssue]] = {}
    for issue in issues:
        if not issue.stops:
            kinds.setdefault((issue.fault, issue.outcome), []).append(issue)
    for (fault, outcome), alike in kinds.items():
        count = sum(issue.count for issue in alike)
        print(
            f"warning: {alike[0].location} {fault} (1 of {count:,} in {source.root}): {outcome}",
            file=sys.stderr,
            flush=True,
        )
    stops = [issue for issue in issues if issue.stops]
    if len(stops) == 1:
        raise UserError(str(stops[0]))
    if stops:
        named = "; ".join(map(str, stops[:NAMED]))
        others = f"; and {len(stops) - NAMED:,} more" if len(stops) > NAMED else ""
        raise UserError(
            f"{len(stops):,} things stop the index of {source.root}: {named}{others} "
            f"(python -m tools.index {source.root} --verify lists all)"
        )


def _refuse_nested(source: FileSource, groups: list[Group], rows: list[dict[str, Any]]) -> None:
    """Refuse one folder that holds the class folders, which would be one class."""
    if len(groups) != 1:
        return
    folders = {os.path.dirname(name).partition(os.sep)[0] for name in rows[0]["names"]}
    if "" not in folders and len(folders) > 1:
        above = source.location(groups[0].name)
        raise UserError(
            f"{source.root} would be one class: it holds only {groups[0].name}, in which are {len(folders)} folders with "
            f"images: if those are the classes, give {above}"
        )


def _scan_group(
    source: FileSource, group: Group, known: dict[str, Any] | None, pool: ThreadPoolExecutor
) -> tuple[dict[str, Any], list[ImageIssue]]:
    """One group's row, which is the known one if nothing has changed since, and what to tell of the group."""
    stamp = group.stamp and f"{group.stamp} {RULE}"
    if known and stamp and known["stamp"] == stamp:
        return known, []
    listing = group.list()
    issues = list(listing.issues)
    stamp = stamp or _stamp(listing.members)
    if known and known["stamp"] == stamp:
        return known, issues
    members, sizes = [], []
    examined = pool.map(
        lambda member: _read_size(source, os.path.join(group.name, member.name), member), listing.members
    )
    for member, (size, of_member) in zip(listing.members, examined, strict=True):
        issues += of_member
        if size:
            members.append(member)
            sizes.append(size)
    row = {
        "group": group.key or group.name,
        "stamp": stamp,
        "names": [member.name for member in members],
        "offsets": [member.offset for member in members],
        "lengths": [member.length for member in members],
        "sizes": sizes,
    }
    if group.labelled:
        row["labels"] = [member.label for member in members]
    return row, issues


def _stamp(members: Iterable[Member]) -> str:
    """What changes when one of the files does."""
    digest = hashlib.sha256()
    for member in members:
        label = f"\0{member.label}" if member.label else ""
        digest.update(os.fsencode(f"{member.name}\0{member.length}\0{member.time}{label}\n"))
    return digest.hexdigest()


def _read_size(source: FileSource, name: str, member: Member) -> tuple[list[int] | None, list[ImageIssue]]:
    """Height and width from an image's header, None if there is no image that can be read; and what to tell of it."""
    if not member.by_name and (issue := _issue_if_no_image(source, name, member)):
        return None, [issue]
    location = source.location(name)
    try:
        with _open_header(source, name, member) as stream:
            image = open_image(stream, location)
            return [image.height, image.width], issues_of(image, location)
    except RefusedImageError as error:
        return None, [ImageIssue(location, error.fault, error.remedy, error.detail, stops=True)]
    except OSError as error:
        return None, [unreadable(location, error)]


def _open_header(source: FileSource, name: str, member: Member) -> io.BufferedIOBase:
    """Open an image file whose beginning is read."""
    stream = source.open(name, member.offset, member.length)
    return io.BufferedReader(stream, HEADER_BYTES) if isinstance(stream, io.RawIOBase) else stream


def _issue_if_no_image(source: FileSource, name: str, member: Member) -> ImageIssue | None:
    """What to tell of a file whose name does not say what it is, if it is no image."""
    location = source.location(name)
    try:
        with _open_header(source, name, member) as stream:
            return None if is_image_by_content(stream) else no_image(location)
    except OSError as error:
        return unreadable(location, error)


def _labelled_index(source: FileSource, groups: list[Group], rows: list[dict[str, Any]]) -> DatasetIndex:
    """Images in the order in which they would lie in folders of their classes: by class, then by name."""
    labels = [label for row in rows for label in row["labels"]]
    if not labels:
        raise UserError(f"{source.root} holds no images: check its path")
    numbers = all(label.isascii() and label.isdigit() for label in labels)
    classes = sorted(set(labels), key=(lambda label: (int(label), label)) if numbers else None)
    position = {name: k for k, name in enumerate(classes)}
    names = [name for row in rows for name in row["names"]]
    order = sorted(range(len(labels)), key=lambda i: (position[labels[i]], names[i]))
    full = [os.path.join(group.name, name) for group, row in zip(groups, rows, strict=True) for name in row["names"]]
    columns = {"names": full} | {key: [x for row in rows for x in row[key]] for key in ("offsets", "lengths", "sizes")}
    row = {key: [column[i] for i in order] for key, column in columns.items()}
    of_images = np.array([position[labels[i]] for i in order])
    return _index(source, [source.flat()], [row], of_images, tuple(classes))


def _index(
    source: FileSource, groups: list[Group], rows: list[dict[str, Any]], labels: np.ndarray, classes: tuple[str, ...]
) -> DatasetIndex:
    names = tuple(os.path.join(group.name, n) for group, row in zip(groups, rows, strict=True) for n in row["names"])
    offsets, lengths = (np.array([x for row in rows for x in row[key]], np.int64) for key in ("offsets", "lengths"))
    digest = hashlib.sha256(os.fsencode("\0".join(classes)))
    for name, label, length in zip(names, labels.tolist(), lengths.tolist(), strict=True):
        digest.update(os.fsencode(f"\n{name}\0{label}\0{length}"))
    return DatasetIndex(
        names=names,
        labels=labels if labels.ndim == 2 else labels.astype(np.int64),
        sizes=np.array([size for row in rows for size in row["sizes"]], np.int32).reshape(-1, 2),
        classes=classes,
        fingerprint=digest.hexdigest(),
        offsets=offsets,
        lengths=lengths,
        source=source,
    )


def _read_cache(cache: Path | None) -> dict[str, dict[str, Any]]:
    """The newest row of each group. A line that a crash cut short is skipped; a file that cannot be read is told."""
    rows: dict[str, dict[str, Any]] = {}
    if cache is None:
        return rows
    try:
        if cache.exists():
            with open(cache) as stream:
                for line in stream:
                    with suppress(ValueError, KeyError, TypeError):
                        row = json.loads(line)
                        rows[row["group"]] = row
    except (OSError, UnicodeDecodeError) as error:
        _warn_of_cache(cache, "read", error)
    return rows


def _append(cache: Path, row: dict[str, Any]) -> bool:
    """Add a row; return whether the file takes more. Without the cache a scan only takes longer."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache, "a") as stream:  # the new line comes first: it ends one that a crash cut short
            stream.write("\n" + json.dumps(row, separators=(",", ":")))
    except OSError as error:
        _warn_of_cache(cache, "written", error)
        return False
    return True


def _warn_of_cache(cache: Path, verb: str, error: Exception) -> None:
    reason = getattr(error, "strerror", None) or error
    print(
        f"warning: the index cache {cache} cannot be {verb} ({reason}): every start reads all headers again until it can",
        file=sys.stderr,
        flush=True,
    )
