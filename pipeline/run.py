"""What a training run is on one rank: its data, network, objective, optimiser, how far it is, and what is saved of it.

`Run.parts` is a run's state: everything in it is saved with `state_dict` and resumed with `load_state_dict`.
"""

import copy
import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import autotune
from pipeline.autotune import Tuning
from pipeline.batches import Batches, microbatches_of, statistic_images
from pipeline.checkpoint import FoundCheckpoint, load_weights
from pipeline.compilation import BY_TORCH, compile_network, refuse_graphs_elsewhere
from pipeline.config import Config, OptimConfig
from pipeline.cuda_graphs import ReplayedNetwork
from pipeline.data.dataset import fingerprint_of, has_trained_on, images_text, open_datasets, seen_held_out
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader, choose_common_loader
from pipeline.data.plan import together
from pipeline.data.shared import share_on_machines
from pipeline.distributed import World, data_parallel
from pipeline.ema import ModelEma, decay_after
from pipeline.errors import UserError
from pipeline.evaluation import check_image_size, why_size_is_refused
from pipeline.finite import FiniteGuard
from pipeline.history import History, batch_split
from pipeline.joint_objective import for_all_exits
from pipeline.measured import (
    Measured,
    decayed_parameters,
    has_batch_norms,
    initial_spread,
    momentum_text,
    weight_decay_factors,
)
from pipeline.metrics import AnyScore, LabelScore, MetricAccumulator, batch_sums
from pipeline.models import backends, create_network
from pipeline.models.densenet import DenseNet
from pipeline.models.early_exits import exits_of
from pipeline.models.parts import freeze
from pipeline.models.zoo import refuse_what_is_ignored
from pipeline.objective import (
    CrossEntropy,
    Objective,
    class_weights_text,
    create_objective,
    read_class_weights,
)
from pipeline.optim import create_optimizer, learning_rate, load_state, state_of
from pipeline.parsing import value_text
from pipeline.precision import (
    AUTOCAST_TYPES,
    autocast,
    choose_kernels,
    create_scaler,
    memory_format,
    seed_device,
    set_tf32,
)
from pipeline.preprocessing import assumption
from pipeline.resume import Conditions, check_same_run, loader_of
from pipeline.start import InitialWeights, Start
from pipeline.words import counted


class Stateful(Protocol):
    """A part of a run's state."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values. Every rank calls this; rank 0's answer is saved."""

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Progress:
    """How far a run is. Steps and epochs count from 0 and name the next one to do. Errors are in percent."""

    epoch: int = 0
    step: int = 0
    best_top1_error: float = math.inf
    best_top5_error: float | None = math.inf  # None where it says nothing; see `metrics.top5_counts`
    best_epoch: int = -1
    best_weights: str | None = None  # that were judged then, see `Run.validated`; None in earlier versions' checkpoints
    last_top1_error: float = math.inf
    last_top5_error: float | None = math.inf
    skipped_steps: int = 0  # left out, as their loss or gradient was not finite
    best_auroc: float = -math.inf  # mean over the classes, from 0 to 1, where images have several labels
    best_average_precision: float = -math.inf
    last_auroc: float = -math.inf
    last_average_precision: float = -math.inf
    last_of_other_weights: list[str] = field(default_factory=list)  # errors, in words
    last_exit_errors: list[float] = field(default_factory=list)  # top-1, of each exit where there are several

    def finish_epoch(self, scores: Mapping[str, AnyScore]) -> bool:
        """Note an epoch's validation errors and go on to the next; return whether it is better than all before.

        Where images have several labels, the better epoch is that with the greater mean AUROC; as long as that is not
        defined (NaN), the later one.

        Args:
            scores: by the names of the weights; the first one judges.
        """
        (weights, val), *others = scores.items()
        self.last_of_other_weights = [score.text(top5=True) for _, score in others]
        if isinstance(val, LabelScore):
            assert val.mean is not None
            better = self.best_epoch < 0 or math.isnan(self.best_auroc) or val.mean.auroc > self.best_auroc
            if better:
                self.best_auroc, self.best_average_precision = val.mean.auroc, val.mean.average_precision
                self.best_epoch, self.best_weights = self.epoch, weights
            self.last_auroc, self.last_average_precision = val.mean.auroc, val.mean.average_precision
            self.epoch, self.step = self.epoch + 1, 0
            return better
        best = val.top1_error < self.best_top1_error
        if best:
            self.best_top1_error, self.best_top5_error = val.top1_error, val.top5_error
            self.best_epoch, self.best_weights = self.epoch, weights
        self.last_top1_error, self.last_top5_error = val.top1_error, val.top5_error
        self.last_exit_errors = list(val.exit_errors)
        self.epoch, self.step = self.epoch + 1, 0
        return best

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Weights:
    """A network as a part of a run's state: its weights go through the checks of `load_weights`."""

    def __init__(self, network: nn.Module):
        self._network = network

    def state_dict(self) -> dict[str, Tensor]:
        return self._network.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_weights(self._network, state, "the checkpoint")


