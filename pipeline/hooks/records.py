"""What a run records and says while it trains: what it is, scalars, log lines and a progress bar."""

import time
from functools import partial

from pipeline.config_file import to_yaml
from pipeline.data.splits import with_sets_found
from pipeline.hooks.hook import EpochResult, Hook, StepResult, Training
from pipeline.hooks.pictures import pictures_due
from pipeline.monitor import peak_memory
from pipeline.optim import rates_of_parts
from pipeline.pace import Pace
from pipeline.report import about, changed_rate, hyperparameters, start_text
from pipeline.run import Run
from pipeline.words import counted

MUCH_WAITING = 0.25  # share of time from which on the loader is called the limit


class Records(Hook):
    changes_network = False

    def __init__(self, run: Run):
        self._announced: object = None  # how the dense blocks computed when that was last said
        self._window_start: float | None = None  # when the steps since the last log line began
        self._window_images = self._window_steps = 0
        loader = run.train_loader
        validated = len(run.val_loader.index) * len(run.validated)
        images = len(loader.index), validated
        data = run.config.data

        def cost(epoch: int) -> float:
            return (data.of_epoch(epoch).crop_size / data.crop_size) ** 2

        self._pace = Pace(loader.steps_per_epoch, run.config.optim.epochs, images, partial(pictures_due, run), cost)
        self._epoch_end: float | None = None  # when the last step of the epoch before was done
        self._waits: list[float] = []  # shares of time that the last two windows waited for images
        self._hinted = False

    def on_start(self, trainer: Training) -> None:
        run, monitor = trainer.run, trainer.monitor
        if line := start_text(run):
            monitor.say(line)
        # At each start, with the step that comes next: a start that gets to no checkpoint is forgotten with it.
        monitor.text("about", about(run), run.done_steps + 1)
        monitor.text("config", f"```yaml\n{to_yaml(with_sets_found(run.config))}```", run.done_steps + 1)
        monitor.hyperparameters(hyperparameters(run.config))
        for line in run.history.lines():
            monitor.say(line)
        for line in changed_rate(run):
            monitor.say(line)
        monitor.say(run.description())

    def on_step_start(self, trainer: Training) -> None:
        run = trainer.run
        if self._window_start is None:
            if self._epoch_end is not None:  # this process has trained the last step of the epoch before
                self._pace.epoch_end(run.progress.epoch - 1, time.perf_counter() - self._epoch_end)
            self._begin_window(trainer)
        monitor, progress = trainer.monitor, run.progress
        monitor.show_progress(
            f"epoch {progress.epoch + 1}/{run.config.optim.epochs}", run.train_loader.steps_per_epoch, progress.step
        )

    def on_step(self, trainer: Training, result: StepResult) -> None:
        self._announce_dense_block(trainer)
        self._window_images += result.images
        self._window_steps += 1
        trainer.monitor.advance()
        if result.skipped:
            step = trainer.run.done_steps
            trainer.monitor.say(f"step {step} of the run: the loss or the gradient is not finite; the step is left out")
        if result.logged:  # the only steps that wait for the device
            self._log(trainer, result)
            self._begin_window(trainer)
        if result.last:  # what follows is validation
            self._window_start, self._epoch_end = None, time.perf_counter()
            trainer.monitor.hide_progress()

    def on_epoch(self, trainer: Training, result: EpochResult) -> None:
        run, train, val = trainer.run, result.train, result.val
        values = {
            **{f"epoch/train_{name}": value for name, value in train.records().items()},
            "epoch/skipped_images": len(run.train_loader.index) - train.images,
            **{f"val/{name}": value for name, value in val.records().items()},
        }
        others = [(weights, score) for weights, score in result.scores.items() if score is not val]
        judged = f" of the {next(iter(result.scores))} weights:" if others else ""
        for weights, score in others:
            values |= {f"val_{weights}/{name}": value for name, value in score.records().items()}
        trainer.monitor.scalars(run.done_steps, run.epochs_done, values)
        if run.is_complete:
            trainer.monitor.completed()
        trainer.monitor.say(
            f"epoch {result.epoch + 1}/{run.config.optim.epochs}: train loss {train.loss:.4f}, {train.text()} | "
            f"validation{judged} loss {val.loss:.4f}, {val.text(top5=True)} ({val.images} images)"
            f"{', the best so far' if result.best else ''}"
            + "".join(f" | {weights} weights: loss {s.loss:.4f}, {s.text(top5=True)}" for weights, s in others)
        )

    def on_end(self, trainer: Training) -> None:
        trainer.monitor.hide_progress()

    def _begin_window(self, trainer: Training) -> None:
        self._window_start, self._window_images, self._window_steps = time.perf_counter(), 0, 0
        trainer.seconds["data"] = 0.0

    def _announce_dense_block(self, trainer: Training) -> None:
        """Say which implementation of the dense block is at work, and again if that changes."""
        selection = getattr(trainer.run.network, "selection", None)  # timm's networks have none
        if selection != self._announced:
            trainer.monitor.say(f"dense blocks: {selection}")
            self._announced = selection
            wanted = trainer.run.config.model.activation_checkpointing
            if selection and selection.method == "eager" and wanted != "none":
                trainer.monitor.say(
                    f"model.activation_checkpointing {wanted} does nothing: the modules keep what they compute"
                )

    def _log(self, trainer: Training, result: StepResult) -> None:
        run = trainer.run
        seconds = time.perf_counter() - (self._window_start or 0.0)
        run.finite.check(run.done_steps - 1)
        if result.gradient_norm is not None and not result.skipped:
            run.finite.check_gradient(run.done_steps - 1, result.gradient_norm, result.loss_scale)
        score = run.window_metrics.score()
        run.window_metrics.reset()
        if score is None:  # all steps since the last line were left out
            return
        waiting = trainer.seconds["data"] / seconds
        self._pace.steps(run.progress.epoch, self._window_steps, seconds)
        speed, device = self._window_images / seconds, "GPU" if run.world.device.type == "cuda" else "rank"
        each = f" ({speed / run.world.size:.1f} a {device})" if run.world.size > 1 else ""
        values = {
            **{f"train/{name}": value for name, value in score.records().items()},
            "train/learning_rate": result.learning_rate,
            "train/gradient_norm": result.gradient_norm or 0.0,
            "speed/images_per_second": speed,
            "speed/remaining_seconds": self._pace.remaining(run.done_steps)[1],
            "speed/data_wait_fraction": waiting,
            "speed/checkpoint_seconds": trainer.seconds["checkpoint"],
            "memory/peak_gib": peak_memory(run.world.device) / 2**30,
        }
        trainer.seconds["checkpoint"] = 0.0
        trainer.monitor.scalars(run.done_steps, run.epochs_done, values)
        own_rates = rates_of_parts(run.optimizer, run.config.optim, result.learning_rate)
        parts = f" ({', '.join(f'{part} {rate:.4g}' for part, rate in own_rates.items())})" if own_rates else ""
        few = f" ({counted(score.images, 'image')})" if score.images < run.config.optim.batch_size else ""
        trainer.monitor.say(
            f"{run.position}: loss {score.loss:.4f}, {score.text()}{few}, lr {result.learning_rate:.4g}{parts}, "
            f"{speed:.1f} images/s{each}, {100 * waiting:.0f} % waiting for data, "
            f"{self._pace.text(run.done_steps)}"
        )
        self._hint(trainer, waiting)

    def _hint(self, trainer: Training, waiting: float) -> None:
        """Say once that the loader is the limit, if it was so in two windows in a row, none of them an epoch's first."""
        begins_epoch = trainer.run.progress.step == self._window_steps  # when the loader is filled
        self._waits = [] if begins_epoch else [*self._waits[-1:], waiting]
        if self._hinted or len(self._waits) < 2 or min(self._waits) < MUCH_WAITING:
            return
        self._hinted = True
        threads = trainer.run.config.data.threads or trainer.run.world.cores
        trainer.monitor.say(
            f"hint: {100 * waiting:.0f} % of the time goes into waiting for images, so that the loader is the limit: give each "
            f"rank more cores (this one loads with {counted(threads, 'thread')}; data.threads, --cpus-per-task on SLURM), or "
            "put the images on a faster disk or into shards (python -m tools.pack); python -m tools.lab.loader measures it"
        )
