"""Which implementation of the dense block a forward pass takes. All have the same parameters and give the same result.

plain   the modules of densenet.py, one after the other: the reference
lean    torch's operators with shared batch statistics (lean.py)
fused   C++ kernels for CPU (fused.py)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.config import DenseBlock
from pipeline.models import kernels

KNOWN_MODULES = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d}


@dataclass(frozen=True)
class Choice:
    """An implementation, and why not the one asked for or a faster one."""

    method: Literal["plain", "lean", "fused"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.method} ({self.reason})" if self.reason else self.method


def choose(features: nn.Module, x: Tensor, wanted: DenseBlock) -> Choice:
    """The implementation for an input of a network's `features`: what is wanted, or the nearest to it that is right.

    auto is fused where that is possible, else plain: on a GPU nobody has measured lean yet.
    """
    if wanted == "plain":
        return Choice("plain")
    obstacle = _obstacle(features, x)
    if obstacle:
        return Choice("plain", obstacle)
    if wanted == "lean":
        return Choice("lean") if features.training else Choice("plain", "lean is for training")
    obstacle = _obstacle_to_kernels(features, x)
    if not obstacle:
        return Choice("fused")
    return Choice("lean" if wanted == "fused" and features.training else "plain", obstacle)


def _obstacle(features: nn.Module, x: Tensor) -> str:
    """Why the modules must be called one by one; empty if they need not."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the modules"
    if torch.jit.is_tracing():
        return "torch.jit traces the modules"
    if x.dim() != 4:
        return "the input is no batch of images"
    if not features.training and torch.is_grad_enabled():
        return "gradients in evaluation mode"
    if not hasattr(features.denseblock1.denselayer1, "conv2"):
        return "no bottlenecks"
    epsilons = set()
    for name, module in features.named_modules():
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            return f"a hook on {name or 'features'}"
        if not isinstance(module, nn.Sequential) and type(module) not in KNOWN_MODULES:
            return f"{name} is a {type(module).__name__}"
        if isinstance(module, nn.Dropout) and module.training:
            return "dropout"
        if isinstance(module, nn.BatchNorm2d):
            if module.training != features.training:
                return f"{name} is frozen"
            if not module.affine or not module.track_running_stats or module.momentum is None:
                return f"{name} is not an ordinary batch norm"
            if not name.endswith("norm2"):  # the others share statistics
                epsilons.add(module.eps)
    return "batch norms with different epsilons" if len(epsilons) > 1 else ""


def _obstacle_to_kernels(features: nn.Module, x: Tensor) -> str:
    dtypes = {tensor.dtype for tensor in (x, *features.parameters(), *features.buffers()) if tensor.is_floating_point()}
    if x.device.type != "cpu":
        return "the kernels are for CPU"
    if torch.is_autocast_enabled("cpu"):
        return "the kernels have no autocast"
    if len(dtypes) > 1 or not dtypes <= kernels.SUFFIXES.keys():
        return "the kernels take all in float32 or all in float64"
    return kernels.problem() or ""
