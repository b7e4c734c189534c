"""Figures of networks that follow from their definition: parameters and multiply-accumulates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def on_meta(build: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """Call `build`, and return its network for evaluation, without memory for the weights."""
    with torch.device("meta"):
        return build(*args, **options).eval()


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def multiply_accumulates(network: nn.Module, size: int) -> int:
    """Of the convolutions and linear layers, for one image of `size` x `size` pixels."""
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops() // 2
