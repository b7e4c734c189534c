"""Labels that lie in a file beside a flat set of images, and how class names of one place are found in another's."""

import csv
import os
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline.errors import UserError, did_you_mean

LABEL_FILE_SUFFIXES = (".txt", ".csv", ".tsv")


def read_labels(file: Path, names: list[str], classes: tuple[str, ...], root: str = "") -> list[str]:
    """Class of each image of a flat set, in the order of `names`.

    Args:
        file: ImageNet's development kit (.tar.gz), or text. Either one line ``CLASS`` for each image in sorted order, or
            lines ``FILE CLASS`` with a blank, a tab or a comma between, quoted or not (words after CLASS are ignored; a
            header is one first line that names neither an image nor a class). Where all classes are numbers and those of
            the training set are names, they count the sorted names from 0, as Caffe's lists do.
        classes: the names that a class may have.
        root: where the images lie: FILE may be the end of an image's path in there, or lead there.

    Raises:
        UserError: the file cannot be read or does not fit the images.
    """
    try:
        if file.name.endswith((".tar.gz", ".tgz")):
            lines = _devkit_labels(file)
        else:
            text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # file names may be of any encoding
            lines = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError, KeyError, ValueError) as error:
        raise UserError(f"cannot read the label file {file}: {error}") from None
    known = set(classes)
    if all(line in known or len(line.replace(",", " ").split()) == 1 for line in lines):
        if len(lines) != len(names):
            raise UserError(
                f"{file} has {len(lines)} labels for {len(names)} images: one line an image in sorted order"
            )
        labels = lines
        _warn_of_numbers(file, names)
    else:
        try:
            labels = _labels_by_file(file, lines, names, known, root)
        except csv.Error as error:  # as of a line without end
            raise UserError(f"{file} has no lines 'FILE CLASS' ({error}): give a file that has") from None
    return find_classes(file, labels, classes)


def _warn_of_numbers(file: Path, names: list[str]) -> None:
    """Say which order lines without file names are taken in, where the images' names have another one by their numbers."""

    def by_number(name: str) -> list[int | str]:
        parts = re.split(r"([0-9]+)", name)  # text and numbers in turn
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    odd = next((pair for pair in zip(names, sorted(names, key=by_number), strict=True) if pair[0] != pair[1]), None)
    if odd:
        print(
            f"warning: the lines of {file} are taken for the images in the order of text, {odd[0]} before {odd[1]}: if they "
            "count the images by number, give lines FILE CLASS",
            file=sys.stderr,
            flush=True,
        )


def find_classes(origin: object, names: list[str], classes: tuple[str, ...]) -> list[str]:
    """Find each of `names`, which may repeat, among `classes`.

    Numbers among classes that are none are taken as positions from 0, if one of them is 0; this is said on stderr.

    Raises:
        UserError: a name is none of the classes.
    """
    known = set(classes)
    unknown = [name for name in names if name not in known]
    if not unknown:
        return names
    numbers = {int(name) for name in names if name.isascii() and name.isdigit()}
    all_numbers = len(unknown) == len(names) and all(name.isascii() and name.isdigit() for name in names)
    if all_numbers and 0 in numbers and max(numbers) < len(classes):
        print(
            f"warning: the classes of {origin} are numbers: taken as positions in the sorted class names, counted from 0 "
            f"(0 is {classes[0]}, {max(numbers)} is {classes[max(numbers)]})",
            file=sys.stderr,
            flush=True,
        )
        return [classes[int(name)] for name in names]
    if all_numbers:
        remedy = (
            f": these are numbers from {min(numbers)} to {max(numbers)} in an order that is not known; give labels by "
            f"name, as '{classes[0]}' (for ImageNet's ground truth: the development kit, .tar.gz)"
        )
    elif all(name.isdigit() for name in classes):
        remedy = ", which are numbers (of weights from elsewhere the tools' --classes FILE names them)"
    elif len(set(unknown)) == len(set(names)):
        remedy = (
            f", nor is any other here: expected names such as '{classes[0]}', of class folders or in a file of labels"
        )
    else:
        remedy = did_you_mean(unknown[0], classes)
    raise UserError(f"{origin}: the class '{unknown[0]}' is none of the network's{remedy}")


def labels_needed(root: Path, field: str) -> str:
    """What to do about a place whose images have no class folders, where `field` is what names a file of labels."""
    found = _label_file_near(root)
    likely = f", which may be {found}" if found else ""
    return f"for images without class folders give the file of their labels as {field}{likely}"


def _label_file_near(root: Path) -> Path | None:
    """A file in the folder `root`, or beside it, whose name says that it holds labels."""
    words = ("label", "annotation", "solution", "ground_truth", root.name.lower())
    for folder in (root, root.parent):
        try:
            files = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
        except OSError:
            continue
        for name in files:
            if name.lower().endswith(LABEL_FILE_SUFFIXES) and any(word in name.lower() for word in words):
                return folder / name
    return None


