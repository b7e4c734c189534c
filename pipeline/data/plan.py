"""What each image goes through, drawn on the host as a pure function of (seed, epoch, position).

Nothing here reads a pixel and no state is kept: a run that resumes at step s, or on another number of ranks,
draws what the uninterrupted run drew. Image pipelines (dali.py, reference.py) turn plans into pixels.

The random numbers come from the counter-based generator Philox: key (seed, epoch), and a fixed range of the
counter for each position of the epoch, so that any slice of an epoch can be drawn by itself.

Sources: the paper, Section 4.2, and fb.resnet.torch ``datasets/transforms.lua`` and ``datasets/imagenet.lua``,
whose training and evaluation transforms the authors used.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.policies import draw_operations

CROP_TRIES = 10
DRAWS = 64  # uniform numbers reserved for one image
TOGETHER = 2  # images of a pair that is mixed, which is never divided
_ORDER_STREAM = 1 << 192  # counters of the sample order, apart from those of the images
_BALANCE_STREAM = 1 << 193  # of the images that a balanced epoch takes of each class
_ERASING_STREAM = 1 << 200  # of cutout and random erasing
_OPERATIONS_STREAM = 1 << 201  # of RandAugment's and TrivialAugment's operations

GRAY = np.array([0.299, 0.587, 0.114])
LIGHTING_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
LIGHTING_EIGENVECTORS = np.array(  # rows R, G, B
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


@dataclass(frozen=True)
class BatchPlan:
    """What the n images of one batch go through: cut `crop_boxes`, resize to `sizes`, cut V views, map the colours.

    The colours of an image x in [0, 1] become ``A x + B m + t`` where m is the mean colour of its first view.

    Attributes:
        ids: (n) int64, rows of the index.
        weights: (n) float32. Over all ranks and accumulation steps each image of a global batch has one row, whose weight is
            1, or 0 if the image is corrupt and another was put in its place (`replacements.collect`). The weights of a global
            batch so add up to the images that count, and a loss that is to be their mean is divided by that sum. A part of
            the last batch that has no images is one row of weight 0, so no part is empty; the weights of all other parts add
            up to at least 1.
        crop_boxes: (n, 4) int32, top, left, height and width in pixels of the stored image.
        sizes: (n, 2) int32, height and width to which the box is resized.
        offsets: (n, V, 2) int32, top and left of each view in the resized image. They may be negative: a view that reaches
            outside the image has the mean colour there.
        hflip: (n, V) bool, views that are mirrored left to right.
        color: (n, C, K) A, mean_color: (n, C, K) B, shift: (n, C) t; float32. C is ``data.channels``; a pixel has K numbers:
            three colours, or with ``data.depth 16`` one gray value.
        operations: (n, L) int8, what becomes of the pixels before their colours are mapped, `policies.Operation`; None for
            nothing. arguments: (n, L, 6) float64, theirs.
        cutout: (n, 4) int32, top, left, height and width of a box in each only view that becomes the mean colour; None for
            none. A box may be empty.
        erasing: (n, 4) int32, likewise of random erasing.
        noise_seeds: (n) uint64, what the boxes of `erasing` hold instead: noise that is a function of this number.
    """

    ids: np.ndarray
    weights: np.ndarray
    crop_boxes: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    hflip: np.ndarray
    color: np.ndarray
    mean_color: np.ndarray
    shift: np.ndarray
    operations: np.ndarray | None = None
    arguments: np.ndarray | None = None
    cutout: np.ndarray | None = None
    erasing: np.ndarray | None = None
    noise_seeds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "BatchPlan":
        """Return the plan of the images at these positions of this one, which may repeat."""
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        taken: dict[str, Any] = {name: None if array is None else array[rows] for name, array in arrays.items()}
        return BatchPlan(**taken)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Number of global batches; the last may be smaller (the paper's 5004 x 256 + 143)."""
    return math.ceil(images / batch_size)


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """(images) int64: a random permutation, the order in which an epoch visits the index."""
    return np.argsort(_philox(seed, epoch, _ORDER_STREAM).random_raw(images), kind="stable")


