"""Which images there are: names, labels, sizes and where their bytes lie, found by one scan.

The scan is parallel. It keeps what it finds in a cache file, one line for each group (a class, or a flat folder): a scan
that was interrupted resumes there, and a later one reads only what has changed.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.config import CorruptImages
from pipeline.data.folder import archives_in
from pipeline.data.image_files import (
    ASK_FOR_UPRIGHT,
    COLORS,
    LAST_THAT_STANDS,
    LEFT_OUT,
    SKIP,
    PixelFormat,
    RefusedImageError,
    deep_mode,
    is_image_by_content,
    issues_of,
    no_image,
    open_image,
    orientation,
    refused_depth,
    unreadable,
)
from pipeline.data.label_table import images_elsewhere, match_files, read_label_table
from pipeline.data.labels import find_classes, labels_needed, read_labels
from pipeline.data.names import Names
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member, Source, Stream
from pipeline.data.sources import open_source
from pipeline.errors import UserError

A_TASK = 16  # headers that a thread reads before it takes others
THREADS = 16  # listing folders and reading headers waits for the disk, or for the network behind it
HEADER_BYTES = 16384  # what is read of an image at once to find its size
RULE = "3"  # which rule of image_files.py a cached row follows
BEGIN = f'{{"rule":"{RULE}","group":'  # of a line of the cache
AT_ONCE = 1 << 16  # images that the fingerprint takes together
NAMED = 5  # of what stops, that an error names
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class DatasetIndex:
    """The images of one data set, in an order that depends on their names alone.

    Attributes:
        names: (N) ``CLASS/IMAGE``, sorted within each class, or ``IMAGE`` in a flat set; kept as `Names`.
        labels: (N) int64, index into `classes`; or, of images with several labels, (N, classes) uint8, 0 or 1.
        sizes: (N, 2) int32, height and width in pixels as the image is read: as stored, or turned (see `turned`).
        classes: class names; for class folders the folders' names, sorted.
        fingerprint: SHA-256 of class names, image names, labels and lengths; of images in memory, of their pixels too.
        offsets, lengths: (N) int64, the image's bytes, as `Source.open` takes them.
        source: opens the images.
        turned: (N) bool, images that are turned as their EXIF data say when they are read; None: none is.
        whole: fingerprint of the index that these images were taken from; None: this is no part of another.
    """

    names: Sequence[str]
    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    offsets: np.ndarray
    lengths: np.ndarray
    source: Source
    turned: np.ndarray | None = None
    whole: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.names, Names):
            object.__setattr__(self, "names", Names.of(self.names))

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
        parts: dict[str, Any] = {name: getattr(self, name)[rows] for name in ("labels", "sizes", "offsets", "lengths")}
        assert isinstance(self.names, Names)
        names = self.names.take(rows)
        turned = None if self.turned is None else self.turned[rows]
        parts |= {"names": names, "turned": turned, "fingerprint": digest.hexdigest(), "whole": self.fingerprint}
        return dataclasses.replace(self, **parts)

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
    root: str | Path | FileSource,
    cache: Path | None = None,
    progress: bool = False,
    empty_classes: bool = False,
    pixel_format: PixelFormat | None = COLORS,
    corrupt_images: CorruptImages | None = None,
    labels_field: str = "",
) -> DatasetIndex:
    """Index images by class: ``CLASS/IMAGE`` in a folder or an archive, ImageNet's tar of tars, or images with labels.

    Labels that lie with the images are class names: sorted, or in the order of numbers where all are numbers.

    What is left out (hidden files, files that are no images) is reported on stderr when it is first found.

    Args:
        cache: file that keeps what was found; groups whose files have changed are read again.
        progress: show a progress bar on a terminal.
        empty_classes: a class may have no images, as in a validation set.
        pixel_format: what the images are read as, which decides what is refused; None: their files are copied and not read.
        corrupt_images: of training images: "skip" leaves out the files that no image can be read from, and reports them at
            each scan; else they stop the index. None: these are not for training.
        labels_field: where the caller's user gives a file of labels for images without class folders; empty if nowhere.

    Raises:
        UserError: `root` cannot be read, holds no classes, holds parts of a data set, or folders of classes; or something in
            it stops the index: an image or a folder that cannot be read, a class without images.
    """
    source = open_source(root) if isinstance(root, str | Path) else root
    root = source.root
    groups, beside = source.groups()
    if not groups and not any(issue.stops for issue in beside):
        _refuse_archives(root)
        raise UserError(
            f"{root} holds no class folders with images: expected CLASS/IMAGE.jpg (or CLASS.tar in an archive)"
            + (f"; {labels_needed(Path(root), labels_field)}" if labels_field else "")
        )
    names = {group.name for group in groups}
    if names <= SPLITS and names & {"train", "training"}:
        parts = " and ".join(sorted(names))
        raise UserError(
            f"{root} holds {parts}: parts of a data set, which are no classes: give one of them, as "
            f"{os.path.join(root, max(names))}"
        )
    rows = _scan(source, groups, beside, cache, progress, pixel_format, empty_classes, corrupt_images=corrupt_images)
    if groups and groups[0].labelled:
        return _labelled_index(source, groups, rows, pixel_format)
    _refuse_nested(source, groups, rows)
    labels = np.repeat(np.arange(len(groups)), [len(row.names) for row in rows])
    return _index(source, groups, rows, labels, tuple(group.name for group in groups), pixel_format)


def scan_flat(
    root: str | Path,
    labels_file: str | Path,
    classes: Iterable[str],
    cache: Path | None = None,
    progress: bool = False,
    pixel_format: PixelFormat = COLORS,
) -> DatasetIndex:
    """Index a folder or tar archive of images whose labels are in a file (see `labels.read_labels`).

    Args:
        classes: the class names that labels may take, in the order of the network's outputs.

    Raises:
        UserError: the images or the file are missing, cannot be read or do not match.
    """
    source, classes = open_source(root), tuple(classes)
    group = source.flat()
    (row,) = _scan(source, [group], [], cache, progress, pixel_format, labels_file=labels_file)
    if not row.names:
        raise UserError(f"{root} holds no images: check its path")
    found = read_labels(Path(labels_file), list(row.names), classes)
    position = {name: i for i, name in enumerate(classes)}
    return _index(source, [group], [row], np.array([position[name] for name in found]), classes, pixel_format)


def scan_label_table(
    root: str | Path,
    table: str | Path,
    classes: tuple[str, ...] | None = None,
    cache: Path | None = None,
    progress: bool = False,
    pixel_format: PixelFormat = COLORS,
    corrupt_images: CorruptImages | None = None,
    split: str | None = None,
) -> DatasetIndex:
    """Index the images of a folder or tar archive that a CSV file of labels names; see `label_table.read_label_table`.

    Other images below `root` are left out, and their number is reported on stderr when that is found out.

    Args:
        classes: those that there may be, in the order of the network's outputs; None for the table's own.
        corrupt_images: as of `scan_classes`.
        split: "train" or "val", of which rows are taken where the table says of each which it is for; None: all.

    Raises:
        UserError: the images or the table are missing, cannot be read or do not match.
    """
    source, table = open_source(root), Path(table)
    read = read_label_table(table, classes, split)
    listing = source.flat().list()
    members = {member.name: member for member in listing.members}
    prefix = os.path.relpath(table.parent, root)
    names = match_files(table, read.files, members, prefix, read.lines)
    elsewhere = images_elsewhere(table, read.elsewhere, members, prefix, names if split == "train" else ())
    order = sorted(range(len(names)), key=names.__getitem__)
    listed = Listing(tuple(members[names[i]] for i in order), tuple(issue for issue in listing.issues if issue.stops))
    group = Group("", lambda: listed, key=split or "" if read.elsewhere else "")  # both splits have one cache file
    (row,) = _scan(source, [group], [], cache, progress, pixel_format, corrupt_images=corrupt_images)
    there = set(row.names)
    odd = [names[i] for i in order if names[i] not in there]
    if odd and corrupt_images != "skip":
        raise UserError(f"{table} names {source.location(odd[0])}, which is no image: remove the line")
    order = [i for i in order if names[i] in there]
    known = {*names, *elsewhere}
    others = sum(member.by_name and member.name not in known for member in listing.members)
    if others and progress:
        print(f"{others:,} images below {root} are not in {table}: left out", file=sys.stderr, flush=True)
    return _index(source, [group], [row], read.labels[order], read.classes, pixel_format)


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
    """The locations of all images in a folder or archive and below, sorted; what is left out is reported on stderr.

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
    pixel_format: PixelFormat | None,
    empty_classes: bool = False,
    labels_file: str | Path = "",
    corrupt_images: CorruptImages | None = None,
) -> list["_Found"]:
    """What is known of each group's images.

    Args:
        labels_file: lies perhaps among the images, and is not reported as left out.
        corrupt_images: as of `scan_classes`; the cache keeps no group in which a file is corrupt.

    Raises:
        UserError: something stops the index. All is read before that is said, so that all can be named.
    """
    known, kept = _read_cache(cache), True
    rows: list[_Found] = []
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
            for group, (row, new, of_group) in zip(groups, bar, strict=True):
                if group.name and not group.labelled and not row.names:
                    _refuse_archives(source.location(group.name), of_class=True)
                whole = not any(issue.stops for issue in of_group)
                of_group = [_outcome_of_corrupt(issue, corrupt_images) for issue in of_group]
                stops = any(issue.stops for issue in of_group)
                issues += of_group if new else [issue for issue in of_group if issue.stops]
                any_new = any_new or bool(new)
                if group.name and not group.labelled and not row.names and not stops and not empty_classes:
                    where = f"the class {group.name} in {source.root}"
                    issues.append(ImageIssue(where, "has no images", "fill or remove it", stops=True))
                if cache and new and whole and kept:
                    kept = _append(cache, new)
                rows.append(row)
                if pixel_format:
                    issues += _refused(source, group, row, pixel_format)
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
    if pixel_format and not pixel_format.exif_orientation:
        issues += _not_upright(source, groups, rows)
    issues = [
        issue for issue in issues if not labels_file or os.path.abspath(issue.location) != os.path.abspath(labels_file)
    ]
    _stop_at(source, issues)
    return rows


