"""Executes plans with Pillow and NumPy: slow and simple. The DALI image pipeline is checked against it.

It also serves where DALI has no wheel (macOS).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.config import CorruptImages, DataConfig, Interpolation
from pipeline.data.decoding import decode
from pipeline.data.image_files import pixel_format
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan, surround
from pipeline.data.reader import Reader
from pipeline.data.replacements import collect

BATCHES_AHEAD = 2
PILLOW_FILTERS: dict[Interpolation, Image.Resampling] = {
    "pil-bilinear": Image.Resampling.BILINEAR,
    "pil-bicubic": Image.Resampling.BICUBIC,
}


class ReferencePipeline:
    """Turns plans into pixels, a few batches ahead in threads."""

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        threads: int,
        corrupt_images: CorruptImages | None = None,
    ):
        self._index, self._config, self._corrupt_images = index, config, corrupt_images
        self._reader = Reader(index)
        self._pool = ThreadPoolExecutor(threads)

    def run(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        """Yield each plan with its pixels, (n, V, H, W, K) float32 in 0..255, bicubic overshoot included.

        Corrupt images are replaced, or raised, as in `replacements.collect`.
        """
        ahead: deque = deque()
        for plan, contents in self._reader.read_ahead(plans):
            ahead.append(
                (plan, [self._pool.submit(self._views, plan, i, content) for i, content in enumerate(contents)])
            )
            if len(ahead) > BATCHES_AHEAD:
                yield self._collect(*ahead.popleft())
        while ahead:
            yield self._collect(*ahead.popleft())

    def _collect(self, plan: BatchPlan, futures: list[Future[np.ndarray]]) -> tuple[BatchPlan, Tensor]:
        plan, views = collect(plan, futures, self._corrupt_images)
        return plan, torch.from_numpy(np.stack(views))

    def _views(self, plan: BatchPlan, i: int, content: Future[np.ndarray]) -> np.ndarray:
        """(V, H, W, K) views of the plan's i-th image, from its file's bytes."""
        image = decode(content.result(), self._index.location(plan.ids[i]), pixel_format(self._config))
        return views_of(image, plan, i, self._config)


def views_of(image: Image.Image, plan: BatchPlan, i: int, config: DataConfig) -> np.ndarray:
    """(V, H, W, K) float32 views, in 0..255, of a decoded image that is the plan's i-th."""
    top, left, height, width = plan.crop_boxes[i].tolist()
    image = image.crop((left, top, left + width, top + height))
    new_height, new_width = plan.sizes[i].tolist()
    resize, crop = config.interpolation, config.crop_size
    around = 255 * np.array(surround(config), np.float32)
    if resize == "torch7-bicubic":
        pixels = np.asarray(image, np.float32).reshape(height, width, len(around))
        pixels = resize_as_torch7(pixels, new_height, new_width)
    else:
        pixels = np.asarray(image.resize((new_width, new_height), PILLOW_FILTERS[resize]), np.float32)
        pixels = pixels.reshape(new_height, new_width, len(around))
    views = []
    for (y, x), mirrored in zip(plan.offsets[i].tolist(), plan.hflip[i], strict=True):
        view = cut(pixels, y, x, crop, around)
        views.append(view[:, ::-1] if mirrored else view)
    return np.stack(views)


def cut(pixels: np.ndarray, top: int, left: int, crop: int, around: np.ndarray) -> np.ndarray:
    """Cut (crop, crop, K) out of (h, w, K) pixels; where that lies outside of them there is the colour `around`."""
    height, width = pixels.shape[:2]
    view = np.empty((crop, crop, pixels.shape[2]), pixels.dtype)
    view[:] = around
    y, x = max(top, 0), max(left, 0)
    inside = pixels[y : max(y, min(top + crop, height)), x : max(x, min(left + crop, width))]  # nothing, perhaps
    view[y - top : y - top + inside.shape[0], x - left : x - left + inside.shape[1]] = inside
    return view


def resize_as_torch7(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (h, w, K) to (height, width, K) as Torch7's ``image.scale(..., 'bicubic')`` does.

    Catmull-Rom interpolation between aligned corners, without antialias; beyond the border the image goes on
    linearly (torch/image generic/image.c, scaleCubic_rowcol).
    """
    rows, columns = _catmull_rom(pixels.shape[0], height), _catmull_rom(pixels.shape[1], width)
    across = columns @ pixels
    return (rows @ across.reshape(len(across), -1)).reshape(height, width, pixels.shape[2])


@lru_cache(maxsize=256)
def _catmull_rom(length: int, new_length: int) -> np.ndarray:
    """(new_length, length) float32 matrix of the interpolation along one axis."""
    if length == 1 or new_length == length:
        return np.ones((new_length, 1), np.float32) if length == 1 else np.eye(length, dtype=np.float32)
    position = np.arange(new_length) * ((length - 1) / max(new_length - 1, 1))
    left = np.minimum(position.astype(int), length - 2)
    t = position - left
    taps = 0.5 * np.stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3], axis=1
    )
    matrix = np.zeros((new_length, length + 2))  # a column more at either side for the taps beyond the border
    for k in range(4):
        matrix[np.arange(new_length), left + k] += taps[:, k]
    # x[-1] = 2 x[0] - x[1] and x[n] = 2 x[n-1] - x[n-2]
    matrix[:, 1] += 2 * matrix[:, 0]
    matrix[:, 2] -= matrix[:, 0]
    matrix[:, -2] += 2 * matrix[:, -1]
    matrix[:, -3] -= matrix[:, -1]
    return matrix[:, 1:-1].astype(np.float32)
