"""Executes plans with DALI: one pipeline for training and evaluation, on GPU and on CPU.

The GPU path (JPEG decoding with nvJPEG, everything after it on the device) has not been run on a GPU yet.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from pipeline.config import Resize
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan
from pipeline.data.reader import Reader
from pipeline.data.reference import decode
from pipeline.errors import LocalUserError

PREFETCH = 2  # batches that DALI prepares ahead

# Interpolation, antialias, and type of the result. Catmull-Rom overshoots 0..255, which the paper's code keeps, so that
# mode stays in floats; Pillow rounds to bytes.
RESIZES = {
    "torch": (types.INTERP_CUBIC, False, types.FLOAT),
    "pil-bilinear": (types.INTERP_LINEAR, True, types.UINT8),
    "pil-bicubic": (types.INTERP_CUBIC, True, types.UINT8),
}


class DaliExecutor:
    """Turns plans into pixels; one `run` at a time.

    Args:
        batch_size: the most images that a plan may have.
        views: V, views of each image.
    """

    def __init__(
        self,
        index: DatasetIndex,
        crop_size: int,
        resize: Resize,
        threads: int,
        device: torch.device,
        batch_size: int,
        views: int,
    ):
        self._index, self._crop_size, self._resize, self._views = index, crop_size, resize, views
        self._decoder = "mixed" if device.type == "cuda" else "cpu"
        self._options = dict(
            batch_size=batch_size, num_threads=threads, device_id=device.index, prefetch_queue_depth=PREFETCH
        )
        self._pipeline: Pipeline | None = None
        self._reader = Reader(index)
        self._batches: Iterator[tuple[BatchPlan, list[np.ndarray]]] = iter(())
        self._pending: deque[tuple[BatchPlan, list[np.ndarray]]] = deque()

    def run(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        """Yield each plan with its pixels, (n, V, H, W, 3): float32 for the resize "torch", else uint8; in 0..255.

        Raises:
            LocalUserError: a file does not decode.
        """
        # A run that was abandoned or failed leaves its batches in the pipeline, so only one that ended is used again.
        pipeline, self._pipeline = self._pipeline or self._build(), None
        self._batches, self._pending = self._reader.read_ahead(plans), deque()
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                break
            except RuntimeError as error:
                raise self._explain(error) from error
            views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            plan, _ = self._pending.popleft()
            yield plan, views[0][:, None] if len(views) == 1 else torch.stack(views, dim=1)
        pipeline.reset()
        self._pipeline = pipeline

    def _build(self) -> Pipeline:
        interpolation, antialias, dtype = RESIZES[self._resize]

        @pipeline_def(**self._options)
        def define():
            content, start, shape, size, roi_start, roi_end, *views = fn.external_source(
                source=self._next_arrays, num_outputs=6 + 2 * self._views, batch=True
            )
            # adjust_orientation: the plan's boxes are in stored pixels, as Pillow and the Torch code see them.
            images = fn.decoders.image_slice(
                content,
                start=start,
                shape=shape,
                axes=[0, 1],
                device=self._decoder,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo does on CPU
            )
            images = fn.resize(
                images,
                size=size,
                roi_start=roi_start,
                roi_end=roi_end,
                interp_type=interpolation,
                antialias=antialias,
                dtype=dtype,
            )
            crops = [
                fn.flip(fn.slice(images, start=offset, shape=[self._crop_size] * 2, axes=[0, 1]), horizontal=mirror)
                for offset, mirror in zip(views[::2], views[1::2], strict=True)
            ]
            return tuple(crops)

        pipeline = define()
        pipeline.build()
        return pipeline

    def _next_arrays(self) -> tuple:
        """DALI's source: the arrays of the next plan, in the order that the pipeline unpacks them."""
        plan, contents = next(self._batches)
        self._pending.append((plan, contents))
        start, shape = np.ascontiguousarray(plan.boxes[:, :2]), np.ascontiguousarray(plan.boxes[:, 2:])
        views = []
        for v in range(self._views):
            views += [np.ascontiguousarray(plan.offsets[:, v]), plan.mirrors[:, v].astype(np.int32)]
        return contents, start, shape, plan.sizes.astype(np.float32), *self._region(plan), *views

    def _region(self, plan: BatchPlan) -> tuple[np.ndarray, np.ndarray]:
        """Start and end, (n, 2) float32, of the region of the decoded box that becomes the resized image.

        DALI samples at pixel centres. Sampling the region [0.5 - s/2, 0.5 - s/2 + s * out) so, with
        s = (in - 1) / (out - 1), is sampling between aligned corners as Torch7 does.
        """
        source, target = plan.boxes[:, 2:].astype(np.float64), plan.sizes.astype(np.float64)
        if self._resize != "torch":
            return np.zeros_like(source, np.float32), source.astype(np.float32)
        scale = (source - 1) / np.maximum(target - 1, 1)
        start = 0.5 - scale / 2
        end = start + scale * target
        one_pixel = (source == 1) | (target == 1)
        return np.where(one_pixel, 0, start).astype(np.float32), np.where(one_pixel, 1, end).astype(np.float32)

    def _explain(self, error: RuntimeError) -> Exception:
        """DALI names no file: look in the batches under way for one that Pillow cannot decode either."""
        for plan, contents in self._pending:
            for i, content in zip(plan.ids.tolist(), contents, strict=True):
                try:
                    decode(content, self._index.place(i))
                except LocalUserError as complaint:
                    return complaint
        return error