def _outcome_of_corrupt(issue: ImageIssue, corrupt_images: CorruptImages | None) -> ImageIssue:
    """What comes of a file that no image can be read from, where it is for training."""
    if not issue.corrupt or corrupt_images is None:
        return issue
    if corrupt_images == "skip":
        return replace(issue, stops=False, outcome=LEFT_OUT)
    return replace(issue, outcome=f"{issue.outcome}, or have it {SKIP}")


def _refused(source: FileSource, group: Group, row: "_Found", pixel_format: PixelFormat) -> list[ImageIssue]:
    """The images of a group that cannot be read as such."""
    issues = []
    for i, mode in row.deep:
        if refused := refused_depth(mode, pixel_format.depth):
            location = source.location(os.path.join(group.name, row.names[i]))
            issues.append(ImageIssue(location, refused[0], refused[1], mode, stops=True))
    return issues


def _not_upright(source: FileSource, groups: list[Group], rows: list["_Found"]) -> list[ImageIssue]:
    """One line on images that EXIF data say to turn; at every start, as a network learns from them as they lie."""
    odd = [(group, row) for group, row in zip(groups, rows, strict=True) if row.orientations]
    if not odd:
        return []
    group, row = odd[0]
    first = source.location(os.path.join(group.name, row.names[row.orientations[0][0]]))
    count = sum(len(row.orientations) for _, row in odd)
    return [ImageIssue(first, "is rotated by EXIF", ASK_FOR_UPRIGHT, count=count)]


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
        more = f" (and {count - 1:,} more)" if count > 1 else ""
        print(f"warning: {alike[0].location} {fault}{more}: {outcome}", file=sys.stderr, flush=True)
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


