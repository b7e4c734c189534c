"""CIFAR-10, CIFAR-100, SVHN and Fashion-MNIST in memory, as torchvision's own loaders read them."""

import dataclasses
import hashlib
import io
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from pipeline.data.formats import to_pnm
from pipeline.data.index import DatasetIndex
from pipeline.data.source import Stream
from pipeline.errors import LocalUserError

CLASSES_OF_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "fashion-mnist": "FashionMNIST"}
READS = threading.Lock()
SVHN_TRAINING = ("train", "extra")  # the paper, Section 4.1, trains on both


@dataclass(frozen=True)
class ArraySource:
    """A split of one of torchvision's data sets in a folder, which each process reads into memory for itself.

    Attributes:
        download: have torchvision fetch what the folder lacks.
    """

    dataset: str
    dir: str
    split: Literal["train", "test"]
    download: bool = dataclasses.field(default=False, compare=False)

    @property
    def root(self) -> str:
        return self.dir

    def open(self, name: str, offset: int, length: int) -> Stream:
        """Image number `offset` of the split as a PPM or PGM file."""
        return io.BytesIO(to_pnm(self.pixels()[offset]).data)

    def pixels(self) -> np.ndarray:
        with READS:  # threads that ask at once would each read all of it
            return read_arrays(self).pixels

    def location(self, name: str) -> str:
        return f"{name} in {self.dir}"


@dataclass(frozen=True)
class Arrays:
    """N images in memory.

    Attributes:
        pixels: (N, H, W, 3) uint8, or (N, H, W) for gray ones.
        labels: (N) int64.
        classes: class names, in the data set's own order.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


@lru_cache(maxsize=4)
def read_arrays(source: ArraySource) -> Arrays:
    """Read a split.

    Raises:
        LocalUserError: it is not there, is damaged, or cannot be fetched.
    """
    parts = SVHN_TRAINING if (source.dataset, source.split) == ("svhn", "train") else (source.split,)
    read = [_read_part(source, part) for part in parts]
    pixels, labels = (np.concatenate([getattr(part, field) for part in read]) for field in ("pixels", "labels"))
    return Arrays(pixels, labels, read[0].classes)


def index_arrays(source: ArraySource) -> DatasetIndex:
    """Index a split in the order of its files; see `read_arrays`."""
    arrays = read_arrays(source)
    n = len(arrays.labels)
    height, width = arrays.pixels.shape[1:3]
    digest = hashlib.sha256("\0".join(arrays.classes).encode())
    digest.update(arrays.labels.tobytes())
    digest.update(arrays.pixels.data)
    length = len(to_pnm(arrays.pixels[0]))
    return DatasetIndex(
        names=tuple(f"{source.dataset}/{source.split}/{i:05d}" for i in range(n)),
        labels=arrays.labels,
        sizes=np.tile(np.array([[height, width]], np.int32), (n, 1)),
        classes=arrays.classes,
        fingerprint=digest.hexdigest(),
        offsets=np.arange(n, dtype=np.int64),
        lengths=np.full(n, length, np.int64),
        source=dataclasses.replace(source, download=False),  # other ranks read what this one has fetched
    )


def _read_part(source: ArraySource, part: str) -> Arrays:
    from torchvision import datasets  # takes seconds to import

    svhn = source.dataset == "svhn"
    which = {"split": part} if svhn else {"train": part == "train"}
    try:
        found = getattr(datasets, CLASSES_OF_TORCHVISION[source.dataset])(source.dir, **which, download=source.download)
    except MemoryError:
        raise LocalUserError(
            f"not enough memory for the {part} images of {source.dataset}: raise the limit on memory (ulimit -v, or the job's)"
        ) from None
    except Exception as error:  # over damaged files torchvision stumbles in any way
        raise LocalUserError(
            f"cannot read the {part} images of {source.dataset} in {source.dir} ({' '.join(str(error).split())}): put "
            "torchvision's files there, have them downloaded or choose another kind of data set (in training "
            "--data.download true, --data.dataset images; in the tools --download, --dataset images)"
        ) from None
    pixels, labels = np.asarray(found.data), np.asarray(found.labels if svhn else found.targets, np.int64)
    if svhn:
        pixels = pixels.transpose(0, 2, 3, 1)
    classes = tuple(map(str, range(10)) if svhn else found.classes)
    if len(pixels) != len(labels) or not np.isin(labels, range(len(classes))).all():
        raise LocalUserError(
            f"the {part} images of {source.dataset} in {source.dir} are damaged: {len(pixels)} images, {len(labels)} labels "
            f"from {labels.min()} to {labels.max()}"
        )
    return Arrays(np.ascontiguousarray(pixels), labels, classes)
