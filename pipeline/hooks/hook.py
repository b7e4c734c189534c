"""What happens beside training: recording, saving, pictures, an average of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.metrics import Score

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


@dataclass(frozen=True)
class StepResult:
    """One optimiser step.

    Attributes:
        images: in the global batch.
        learning_rate: it was taken with.
        gradient_norm: before the step, if the step is logged.
        logged: whether metrics are read after this step.
        last: it was the last of its epoch.
    """

    images: int
    learning_rate: float
    gradient_norm: float | None
    logged: bool
    last: bool


@dataclass(frozen=True)
class EpochResult:
    """An epoch, counted from 0, with its scores; `best` if no earlier one had a smaller validation error."""

    epoch: int
    train: Score
    val: Score
    best: bool


class Hook:
    """Does nothing. A hook overrides what it needs; every rank calls every method at the same places.

    A hook with a state gives it a name in `Run.parts` when it is made: the state is then saved and resumed with the run.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process; ``trainer.run.done_steps`` is 0 in a run that is new."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Before an optimiser step."""

    def on_batch(self, trainer: Trainer, batch: Batch, losses: Tensor) -> None:
        """After the backward pass of a microbatch; losses (n), without gradient."""

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """After an optimiser step; the run's progress names the next one."""

    def on_evaluation_batch(self, trainer: Trainer) -> None:
        """Before each batch of a validation, and once before an epoch."""

    def on_epoch(self, trainer: Trainer, result: EpochResult) -> None:
        """After an epoch's validation; the run's progress names the next epoch."""

    def on_end(self, trainer: Trainer) -> None:
        """When this process leaves the training, also after a failure."""