def _refuse_archives(folder: str, of_class: bool = False) -> None:
    """Refuse a folder that holds archives where images, or folders of classes, are expected."""
    archives = archives_in(folder)
    if not archives:
        return
    more = f" (and {len(archives) - 1:,} more)" if len(archives) > 1 else ""
    first = os.path.join(folder, archives[0])
    if of_class:
        remedy = "unpack the archive in each class folder"
    elif more:
        packed = f"tar -cf {folder.rstrip(os.sep)}.tar -C {folder} ."
        remedy = f"if each is a class, unpack it into a folder of its name, or put all into one archive ({packed}) and give it"
    elif archives[0].lower().endswith((".tar", ".zip")):
        remedy = f"give {first} itself, which is read in place"
    else:
        remedy = "unpack it"
    raise UserError(f"{folder} holds {archives[0]}{more} and no {'images' if of_class else 'class folders'}: {remedy}")


def _refuse_nested(source: FileSource, groups: list[Group], rows: list["_Found"]) -> None:
    """Refuse one folder that holds the class folders, which would be one class."""
    if len(groups) != 1:
        return
    folders = {os.path.dirname(name).partition(os.sep)[0] for name in rows[0].names}
    if "" not in folders and len(folders) > 1:
        above = source.location(groups[0].name)
        raise UserError(
            f"{source.root} would be one class: it holds only {groups[0].name}, in which are {len(folders)} folders with "
            f"images: if those are the classes, give {above}"
        )


