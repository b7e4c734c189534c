"""RandAugment's and TrivialAugment's operations on a batch of crops, on the device where it is computed.

Four executors do all of them: an affine warp, a look-up table for each image and colour, a blend with the pixel's gray, a
blend with the smoothed image. They compute on bytes and round as Pillow does, so that the tables and blends give its bytes,
and so does the warp with `nearest`; with `bilinear` it differs from Pillow's by at most 1 (it computes in float32). An image's
pixels do not depend on the others of its batch.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.color import to_device
from pipeline.data.plan import BatchPlan, surround
from pipeline.data.policies import Operation

ROUNDING = 2**-10  # more than what float32 loses in a byte, much less than what shows


class AutoAugment:
    """Executes the operations of plans.

    Args:
        config: whose ``auto_augment`` is not none. Where a warp finds no pixel there is black, as in torchvision, or in timm's
            space the mean colour, as there.
    """

    def __init__(self, config: DataConfig):
        mean = np.rint(255 * np.array(surround(config))).astype(np.uint8)
        self._fill = mean if config.auto_augment == "randaugment-timm" else np.zeros_like(mean)
        self._warp = {"nearest": _warp_nearest, "bilinear": _warp_bilinear}[config.warp_interpolation]

    def __call__(self, pixels: Tensor, plan: BatchPlan, device: torch.device) -> Tensor:
        """Return the pixels, (n, 1, H, W, 3) uint8 on `device`, after the plan's operations.

        Args:
            pixels: (n, 1, H, W, 3), uint8, or float32, which is rounded and clipped to 0..255.
        """
        assert plan.operations is not None and plan.arguments is not None
        pixels = to_device(pixels, device)[:, 0]
        images = (
            pixels.clone() if pixels.dtype is torch.uint8 else (pixels + 0.5).floor_().clamp_(0, 255).to(torch.uint8)
        )
        for layer in range(plan.operations.shape[1]):
            kinds, arguments = plan.operations[:, layer], plan.arguments[:, layer]
            for kind in np.unique(kinds).tolist():
                if kind == Operation.IDENTITY:
                    continue
                rows = np.flatnonzero(kinds == kind)
                places = to_device(rows, device)
                changed = self._execute(Operation(kind), images.index_select(0, places), arguments[rows])
                images.index_copy_(0, places, changed)
        return images[:, None]

    def _execute(self, kind: Operation, images: Tensor, arguments: np.ndarray) -> Tensor:
        """Apply one kind of operation to all of these (n, H, W, 3) images, with (n, 6) arguments."""
        if kind == Operation.WARP:
            sources, inside = self._warp(images, arguments)
            return torch.where(inside[..., None], sources, to_device(self._fill, images.device))
        first = to_device(arguments[:, 0].astype(np.float32), images.device).view(-1, 1, 1, 1)
        if kind == Operation.COLOR:
            return _blend(_gray(images)[..., None].float(), images, first)
        if kind == Operation.SHARPNESS:
            return _blend(_smoothed(images), images, first)
        tables = TABLES[kind](images, first.view(-1, 1, 1)).expand(len(images), images.shape[-1], 256)
        return tables.reshape(-1).index_select(0, _cells(images).view(-1)).view_as(images)


def _warp_nearest(images: Tensor, matrices: np.ndarray) -> tuple[Tensor, Tensor]:
    """(n, H, W, 3) pixels, and (n, H, W) whether there are any: Pillow's, in 16.16 fixed-point numbers."""
    n, height, width, channels = images.shape
    a, b, c, d, e, f = matrices.T
    fixed = np.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2], axis=1)
    numbers = to_device(np.floor(fixed * 65536 + 0.5).astype(np.int64), images.device)[:, :, None, None].unbind(1)
    rows, columns = _places(height, width, torch.int64, images.device)
    x = (numbers[0] * columns + numbers[1] * rows + numbers[2]) >> 16
    y = (numbers[3] * columns + numbers[4] * rows + numbers[5]) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    first = torch.arange(n, device=images.device)[:, None, None] * (height * width)
    index = first + y.clamp_(0, height - 1) * width + x.clamp_(0, width - 1)
    return images.view(-1, channels).index_select(0, index.view(-1)).view_as(images), inside


