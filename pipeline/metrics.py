"""Running totals of loss and right answers, exact over any number of ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed import World


@dataclass(frozen=True)
class Score:
    """MetricAccumulator over a number of images. Errors are in percent."""

    images: int
    top1_correct: int
    top5_correct: int
    loss_sum: float

    @property
    def top1_error(self) -> float:
        return 100 * (1 - self.top1_correct / self.images)

    @property
    def top5_error(self) -> float:
        return 100 * (1 - self.top5_correct / self.images)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images


class MetricAccumulator:
    """Sums kept on the device; reading them (`score`) waits for the device and talks to all ranks."""

    def __init__(self, device: torch.device):
        self.values = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1 and top-5 right, loss

    def add(self, logits: Tensor, labels: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Add n images: logits (n, classes), labels (n), losses (n), weights (n) of 0 or 1."""
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        rows = torch.stack([torch.ones_like(weights), right[:, 0], right.any(dim=1), losses]).double()
        self.values += torch.where(weights > 0, rows, 0).sum(dim=1)

    def score(self, world: World) -> Score | None:
        """MetricAccumulator over all ranks; None if there was no image. Every rank must call this."""
        images, top1_correct, top5_correct, loss_sum = world.all_reduce_sum(self.values).tolist()
        return Score(int(images), int(top1_correct), int(top5_correct), loss_sum) if images else None

    def by_rank(self, world: World) -> Tensor:
        """Every rank's sums, (ranks, 4), for a checkpoint. Every rank must call this."""
        return torch.tensor(world.gather(self.values.tolist()), dtype=torch.float64)

    def restore(self, by_rank: Tensor, world: World) -> None:
        """Go on from what `by_rank` gave; with another number of ranks rank 0 goes on for all."""
        if len(by_rank) == world.size:
            self.values.copy_(by_rank[world.rank])
        elif world.is_main:
            self.values.copy_(by_rank.sum(dim=0))
