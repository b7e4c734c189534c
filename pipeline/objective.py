"""What a step minimises: what a batch means for a network, and what the network's outputs mean for a batch.

To add an objective, write a class with the methods of `Objective` and give it a name in `OBJECTIVES`; ``optim.objective``
chooses it. The training loop, evaluation and the checkpoints need no change.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Config
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import Batch
from pipeline.errors import UserError, did_you_mean, look_up

NAMED = 10  # classes of so many at most have their weights said one by one


class Objective(Protocol):
    """What training minimises.

    Optional attributes:
        class_weights: as `CrossEntropy` has it; without it `optim.class_weights` is refused.
        takes_mixed_labels: true if `losses` follows `Batch.partners`; without it mixup and cutmix are refused.
    """

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch that the network sees: as it is, or with images mixed and targets softened."""

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each image, (n), in float32.

        Args:
            outputs: the network's, of n images: logits (n, classes), or whatever else a network gives.
            batch: as `prepare` returned it.
        """

    def logits(self, outputs: Any) -> Tensor:
        """Return the logits (n, classes) by which errors are counted, in training and in evaluation.

        Of a network with several exits they may be (n, exits, classes): errors are recorded for each exit, and the last one's
        are the run's.
        """


class CrossEntropy:
    """Cross-entropy with the class of each image, the paper's (no label smoothing).

    A mixed image has the mean of the losses with both of its labels, by their shares: as it is linear in the targets, that is
    the loss with soft ones.

    Attributes:
        class_weights: (classes) float32, by which an image's loss is multiplied; None for 1.
    """

    class_weights: Tensor | None = None
    takes_mixed_labels = True

    def __init__(self, label_smoothing: float):
        self._label_smoothing = label_smoothing

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        losses = self._losses_of(outputs, batch.labels)
        if batch.partners is None:
            return losses
        return torch.lerp(losses, self._losses_of(outputs, batch.partners.labels), batch.partners.shares)

    def _losses_of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs.float(), labels, reduction="none", label_smoothing=self._label_smoothing)
        return losses if self.class_weights is None else losses * self.class_weights[labels]

    def logits(self, outputs: Tensor) -> Tensor:
        return outputs


class BinaryCrossEntropy(CrossEntropy):
    """Binary cross-entropy of each of an image's labels, or of its one class against all others, averaged over the classes.

    `class_weights` multiply the loss of a class in the images that have it, by its target.

    Args:
        threshold: targets above it become 1 and all others 0; None leaves them. Source: Wightman et al. 2021, ResNet strikes
            back, whose images have all classes that are mixed into them.
    """

    def __init__(self, label_smoothing: float, threshold: float | None = None):
        super().__init__(label_smoothing)
        self._threshold = threshold

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        targets = self.targets(batch, outputs.shape[1])
        losses = F.binary_cross_entropy_with_logits(
            outputs.float(), targets, pos_weight=self.class_weights, reduction="none"
        )
        return losses.mean(dim=1)

    def targets(self, batch: Batch, classes: int) -> Tensor:
        """(n, classes) float32. Smoothing moves them towards 1/2; of one class an image towards 1 / classes, as in timm."""
        targets = _dense(batch.labels, classes)
        if batch.partners is not None:
            targets = torch.lerp(targets, _dense(batch.partners.labels, classes), batch.partners.shares[:, None])
        floor = 1 / 2 if batch.labels.dim() == 2 else 1 / classes
        targets = targets * (1 - self._label_smoothing) + self._label_smoothing * floor
        return targets if self._threshold is None else (targets > self._threshold).float()


def _dense(labels: Tensor, classes: int) -> Tensor:
    """(n) classes or (n, classes) labels as (n, classes) float32. Waits for no device, as F.one_hot does on CPU."""
    if labels.dim() == 2:
        return labels.float()
    return torch.zeros(len(labels), classes, device=labels.device).scatter_(1, labels[:, None], 1)


OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "cross_entropy": lambda config: CrossEntropy(config.optim.label_smoothing),
    "binary_cross_entropy": lambda config: BinaryCrossEntropy(
        config.optim.label_smoothing, config.optim.bce_target_threshold
    ),
}


def create_objective(config: Config, class_weights: Tensor | None = None) -> Objective:
    """Build the objective that the configuration names.

    Args:
        class_weights: (classes) float32 on the device; see `read_class_weights`.

    Raises:
        UserError: there is none of that name, or it does not weigh classes or take mixed labels.
    """
    objective = look_up(OBJECTIVES, config.optim.objective, "optim.objective")(config)
    if config.data.mixes and not getattr(objective, "takes_mixed_labels", False):
        raise UserError(
            f"the objective {config.optim.objective} does not take mixed labels: set data.mixup_alpha 0 and data.cutmix_alpha 0"
        )
    if class_weights is not None:
        if not hasattr(objective, "class_weights"):
            raise UserError(f"optim.class_weights: the objective {config.optim.objective} does not weigh classes")
        objective.class_weights = class_weights
    return objective


def read_class_weights(wanted: str | None, index: DatasetIndex) -> Tensor | None:
    """The (classes) weights in float32 that ``optim.class_weights`` names; None for equal ones.

    Balanced ones are images / (classes x images of the class), so that their mean over the images is 1; with several labels
    an image, negative images / positive images of each class.

    Raises:
        UserError: the file cannot be read or does not name each class once; or a class is in no image.
    """
    if wanted is None:
        return None
    return torch.from_numpy(
        (_balanced(index) if wanted == "balanced" else _of_file(Path(wanted), index)).astype(np.float32)
    )


def class_weights_text(weights: Sequence[float], classes: Sequence[str]) -> str:
    """Weights in a line; of many classes those of the lightest and the heaviest."""
    named = [f"{name} {weight:.4g}" for weight, name in zip(weights, classes, strict=True)]
    if len(named) <= NAMED:
        return f"class weights: {', '.join(named)}"
    lightest, heaviest = weights.index(min(weights)), weights.index(max(weights))
    return f"class weights: from {named[lightest]} to {named[heaviest]}"


def _balanced(index: DatasetIndex) -> np.ndarray:
    images, classes = len(index), len(index.classes)
    several = index.labels.ndim == 2
    positive = index.labels.sum(axis=0, dtype=np.int64) if several else np.bincount(index.labels, minlength=classes)
    if not positive.all():
        raise UserError(
            f"optim.class_weights balanced: no training image is of the class '{index.classes[int(positive.argmin())]}': "
            "remove the class, or give a file of weights"
        )
    return (images - positive) / positive if several else images / (classes * positive)


def _of_file(file: Path, index: DatasetIndex) -> np.ndarray:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason, nearest = getattr(error, "strerror", None) or error, did_you_mean(file.name, ["balanced"])
        raise UserError(
            f"cannot read optim.class_weights {file} ({reason}){nearest}: give balanced, or a file"
        ) from None
    found: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        parts = re.fullmatch(r"(.+?)[\s,]+(\S+)", line)
        name = parts[1] if parts else line
        try:
            weight = float(parts[2]) if parts else np.nan
        except ValueError:
            weight = np.nan
        if parts and name not in index.classes:
            nearest = did_you_mean(name, index.classes) or f"; there are {', '.join(index.classes[:NAMED])}"
            raise UserError(f"optim.class_weights {file}, line {number}: there is no class '{name}'{nearest}")
        if not parts or name in found or not 0 <= weight < np.inf:
            raise UserError(
                f"optim.class_weights {file}, line {number}: '{line}' is not 'CLASS WEIGHT' with a class that stands once "
                f"and a number from 0 on, such as '{index.classes[0]} 1.5'"
            )
        found[name] = weight
    lacking = [name for name in index.classes if name not in found]
    if lacking:
        raise UserError(f"optim.class_weights {file} has no line for the class '{lacking[0]}': add 'CLASS WEIGHT'")
    return np.array([found[name] for name in index.classes])
