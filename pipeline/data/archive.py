"""Images in a tar archive, which is not unpacked: an image is a range of the archive's bytes.

ImageNet is downloaded as ``ILSVRC2012_img_train.tar``, a tar of 1000 tars, one a class, and as
``ILSVRC2012_img_val.tar``, a flat tar whose labels are in the development kit.
"""

import dataclasses
import io
import itertools
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import PurePath

from pipeline.data.image_files import beside_classes, hidden, is_image_by_content, is_image_by_name, unreadable_format
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member, Source, Stream
from pipeline.data.split_names import KNOWN_SPLITS, SPLIT_NAMES
from pipeline.errors import UserError

_OPENING = threading.Lock()
LONGEST_END = (1 << 20) + 2 * tarfile.BLOCKSIZE  # bytes: two blocks, and what fills up the greatest record
# What the kept rows of archives follow, as `index_cache.RULE`: to their end, one file of a name, and which folders are parts
# of a data set.
RULE = "4"
MORE_THAN_ONCE = "is there more than once"
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class TarSource:
    """Image files in the tar archive `root`: of folders, of one tar a class, or flat."""

    def __init__(self, root: str):
        self.root = root
        self._file = OpenFile(root)

    @classmethod
    def at(cls, root: str) -> FileSource | None:
        if not os.path.isfile(root):
            return None
        refuse_compressed(root)
        return cls(root) if tarfile.is_tarfile(root) else None

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        """The tars in this one, or the folders that hold images, whatever lies above them."""
        groups: list[Group] = []
        issues: list[ImageIssue] = []
        archives: list[Member] = []
        folders: dict[PurePath, list[Member]] = {}
        stamp, size = self._file.stamp(), os.path.getsize(self.root)
        for item in walk_tar(self._file, 0, size, self.location):
            if isinstance(item, ImageIssue):
                issues.append(item)
                continue
            path = PurePath(item.name)
            if path.suffix == ".tar":
                archives.append(item)
            elif path.parent.name:
                member = Member(path.name, item.offset, item.length, by_name=item.by_name)
                folders.setdefault(path.parent, []).append(member)
            else:
                issues.append(beside_classes(self.location(item.name)))
        of_archives = listed(archives, self.location)
        for item in of_archives.members:
            name = PurePath(item.name).stem
            listing = partial(self._list, name, item.offset, item.length)
            groups.append(Group(name, listing, f"{stamp} {item.offset} {item.length}"))
        remedy = "training and validation need archives of their own"
        refuse_parts(self.root, folders, remedy)
        of_folders, beside = groups_of_folders(self, folders, self._in_folder, f"{stamp} 0 {size}")
        return sort_groups(self.root, groups + of_folders, remedy), [*issues, *of_archives.issues, *beside]

    def flat(self) -> Group:
        size = os.path.getsize(self.root)
        return Group("", partial(self._list, "", 0, size), f"{self._file.stamp()} 0 {size}")

    def open(self, name: str, offset: int, length: int) -> Stream:
        return Section(self._file.opened(), offset, length)

    def place(self, name: str, offset: int) -> tuple[str | int, int]:
        return self._file.opened().fileno(), offset

    def location(self, name: str) -> str:
        return f"{name} in {self.root}"

    def _list(self, name: str, start: int, length: int) -> Listing:
        """All files of the archive, or of the archive called `name` that is a part of it."""

        def location(inside: str) -> str:
            return self.location(os.path.join(name, inside))

        return listed(walk_tar(self._file, start, length, location), location)

    def _in_folder(self, folder: PurePath, members: list[Member]) -> Listing:
        return listed(members, lambda name: self.location(str(folder / name)))


class OpenFile:
    """A file that is opened when it is first read, and then stays open; another process opens its own.

    On a network file system each opening costs a round trip.
    """

    def __init__(self, path: str):
        self.path = path
        self._stream: io.FileIO | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "_stream": None}

    def opened(self) -> io.FileIO:
        if self._stream is None:
            with _OPENING:  # a second one would be closed with the first one's number in use
                self._stream = self._stream or io.FileIO(self.path)
        return self._stream

    def stamp(self) -> str:
        """What changes when the file does, without reading it; or what is made of it here."""
        status = os.stat(self.path)
        return f"{RULE} {status.st_mtime_ns} {status.st_size}"


