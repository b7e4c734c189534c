"""Executes plans with generated images: no files and no decoding, for tests and for measuring the rest."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan
from pipeline.data.source import Stream
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_PATTERN = 4  # cells along a side of a class's colour pattern


@dataclass(frozen=True)
class SyntheticSource:
    """Images that `SyntheticPipeline` generates: no file holds them."""

    root: str

    def open(self, name: str, offset: int, length: int) -> Stream:
        raise UserError(f"{self.location(name)} has no file: synthetic images are for data.loader synthetic only")

    def location(self, name: str) -> str:
        return f"image {name} of {self.root}"


def synthetic_index(images: int, classes: int, size: int, split: str) -> DatasetIndex:
    """Index of `images` generated square images of `size` pixels, evenly spread over `classes`."""
    key = hashlib.sha256(f"synthetic {split} {images} {classes} {size}".encode()).hexdigest()
    nowhere = np.zeros(images, np.int64)
    return DatasetIndex(
        names=tuple(f"{i:08d}" for i in range(images)),
        labels=np.arange(images, dtype=np.int64) % classes,
        sizes=np.full((images, 2), size, np.int32),
        classes=tuple(f"class{i:04d}" for i in range(classes)),
        fingerprint=key,
        offsets=nowhere,
        lengths=nowhere,
        source=SyntheticSource(f"synthetic {split}"),
    )


class SyntheticPipeline:
    """Each class is a coarse random colour pattern, each image that pattern under noise; crop boxes are ignored."""

    def __init__(self, index: DatasetIndex, crop_size: int):
        self._labels = index.labels
        self._crop_size = crop_size
        shape = (len(index.classes), _PATTERN, _PATTERN, 3)
        self._patterns = np.random.Generator(np.random.Philox(key=0)).integers(0, 128, shape, np.uint8)

    def run(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, "Tensor"]]:
        """Yield each plan with its pixels, (n, V, H, W, 3) uint8."""
        import torch  # not above: `launch` needs only the index, and torch takes seconds to import

        for plan in plans:
            views = plan.hflip.shape[1]
            images = np.stack([self._image(i) for i in plan.ids.tolist()])
            yield plan, torch.from_numpy(np.repeat(images[:, None], views, axis=1))

    def _image(self, i: int) -> np.ndarray:
        crop = self._crop_size
        cells = np.arange(crop) * _PATTERN // crop
        pattern = self._patterns[self._labels[i]][cells][:, cells]
        noise = np.random.Generator(np.random.Philox(key=i + 1)).integers(0, 128, (crop, crop, 3), np.uint8)
        return pattern + noise