@dataclass(frozen=True)
class _Found:
    """A row of the cache in little memory: n images of a group.

    Attributes:
        names: within the group.
        labels: their classes, of a labelled group.
        orientations: (row, EXIF orientation) of those that are not upright.
        deep: (row, `deep_mode`) of those that have one.
    """

    names: Names
    offsets: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    labels: list[str]
    orientations: list[tuple[int, int]]
    deep: list[tuple[int, str]]


def _found(row: dict[str, Any]) -> _Found:
    return _Found(
        names=Names.of(row["names"]),
        offsets=np.array(row["offsets"], np.int64),
        lengths=np.array(row["lengths"], np.int64),
        sizes=np.array(row["sizes"], np.int32).reshape(-1, 2),
        labels=list(map(sys.intern, row.get("labels", []))),
        orientations=row["orientations"],
        deep=row["deep"],
    )


def _scan_group(
    source: FileSource, group: Group, line: str | None, pool: ThreadPoolExecutor
) -> tuple[_Found, dict[str, Any] | None, list[ImageIssue]]:
    """What a group holds; the row for the cache if that is not what its line there says; and what to tell of the group."""
    known = json.loads(line) if line else None
    stamp = group.stamp
    if known and stamp and known["stamp"] == stamp:
        return _found(known), None, []
    listing = group.list()
    issues = list(listing.issues)
    stamp = stamp or _stamp(listing.members)
    if known and known["stamp"] == stamp:
        return _found(known), None, issues
    members: list[Member] = []
    sizes: list[tuple[int, int]] = []
    orientations: list[tuple[int, int]] = []
    deep: list[tuple[int, str]] = []

    def examine(part: Sequence[Member]) -> list[tuple[_Header | None, list[ImageIssue]]]:
        return [_read_header(source, os.path.join(group.name, member.name), member) for member in part]

    parts = (listing.members[start : start + A_TASK] for start in range(0, len(listing.members), A_TASK))
    examined = itertools.chain.from_iterable(pool.map(examine, parts))
    for member, (header, of_member) in zip(listing.members, examined, strict=True):
        issues += of_member
        if header:
            if header.orientation != 1:
                orientations.append((len(members), header.orientation))
            if header.deep_mode:
                deep.append((len(members), header.deep_mode))
            members.append(member)
            sizes.append(header.size)
    row = {
        "rule": RULE,
        "group": group.key or group.name,
        "stamp": stamp,
        "names": [member.name for member in members],
        "offsets": [member.offset for member in members],
        "lengths": [member.length for member in members],
        "sizes": sizes,
        "orientations": orientations,
        "deep": deep,
    }
    if group.labelled:
        row["labels"] = [member.label for member in members]
    return _found(row), row, issues


def _stamp(members: Iterable[Member]) -> str:
    """What changes when one of the files does."""
    digest = hashlib.sha256()
    for member in members:
        label = f"\0{member.label}" if member.label else ""
        digest.update(os.fsencode(f"{member.name}\0{member.length}\0{member.time}{label}\n"))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Header:
    """What an image's header says: height and width as stored, EXIF orientation, and `deep_mode`."""

    size: tuple[int, int]
    orientation: int
    deep_mode: str


def _read_header(source: FileSource, name: str, member: Member) -> tuple[_Header | None, list[ImageIssue]]:
    """An image's header, None if there is no image that can be read; and what to tell of it."""
    if not member.by_name and (issue := _issue_if_no_image(source, name, member)):
        return None, [issue]
    location = source.location(name)
    try:
        with _open_header(source, name, member) as stream:
            image = open_image(stream, location)
            header = _Header((image.height, image.width), orientation(image), deep_mode(image))
            return header, issues_of(image, location)
    except RefusedImageError as error:
        return None, [ImageIssue(location, error.fault, error.remedy, error.detail, stops=True, corrupt=error.corrupt)]
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


