"""What is odd about the images of a data set, and what the index and the loaders make of each."""

import hashlib
import io
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.data.decoding import CorruptImageError, decode
from pipeline.data.image_files import (
    ASK_FOR_UPRIGHT,
    COLORS,
    OPAQUE,
    ROTATED,
    SKIP,
    PixelFormat,
    RefusedImageError,
    deep_mode,
    may_be_transparent,
    open_image,
    orientation,
    refused_depth,
    several_pictures,
    unreadable,
)
from pipeline.data.reader import read_all
from pipeline.data.scan_group import images_of
from pipeline.data.source import FileSource, Group, ImageIssue, Member
from pipeline.machine import available_cores

TRAINED_ON = (
    "is a validation image too",
    "counted as right or wrong though the network has trained on it; remove it from training",
)
OTHERWISE_IN_VALIDATION = (
    "is a validation image of another class too",
    "counted as wrong if the network has learned it; correct the label that is wrong, or remove one",
)
TWICE_IN_TRAINING = (
    "is in training twice",
    "trained on twice an epoch, and data.holdout may hold out one of the two; remove one",
)
TWO_CLASSES_IN_TRAINING = "has another class in training too", "the network learns both; remove the wrong one"
TWICE_IN_VALIDATION = "is in validation twice", "counted twice; remove one"
TWO_CLASSES_IN_VALIDATION = (
    "has another class in validation too",
    "at least one is counted as wrong; remove the wrong one",
)
TWICE_UNLABELLED = "is there twice", "compare what the two are labelled, and remove one"
DIGEST = 16  # bytes of SHA-256 that are kept: of a million images no two are taken for one by chance


def verify(
    training: Sequence[FileSource], validation: Sequence[FileSource], pixel_format: PixelFormat = COLORS
) -> Generator[ImageIssue, None, int]:
    """Read and decode every image of two sets, either of which may be empty, and yield what is odd or left out, and which
    images are there twice, by their bytes; return how many images were read.

    Of the images nothing is kept but their digests, locations and classes.
    """
    images, validated, trained = 0, _Seen(), _Seen()
    for found in _examine_all(validation, False, pixel_format):
        yield from found.issues
        images += found.digest is not None
        yield from validated.add(found, TWICE_IN_VALIDATION, TWO_CLASSES_IN_VALIDATION)
    for found in _examine_all(training, True, pixel_format):
        yield from found.issues
        images += found.digest is not None
        if found.usable and (other := validated.first.get(found.digest)):
            location, label = other
            # A flat folder's classes are in a file of their own, and a table may spell them otherwise.
            comparable = bool(label) and found.label in validated.labels
            kind = OTHERWISE_IN_VALIDATION if comparable and label != found.label else TRAINED_ON
            yield ImageIssue(found.location, *kind, location)
        yield from trained.add(found, TWICE_IN_TRAINING, TWO_CLASSES_IN_TRAINING)
    return images


def examine(
    content: np.ndarray, name: str, location: str, training: bool, pixel_format: PixelFormat = COLORS
) -> list[ImageIssue]:
    """What is odd about an image's bytes, (length) uint8, found with what the index and the loaders use.

    Args:
        training: it is for training, where a corrupt one can be left out.
    """
    try:
        header = open_image(io.BytesIO(content.data), location)
    except RefusedImageError as error:
        outcome = f"the index refuses it{f', or it is {SKIP}' * (error.corrupt and training)}; {error.remedy}"
        return [ImageIssue(location, error.fault, outcome, error.detail, stops=True)]
    if refused := refused_depth(deep_mode(header), pixel_format.depth):
        return [ImageIssue(location, refused[0], f"the index refuses it; {refused[1]}", deep_mode(header), stops=True)]
    turned = orientation(header) != 1  # before Pillow decodes it
    try:
        pixels = decode(content, location, pixel_format)
    except CorruptImageError as error:
        outcome = f"stops a run, or is {SKIP}" if training else "stops a run; repair or remove it"
        truncated = "truncated" in error.reason.lower()
        fault, detail = ("is truncated", "") if truncated else ("does not decode", error.reason)
        return [ImageIssue(location, fault, outcome, detail, stops=True)]
    several = several_pictures(header, location)
    issues = [several] if several else []
    expected = Image.registered_extensions().get(Path(name).suffix.lower())
    if header.format != expected and (header.format, expected) != ("MPO", "JPEG"):  # JPEGs, several in a file
        fault = f"is {header.format}, {'not what its suffix says' if expected else 'which its name does not say'}"
        issues.append(ImageIssue(location, fault, "read as what it is"))
    if header.mode == "CMYK":
        outcome = "read as RGB through Pillow, alike by all loaders"
        issues.append(ImageIssue(location, "has CMYK colours", outcome))
    if deep_mode(header) and pixel_format.depth == 8:
        outcome = "read with 8 bits through Pillow, alike by all loaders"
        issues.append(ImageIssue(location, "has more than 8 bits a colour", outcome, header.mode))
    if _has_transparent_pixels(header):
        issues.append(ImageIssue(location, "has transparent pixels", OPAQUE))
    if _is_of_one_colour(pixels):
        issues.append(
            ImageIssue(location, "is of one colour", "nothing is to be seen on it; remove it unless it is meant")
        )
    if turned and not pixel_format.exif_orientation:
        issues.append(ImageIssue(location, ROTATED, ASK_FOR_UPRIGHT))
    return issues


