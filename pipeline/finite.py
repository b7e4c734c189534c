"""Notices on the device, without waiting for it, that a loss is not finite, and stops all ranks when it is asked."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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

    def __init__(self, network: nn.Module, world: World):
        self._network, self._world = network, world
        self._in_a_row = 0
        self._buffers: list[Tensor] = []

    def begin(self) -> None:
        """Before the forward passes of a step."""
        self._buffers = [buffer.clone() for buffer in self._network.buffers()]

    def skips(self, losses: list[Tensor], scaled: bool) -> bool:
        """Whether the step is to be left out, the same on every rank; called after its backward passes.

        Args:
            losses: of each microbatch, (n).
            scaled: gradients are scaled, and the scaler leaves out those that are not finite.
        """
        finite = all_finite(losses)
        if finite and not scaled:
            gradients = (p.grad for p in self._network.parameters() if p.grad is not None)
            finite = bool(nn.utils.get_total_norm(gradients).isfinite())
        (odd,) = self._world.all_reduce_max([not finite])
        if not odd:
            self._in_a_row = 0
            return False
        for buffer, before in zip(self._network.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        self._in_a_row += 1
        if self._in_a_row >= self.LIMIT:
            raise UserError(
                f"the loss or the gradient is not finite in {self.LIMIT} steps in a row: start the same command again with a "
                "lower optim.lr and --train.change optim.lr"
            )
        return True


class FiniteGuard:
    """Remembers the first step whose loss was not finite.

    Args:
        file: names the images of that step and of the one before, when `check` finds it.
        skips: steps whose loss is not finite are left out, so that this is no remedy.
    """

    def __init__(self, world: World, loader: TrainingLoader, file: Path, skips: bool):
        self._world, self._loader, self._file, self._skips = world, loader, file, skips
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
        what = "loss is" if -by_loss == first else "network's weights or batch-norm statistics are"
        skip = "" if self._skips else " or with --train.not_finite skip;"
        self._world.broadcast_from_rank0(
            lambda: write_text(self._file, json.dumps(self._batches_until(first), indent=1))
        )
        epoch, step = (number + 1 for number in divmod(first, self._loader.steps_per_epoch))  # as people count
        raise UserError(
            f"the {what} not finite at epoch {epoch}, step {step}: start the same command again with a lower optim.lr and "
            f"--train.change optim.lr, or with train.precision fp32 and --train.change train.precision,{skip} it resumes from "
            "the checkpoint before that step. If that is too late, put best.pt or previous.pt in the place of last.pt first. "
            f"{self._file} names the step's images"
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
