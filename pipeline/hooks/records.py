"""What a run records and says while it trains: scalars, log lines, a progress bar, and some images of the first batch."""

import time

import torch

from pipeline.config import to_yaml
from pipeline.data.loader import Batch
from pipeline.hooks.hook import EpochResult, Hook, StepResult, Training
from pipeline.monitor import peak_memory
from pipeline.run import Run

GRID_IMAGES = 16


class Records(Hook):
    changes_network = False

    def __init__(self, run: Run):
        self._announced: object = None  # how the dense blocks computed when that was last said
        self._window_start: float | None = None  # when the steps since the last log line began
        self._window_images = 0

    def on_start(self, trainer: Training) -> None:
        run, monitor = trainer.run, trainer.monitor
        if run.done_steps:
            monitor.say(f"resuming at epoch {run.progress.epoch}, step {run.progress.step} of {run.dir}")
        else:
            monitor.text("config", to_yaml(run.config))
        for line in run.history.lines():
            monitor.say(line)
        monitor.say(run.description())

    def on_step_start(self, trainer: Training) -> None:
        run = trainer.run
        if self._window_start is None:
            self._begin_window(trainer)
        monitor, progress = trainer.monitor, run.progress
        monitor.show_progress(f"epoch {progress.epoch}", run.train_loader.steps_per_epoch, progress.step)

    def on_batch(self, trainer: Training, batch: Batch) -> None:
        run = trainer.run
        if run.progress.step == 0 and trainer.microbatch == 0:
            data = run.config.data
            mean, std = (torch.tensor(v, device=run.world.device).view(-1, 1, 1) for v in (data.mean, data.std))
            images = (batch.images[:GRID_IMAGES] * std + mean).clamp(0, 1)
            trainer.monitor.images("train/images", images, run.done_steps)

    def on_step(self, trainer: Training, result: StepResult) -> None:
        self._announce_dense_block(trainer)
        self._window_images += result.images
        trainer.monitor.advance()
        if result.skipped:
            step = trainer.run.done_steps - 1
            trainer.monitor.say(f"step {step}: the loss or the gradient is not finite; the step is left out")
        if result.logged:  # the only steps that wait for the device
            self._log(trainer, result)
            self._begin_window(trainer)
        if result.last:  # what follows is validation
            self._window_start = None
            trainer.monitor.hide_progress()

    def on_epoch(self, trainer: Training, result: EpochResult) -> None:
        run, train, val = trainer.run, result.train, result.val
        values = {
            **{f"epoch/train_{name}": value for name, value in train.records().items()},
            "epoch/skipped_images": len(run.train_loader.index) - train.images,
            **{f"val/{name}": value for name, value in val.records().items()},
        }
        trainer.monitor.scalars(run.done_steps, result.epoch, values)
        trainer.monitor.say(
            f"epoch {result.epoch}: train loss {train.loss:.4f}, {train.text()} | validation loss "
            f"{val.loss:.4f}, {val.text(top5=True)} ({val.images} images){' *' if result.best else ''}"
        )

    def on_end(self, trainer: Training) -> None:
        trainer.monitor.hide_progress()

    def _begin_window(self, trainer: Training) -> None:
        self._window_start, self._window_images = time.perf_counter(), 0
        trainer.seconds["data"] = 0.0

    def _announce_dense_block(self, trainer: Training) -> None:
        """Say which implementation of the dense block is at work, and again if that changes."""
        selection = getattr(trainer.run.network, "selection", None)  # timm's networks have none
        if selection != self._announced:
            trainer.monitor.say(f"dense blocks: {selection}")
            self._announced = selection

    def _log(self, trainer: Training, result: StepResult) -> None:
        run = trainer.run
        seconds = time.perf_counter() - (self._window_start or 0.0)
        run.finite.check(run.done_steps - 1)
        score = run.window_metrics.score()
        run.window_metrics.reset()
        if score is None:  # all steps since the last line were left out
            return
        waiting = trainer.seconds["data"] / seconds
        values = {
            **{f"train/{name}": value for name, value in score.records().items()},
            "train/learning_rate": result.learning_rate,
            "train/gradient_norm": result.gradient_norm or 0.0,
            "speed/images_per_second": self._window_images / seconds,
            "speed/data_wait_fraction": waiting,
            "speed/checkpoint_seconds": trainer.seconds["checkpoint"],
            "memory/peak_gib": peak_memory(run.world.device) / 2**30,
        }
        trainer.seconds["checkpoint"] = 0.0
        trainer.monitor.scalars(run.done_steps, run.progress.epoch, values)
        trainer.monitor.say(
            f"epoch {run.progress.epoch} step {run.progress.step}/{run.train_loader.steps_per_epoch}: "
            f"loss {score.loss:.4f}, {score.text()}, lr {result.learning_rate:.4g}, "
            f"{self._window_images / seconds:.1f} images/s, {100 * waiting:.0f} % waiting for data"
        )