def sample_order(index: DatasetIndex, config: DataConfig, seed: int, epoch: int) -> np.ndarray:
    """(N) int64: rows of the index in the order in which an epoch visits them, as ``data.sampling`` says.

    A balanced epoch has as many images as any other, and of each class that has images the same number, or one more: which
    images of a frequent class, and which of a rare one twice, is drawn anew in each epoch. With ``data.aug_repeats`` R that is
    so of the first N / R rows, which are all that `repeat` takes.
    """
    order = epoch_order(len(index), seed, epoch)
    if config.sampling == "shuffle":
        return order
    draws = _philox(seed, epoch, _BALANCE_STREAM)
    present, counts = np.unique(index.labels, return_counts=True)
    of_class = dict(
        zip(present.tolist(), np.split(np.argsort(index.labels, kind="stable"), np.cumsum(counts)[:-1]), strict=True)
    )
    shuffled = present[np.argsort(draws.random_raw(len(present)), kind="stable")]
    rows: list[np.ndarray] = []
    taken = math.ceil(len(index) / config.aug_repeats)
    for label, share in zip(shuffled.tolist(), split(0, taken, len(present)), strict=True):
        images = of_class[label]
        images = images[np.argsort(draws.random_raw(len(images)), kind="stable")]
        rows.append(np.resize(images, len(share)))  # from the first on, again and again
    return np.resize(np.concatenate(rows)[order[order < taken]], len(index))


def repeat(order: np.ndarray, repeats: int, batch_size: int) -> np.ndarray:
    """(N) int64: an epoch's order in which each of its first N / R rows stands R times, all in one batch but at its ends.

    A batch has all its images once, then all once more, and so on: with at least as many ranks as repeats, copies so fall to
    different ranks, but for a few where they do not divide a batch. Neighbours, which may be mixed with each other, are
    different images, other ones each time; in odd batches and small ones some are the same twice. Which images a batch has is
    as with timm's RASampler.
    """
    if repeats == 1:
        return order
    rows = np.repeat(order, repeats)[: len(order)]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return np.concatenate([_paired_anew(batch[r::repeats], r) for batch in batches for r in range(repeats)])


