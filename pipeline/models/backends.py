"""Who can compute a dense block: one name, one module or object, one line in `BACKENDS`.

All have the same parameters and give the same result up to rounding. "eager" is none of them: it is the modules of
densenet.py, called one after the other, and the reference for the others.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import UserError, did_you_mean
from pipeline.models import fused, memory_efficient, triton_block
from pipeline.models.stage import Stage, TrackedBatchNorm


class Backend(Protocol):
    """An implementation of the stages of a network. A Python module with these names is one."""

    AUTOMATIC: bool
    """Whether `auto` may take it."""
    FROZEN_PARTS: bool
    """Whether it also computes the stem and the first stages of a network in training with their norms in evaluation mode;
    nothing of these trains then, nor what comes before."""

    def refusal(self, device: torch.device) -> str:
        """Why a run on `device` that asks for it by name is refused; empty if it can run there or others may stand in."""

    def unsupported(self, features: nn.Module, x: Tensor) -> str:
        """Why it cannot compute `features` of the images x (N, 3, H, W) as they are; empty if it can.

        Is asked only about modules that are as `DenseNet` built them. The answer may depend on the device, dtype and
        layout of x and of the parameters, on autocast and on the mode, not on the size or the values of x.
        """

    def stem(self, x: Tensor, norm: TrackedBatchNorm) -> Tensor:
        """Batch norm, ReLU and 3x3 max pooling of stride 2: (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""

    def stage(self, x: Tensor, stage: Stage) -> Tensor:
        """`stage` of x (N, C, H, W), and in training the running statistics of its norms."""


# In the order of preference. `auto` takes the first automatic one that can; for one that is asked for by name and cannot,
# the first of those after it that can; where none can, the modules are called.
BACKENDS: dict[str, Backend] = {
    "triton": triton_block,
    "fused": fused,
    "memory_efficient": memory_efficient,
}


def candidates(dense_block: str) -> list[str]:
    """The names of the backends that `dense_block` (`auto`, `eager` or one of them) may mean, the best first.

    Raises:
        UserError: there is none of that name.
    """
    if dense_block == "auto":
        return [name for name, backend in BACKENDS.items() if backend.AUTOMATIC]
    names = list(BACKENDS)
    if dense_block in names:
        return names[names.index(dense_block) :]
    if dense_block == "eager":
        return []
    known = ("auto", "eager", *names)
    hint = did_you_mean(dense_block, known)
    raise UserError(f"model.dense_block: there is no '{dense_block}'{hint}; choose {', '.join(known)}")


def refuse_elsewhere(dense_block: str, device: torch.device) -> None:
    """Stop a run that asks for a backend by name on a device that it is not for.

    Raises:
        UserError: `device` is such a one.
    """
    reason = BACKENDS[dense_block].refusal(device) if dense_block in BACKENDS else ""
    if reason:
        raise UserError(f"model.dense_block: '{dense_block}' cannot run here: {reason}; choose auto")
