"""Mixup and cutmix: the two images of a pair are mixed with each other, and their labels likewise.

Neighbours in the shuffled order of an epoch are a pair: positions 2k and 2k + 1. What becomes of pair k is a pure function of
(seed, epoch, k), as the plan's draws are, from random numbers of their own. A pair is never divided between ranks or
microbatches, so that any number of ranks mixes the same images. An epoch's last image stays as it is if it has no neighbour.

Sources: Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix), and timm's `Mixup` in its mode "pair", whose two images are
mixed with the same share too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.color import to_device
from pipeline.data.plan import TOGETHER, uniforms

_STREAM = 1 << 210  # Philox's counters of these draws, apart from those of the plan
_DRAWS = 8  # uniform numbers reserved for a pair


@dataclass(frozen=True)
class PairDraws:
    """What is drawn for p pairs.

    Attributes:
        shares: (p) float64, each image's own share in what becomes of it; 1 where a pair is not mixed.
        cut: (p) bool, by cutmix: a box of each image comes from the other. A box at the border is cut off, and the share
            becomes that of the pixels.
        centres: (p, 2) float64 in [0, 1), row and column of the box's centre as a fraction of the image's sides.
    """

    shares: np.ndarray
    cut: np.ndarray
    centres: np.ndarray


def draw_pairs(config: DataConfig, seed: int, epoch: int, pairs: range) -> PairDraws:
    """Draw for consecutive pairs of an epoch."""
    from scipy.special import betaincinv  # takes time to import, and is needed here alone

    mixed, switch, quantile, row, column, *_ = uniforms(seed, epoch, pairs, _STREAM, _DRAWS).T
    probability = (
        config.mix_switch_prob if config.mixup_alpha and config.cutmix_alpha else float(config.cutmix_alpha > 0)
    )
    cut = switch < probability
    alpha = np.where(cut, config.cutmix_alpha, config.mixup_alpha)
    shares = np.where(mixed < config.mix_prob, betaincinv(alpha, alpha, quantile), 1.0)
    return PairDraws(shares, cut, np.stack([row, column], axis=1))


@dataclass(frozen=True)
class Partners:
    """What is mixed into the images of a batch.

    Attributes:
        labels: of the image that has the smaller share in each, (n) or (n, classes) as the batch's own.
        shares: (n) float32, its share, from 0 to 0.5.
    """

    labels: Tensor
    shares: Tensor


def mix(images: Tensor, labels: Tensor, draws: PairDraws) -> tuple[Tensor, Tensor, Partners]:
    """Mix rows 2i and 2i + 1 as `draws` says of pair i; an odd last row stays as it is. Waits for no device.

    Args:
        images: (n, C, H, W) float32, already normalised.
        labels: (n) int64, or (n, classes) of images with several labels.

    Returns:
        The images, the labels of those that have the greater share in each, and the others.
    """
    n, (height, width), device = len(images), images.shape[-2:], images.device
    pairs = n // TOGETHER
    boxes, shares, cut = _boxes(draws, height, width), draws.shares, draws.cut & (draws.shares < 1)
    outside = 1 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (height * width)
    # Within a box an image has none of its own pixels, elsewhere this share of them.
    own, shares = np.where(cut, 1.0, shares), np.where(cut, outside, shares)
    of_pairs = np.stack([*np.where(cut, boxes.T, 0), own, np.minimum(shares, 1 - shares), shares < 0.5], axis=1)
    unmixed = [[0, 0, 0, 0, 1, 0, 0]] * (n - TOGETHER * pairs)
    by_row = np.concatenate([np.repeat(of_pairs, TOGETHER, axis=0), np.reshape(unmixed, (-1, 7))]).astype(np.float32)
    top, left, bottom, right, elsewhere, smaller, swap = to_device(by_row, device)[..., None].unbind(1)  # (n, 1) each
    rows, columns = (torch.arange(side, device=device) for side in (height, width))
    out_of_box = ((rows < top) | (rows >= bottom))[:, :, None] | ((columns < left) | (columns >= right))[:, None]
    weight = (elsewhere[:, :, None] * out_of_box)[:, None]
    swap = (swap if labels.dim() == 2 else swap[:, 0]) > 0
    others = _exchanged(labels)
    partners = Partners(torch.where(swap, labels, others), smaller[:, 0])
    return torch.lerp(_exchanged(images), images, weight), torch.where(swap, others, labels), partners


def _boxes(draws: PairDraws, height: int, width: int) -> np.ndarray:
    """(p, 4) int64: top, left, bottom and right of boxes whose area before they are cut off is 1 - share of the image's.

    Their sides are rounded down to even numbers, as in the code of cutmix's authors; timm keeps odd ones from version 1 on.
    """
    sides = np.array([height, width])
    halves = np.floor(np.sqrt(1 - draws.shares)[:, None] * sides).astype(np.int64) // 2
    centres = np.floor(draws.centres * sides).astype(np.int64)
    return np.concatenate([np.maximum(centres - halves, 0), np.minimum(centres + halves, sides)], axis=1)


def _exchanged(rows: Tensor) -> Tensor:
    """The rows with the two of each pair exchanged, laid out in memory as they are."""
    exchanged, even = rows.clone(), len(rows) // TOGETHER * TOGETHER
    exchanged[0:even:TOGETHER], exchanged[1:even:TOGETHER] = rows[1:even:TOGETHER], rows[0:even:TOGETHER]
    return exchanged