class Section(io.RawIOBase):
    """A part of an open file as a file of its own, which has its own position. Closing it leaves the file open."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._position)]
        total = 0
        while total < len(wanted):  # tarfile takes a short read for the end
            got = os.preadv(self._file.fileno(), [wanted[total:]], self._start + self._position)
            if not got:
                break
            total += got
            self._position += got
        return total


def walk_tar(
    file: OpenFile, start: int, length: int, location_of: Callable[[str], str]
) -> Iterator[Member | ImageIssue]:
    """The regular files of a tar archive from byte `start` of a file on, and what is left out.

    Raises:
        UserError: it is compressed, damaged or incomplete.
    """
    section = Section(file.opened(), start, length)
    try:
        with tarfile.open(fileobj=section, mode="r:") as tar:
            while entry := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte an image
                name = os.path.normpath(entry.name)
                location = location_of(name)
                if entry.isdir():
                    continue
                if issue := left_out(name, location):
                    yield issue
                elif entry.islnk() or entry.issym():
                    yield link_inside(location)
                elif entry.issparse():
                    yield ImageIssue(location, "is a sparse file in the archive", "pack it without tar -S", stops=True)
                elif not entry.isreg():
                    yield ImageIssue(location, "is a named pipe or a device", "left out")
                else:
                    yield Member(name, start + entry.offset_data, entry.size, by_name=is_image_by_name(name))
            if not _is_end(section, tar.offset):
                raise tarfile.ReadError(f"at byte {start + tar.offset:,} is neither a file nor the end")
    except tarfile.TarError as error:
        if program := _compressed(file.path, start):
            raise UserError(
                f"{file.path} holds a compressed archive: unpack it, {program} what is in it and pack it again"
            ) from None
        raise UserError(f"{file.path} is not a whole tar archive ({error}): download or pack it again") from None


def _is_end(section: Section, offset: int) -> bool:
    """Whether nothing but zeros is left of a tar archive, which are no more than end one.

    tarfile takes any header that is damaged, cut or overwritten with zeros for the end. Without a block of zeros the end
    looks as one that was cut off between two files.
    """
    section.seek(offset)
    rest = section.read(LONGEST_END + 1)
    return tarfile.BLOCKSIZE <= len(rest) <= LONGEST_END and not any(rest)


def listed(found: Iterable[Member | ImageIssue], location_of: Callable[[str], str]) -> Listing:
    """The files of an archive, and what there is to tell. Of several of one name it is the last, as when they are unpacked."""
    members: list[Member] = []
    issues: list[ImageIssue] = []
    for item in found:
        if isinstance(item, Member):
            members.append(item)
        else:
            issues.append(item)
    members.sort(key=lambda member: member.name)
    again = {a.name for a, b in itertools.pairwise(members) if a.name == b.name}
    if again:
        outcome = "the last one is taken, as when the archive is unpacked"
        issues.append(ImageIssue(location_of(min(again)), MORE_THAN_ONCE, outcome, count=len(again)))
        members = list({member.name: member for member in members}.values())
    return Listing(tuple(members), tuple(issues))


def groups_of_folders(
    source: Source,
    folders: dict[PurePath, list[Member]],
    listing: Callable[[PurePath, list[Member]], Listing],
    stamp: str,
) -> tuple[list[Group], list[ImageIssue]]:
    """The folders of an archive that hold images as classes, whatever lies above them, and what is no part of any.

    Args:
        folders: the files in each.
        listing: what is known of a folder's files when they are listed.
        stamp: the archive's.
    """
    groups: list[Group] = []
    issues: list[ImageIssue] = []
    shared = os.path.commonpath([os.path.join(os.sep, folder) for folder in folders])[1:] if len(folders) > 2 else ""
    for member in folders.pop(PurePath(shared), []):  # all classes are below this folder
        issues.append(beside_classes(source.location(os.path.join(shared, member.name))))
    for folder, members in _by_class(folders).items():
        if any(member.by_name for member in members) or _any_image(source, listing(folder, members)):
            groups.append(Group(folder.name, partial(listing, folder, members), stamp))
        else:
            first = source.location(str(folder / members[0].name))
            issues.append(ImageIssue(first, "lies in a folder without images", "left out"))
    return groups, issues


def _by_class(folders: dict[PurePath, list[Member]]) -> dict[PurePath, list[Member]]:
    """The files by class folder, by their names in it.

    As where class folders are unpacked, a folder within one belongs to it: one in a folder that has images of its own, or the
    only one that each class has images in, as Tiny ImageNet's `images`.
    """
    with_images = set(_with_images(folders))
    kinds = {(folder.name, len(folder.parts)) for folder in with_images}
    outer = {folder.parent.name for folder in with_images}
    inner = len(with_images) > 1 and len(kinds) == 1 and "" not in outer and not outer.issubset(KNOWN_SPLITS)
    holding = {
        folder for folder in with_images if folder.name not in KNOWN_SPLITS
    }  # a stray image makes no class of a whole set
    classes: dict[PurePath, list[Member]] = {}
    for folder, members in folders.items():
        above = [folder.parent] if inner and folder in with_images else [a for a in folder.parents if a in holding]
        of_class = classes.setdefault(above[-1] if above else folder, [])
        if above:
            inside = folder.relative_to(above[-1])
            members = [dataclasses.replace(member, name=str(inside / member.name)) for member in members]
        of_class += members
    return _at_one_depth(classes)


def _at_one_depth(classes: dict[PurePath, list[Member]]) -> dict[PurePath, list[Member]]:
    """The same, where some class folders lie deeper than others: then those right below the folder that all share are the
    classes, as in a folder."""
    with_images = _with_images(classes)
    shared = _shared(with_images)
    names = {folder.parts[shared] for folder in with_images if len(folder.parts) > shared}
    if len({len(folder.parts) for folder in with_images}) < 2 or not names.isdisjoint(KNOWN_SPLITS):
        return classes
    found: dict[PurePath, list[Member]] = {}
    for folder, members in classes.items():
        outer = PurePath(*folder.parts[: shared + 1])
        inside = folder.relative_to(outer)
        found.setdefault(outer, []).extend(dataclasses.replace(m, name=str(inside / m.name)) for m in members)
    return found


def _with_images(folders: Mapping[PurePath, list[Member]]) -> list[PurePath]:
    """The folders that have images, by their names."""
    return [folder for folder, members in folders.items() if any(member.by_name for member in members)]


def _shared(folders: list[PurePath]) -> int:
    """How many folders lie above them all, or are one of them."""
    levels = zip(*(folder.parts for folder in folders), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))


def refuse_parts(root: str, folders: Mapping[PurePath, list[Member]], remedy: str) -> None:
    """Refuse an archive of a whole data set, whose parts would be taken for classes.

    Args:
        folders: the files in each folder.
    """
    with_images = _with_images(folders)
    shared = _shared(with_images)
    parts = {folder.parts[shared] for folder in with_images if len(folder.parts) > shared}
    if len(parts) > 1 and parts.issubset(KNOWN_SPLITS) and not parts.isdisjoint(SPLIT_NAMES["train"]):
        named = " and ".join(sorted(parts))
        raise UserError(f"{root} holds {named}: parts of a data set, which are no classes: {remedy}")


def sort_groups(root: str, groups: list[Group], remedy: str) -> list[Group]:
    """The classes by name.

    Raises:
        UserError: two have one name.
    """
    for name, count in Counter(group.name for group in groups).items():
        if count > 1:
            raise UserError(f"{root} holds the class '{name}' {count} times: {remedy}")
    return sorted(groups, key=lambda group: group.name)


def left_out(name: str, location: str) -> ImageIssue | None:
    """Why a file of an archive is left out by its name, if it is."""
    for part in name.split(os.sep):
        if issue := hidden(part, location):
            return issue
    return unreadable_format(name, location)


def link_inside(location: str) -> ImageIssue:
    """A link in an archive, whose target may be anywhere."""
    return ImageIssue(location, "is a link inside an archive", "left out; pack the file itself")


def _any_image(source: Source, listing: Listing) -> bool:
    for member in listing.members:
        with source.open(member.name, member.offset, member.length) as stream:
            if is_image_by_content(stream):
                return True
    return False


def refuse_compressed(file: str) -> None:
    """Refuse an archive that is compressed as a whole.

    Raises:
        UserError: names the program that undoes it.
    """
    if program := _compressed(file, 0):
        raise UserError(f"{file} is compressed, so that no image in it can be read by itself: {program} it")


def _compressed(file: str, start: int) -> str | None:
    """The program that undoes the compression of what begins at this byte; None if there is none."""
    with open(file, "rb") as stream:
        stream.seek(start)
        head = stream.read(6)
    return next((program for magic, program in COMPRESSED.items() if head.startswith(magic)), None)
