"""From an index to batches on the device: draws plans, has an image pipeline turn them into pixels, maps the colours."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pipeline.config import CorruptImages, DataConfig
from pipeline.data.ahead import on_own_stream
from pipeline.data.auto_augment import AutoAugment
from pipeline.data.color import apply_colors, to_device
from pipeline.data.erasing import erase
from pipeline.data.index import DatasetIndex
from pipeline.data.mixing import Partners, draw_pairs, mix
from pipeline.data.plan import (
    TOGETHER,
    BatchPlan,
    evaluation_plans,
    microbatches,
    repeat,
    sample_order,
    steps_per_epoch,
    training_plans,
)
from pipeline.data.reference import ReferencePipeline
from pipeline.data.synthetic import SyntheticPipeline
from pipeline.errors import UserError, look_up
from pipeline.unused import IN_MEMORY


@dataclass(frozen=True)
class Batch:
    """n images with V views each, on the device.

    Attributes:
        images: (n * V, C, H, W) float32, or bfloat16 if `TrainingLoader` was asked for it; channels-last; the views of an
            image are neighbours.
        labels: (n) int64, or (n, classes) uint8 of images with several labels.
        weights: (n) float32, 1 for an image that counts and 0 for a replacement; see `BatchPlan.weights`.
        ids: (n) int64, rows of the index (NumPy, on the host).
        views: V.
        partners: what is mixed into the images; None where mixup and cutmix are off.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    ids: np.ndarray
    views: int
    partners: Partners | None = None


