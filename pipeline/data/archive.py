"""Where images lie: loose files, or members of tar archives, as (file, offset, length) without unpacking.

ImageNet is downloaded as ``ILSVRC2012_img_train.tar``, a tar of 1000 tars, one a class, and as
``ILSVRC2012_img_val.tar``, a flat tar whose labels are in the development kit.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError, did_you_mean

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Member:
    """One image: `name` within its `group`, where its bytes are, and when its file changed (ns)."""

    group: str
    name: str
    file: str
    offset: int
    length: int
    time: int

    @property
    def location(self) -> str:
        """Where the image lies, for people: its path, or its name and its archive."""
        packed = self.offset > 0  # behind its header
        return f"{os.path.join(self.group, self.name)} in {self.file}" if packed else self.file


@dataclass(frozen=True)
class Group:
    """The images that are indexed together: those of one class, or of a flat folder.

    Attributes:
        name: the class; empty for a flat folder.
        file: the folder, or the archive that holds the images.
        start: first byte of the group's own archive within `file`; 0 for a folder or a flat archive.
        length: bytes of that archive; 0 for a folder.
        listed: the images themselves, where finding the group has found them too.
    """

    name: str
    file: str
    start: int = 0
    length: int = 0
    listed: tuple[Member, ...] = ()

    def members(self) -> list[Member]:
        """The group's images, sorted by name."""
        found = self.listed or (_members_of_tar(self) if self.length else _members_of_folder(self))
        return sorted(found, key=lambda member: member.name)


class Section(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: str, start: int, length: int):
        self._descriptor = os.open(file, os.O_RDONLY)
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        got = os.preadv(self._descriptor, [memoryview(buffer)[:wanted]], self._start + self._position)
        self._position += got
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def class_groups(root: Path) -> list[Group]:
    """The classes below a folder (``CLASS/IMAGE``), in a tar of tars (``CLASS.tar``) or in a tar of folders, by name.

    Raises:
        UserError: `root` does not exist or holds no classes.
    """
    groups = _find_classes(root)
    if not groups:
        raise UserError(
            f"{root} holds no class folders with images: expected CLASS/IMAGE.jpg (or CLASS.tar in an archive)"
        )
    return groups


def flat_group(root: Path) -> Group:
    """All images of a folder or tar archive without classes.

    Raises:
        UserError: `root` does not exist.
    """
    _check_exists(root)
    return Group("", str(root)) if root.is_dir() else Group("", str(root), 0, root.stat().st_size)


def image_groups(root: Path) -> list[Group]:
    """All images of a folder or tar archive, by class where it has classes.

    Raises:
        UserError: `root` does not exist.
    """
    return _find_classes(root) or [flat_group(root)]


def read_labels(file: Path, names: list[str], classes: tuple[str, ...]) -> list[str]:
    """Class of each image of a flat set, in the order of `names`.

    Args:
        file: either one line ``CLASS`` for each image in sorted order, or lines ``FILE CLASS`` (blank or comma between;
            a first line that names no image is a header; words after CLASS are ignored), or ImageNet's development kit.
        classes: the names that a class may have.

    Raises:
        UserError: the file cannot be read or does not fit the images.
    """
    try:
        if file.name.endswith((".tar.gz", ".tgz")):
            lines = _devkit_labels(file)
        else:
            lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, tarfile.TarError, KeyError, ValueError) as error:
        raise UserError(f"cannot read the label file {file}: {error}") from None
    known = set(classes)
    if all(line in known or len(line.replace(",", " ").split()) == 1 for line in lines):
        if len(lines) != len(names):
            raise UserError(
                f"{file} has {len(lines)} labels for {len(names)} images: one line an image in sorted order"
            )
        labels = lines
    else:
        labels = _labels_by_file(file, lines, names, known)
    check_classes(file, labels, classes)
    return labels


