"""What is odd about the images of a data set, and what the index and the loaders make of each."""

import hashlib
import io
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.data.decoding import CorruptImageError, decode
from pipeline.data.image_files import (
    ASK_FOR_UPRIGHT,
    COLORS,
    SKIP,
    PixelFormat,
    RefusedImageError,
    deep_mode,
    issues_of,
    open_image,
    orientation,
    refused_depth,
    unreadable,
)
from pipeline.data.reader import read_all
from pipeline.data.scan_group import images_of
from pipeline.data.source import FileSource, Group, ImageIssue, Member
from pipeline.machine import available_cores

DUPLICATE = "is a validation image too"
PNG_DEPTH = 24  # where a PNG file says how many bits a colour has


def verify(
    training: Sequence[FileSource], validation: Sequence[FileSource], pixel_format: PixelFormat = COLORS
) -> Generator[ImageIssue, None, int]:
    """Read and decode every image of two sets, either of which may be empty, and yield what is odd or left out; return how many
    images were read.

    Of the images nothing is kept but the validation set's digests and locations.
    """
    locations, images = {}, 0
    for location, digest, issues in _examine_all(validation, False, pixel_format):
        yield from issues
        images += digest is not None
        if digest and not _stops(issues):
            locations[digest] = location
    for location, digest, issues in _examine_all(training, True, pixel_format):
        yield from issues
        images += digest is not None
        if digest in locations and not _stops(issues):
            outcome = "counted as right or wrong though the network has trained on it; remove it from training"
            yield ImageIssue(location, DUPLICATE, outcome, locations[digest])
    return images


def _stops(issues: Iterable[ImageIssue]) -> bool:
    return any(issue.stops for issue in issues)


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
        decode(content, location, pixel_format)
    except CorruptImageError as error:
        outcome = f"stops a run, or is {SKIP}" if training else "stops a run; repair or remove it"
        truncated = "truncated" in error.reason.lower()
        fault, detail = ("is truncated", "") if truncated else ("does not decode", error.reason)
        return [ImageIssue(location, fault, outcome, detail, stops=True)]
    issues = issues_of(header, location)
    expected = Image.registered_extensions().get(Path(name).suffix.lower())
    if header.format != expected and (header.format, expected) != ("MPO", "JPEG"):  # JPEGs, several in a file
        fault = f"is {header.format}, {'not what its suffix says' if expected else 'which its name does not say'}"
        issues.append(ImageIssue(location, fault, "read as what it is"))
    if header.mode == "CMYK":
        outcome = "read as RGB through Pillow, alike by all loaders"
        issues.append(ImageIssue(location, "has CMYK colours", outcome))
    if header.format == "PNG" and content[PNG_DEPTH] > 8 and pixel_format.depth == 8:
        outcome = "read with 8 bits through Pillow, alike by all loaders"
        issues.append(ImageIssue(location, "has more than 8 bits a colour", outcome, header.mode))
    if turned and not pixel_format.exif_orientation:
        issues.append(ImageIssue(location, "is rotated by EXIF", ASK_FOR_UPRIGHT))
    return issues


Examined = tuple[str, bytes | None, list[ImageIssue]]


def _examine_all(sources: Sequence[FileSource], training: bool, pixel_format: PixelFormat) -> Iterator[Examined]:
    """Each image's location, the SHA-256 of its bytes (None if they cannot be read) and what is odd about it, in order.

    What is no image comes likewise.
    """
    name, groups, total = "training" if training else "validation", [], 0
    for source in sources:
        classes, issues = source.groups()
        yield from ((issue.location, None, [issue]) for issue in issues if classes or issue.stops)
        groups += [(source, group) for group in classes or [source.flat()]]
    for source, group in tqdm(groups, f"list {name}", unit=" classes", disable=None, leave=False):
        listing = group.list()  # once more below: a million need not be kept
        total += len(listing.members)
        listed = not any(issue.stops for issue in listing.issues)
        is_class = training and group.name and not group.labelled
        may_be_empty = is_class and listed and not any(member.by_name for member in listing.members)
        if may_be_empty and not images_of(source, group)[0]:
            where = f"the class {group.name} in {source.root}"
            yield where, None, [ImageIssue(where, "has no images", "fill or remove it", stops=True)]
    with tqdm(desc=f"verify {name}", total=total, unit=" images", disable=None, leave=False) as bar:
        for examined in _in_threads(groups, training, pixel_format):
            bar.update()
            yield examined


def _in_threads(
    groups: list[tuple[FileSource, Group]], training: bool, pixel_format: PixelFormat
) -> Iterator[Examined]:
    threads = 2 * available_cores()  # some wait for the disk while others decode
    ahead: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        for source, group in groups:
            images, issues = images_of(source, group)
            yield from ((issue.location, None, [issue]) for issue in issues)
            for image in images:
                ahead.append(pool.submit(_examine_file, source, *image, training, pixel_format))
                if len(ahead) > 4 * threads:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _examine_file(source: FileSource, name: str, member: Member, training: bool, pixel_format: PixelFormat) -> Examined:
    location = source.location(name)
    try:
        with source.open(name, member.offset, member.length) as file:
            content = read_all(file, member.length)
    except OSError as error:
        return location, None, [unreadable(location, error)]
    return location, hashlib.sha256(content.data).digest(), examine(content, name, location, training, pixel_format)
