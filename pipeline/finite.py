"""Notices on the device, without waiting for it, that a loss is not finite, and stops all ranks when it is asked."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.loader import TrainingLoader
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.run_dir import write_text

NEVER = 2**62  # a step that no run reaches


class FiniteGuard:
    """Remembers the first step whose loss was not finite.

    Args:
        file: names the images of that step and of the one before, when `check` finds it.
    """

    def __init__(self, world: World, loader: TrainingLoader, file: Path):
        self._world, self._loader, self._file = world, loader, file
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
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
        earliest = min(int(self._first), NEVER if finite else last_step)
        first = -self._world.all_reduce_max([-earliest])[0]
        if first == NEVER:
            return
        self._world.broadcast_from_rank0(
            lambda: write_text(self._file, json.dumps(self._batches_until(first), indent=1))
        )
        epoch, step = divmod(first, self._loader.steps_per_epoch)
        raise UserError(
            f"the loss is not finite at epoch {epoch}, step {step}: start the same command again with a lower optim.lr and "
            "--train.change optim.lr, or with train.precision fp32 and --train.change train.precision, or with "
            f"--train.not_finite skip; it resumes from the checkpoint before that step. {self._file} names the step's images"
        )

    def _batches_until(self, step: int) -> list[dict[str, Any]]:
        """The images of the step at which the loss was not finite and of the one whose update led there."""
        batches = []
        for before in range(max(0, step - 1), step + 1):
            epoch, position = divmod(before, self._loader.steps_per_epoch)
            ids = self._loader.global_ids(epoch, position).tolist()
            names = [self._loader.index.names[i] for i in ids]
            batches.append({"epoch": epoch, "step": position, "ids": ids, "names": names})
        return batches
