"""When a run saves a checkpoint, and leaves after one: by steps, by the clock, at each epoch's end, and on a signal."""

import dataclasses
import json
import signal
import time

from pipeline.checkpoint import CheckpointFolder
from pipeline.distributed import Agreement
from pipeline.errors import InterruptedRunError
from pipeline.followers import FOLLOWERS
from pipeline.hooks.hook import EpochResult, Hook, StepResult, Training
from pipeline.parsing import flatten
from pipeline.preemption import grace_period
from pipeline.run import Run
from pipeline.run_dir import STATUS, checkpoint_checksum, has_checkpoint, io_as_user_error, read_progress, replace_text


class Saving(Hook):
    """Ranks agree on every decision, so that all save and leave at the same step.

    With several ranks a signal, or the clock, counts a step later: the ranks agree while the step computes.
    """

    changes_network = False

    def __init__(self, run: Run):
        self._agreement = Agreement(run.world)
        self._folder = CheckpointFolder(run.dir / "checkpoints")
        self._saved_at = time.monotonic()
        self._limit_said = False

    def on_start(self, trainer: Training) -> None:
        """Of a run that resumes, say how far it is, if what stands there is of another checkpoint (see `read_progress`)."""
        run = trainer.run

        def write() -> None:
            if has_checkpoint(run.dir) and "checkpoint" not in read_progress(run.dir):
                self._write_status(run)

        run.world.broadcast_from_rank0(write)

    def on_step(self, trainer: Training, result: StepResult) -> None:
        run, train = trainer.run, trainer.run.config.train
        by_steps = result.last or (train.checkpoint_every and run.progress.step % train.checkpoint_every == 0)
        minutes = train.checkpoint_minutes
        by_time = run.world.is_main and minutes and time.monotonic() - self._saved_at >= 60 * minutes
        if by_time:
            self._saved_at = time.monotonic()  # now, or it would be asked for again before the ranks have agreed
        due, asked = self._agreement.exchange([bool(by_time), trainer.preemption.signal])
        if by_steps or due or asked:
            self.save(trainer, best=False)
        if asked:
            self._leave(run, asked)

    def on_evaluation_batch(self, trainer: Training) -> None:
        """There is nothing new to save."""
        _, asked = self._agreement.exchange([False, trainer.preemption.signal])
        if asked:
            self._leave(trainer.run, asked)

    def on_epoch(self, trainer: Training, result: EpochResult) -> None:
        self.save(trainer, result.best)

    def save(self, trainer: Training, best: bool) -> None:
        """Write a checkpoint. Every rank must call this; all return when the disk has it."""
        run, start = trainer.run, time.monotonic()
        trainer.watchdog.beat(f"saving a checkpoint at {run.position}")
        run.finite.check(run.done_steps - 1, *run.network.state_dict().values())
        state = run.state_dict()

        def write() -> None:
            self._folder.save(state | {"record_lengths": trainer.monitor.sync()}, best)
            self._write_status(run)

        run.world.broadcast_from_rank0(write)
        self._saved_at = time.monotonic()
        seconds = self._saved_at - start
        trainer.seconds["checkpoint"] += seconds
        self._compare_with_limit(trainer, seconds)

    def _compare_with_limit(self, trainer: Training, seconds: float) -> None:
        """Say once if a save takes so long that a launcher may kill the run before it is done."""
        limit = grace_period()
        if limit and not self._limit_said and seconds > limit.seconds / 2:
            self._limit_said = True
            trainer.monitor.say(
                f"warning: a save takes {seconds:.0f} s, and a run that is asked to leave is killed after "
                f"{limit.seconds:.0f} s: {limit.remedy}"
            )

    def _write_status(self, run: Run) -> None:
        progress = run.progress
        with io_as_user_error(run.dir):
            checksum = checkpoint_checksum(run.dir)
        status = {
            "checkpoint": checksum,
            "epoch": progress.epoch,
            "epochs": run.config.optim.epochs,
            "step": progress.step,
            "done_steps": run.done_steps,
            "complete": run.is_complete,
            "validation_images": run.conditions.val_fingerprint,
            # config.yaml is of the last start, which may have saved nothing.
            "followers": {
                key: value for key, value in flatten(dataclasses.asdict(run.config)).items() if key in FOLLOWERS
            },
        }
        replace_text(run.dir / STATUS, json.dumps(status) + "\n")

    def _leave(self, run: Run, asked: int) -> None:
        raise InterruptedRunError(
            f"rank {run.world.rank} leaves at {run.position} of {run.dir} on {signal.Signals(asked).name}"
        )