def _warp_bilinear(images: Tensor, matrices: np.ndarray) -> tuple[Tensor, Tensor]:
    """As `_warp_nearest`, interpolated between four pixels, of which those beyond the border are those at it."""
    _, height, width, _ = images.shape
    a, b, c, d, e, f = to_device(matrices, images.device)[:, :, None, None].unbind(1)
    rows, columns = _places(height, width, torch.float64, images.device)
    x = a * (columns + 0.5) + b * (rows + 0.5) + c
    y = d * (columns + 0.5) + e * (rows + 0.5) + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1).float()
    planes = images.permute(0, 3, 1, 2).float()
    warped = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (warped + ROUNDING).floor_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1), inside


def _places(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(H, 1) rows and (W) columns."""
    return torch.arange(height, dtype=dtype, device=device)[:, None], torch.arange(width, dtype=dtype, device=device)


def _blend(low: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Pillow's Image.blend: what is between two images, or beyond the second, in float32 and cut off to bytes."""
    return (low + factor * (images.float() - low)).clamp_(0, 255).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    """(n, H, W) int32: Pillow's conversion to L."""
    red, green, blue = images.int().unbind(-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _smoothed(images: Tensor) -> Tensor:
    """Pillow's filter SMOOTH: the mean of nine pixels of which the middle one counts five times; the frame stays."""
    smoothed = images.float()
    wide = images.short()
    down = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    sums = down[:, :, :-2] + down[:, :, 1:-1] + down[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    # Halves do not occur. A sum over 26 is no whole number by at least 1/26, so that float32 finds its whole part.
    smoothed[:, 1:-1, 1:-1] = ((2 * sums + 13).float() / 26).floor_()
    return smoothed


def _cells(images: Tensor) -> Tensor:
    """(n, H, W, 3) int32: for each byte its place in tables of all images and colours, (n, 3, 256)."""
    n, channels = len(images), images.shape[-1]
    starts = 256 * torch.arange(n * channels, dtype=torch.int32, device=images.device)
    return images.int() + starts.view(n, 1, 1, channels)


def _values(images: Tensor) -> Tensor:
    """(256) float32: the values of a byte."""
    return torch.arange(256, dtype=torch.float32, device=images.device)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from the rounded mean of the gray image, or towards it."""
    sums = _gray(images).sum(dim=(1, 2), dtype=torch.int64)
    mean = (sums.double() / images[0, ..., 0].numel() + 0.5).floor_().float().view(-1, 1, 1)
    return _blend(mean, _values(images), factor)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    dropped = (8 - bits).int()
    return (_values(images).int() >> dropped << dropped).to(torch.uint8)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    values = _values(images)
    return torch.where(values < threshold, values, 255 - values).to(torch.uint8)


def _solarize_add(images: Tensor, added: Tensor) -> Tensor:
    values = _values(images)
    return torch.where(values < 128, (values + added).clamp_(max=255), values).to(torch.uint8)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each colour to 0..255."""
    lowest, highest = (f(dim=(1, 2)).double().unsqueeze(-1) for f in (images.amin, images.amax))
    values = _values(images).double()
    scale = 255.0 / (highest - lowest)  # infinite in an image of one value, which stays as it is
    stretched = (values * scale + -lowest * scale).trunc_().clamp_(0, 255)
    return torch.where(highest > lowest, stretched, values).to(torch.uint8)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Spread each colour's values evenly, by its histogram."""
    cells = _cells(images).view(-1).long()
    counts = torch.zeros(256 * len(images) * images.shape[-1], dtype=torch.int32, device=images.device)
    counts.scatter_add_(0, cells, torch.ones_like(counts[:1]).expand_as(cells))
    counts = counts.view(len(images), -1, 256)
    below = counts.cumsum(dim=2) - counts
    last = images.amax(dim=(1, 2)).long().unsqueeze(-1)
    step = torch.div(below.gather(2, last), 255, rounding_mode="floor")  # without the pixels of the highest value
    spread = torch.div(step // 2 + below, step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    return torch.where(step > 0, spread, _values(images).long()).to(torch.uint8)


# Makes the tables, uint8 (n or 1, 3 or 1, 256), of these (n, H, W, 3) images with their (n, 1, 1) first arguments.
TABLES: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.BRIGHTNESS: lambda images, factor: _blend(torch.zeros_like(factor), _values(images), factor),
    Operation.CONTRAST: _contrast,
    Operation.SOLARIZE: _solarize,
    Operation.SOLARIZE_ADD: _solarize_add,
    Operation.POSTERIZE: _posterize,
    Operation.INVERT: lambda images, _: (255 - _values(images)).to(torch.uint8).view(1, 1, 256),
    Operation.AUTOCONTRAST: _autocontrast,
    Operation.EQUALIZE: _equalize,
}
