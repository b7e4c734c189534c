"""Decoding with Pillow: of every image in the reference, of those that DALI may see otherwise in DALI's loader."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.formats import is_plain, to_pnm
from pipeline.data.image_files import COLORS, UPRIGHT, PixelFormat, orientation
from pipeline.data.plan import GRAY
from pipeline.errors import LocalUserError

warnings.filterwarnings("ignore", module="PIL")  # about metadata and transparency that nobody uses, and naming no file


class CorruptImageError(LocalUserError):
    """The bytes of an image do not decode, and never will.

    Attributes:
        location: where it lies, for people.
        reason: what Pillow says of it.
    """

    def __init__(self, location: str, reason: str, training: bool = False):
        """
        Args:
            training: it is a training image, which can be left out.
        """
        skip = "; data.corrupt_images skip leaves them out of training" if training else ""
        super().__init__(
            f"the image {location} does not decode ({reason}): repair or remove it (python -m tools.index DIR --verify "
            f"lists all such{skip})"
        )
        self.location, self.reason = location, reason


def decode(content: np.ndarray, location: str, pixel_format: PixelFormat = COLORS) -> Image.Image:
    """Decode a file's bytes, (length) uint8, to RGB; of 16 bits, to gray values from 0 to 255 in floats (Pillow's mode F).

    Raises:
        CorruptImageError: they do not decode; the message names `location`.
        LocalUserError: there is not enough memory.
    """
    try:
        with Image.open(io.BytesIO(content.data)) as image:
            turn = UPRIGHT.get(orientation(image)) if pixel_format.exif_orientation else None
            pixels = image.convert("RGB") if pixel_format.depth == 8 else _gray(image)
            return pixels if turn is None else pixels.transpose(turn)
    except MemoryError:  # not the image's fault
        raise LocalUserError(
            f"not enough memory to decode the image {location}: raise the limit on memory (ulimit -v, or the job's), or lower "
            "data.threads or optim.batch_size"
        ) from None
    except UnidentifiedImageError:
        raise CorruptImageError(location, "not an image") from None
    except Exception as error:  # damaged bytes make Pillow fail in any way: OSError, struct.error, KeyError
        raise CorruptImageError(location, " ".join(str(error).split()) or type(error).__name__) from None


def _gray(image: Image.Image) -> Image.Image:
    """An opened image as gray values from 0 to 255 in floats, those of 16 bits with fractions."""
    gray: np.ndarray
    if image.mode.startswith("I"):
        gray = np.asarray(image, np.float32) / 257
    elif image.mode in ("1", "L"):
        gray = np.asarray(image.convert("L"), np.float32)
    else:
        gray = np.asarray(image.convert("RGB"), np.float32) @ GRAY.astype(np.float32)
    return Image.fromarray(gray)


def as_ppm(content: np.ndarray, location: str, pixel_format: PixelFormat = COLORS) -> np.ndarray:
    """Decode a file's bytes and return them as those of a PPM file, which DALI reads to the bit; see `decode`."""
    return to_pnm(np.asarray(decode(content, location, pixel_format)))


def if_decodable(content: np.ndarray, location: str) -> np.ndarray:
    """Return a file's bytes as they are, if they decode; see `decode`."""
    decode(content, location)
    return content


def readable_by_dali(content: np.ndarray, location: str, pixel_format: PixelFormat = COLORS) -> np.ndarray:
    """Return the bytes of an image that DALI decodes as Pillow does: its own, or those of a PPM file; see `decode`."""
    if is_plain(content) and not (pixel_format.exif_orientation and _is_turned(content)):
        return content
    return as_ppm(content, location, pixel_format)


def _is_turned(content: np.ndarray) -> bool:
    with Image.open(io.BytesIO(content.data)) as image:
        return orientation(image) != 1
