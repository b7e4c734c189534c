"""Cutout and random erasing of a ready batch: the boxes that the plan has drawn become the mean colour, or noise.

One implementation for all loaders, on the device where the batch is.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.color import to_device
from pipeline.data.plan import BatchPlan


def erase(images: Tensor, plan: BatchPlan) -> Tensor:
    """Erase the boxes of a plan, in place.

    Args:
        images: (n, C, H, W) normalised images of one view each, float32 or bfloat16; 0 is the mean colour.

    Returns:
        The same tensor.
    """
    if plan.erasing is not None:
        inside = _inside(plan.erasing, images)
        if plan.noise_seeds is None:
            images.masked_fill_(inside[:, None], 0)
        else:
            pixels = images.permute(0, 2, 3, 1)  # a box's numbers so follow each other, pixel by pixel
            noise = to_device(_noise(plan.erasing, plan.noise_seeds, channels=images.shape[1]), images.device)
            pixels.masked_scatter_(inside[..., None], noise.to(images.dtype))
    if plan.cutout is not None:
        images.masked_fill_(_inside(plan.cutout, images)[:, None], 0)
    return images


def _inside(boxes: np.ndarray, images: Tensor) -> Tensor:
    """(n, H, W) bool: the pixels in the (n, 4) boxes."""
    top, left, height, width = to_device(boxes, images.device)[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    high, wide = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    return high[:, :, None] & wide[:, None]


def _noise(boxes: np.ndarray, seeds: np.ndarray, channels: int) -> np.ndarray:
    """Standard normal numbers, float32, for the pixels of all boxes one after the other; a box's depend on its seed alone."""
    counts = channels * boxes[:, 2].astype(int) * boxes[:, 3]
    return np.concatenate([_normal(count, seed) for count, seed in zip(counts.tolist(), seeds.tolist(), strict=True)])


def _normal(count: int, seed: int) -> np.ndarray:
    """(count) float32 standard normal numbers, two of each 64-bit number of Philox (Box-Muller)."""
    halves = np.random.Philox(key=seed).random_raw((count + 1) // 2).view(np.uint32).reshape(-1, 2)
    first, second = ((halves >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)).T
    radius, angle = np.sqrt(-2 * np.log1p(-first)), np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]
