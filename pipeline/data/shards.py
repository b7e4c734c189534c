"""Images in WebDataset's shards: tar archives that hold, for each image, ``KEY.jpg`` and its class.

The class is the text of ``KEY.cls``; else the field ``label``, ``cls`` or ``class`` of ``KEY.json``; else the text of
``KEY.txt``. KEY is a path up to the first dot of its last part. (Format: webdataset.github.io/webdataset.)

Shards are given as ``train-{000000..000146}.tar``, as ``train-*.tar``, as a folder that holds nothing but shards, or as
one file. They are read in place, as if they were one file: an image's offset counts from the first shard's first byte.
"""

import bisect
import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial

from pipeline.data.archive import OpenFile, Section, listed, refuse_compressed, walk_tar
from pipeline.data.image_files import is_image_by_name
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member, Stream
from pipeline.errors import UserError
from pipeline.machine import allow_many_files

LABEL_SUFFIXES = ("cls", "json", "txt")  # in the order in which a label is looked for
LABEL_FIELDS = ("label", "cls", "class")
LONGEST_LABEL = 4096  # bytes of a file that may be one
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardSource:
    """The images of the tar archives `files`, which the user calls `root`."""

    def __init__(self, root: str, files: list[str]):
        self.root = root
        self._files = [OpenFile(file) for file in files]
        sizes = [os.path.getsize(file) for file in files]
        self._starts = [0, *itertools.accumulate(sizes)]
        folder = os.path.commonpath([os.path.dirname(file) or os.curdir for file in files])
        self._names = [os.path.relpath(file, folder) for file in files]

    @classmethod
    def at(cls, root: str) -> FileSource | None:
        files = [root] if os.path.isfile(root) else _in_folder(root) if os.path.isdir(root) else expand(root)
        if not files:
            return None
        if root not in files:
            for file in files:
                refuse_compressed(file)
        return cls(root, files) if _is_shard(files[0], root) else None

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        """A group of labelled images for each shard."""
        groups = []
        for i, (name, file) in enumerate(zip(self._names, self._files, strict=True)):
            groups.append(Group(name, partial(self._list, i), f"{file.stamp()} {self._starts[i]}", labelled=True))
        return groups, []

    def flat(self) -> Group:
        def list_all() -> Listing:
            members: list[Member] = []
            issues: list[ImageIssue] = []
            for i, name in enumerate(self._names):
                listing = self._list(i, labelled=False)
                members += [Member(os.path.join(name, m.name), m.offset, m.length) for m in listing.members]
                issues += listing.issues
            return Listing(tuple(sorted(members, key=lambda member: member.name)), tuple(issues))

        return Group("", list_all, " ".join(file.stamp() for file in self._files))

    def open(self, name: str, offset: int, length: int) -> Stream:
        i = self._shard(offset)
        return Section(self._opened(i), offset - self._starts[i], length)

    def place(self, name: str, offset: int) -> tuple[str | int, int]:
        i = self._shard(offset)
        return self._opened(i).fileno(), offset - self._starts[i]

    def location(self, name: str) -> str:
        return f"{name} in {self.root}"

    def _shard(self, offset: int) -> int:
        return bisect.bisect_right(self._starts, offset) - 1

    def _opened(self, i: int):
        allow_many_files()  # what the system does not allow shows when one is opened
        return self._files[i].opened()

    def _list(self, i: int, labelled: bool = True) -> Listing:
        """The images of one shard."""
        name, file, start = self._names[i], self._files[i], self._starts[i]
        samples: dict[str, dict[str, Member]] = {}

        def location_of(path: str) -> str:
            return self.location(os.path.join(name, path))

        self._opened(i)
        found = listed(walk_tar(file, 0, self._starts[i + 1] - start, location_of), location_of)
        for member in found.members:
            key, suffix = _key(member.name)
            parts = samples.setdefault(key, {})
            while suffix in parts:  # as KEY.jpg and KEY.JPG
                suffix += " "
            parts[suffix] = member
        members, issues = [], list(found.issues)
        for key, parts in samples.items():
            location = location_of(key)
            images = [part for part in parts.values() if part.by_name]
            if len(images) > 1:  # as KEY.jpg and KEY.mask.png
                images = [part for suffix, part in parts.items() if part.by_name and "." not in suffix]
            if len(images) != 1:
                how = "is several images of one key" if images else "has no image"
                issues.append(ImageIssue(location, how, "pack the shard with one image a key", stops=True))
                continue
            label = self._label(i, parts) if labelled else ""
            if label is None:
                fault = f"has no label (no {key}.cls, .json with 'label' or .txt)"
                issues.append(ImageIssue(location, fault, "pack the shard with labels", stops=True))
                continue
            (image,) = images
            members.append(Member(image.name, start + image.offset, image.length, label=label))
        return Listing(tuple(sorted(members, key=lambda member: member.name)), tuple(issues))

    def _label(self, i: int, parts: dict[str, Member]) -> str | None:
        """The class of a sample; None if it says none."""
        for suffix in LABEL_SUFFIXES:
            if not (part := parts.get(suffix)) or (suffix != "json" and part.length > LONGEST_LABEL):
                continue
            text = os.pread(self._opened(i).fileno(), part.length, part.offset).decode(errors="replace").strip()
            label = _field(text) if suffix == "json" else text
            if label and "\n" not in label:
                return label
        return None


