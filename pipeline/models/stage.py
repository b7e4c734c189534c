"""A stage: a dense block, and the batch norm, ReLU and average pooling after it. It is what a backend computes at once.

Also here: the same in torch's own operators, for second derivatives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrackedBatchNorm(nn.BatchNorm2d):
    """A type only, no module is of this class: an `nn.BatchNorm2d` with running statistics and a momentum.

    torch's own type lets each of them be None. Before a backend is called, selection.py has seen that none is.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float


class Layer(NamedTuple):
    """The modules of a dense layer with a bottleneck that have parameters."""

    norm1: TrackedBatchNorm
    conv1: nn.Conv2d
    norm2: TrackedBatchNorm
    conv2: nn.Conv2d


@dataclass(frozen=True)
class Stage:
    """A dense block, then batch norm, ReLU and average pooling.

    Shape: (N, C, H, W) -> (N, C + layers * growth_rate, H // pool[0], W // pool[1]).

    Attributes:
        recompute: compute the bottlenecks' outputs again in the backward pass instead of keeping them.
    """

    layers: tuple[Layer, ...]
    norm: TrackedBatchNorm
    pool: tuple[int, int]
    recompute: bool

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Six of each layer, in the order of `Layer`, and the two of the last norm."""
        found = []
        for norm1, conv1, norm2, conv2 in self.layers:
            found += [norm1.weight, norm1.bias, conv1.weight, norm2.weight, norm2.bias, conv2.weight]
        return *found, self.norm.weight, self.norm.bias

    @property
    def growth_rate(self) -> int:
        return self.layers[0].conv2.out_channels


def eager_stem(y: Tensor, norm: nn.BatchNorm2d, gamma: Tensor, beta: Tensor) -> Tensor:
    """Batch norm, ReLU and 3x3 max pooling of stride 2, without a change to running statistics."""
    return F.max_pool2d(_normalise(y, norm, gamma, beta), kernel_size=3, stride=2, padding=1)


def eager_stage(x: Tensor, stage: Stage, *parameters: Tensor) -> Tensor:
    """`stage` by the definition, without a change to running statistics."""
    for i, layer in enumerate(stage.layers):
        gamma1, beta1, weight1, gamma2, beta2, weight2 = parameters[6 * i : 6 * i + 6]
        b = F.conv2d(_normalise(x, layer.norm1, gamma1, beta1), weight1)
        x = torch.cat([x, F.conv2d(_normalise(b, layer.norm2, gamma2, beta2), weight2, padding=1)], dim=1)
    return F.avg_pool2d(_normalise(x, stage.norm, *parameters[-2:]), stage.pool)


def gradients_by_definition(
    eager: Callable[..., Tensor],
    gradient: Tensor,
    x: Tensor,
    what: Stage | nn.BatchNorm2d,
    parameters: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of x and the parameters of ``eager(x, what, *parameters)``, computed anew.

    Within a backward pass with create_graph=True they can be differentiated again.
    """
    inputs = (x, *parameters)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        found = iter(torch.autograd.grad(eager(x, what, *parameters), wanted, gradient, create_graph=again))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def update_running_statistics(norm: TrackedBatchNorm, mean: Tensor, variance: Tensor, pixels: int) -> None:
    """What a batch norm does in training; `variance` is the biased one."""
    blend_running_statistics(norm, mean, variance, pixels)
    norm.num_batches_tracked.add_(1)


@torch.no_grad()
def blend_running_statistics(norm: TrackedBatchNorm, mean: Tensor, variance: Tensor, pixels: int) -> None:
    """The same without the count of batches, which a stage can do for all of its norms at once."""
    for running, batch in ((norm.running_mean, mean), (norm.running_var, variance * (pixels / (pixels - 1)))):
        if running.dtype == batch.dtype:
            running.lerp_(batch, norm.momentum)
        else:  # rounded once, to what is stored
            wide = torch.promote_types(running.dtype, batch.dtype)
            running.copy_(running.to(wide).lerp_(batch.to(wide), norm.momentum))


def _normalise(x: Tensor, norm: nn.BatchNorm2d, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, gamma, beta, training=True, eps=norm.eps))
