"""Executes plans with DALI: one pipeline for training and evaluation, on GPU and on CPU.

Images that DALI refuses, or may see otherwise than Pillow does, go into it decoded by Pillow (decoding.py).

The GPU path (JPEG decoding with nvJPEG, everything after it on the device) has run on an H200.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypedDict, cast

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor

from pipeline.config import CorruptImages, DataConfig
from pipeline.data.decoding import as_ppm, if_decodable, readable_by_dali
from pipeline.data.image_files import pixel_format
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan, surround
from pipeline.data.reader import Reader
from pipeline.data.replacements import collect
from pipeline.errors import is_out_of_memory
from pipeline.nvjpeg import check_nvjpeg

PREFETCH = 2  # batches that DALI prepares ahead

# Interpolation, antialias, and type of the result. Catmull-Rom overshoots 0..255, which the paper's code keeps, so that
# mode stays in floats; Pillow rounds to bytes.
RESIZES = {
    "torch7-bicubic": (types.DALIInterpType.INTERP_CUBIC, False, types.DALIDataType.FLOAT),
    "pil-bilinear": (types.DALIInterpType.INTERP_LINEAR, True, types.DALIDataType.UINT8),
    "pil-bicubic": (types.DALIInterpType.INTERP_CUBIC, True, types.DALIDataType.UINT8),
}


class DecoderOptions(TypedDict):
    """Of fn.decoders."""

    adjust_orientation: bool
    jpeg_fancy_upsampling: bool
    hw_decoder_load: float


class PaddingOptions(TypedDict, total=False):
    """Of fn.slice; empty where no crop reaches beyond its image."""

    out_of_bounds_policy: str
    fill_values: list[float]
    dtype: types.DALIDataType


class DaliOptions(TypedDict):
    """Of pipeline_def."""

    batch_size: int
    num_threads: int
    device_id: int
    prefetch_queue_depth: int


@dataclass(frozen=True)
class Fed:
    """A batch as it goes into the pipeline: images' bytes, each (length) uint8, and what Pillow has done with them."""

    plan: BatchPlan
    contents: list[np.ndarray]
    treatment: int


# What becomes of a batch with an image that DALI refuses, one after the other: Pillow finds the corrupt images, so that the
# others keep DALI's pixels, which on a GPU are not Pillow's; then Pillow decodes all.
UNTREATED, CHECKED, BY_PILLOW = range(3)


