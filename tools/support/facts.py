"""Figures of networks that follow from their definition: parameters and multiply-accumulates."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelConfig
from pipeline.models import create_network
from pipeline.models.msdnet import MSDNet


def on_meta(build: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """Call `build`, and return its network for evaluation, without memory for the weights."""
    with torch.device("meta"):
        return build(*args, **options).eval().requires_grad_(False)  # the counter stumbles over expanded parameters


def network_without_weights(model: ModelConfig, classes: int, channels: int = 3) -> nn.Module:
    """The network that a configuration names, on the device meta."""
    return on_meta(create_network, dataclasses.replace(model, dense_block="eager"), classes, channels)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_accumulates(network: nn.Module, size: int, channels: int = 3) -> int:
    """Of the convolutions and matrix products, for one image of `size` x `size` pixels."""
    return multiply_accumulates_by_module(network, size, channels)[""]


@torch.no_grad()
def multiply_accumulates_by_module(network: nn.Module, size: int, channels: int = 3) -> dict[str, int]:
    """Those of each module by its name, "" for the whole network; see `multiply_accumulates`.

    A container whose modules are called one by one has the sum of theirs.
    """
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels, size, size, device=device))
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    root = type(network).__name__

    def count(module: nn.Module, name: str) -> int:
        called = f"{root}.{name}" if name else root
        if called in flops:
            return flops[called] // 2
        return sum(count(child, f"{name}.{part}".lstrip(".")) for part, child in module.named_children())

    return {name: count(module, name) for name, module in network.named_modules()}


@dataclass(frozen=True)
class ExitCost:
    """What an answer at an exit takes, with all blocks and exits before it; of one image.

    Attributes:
        operations: multiply-accumulates as the authors of MSDNet count them: those of ReLU (one an output), of pooling (one an
            input of each window) and of the linear layer's bias are added.
    """

    parameters: int
    multiply_accumulates: int
    operations: int


@torch.no_grad()
def exit_costs(network: MSDNet, size: int, channels: int = 3) -> list[ExitCost]:
    """The cost of each exit for images of `size` x `size` pixels."""
    own: dict[nn.Module, tuple[int, int]] = defaultdict(lambda: (0, 0))

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        own[module] = _operations(module, inputs[0], output)

    with register_module_forward_hook(count):
        network(torch.zeros(1, channels, size, size, device=next(network.parameters()).device))
    costs, total = [], np.zeros(3, np.int64)
    for parts in zip(network.blocks, network.classifier, strict=True):
        modules = [module for part in parts for module in part.modules()]
        total += np.array([sum(map(parameters, parts)), *np.sum([own[module] for module in modules], axis=0)])
        costs.append(ExitCost(*total.tolist()))
    return costs


def _operations(module: nn.Module, given: Any, output: Any) -> tuple[int, int]:
    """Multiply-accumulates of a module itself, and those with what the authors of MSDNet count too."""
    if isinstance(module, nn.Conv2d):
        work = output.numel() * module.weight[0].numel()
        return work, work
    if isinstance(module, nn.Linear):
        return module.weight.numel(), module.weight.numel() + output.numel()
    if isinstance(module, nn.ReLU):
        return 0, output.numel()
    if isinstance(module, nn.MaxPool2d):
        return 0, output.numel() * cast("int", module.kernel_size) ** 2
    return 0, given.numel() if isinstance(module, nn.AdaptiveAvgPool2d) else 0


def millions(parameters: int) -> str:
    """``7.98``, and of few ``0.0026``."""
    return f"{parameters / 1e6:.2f}" if parameters >= 1e4 else f"{parameters / 1e6:.2g}"


def billions(work: int) -> str:
    """``2.87``, and of little ``0.0035``."""
    return f"{work / 1e9:.2f}" if work >= 1e8 else f"{work / 1e9:.2g}"
