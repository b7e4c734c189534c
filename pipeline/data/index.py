"""Which images there are: names, labels, sizes and where their bytes lie."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.labels import find_classes
from pipeline.data.names import Names
from pipeline.data.source import Source, Stream


@dataclass(frozen=True)
class DatasetIndex:
    """The images of one data set, in an order that depends on their names alone.

    Attributes:
        names: (N) ``CLASS/IMAGE``, sorted within each class, or ``IMAGE`` in a flat set; kept as `Names`.
        labels: (N) int64, index into `classes`; or, of images with several labels, (N, classes) uint8, 0 or 1.
        sizes: (N, 2) int32, height and width in pixels as the image is read: as stored, or turned (see `turned`).
        classes: class names; for class folders the folders' names, sorted.
        fingerprint: SHA-256 of class names, image names, labels and lengths; where most images have one length, of the
            first 256 KiB of 64 of them, too; of images in memory, of their pixels.
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
        parts: dict[str, Any] = {name: getattr(self, name)[rows] for name in ("labels", "sizes", "offsets", "lengths")}
        assert isinstance(self.names, Names)
        names = self.names.take(rows)
        turned = None if self.turned is None else self.turned[rows]
        parts |= {
            "names": names,
            "turned": turned,
            "fingerprint": taken_fingerprint(self.fingerprint, rows),
            "whole": self.fingerprint,
        }
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


def taken_fingerprint(whole: str, rows: np.ndarray) -> str:
    """That of the rows, (n) int64, of an index with the fingerprint `whole`."""
    return hashlib.sha256(whole.encode() + rows.astype("<i8").tobytes()).hexdigest()


def _called_alike(name: str, classes: tuple[str, ...]) -> str:
    """The only one of `classes` with the same letters and digits, else `name`."""
    key = _letters_and_digits(name)
    alike = [other for other in classes if key and _letters_and_digits(other) == key]
    return alike[0] if len(alike) == 1 else name


def _letters_and_digits(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()
