"""What a kind of place that holds images must offer: a folder, an archive, a table, arrays in memory.

To add a kind of place for image files: write one module with a class like `Source`, and add one
line to `sources.SOURCES`. Indexing, its cache, labels, training, evaluation and --verify then work with it unchanged. A
`place` as in `PlacedSource`, or `pixels` as in `SourceInMemory`, spares the native loader a way through Python.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Stream = io.RawIOBase | io.BufferedIOBase  # what `open(file, "rb")` gives, with or without a buffer


@dataclass(frozen=True)
class ImageIssue:
    """Something to tell about a file or an image.

    Attributes:
        location: where it lies, for people.
        fault: what is odd, as "is truncated".
        outcome: what comes of it, or what to do.
        detail: more about this very one.
        stops: the index or a run stops there.
        count: files of which the same is to be reported; this is the first.
        corrupt: the file's bytes are the cause, so that data.corrupt_images skip leaves it out of training.
    """

    location: str
    fault: str
    outcome: str
    detail: str = ""
    stops: bool = False
    count: int = 1
    corrupt: bool = False

    def __str__(self) -> str:
        return f"{self.location} {self.fault}{self.detail and f' ({self.detail})'}: {self.outcome}"


@dataclass(frozen=True, slots=True)
class Member:
    """A file that is an image, or may be one.

    Attributes:
        name: path within its group.
        offset, length: its bytes, as the source's `open` takes them; length is that of the image file.
        time: when it changed (ns); 0 of a part of a file, which changes as a whole.
        by_name: its name says that it is an image. Otherwise its content decides.
        label: its class, in a group of labelled members.
    """

    name: str
    offset: int
    length: int
    time: int = 0
    by_name: bool = True
    label: str = ""


@dataclass(frozen=True)
class Listing:
    """The files of a group sorted by name, and what was found beside them."""

    members: tuple[Member, ...]
    issues: tuple[ImageIssue, ...] = ()


@dataclass(frozen=True)
class Group:
    """The files that are listed and cached together: those of one class, or all of a set without classes.

    Attributes:
        name: the class; empty for a set without classes; of labelled members any name of its own.
        list: finds the files.
        stamp: changes when the files do, and is known without listing them; empty: list them to know.
        labelled: the group is no class, and each member says its own.
        key: its name in the cache, if that is another than `name`.
    """

    name: str
    list: Callable[[], Listing]
    stamp: str = ""
    labelled: bool = False
    key: str = ""


class Source(Protocol):
    """Images and how their bytes are read. It is pickled for other ranks, so that it may not keep a file open in that."""

    @property
    def root(self) -> str:
        """What the user calls it: a folder or a file."""

    def open(self, name: str, offset: int, length: int) -> Stream:
        """Open one image file as a stream that can seek. Threads call this at once.

        Args:
            name: ``GROUP/MEMBER``, or ``MEMBER`` in a set without classes.
            offset, length: as in `Member`.

        Raises:
            OSError: it cannot be opened.
        """

    def location(self, name: str) -> str:
        """Where an image lies, for people."""


@runtime_checkable
class PlacedSource(Protocol):
    """A source whose images lie as they are in files of this machine, so that they can be read without Python."""

    def place(self, name: str, offset: int) -> tuple[str | int, int] | None:
        """The path of the file, or its number if it is open and stays so, and the image's first byte in it; None if this
        image does not lie as it is."""


@runtime_checkable
class SourceInMemory(Protocol):
    """A source whose images are one array, so that they need not be read one by one."""

    def pixels(self) -> np.ndarray:
        """(N, H, W, 3) uint8, or (N, H, W) of gray images, contiguous; an image's offset is its number."""


class FileSource(Source, Protocol):
    """A place with image files, which are still to be found."""

    @classmethod
    def at(cls, root: str) -> "FileSource | None":
        """The source at this existing path, or None if the path is not of this kind."""

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        """The classes, which may be none, and what is no part of any class; or groups of labelled members.

        Raises:
            UserError: the place as a whole cannot be read.
        """

    def flat(self) -> Group:
        """All images as one group without a class."""
