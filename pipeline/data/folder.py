"""Images as loose files: ``CLASS/IMAGE`` below a folder, or all files of a folder."""

import os
import stat
from dataclasses import dataclass
from functools import partial

from pipeline.data.image_files import (
    OWN_CACHE,
    beside_classes,
    hidden,
    is_image_by_name,
    no_file,
    unreadable,
    unreadable_format,
)
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member, Stream

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # of which no image can be read by itself
ARCHIVES = (".tar", ".zip", *COMPRESSED_TARS)


@dataclass(frozen=True)
class FolderSource:
    """Image files below the folder `root`; links are followed."""

    root: str

    @classmethod
    def at(cls, root: str) -> FileSource | None:
        return cls(root) if os.path.isdir(root) else None

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        """The folders in this one. A class may have folders of its own, whose images are the class's."""
        folders, files, issues = _look_into(self.root)
        issues += [beside_classes(path) for path, _ in files]
        names = sorted(os.path.basename(path) for path, _ in folders)
        return [Group(name, partial(_list, os.path.join(self.root, name))) for name in names], issues

    def flat(self) -> Group:
        return Group("", partial(_list, self.root))

    def open(self, name: str, offset: int, length: int) -> Stream:
        return open(self.location(name), "rb", buffering=0)

    def place(self, name: str, offset: int) -> tuple[str | int, int]:
        return self.location(name), 0

    def location(self, name: str) -> str:
        return os.path.join(self.root, name)


def archives_in(folder: str) -> list[str]:
    """The archives in a folder that holds neither folders nor images beside them, sorted; none if it holds some, or is none."""
    if not os.path.isdir(folder):
        return []
    folders, files, _ = _look_into(folder)
    names = sorted(os.path.basename(path) for path, _ in files)
    if folders or any(map(is_image_by_name, names)):
        return []
    return [name for name in names if name.lower().endswith(ARCHIVES)]


def _list(root: str) -> Listing:
    """All files below a folder."""
    members: list[Member] = []
    issues: list[ImageIssue] = []
    seen: dict[tuple[int, int], str] = {}
    waiting = [("", root)]

    def link_in(folder: str) -> str | None:
        """The first link on the way from `root` to a folder."""
        path = root
        for part in os.path.relpath(folder, root).split(os.sep):
            path = os.path.join(path, part)
            if os.path.islink(path):
                return path
        return None

    while waiting:
        prefix, folder = waiting.pop()
        try:
            status = os.stat(folder)
        except OSError as error:
            issues.append(unreadable(folder, error))
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            link = link_in(folder) or link_in(seen[identity]) or folder
            fault = f"leads to a folder that is already part of {root}"
            issues.append(ImageIssue(f"the link {link}", fault, "remove it", stops=True))
            continue
        seen[identity] = folder
        folders, files, found = _look_into(folder)
        issues += found
        waiting += [(os.path.join(prefix, os.path.basename(path)), path) for path, _ in folders]
        for path, status in files:
            name = os.path.join(prefix, os.path.basename(path))
            members.append(Member(name, 0, status.st_size, status.st_mtime_ns, is_image_by_name(name)))
    return Listing(tuple(sorted(members, key=lambda member: member.name)), tuple(sorted(issues, key=str)))


Entries = list[tuple[str, os.stat_result]]


def _look_into(folder: str) -> tuple[Entries, Entries, list[ImageIssue]]:
    """The folders and the files in a folder, and what is left out or cannot be read."""
    folders: Entries = []
    files: Entries = []
    issues: list[ImageIssue] = []
    try:
        names = os.listdir(folder)
    except OSError as error:
        return [], [], [unreadable(folder, error)]
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith(".") and name.endswith(OWN_CACHE):
            continue
        if issue := hidden(name, path):
            issues.append(issue)
            continue
        try:
            status = os.stat(path)
        except OSError as error:
            issues.append(unreadable(path, error))
            continue
        if stat.S_ISDIR(status.st_mode):
            folders.append((path, status))
        elif issue := no_file(path, status.st_mode) or unreadable_format(name, path):
            issues.append(issue)
        else:
            files.append((path, status))
    return folders, files, issues
