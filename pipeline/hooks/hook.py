"""What happens beside training: recording, saving, pictures, an average of the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline.data.loader import Batch
from pipeline.metrics import AnyScore
from pipeline.monitor import Monitor
from pipeline.preemption import PreemptionHandler
from pipeline.run import Run
from pipeline.watchdog import Watchdog


class Training(Protocol):
    """What a hook sees of the trainer.

    Attributes:
        microbatch: number of the microbatch within the present step.
        seconds: spent since the last log line in waiting for "data" and in writing a "checkpoint".
    """

    run: Run
    monitor: Monitor
    watchdog: Watchdog
    preemption: PreemptionHandler
    microbatch: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """One optimiser step.

    Attributes:
        images: in the global batch.
        learning_rate: it was taken with.
        gradient_norm: before the step, if the step is logged.
        loss_scale: it was taken with, if the step is logged; 1 but in fp16.
        logged: whether metrics are read after this step.
        last: it was the last of its epoch.
        skipped: it was left out, as its loss or gradient was not finite.
    """

    images: int
    learning_rate: float
    gradient_norm: float | None
    loss_scale: float
    logged: bool
    last: bool
    skipped: bool


@dataclass(frozen=True)
class EpochResult:
    """An epoch, counted from 0, with its scores; `best` if its validation score is better than all before.

    Attributes:
        scores: the validation's, by the weights' name; see `Run.validated`.
    """

    epoch: int
    train: AnyScore
    scores: Mapping[str, AnyScore]
    best: bool

    @property
    def val(self) -> AnyScore:
        """The validation score of the weights that the best epoch is chosen by."""
        return next(iter(self.scores.values()))


class Hook:
    """Does nothing. A hook overrides what it needs; every rank calls every method at the same places.

    A hook with a state gives it a name in `Run.parts` when it is made: the state is then saved and resumed with the run.

    Attributes:
        changes_network: whether it may change the network's modules in training, or their attributes (not the values of
            parameters and buffers). Without such a hook the dense block's backend need not be selected for each batch.
    """

    changes_network = True

    def on_start(self, trainer: Training) -> None:
        """Before the first step of this process; ``trainer.run.done_steps`` is 0 in a run that is new."""

    def on_step_start(self, trainer: Training) -> None:
        """Before an optimiser step."""

    def on_batch(self, trainer: Training, batch: Batch) -> None:
        """After the backward pass of a microbatch, number ``trainer.microbatch`` of its step."""

    def on_step(self, trainer: Training, result: StepResult) -> None:
        """After an optimiser step; the run's progress names the next one."""

    def on_evaluation_batch(self, trainer: Training) -> None:
        """Before each batch of a validation, and once before an epoch."""

    def on_epoch(self, trainer: Training, result: EpochResult) -> None:
        """After an epoch's validation; the run's progress names the next epoch."""

    def on_end(self, trainer: Training) -> None:
        """When this process leaves the training, also after a failure."""