def _labels_by_file(file: Path, lines: list[str], names: list[str], known: set[str]) -> list[str]:
    """Classes from lines ``FILE CLASS``, where FILE may lack its suffix."""
    position = {key: i for i, name in enumerate(names) for key in (Path(name).stem, Path(name).name, name)}
    labels: list[str | None] = [None] * len(names)
    for number, line in enumerate(lines, start=1):
        image, _, rest = (part.strip() for part in line.partition("," if "," in line else " "))
        if image not in position:
            if number == 1:  # a header
                continue
            raise UserError(f"{file}, line {number}: there is no image '{image}'")
        if labels[position[image]] is not None:
            raise UserError(f"{file}, line {number}: a second label for the image '{image}'")
        labels[position[image]] = rest if rest in known else (rest.split() or [""])[0]
    if None in labels:
        raise UserError(f"{file} has no line for the image {names[labels.index(None)]}: expected 'FILE CLASS'")
    return labels


def _devkit_labels(file: Path) -> list[str]:
    """WordNet ids of the validation images from ILSVRC2012_devkit_t12.tar.gz: ids by number, numbers by image."""
    from scipy.io import loadmat

    with tarfile.open(file) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers()}
        synsets = loadmat(tar.extractfile(members["meta.mat"]), squeeze_me=True)["synsets"]
        numbers = tar.extractfile(members["ILSVRC2012_validation_ground_truth.txt"]).read().split()
    wordnet_ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    return [wordnet_ids[int(number)] for number in numbers]


def check_classes(origin: object, names: list[str], classes: tuple[str, ...]) -> None:
    """Refuse a class name that is none of `classes`."""
    known = set(classes)
    for name in names:
        if name not in known:
            numbered = all(known_name.isdigit() for known_name in classes)
            remedy = ", which are numbers (--classes FILE names them)" if numbered else did_you_mean(name, classes)
            raise UserError(f"{origin}: the class '{name}' is none of the network's{remedy}")


def _check_exists(root: Path) -> None:
    if not root.exists():
        raise UserError(f"the data folder {root} does not exist: set data.dir (or --data)")
    if root.is_file() and not tarfile.is_tarfile(root):
        raise UserError(f"{root} is neither a folder nor a tar archive")


def _find_classes(root: Path) -> list[Group]:
    """The classes of `root`, by name; none in a flat folder or archive."""
    _check_exists(root)
    if root.is_dir():
        names = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
        groups = [Group(name, str(root / name)) for name in names]
    else:
        groups = _groups_of_tar(str(root))
    return sorted(groups, key=lambda group: group.name)


def _groups_of_tar(file: str) -> list[Group]:
    status = os.stat(file)
    groups, folders = [], {}
    for name, offset, length in _tar_members(file, 0, status.st_size):
        path = Path(name)
        if path.suffix == ".tar":
            groups.append(Group(path.stem, file, offset, length))
        elif path.suffix.lower() in IMAGE_SUFFIXES and path.parent.name:
            member = Member(path.parent.name, path.name, file, offset, length, status.st_mtime_ns)
            folders.setdefault(path.parent, []).append(member)
    groups += [Group(folder.name, file, 0, status.st_size, tuple(members)) for folder, members in folders.items()]
    for name, count in Counter(group.name for group in groups).items():
        if count > 1:
            raise UserError(
                f"{file} holds the class '{name}' {count} times: training and validation need archives of their own"
            )
    return groups


def _members_of_folder(group: Group) -> Iterator[Member]:
    seen = set()
    for parent, _, names in os.walk(group.file, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            raise UserError(f"the link {parent} leads to a folder that is already part of {group.file}: remove it")
        seen.add((status.st_dev, status.st_ino))
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES):
                path = os.path.join(parent, name)
                try:
                    status = os.stat(path)
                    length, time = status.st_size, status.st_mtime_ns
                except FileNotFoundError:  # a link that leads nowhere: whoever opens it complains
                    length = time = 0
                yield Member(group.name, os.path.relpath(path, group.file), path, 0, length, time)


def _members_of_tar(group: Group) -> Iterator[Member]:
    time = os.stat(group.file).st_mtime_ns
    for name, offset, length in _tar_members(group.file, group.start, group.length):
        if name.lower().endswith(IMAGE_SUFFIXES):
            yield Member(group.name, name, group.file, offset, length, time)


def _tar_members(file: str, start: int, length: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset in `file`, length) of the regular files of a tar archive that is a part of `file`."""
    try:
        with tarfile.open(fileobj=Section(file, start, length), mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    yield os.path.normpath(member.name), start + member.offset_data, member.size
    except tarfile.TarError as error:
        raise UserError(f"{file} is not a whole tar archive ({error}): download it again") from None
