"""Which images there are: names, labels, sizes and where their bytes lie, found by one scan.

The scan is parallel and keeps what it finds, group by group (a class, or a flat folder), in a cache file: one that was
broken off goes on where it was, and later ones read again only what has changed.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.config import Dataset
from pipeline.data.archive import Group, Member, Section, check_classes, class_groups, flat_group, read_labels
from pipeline.errors import UserError

THREADS = 16  # listing folders and reading headers waits for the disk, or for the network behind it


class RefusedImageError(UserError):
    """The index takes no such image.

    Attributes:
        fault: what is wrong with it, as "is not an image".
        detail: what Pillow says of it.
        remedy: what to do.
    """

    def __init__(self, location: str, fault: str, detail: str, remedy: str):
        super().__init__(f"{location} {fault} ({detail}): {remedy}")
        self.fault, self.detail, self.remedy = fault, detail, remedy


@dataclass(frozen=True)
class ArraySource:
    """A split of one of torchvision's data sets in a folder, which each process reads into memory for itself.

    Attributes:
        download: have torchvision fetch what the folder lacks.
    """

    dataset: Dataset
    dir: str
    split: Literal["train", "test"]
    download: bool = dataclasses.field(default=False, compare=False)


@dataclass(frozen=True)
class DatasetIndex:
    """The images of one data set, in a fixed order that does not depend on whether they are unpacked.

    Attributes:
        root: folder or archive that was scanned.
        names: (N) ``CLASS/IMAGE``, sorted within each class, or ``IMAGE`` in a flat set.
        labels: (N) int64, index into `classes`.
        sizes: (N, 2) int32, height and width in pixels as stored (EXIF orientation is not applied).
        classes: class names; for class folders the folders' names, sorted.
        fingerprint: SHA-256 of class names, image names, labels and lengths; of images in memory, of their pixels too.
        offsets, lengths: (N) int64, the image's bytes within its file.
        packed: `root` is an archive that holds all images; else each is a file of its own below `root`.
        arrays: where the images come from if they are held in memory; `offsets` are then their places there.
    """

    root: str
    names: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    offsets: np.ndarray
    lengths: np.ndarray
    packed: bool
    arrays: ArraySource | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, i: int) -> str:
        """The file that holds image `i`."""
        return self.root if self.packed else os.path.join(self.root, self.names[i])

    def location(self, i: int) -> str:
        """Where image `i` lies, for people: its path, or its name and its archive."""
        return f"{self.names[i]} in {self.root}" if self.packed else self.file(i)

    def take(self, rows: np.ndarray) -> "DatasetIndex":
        """Return the index of these rows, (n) int64."""
        digest = hashlib.sha256(self.fingerprint.encode() + rows.astype("<i8").tobytes())
        parts = {name: getattr(self, name)[rows] for name in ("labels", "sizes", "offsets", "lengths")}
        names = tuple(self.names[row] for row in rows.tolist())
        return dataclasses.replace(self, names=names, fingerprint=digest.hexdigest(), **parts)

    def with_classes(self, classes: tuple[str, ...]) -> "DatasetIndex":
        """Return this index with labels that count in `classes`, of which its own may be a part.

        Where they are not the same, names are compared by their letters and digits alone: no folder is called T-shirt/top.

        Raises:
            UserError: an image's class is not among `classes`.
        """
        position = {name: i for i, name in enumerate(classes)}
        names = [name if name in position else _called_alike(name, classes) for name in self.classes]
        if len(set(names)) < len(names):  # two of them are alike
            names = list(self.classes)
        check_classes(self.root, names, classes)
        own = np.array([position[name] for name in names], np.int64)
        return dataclasses.replace(self, labels=own[self.labels], classes=classes)


def _called_alike(name: str, classes: tuple[str, ...]) -> str:
    """The only one of `classes` with the same letters and digits, else `name`."""
    key = _letters_and_digits(name)
    alike = [other for other in classes if key and _letters_and_digits(other) == key]
    return alike[0] if len(alike) == 1 else name


def _letters_and_digits(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def scan_classes(root: str | Path, cache: Path | None = None, progress: bool = False) -> DatasetIndex:
    """Index images by class: ``CLASS/IMAGE`` in a folder or a tar archive, or ImageNet's tar of tars.

    Args:
        cache: file that keeps what was found; groups whose files have changed are read again.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: `root` does not exist, holds no image or a class without images, or a file is no image.
    """
    groups = class_groups(Path(root))
    rows = _scan(Path(root), groups, cache, progress)
    for group, row in zip(groups, rows, strict=True):
        if not row["names"]:
            raise UserError(f"the class {group.name} in {root} has no images: fill or remove it")
    labels = np.repeat(np.arange(len(groups)), [len(row["names"]) for row in rows])
    return _index(root, groups, rows, labels, tuple(group.name for group in groups))


def scan_flat(
    root: str | Path,
    labels_file: str | Path,
    classes: Iterable[str],
    cache: Path | None = None,
    progress: bool = False,
) -> DatasetIndex:
    """Index a folder or tar archive of images whose labels are in a file (see `archive.read_labels`).

    Args:
        classes: the class names that labels may take, in the order of the network's outputs.

    Raises:
        UserError: the images or the file are missing or do not match.
    """
    group, classes = flat_group(Path(root)), tuple(classes)
    (row,) = _scan(Path(root), [group], cache, progress)
    if not row["names"]:
        raise UserError(f"{root} holds no images")
    found = read_labels(Path(labels_file), row["names"], classes)
    position = {name: i for i, name in enumerate(classes)}
    return _index(root, [group], [row], np.array([position[name] for name in found]), classes)


def open_image(stream: BinaryIO, location: str) -> Image.Image:
    """Open an image, of which this reads no more than the header.

    Raises:
        RefusedImageError: it is none, or none for these networks.
    """
    try:
        image = Image.open(stream)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        detail = type(error).__name__
        raise RefusedImageError(location, "is not an image that can be read", detail, "repair or remove it") from None
    if image.mode.startswith(("I", "F")):
        raise RefusedImageError(location, "has more than 8 bits a colour", image.mode, "convert or remove it")
    return image


def synthetic_index(images: int, classes: int, size: int, split: str) -> DatasetIndex:
    """Index of `images` generated square images of `size` pixels, evenly spread over `classes`."""
    key = hashlib.sha256(f"synthetic {split} {images} {classes} {size}".encode()).hexdigest()
    nowhere = np.zeros(images, np.int64)
    return DatasetIndex(
        root=f"synthetic {split}",
        names=tuple(f"{i:08d}" for i in range(images)),
        labels=np.arange(images, dtype=np.int64) % classes,
        sizes=np.full((images, 2), size, np.int32),
        classes=tuple(f"class{i:04d}" for i in range(classes)),
        fingerprint=key,
        offsets=nowhere,
        lengths=nowhere,
        packed=False,
    )


def cache_beside(root: Path, otherwise: Path) -> Path:
    """The cache file for `root`: beside it, or in the folder `otherwise` if that is read-only."""
    folder = root.parent if os.access(root.parent, os.W_OK) else otherwise
    return folder / f".{root.name}.index.jsonl"


def known_cache(root: Path) -> Path | None:
    """The cache file beside `root`, if there is one."""
    cache = cache_beside(root, otherwise=root.parent)
    return cache if cache.exists() and os.access(cache, os.W_OK) else None


def _scan(root: Path, groups: list[Group], cache: Path | None, progress: bool) -> list[dict[str, Any]]:
    """Names, offsets, lengths and sizes of each group's images."""
    known = _read_cache(cache)
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(THREADS) as group_pool, ThreadPoolExecutor(THREADS) as header_pool:
        found = group_pool.map(lambda group: _scan_group(group, known.get(group.name), header_pool), groups)
        try:
            for row in tqdm(
                found, f"index {root}", len(groups), unit=" classes", disable=None if progress else True, leave=False
            ):
                if cache and known.get(row["group"]) is not row:
                    _append(cache, row)
                results.append(row)
        except BaseException:  # do not index the rest before saying what is wrong
            group_pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _scan_group(group: Group, known: dict[str, Any] | None, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """One group's row; the known one if nothing has changed since."""
    if group.length:
        members, stamp = None, _stamp_of_archive(group)
    else:
        members = group.members()
        stamp = _stamp_of_files(members)
    if known and known["stamp"] == stamp:
        return known
    members = members if members is not None else group.members()
    return {
        "group": group.name,
        "stamp": stamp,
        "names": [member.name for member in members],
        "offsets": [member.offset for member in members],
        "lengths": [member.length for member in members],
        "sizes": list(pool.map(_read_size, members)),
    }


def _stamp_of_archive(group: Group) -> str:
    """What changes when the archive does, without reading it."""
    status = os.stat(group.file)
    return f"{status.st_mtime_ns} {status.st_size} {group.start} {group.length}"


def _stamp_of_files(members: list[Member]) -> str:
    """What changes when one of the files does."""
    digest = hashlib.sha256()
    for member in members:
        digest.update(os.fsencode(f"{member.name}\0{member.length}\0{member.time}\n"))
    return digest.hexdigest()


def _read_size(member: Member) -> list[int]:
    """Height and width from an image's header."""
    try:
        with io.BufferedReader(Section(member.file, member.offset, member.length), 16384) as stream:
            image = open_image(stream, member.location)
            return [image.height, image.width]
    except OSError as error:
        raise RefusedImageError(member.location, "cannot be read", error.strerror, "repair or remove it") from None


def _index(
    root: str | Path, groups: list[Group], rows: list[dict[str, Any]], labels: np.ndarray, classes: tuple[str, ...]
) -> DatasetIndex:
    names = tuple(os.path.join(group.name, n) for group, row in zip(groups, rows, strict=True) for n in row["names"])
    offsets, lengths = (np.array([x for row in rows for x in row[key]], np.int64) for key in ("offsets", "lengths"))
    digest = hashlib.sha256(os.fsencode("\0".join(classes)))
    for name, label, length in zip(names, labels.tolist(), lengths.tolist(), strict=True):
        digest.update(os.fsencode(f"\n{name}\0{label}\0{length}"))
    return DatasetIndex(
        root=str(root),
        names=names,
        labels=labels.astype(np.int64),
        sizes=np.array([size for row in rows for size in row["sizes"]], np.int32),
        classes=classes,
        fingerprint=digest.hexdigest(),
        offsets=offsets,
        lengths=lengths,
        packed=os.path.isfile(root),
    )


def _read_cache(cache: Path | None) -> dict[str, dict[str, Any]]:
    """The newest row of each group; a line that a crash cut short is passed over."""
    rows = {}
    if cache and cache.exists():
        with open(cache) as stream:
            for line in stream:
                try:
                    row = json.loads(line)
                    rows[row["group"]] = row
                except (ValueError, KeyError, TypeError):
                    continue
    return rows


def _append(cache: Path, row: dict[str, Any]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache, "a") as stream:  # the new line comes first: it ends one that a crash cut short
        stream.write("\n" + json.dumps(row, separators=(",", ":")))