def _labelled_index(
    source: FileSource, groups: list[Group], rows: list[_Found], pixel_format: PixelFormat | None
) -> DatasetIndex:
    """Images in the order in which they would lie in folders of their classes: by class, then by name."""
    labels = [label for row in rows for label in row.labels]
    if not labels:
        raise UserError(f"{source.root} holds no images: check its path")
    numbers = all(label.isascii() and label.isdigit() for label in labels)
    classes = sorted(set(labels), key=(lambda label: (int(label), label)) if numbers else None)
    position = {name: k for k, name in enumerate(classes)}
    of_images = np.fromiter((position[label] for label in labels), np.int64, len(labels))
    order = _by_class_and_name(of_images, [name for row in rows for name in row.names])
    starts = itertools.accumulate((len(row.names) for row in rows), initial=0)
    turns = {start + i: o for start, row in zip(starts, rows, strict=False) for i, o in row.orientations}
    ordered = _Found(
        names=Names.joined([_full_names(group, row) for group, row in zip(groups, rows, strict=True)]).take(order),
        offsets=np.concatenate([row.offsets for row in rows])[order],
        lengths=np.concatenate([row.lengths for row in rows])[order],
        sizes=np.concatenate([row.sizes for row in rows])[order],
        labels=[],
        orientations=[(place, turns[i]) for place, i in enumerate(order.tolist()) if i in turns] if turns else [],
        deep=[],
    )
    return _index(source, [source.flat()], [ordered], of_images[order], tuple(classes), pixel_format)


def _by_class_and_name(labels: np.ndarray, names: list[str]) -> np.ndarray:
    """(N) int64: rows by class, and by name within a class."""
    return np.array(sorted(range(len(names)), key=lambda i: (labels[i], names[i])), np.int64)


def _full_names(group: Group, row: _Found) -> Names:
    """The names of a group's images in the source."""
    return Names.of(os.path.join(group.name, name) for name in row.names) if group.name else row.names


def _index(
    source: FileSource,
    groups: list[Group],
    rows: list[_Found],
    labels: np.ndarray,
    classes: tuple[str, ...],
    pixel_format: PixelFormat | None,
) -> DatasetIndex:
    names = Names.joined([_full_names(group, row) for group, row in zip(groups, rows, strict=True)])
    nothing = np.zeros(0, np.int64)
    offsets = np.concatenate([nothing, *(row.offsets for row in rows)])
    lengths = np.concatenate([nothing, *(row.lengths for row in rows)])
    digest = hashlib.sha256(os.fsencode("\0".join(classes)))
    for start in range(0, len(names), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        rows_of_part = zip(names[part], labels[part].tolist(), lengths[part].tolist(), strict=True)
        digest.update(os.fsencode("".join(f"\n{name}\0{label}\0{length}" for name, label, length in rows_of_part)))
    sizes = np.concatenate([np.zeros((0, 2), np.int32), *(row.sizes for row in rows)])
    turned = None
    if pixel_format and pixel_format.exif_orientation:
        orientations, start = np.ones(len(names), np.uint8), 0
        for row in rows:
            for i, value in row.orientations:
                orientations[start + i] = value
            start += len(row.names)
        turned, on_its_side = orientations != 1, orientations > LAST_THAT_STANDS
        sizes[on_its_side] = sizes[on_its_side, ::-1]
    return DatasetIndex(
        names=names,
        labels=labels if labels.ndim == 2 else labels.astype(np.int64),
        sizes=sizes,
        classes=classes,
        fingerprint=digest.hexdigest(),
        offsets=offsets,
        lengths=lengths,
        source=source,
        turned=turned,
    )


def _read_cache(cache: Path | None) -> dict[str, str]:
    """The newest line of each group. One that a crash cut short is skipped; a file that cannot be read is reported."""
    rows: dict[str, str] = {}
    if cache is None:
        return rows
    try:
        if cache.exists():
            with open(cache) as stream:
                for line in stream:
                    if line.startswith(BEGIN) and line.rstrip().endswith("}"):  # whole, and not of an earlier version
                        with suppress(ValueError):
                            name, _ = json.JSONDecoder().raw_decode(line, len(BEGIN))
                            rows[name] = line
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
