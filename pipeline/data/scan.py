"""The index of a data set, found by one scan of its files.

The scan is parallel, keeps what it finds in a cache file (index_cache.py), and reads nothing again that has not changed.
"""

import hashlib
import itertools
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.config import CorruptImages
from pipeline.data.folder import archives_in
from pipeline.data.image_files import (
    ASK_FOR_UPRIGHT,
    COLORS,
    LAST_THAT_STANDS,
    LEFT_OUT,
    ROTATED,
    SKIP,
    PixelFormat,
    refused_depth,
)
from pipeline.data.index import DatasetIndex
from pipeline.data.index_cache import append, read_cache
from pipeline.data.label_table_source import LabelTableSource
from pipeline.data.labels import labels_needed, read_labels
from pipeline.data.names import Names
from pipeline.data.reader import read_all
from pipeline.data.scan_group import FoundImages, images_of, scan_group
from pipeline.data.source import FileSource, Group, ImageIssue
from pipeline.data.sources import open_source
from pipeline.data.split_names import KNOWN_SPLITS, SPLIT_NAMES
from pipeline.errors import UserError

THREADS = 16  # listing folders and reading headers waits for the disk, or for the network behind it
AT_ONCE = 1 << 16  # images that the fingerprint takes together
SAMPLED = 64  # images whose first bytes the fingerprint takes where most have one length
FIRST = 1 << 18  # bytes of each: of large ones on a slow disk all would take long
NAMED = 5  # of what stops, that an error names


def scan_classes(
    root: str | Path | FileSource,
    cache: Path | None = None,
    *,
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
    if names.issubset(KNOWN_SPLITS) and not names.isdisjoint(SPLIT_NAMES["train"]):
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
    *,
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
    found = read_labels(Path(labels_file), list(row.names), classes, str(root))
    position = {name: i for i, name in enumerate(classes)}
    return _index(source, [group], [row], np.array([position[name] for name in found]), classes, pixel_format)


def scan_label_table(
    source: LabelTableSource,
    cache: Path | None = None,
    *,
    progress: bool = False,
    pixel_format: PixelFormat = COLORS,
    corrupt_images: CorruptImages | None = None,
) -> DatasetIndex:
    """Index the images that a table of several labels names.

    Other images there are left out, which is reported on stderr when they are first found.

    Args:
        cache, progress, pixel_format, corrupt_images: as of `scan_classes`.

    Raises:
        UserError: the images or the table are missing, cannot be read or do not match.
    """
    (row,) = _scan(source, [source.flat()], [], cache, progress, pixel_format, corrupt_images=corrupt_images)
    there = set(row.names)
    odd = [name for name in source.row_of if name not in there]
    if odd and corrupt_images != "skip":
        raise UserError(f"{source.root} names {source.location(odd[0])}, which is no image: remove the line")
    labels = source.table.labels[[line for name, line in source.row_of.items() if name in there]]
    return _index(source.images, [source.images.flat()], [row], labels, source.table.classes, pixel_format)


def find_images(root: str | Path) -> list[str]:
    """The locations of all images in a folder or archive and below, sorted; what is left out is reported on stderr.

    Raises:
        UserError: something cannot be read.
    """
    source = open_source(root)
    images, issues = images_of(source, source.flat())
    _stop_at(source, issues)
    return [source.location(name) for name, _ in images]


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
) -> list[FoundImages]:
    """What is known of each group's images.

    Args:
        labels_file: lies perhaps among the images, and is not reported as left out.
        corrupt_images: as of `scan_classes`; the cache keeps no group in which a file is corrupt.

    Raises:
        UserError: something stops the index. All is read before that is said, so that all can be named.
    """
    known, kept = read_cache(cache), True
    rows: list[FoundImages] = []
    issues: list[ImageIssue] = []
    any_new = False
    with ThreadPoolExecutor(THREADS) as group_pool, ThreadPoolExecutor(THREADS) as header_pool:
        try:
            found = group_pool.map(
                lambda group: scan_group(source, group, known.get(group.key or group.name), header_pool), groups
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
                    kept = append(cache, new)
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


def _refused(source: FileSource, group: Group, row: FoundImages, pixel_format: PixelFormat) -> list[ImageIssue]:
    """The images of a group that cannot be read as such."""
    issues = []
    for i, mode in row.deep:
        if refused := refused_depth(mode, pixel_format.depth):
            location = source.location(os.path.join(group.name, row.names[i]))
            issues.append(ImageIssue(location, refused[0], refused[1], mode, stops=True))
    return issues


def _not_upright(source: FileSource, groups: list[Group], rows: list[FoundImages]) -> list[ImageIssue]:
    """One line on images that EXIF data say to turn; at every start, as a network learns from them as they lie."""
    odd = [(group, row) for group, row in zip(groups, rows, strict=True) if row.orientations]
    if not odd:
        return []
    group, row = odd[0]
    first = source.location(os.path.join(group.name, row.names[row.orientations[0][0]]))
    count = sum(len(row.orientations) for _, row in odd)
    return [ImageIssue(first, ROTATED, ASK_FOR_UPRIGHT, count=count)]


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
        flags = "--several-labels --verify" if isinstance(source, LabelTableSource) else "--verify"
        all_of_them = f"(python -m tools.index {source.root} {flags} lists all)"
        raise UserError(f"{len(stops):,} things stop the index of {source.root}: {named}{others} {all_of_them}")


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


def _refuse_nested(source: FileSource, groups: list[Group], rows: list[FoundImages]) -> None:
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


def _labelled_index(
    source: FileSource, groups: list[Group], rows: list[FoundImages], pixel_format: PixelFormat | None
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
    ordered = FoundImages(
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


def _full_names(group: Group, row: FoundImages) -> Names:
    """The names of a group's images in the source."""
    return Names.of(os.path.join(group.name, name) for name in row.names) if group.name else row.names


def _index(
    source: FileSource,
    groups: list[Group],
    rows: list[FoundImages],
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
    for i in _sampled(lengths):
        digest.update(_first_bytes(source, names[i], int(offsets[i]), int(lengths[i])))
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


def _sampled(lengths: np.ndarray) -> list[int]:
    """Images, evenly spread, of the length that most have, as in formats without compression: it says nothing of them."""
    values, counts = np.unique(lengths, return_counts=True)
    if len(lengths) < 2 or 2 * counts.max() <= len(lengths):
        return []
    alike = np.flatnonzero(lengths == values[counts.argmax()])
    return alike[np.linspace(0, len(alike) - 1, min(SAMPLED, len(alike))).round().astype(int)].tolist()


def _first_bytes(source: FileSource, name: str, offset: int, length: int) -> bytes:
    try:
        with source.open(name, offset, length) as stream:
            return read_all(stream, min(length, FIRST)).tobytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot read the image {source.location(name)}: {reason}: check that it is there and may be read"
        ) from None
