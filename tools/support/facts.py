"""Figures of networks that follow from their definition: parameters and multiply-accumulates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelConfig
from pipeline.models import create_network


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
