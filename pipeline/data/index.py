"""Which images there are: paths, labels and sizes, found by one scan of a folder."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.errors import UserError, did_you_mean

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
SCAN_THREADS = 16  # reading headers waits for the disk, or for the network behind it


@dataclass(frozen=True)
class DatasetIndex:
    """The images of one data set, in a fixed order.

    Attributes:
        root: folder that the paths are relative to.
        paths: (N) file paths, sorted within each class.
        labels: (N) int64, index into `classes`.
        sizes: (N, 2) int32, height and width in pixels as stored (EXIF orientation is not applied).
        classes: class names, sorted; for class folders the folders' names.
        fingerprint: SHA-256 of class names, paths, labels and file sizes.
    """

    root: str
    paths: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def with_classes(self, classes: tuple[str, ...]) -> "DatasetIndex":
        """Return this index with labels that count in `classes`, of which its own may be a part.

        Raises:
            UserError: an image's class is not among `classes`.
        """
        position = {name: i for i, name in enumerate(classes)}
        for name in self.classes:
            if name not in position:
                raise UserError(
                    f"{self.root}: the class '{name}' is none of the network's{did_you_mean(name, classes)}"
                )
        own = np.array([position[name] for name in self.classes], np.int64)
        return dataclasses.replace(self, labels=own[self.labels], classes=classes)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """(N) paths that can be opened."""
        return tuple(os.path.join(self.root, path) for path in self.paths)


def scan_class_folders(root: str | Path, cache: Path | None = None, progress: bool = False) -> DatasetIndex:
    """Index a folder that holds one sub-folder a class, as ImageNet's ``train/n01440764/*.JPEG``.

    Args:
        cache: file that keeps image sizes from scan to scan; files whose bytes or time changed are read again.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: there is no such folder, no image, a class without images, or a file that is no image.
    """
    root = _existing_folder(root)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_below(root, name)
        if not found:
            raise UserError(
                f"the class folder {root / name} holds no images ({' '.join(IMAGE_SUFFIXES)}): fill or remove it"
            )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise UserError(f"{root} holds no class folders with images: expected {root}/CLASS/IMAGE.jpg")
    return _build(root, paths, labels, classes, cache, progress)


def scan_flat_folder(
    root: str | Path,
    labels_file: str | Path,
    classes: Iterable[str],
    cache: Path | None = None,
    progress: bool = False,
) -> DatasetIndex:
    """Index a folder of images whose labels are in a text file.

    Args:
        labels_file: either one line ``CLASS`` for each image in sorted order, or lines ``FILE CLASS`` (blank or
            comma between; a first line that names no file is a header; words after CLASS are ignored).
        classes: the class names that labels may take, in the order of the network's outputs.

    Raises:
        UserError: the folder or file is missing, or images and labels do not match.
    """
    root = _existing_folder(root)
    classes = tuple(classes)
    paths = _images_below(root, "")
    if not paths:
        raise UserError(f"{root} holds no images ({' '.join(IMAGE_SUFFIXES)})")
    names = _read_labels(Path(labels_file), paths)
    position = {name: i for i, name in enumerate(classes)}
    for path, name in zip(paths, names, strict=True):
        if name not in position:
            raise UserError(
                f"{labels_file}: the class '{name}' of {path} is none of the network's{did_you_mean(name, classes)}"
            )
    return _build(root, paths, [position[name] for name in names], classes, cache, progress)


def synthetic_index(images: int, classes: int, size: int, split: str) -> DatasetIndex:
    """Index of `images` generated square images of `size` pixels, evenly spread over `classes`."""
    labels = np.arange(images, dtype=np.int64) % classes
    sizes = np.full((images, 2), size, np.int32)
    names = tuple(f"class{i:04d}" for i in range(classes))
    key = hashlib.sha256(f"synthetic {split} {images} {classes} {size}".encode()).hexdigest()
    return DatasetIndex(f"synthetic-{split}", (), labels, sizes, names, key)


def _existing_folder(root: str | Path) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"the data folder {root} {'is not a folder' if root.exists() else 'does not exist'}: set data.dir"
        )
    return root


def _images_below(root: Path, folder: str) -> list[str]:
    """Paths relative to `root` of all images in `folder` and below it, sorted."""
    found = []
    for parent, _, names in os.walk(root / folder, followlinks=True):
        relative = os.path.relpath(parent, root)
        found += [os.path.normpath(os.path.join(relative, n)) for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(found)


def _read_labels(file: Path, paths: list[str]) -> list[str]:
    """Class name of each path."""
    try:
        rows = [line.replace(",", " ").split() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the label file {file}: {error}") from None
    if rows and all(len(row) == 1 for row in rows):
        if len(rows) != len(paths):
            raise UserError(f"{file} has {len(rows)} labels for {len(paths)} images: one line an image in sorted order")
        return [row[0] for row in rows]
    by_name = {row[0]: row[1] for row in rows if len(row) > 1}
    names = [by_name.get(path, by_name.get(Path(path).name, by_name.get(Path(path).stem))) for path in paths]
    if None in names:
        raise UserError(f"{file} has no line for the image {paths[names.index(None)]}: expected 'FILE CLASS'")
    return names


def _build(
    root: Path, paths: list[str], labels: list[int], classes: Iterable[str], cache: Path | None, progress: bool
) -> DatasetIndex:
    stamps = np.array([_stamp(root / path) for path in paths], np.int64)
    sizes = _cached_sizes(cache, paths, stamps)
    missing = [i for i, size in enumerate(sizes) if size[0] == 0]
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = pool.map(lambda i: _read_size(root / paths[i]), missing)
        bar = tqdm(found, f"scan {root}", len(missing), unit=" images", disable=None if progress else True, leave=False)
        for i, size in zip(missing, bar, strict=True):
            sizes[i] = size
    if cache and missing:
        _write_cache(cache, paths, stamps, sizes)
    classes = tuple(classes)
    digest = hashlib.sha256("\0".join(classes).encode())
    for path, label, (size_in_bytes, _) in zip(paths, labels, stamps.tolist(), strict=True):
        digest.update(f"\n{path}\0{label}\0{size_in_bytes}".encode())
    return DatasetIndex(str(root), tuple(paths), np.array(labels, np.int64), sizes, classes, digest.hexdigest())


def _stamp(file: Path) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _read_size(file: Path) -> tuple[int, int]:
    """Height and width from the file's header."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} is not an image that can be read ({type(error).__name__}): repair or remove it"
        ) from None


def _cached_sizes(cache: Path | None, paths: list[str], stamps: np.ndarray) -> np.ndarray:
    """(N, 2) sizes of the files that the cache knows with the same bytes and time; 0 for the others."""
    sizes = np.zeros((len(paths), 2), np.int32)
    if cache and cache.exists():
        with np.load(cache) as stored:
            row = {name: i for i, name in enumerate(stored["paths"].tobytes().decode().split("\n"))}
            rows = np.array([row.get(path, -1) for path in paths])
            same = (rows >= 0) & (stored["stamps"][rows] == stamps).all(axis=1)
            sizes[same] = stored["sizes"][rows[same]]
    return sizes


def _write_cache(cache: Path, paths: list[str], stamps: np.ndarray, sizes: np.ndarray) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".tmp{os.getpid()}.npz")
    np.savez(temporary, paths=np.frombuffer("\n".join(paths).encode(), np.uint8), stamps=stamps, sizes=sizes)
    os.replace(temporary, cache)
