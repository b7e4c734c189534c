"""What a step minimises: what a batch means for a network, and what the network's outputs mean for a batch.

To add an objective, write a class with the methods of `Objective` and give it a name in `OBJECTIVES`; ``optim.objective``
chooses it. The training loop, evaluation and the checkpoints need no change.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.errors import look_up


class Objective(Protocol):
    """What training minimises."""

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch that the network sees: as it is, or with images mixed and targets softened."""

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each image, (n), in float32.

        Args:
            outputs: the network's, of n images: logits (n, classes), or whatever else a network gives.
            batch: as `prepare` returned it.
        """

    def logits(self, outputs: Any) -> Tensor:
        """Return the logits (n, classes) by which errors are counted, in training and in evaluation."""


class CrossEntropy:
    """Cross-entropy with the class of each image, the paper's (no label smoothing)."""

    def __init__(self, label_smoothing: float):
        self._label_smoothing = label_smoothing

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.float(), batch.labels, reduction="none", label_smoothing=self._label_smoothing)

    def logits(self, outputs: Tensor) -> Tensor:
        return outputs


OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "cross_entropy": lambda config: CrossEntropy(config.optim.label_smoothing),
}


def create_objective(config: Config) -> Objective:
    """Build the objective that the configuration names.

    Raises:
        UserError: there is none of that name.
    """
    return look_up(OBJECTIVES, config.optim.objective, "optim.objective")(config)
