"""The training loop: from the first step, or from where the run directory's checkpoint stands, to the last.

run.py says what a run is and what is saved of it, objective.py what a step minimises, hooks/ what happens beside training.
The tests train on CPU with gloo, `python -m tools.gpu` on one GPU; NCCL between GPUs has not been run yet.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.checkpoint import FoundCheckpoint
from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.distributed import init_distributed
from pipeline.errors import StorageError, UserError
from pipeline.evaluation import evaluate
from pipeline.finite import StepSkipper, way_on_from_validation
from pipeline.hooks import EpochResult, Hook, Saving, StepResult, create_hooks
from pipeline.metrics import AnyScore, Score
from pipeline.monitor import Monitor
from pipeline.preemption import PreemptionHandler
from pipeline.report import (
    configuration_text,
    recipe_text,
    start_text,
    summary,
    warnings_of,
    write_audit,
    write_description,
)
from pipeline.run import Progress, Run
from pipeline.run_log import occupied
from pipeline.start import find_start
from pipeline.update import update
from pipeline.watchdog import Watchdog
from pipeline.words import counted


def fit(config: Config, hooks: Iterable[Hook] = ()) -> Progress:
    """Train to the end, resuming from the run directory if it holds a checkpoint.

    Works under plain python, torchrun and SLURM alike. From the first step on the signals of preemption.py end it between
    two steps with a checkpoint.

    Args:
        hooks: further hooks, called after those of every run and before the checkpoint is saved.

    Raises:
        UserError: something that the user can put right; see the message.
        InterruptedRunError: a signal, or the loss of another rank, ended the run before its time.
    """
    with init_distributed(config.train.device) as world, occupied(Path(config.run_dir), world):
        start = world.broadcast_from_rank0(lambda: find_start(config))
        run = Run(start.config, world, start)
        Trainer(run, [*create_hooks(run), *hooks, Saving(run)]).fit(start.checkpoint)
        if world.is_main:
            print(summary(run), flush=True)
            try:
                write_audit(run)  # with the steps that were left out since the start
            except (StorageError, UserError) as error:  # a run that is complete stays so
                print(f"warning: {error}", file=sys.stderr, flush=True)
        return run.progress


def dry_run(config: Config) -> str:
    """Build everything that `fit` would, write and train nothing, and return all that can be said of the run."""
    with init_distributed(config.train.device) as world:
        start = world.broadcast_from_rank0(lambda: find_start(config))
        run = Run(start.config, world, start, writes=False)
        create_hooks(run)
        if start.checkpoint:
            run.load_state_dict(start.checkpoint.state)
        next(run.train_loader.batches(epoch=0))
        warnings = [f"warning: {line}" for line in (warnings_of(run, start.checkpoint) if world.is_main else [])]
        past = [line for line in (start_text(run), *run.history.lines()) if line]
        return "\n".join([configuration_text(run), run.description(), *past, *warnings, recipe_text(run, in_full=True)])


class Trainer:
    """Trains a run on this rank; `hooks.hook.Training` says what hooks see of it."""

    monitor: Monitor

    def __init__(self, run: Run, hooks: list[Hook]):
        self.run, self.hooks = run, hooks
        self.preemption = PreemptionHandler()
        self.watchdog = Watchdog(run.world, run.config.train.heartbeat_timeout)
        self.skipper = (
            StepSkipper(run.network, run.world, run.config) if run.config.train.not_finite == "skip" else None
        )
        self.compiles, self.microbatch = run.compiles, 0
        self.seconds: dict[str, float] = defaultdict(float)

    def fit(self, found: FoundCheckpoint | None) -> None:
        """Train to the last epoch from a new run's first step, or from the checkpoint that was found."""
        run = self.run
        if found:
            run.load_state_dict(found.state)
        run.world.broadcast_from_rank0(lambda: write_description(run, found))
        lengths = found.state["record_lengths"] if found else {}
        self.monitor = Monitor(run.dir, run.world, run.done_steps, run.progress.epoch, lengths, self.preemption)
        try:
            changed = any(hook.changes_network for hook in self.hooks)
            with self.preemption, self.watchdog, run.selection_held(hooks_change_network=changed):
                self._call("on_start")
                while not run.is_complete:
                    self.train_epoch()
                    self.finish_epoch({name: self.validate(network) for name, network in run.validated.items()})
        finally:
            self._call("on_end")
            self.monitor.close()

    def train_epoch(self) -> None:
        """Train from the present step to the end of the epoch."""
        run, steps = self.run, self.run.train_loader.steps_per_epoch
        if run.progress.step == steps:  # the run was interrupted while it validated
            return
        self._between_batches()
        run.set_training_mode()
        run.capture()
        batches = self._timed(run.train_loader.batches(run.progress.epoch, run.progress.step))
        while run.progress.step < steps:
            self.watchdog.beat(run.position, self.compiles)
            self._call("on_step_start")
            result = self.step(batches)
            run.progress.step, self.compiles = run.progress.step + 1, result.last and (self.compiles or run.recompiles)
            self._call("on_step", result)

    def step(self, batches: Iterator[Batch]) -> StepResult:
        """One optimiser step on the global batch."""
        run, config = self.run, self.run.config
        accumulation, images = config.optim.grad_accum_steps, run.train_loader.global_batch(run.progress.step)
        last = run.progress.step + 1 == run.train_loader.steps_per_epoch
        logged = last or (run.done_steps + 1) % config.train.log_every == 0
        # DDP averages gradients over ranks; together with this scale a step follows the mean loss of the global batch
        # even where its microbatches differ in size.
        scale = run.world.size / images
        if self.skipper:
            self.skipper.begin()
        outcomes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # a microbatch's logits, labels, losses, weights
        for self.microbatch in range(accumulation):
            batch = run.objective.prepare(next(batches))
            run.seed_dropout(self.microbatch)
            with run.without_reduction(self.microbatch + 1 < accumulation):
                with run.autocast():
                    outputs = run.training_network(batch.images.contiguous(memory_format=run.memory_format))
                losses = run.objective.losses(outputs, batch)
                run.scaler.scale((losses * batch.weights).sum() * scale).backward()
            outcomes.append((run.objective.logits(outputs).detach(), batch.labels, losses.detach(), batch.weights))
            self._call("on_batch", batch)
        if config.data.corrupt_images == "skip":
            run.weigh_gradients(images, torch.cat([weights for _, _, _, weights in outcomes]).sum())
        norm, skipped = None, False
        if self.skipper:
            norm = run.gradient_norm()
            skipped = self.skipper.skips([o[2] for o in outcomes], norm, run.scaler.get_scale())
        if not skipped:
            run.count(outcomes)
        loss_scale = run.scaler.get_scale() if logged else 1.0  # before the update, which may change it
        rate, logged_norm = update(run, logged, norm, skipped)
        return StepResult(images, rate, logged_norm, loss_scale, logged, last, skipped)

    def validate(self, network: nn.Module) -> AnyScore:
        """Single-crop score on the validation set, with rank 0's batch-norm statistics."""
        run = self.run
        run.world.broadcast_buffers(network)
        with run.autocast():
            evaluation = evaluate(
                network, run.val_loader, run.world, between_batches=self._between_batches,
                logits_of=run.objective.logits, memory_format=run.memory_format,
            )  # fmt: skip
        if evaluation.not_finite and not self.skipper:
            raise UserError(
                f"the answers to {counted(evaluation.not_finite, 'validation image')} are not finite: "
                f"{way_on_from_validation(run.config)}"
            )
        return evaluation.score

    def finish_epoch(self, scores: dict[str, AnyScore]) -> None:
        """Note the epoch's errors, by the weights' name as `Run.validated` has them, and go on to the next."""
        run, progress = self.run, self.run.progress
        train = run.epoch_metrics.score() or Score(0, 0, 0, 0.0)
        run.epoch_metrics.reset()
        epoch, best = progress.epoch, progress.finish_epoch(scores)
        self._call("on_epoch", EpochResult(epoch, train, scores, best))

    def _between_batches(self) -> None:
        """Before each batch of an evaluation, and before the first step of an epoch."""
        self.watchdog.beat(self.run.position)
        self._call("on_evaluation_batch")

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, adding up how long they were waited for."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds["data"] += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _call(self, method: str, *arguments: object) -> None:
        for hook in self.hooks:
            getattr(hook, method)(self, *arguments)
