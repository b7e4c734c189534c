"""Notices on the device, without waiting for it, that a loss is not finite, and stops all ranks when it is asked."""

import filecmp
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pipeline.checkpoint import CheckpointFolder
from pipeline.config import Config
from pipeline.data.loader import TrainingLoader
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.run_dir import write_text

NEVER = 2**62  # a step that no run reaches


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of all tensors are finite. Waits for the device once, not for each of them."""
    outcomes = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not outcomes or bool(torch.stack(outcomes).all())


class StepSkipper:
    """Leaves out the steps whose loss or gradient is not finite, as if their batches had not been.

    It waits for the device in each step. Batch-norm statistics, which the forward pass has spoilt by then, are put back.
    """

    LIMIT = 10  # steps in a row after which a run does not recover by itself

    def __init__(self, network: nn.Module, world: World, config: Config):
        self._network, self._world, self._config = network, world, config
        self._in_a_row = 0  # steps that were left out and count
        self._buffers: list[Tensor] = []

    def begin(self) -> None:
        """Before the forward passes of a step."""
        self._buffers = [buffer.clone() for buffer in self._network.buffers()]

    def skips(self, losses: list[Tensor], norm: Tensor, scale: float) -> bool:
        """Whether the step is to be left out, the same on every rank; called after its backward passes.

        In fp16 the scale of the loss is lowered after such a step. While it is above 1 that may be all that is needed, so that
        the step does not count among those in a row.

        Args:
            losses: of each microbatch, (n).
            norm: of the gradient, without the loss scale.
            scale: of the loss.
        """
        by_loss = not all_finite(losses)
        by_gradient = not bool(norm.isfinite())
        odd, counts = self._world.all_reduce_max([by_loss or by_gradient, by_loss or (by_gradient and scale <= 1)])
        if not odd:
            self._in_a_row = 0
            return False
        for buffer, before in zip(self._network.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        self._in_a_row += bool(counts)
        if self._in_a_row >= self.LIMIT:
            raise UserError(
                f"the loss or the gradient is not finite in {self.LIMIT} steps in a row: {way_on(self._config)}"
            )
        return True


class FiniteGuard:
    """Remembers the first step whose loss was not finite.

    ``not-finite.json`` names the images of that step and of the one before, when `check` finds it.
    """

    def __init__(self, world: World, loader: TrainingLoader, config: Config):
        self._world, self._loader, self._config = world, loader, config
        self._file = Path(config.run_dir, "not-finite.json")
        self._first = torch.full((), NEVER, device=world.device)

    def add(self, step: int, losses: Tensor, weights: Tensor) -> None:
        """Look at the losses (n) of images that count where `weights` (n) is not 0, in optimiser step `step`."""
        finite = losses.isfinite().logical_or(weights == 0).all()
        self._first.clamp_(max=torch.where(finite, NEVER, step))

    def check(self, last_step: int, *tensors: Tensor) -> None:
        """Stop all ranks if on any of them a loss was not finite, or one of `tensors` is not after `last_step`.

        Waits for the device. Every rank must call this.

        Raises:
            UserError: says in which step, and what to do.
        """
        finite = all_finite(tensors)
        by_loss, by_tensors = self._world.all_reduce_max([-int(self._first), -(NEVER if finite else last_step)])
        first = min(-by_loss, -by_tensors)
        if first == NEVER:
            return
        self._stop(first, "loss is" if -by_loss == first else "network's weights or batch-norm statistics are")

    def check_gradient(self, last_step: int, norm: float, scale: float) -> None:
        """Stop all ranks if the gradient of `last_step` was not finite. Every rank must call this.

        Args:
            norm: of the gradient, the same on all ranks.
            scale: of the loss: while it is above 1, lowering it may be all that is needed, which the loss scaler does.

        Raises:
            UserError: as `check`.
        """
        if scale <= 1 and not math.isfinite(norm):
            self._stop(last_step, "gradient is")

    def _stop(self, first: int, what: str) -> NoReturn:
        """
        Args:
            first: the step that is not finite.
        """
        self._world.broadcast_from_rank0(
            lambda: write_text(self._file, json.dumps(self._batches_until(first), indent=1))
        )
        epoch, step = (number + 1 for number in divmod(first, self._loader.steps_per_epoch))  # as people count
        raise UserError(
            f"the {what} not finite at epoch {epoch}, step {step}: {way_on(self._config)}. {self._file} names the step's "
            "images"
        )

    def _batches_until(self, step: int) -> list[dict[str, Any]]:
        """The images of the step at which the loss was not finite and of the one whose update led there."""
        batches = []
        for before in range(max(0, step - 1), step + 1):
            epoch, position = divmod(before, self._loader.steps_per_epoch)
            ids = self._loader.global_ids(epoch, position).tolist()
            names = [self._loader.index.names[i] for i in ids]
            batches.append({"epoch": epoch + 1, "step": position + 1, "ids": ids, "names": names})
        return batches


def way_on(config: Config) -> str:
    """What to do about a step that is not finite, of what would change something in this run, as the end of a message."""
    folder, train = CheckpointFolder(Path(config.run_dir, "checkpoints")), config.train
    resumes = folder.last.exists() or folder.previous.exists()

    def purposely(key: str) -> str:
        return f" and --train.change {key}" if resumes else ""

    ways = [f"with a lower optim.lr{purposely('optim.lr')}"]
    if train.precision != "fp32":
        ways.append(f"with --train.precision fp32{purposely('train.precision')}")
    if train.not_finite != "skip":
        ways.append("with --train.not_finite skip")
    text = f"start the same command again {', or '.join(ways)}; "
    if not resumes:
        return f"{text}no checkpoint was saved, and it begins anew"
    earlier = _earlier(folder)
    too_late = f"; if that is too late, put {earlier} in the place of last.pt first" if earlier else ""
    return f"{text}it resumes from the checkpoint before that step{too_late}"


def way_on_from_validation(config: Config) -> str:
    """As `way_on`, where the last checkpoint's own answers are not finite."""
    folder = CheckpointFolder(Path(config.run_dir, "checkpoints"))
    earlier = _earlier(folder)
    if earlier:
        lower = (
            f"put {earlier} in the place of last.pt in {folder.last.parent} and start again with a lower optim.lr and "
            "--train.change optim.lr"
        )
    else:
        lower = "start anew with a lower optim.lr and another --run_dir, as there is no earlier checkpoint"
    return f"{lower}, or count them as wrong with --train.not_finite skip"


def _earlier(folder: CheckpointFolder) -> str:
    """The names of the checkpoints that are others than the last one, in words."""
    others = [
        file.name
        for file in (folder.previous, folder.best)
        if file.exists() and not (folder.last.exists() and filecmp.cmp(file, folder.last, shallow=False))
    ]
    return " or ".join(others)