class OptimizerState:
    """An optimiser as a part of a run's state; see `optim.load_state`."""

    def __init__(self, optimizer: torch.optim.Optimizer, network: nn.Module):
        self._optimizer, self._network = optimizer, network

    def state_dict(self) -> dict[str, Any]:
        return state_of(self._optimizer, self._network)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(self._optimizer, self._network, state)


class Run:
    """One run on this rank.

    Attributes:
        dir: the run's directory.
        microbatches: into how many parts a global batch is cut: ranks times gradient accumulation steps.
        network: the bare network, which is saved and evaluated.
        compiled: the same, as its training passes are started (compilation.py).
        compiles: torch.compile compiles it in a step to come.
        training_network: the same, averaging gradients over the ranks.
        ema: the moving average of its weights, None without ``train.ema_decay``.
        doubts: what its user should know of its initial weights, a line each.
        parts: the run's state, by the names that checkpoints have. Hooks with a state add theirs.
    """

    def __init__(self, config: Config, world: World, start: Start | None = None, writes: bool = True):
        """Build everything that a run is made of.

        Args:
            start: its initial weights; or the checkpoint from which it is to resume, whose loader ``data.loader: auto`` then
                stands for. None for a new run with drawn weights.
            writes: what is found about the images is kept, in files.
        """
        self.config, self.world, self.dir = config, world, Path(config.run_dir)
        self._begun: list[str] = []
        self.doubts: list[str] = []
        self.microbatches = microbatches_of(config, world.size, batch_split(world.size, config.optim.grad_accum_steps))
        loader, self._passed_over = self._choose_loader(loader_of(start.checkpoint) if start else None)
        train, val = self._open_images(self.dir / "index" if writes else None)
        class_weights = world.broadcast_from_rank0(lambda: read_class_weights(config.optim.class_weights, train))
        objective = create_objective(config, None if class_weights is None else class_weights.to(world.device))
        self.conditions = Conditions(
            classes=list(train.classes),
            fingerprint=fingerprint_of(train, val),
            images=[len(train), len(val)],
            loader=loader,
            ranks=world.size,
            class_weights=None if class_weights is None else class_weights.tolist(),
            val_fingerprint=val.fingerprint,
        )
        self._image_dtype = self._choose_image_dtype(objective)
        self._create_loaders(train, val, loader)
        set_tf32(config.train.precision)
        choose_kernels(config.train.cudnn_benchmark, config.train.deterministic)
        torch.manual_seed(config.seed)
        backends.refuse_elsewhere(config.model.dense_block, world.device)
        refuse_what_is_ignored(config.model)
        network = create_network(config.model, len(self.conditions.classes), config.data.channels)
        refuse_graphs_elsewhere(config.train.compile, exits_of(network), world.device)
        self._check_image_size(network)
        self.objective = for_all_exits(objective, network)
        self._frozen = [] if config.model.freeze is None else freeze(network, config.model.freeze, config.model.name)
        whole_batch = config.optim.batch_size // self.microbatches
        self._tuning_left: tuple[Tuning, str] | None = None  # a checkpoint's that is not taken, and why
        self.tuning = self._tune(network, whole_batch, start.checkpoint if start else None)
        how = autotune.as_chosen(self.tuning.chosen, config) if self.tuning else autotune.as_configured(config)
        if isinstance(network, DenseNet):
            network.dense_block = how.dense_block
        self.memory_format = memory_format(how.memory_format, config.train.precision, world.device)
        self.network: nn.Module = network.to(device=world.device).to(memory_format=self.memory_format)
        self.compiled = compile_network(network, how.compile, whole_batch, config.optim.grad_accum_steps)
        self.compiles = how.compile in BY_TORCH
        self.training_network = data_parallel(self.compiled, world)
        self.optimizer = create_optimizer(self.network, config.optim, config.model.name)
        self.scaler = create_scaler(config.train.precision, world.device)
        self.progress, self.history = Progress(), History(config, world.size)
        self.optim_before: OptimConfig | None = None  # of the run that the checkpoint is of
        metrics = self.conditions.classes, self.train_loader.index.several_labels, exits_of(network)
        self.epoch_metrics, self.window_metrics = (MetricAccumulator(world, *metrics) for _ in range(2))
        self._spread = initial_spread(self.network)
        self.finite = FiniteGuard(world, self.train_loader, config)
        self.parts: dict[str, Stateful] = {
            "model": Weights(self.network),
            "optimizer": OptimizerState(self.optimizer, self.network),
            "scaler": self.scaler,
            "progress": self.progress,
            "epoch_metrics": self.epoch_metrics,
            "window_metrics": self.window_metrics,
            "history": self.history,
        }
        if start and start.weights:
            self._begin_with(start.weights)
        self.ema = ModelEma(self.network, config.train.ema_decay) if config.train.ema_decay else None
        if self.ema:
            self.parts["ema"] = self.ema

    def _tune(self, network: nn.Module, images: int, found: FoundCheckpoint | None) -> Tuning | None:
        """The implementation that was measured to be the fastest, or that a checkpoint's run has kept; None to do as asked."""
        config, device = self.config, self.world.device
        kept = Tuning.of_checkpoint(found.state) if found else None
        others = autotune.asked_otherwise(kept, autotune.what_is_asked(config, device, images)) if kept else []
        free = autotune.leaves_a_choice(config, device, network)
        if kept and (others or not free):
            # What has changed since on purpose is taken as it is asked for: another choice would have other bits.
            self._tuning_left = kept, f"it was for {', '.join(others)}" if others else "nothing is left to choose"
            return None
        if not free or (found and not kept):
            return None
        classes, cards = len(self.conditions.classes), self.world.gather(autotune.card_name(device))
        choose = partial(autotune.choose, config, classes, device, images, cards, kept)
        tuning = self.world.broadcast_from_rank0(choose)
        if kept and tuning.chosen != kept.chosen:
            # It is right on the cards that it was made on, where the run may come again.
            self._tuning_left = kept, "; ".join(tuning.text.splitlines())
            return None
        return tuning

    def _choose_loader(self, began_with: str | None) -> tuple[str, list[str]]:
        """As `choose_common_loader`; where it is left to choose, the loader that the run began with."""
        wanted, remedy = self.config.data, "or use auto"
        if began_with and wanted.loader == "auto":
            wanted = dataclasses.replace(wanted, loader=began_with)
            remedy = (
                f"{self.config.run_dir} began with it, and others differ in the last bits: resume where it can be used"
            )
        return choose_common_loader(wanted, self.world.device, self.world.gather, remedy)

    def _open_images(self, cache: Path | None) -> tuple[DatasetIndex, DatasetIndex]:
        data = self.config.data
        return share_on_machines(
            self.world, lambda: open_datasets(data, cache, progress=True, download=cache is not None)
        )

    def _create_loaders(self, train: DatasetIndex, val: DatasetIndex, loader: str) -> None:
        config, world = self.config, self.world
        data = dataclasses.replace(config.data, loader=loader)
        shard = Shard(world.rank, world.size, world.device, world.cores)
        self.train_loader = TrainingLoader(
            train,
            data,
            shard,
            seed=config.seed,
            batch_size=config.optim.batch_size,
            accumulation=config.optim.grad_accum_steps,
            dtype=self._image_dtype,
        )
        self.val_loader = EvaluationLoader(val, data, shard, batch_size=config.train.eval_batch_size, crops=1)

    def _choose_image_dtype(self, objective: Objective) -> torch.dtype:
        """bfloat16 where the first thing that becomes of an image is that autocast rounds it to that, else float32."""
        as_they_are = type(objective).prepare is CrossEntropy.prepare and not self.config.data.mixes
        halves = self.config.train.precision == "bf16" and self.world.device.type == "cpu"
        return torch.bfloat16 if halves and as_they_are else torch.float32

    @property
    def measured(self) -> Measured:
        """What an audit compares besides the configuration."""
        loader, batch = self.train_loader, min(self.config.optim.batch_size, len(self.train_loader.index))
        by_scaler = any(
            precision == "fp16" and not_finite == "stop"
            for precision, not_finite in self.history.values(self.config, "train.precision", "train.not_finite")
        )
        return Measured(
            images=(len(loader.index), len(self.val_loader.index)),
            classes=len(self.conditions.classes),
            statistics=tuple(
                (s.step / loader.steps_per_epoch, statistic_images(batch, s.microbatches, together(self.config.data)))
                for s in self.history.segments
            ),
            last_batch=loader.global_batch(loader.steps_per_epoch - 1),
            spread=self._spread[0],
            weights=self._spread[1],
            momentum=momentum_text(self.optimizer),
            weight_decay=weight_decay_factors(self.optimizer),
            decayed=decayed_parameters(self.optimizer),
            changed=self.history.changes(),
            skipped_steps=None if by_scaler else self.progress.skipped_steps,
            batch_norms=has_batch_norms(self.network),
            greatest_decay=self._greatest_decay(),
        )

    def _greatest_decay(self) -> float | None:
        decay = self.config.train.ema_decay
        left = self.config.optim.epochs * self.train_loader.steps_per_epoch - self.done_steps
        reached = decay_after((self.ema.updates if self.ema else 0) + left - 1, decay)
        return reached if reached < decay else None

    @property
    def batches(self) -> Batches:
        images, size = len(self.train_loader.index), self.config.optim.batch_size
        return Batches(images, size, self.microbatches, together(self.config.data))

    @property
    def done_steps(self) -> int:
        """Optimiser steps since the beginning of the run."""
        return self.progress.epoch * self.train_loader.steps_per_epoch + self.progress.step

    @property
    def epochs_done(self) -> float:
        """The same in epochs, of which the last may be a part."""
        return self.done_steps / self.train_loader.steps_per_epoch

    @property
    def position(self) -> str:
        """How far the run is, as people count: the first epoch is 1, and so many of its steps are done."""
        epochs, steps = self.config.optim.epochs, self.train_loader.steps_per_epoch
        if self.is_complete:
            return f"the end of epoch {self.progress.epoch}/{epochs}"
        return f"epoch {self.progress.epoch + 1}/{epochs}, step {self.progress.step}/{steps}"

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.config.optim, self.done_steps, self.train_loader.steps_per_epoch)

    @property
    def is_complete(self) -> bool:
        return self.progress.epoch >= self.config.optim.epochs

    @property
    def recompiles(self) -> bool:
        """Whether the next epoch begins with a step that is compiled, for another image size than this one's."""
        data, epoch = self.config.data, self.progress.epoch
        return self.compiles and data.of_epoch(epoch) != data.of_epoch(epoch + 1)

    def autocast(self) -> torch.autocast:
        return autocast(self.config.train.precision, self.world.device)

    def set_training_mode(self) -> None:
        """Put the network into training mode, but for what is frozen."""
        self.training_network.train()
        for module in self._frozen:
            module.eval()

    def capture(self) -> None:
        """Capture the epoch's training step as CUDA graphs, if it is replayed. No thread may be loading images yet."""
        loader, config, device = self.train_loader, self.config, self.world.device
        whole = config.optim.batch_size // self.microbatches
        if not isinstance(self.compiled, ReplayedNetwork) or loader.global_batch(0) < config.optim.batch_size:
            return
        size = config.data.of_epoch(self.progress.epoch).crop_size
        shape, generator = (whole, size, size, config.data.channels), torch.Generator(device).manual_seed(0)
        images = torch.randn(shape, generator=generator, device=device, dtype=self._image_dtype)
        torch.cuda.synchronize(device)
        with self.autocast():
            self.compiled.capture(images.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format))

    def without_reduction(self, skip: bool) -> AbstractContextManager[None]:
        """While it is entered, gradients add up on this rank and are not averaged over the ranks."""
        return self.training_network.no_sync() if skip and self.world.size > 1 else nullcontext()  # type: ignore[operator]

    @property
    def validated(self) -> dict[str, nn.Module]:
        """The networks that each epoch's end validates, by the name of their weights; the best epoch is chosen by the first."""
        networks = {"raw": self.network} | ({"ema": self.ema.network} if self.ema else {})
        return dict(sorted(networks.items(), key=lambda item: item[0] != self.config.train.best_by))

    def selection_held(self, hooks_change_network: bool) -> AbstractContextManager[Any]:
        """While it is entered, and no hook changes the network's modules, its backend is not selected for each batch.

        A network that a hook may change is not replayed, as a replay would not see the change.
        """
        if isinstance(self.compiled, ReplayedNetwork) and hooks_change_network:
            self.compiled.enabled = False
            if self.world.is_main:
                print("warning: a hook may change the network: no CUDA graphs are used", file=sys.stderr, flush=True)
        stack = ExitStack()
        for network in self.validated.values():
            if isinstance(network, DenseNet) and not hooks_change_network:
                stack.enter_context(network.selection_held())
        return stack

    def seed_dropout(self, microbatch: int) -> None:
        """Make dropout a function of seed, step and place in the batch, so that no generator's state need be saved."""
        place = self.world.rank * self.config.optim.grad_accum_steps + microbatch
        entropy = np.random.SeedSequence([self.config.seed, self.done_steps, place])
        seed_device(int(entropy.generate_state(1, np.uint64)[0]), self.world.device)

    def _begin_with(self, weights: InitialWeights) -> None:
        """Take a new run's initial weights, but for a classifier of other classes."""
        reason = weights.new_classifier(self.conditions.classes)
        state = self.network.state_dict()
        state.update({name: t for name, t in weights.state.items() if not (reason and name in weights.classifier)})
        load_weights(self.network, state, weights.origin)
        data = self.config.data
        assumed = [name for name in weights.assumed if name in data.from_weights]
        if line := assumption(weights.origin, self.config, assumed, prefix="--data."):
            self.doubts.append(line)
        seen = seen_held_out(self.val_loader.index, len(self.train_loader.index), weights.data.holdout, weights.seen)
        if seen:
            self.doubts.append(
                f"the weights {weights.origin} have trained on {seen:,} of the {self.config.data.holdout:,} images that are "
                "held out: the validation errors are too low for new images; validate on other images (data.val), or begin "
                "with weights of a run with the same data.holdout"
            )
        if weights.seed == self.config.seed and has_trained_on(self.train_loader.index, weights.seen):
            self.doubts.append(
                f"the weights {weights.origin} are of a run on these training images with the same seed, {weights.seed}: this "
                "run's epochs draw the order and the crops of that run's again; give --seed another number for new ones"
            )
        taken = [f"{name} {value_text(getattr(data, name))}" for name in data.from_weights if name not in assumed]
        self._begun = [f"classifier drawn anew: {reason}"] if reason else ["classifier taken from them"]
        self._begun += [f"taken over from their source: {', '.join(taken)}"] if taken else []
        self._begun += [weights.note] if weights.note else []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds. Every rank must call this."""
        return {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "config": dataclasses.asdict(self.config),
            "classes": self.conditions.classes,
            "conditions": dataclasses.asdict(self.conditions),
            "measured": dataclasses.asdict(self.measured),
            "tuning": dataclasses.asdict(self.tuning) if self.tuning else None,
            "tuning_left": dataclasses.asdict(self._tuning_left[0]) if self._tuning_left else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` gave.

        Raises:
            UserError: the run is another, or the state is of another kind of run.
        """
        changed = check_same_run(state, self.config, self.conditions)
        for name, part in self.parts.items():
            if self.ema is part and name not in state:  # it was switched on since
                self.ema.begin()
                continue
            if name not in state:
                raise UserError(
                    f"cannot resume {self.dir}: its checkpoint has no '{name}', which this configuration needs"
                )
            part.load_state_dict(state[name])
        known = {field.name for field in dataclasses.fields(OptimConfig)}
        before = {name: value for name, value in state["config"]["optim"].items() if name in known}
        self.optim_before = OptimConfig(**before)
        steps = self.train_loader.steps_per_epoch
        if changed or self.done_steps < self.config.optim.epochs * steps:  # else there is nothing left to train
            self.history.begin(self.done_steps, self.done_steps // steps, self.config, self.world.size, changed)

    def count(self, outcomes: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        """Add microbatches to the metrics: logits, labels, losses and weights of each, as `batch_sums` takes them."""
        for logits, labels, losses, weights in outcomes:
            self.finite.add(self.done_steps, losses, weights)
            sums = batch_sums(logits, labels, losses, weights)
            self.epoch_metrics.add(sums)
            self.window_metrics.add(sums)

    def gradient_norm(self) -> Tensor:
        """Of all parameters together, a scalar on the device; it takes the loss scale off the gradients, once a step."""
        self.scaler.unscale_(self.optimizer)
        gradients = (p.grad for p in self.network.parameters() if p.grad is not None)
        return nn.utils.get_total_norm(gradients)

    def weigh_gradients(self, images: int, counted: Tensor) -> None:
        """Make gradients that were divided by all `images` of a global batch follow the mean over those that count.

        Args:
            counted: of this rank, a scalar; it is less than its share where corrupt images were replaced.
        """
        factor = images / self.world.all_reduce_sum(counted).double()  # on the device; 1 changes no bit
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))

    def description(self) -> str:
        """A few lines on what this run is."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        optim, precision = self.config.optim, self.config.train.precision
        validation = " (validation too)" if precision in AUTOCAST_TYPES else ""
        classes = counted(len(self.conditions.classes), "class", "classes")
        return (
            f"{self.config.model.name}: {parameters:,} parameters, {classes}, "
            f"{precision}{validation} on {self.world.device.type}\n"
            f"{images_text(self.train_loader.index, self.val_loader.index, self.config.data)} "
            f"through the {self._named_loader()} loader\n"
            f"{self.batches.text(batch_split(self.world.size, optim.grad_accum_steps))}, {counted(optim.epochs, 'epoch')}"
            f"{self._about_images()}{self._large_batch()}{self._about_losses()}{self._fine_tuning()}"
            f"{self._implementation()}"
        )

    def _implementation(self) -> str:
        """Further lines on what was measured, and on what has changed since; empty where nothing was."""
        if self._tuning_left:
            tuning, reason = self._tuning_left
            return f"\nwhat the run has measured before ({tuning.chosen}) is not taken: {reason}"
        if not self.tuning:
            return ""
        now = autotune.as_chosen(self.tuning.chosen, self.config)
        others = [f"computes now with {now}"] if now != self.tuning.chosen else []
        return "".join(f"\n{line}" for line in [*self.tuning.text.splitlines(), *others])

    def _named_loader(self) -> str:
        """The loader, and why it is not the first choice where it was left to choose."""
        reasons = f" (not {'; not '.join(self._passed_over)})" if self._passed_over else ""
        return f"{self.conditions.loader}{reasons}"

    def _about_images(self) -> str:
        """Further lines where the training crops' size changes, or an epoch has a part of the images; empty else."""
        data, lines = self.config.data, list[str]()
        if len(data.train_sizes) > 1:
            first, later = data.train_sizes_text.split(",", 1)
            lines.append(f"training crops of {first} pixels,{later}")
        if data.aug_repeats > 1:
            lines.append(
                f"an epoch has a part of the training images, each {data.aug_repeats} times (data.aug_repeats)"
            )
        return "".join(f"\n{line}" for line in lines)

    def _large_batch(self) -> str:
        """A further line on what `optim.large_batch` came to; empty without it."""
        optim = self.config.optim
        warmup = (
            "" if optim.schedule == "one_cycle" else f", which warms up over {counted(optim.warmup_epochs, 'epoch')}"
        )
        rate = f"{optim.lr:g} ({optim.lr * 256 / optim.batch_size:g} for 256 images)"
        return f"\nlarge batch: learning rate {rate}{warmup}" if optim.large_batch else ""

    def _about_losses(self) -> str:
        """Further lines where training and validation losses are of different kinds or images; empty else."""
        optim, lines = self.config.optim, list[str]()
        if (exits := exits_of(self.network)) > 1:
            lines.append(f"losses are sums over {exits} exits")
        usual = "binary_cross_entropy" if self.train_loader.index.several_labels else "cross_entropy"
        other = [optim.objective] if optim.objective != usual else []
        other += ["label smoothing"] if optim.label_smoothing else []
        other += ["class weights"] if optim.class_weights else []
        other += ["mixed images"] if self.config.data.mixes else []
        if self.config.data.sampling == "balanced":
            lines.append(
                "training loss and error are of equally many images of each class, the validation's of those that are there: "
                "they do not compare"
            )
        if other:
            lines.append(
                f"the training loss is with {', '.join(other)}, the validation loss plain {usual}: they do not compare"
            )
        if (weights := self.conditions.class_weights) is not None:
            lines.append(class_weights_text(weights, self.conditions.classes))
        return "".join(f"\n{line}" for line in lines)

    def _fine_tuning(self) -> str:
        """Further lines: what it began with, and what of it does not train; empty for a run from drawn weights."""
        lines = [f"begun with {self.config.model.weights_text}", *self._begun] if self.config.model.weights else []
        if self._frozen:
            still = sum(p.numel() for p in self.network.parameters() if not p.requires_grad)
            lines.append(f"{still:,} parameters are frozen")
        return "".join(f"\n{line}" for line in lines)

    def _check_image_size(self, network: nn.Module) -> None:
        """Refuse crops that the network cannot take, before the first epoch or at the end of it."""
        config = self.config
        smallest = min(2, *self.batches.statistic_of_last)  # batch norm wants more than one value a channel
        field = "data.train_crop_size" if config.data.train_crop_size else "data.crop_size"
        for size in config.data.train_sizes:
            if reason := why_size_is_refused(copy.deepcopy(network).train(), smallest, size, config.data.channels):
                raise UserError(
                    f"{config.model.name} cannot train on {counted(smallest, 'image')} of {size} pixels, the smallest part "
                    f"of a batch ({reason}): choose another {field} or optim.batch_size"
                )
        if config.data.train_crop_size:  # validation has another
            check_image_size(network, config.data.crop_size, config.model.name, config.data.channels)
