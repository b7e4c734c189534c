"""Images in a zip file, which is not unpacked: a stored image is a range of the file's bytes, a deflated one begins there.

A part of a zip file is named by the path inside it, as ``KAGGLE.zip/ILSVRC/Data/CLS-LOC/train``.
"""

import dataclasses
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import PurePath

from pipeline.data.archive import (
    OpenFile,
    Section,
    groups_of_folders,
    left_out,
    link_inside,
    listed,
    refuse_parts,
    sort_groups,
)
from pipeline.data.image_files import beside_classes, is_image_by_name
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member, Stream
from pipeline.errors import UserError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # its mark, and the lengths of the name and of what follows it
ENCRYPTED = 1  # bit of a file's flags
AT_ONCE = 1 << 16  # compressed bytes that are read at once


class ZipSource:
    """Image files in a zip file, by folder or flat.

    An image's offset is twice the position of its first byte, plus 1 if it is deflated.

    Attributes:
        root: the file, or a folder inside it.
    """

    def __init__(self, root: str, file: str):
        self.root = root
        self._file = OpenFile(file)
        self._inside = os.path.relpath(root, file)

    @classmethod
    def at(cls, root: str) -> FileSource | None:
        file = root
        while not os.path.lexists(file) and (above := os.path.dirname(file)) != file:
            file = above
        return cls(root, file) if os.path.isfile(file) and zipfile.is_zipfile(file) else None

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        """The folders that hold images, whatever lies above them."""
        issues: list[ImageIssue] = []
        folders: dict[str, list[Member]] = {}
        for item in self._walk():
            if isinstance(item, ImageIssue):
                issues.append(item)
            elif os.sep not in item.name:
                issues.append(beside_classes(self.location(item.name)))
            else:
                folder, name = os.path.split(item.name)
                folders.setdefault(folder, []).append(Member(name, item.offset, item.length, by_name=item.by_name))
        by_path = {PurePath(folder): members for folder, members in folders.items()}
        parts = next((folder.parts for folder in by_path if "train" in folder.parts), ())
        inside = os.path.join(self.root, *parts[: parts.index("train") + 1]) if parts else ""
        remedy = (
            f"give one of the folders in it, as {inside}" if inside else "unpack it, and give the folder of the classes"
        )
        refuse_parts(self.root, by_path, remedy)
        groups, beside = groups_of_folders(self, by_path, self._positions, self._stamp())
        return sort_groups(self.root, groups, remedy), issues + beside

    def flat(self) -> Group:
        return Group("", lambda: self._positions(PurePath(), self._walk()), self._stamp())

    def open(self, name: str, offset: int, length: int) -> Stream:
        position, deflated = offset >> 1, offset & 1
        if deflated:
            return io.BytesIO(self._inflate(name, position, length))
        return Section(self._file.opened(), position, length)

    def place(self, name: str, offset: int) -> tuple[str | int, int] | None:
        return None if offset & 1 else (self._file.opened().fileno(), offset >> 1)

    def location(self, name: str) -> str:
        return f"{name} in {self.root}"

    def _stamp(self) -> str:
        return f"{self._file.stamp()} {self._inside}"

    def _inflate(self, name: str, position: int, length: int) -> bytes:
        """Undo a deflated file's compression.

        Raises:
            OSError: it is damaged.
        """
        inflater, parts, got = zlib.decompressobj(-zlib.MAX_WBITS), [], 0
        try:
            while got < length and not inflater.eof:
                packed = os.pread(self._file.opened().fileno(), AT_ONCE, position)
                if not packed:
                    break
                position += len(packed)
                parts.append(inflater.decompress(packed, length - got))
                got += len(parts[-1])
                while inflater.unconsumed_tail and got < length:
                    parts.append(inflater.decompress(inflater.unconsumed_tail, length - got))
                    got += len(parts[-1])
        except zlib.error as error:
            raise OSError(f"it is damaged in {self._file.path} ({error})") from None
        return b"".join(parts)

    def _walk(self) -> Iterator[Member | ImageIssue]:
        """The files below the folder inside, and what is left out. Their offsets are those of their headers."""
        prefix = "" if self._inside == os.curdir else f"{self._inside}/"
        try:
            with zipfile.ZipFile(self._file.path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self._file.path} is not a whole zip file ({error}): download or pack it again") from None
        if prefix and not any(entry.filename.startswith(prefix) for entry in entries):
            raise UserError(f"there is no folder {self._inside} in {self._file.path}: unzip -l lists what there is")
        del archive  # which knows the entries too
        entries.reverse()
        while entries:  # each is let go when the next is looked at: a million take a gigabyte
            entry = entries.pop()
            name = os.path.normpath(entry.filename)
            if entry.is_dir() or not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix)
            location = self.location(name)
            if issue := left_out(name, location):
                yield issue
            elif stat.S_ISLNK(entry.external_attr >> 16):
                yield link_inside(location)
            elif entry.flag_bits & ENCRYPTED:
                yield ImageIssue(location, "is encrypted", "unpack the zip file, and give the folder", stops=True)
            elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                remedy = "unpack the zip file, or pack it with zip -0"
                yield ImageIssue(location, "is neither stored nor deflated", remedy, stops=True)
            else:
                offset = 2 * entry.header_offset + (entry.compress_type == zipfile.ZIP_DEFLATED)
                yield Member(name, offset, entry.file_size, by_name=is_image_by_name(name))

    def _positions(self, folder: PurePath, found: Iterable[Member | ImageIssue]) -> Listing:
        """What was found in a folder, with the offsets of first bytes: local headers differ from the central ones."""

        def location(name: str) -> str:
            return self.location(str(folder / name))

        listing = listed(found, location)
        members, issues = [], list(listing.issues)
        file = self._file.opened().fileno()
        for member in listing.members:
            header = os.pread(file, LOCAL_HEADER.size, member.offset >> 1)
            if len(header) == LOCAL_HEADER.size and header.startswith(b"PK\3\4"):
                _, name, extra = LOCAL_HEADER.unpack(header)
                first = member.offset + 2 * (LOCAL_HEADER.size + name + extra)
                members.append(dataclasses.replace(member, offset=first))
            else:
                outcome = "download or pack the zip file again"
                issues.append(ImageIssue(location(member.name), "is not where the zip file says", outcome, stops=True))
        return Listing(tuple(members), tuple(issues))
