"""What an audit compares besides the configuration: measured of the data, network and optimiser that really train."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Measured:
    """Measured of the run so far.

    Attributes:
        images: training and validation images.
        classes: number of classes.
        statistics: for each part of the run, the epochs that were done before it (1.5: half of the second) and the images
            (smallest, largest) in a batch-norm statistic of a full batch.
        last_batch: images of the last step of an epoch.
        spread: standard deviation of the convolutions' initial weights, in units of sqrt(2 / fan-out).
        momentum: the optimiser's, as `momentum_text` puts it.
        weight_decay: its factors, one unless groups of parameters differ.
        decayed: parameters to which weight decay applies, and all.
        changed: what was changed on the way, each a field and more words.
        skipped_steps: steps that were left out, as their loss or gradient was not finite; None where the loss scaler leaves
            them out, which only the device knows.
        batch_norms: whether the network has any.
        greatest_decay: of the moving average of the weights, where the run has too few steps to reach the one asked for.
        weights: of convolutions, whose number tells how near to 1 the spread must be; None in files of before.
    """

    images: tuple[int, int]
    classes: int
    statistics: tuple[tuple[float, tuple[int, int]], ...]
    last_batch: int
    spread: float
    momentum: str
    weight_decay: tuple[float, ...]
    decayed: tuple[int, int]
    changed: tuple[str, ...] = ()
    skipped_steps: int | None = 0
    batch_norms: bool = True
    greatest_decay: float | None = None
    weights: int | None = None


def initial_spread(network: nn.Module) -> tuple[float, int]:
    """Standard deviation of all convolutions' weights, each in units of sqrt(2 / fan-out) of its layer; and their number."""
    squares, count = 0.0, 0
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            squares += float(module.weight.detach().double().square().sum()) * fan_out / 2
            count += module.weight.numel()
    return math.sqrt(squares / count) if count else math.nan, count


def has_batch_norms(network: nn.Module) -> bool:
    """Whether it has layers that take statistics of a batch; timm's batch norms are torch's, too."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def momentum_text(optimizer: torch.optim.Optimizer) -> str:
    """The momentum that an optimiser uses, as ``0.9, Nesterov``; several where groups of parameters differ.

    Of optimisers that have them their betas, and the norm to which they clip gradients by themselves.
    """
    texts: dict[str, None] = {}  # in the order of the groups
    for group in optimizer.param_groups:
        betas = f"betas {', '.join(map(str, group['betas']))}" if "betas" in group else "none"
        parts = [str(group.get("momentum", betas))]
        parts += [f"gradient norm at most {group['max_grad_norm']}"] if group.get("max_grad_norm") else []
        parts += ["Nesterov"] if group.get("nesterov") else []
        parts += [f"dampening {group['dampening']}"] if group.get("dampening") else []
        texts[", ".join(parts)] = None
    return " and ".join(texts)


def weight_decay_factors(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """The factors by which an optimiser decays weights, without the 0 of those that it leaves alone."""
    return tuple(sorted({group["weight_decay"] for group in optimizer.param_groups if group["weight_decay"]})) or (0.0,)


def decayed_parameters(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """How many parameter tensors weight decay applies to, and how many there are."""
    groups: Sequence[dict] = optimizer.param_groups
    return sum(len(group["params"]) for group in groups if group["weight_decay"]), sum(len(g["params"]) for g in groups)
