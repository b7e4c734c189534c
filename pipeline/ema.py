"""The exponential moving average (EMA) of a network's weights, batch-norm statistics included.

As a checkpoint's network it has statistics of its own: the average of those that training saw. The decay grows with the
number of updates, so that the first weights are soon forgotten: after n updates it is min(decay, (1 + n) / (10 + n)), as that
of TensorFlow's ExponentialMovingAverage is.
"""

import copy
from itertools import chain
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint import load_weights


def decay_after(updates: int, decay: float) -> float:
    """What the decay has grown to."""
    return min(decay, (1 + updates) / (10 + updates))


class ModelEma:
    """The average of one network, a part of a run's state.

    `torch.optim.swa_utils.AveragedModel` asks the device in each update whether it is the first; here nothing waits for it.

    Attributes:
        network: holds the average, in evaluation mode and without gradients.
        updates: how many there were.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.updates = 0
        self._decay, self._source = decay, network
        both = _tensors(self.network), _tensors(network)
        self._averaged = [[tensor for tensor in tensors if tensor.is_floating_point()] for tensors in both]
        self._copied = [[tensor for tensor in tensors if not tensor.is_floating_point()] for tensors in both]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's present weights."""
        decay = decay_after(self.updates, self._decay)
        self.updates += 1
        averages, values = self._averaged
        torch._foreach_lerp_(averages, values, 1 - decay)
        counts, seen = self._copied
        if counts:  # of batches that batch norms have seen; one by one they would be a launch each on a GPU
            torch._foreach_copy_(counts, seen)

    def begin(self) -> None:
        """Begin anew at the network's present weights."""
        self.updates = 0
        self.network.load_state_dict(self._source.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "model": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        load_weights(self.network, state["model"], "the checkpoint's average")


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers. They are the same objects throughout a run."""
    return list(chain(network.parameters(), network.buffers()))
