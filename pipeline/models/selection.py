"""Which implementation of the dense block a forward pass takes. All have the same parameters and give the same result.

eager   the modules of densenet.py, one after the other: the reference
memory_efficient    torch's operators with shared batch statistics (memory_efficient.py)
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
class Selection:
    """An implementation, and why not the one asked for or a faster one."""

    method: Literal["eager", "memory_efficient", "fused"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.method} ({self.reason})" if self.reason else self.method


def select(features: nn.Module, x: Tensor, wanted: DenseBlock) -> Selection:
    """The implementation for an input of a network's `features`: what is wanted, or the nearest to it that is right.

    auto is fused where that is possible, else eager: on a GPU nobody has measured memory_efficient yet.
    """
    if wanted == "eager":
        return Selection("eager")
    reason = _unsupported_reason(features, x)
    if reason:
        return Selection("eager", reason)
    if wanted == "memory_efficient":
        return (
            Selection("memory_efficient")
            if features.training
            else Selection("eager", "memory_efficient is for training")
        )
    reason = _kernels_unsupported_reason(features, x)
    if not reason:
        return Selection("fused")
    return Selection("memory_efficient" if wanted == "fused" and features.training else "eager", reason)


def _unsupported_reason(features: nn.Module, x: Tensor) -> str:
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


def _kernels_unsupported_reason(features: nn.Module, x: Tensor) -> str:
    dtypes = {tensor.dtype for tensor in (x, *features.parameters(), *features.buffers()) if tensor.is_floating_point()}
    if x.device.type != "cpu":
        return "the kernels are for CPU"
    if torch.is_autocast_enabled("cpu"):
        return "the kernels have no autocast"
    if len(dtypes) > 1 or not dtypes <= kernels.SUFFIXES.keys():
        return "the kernels take all in float32 or all in float64"
    return kernels.unavailable_reason() or ""
