"""What a group of images holds (a class, or a flat folder), by the headers of its files."""

import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.image_files import (
    MAY_BE_TRANSPARENT,
    OPAQUE,
    RefusedImageError,
    deep_mode,
    is_image_by_content,
    may_be_transparent,
    no_image,
    open_image,
    orientation,
    several_pictures,
    unreadable,
)
from pipeline.data.names import Names
from pipeline.data.source import FileSource, Group, ImageIssue, Member

A_TASK = 16  # headers that a thread reads before it takes others
HEADER_BYTES = 16384  # what is read of an image at once to find its size


@dataclass(frozen=True)
class FoundImages:
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


def _found(row: dict[str, Any]) -> FoundImages:
    return FoundImages(
        names=Names.of(row["names"]),
        offsets=np.array(row["offsets"], np.int64),
        lengths=np.array(row["lengths"], np.int64),
        sizes=np.array(row["sizes"], np.int32).reshape(-1, 2),
        labels=list(map(sys.intern, row.get("labels", []))),
        orientations=[(i, value) for i, value in row["orientations"]],
        deep=[(i, mode) for i, mode in row["deep"]],
    )


def _kept(line: str | None, group: Group) -> tuple[str, FoundImages] | None:
    """The stamp and the images that a group's line in the cache has; None if there is none, or if it is damaged.

    Two that append at once on a network file system may mix their lines. An earlier version kept empty labels.
    """
    if line is None:
        return None
    try:
        row = json.loads(line)
        stamp, found = row["stamp"], _found(row)
        images = len(found.names)
        whole = images == len(found.offsets) == len(found.lengths) == len(found.sizes)
        whole = whole and (not group.labelled or images == len(found.labels)) and all(found.labels)
        whole = whole and all(0 <= i < images for i, _ in (*found.orientations, *found.deep))
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    return (stamp, found) if whole else None


def scan_group(
    source: FileSource, group: Group, line: str | None, pool: ThreadPoolExecutor
) -> tuple[FoundImages, dict[str, Any] | None, list[ImageIssue]]:
    """What a group holds; the row for the cache if that is not what its line there says; and what to tell of the group."""
    known_stamp, known = _kept(line, group) or ("", None)
    stamp = group.stamp
    if known and stamp and known_stamp == stamp:
        return known, None, []
    listing = group.list()
    issues = list(listing.issues)
    stamp = stamp or _stamp(listing.members)
    if known and known_stamp == stamp:
        return known, None, issues
    members: list[Member] = []
    sizes: list[tuple[int, int]] = []
    orientations: list[tuple[int, int]] = []
    deep: list[tuple[int, str]] = []
    transparent: list[str] = []

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
            if header.transparent:
                transparent.append(member.name)
            members.append(member)
            sizes.append(header.size)
    if transparent:
        first = source.location(os.path.join(group.name, transparent[0]))
        issues.append(ImageIssue(first, MAY_BE_TRANSPARENT, OPAQUE, count=len(transparent)))
    row = {
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


def _stamp(members: Iterable[Member]) -> str:
    """What changes when one of the files does."""
    digest = hashlib.sha256()
    for member in members:
        place = f"@{member.offset}" if member.offset else ""  # images of one length may change places in an archive
        label = f"\0{member.label}" if member.label else ""
        digest.update(os.fsencode(f"{member.name}\0{member.length}{place}\0{member.time}{label}\n"))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Header:
    """What an image's header says: height and width as stored, EXIF orientation, `deep_mode`, and `may_be_transparent`."""

    size: tuple[int, int]
    orientation: int
    deep_mode: str
    transparent: bool


def _read_header(source: FileSource, name: str, member: Member) -> tuple[_Header | None, list[ImageIssue]]:
    """An image's header, None if there is no image that can be read; and what to tell of it."""
    if not member.by_name and (issue := _issue_if_no_image(source, name, member)):
        return None, [issue]
    location = source.location(name)
    try:
        with _open_header(source, name, member) as stream:
            image = open_image(stream, location)
            transparent = may_be_transparent(image)
            header = _Header((image.height, image.width), orientation(image), deep_mode(image), transparent)
            issue = several_pictures(image, location)
            return header, [issue] if issue else []
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
