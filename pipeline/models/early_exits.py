"""Networks with several outputs, such as MSDNet: an answer at each exit, of which the last one is the network's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.msdnet import MSDNet


def exits_of(network: nn.Module) -> int:
    """How many answers a network gives: what it says itself (``exits``), or 1."""
    return int(getattr(network, "exits", 1))


def stack_exits(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """The logits (n, classes) of a network with one output, or (n, exits, classes) of one with several."""
    return outputs if isinstance(outputs, Tensor) else torch.stack(tuple(outputs), dim=1)


def last_exit(logits: Tensor) -> Tensor:
    """The network's own answer, (n, classes), of what `stack_exits` gives."""
    return logits[:, -1] if logits.dim() == 3 else logits


class OneExit(nn.Module):
    """An MSDNet up to one exit, without the classifiers before it. Shape: (n, 3, H, W) -> (n, num_classes).

    Args:
        exit: counted from 1.
    """

    def __init__(self, network: MSDNet, exit: int):
        super().__init__()
        self.blocks, self.classifier = network.blocks[:exit], network.classifier[exit - 1]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


def single_output(network: nn.Module, exit: int | None, name: str) -> nn.Module:
    """A network that gives the logits (n, classes) alone: of the exit asked for, or of the last one.

    Args:
        exit: counted from 1; None for the last one.
        name: the network's, for messages.

    Raises:
        UserError: there is no such exit.
    """
    exits = exits_of(network)
    if exit is not None and not 1 <= exit <= exits:
        wrong = f"has {exits} exits" if exits > 1 else "has one output"
        raise UserError(f"--exit {exit}: {name} {wrong}: " + (f"choose 1 to {exits}" if exits > 1 else "leave it out"))
    return OneExit(network, exit or exits) if isinstance(network, MSDNet) else network