def _has_transparent_pixels(image: Image.Image) -> bool:
    """Whether an opened image, which decodes, has a pixel that is not opaque, as far as Pillow tells: many have an alpha
    channel and no such pixel."""
    if not may_be_transparent(image):
        return False
    if "A" in image.getbands():
        return image.getchannel("A").getextrema() != (255, 255)
    if image.mode.startswith("I"):  # 16 bits of gray, of which Pillow converts no transparency
        return bool((np.asarray(image) == image.info["transparency"]).any())
    if deep_mode(image):  # Pillow compares such colours with the transparent one by 8 bits of 16
        return False
    try:
        return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)
    except Exception:  # over damaged data on transparency, which no loader reads
        return False


def _is_of_one_colour(pixels: Image.Image) -> bool:
    """Whether all pixels of a decoded image are the same, of which there are several."""
    if pixels.width * pixels.height == 1:
        return False
    return all(len(set(band.getextrema())) == 1 for band in pixels.split())


@dataclass(frozen=True)
class _Examined:
    """What was found of an image, or of what is none.

    Attributes:
        location: where it lies, for people.
        issues: what is odd about it.
        digest: of its bytes; None if they cannot be read.
        label: its class; empty if it is not known.
    """

    location: str
    issues: list[ImageIssue]
    digest: bytes | None = None
    label: str = ""

    @property
    def usable(self) -> bool:
        return self.digest is not None and not any(issue.stops for issue in self.issues)


class _Seen:
    """The images of a set, each where it was first."""

    def __init__(self) -> None:
        self.first: dict[bytes | None, tuple[str, str]] = {}  # location and class
        self.labels: set[str] = set()  # all classes

    def add(self, found: _Examined, twice: tuple[str, str], two_classes: tuple[str, str]) -> Iterator[ImageIssue]:
        """Take an image; what is to be said if its bytes were there before, with the same class or with another."""
        if found.usable:
            self.labels.add(found.label)
            location, label = self.first.setdefault(found.digest, (found.location, found.label))
            if location != found.location:
                kind = TWICE_UNLABELLED if not found.label else twice if label == found.label else two_classes
                yield ImageIssue(found.location, *kind, location)


def _examine_all(sources: Sequence[FileSource], training: bool, pixel_format: PixelFormat) -> Iterator[_Examined]:
    """What was found of each image, and of what is no image, in order."""
    name, groups, total = "training" if training else "validation", [], 0
    for source in sources:
        classes, issues = source.groups()
        yield from (_Examined(issue.location, [issue]) for issue in issues if classes or issue.stops)
        groups += [(source, group) for group in classes or [source.flat()]]
    for source, group in tqdm(groups, f"list {name}", unit=" classes", disable=None, leave=False):
        listing = group.list()  # once more below: a million need not be kept
        total += len(listing.members)
        listed = not any(issue.stops for issue in listing.issues)
        is_class = training and group.name and not group.labelled
        may_be_empty = is_class and listed and not any(member.by_name for member in listing.members)
        if may_be_empty and not images_of(source, group)[0]:
            where = f"the class {group.name} in {source.root}"
            yield _Examined(where, [ImageIssue(where, "has no images", "fill or remove it", stops=True)])
    with tqdm(desc=f"verify {name}", total=total, unit=" images", disable=None, leave=False) as bar:
        for examined in _in_threads(groups, training, pixel_format):
            bar.update()
            yield examined


def _in_threads(
    groups: list[tuple[FileSource, Group]], training: bool, pixel_format: PixelFormat
) -> Iterator[_Examined]:
    threads = 2 * available_cores()  # some wait for the disk while others decode
    ahead: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        for source, group in groups:
            images, issues = images_of(source, group)
            yield from (_Examined(issue.location, [issue]) for issue in issues)
            for name, member in images:
                label = member.label if group.labelled else group.name
                ahead.append(pool.submit(_examine_file, source, name, member, label, training, pixel_format))
                if len(ahead) > 4 * threads:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _examine_file(
    source: FileSource, name: str, member: Member, label: str, training: bool, pixel_format: PixelFormat
) -> _Examined:
    location = source.location(name)
    try:
        with source.open(name, member.offset, member.length) as file:
            content = read_all(file, member.length)
    except OSError as error:
        return _Examined(location, [unreadable(location, error)])
    issues = examine(content, name, location, training, pixel_format)
    return _Examined(location, issues, hashlib.sha256(content.data).digest()[:DIGEST], sys.intern(label))