def _field(text: str) -> str | None:
    """The class that a sample's JSON names."""
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    values = (fields[name] for name in LABEL_FIELDS if name in fields) if isinstance(fields, dict) else ()
    return next((str(value) for value in values if isinstance(value, str) or type(value) is int), None)


def _key(name: str) -> tuple[str, str]:
    """A file's key and what follows the first dot, in small letters."""
    folder, last = os.path.split(name)
    stem, _, suffix = last.partition(".")
    return os.path.join(folder, stem), suffix.lower()


def expand(pattern: str) -> list[str]:
    """The files that a pattern names.

    Raises:
        UserError: one of a range is missing.
    """
    if found := _RANGE.search(pattern):
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        files = [f"{pattern[: found.start()]}{n:0{len(first)}d}{pattern[found.end() :]}" for n in numbers]
        missing = [file for file in files if not os.path.isfile(file)]
        if len(missing) == len(files):
            return []
        if missing:
            raise UserError(
                f"{pattern} names {len(files):,} shards, and {len(missing):,} of them are missing, as {missing[0]}: download "
                "them, or give another range"
            )
        return files
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder or os.curdir):  # whose own name may have brackets
        files = glob.glob(name, root_dir=folder or None) if glob.has_magic(name) else []
        return sorted(os.path.join(folder, file) for file in files)
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else []


def _in_folder(folder: str) -> list[str]:
    """The shards of a folder that holds nothing else but small files beside them, as an index."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError:
        return []
    if any(entry.is_dir() or is_image_by_name(entry.name) for entry in entries):
        return []
    return sorted(entry.path for entry in entries if entry.name.endswith(".tar"))


def _is_shard(file: str, root: str) -> bool:
    """Whether a tar archive begins with files of one key, of which one is an image and one may be its label.

    Args:
        root: what names it. If that is the file itself, one with folders in it is an archive of class folders, unless it says
            classes.

    Raises:
        UserError: it is damaged, and a pattern or a folder of tars names it, which are of no other kind.
    """
    try:
        head = list(itertools.islice(_files(file), 3))
    except OSError:
        return False
    except UserError:
        if root == file or not tarfile.is_tarfile(file):
            return False
        raise
    if not head:
        return False
    keys = [_key(member.name) for member in head]
    suffixes = {suffix for (key, suffix) in keys if key == keys[0][0]}
    images = {suffix for suffix in suffixes if is_image_by_name(f"x.{suffix}")}
    if root == file and os.sep in keys[0][0] and "cls" not in suffixes:
        return False
    return bool(images) and bool(suffixes & set(LABEL_SUFFIXES))


def _files(file: str) -> Iterator[Member]:
    walk = walk_tar(OpenFile(file), 0, os.path.getsize(file), str)
    return (item for item in walk if isinstance(item, Member))
