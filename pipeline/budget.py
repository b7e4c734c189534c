"""Budgeted batch classification: an image leaves a network with several exits at the first that is sure enough of it.

Source: Huang et al.: Multi-Scale Dense Networks for Resource Efficient Image Classification (ICLR 2018), Section 3 and 4.3,
and the authors' Torch code. An exit is as sure as its largest softmax probability says. How sure it must be depends on a
budget: `thresholds` chooses that on held-out images, so that a wanted share of them leaves at each exit.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.loader import EvaluationLoader
from pipeline.models.early_exits import stack_exits
from pipeline.models.msdnet import MSDNet

BUDGETS = tuple(p / 20 for p in range(1, 40))
"""Values of q, from early exits for most images to late ones: the share that leaves at exit k follows q^k."""


@dataclass(frozen=True)
class Answers:
    """What E exits say of N images.

    Attributes:
        classes: (E, N) int64, the most probable class.
        confidence: (E, N) float32, its probability.
    """

    classes: np.ndarray
    confidence: np.ndarray


@torch.inference_mode()
def answers_of(
    network: MSDNet, loader: EvaluationLoader, after_batch: Callable[[], None] = lambda: None
) -> tuple[Answers, Answers]:
    """The answers to all images of a loader's index, in its order, by one crop.

    Args:
        after_batch: is called after each batch.

    Returns:
        Those of each exit by itself; and those of the mean of the softmax of all exits up to it, the Torch code's ensemble.
    """
    shape = network.exits, len(loader.index)
    own, together = (Answers(np.empty(shape, np.int64), np.empty(shape, np.float32)) for _ in range(2))
    number = torch.arange(1, network.exits + 1, device=next(network.parameters()).device)[:, None]
    for batch in loader.batches():
        probabilities = stack_exits(network(batch.images)).float().softmax(dim=2)
        mean = probabilities.cumsum(dim=1) / number
        for answers, found in ((own, probabilities), (together, mean)):
            confidence, classes = found.max(dim=2)
            answers.classes[:, batch.ids] = classes.T.cpu().numpy()
            answers.confidence[:, batch.ids] = confidence.T.cpu().numpy()
        after_batch()
    return own, together


def shares(q: float, exits: int) -> np.ndarray:
    """The wanted share of images that leaves at each exit, (exits) float64: proportional to q^k at exit k."""
    powers = np.power(q, np.arange(1, exits + 1))
    return powers / powers.sum()


def thresholds(confidence: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How sure each exit must be of an image for it to leave there, (E) float64.

    Exit by exit the images that are left are ordered by confidence, and the one of rank floor(N * share) gives the threshold:
    infinite where that is no image; that of the last image where equal confidences have let more leave before. At the last
    exit, where the threshold is 0, all leave.

    Args:
        confidence: (E, N), of held-out images.
        wanted: (E), shares that add up to 1; see `shares`.
    """
    exits, images = confidence.shape
    found, left = np.zeros(exits), np.ones(images, bool)
    for k in range(exits - 1):
        ordered = np.sort(confidence[k, left])[::-1]
        rank = min(math.floor(images * wanted[k]), len(ordered))
        found[k] = ordered[rank - 1] if rank else math.inf
        left &= confidence[k] < found[k]
    return found


def leaves_at(confidence: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The exit, from 0, at which each image leaves, (N) int64.

    Args:
        confidence: (E, N).
        limits: (E), as `thresholds` gives them.
    """
    return (confidence >= limits[:, None]).argmax(axis=0)


@torch.inference_mode()
def classify(
    network: MSDNet, batches: Iterable[Tensor], limits: np.ndarray, together: int = 1
) -> tuple[Tensor, Tensor]:
    """Classify images, of which nothing more is computed when they have left.

    Args:
        batches: of images, (n, 3, H, W) each; channels-last is the fastest on CPU.
        limits: (E), as `thresholds` gives them.
        together: images that stay wait at each exit until so many of them can go on as one batch; so batches do not shrink
            from exit to exit, which is faster. 1: they go on at once, and the maps of no others are kept.

    Returns:
        Probabilities (N, classes) float32 of all images, and the exit, from 0, at which each has left, (N) int64.
    """
    waiting: list[list[_Staying]] = [[] for _ in range(network.exits)]
    found: list[Tensor] = []
    left: list[Tensor] = []

    def go_on(k: int, images: _Staying) -> None:
        maps = network.blocks[k](images.maps)
        probabilities = network.classifier[k](maps).float().softmax(dim=1)
        stays = probabilities.amax(dim=1) < limits[k]
        here, on = (~stays).nonzero()[:, 0], stays.nonzero()[:, 0]
        found.append(probabilities[here])
        left.append(torch.stack([images.rows[here], torch.full_like(here, k)]))
        if len(on):
            waiting[k + 1].append(_Staying(images.rows[on], [_rows(x, on) for x in maps]))
            if sum(len(part.rows) for part in waiting[k + 1]) >= together:
                send(k + 1)

    def send(k: int) -> None:
        parts, waiting[k] = waiting[k], []
        if parts:
            go_on(k, _joined(parts))

    images = 0
    for batch in batches:
        go_on(0, _Staying(torch.arange(images, images + len(batch), device=batch.device), batch))
        images += len(batch)
    for k in range(1, network.exits):
        send(k)
    places, exits = torch.cat(left, dim=1)
    order = places.argsort()
    return torch.cat(found)[order], exits[order]


@dataclass(frozen=True)
class _Staying:
    """Images that go on to the next block.

    Attributes:
        rows: (n), their positions among all.
        maps: what the block takes: (n, 3, H, W), or a list of maps, one a scale.
    """

    rows: Tensor
    maps: Any


def _joined(parts: list[_Staying]) -> _Staying:
    if len(parts) == 1:
        return parts[0]
    maps = [torch.cat(of_scale) for of_scale in zip(*(part.maps for part in parts), strict=True)]
    return _Staying(torch.cat([part.rows for part in parts]), maps)


class Budgeted(nn.Module):
    """A network whose images leave at the first exit that is sure enough. Shape: (n, 3, H, W) -> (n, classes).

    It gives the logarithms of the probabilities by which an image has left, which serve as logits.

    Args:
        limits: (E), as `thresholds` gives them.
    """

    def __init__(self, network: MSDNet, limits: np.ndarray):
        super().__init__()
        self.network, self._limits = network, limits

    def forward(self, x: Tensor) -> Tensor:
        return classify(self.network, [x], self._limits)[0].log()


def _rows(maps: Tensor, rows: Tensor) -> Tensor:
    """Some images' feature maps, in the order of memory that all have: indexing alone would make channels-last maps NCHW."""
    if maps.is_contiguous(memory_format=torch.channels_last):
        return maps.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)
    return maps[rows]