class ImagePipeline(Protocol):
    def run(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        """Yield each plan with its pixels, (n, V, H, W, K) in 0..255; see `BatchPlan`."""


@runtime_checkable
class ColoringPipeline(Protocol):
    """An image pipeline that maps the colours too, where others leave that to `apply_colors`."""

    def run_with_colors(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        """Yield each plan with what `apply_colors` would make of its pixels, on the host, in the dtype asked for."""


@dataclass(frozen=True)
class Shard:
    """Which part of the data this rank loads, where to, and with how many threads."""

    rank: int
    ranks: int
    device: torch.device
    threads: int


class TrainingLoader:
    """This rank's training batches of any epoch, from any step.

    Args:
        dtype: of the images, for loaders that map the colours on the host; the others give float32.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        shard: Shard,
        *,
        seed: int,
        batch_size: int,
        accumulation: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.index, self._config, self._shard = index, config, shard
        self._seed, self._batch_size, self._accumulation = seed, batch_size, accumulation
        self.steps_per_epoch = steps_per_epoch(len(index), batch_size)
        self._dtype = dtype
        self._auto_augment = None if config.auto_augment == "none" else AutoAugment(config)
        self._size = config.of_epoch(0).crop_size
        self._image_pipeline = self._create_image_pipeline(config.of_epoch(0))

    def _create_image_pipeline(self, config: DataConfig) -> ImagePipeline:
        part = self._batch_size // self._shard.ranks // self._accumulation
        return create_image_pipeline(
            self.index, config, self._shard, part, views=1, corrupt_images=config.corrupt_images, dtype=self._dtype
        )

    def global_batch(self, step: int) -> int:
        """Images in the global batch of this step of an epoch."""
        return min(self._batch_size, len(self.index) - step * self._batch_size)

    def global_ids(self, epoch: int, step: int) -> np.ndarray:
        """Rows of the index in the global batch of this step, (n) int64."""
        start, order = step * self._batch_size, sample_order(self.index, self._config, self._seed, epoch)
        return repeat(order, self._config.aug_repeats, self._batch_size)[start : start + self.global_batch(step)]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield `accumulation` batches for each step from `first_step` to the end of the epoch."""
        config = self._config.of_epoch(epoch)
        if config.crop_size != self._size:  # for which an image pipeline is built
            self._size, self._image_pipeline = config.crop_size, self._create_image_pipeline(config)
        parts = {
            "first_step": first_step,
            "batch_size": self._batch_size,
            "rank": self._shard.rank,
            "ranks": self._shard.ranks,
            "accumulation": self._accumulation,
        }
        plans = training_plans(self.index, config, seed=self._seed, epoch=epoch, **parts)
        batches = _batches(self._image_pipeline, plans, self.index, self._shard.device, self._auto_augment)
        if not config.mixes:
            return batches
        places = microbatches(len(self.index), config, **parts)
        return (self._mixed(batch, epoch, at.start) for batch, (at, _) in zip(batches, places, strict=True))

    def _mixed(self, batch: Batch, epoch: int, start: int) -> Batch:
        """Mix the pairs of a batch that begins at this position of the epoch."""
        pairs = range(start // TOGETHER, start // TOGETHER + len(batch.ids) // TOGETHER)
        images, labels, partners = mix(batch.images, batch.labels, draw_pairs(self._config, self._seed, epoch, pairs))
        return replace(batch, images=images, labels=labels, partners=partners)


class EvaluationLoader:
    """This rank's share of a data set for single- or ten-crop evaluation: over all ranks each image once."""

    def __init__(self, index: DatasetIndex, config: DataConfig, shard: Shard, *, batch_size: int, crops: int):
        self.index, self.crops = index, crops
        self._config, self._shard, self._batch_size = config, shard, batch_size

    @cached_property
    def _image_pipeline(self) -> ImagePipeline:
        return create_image_pipeline(self.index, self._config, self._shard, self._batch_size, views=self.crops)

    @property
    def rounds(self) -> int:
        """Batches of the rank that has most."""
        return math.ceil(math.ceil(len(self.index) / self._shard.ranks) / self._batch_size)

    def batches(self) -> Iterator[Batch]:
        plans = evaluation_plans(
            self.index,
            self._config,
            crops=self.crops,
            batch_size=self._batch_size,
            rank=self._shard.rank,
            ranks=self._shard.ranks,
        )
        return _batches(self._image_pipeline, plans, self.index, self._shard.device)


def choose_loader(config: DataConfig, device: torch.device) -> str:
    """The loader that ``data.loader: auto`` stands for on this machine, or the one that was asked for."""
    return choose_common_loader(config, device, lambda reason: [reason])[0]


def choose_common_loader(
    config: DataConfig, device: torch.device, gather: Callable[[str], list[str]], remedy: str = "or use auto"
) -> tuple[str, list[str]]:
    """As `choose_loader`, but one that every rank can use. Every rank must call this.

    Args:
        gather: gives what every rank has given, by rank.
        remedy: what to do if the loader that was asked for cannot be used.

    Returns:
        Its name; and which better ones were passed over, with the reason.
    """
    if config.loader != "auto":
        look_up(IMAGE_PIPELINES, config.loader, "data.loader")
    automatic = AUTOMATIC["cpu" if config.dataset in IN_MEMORY else device.type]
    passed_over: list[str] = []
    for name in automatic if config.loader == "auto" else (config.loader,):
        reasons = gather(unavailable_reason(name, config.depth) or "")
        if not any(reasons):
            return name, passed_over
        rank = next(rank for rank, reason in enumerate(reasons) if reason)
        where = f" on rank {rank}" if len(reasons) > 1 else ""
        passed_over.append(f"{name}: {reasons[rank]}{where}")
    raise UserError(f"data.loader is {passed_over[-1].replace(':', ', but', 1)}; {remedy}")


def unavailable_reason(loader: str, depth: int = 8) -> str | None:
    """Why a loader cannot be used on this machine for images of this depth, in one line; None if it can."""
    if loader == "dali" and depth != 8:
        return "it decodes to 8 bits, and data.depth is 16"
    if loader == "dali" and (find_spec("nvidia") is None or find_spec("nvidia.dali") is None):
        return "nvidia-dali is not installed: install requirements.txt"
    if loader == "native":
        from pipeline.data import native  # only where it is needed: it is compiled at first use

        return native.unavailable_reason()
    return None


@dataclass(frozen=True)
class PipelineOptions:
    """What an image pipeline is built for.

    Attributes:
        threads: how many it may use.
        batch_size: the most images that a plan may have.
        views: V, views of each image.
        corrupt_images: what to do about images that do not decode.
        dtype: float32 or bfloat16, of images whose colours the image pipeline maps.
    """

    index: DatasetIndex
    config: DataConfig
    device: torch.device
    threads: int
    batch_size: int
    views: int
    corrupt_images: CorruptImages | None
    dtype: torch.dtype


def _dali(work: PipelineOptions) -> ImagePipeline:
    from pipeline.data.dali import DaliPipeline  # only where the wheel is installed

    return DaliPipeline(
        work.index, work.config, work.threads, work.device, work.batch_size, work.views, work.corrupt_images
    )


def _native(work: PipelineOptions) -> ImagePipeline:
    from pipeline.data.native import NativePipeline  # only where it can be compiled

    return NativePipeline(work.index, work.config, work.threads, work.views, work.corrupt_images, work.dtype)


# What turns plans into pixels, by the name that data.loader gives it.
IMAGE_PIPELINES: dict[str, Callable[[PipelineOptions], ImagePipeline]] = {
    "dali": _dali,
    "native": _native,
    "reference": lambda work: ReferencePipeline(work.index, work.config, work.threads, work.corrupt_images),
    "synthetic": lambda work: SyntheticPipeline(work.index, work.config.crop_size),
}

# What data.loader auto takes, by the kind of device: the first that can be used. Of data sets in memory, of which nothing is
# decoded, the first of a CPU's.
AUTOMATIC = {"cpu": ("native", "dali", "reference"), "cuda": ("dali", "native", "reference")}


def create_image_pipeline(
    index: DatasetIndex,
    config: DataConfig,
    shard: Shard,
    batch_size: int,
    views: int,
    corrupt_images: CorruptImages | None = None,
    dtype: torch.dtype = torch.float32,
) -> ImagePipeline:
    """Build the image pipeline that the configuration names.

    Args:
        corrupt_images: not the configuration's own, because evaluation always stops at them.
    """
    threads = config.threads or shard.threads
    work = PipelineOptions(index, config, shard.device, threads, batch_size, views, corrupt_images, dtype)
    return IMAGE_PIPELINES[choose_loader(config, shard.device)](work)


def _batches(
    image_pipeline: ImagePipeline,
    plans: Iterable[BatchPlan],
    index: DatasetIndex,
    device: torch.device,
    auto_augment: AutoAugment | None = None,
) -> Iterator[Batch]:
    colored = _colored(image_pipeline, plans, device, auto_augment)
    batches = (_batch(plan, images, index, device) for plan, images in colored)
    if device.type != "cuda":  # where it would compute beside the network
        return batches
    return on_own_stream(batches, lambda batch: [batch.images, batch.labels, batch.weights], device)


def _colored(
    image_pipeline: ImagePipeline, plans: Iterable[BatchPlan], device: torch.device, auto_augment: AutoAugment | None
) -> Iterator[tuple[BatchPlan, Tensor]]:
    if auto_augment:  # which comes before the colours
        changed = ((plan, auto_augment(pixels, plan, device)) for plan, pixels in image_pipeline.run(plans))
        return ((plan, apply_colors(pixels, plan, device)) for plan, pixels in changed)
    if isinstance(image_pipeline, ColoringPipeline):
        return ((plan, to_device(images, device)) for plan, images in image_pipeline.run_with_colors(plans))
    return ((plan, apply_colors(pixels, plan, device)) for plan, pixels in image_pipeline.run(plans))


def _batch(plan: BatchPlan, images: Tensor, index: DatasetIndex, device: torch.device) -> Batch:
    return Batch(
        images=erase(images, plan),
        labels=to_device(index.labels[plan.ids], device),
        weights=to_device(plan.weights, device),
        ids=plan.ids,
        views=plan.hflip.shape[1],
    )
