"""Hooks by which tests interrupt a training."""

import os
import signal

from pipeline.hooks import Hook


class InterruptionError(Exception):
    pass


class InterruptAfter(Hook):
    """Fails before optimiser step number `steps` of this process."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_start(self, trainer):
        if self.steps == 0:
            raise InterruptionError
        self.steps -= 1


class SignalInStep(Hook):
    """Sends this process a signal within optimiser step `step` of the run."""

    def __init__(self, step: int, number: signal.Signals):
        self.step, self.number = step, number

    def on_step_start(self, trainer):
        if trainer.run.done_steps == self.step:
            os.kill(os.getpid(), self.number)


class Spike(Hook):
    """Makes the images of one step infinite.

    Args:
        step: its number in the run, from 0.
        rank: whose images; None: those of all.
    """

    def __init__(self, step: int, rank: int | None = None):
        self.step, self.rank = step, rank

    def on_start(self, trainer):
        prepare = trainer.run.objective.prepare

        def spiked(batch):
            if trainer.run.done_steps == self.step and self.rank in (None, trainer.run.world.rank):
                batch.images.fill_(float("inf"))
            return prepare(batch)

        trainer.run.objective.prepare = spiked
