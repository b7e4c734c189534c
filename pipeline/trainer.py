"""The training loop: from the first step, or from where the run directory's checkpoint stands, to the last.

Mixed precision, NCCL and CUDA have not been run on a GPU yet; the tests train on CPU with gloo.
"""

import copy
import dataclasses
import hashlib
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.audit import audit, in_one_line, setting_for, to_markdown
from pipeline.checkpoint import CheckpointFolder, load_weights
from pipeline.config import Config, to_yaml
from pipeline.data.dataset import open_datasets
from pipeline.data.loader import Batch, EvaluationLoader, Shard, TrainingLoader, choose_loader
from pipeline.distributed import AUTOCAST_TYPES, World, average_in_rank_order, init_distributed, set_precision
from pipeline.errors import InterruptedRunError, UserError
from pipeline.evaluate import evaluate
from pipeline.feature_reuse import draw_reuse, feature_reuse
from pipeline.metrics import MetricAccumulator, Score
from pipeline.models import create_model
from pipeline.models.densenet import DenseNet
from pipeline.models.selection import Selection
from pipeline.monitor import Monitor, peak_memory
from pipeline.optim import create_optimizer, learning_rate
from pipeline.preemption import PreemptionHandler
from pipeline.resume import Conditions, batch_split, check_same_run
from pipeline.run_dir import locked, make_run_dir, write_text
from pipeline.watchdog import Watchdog

GRID_IMAGES = 16

NEVER = 2**62  # a step that no run reaches


@dataclass
class Progress:
    """How far a run is. Steps and epochs count from 0 and name the next one to do."""

    epoch: int = 0
    step: int = 0
    best_top1_error: float = math.inf
    best_top5_error: float = math.inf
    best_epoch: int = -1
    last_top1_error: float = math.inf
    last_top5_error: float = math.inf


def fit(config: Config) -> Progress:
    """Train to the end, resuming from the run directory if it holds a checkpoint.

    Neither knows nor asks who started it: plain python, torchrun or a scheduler.

    From the first step on SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end it between two steps with a checkpoint; before that
    there is nothing to save, and they end the process as they usually do.

    Raises:
        UserError: something that the user can put right; see the message.
        InterruptedRunError: a signal, or the loss of another rank, ended the run before its time.
    """
    with init_distributed(config.train.device) as world:
        return _fit(config, world)


def _fit(config: Config, world: World) -> Progress:
    with ExitStack() as stack:
        world.broadcast_from_rank0(lambda: stack.enter_context(locked(Path(config.run_dir))))
        trainer = Trainer(config, world)
        trainer.resume()
        stack.enter_context(trainer.recording())
        while trainer.progress.epoch < config.optim.epochs:
            trainer.train_epoch()
            score = trainer.validate()
            trainer.finish_epoch(score)
    if world.is_main:
        print(trainer.summary(), flush=True)
    return trainer.progress


def dry_run(config: Config) -> str:
    """Build everything that `fit` would, train nothing, and return a description of the run."""
    with init_distributed(config.train.device) as world:
        world.broadcast_from_rank0(lambda: make_run_dir(Path(config.run_dir)))
        trainer = Trainer(config, world)
        trainer.resume()
        next(trainer.train_loader.batches(epoch=0))
        return f"{to_yaml(config)}\n{trainer.description()}"


