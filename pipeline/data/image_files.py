"""The rule that says which files are images: what Pillow reads as a picture, and nothing that a system left there.

A name with the suffix of a format that Pillow reads is an image; if it cannot be read, that is an error. A name that
says nothing is opened, and its content decides. All else is left out, and reported.
"""

import os
import stat
from dataclasses import dataclass
from functools import cache
from typing import IO, cast

from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.config import DataConfig
from pipeline.data.source import ImageIssue, Stream
from pipeline.errors import UserError

LEFT_OUT = "left out"
SKIP = "left out of training with data.corrupt_images skip"

# Formats by whose first bytes Pillow knows them for certain; HEIF is there if a plug-in is.
KNOWN_BY_CONTENT = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF", "JPEG2000", "QOI", "PPM", "HEIF")
KNOWN_BY_NAME = {*KNOWN_BY_CONTENT, "TGA", "PSD", "ICO", "PCX", "SGI", "DDS", "DIB"}
SUFFIX = {"MPO": ".jpg", "JPEG2000": ".jp2"}  # of formats whose names are no suffixes of images
# Pictures that Pillow does not read without a plug-in, or of which it would read the small preview.
UNREADABLE = {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
ANIMATED = {"GIF", "PNG", "TIFF", "WEBP", "AVIF"}  # the second picture of an MPO is a preview or a stereo partner
# Headers of a table's column of files, in small letters.
FILE_COLUMNS = ("file", "filename", "file_name", "image", "images", "path", "image index", "image_id", "id", "name")
# How Pillow calls and stores the colours of TIFF files.
TWELVE_BITS = "I;12"
STORED_IN_16_BITS = (";16", ";16B", ";16L", ";16N")  # ends of its raw modes
PHOTOMETRIC_INTERPRETATION = 262  # a tag; 0: white is 0
OWN_CACHE = ".index.jsonl"  # see index_cache.cache_beside


TURNED = Image.Transpose
LAST_THAT_STANDS = 4  # EXIF orientation; from the next on height and width change places
# What makes an image upright, by its EXIF orientation.
UPRIGHT = {
    2: TURNED.FLIP_LEFT_RIGHT,
    3: TURNED.ROTATE_180,
    4: TURNED.FLIP_TOP_BOTTOM,
    5: TURNED.TRANSPOSE,
    6: TURNED.ROTATE_270,
    7: TURNED.TRANSVERSE,
    8: TURNED.ROTATE_90,
}


ROTATED = "is rotated by EXIF"
ASK_FOR_UPRIGHT = (
    "read as stored, as the paper's code did; data.exif_orientation true (tools.evaluate, predict, index: --exif-orientation) "
    "turns it"
)

MAY_BE_TRANSPARENT = "may have transparent pixels"
OPAQUE = "read without transparency: such a pixel shows the colour that is stored below it; flatten the image to have another"


@dataclass(frozen=True)
class PixelFormat:
    """What images are read as.

    Attributes:
        depth: 8 bits of three colours; or 16: gray values in floats, of 16 bits where the file has them.
        exif_orientation: images are turned as their EXIF data say.
    """

    depth: int = 8
    exif_orientation: bool = False


COLORS = PixelFormat()


def pixel_format(config: DataConfig) -> PixelFormat:
    """What a configuration's images are read as."""
    return PixelFormat(config.depth, config.exif_orientation)


class RefusedImageError(UserError):
    """The index takes no such image.

    Attributes:
        fault: what is wrong with it, as "is not an image".
        detail: what Pillow says of it.
        remedy: what to do.
        corrupt: as of `ImageIssue`.
    """

    def __init__(self, location: str, fault: str, detail: str, remedy: str, corrupt: bool = False):
        super().__init__(f"{location} {fault} ({detail}): {remedy}")
        self.fault, self.detail, self.remedy, self.corrupt = fault, detail, remedy, corrupt


def hidden(name: str, location: str) -> ImageIssue | None:
    """Why a file or folder of this name is left out with all that is in it, if it is."""
    if name in SYSTEM_FOLDERS:
        return ImageIssue(location, "was made by the operating system", LEFT_OUT)
    if name.startswith(".") and name != "..":
        return ImageIssue(location, "is hidden", LEFT_OUT)
    return None


def unreadable_format(name: str, location: str) -> ImageIssue | None:
    """Why a file of this name is left out although it is a picture, if it is."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in UNREADABLE or suffix in _formats():
        return None
    return ImageIssue(location, f"is a {suffix} file, which Pillow does not read here", "left out; convert it")


def is_image_by_name(name: str) -> bool:
    """Whether a file's suffix is that of a format that Pillow reads."""
    return _formats().get(os.path.splitext(name)[1].lower()) in KNOWN_BY_NAME


def suffix_of(image_format: str) -> str:
    """A suffix that names images of this format of Pillow's; empty if there is none."""
    suffix = SUFFIX.get(image_format, f".{image_format.lower()}")
    return suffix if is_image_by_name(f"image{suffix}") else ""


def is_image_by_content(stream: Stream) -> bool:
    """Whether a file that can be opened begins as an image does.

    Raises:
        OSError: as `open_image`.
    """
    formats = [name for name in KNOWN_BY_CONTENT if name in _formats().values()]
    try:
        with Image.open(cast(IO[bytes], stream), formats=formats):
            return True
    except Exception as error:  # over damaged files Pillow stumbles in any way
        _raise_what_may_pass(error)
        return False


def open_image(stream: Stream, location: str) -> Image.Image:
    """Open an image, of which this reads no more than the header.

    Raises:
        RefusedImageError: it is none, or none for these networks.
        OSError: it could not be read, which may pass.
    """
    try:
        image = Image.open(cast(IO[bytes], stream))
    except Exception as error:  # over damaged files Pillow stumbles in any way
        _raise_what_may_pass(error)
        detail = _why_unreadable(stream, error)
        raise RefusedImageError(
            location, "is not an image that can be read", detail, "repair or remove it", corrupt=True
        ) from None
    if image.mode.startswith(("I", "F")) and not deep_mode(image):
        raise RefusedImageError(location, "has more than 16 bits a colour", image.mode, "convert or remove it")
    if image.format == "TIFF" and deep_mode(image).startswith("I") and _white_is_zero(image):
        raise RefusedImageError(location, "stores white as 0, which Pillow reads as black", "", "convert or remove it")
    return image


def _raise_what_may_pass(error: Exception) -> None:
    """Raise an error again that is not of the file's bytes: of memory, or of the disk or the network, which has a number."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        raise error


def _why_unreadable(stream: Stream, error: Exception) -> str:
    """Why Pillow does not open a file, in words."""
    if isinstance(error, UnidentifiedImageError):
        stream.seek(0)
        return "Pillow knows no such format" if stream.read(1) else "the file is empty"
    return " ".join(str(error).split()) or type(error).__name__


def deep_mode(image: Image.Image) -> str:
    """What Pillow calls the colours of an opened image that has 16 bits of each, or more than 8; empty for fewer."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    mode, *others = arguments if isinstance(arguments, tuple) else (arguments,)
    if image.mode.startswith("I;16") and mode == TWELVE_BITS:  # of which Pillow reads 4,095 at most
        return TWELVE_BITS
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return image.mode
    if image.format == "PPM":  # with the largest value
        return f"{mode};16B" if others and isinstance(others[0], int) and others[0] > 255 else ""
    return str(mode) if image.format in ("PNG", "TIFF") and str(mode).endswith(STORED_IN_16_BITS) else ""


def _white_is_zero(image: Image.Image) -> bool:
    return getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0


def refused_depth(mode: str, depth: int) -> tuple[str, str] | None:
    """What is wrong with an image of this `deep_mode` where images of `depth` bits are wanted, and what to do about it."""
    if mode == TWELVE_BITS:
        return "has 12 bits a colour", "convert it to 16 bits, or remove it"
    gray = mode.startswith("I")
    if depth == 8 and gray:  # colours of 16 bits Pillow reads with 8
        return "has more than 8 bits a colour", "set data.depth 16 and data.channels 1, or convert or remove it"
    if depth == 16 and mode and not gray:
        return "has 16 bits a colour, of which Pillow reads 8", "convert it to gray, or remove it"
    return None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 is upright, as are TIFF files, which Pillow turns itself."""
    if image.format == "TIFF" or not {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys():
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data, of which Pillow complains in many ways
        return 1
    return value if value in UPRIGHT else 1


def several_pictures(image: Image.Image, location: str) -> ImageIssue | None:
    """What is reported of an opened image of which only the first picture is read, if it has others."""
    try:
        several = image.format in ANIMATED and getattr(image, "is_animated", False)
    except Exception:  # over a damaged second picture Pillow stumbles in any way; the first is what counts
        return None
    return ImageIssue(location, "holds several pictures", "read as its first") if several else None


def may_be_transparent(image: Image.Image) -> bool:
    """Whether an opened image has an alpha channel, or a colour that stands for transparency; by its header alone."""
    try:
        return image.has_transparency_data
    except Exception:  # over a palette that is not there Pillow stumbles
        return False


def no_image(location: str) -> ImageIssue:
    """A file whose content decided that it is no image."""
    return ImageIssue(location, "is no image", LEFT_OUT)


def beside_classes(location: str) -> ImageIssue:
    """A file where only class folders belong."""
    return ImageIssue(location, "lies beside the class folders", LEFT_OUT)


def no_file(location: str, mode: int) -> ImageIssue | None:
    """Why what has this `st_mode` is left out, if it is no file: opening a named pipe would wait forever."""
    if stat.S_ISREG(mode):
        return None
    return ImageIssue(location, "is a named pipe, a socket or a device", LEFT_OUT)


def unreadable(location: str, error: OSError) -> ImageIssue:
    """A file or folder that ought to be read and cannot be."""
    dangling = isinstance(error, FileNotFoundError) and os.path.islink(location)
    detail = "a link that leads nowhere" if dangling else error.strerror or str(error)
    return ImageIssue(location, "cannot be read", "repair it, remove it, or check its permissions", detail, stops=True)


@cache
def _formats() -> dict[str, str]:
    """Pillow's formats that can be read, by suffix."""
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
