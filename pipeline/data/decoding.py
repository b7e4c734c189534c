"""Decoding with Pillow: of every image in the reference, of those that DALI may see otherwise in DALI's loader."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.formats import is_plain, to_pnm
from pipeline.errors import LocalUserError

warnings.filterwarnings("ignore", module="PIL")  # about metadata and transparency that nobody uses, and naming no file


class CorruptImageError(LocalUserError):
    """The bytes of an image do not decode, and never will.

    Attributes:
        location: where it lies, for people.
        reason: what Pillow says of it.
    """

    def __init__(self, location: str, reason: str):
        super().__init__(
            f"the image {location} does not decode ({reason}): repair or remove it (python -m tools.index DIR --verify "
            "lists all such; data.corrupt_images skip leaves them out of training)"
        )
        self.location, self.reason = location, reason


def decode(content: np.ndarray, location: str) -> Image.Image:
    """Decode a file's bytes, (length) uint8, to RGB.

    Raises:
        CorruptImageError: they do not decode; the message names `location`.
        LocalUserError: there is not enough memory.
    """
    try:
        with Image.open(io.BytesIO(content.data)) as image:
            return image.convert("RGB")
    except MemoryError:  # not the image's fault
        raise LocalUserError(
            f"not enough memory to decode the image {location}: raise the limit on memory (ulimit -v, or the job's), or lower "
            "data.threads or optim.batch_size"
        ) from None
    except UnidentifiedImageError:
        raise CorruptImageError(location, "not an image") from None
    except Exception as error:  # damaged bytes make Pillow fail in any way: OSError, struct.error, KeyError
        raise CorruptImageError(location, " ".join(str(error).split()) or type(error).__name__) from None


def as_ppm(content: np.ndarray, location: str) -> np.ndarray:
    """Decode a file's bytes and return them as those of a PPM file, which DALI reads to the bit; see `decode`."""
    return to_pnm(np.asarray(decode(content, location)))


def if_decodable(content: np.ndarray, location: str) -> np.ndarray:
    """Return a file's bytes as they are, if they decode; see `decode`."""
    decode(content, location)
    return content


def readable_by_dali(content: np.ndarray, location: str) -> np.ndarray:
    """Return the bytes of an image that DALI decodes as Pillow does: its own, or those of a PPM file; see `decode`."""
    return content if is_plain(content) else as_ppm(content, location)
