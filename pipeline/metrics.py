"""Sums of losses and correct answers, exact over any number of ranks."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import World


@dataclass(frozen=True)
class Score:
    """Sums over a number of images. Errors are in percent."""

    images: int
    top1_correct: int
    top5_correct: int
    loss_sum: float

    @property
    def top1_error(self) -> float:
        return 100 * (1 - self._per_image(self.top1_correct))

    @property
    def top5_error(self) -> float:
        return 100 * (1 - self._per_image(self.top5_correct))

    @property
    def loss(self) -> float:
        return self._per_image(self.loss_sum)

    def _per_image(self, total: float) -> float:
        return total / self.images if self.images else math.nan


def batch_sums(logits: Tensor, labels: Tensor, losses: Tensor, weights: Tensor) -> Tensor:
    """Sums over n images, (4) float64: images, top-1 and top-5 correct, loss.

    Args: logits (n, classes), labels (n), losses (n), weights (n) of 0 or 1.
    """
    correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    rows = torch.stack([torch.ones_like(weights), correct[:, 0], correct.any(dim=1), losses]).double()
    return torch.where(weights > 0, rows, 0).sum(dim=1)


class MetricAccumulator:
    """Sums of this rank, kept on the device; reading them (`score`) waits for the device and talks to all ranks."""

    def __init__(self, world: World):
        self._world = world
        self._sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # as `batch_sums` has them

    def add(self, sums: Tensor) -> None:
        """Add what `batch_sums` gave."""
        self._sums += sums

    def reset(self) -> None:
        self._sums.zero_()

    def score(self) -> Score | None:
        """Sums over all ranks; None if there was no image. Every rank must call this."""
        images, top1_correct, top5_correct, loss_sum = self._world.all_reduce_sum(self._sums).tolist()
        return Score(int(images), int(top1_correct), int(top5_correct), loss_sum) if images else None

    def state_dict(self) -> dict[str, Any]:
        """Every rank's sums, (ranks, 4) float64. Every rank must call this."""
        return {"by_rank": torch.tensor(self._world.gather(self._sums.tolist()), dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; with another number of ranks rank 0 goes on for all."""
        by_rank = state["by_rank"]
        if len(by_rank) == self._world.size:
            self._sums.copy_(by_rank[self._world.rank])
        elif self._world.is_main:
            self._sums.copy_(by_rank.sum(dim=0))
