"""Sums of losses and correct answers, exact over any number of ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import World
from pipeline.ranking import MeanRanking, Ranking, mean_text


@dataclass(frozen=True)
class Score:
    """Sums over a number of images. Errors are in percent.

    Attributes:
        top5_correct: None where there are so few classes that the first five answers say nothing; see `top5_counts`.
        loss_sum: of a network with several exits over all of them too.
    """

    images: int
    top1_correct: int
    top5_correct: int | None
    loss_sum: float
    exits_correct: tuple[int, ...] = ()
    """Top-1 correct at each exit, the last one included; empty for a network with one output."""

    @property
    def top1_error(self) -> float:
        return self._percent_wrong(self.top1_correct)

    @property
    def top5_error(self) -> float | None:
        return None if self.top5_correct is None else self._percent_wrong(self.top5_correct)

    @property
    def exit_errors(self) -> tuple[float, ...]:
        """Top-1 error at each exit; empty for a network with one output."""
        return tuple(map(self._percent_wrong, self.exits_correct))

    @property
    def loss(self) -> float:
        return self._per_image(self.loss_sum)

    def records(self) -> dict[str, float]:
        """What is recorded of it, by name."""
        exits = {f"exit{number}_top1_error": error for number, error in enumerate(self.exit_errors, start=1)}
        top5 = {} if self.top5_error is None else {"top5_error": self.top5_error}
        return {"loss": self.loss, "top1_error": self.top1_error, **top5, **exits}

    def text(self, top5: bool = False) -> str:
        """Its errors in a few words; with `top5` also the accuracy, which others show."""
        errors = errors_text(self.top1_error, self.top5_error) if top5 else f"top-1 error {self.top1_error:.2f} %"
        return errors + exits_text(self.exit_errors)

    def _percent_wrong(self, correct: int) -> float:
        return 100 * (self.images - correct) / self.images if self.images else math.nan

    def _per_image(self, total: float) -> float:
        return total / self.images if self.images else math.nan


@dataclass(frozen=True)
class LabelScore:
    """Sums over a number of images with several labels each, and how they are ranked for each class.

    Attributes:
        classes: their names.
        right_labels: of images times classes, by whether the probability is above one half.
        rankings, mean: of each class and over them; empty and None in training, where no ranking is kept.
    """

    images: int
    classes: Sequence[str]
    right_labels: int
    loss_sum: float
    rankings: tuple[Ranking, ...] = ()
    mean: MeanRanking | None = None

    @property
    def label_error(self) -> float:
        """Wrong ones among all labels, in percent."""
        labels = self.images * len(self.classes)
        return 100 * (labels - self.right_labels) / labels if self.images else math.nan

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images if self.images else math.nan

    def records(self) -> dict[str, float]:
        """What is recorded of it, by name; of each class its AUROC with the 95 % interval, and its average precision."""
        values = {"loss": self.loss, "label_error": self.label_error}
        if self.mean is not None:
            values |= {"mean_auroc": self.mean.auroc, "mean_average_precision": self.mean.average_precision}
            values |= dict(zip(("mean_auroc_low", "mean_auroc_high"), self.mean.auroc_interval, strict=True))
        for name, ranking in zip(self.classes, self.rankings, strict=False):
            low, high = ranking.auroc_interval
            values |= {f"auroc/{name}": ranking.auroc, f"auroc_low/{name}": low, f"auroc_high/{name}": high}
            values[f"average_precision/{name}"] = ranking.average_precision
        return values

    def text(self, top5: bool = False) -> str:
        """Its errors in a few words."""
        ranked = f", {mean_text(self.mean, self.classes)}" if self.mean is not None else ""
        return f"label error {self.label_error:.2f} %{ranked}"


AnyScore = Score | LabelScore


def top5_counts(classes: int) -> bool:
    """Whether the top-5 error says something: with five classes or fewer each is among the first five answers."""
    return classes > 5


def accuracy(error: float) -> float:
    """What an error in percent leaves of 100, as both are printed, with two digits: so they add up."""
    return 100 - round(error, 2)


def errors_text(top1_error: float, top5_error: float | None) -> str:
    """Both errors, in percent, in the words that every log and summary has; the first alone where that is all that counts."""
    top5 = "" if top5_error is None else f", top-5 error {top5_error:.2f} %"
    return f"top-1 error {top1_error:.2f} % (accuracy {accuracy(top1_error):.2f} %){top5}"


def exits_text(errors: Sequence[float]) -> str:
    """Top-1 errors of the exits in a few words, after a comma; empty for a network with one output."""
    return f", exits {' / '.join(f'{error:.2f}' for error in errors)} %" if errors else ""


def batch_sums(logits: Tensor, labels: Tensor, losses: Tensor, weights: Tensor) -> Tensor:
    """Sums over n images, (4) float64: images, top-1 and top-5 correct, loss; of several labels: images, right labels, 0, loss.

    Of a network with several exits the last one counts; where an image has one label (4 + exits) are returned, top-1 correct
    at each exit after the others.

    Args: logits (n, classes) or (n, exits, classes), labels (n) or (n, classes), losses (n), weights (n) of 0 or 1.
    """
    every: list[Tensor] = []
    if logits.dim() == 3:
        if labels.dim() == 1:
            every = list((logits.argmax(dim=2) == labels[:, None]).unbind(dim=1))
        logits = logits[:, -1]
    if labels.dim() == 2:
        first, second = ((logits > 0) == (labels > 0)).sum(dim=1), torch.zeros_like(weights)
    else:
        correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        first, second = correct[:, 0], correct.any(dim=1)
        if every:  # the last exit's answer is the network's, though equal logits may have another largest one
            every[-1] = first
    rows = torch.stack([torch.ones_like(weights), first, second, losses, *every]).double()
    return torch.where(weights > 0, rows, 0).sum(dim=1)


class MetricAccumulator:
    """Sums of this rank, kept on the device; reading them (`score`) waits for the device and talks to all ranks.

    Args:
        classes: their names.
        several_labels: an image may have several of them.
        exits: of the network.
    """

    def __init__(self, world: World, classes: Sequence[str], several_labels: bool = False, exits: int = 1):
        self._world, self._classes, self._several_labels = world, classes, several_labels
        further = exits if exits > 1 and not several_labels else 0
        self._sums = torch.zeros(4 + further, dtype=torch.float64, device=world.device)  # as `batch_sums` has them

    def add(self, sums: Tensor) -> None:
        """Add what `batch_sums` gave."""
        self._sums += sums

    def reset(self) -> None:
        self._sums.zero_()

    def score(self) -> AnyScore | None:
        """Sums over all ranks; None if there was no image. Every rank must call this."""
        images, top1_correct, top5_correct, loss_sum, *exits = self._world.all_reduce_sum(self._sums).tolist()
        if self._several_labels:
            return LabelScore(int(images), self._classes, int(top1_correct), loss_sum) if images else None
        if not images:
            return None
        top5 = int(top5_correct) if top5_counts(len(self._classes)) else None
        return Score(int(images), int(top1_correct), top5, loss_sum, tuple(map(int, exits)))

    def state_dict(self) -> dict[str, Any]:
        """Every rank's sums, (ranks, 4 and one for each of several exits) float64. Every rank must call this."""
        return {"by_rank": torch.tensor(self._world.gather(self._sums.tolist()), dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; with another number of ranks rank 0 goes on for all."""
        by_rank = state["by_rank"]
        if len(by_rank) == self._world.size:
            self._sums.copy_(by_rank[self._world.rank])
        elif self._world.is_main:
            self._sums.copy_(by_rank.sum(dim=0))