class _Finder:
    """Finds the image that a line of a file of labels names.

    Attributes:
        elsewhere: the first line's file of which an archive has the name alone, without its folders.
    """

    def __init__(self, file: Path, names: list[str], root: str):
        # The whole path wins over what is short for another one's.
        whole = {name: i for i, name in enumerate(names)}
        self._whole = _unique([{os.path.splitext(name)[0]} for name in names]) | whole
        short = [{end for tail in _tails(name) for end in (tail, os.path.splitext(tail)[0])} for name in names]
        self.times = Counter(key for of_one in short for key in of_one)
        self._any = _unique(short) | self._whole
        self._beside, self._archive, self.elsewhere = os.path.abspath(file.parent), os.path.isfile(root), ""
        self._roots = [find(root) for find in (os.path.abspath, os.path.realpath)]

    def find(self, file: str) -> int | None:
        """The image, by its path, or the end of it if no other ends so, perhaps without its suffix; or by a path that begins
        with the last folders of the images' place, or leads there from the file of labels."""
        path = os.path.normpath(file)
        if (found := self._any.get(path)) is not None or os.sep not in path:
            return found
        parts = Path(path).parts
        for root in self._roots:
            above = Path(root).parts
            inside = [os.path.join(*parts[k:]) for k in range(1, len(parts)) if above[-k:] == parts[:k]]
            led = os.path.normpath(os.path.join(self._beside, path))
            inside += [led[len(root) + 1 :]] if led.startswith(root + os.sep) else []
            for rest in (*inside, path.lstrip(os.sep)):
                if (found := self._whole.get(rest)) is not None:
                    return found
        if self._archive and (found := self._any.get(parts[-1])) is not None:
            self.elsewhere = self.elsewhere or file
            return found
        return None

    def is_name(self, file: str) -> bool:
        """Whether there is an image of this name, in whatever folder."""
        return Path(file).name in self._any


def _unique(keys: list[set[str]]) -> dict[str, int]:
    """The image of each key that is one image's alone."""
    times = Counter(key for of_one in keys for key in of_one)
    return {key: i for i, of_one in enumerate(keys) for key in of_one if times[key] == 1}


def _tails(name: str) -> list[str]:
    """``a/b.jpg`` and ``b.jpg`` of ``a/b.jpg``."""
    parts = Path(name).parts
    return [os.path.join(*parts[k:]) for k in range(len(parts))]


def _file_and_class(line: str, finder: _Finder, known: set[str]) -> tuple[int | None, str, str]:
    """The image, the file and the class that a line names; of one that names no image, what stands in their places."""
    readings = []
    for delimiter in ("\t", ",", " "):
        fields = [field.strip() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
        if len(fields) > 1:
            rest = line.partition(delimiter)[2].strip()  # a class whose name has the delimiter in it
            words = fields[1].split() or [""]
            readings.append((fields[0], next((name for name in (fields[1], rest) if name in known), words[0])))
    if len(words := line.rsplit(None, 1)) == 2:  # a file whose name has blanks in it
        readings.append((words[0], words[1]))
    for file, label in sorted(readings, key=lambda reading: reading[1] not in known):
        if (image := finder.find(file)) is not None:
            return image, file, label
    return (None, *(readings[0] if readings else (line, "")))


def _labels_by_file(file: Path, lines: list[str], names: list[str], known: set[str], root: str) -> list[str]:
    """Classes from lines ``FILE CLASS``, where FILE may lack its folders and its suffix."""
    finder = _Finder(file, names, root)
    numbered = all(_file_and_class(line, finder, known)[2].isdigit() for line in lines[1:])
    labels: list[str | None] = [None] * len(names)
    finder.elsewhere = ""
    for number, line in enumerate(lines, start=1):
        image, name, label = _file_and_class(line, finder, known)
        if image is None:
            if os.sep in name and finder.is_name(name):
                raise UserError(
                    f"{file}, line {number}: '{name}' is not in {root}, where an image {Path(name).name} is: give the images "
                    "that the lines name, or leave the folder out of them"
                )
            if number == 1 and label not in known and not (numbered and label.isdigit()):  # a header
                continue
            ambiguous = " (two images are called so: give their paths)" if finder.times[name] > 1 else ""
            raise UserError(f"{file}, line {number}: there is no image '{name}'{ambiguous}: expected 'FILE CLASS'")
        if labels[image] is not None:
            raise UserError(f"{file}, line {number}: a second label for the image '{names[image]}': remove one")
        labels[image] = label
    if None in labels:
        first, missing = names[labels.index(None)], labels.count(None)
        others = f" and {missing - 1:,} more of {len(names):,}" if missing > 1 else ""
        raise UserError(f"{file} has no line for the image {first}{others}: expected 'FILE CLASS' for each image")
    if finder.elsewhere:
        print(
            f"warning: {file} names images in folders that {root} does not have, as {finder.elsewhere}: they are taken by "
            "their names alone",
            file=sys.stderr,
            flush=True,
        )
    return [label for label in labels if label is not None]


def _devkit_labels(file: Path) -> list[str]:
    """WordNet ids of the validation images from ILSVRC2012_devkit_t12.tar.gz: ids by number, numbers by image."""
    from scipy.io import loadmat

    with tarfile.open(file) as tar:
        files = {Path(member.name).name: tar.extractfile(member) for member in tar.getmembers() if member.isreg()}
        truth = files["ILSVRC2012_validation_ground_truth.txt"]
        synsets = loadmat(files["meta.mat"], squeeze_me=True)["synsets"]
        numbers = truth.read().split() if truth else []
    wordnet_ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    return [wordnet_ids[int(number)] for number in numbers]