class DaliPlans:
    """Runs plans through DALI, one `_outputs` at a time; a subclass adds `run`, which says what the caller gets of them.

    Args:
        batch_size: the most images that a plan may have.
        views: V, views of each image.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        threads: int,
        device: torch.device,
        batch_size: int,
        views: int,
        corrupt_images: CorruptImages | None = None,
    ):
        self._index, self._views, self._corrupt_images = index, views, corrupt_images
        self._crop_size, self._resize = config.crop_size, config.interpolation
        # A crop that reaches beyond its image finds the mean colour there, which is no byte.
        self._around = (
            PaddingOptions(
                out_of_bounds_policy="pad",
                fill_values=[255 * mean for mean in surround(config)],
                dtype=types.DALIDataType.FLOAT,
            )
            if config.train_crop == "random_crop" and views == 1
            else PaddingOptions()
        )
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._decoder = "mixed" if self._on_gpu else "cpu"
        # On GPU images are decoded whole. Regions had other pixels in other batches there, and nvJPEG before 13.2 leaves them
        # to the CPU; to undo the entropy coding is most of the work, and a region asks for no less of that.
        self._decodes_regions = not self._on_gpu
        if self._on_gpu:
            check_nvjpeg()
        # adjust_orientation: a plan's crop_boxes are in stored pixels, as Pillow and the Torch code see them.
        # jpeg_fancy_upsampling: on GPU too, as libjpeg-turbo does on CPU.
        self._decoding = DecoderOptions(
            adjust_orientation=False, jpeg_fancy_upsampling=True, hw_decoder_load=config.hw_decoder_load
        )
        self._options = DaliOptions(
            batch_size=batch_size, num_threads=threads, device_id=device.index, prefetch_queue_depth=PREFETCH
        )
        self._pipeline: Pipeline | None = None
        self._reader, self._readable = Reader(index), partial(readable_by_dali, pixel_format=pixel_format(config))
        self._batches: Iterator[Fed] = iter(())
        self._pending: deque[Fed] = deque()

    def _outputs(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, TensorListCPU | TensorListGPU]]:
        # A run that was abandoned or failed leaves its batches in the pipeline, so only one that ended is used again.
        pipeline, self._pipeline = self._pipeline or self._build(), None
        self._batches, self._pending = self._read(plans), deque()
        while True:
            try:
                # On the present stream, for whose queue the host does not wait: loader.py has one for batches.
                (output,) = pipeline.run(torch.cuda.current_stream(self._device) if self._on_gpu else None)
            except StopIteration:
                break
            except RuntimeError as error:
                self._feed_again(error)
                pipeline = self._build()
                continue
            yield self._pending.popleft().plan, output
        pipeline.reset()
        self._pipeline = pipeline

    def _read(self, plans: Iterable[BatchPlan]) -> Iterator[Fed]:
        """The batches of some plans, with replacements where images are corrupt."""
        for plan, futures in self._reader.read_ahead(plans, self._readable):
            yield Fed(*collect(plan, futures, self._corrupt_images), treatment=UNTREATED)

    def _feed_again(self, error: RuntimeError) -> None:
        """Requeue the batches in flight before those to come, after the next treatment: DALI does not say which image failed.

        Raises:
            RuntimeError: the images are not the cause.
        """
        least = min((batch.treatment for batch in self._pending), default=BY_PILLOW)
        if least == BY_PILLOW or is_out_of_memory(error) or "decoders.image" not in str(error):
            raise error
        again, treat = [], if_decodable if least == UNTREATED else as_ppm
        with ThreadPoolExecutor(self._options["num_threads"]) as pool:
            for batch in self._pending:
                if batch.treatment > least:
                    again.append(batch)
                    continue
                places = map(self._index.location, batch.plan.ids.tolist())
                futures = [pool.submit(treat, *image) for image in zip(batch.contents, places, strict=True)]
                again.append(Fed(*collect(batch.plan, futures, self._corrupt_images), treatment=least + 1))
        self._batches, self._pending = chain(again, self._batches), deque()

    def _build(self) -> Pipeline:
        pipeline = self._define()
        pipeline.build()
        return pipeline

    def _define(self) -> Pipeline:
        @pipeline_def(**self._options)
        def define():
            content, start, shape, size, roi_start, roi_end, corners, *own_ids = fn.external_source(
                source=self._next_arrays, num_outputs=7 if self._views == 1 else 8, batch=True
            )
            images = self._resized(self._decoded(content, start, shape), size, roi_start, roi_end)
            if self._views == 1:
                return fn.slice(images, start=corners, shape=[self._crop_size] * 2, axes=[0, 1], **self._around)
            return self._all_views(images, corners, *own_ids)

        return define()

    def _decoded(self, content: DataNode, start: DataNode, shape: DataNode) -> DataNode:
        if self._decodes_regions:
            return fn.decoders.image_slice(
                content, start=start, shape=shape, axes=[0, 1], device=self._decoder, **self._decoding
            )
        whole = fn.decoders.image(content, device=self._decoder, **self._decoding)
        return fn.slice(whole, start=start, shape=shape, axes=[0, 1])

    def _resized(self, images: DataNode, size: DataNode, roi_start: DataNode, roi_end: DataNode) -> DataNode:
        interpolation, antialias, dtype = RESIZES[self._resize]
        resized = fn.resize(
            images,
            size=size,
            roi_start=roi_start,
            roi_end=roi_end,
            interp_type=interpolation,
            antialias=antialias,
            dtype=dtype,
        )
        return cast("DataNode", resized)  # DALI's type is that of all modes, which give one node, several, or none

    def _all_views(self, images: DataNode, corners: DataNode, own_ids: DataNode) -> DataNode:
        """All views in one pass over memory, one below the other, cut from the image with its mirror image beside it."""
        crop, rows = self._crop_size, np.arange(self._views) * self._crop_size
        return fn.multi_paste(
            fn.cat(images, fn.flip(images, horizontal=1), axis=1),
            in_ids=own_ids,
            in_anchors=corners,
            shapes=types.Constant(np.full((self._views, 2), crop, np.int32)),
            out_anchors=types.Constant(np.stack([rows, np.zeros_like(rows)], axis=1).astype(np.int32)),
            output_size=(self._views * crop, crop),
            dtype=RESIZES[self._resize][2],
        )

    def _next_arrays(self) -> tuple:
        """DALI's source: the arrays of the next plan, in the order that the pipeline unpacks them."""
        batch = next(self._batches)
        self._pending.append(batch)
        plan = batch.plan
        start, shape = np.ascontiguousarray(plan.crop_boxes[:, :2]), np.ascontiguousarray(plan.crop_boxes[:, 2:])
        size, corners = plan.sizes.astype(np.float32), np.ascontiguousarray(self._corners(plan))
        arrays = (batch.contents, start, shape, size, *self._region(plan), corners)
        if self._views == 1:
            return arrays
        # multi_paste asks which image of the batch each view is cut from: its own.
        return *arrays, np.repeat(np.arange(len(plan), dtype=np.int32)[:, None], self._views, axis=1)

    def _corners(self, plan: BatchPlan) -> np.ndarray:
        """Top and left of the views, (n, 2) or (n, V, 2), where `_define` cuts them: from an image that the resize has
        turned over if its only view is mirrored, or from an image with its mirror image beside it."""
        top, left, width = plan.offsets[..., 0], plan.offsets[..., 1], plan.sizes[:, 1:]
        right = (width if self._views == 1 else 2 * width) - left - self._crop_size
        corners = np.stack([top, np.where(plan.hflip, right, left)], axis=-1).astype(np.int32)
        return corners[:, 0] if self._views == 1 else corners

    def _region(self, plan: BatchPlan) -> tuple[np.ndarray, np.ndarray]:
        """Start and end, (n, 2) float32, of the region of the decoded box that becomes the resized image.

        DALI samples at pixel centres. Sampling the region [0.5 - s/2, 0.5 - s/2 + s * out) so, with
        s = (in - 1) / (out - 1), is sampling between aligned corners as Torch7 does. A region whose end is left of its
        start comes out mirrored, which costs nothing.
        """
        source, target = plan.crop_boxes[:, 2:].astype(np.float64), plan.sizes.astype(np.float64)
        start, end = np.zeros_like(source), source.copy()
        if self._resize == "torch7-bicubic":
            scale = (source - 1) / np.maximum(target - 1, 1)
            one_pixel = (source == 1) | (target == 1)
            start = np.where(one_pixel, 0, 0.5 - scale / 2)
            end = np.where(one_pixel, 1, start + scale * target)
        if self._views == 1:
            turned = plan.hflip[:, 0]
            start[turned, 1], end[turned, 1] = end[turned, 1], start[turned, 1]
        return start.astype(np.float32), end.astype(np.float32)


class DaliPipeline(DaliPlans):
    """Turns plans into pixels; one `run` at a time."""

    def run(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        """Yield each plan with its pixels, (n, V, H, W, 3) in 0..255: uint8 if Pillow's resizes leave them so, else float32.

        Corrupt images are replaced, or raised, as in `replacements.collect`.
        """
        for plan, output in self._outputs(plans):
            yield plan, self._to_torch(output).view(-1, self._views, self._crop_size, self._crop_size, 3)

    def _to_torch(self, output: TensorListCPU | TensorListGPU) -> Tensor:
        """The batch as one tensor in DALI's own memory, which it gives back with the tensor's end, in the order of the
        stream on which it was handed over."""
        return torch.from_dlpack(output.as_tensor())