def _paired_anew(images: np.ndarray, turn: int) -> np.ndarray:
    """The same images with other neighbours in each turn.

    Along the zigzag 0, -1, 1, -2, 2, ... of the n images as a ring, turned by a place each time, no two images are neighbours
    twice in n / 2 turns (Walecki's paths, in Lucas 1892).
    """
    n = len(images)
    zigzag = np.empty(n, np.int64)
    zigzag[::2], zigzag[1::2] = np.arange((n + 1) // 2), n - 1 - np.arange(n // 2)
    return images[(zigzag - turn) % n]


def split(start: int, stop: int, parts: int, together: int = 1) -> list[range]:
    """Cut positions [start, stop) into `parts` consecutive ranges whose lengths differ by at most one.

    Args:
        together: that many positions, counted from `start`, stay in one range; lengths then differ by at most that many.
    """
    short, longer = divmod(-(-(stop - start) // together), parts)
    ranges = []
    for i in range(parts):
        end = min(start + together * (short + (i < longer)), stop)
        ranges.append(range(start, end))
        start = end
    return ranges


def training_plans(
    index: DatasetIndex,
    config: DataConfig,
    *,
    seed: int,
    epoch: int,
    first_step: int,
    batch_size: int,
    rank: int,
    ranks: int,
    accumulation: int,
) -> Iterator[BatchPlan]:
    """Yield this rank's batches from `first_step` to the end of the epoch, `accumulation` a step.

    A global batch is cut into ranks x accumulation parts; rank r takes the parts from r x accumulation on. Together
    the ranks see each position of the epoch once. A part of the last batch that would be empty gets a replacement of weight 0.
    """
    order = repeat(sample_order(index, config, seed, epoch), config.aug_repeats, batch_size)
    cut = {
        "first_step": first_step,
        "batch_size": batch_size,
        "rank": rank,
        "ranks": ranks,
        "accumulation": accumulation,
    }
    for positions, weight in microbatches(len(index), config, **cut):
        yield _training_batch(index, config, order, seed, epoch, positions, weight)


def microbatches(
    images: int, config: DataConfig, *, first_step: int, batch_size: int, rank: int, ranks: int, accumulation: int
) -> Iterator[tuple[range, float]]:
    """Yield the positions in the epoch and the images' weight of each batch of `training_plans`."""
    for step in range(first_step, steps_per_epoch(images, batch_size)):
        start, stop = step * batch_size, min((step + 1) * batch_size, images)
        parts = split(start, stop, ranks * accumulation, together(config))
        for part in parts[rank * accumulation : (rank + 1) * accumulation]:
            yield (part, 1.0) if part else (range(start, start + 1), 0.0)


def together(config: DataConfig) -> int:
    """How many neighbours in the order of an epoch stay in one microbatch."""
    return TOGETHER if config.mixes else 1


def evaluation_plans(
    index: DatasetIndex, config: DataConfig, *, crops: int, batch_size: int, rank: int, ranks: int
) -> Iterator[BatchPlan]:
    """Yield this rank's share of the index, each image once over all ranks, for one (centre) or ten crops."""
    mine = np.arange(rank, len(index), ranks)
    for start in range(0, len(mine), batch_size):
        yield _evaluation_batch(index, config, mine[start : start + batch_size], crops)


def _training_batch(
    index: DatasetIndex, config: DataConfig, order: np.ndarray, seed: int, epoch: int, positions: range, weight: float
) -> BatchPlan:
    ids = order[positions.start : positions.stop]
    draws = iter(uniforms(seed, epoch, positions).T)
    random_crops = {"random_resized_crop": _random_resized_crops, "random_crop": _random_crops}[config.train_crop]
    crop_boxes, sizes, offsets = random_crops(index.sizes[ids], config, draws)
    color, mean_color, shift = _color_maps(config, draws)
    hflip = (next(draws) < 0.5) & config.hflip
    return BatchPlan(
        ids=ids,
        weights=np.full(len(ids), weight, np.float32),
        crop_boxes=crop_boxes,
        sizes=sizes,
        offsets=offsets[:, None],
        hflip=hflip[:, None],
        color=color.astype(np.float32),
        mean_color=mean_color.astype(np.float32),
        shift=shift.astype(np.float32),
        **_operations(config, seed, epoch, positions),
        **_erased_boxes(config, seed, epoch, positions),
    )


def _evaluation_batch(index: DatasetIndex, config: DataConfig, ids: np.ndarray, crops: int) -> BatchPlan:
    if config.interpolation == "torch7-bicubic":
        sizes, centre = _short_side_to(index.sizes[ids], config.resize_size), _centre
    else:  # as torchvision and timm, whose filters those are
        sizes, centre = _short_side_to_as_torchvision(index.sizes[ids], config.resize_size), _centre_as_torchvision
    views = [_views(size, config.crop_size, crops, centre) for size in sizes]
    n = len(ids)
    normalise, shift = _normalisation(config)
    color = normalise @ _of_pixels(config)
    return BatchPlan(
        ids=ids,
        weights=np.ones(n, np.float32),
        crop_boxes=_whole(index.sizes[ids]),
        sizes=sizes,
        offsets=np.array([[(top, left) for top, left, _ in image] for image in views], np.int32),
        hflip=np.array([[mirrored for _, _, mirrored in image] for image in views], bool),
        color=np.broadcast_to(color, (n, *color.shape)).astype(np.float32),
        mean_color=np.zeros((n, *color.shape), np.float32),
        shift=np.broadcast_to(shift, (n, len(shift))).astype(np.float32),
    )


def _philox(seed: int, epoch: int, counter: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter)


def uniforms(seed: int, epoch: int, positions: range, stream: int = 0, draws: int = DRAWS) -> np.ndarray:
    """(len(positions), draws) float64 in [0, 1); a row depends on its position alone.

    Args:
        stream: the counter at which the numbers of position 0 begin.
        draws: numbers of a position, a multiple of the four that Philox makes a count.
    """
    raw = _philox(seed, epoch, stream + positions.start * (draws // 4)).random_raw(len(positions) * draws)
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(-1, draws)


def _between(draw: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * draw


def _whole(sizes: np.ndarray) -> np.ndarray:
    """(n, 4) crop_boxes that cover images of these (n, 2) sizes."""
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)


def _short_side_to(sizes: np.ndarray, short: int) -> np.ndarray:
    """(n, 2) sizes with the short side at `short` and the long side truncated (transforms.lua, Scale).

    An image whose short side has that length keeps its size, as there: in floating point the long side of 140 such images
    up to 5000 pixels at 224, as 230x224, would come out one pixel shorter.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    new_height = np.where(width < height, np.floor(height / width * short), short)
    new_width = np.where(width < height, short, np.floor(width / height * short))
    scaled = np.stack([new_height, new_width], axis=1).astype(np.int32)
    return np.where(sizes.min(axis=1, keepdims=True) == short, sizes, scaled).astype(np.int32)


def _short_side_to_as_torchvision(sizes: np.ndarray, short: int) -> np.ndarray:
    """As `_short_side_to`, but for rounding in the last bit (torchvision/transforms/functional.py, resize)."""
    sides = sizes.astype(np.int64)
    return (short * sides / sides.min(axis=1, keepdims=True)).astype(np.int32)


def _centre(length: int, crop: int) -> int:
    return math.ceil((length - crop) / 2)


def _centre_as_torchvision(length: int, crop: int) -> int:
    return round((length - crop) / 2)  # halves to even


def _views(size: np.ndarray, crop: int, crops: int, centre: Callable[[int, int], int]) -> list[tuple[int, int, bool]]:
    """(top, left, mirrored) of the centre crop, or of the ten: centre and corners of the image and of its mirror image."""
    bottom, right = int(size[0]) - crop, int(size[1]) - crop
    middle = (centre(int(size[0]), crop), centre(int(size[1]), crop))
    if crops == 1:
        return [(*middle, False)]
    places = [middle, (0, 0), (0, right), (bottom, 0), (bottom, right)]
    # The crop at `left` of the mirror image is the mirrored crop at `right - left` of the image.
    return [(top, left, False) for top, left in places] + [(top, right - left, True) for top, left in places]


def _random_resized_crops(
    sizes: np.ndarray, config: DataConfig, draws: Iterator[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4), resized sizes (n, 2) and offsets (n, 2) of transforms.lua's RandomSizedCrop.

    Ten tries of a random area and aspect, sides rounded and swapped at random; an image in which none fits is resized
    to the crop's size by its short side and cut at the centre.
    """
    crop = config.crop_size
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    crop_boxes = _whole(sizes)
    resized = _short_side_to(sizes, crop)
    offsets = np.ceil((resized - crop) / 2).astype(np.int32)
    searching = np.ones(len(sizes), bool)
    for _ in range(CROP_TRIES):
        area = _between(next(draws), *config.scale) * (height * width)
        aspect = _between(next(draws), *config.ratio)
        swap = next(draws) < 0.5
        wide, high = np.floor(np.sqrt(area * aspect) + 0.5), np.floor(np.sqrt(area / aspect) + 0.5)
        wide, high = np.where(swap, high, wide).astype(np.int64), np.where(swap, wide, high).astype(np.int64)
        fits = searching & (high <= height) & (wide <= width) & (high > 0) & (wide > 0)
        top = np.floor(next(draws) * (height - high + 1))
        left = np.floor(next(draws) * (width - wide + 1))
        crop_boxes[fits] = np.stack([top, left, high, wide], axis=1)[fits]
        resized[fits] = crop
        offsets[fits] = 0
        searching &= ~fits
    return crop_boxes, resized, offsets


def _random_crops(
    sizes: np.ndarray, config: DataConfig, draws: Iterator[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4), resized sizes (n, 2) and offsets (n, 2) of transforms.lua's RandomCrop: any place in the padded image."""
    resized = _short_side_to(sizes, config.resize_size)
    places = resized + 2 * config.padding - config.crop_size + 1
    offsets = np.floor(np.stack([next(draws), next(draws)], axis=1) * places) - config.padding
    return _whole(sizes), resized, offsets.astype(np.int32)


def surround(config: DataConfig) -> tuple[float, ...]:
    """The K numbers, in [0, 1], of a pixel outside of an image: the network sees 0 there."""
    return tuple(np.resize(config.mean, len(_of_pixels(config)[0])).tolist())


def _of_pixels(config: DataConfig) -> np.ndarray:
    """(3, K): a pixel's colours from its K numbers."""
    return np.eye(3) if config.depth == 8 else np.ones((3, 1))


def _to_channels(config: DataConfig) -> np.ndarray:
    """(C, 3): what the network sees of a pixel's colours, before it is normalised."""
    return np.eye(3) if config.channels == 3 else GRAY[None]


def _normalisation(config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """(C, 3) matrix and (C) shift that make of a pixel's colours what the network sees: (x - mean) / std."""
    std = np.array(config.std)
    return np.diag(1 / std) @ _to_channels(config), -np.array(config.mean) / std


def _color_maps(config: DataConfig, draws: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (n, C, K), B (n, C, K) and t (n, C) in float64: jitter, lighting, normalisation.

    Brightness scales by b; contrast blends with the gray of the image's present mean by c; saturation blends with each
    pixel's gray by s. Values are never clamped, and saturation leaves the gray as it is, so the three commute and the
    random order in which the Torch code applies them makes no difference. One channel is the gray of the three.
    """
    low, high = 1 - config.color_jitter, 1 + config.color_jitter
    brightness, contrast, saturation = (_between(next(draws), low, high)[:, None, None] for _ in range(3))
    to_gray = np.outer(np.ones(3), GRAY)
    color = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * to_gray)
    mean_color = brightness * (1 - contrast) * to_gray

    alphas = config.pca_noise * np.stack([_normal(next(draws), next(draws)) for _ in range(3)], axis=1)
    shift = (alphas * LIGHTING_EIGENVALUES) @ LIGHTING_EIGENVECTORS.T

    (normalise, offset), pixels = _normalisation(config), _of_pixels(config)
    return normalise @ color @ pixels, normalise @ mean_color @ pixels, shift @ normalise.T + offset


def _operations(config: DataConfig, seed: int, epoch: int, positions: range) -> dict[str, np.ndarray]:
    """The fields of a plan that say what RandAugment or TrivialAugment does."""
    if config.auto_augment == "none":
        return {}
    operations, arguments = draw_operations(config, iter(uniforms(seed, epoch, positions, _OPERATIONS_STREAM).T))
    return {"operations": operations, "arguments": arguments}


def _erased_boxes(config: DataConfig, seed: int, epoch: int, positions: range) -> dict[str, np.ndarray]:
    """The fields of a plan that say what cutout and random erasing erase."""
    erased: dict[str, np.ndarray] = {}
    if not (config.cutout or config.random_erasing):
        return erased
    draws = iter(uniforms(seed, epoch, positions, _ERASING_STREAM).T)
    place, noise = (next(draws), next(draws)), next(draws)
    if config.cutout:
        erased["cutout"] = _cutout_boxes(config.crop_size, config.cutout, *place)
    if config.random_erasing:
        erased["erasing"] = _erasing_boxes(config, draws)
        if config.erasing_fill == "noise":
            erased["noise_seeds"] = (noise * 2.0**53).astype(np.uint64)
    return erased


def _cutout_boxes(crop: int, side: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(n, 4) squares whose centres are anywhere in the crop, clipped at its border (DeVries and Taylor 2017)."""
    start = np.floor(np.stack([row, column], axis=1) * crop) - side // 2
    corner, end = np.maximum(start, 0), np.minimum(start + side, crop)
    return np.concatenate([corner, end - corner], axis=1).astype(np.int32)


def _erasing_boxes(config: DataConfig, draws: Iterator[np.ndarray]) -> np.ndarray:
    """(n, 4) boxes of random erasing, empty where nothing is erased (Zhong et al. 2017).

    With the details of timm and torchvision: the logarithm of the aspect ratio (height / width) is uniform, ten tries, and a
    box is lower and narrower than the image.
    """
    crop, low, high = config.crop_size, *np.log(config.erasing_ratio)
    searching = next(draws) < config.random_erasing
    boxes = np.zeros((len(searching), 4), np.int32)
    for _ in range(CROP_TRIES):
        area = _between(next(draws), *config.erasing_scale) * crop**2
        aspect = np.exp(_between(next(draws), low, high))
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = searching & (height < crop) & (width < crop)
        top = np.floor(next(draws) * (crop - height + 1))
        left = np.floor(next(draws) * (crop - width + 1))
        boxes[fits] = np.stack([top, left, height, width], axis=1)[fits]
        searching &= ~fits
    return boxes


def _normal(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Standard normal numbers from two uniform ones (Box-Muller)."""
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