class Trainer:
    """One run on this rank: data, network, optimiser, and how far it is."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.run_dir = Path(config.run_dir)
        self.microbatches = world.size * config.optim.grad_accum_steps
        if config.optim.batch_size % self.microbatches:
            raise UserError(
                f"optim.batch_size {config.optim.batch_size} cannot be split evenly over {world.size} ranks x "
                f"{config.optim.grad_accum_steps} accumulation steps: choose a multiple of {self.microbatches}"
            )
        self.findings = audit(config, self.microbatches)
        set_precision(config.train.precision)
        train_index, val_index = world.broadcast_from_rank0(
            lambda: open_datasets(config.data, self.run_dir / "index", progress=True)
        )
        self.conditions = Conditions(
            classes=list(train_index.classes),
            fingerprint=hashlib.sha256((train_index.fingerprint + val_index.fingerprint).encode()).hexdigest(),
            images=[len(train_index), len(val_index)],
            loader=choose_loader(config.data),
            ranks=world.size,
        )
        shard = Shard(world.rank, world.size, world.device, world.cores)
        self.train_loader = TrainingLoader(
            train_index,
            config.data,
            shard,
            seed=config.seed,
            batch_size=config.optim.batch_size,
            accumulation=config.optim.grad_accum_steps,
        )
        self.val_loader = EvaluationLoader(
            val_index, config.data, shard, batch_size=config.train.eval_batch_size, crops=1
        )

        torch.manual_seed(config.seed)
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        network = create_model(num_classes=len(self.conditions.classes), **dataclasses.asdict(config.model))
        self._check_image_size(network)
        self.network = network.to(world.device, memory_format=self.memory_format)
        self.training_network = self._wrap(self.network)
        self.optimizer = create_optimizer(self.network, config.optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16")

        self.announced: Selection | None = None
        self.progress = Progress()
        self.epoch_totals, self.window_totals = MetricAccumulator(world.device), MetricAccumulator(world.device)
        self.first_not_finite = torch.full((), NEVER, device=world.device)
        self.checkpoints = CheckpointFolder(self.run_dir / "checkpoints")
        self.record_lengths: dict[str, int] = {}
        self.batch_split = self.batch_split_before = batch_split(world.size, config.optim.grad_accum_steps)
        self.saved_at, self.saving_seconds = time.monotonic(), 0.0
        self.preemption, self.watchdog = PreemptionHandler(), Watchdog(world, config.train.heartbeat_timeout)

    @property
    def done_steps(self) -> int:
        """Optimiser steps since the beginning of the run."""
        return self.progress.epoch * self.train_loader.steps_per_epoch + self.progress.step

    def resume(self) -> None:
        """Take up the run where its newest checkpoint left it."""
        state = self.world.broadcast_from_rank0(self.checkpoints.load_newest)
        if state:
            check_same_run(state, self.config, self.conditions)
            load_weights(self.network, state["model"], str(self.checkpoints.last))
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
            self.record_lengths = state["record_lengths"]
            self.epoch_totals.restore(state["epoch_totals"], self.world)
            self.window_totals.restore(state["window_totals"], self.world)
            self.batch_split_before = batch_split(
                state["conditions"]["ranks"], state["config"]["optim"]["grad_accum_steps"]
            )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the run's records, listen to signals and watch the ranks while this is entered."""
        self.world.broadcast_from_rank0(self._write_description)
        self.monitor = Monitor(self.run_dir, self.world, self.done_steps, self.record_lengths)
        try:
            self._announce_start()
            with self.preemption, self.watchdog:
                yield
        finally:
            self.monitor.close()

    def train_epoch(self) -> None:
        """Train from the present step to the end of the epoch."""
        epoch, steps = self.progress.epoch, self.train_loader.steps_per_epoch
        if self.progress.step == steps:  # the run was interrupted while it validated
            return
        self._leave_if_asked()
        batches = Stopwatch(self.train_loader.batches(epoch, self.progress.step))
        window_start, window_images = time.perf_counter(), 0
        self.training_network.train()
        with self.monitor.progress(f"epoch {epoch}", steps, self.progress.step):
            for step in range(self.progress.step, steps):
                last = step + 1 == steps
                logs = last or (self.done_steps + 1) % self.config.train.log_every == 0

                self.watchdog.beat(f"epoch {epoch}, step {step}")
                rate = learning_rate(self.config.optim, self.done_steps, steps)
                gradient_norm = self._optimizer_step(batches, rate, measure_gradient=logs)
                self._announce_dense_block()
                self.progress.step += 1
                window_images += self.train_loader.global_batch(step)
                self.monitor.advance()

                if logs:  # the only steps that wait for the device
                    seconds = time.perf_counter() - window_start
                    timing = {
                        "images_per_second": window_images / seconds,
                        "data_wait_fraction": batches.take_seconds() / seconds,
                        "checkpoint_seconds": self.saving_seconds,
                    }
                    self._log_window(rate, gradient_norm, timing)
                    window_start, window_images = time.perf_counter(), 0
                    self.saving_seconds = 0.0
                self._save_or_leave(last)

    def validate(self) -> Score:
        """Single-crop score on the validation set, with rank 0's batch-norm statistics."""
        self.world.broadcast_buffers(self.network)
        return evaluate(self.network, self.val_loader, self.world, between_batches=self._leave_if_asked).score

    def finish_epoch(self, score: Score) -> None:
        """Record the epoch's errors and write its checkpoint."""
        progress = self.progress
        train_score = self.epoch_totals.score(self.world)
        self.epoch_totals = MetricAccumulator(self.world.device)
        values = {
            "epoch/train_loss": train_score.loss,
            "epoch/train_top1_error": train_score.top1_error,
            "epoch/train_top5_error": train_score.top5_error,
            "epoch/skipped_images": len(self.train_loader.index) - train_score.images,
            "val/loss": score.loss,
            "val/top1_error": score.top1_error,
            "val/top5_error": score.top5_error,
        }
        best = score.top1_error < progress.best_top1_error
        if best:
            progress.best_top1_error, progress.best_top5_error = score.top1_error, score.top5_error
            progress.best_epoch = progress.epoch
        progress.last_top1_error, progress.last_top5_error = score.top1_error, score.top5_error
        self.monitor.scalars(self.done_steps, progress.epoch, values)
        self.monitor.say(
            f"epoch {progress.epoch}: train loss {train_score.loss:.4f}, top-1 error {train_score.top1_error:.2f} % | "
            f"validation loss {score.loss:.4f}, top-1 error {score.top1_error:.2f} %, top-5 error {score.top5_error:.2f} % "
            f"({score.images} images){' *' if best else ''}"
        )
        progress.epoch, progress.step = progress.epoch + 1, 0
        self._show_reuse()
        self.save(best)

    def save(self, best: bool) -> None:
        """Write a checkpoint. Every rank must call this; all return when the disk has it."""
        start = time.monotonic()
        self.watchdog.beat(f"saving a checkpoint at epoch {self.progress.epoch}, step {self.progress.step}")
        self._check_finite(*self.network.state_dict().values())
        state = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "config": dataclasses.asdict(self.config),
            "classes": self.conditions.classes,
            "conditions": dataclasses.asdict(self.conditions),
            "epoch_totals": self.epoch_totals.by_rank(self.world),
            "window_totals": self.window_totals.by_rank(self.world),
        }
        self.world.broadcast_from_rank0(
            lambda: self.checkpoints.save(state | {"record_lengths": self.monitor.sync()}, best)
        )
        self.saved_at = time.monotonic()
        self.saving_seconds += self.saved_at - start

    def description(self) -> str:
        """A few lines on what this run is."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        optim, ranks = self.config.optim, self.world.size
        return (
            f"{self.config.model.name}: {parameters:,} parameters, {len(self.conditions.classes)} classes, "
            f"{self.config.train.precision} on {self.world.device.type}\n"
            f"{len(self.train_loader.index):,} training and {len(self.val_loader.index):,} validation images "
            f"through the {_named_loader(self.config)} loader\n"
            f"batch {optim.batch_size} = {ranks} ranks x {optim.grad_accum_steps} accumulation steps x "
            f"{optim.batch_size // self.microbatches} images (what a batch-norm statistic sees); "
            f"{self.train_loader.steps_per_epoch} steps an epoch, {optim.epochs} epochs"
        )

    def summary(self) -> str:
        """Best and last validation error, beside the published ones where the configuration has them."""
        progress, published = self.progress, self.config.published
        lines = [
            f"best  (epoch {progress.best_epoch}): top-1 error {progress.best_top1_error:.2f} %, "
            f"top-5 error {progress.best_top5_error:.2f} %",
            f"last  (epoch {progress.epoch - 1}): top-1 error {progress.last_top1_error:.2f} %, "
            f"top-5 error {progress.last_top5_error:.2f} %",
        ]
        if published.top1 is not None:
            top5 = "" if published.top5 is None else f", top-5 error {published.top5:.2f} %"
            note = " (test images; ours are held-out training images)" if self.config.data.holdout else ""
            lines.append(f"{published.source or 'published'}: top-1 error {published.top1:.2f} %{top5}{note}")
        lines.append(f"a batch-norm statistic saw {self.config.optim.batch_size // self.microbatches} images")
        lines.append(f"recipe: {in_one_line(self.findings)}")
        return "\n".join(lines)

    def _optimizer_step(self, batches: Iterator[Batch], rate: float, measure_gradient: bool) -> float | None:
        """One step on the global batch; return the gradient's norm if asked."""
        optim, world = self.config.optim, self.world
        global_batch = self.train_loader.global_batch(self.progress.step)
        for part in range(optim.grad_accum_steps):
            batch = next(batches)
            if self.progress.step == 0 and part == 0:
                self._show_images(batch)
            self._seed_dropout(world.rank * optim.grad_accum_steps + part)
            # DDP averages gradients over ranks; together with this scale a step follows the mean loss of the global
            # batch even where its parts differ in size.
            scale = world.size / global_batch
            with self._without_reduction(part + 1 < optim.grad_accum_steps):
                with self._autocast():
                    logits = self.training_network(batch.images.contiguous(memory_format=self.memory_format))
                losses = F.cross_entropy(
                    logits.float(), batch.labels, reduction="none", label_smoothing=optim.label_smoothing
                )
                self.scaler.scale((losses * batch.weights).sum() * scale).backward()
            finite = losses.detach().isfinite().logical_or(batch.weights == 0).all()
            self.first_not_finite.clamp_(max=torch.where(finite, NEVER, self.done_steps))
            for totals in (self.epoch_totals, self.window_totals):
                totals.add(logits.detach(), batch.labels, losses.detach(), batch.weights)

        norm = None
        if measure_gradient:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.get_total_norm(p.grad for p in self.network.parameters() if p.grad is not None).item()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def _log_window(self, rate: float, gradient_norm: float, timing: dict[str, float]) -> None:
        self._check_finite()
        score = self.window_totals.score(self.world)
        self.window_totals = MetricAccumulator(self.world.device)
        values = {
            "train/loss": score.loss,
            "train/top1_error": score.top1_error,
            "train/top5_error": score.top5_error,
            "train/learning_rate": rate,
            "train/gradient_norm": gradient_norm,
            "speed/images_per_second": timing["images_per_second"],
            "speed/data_wait_fraction": timing["data_wait_fraction"],
            "speed/checkpoint_seconds": timing["checkpoint_seconds"],
            "memory/peak_gib": peak_memory(self.world.device) / 2**30,
        }
        self.monitor.scalars(self.done_steps, self.progress.epoch, values)
        self.monitor.say(
            f"epoch {self.progress.epoch} step {self.progress.step}/{self.train_loader.steps_per_epoch}: "
            f"loss {score.loss:.4f}, top-1 error {score.top1_error:.2f} %, lr {rate:.4g}, "
            f"{timing['images_per_second']:.1f} images/s, {100 * timing['data_wait_fraction']:.0f} % waiting for data"
        )

    def _announce_dense_block(self) -> None:
        """Say which implementation of the dense block is at work, and again if that changes."""
        selection = getattr(self.network, "selection", None)  # timm's networks have none
        if selection != self.announced:
            self.monitor.say(f"dense blocks: {selection}")
            self.announced = selection

    def _save_or_leave(self, last: bool) -> None:
        """What all ranks agree on after a step: to save a checkpoint, to leave after that, or to go on."""
        every, minutes = self.config.train.checkpoint_every, self.config.train.checkpoint_minutes
        by_steps = last or (every and self.progress.step % every == 0)
        by_time = self.world.is_main and minutes and time.monotonic() - self.saved_at >= 60 * minutes
        due, asked = self.world.all_reduce_max([bool(by_steps or by_time), self.preemption.signal])
        if due or asked:
            self.save(best=False)
        if asked:
            self._leave(asked)

    def _leave_if_asked(self) -> None:
        """Between two batches of an evaluation, and before the first step: there is nothing new to save."""
        self.watchdog.beat(f"epoch {self.progress.epoch}, {self.progress.step} steps done")
        (asked,) = self.world.all_reduce_max([self.preemption.signal])
        if asked:
            self._leave(asked)

    def _leave(self, asked: int) -> None:
        raise InterruptedRunError(
            f"rank {self.world.rank} leaves at epoch {self.progress.epoch}, step {self.progress.step} of {self.run_dir} "
            f"on {signal.Signals(asked).name}"
        )

    def _check_finite(self, *weights: Tensor) -> None:
        """Stop all ranks if on any of them a loss was not finite, or one of these tensors is not."""
        finite = all(weight.isfinite().all() for weight in weights)
        earliest = min(self.first_not_finite.item(), NEVER if finite else self.done_steps - 1)
        first = -self.world.all_reduce_max([-earliest])[0]
        if first == NEVER:
            return
        file = self.run_dir / "not-finite.json"
        self.world.broadcast_from_rank0(lambda: write_text(file, json.dumps(self._batches_until(first), indent=1)))
        epoch, step = divmod(first, self.train_loader.steps_per_epoch)
        raise UserError(
            f"the loss is not finite at epoch {epoch}, step {step}: lower optim.lr, or use train.precision fp32; {file} "
            "names the images of its batch, and the checkpoints before it are kept"
        )

    def _batches_until(self, step: int) -> list[dict[str, Any]]:
        """The images of the step at which the loss was not finite and of the one whose update led there."""
        batches = []
        for before in range(max(0, step - 1), step + 1):
            epoch, place = divmod(before, self.train_loader.steps_per_epoch)
            ids = self.train_loader.global_ids(epoch, place).tolist()
            names = [self.train_loader.index.names[i] for i in ids]
            batches.append({"epoch": epoch, "step": place, "ids": ids, "names": names})
        return batches

    def _wrap(self, network: nn.Module) -> nn.Module:
        if self.config.train.compile:
            network = torch.compile(network)
        if self.world.size == 1:
            return network
        on_cpu = self.world.device.type == "cpu"
        parallel = DistributedDataParallel(
            network,
            device_ids=None if on_cpu else [self.world.device],
            forward_sync_buffers=False,  # rank 0's batch-norm statistics count, as the first GPU's do in the Torch code
            gradient_as_bucket_view=True,
        )
        if on_cpu:
            parallel.register_comm_hook(self.world.size, average_in_rank_order)
        return parallel

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST_TYPES.get(self.config.train.precision)
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None)

    def _without_reduction(self, skip: bool):
        return self.training_network.no_sync() if skip and self.world.size > 1 else nullcontext()

    def _seed_dropout(self, part: int) -> None:
        """Make dropout a function of seed, step and part of the batch, so that no generator's state need be saved."""
        seed = np.random.SeedSequence([self.config.seed, self.done_steps, part]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))

    def _show_images(self, batch: Batch) -> None:
        mean, std = (
            torch.tensor(v, device=self.world.device).view(3, 1, 1)
            for v in (self.config.data.mean, self.config.data.std)
        )
        images: Tensor = (batch.images[:GRID_IMAGES] * std + mean).clamp(0, 1)
        self.monitor.images("train/images", images, self.done_steps)

    def _show_reuse(self) -> None:
        """Picture the network's feature reuse every few epochs and at the end."""
        every, epoch = self.config.train.reuse_every, self.progress.epoch
        due = every and (epoch % every == 0 or epoch == self.config.optim.epochs)
        if due and self.world.is_main and isinstance(self.network, DenseNet):
            title = f"{self.config.model.name} after {epoch} epochs"
            self.monitor.figure("feature reuse", draw_reuse(feature_reuse(self.network), title), self.done_steps)

    def _check_image_size(self, network: nn.Module) -> None:
        """Refuse crops that the network cannot take, before the first epoch or at the end of it."""
        config, images = self.config, len(self.train_loader.index)
        last_batch = images % config.optim.batch_size or config.optim.batch_size
        smallest_part = min(
            2, max(1, last_batch // self.microbatches)
        )  # batch-norm wants more than one value a channel
        probe = copy.deepcopy(network).train()
        try:
            with torch.no_grad():
                probe(torch.zeros(smallest_part, 3, config.data.crop_size, config.data.crop_size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{config.model.name} cannot train on {smallest_part} images of {config.data.crop_size} pixels, the smallest "
                f"part of a batch ({str(error).splitlines()[0]}): choose another data.crop_size or optim.batch_size"
            ) from None

    def _write_description(self) -> None:
        """What the run is, into its directory."""
        self.checkpoints.remove_temporary()
        title = f"{self.config.model.name} beside the paper's {setting_for(self.config).name} setting"
        write_text(self.run_dir / "config.yaml", to_yaml(self.config))
        write_text(self.run_dir / "audit.md", to_markdown(self.findings, title))

    def _announce_start(self) -> None:
        if self.done_steps:
            self.monitor.say(f"resuming at epoch {self.progress.epoch}, step {self.progress.step} of {self.run_dir}")
        else:
            self.monitor.text("config", to_yaml(self.config))
        if self.batch_split != self.batch_split_before:
            self.monitor.say(f"a batch was {self.batch_split_before} until here and is {self.batch_split} from here on")
        self.monitor.say(self.description())


class Stopwatch:
    """An iterator that adds up how long its consumer waited."""

    def __init__(self, items: Iterator):
        self._items, self._seconds = items, 0.0

    def __iter__(self) -> "Stopwatch":
        return self

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self._seconds += time.perf_counter() - start

    def take_seconds(self) -> float:
        """Seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _named_loader(config: Config) -> str:
    name = choose_loader(config.data)
    fallback = name == "reference" and config.data.loader == "auto"
    return f"{name} (slow: DALI is not installed)" if fallback else name
