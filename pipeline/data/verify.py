"""What is odd about the images of a data set, and what the index and the loaders make of each."""

import hashlib
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image
from tqdm import tqdm

from pipeline.data.archive import Group, Member, Section
from pipeline.data.decoding import CorruptImageError, decode
from pipeline.data.index import RefusedImageError, open_image
from pipeline.machine import available_cores

DUPLICATE = "is a validation image too"
PNG_DEPTH = 24  # where a PNG file says how many bits a colour has


@dataclass(frozen=True)
class ImageIssue:
    """Something odd about an image.

    Attributes:
        place: where the image lies, for people.
        fault: what is odd, as "is truncated".
        outcome: what comes of it.
        detail: more about this very image.
        stops: the index or a run stops there.
    """

    location: str
    fault: str
    outcome: str
    detail: str = ""
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.location} {self.fault}{self.detail and f' ({self.detail})'}: {self.outcome}"


def verify(training: list[Group], validation: list[Group]) -> Iterator[ImageIssue]:
    """Read and decode every image of two sets, either of which may be empty, and yield what is odd.

    Of the images nothing is kept but the validation set's digests and places.
    """
    places = {}
    for member, digest, findings in _examine_all("validation", validation):
        yield from findings
        if digest:
            places[digest] = member.location
    for member, digest, findings in _examine_all("training", training):
        yield from findings
        if digest in places:
            outcome = "counted as right or wrong though the network has trained on it; remove it from training"
            yield ImageIssue(member.location, DUPLICATE, outcome, places[digest])


def examine(content: bytes, member: Member) -> list[ImageIssue]:
    """What is odd about an image by itself, found with what the index and the loaders use."""
    try:
        header = open_image(io.BytesIO(content), member.location)
    except RefusedImageError as error:
        outcome = f"the index refuses it; {error.remedy}"
        return [ImageIssue(member.location, error.fault, outcome, error.detail, stops=True)]
    try:
        image = decode(content, member.location)
    except CorruptImageError as error:
        outcome = "stops a run, or is left out of training with data.corrupt_images skip"
        truncated = "truncated" in error.reason.lower()
        fault, detail = ("is truncated", "") if truncated else ("does not decode", error.reason)
        return [ImageIssue(member.location, fault, outcome, detail, stops=True)]
    findings = []
    expected = Image.registered_extensions()[Path(member.name).suffix.lower()]
    if header.format != expected and (header.format, expected) != ("MPO", "JPEG"):  # JPEGs, several in a file
        fault = f"is {header.format}, not what its suffix says"
        findings.append(ImageIssue(member.location, fault, "read as what it is"))
    if header.mode == "CMYK":
        outcome = "read as RGB through Pillow, alike by both loaders"
        findings.append(ImageIssue(member.location, "has CMYK colours", outcome))
    if header.format == "PNG" and content[PNG_DEPTH] > 8:
        outcome = "read with 8 bits through Pillow, alike by both loaders"
        findings.append(ImageIssue(member.location, "has more than 8 bits a colour", outcome, header.mode))
    if _orientation(image) in range(2, 9):
        outcome = "read as stored, not rotated, as the paper's code did"
        findings.append(ImageIssue(member.location, "is rotated by EXIF", outcome))
    return findings


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data, of which Pillow complains in many ways; no loader looks at them
        return 1


def _examine_all(name: str, groups: list[Group]) -> Iterator[tuple[Member, bytes | None, list[ImageIssue]]]:
    """Each image with the SHA-256 of its bytes, None if they cannot be read, and with what is odd about it, in order."""
    listed = tqdm(groups, f"list {name}", unit=" classes", disable=None, leave=False)
    total = sum(len(group.members()) for group in listed)  # listed once more below: a million need not be kept
    with tqdm(desc=f"verify {name}", total=total, unit=" images", disable=None, leave=False) as bar:
        for examined in _in_threads(member for group in groups for member in group.members()):
            bar.update()
            yield examined


def _in_threads(members: Iterator[Member]) -> Iterator[tuple[Member, bytes | None, list[ImageIssue]]]:
    threads = 2 * available_cores()  # some wait for the disk while others decode
    ahead: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        for member in members:
            ahead.append(pool.submit(_examine_file, member))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _examine_file(member: Member) -> tuple[Member, bytes | None, list[ImageIssue]]:
    try:
        with Section(member.file, member.offset, member.length) as file:
            content = file.read(member.length)
    except OSError as error:
        outcome = "stops the index or a run; repair or remove it"
        return member, None, [ImageIssue(member.location, "cannot be read", outcome, error.strerror, stops=True)]
    return member, hashlib.sha256(content).digest(), examine(content, member)
