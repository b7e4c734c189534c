"""The memory_efficient dense block: in torch's own operators, for every device, with a fraction of the memory.

A map's batch statistics are computed once, when it is made, and used by the first batch norm of every later layer. The
maps of a block lie in one buffer, nothing is concatenated, and the backward pass computes normalised maps again instead
of keeping them. It is for the sake of memory, not of speed. kernels/ALGEBRA.md has the formulas.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight

from pipeline.models.stage import (
    Stage,
    TrackedBatchNorm,
    blend_running_statistics,
    eager_stage,
    eager_stem,
    gradients_by_definition,
)

AUTOMATIC = False  # it is for memory
FROZEN_PARTS = False


def refusal(device: torch.device) -> str:
    return ""


def unsupported(features: nn.Module, x: Tensor) -> str:
    return "" if features.training else "memory_efficient is for training"


def stem(x: Tensor, norm: TrackedBatchNorm) -> Tensor:
    return _Stem.apply(x, norm, norm.weight, norm.bias)


def stage(x: Tensor, stage: Stage) -> Tensor:
    keep = torch.is_grad_enabled() and not stage.recompute
    return _Stage.apply(x.contiguous(memory_format=torch.channels_last), stage, keep, *stage.parameters)


class _Autocast:
    """The autocast state of a forward pass, to have it again in the backward pass."""

    def __init__(self, device: str):
        self._device, self._dtype = device, None
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            self._dtype = torch.get_autocast_dtype(device)

    def __call__(self) -> AbstractContextManager[Any]:
        if not torch.amp.is_autocast_available(self._device):
            return nullcontext()
        enabled = self._dtype is not None
        return torch.autocast(self._device, dtype=self._dtype, enabled=enabled, cache_enabled=False)


class _Stem(Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, norm: TrackedBatchNorm, gamma: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(y, gamma, beta)
        ctx.norm, ctx.autocast = norm, _Autocast(y.device.type)
        norm.num_batches_tracked.add_(1)
        z = F.batch_norm(y, norm.running_mean, norm.running_var, gamma, beta, True, norm.momentum, norm.eps)
        return F.max_pool2d(z.relu_(), kernel_size=3, stride=2, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, *parameters = ctx.saved_tensors
        with ctx.autocast():
            dy, *others = gradients_by_definition(eager_stem, gradient, y, ctx.norm, parameters)
        return dy, None, *others


class _Stage(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Stage, keep: bool, *parameters: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        pixels, growth = images * height * width, stage.growth_rate
        channels_out = channels + len(stage.layers) * growth
        maps = x.new_empty((images, height, width, channels_out)).permute(0, 3, 1, 2)  # channels-last
        mean, variance = x.new_empty((2, channels_out), dtype=_accumulated(x.dtype))
        maps[:, :channels] = x
        mean[:channels], variance[:channels] = _statistics(x)
        bottlenecks = []
        for i, layer in enumerate(stage.layers):
            gamma1, beta1, weight1, gamma2, beta2, weight2 = parameters[6 * i : 6 * i + 6]
            norm1, norm2 = layer.norm1, layer.norm2
            blend_running_statistics(norm1, mean[:channels], variance[:channels], pixels)
            a = _normalise(maps[:, :channels], mean, variance, gamma1, beta1, norm1.eps)
            b = F.conv2d(a, weight1)
            del a
            d = F.batch_norm(
                b, norm2.running_mean, norm2.running_var, gamma2, beta2, True, norm2.momentum, norm2.eps
            ).relu_()
            new = F.conv2d(d, weight2, padding=1)
            maps[:, channels : channels + growth] = new
            mean[channels : channels + growth], variance[channels : channels + growth] = _statistics(new)
            channels += growth
            if keep:
                bottlenecks.append(b)
        blend_running_statistics(stage.norm, mean, variance, pixels)
        norms = [stage.norm, *(norm for layer in stage.layers for norm in (layer.norm1, layer.norm2))]
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
        ctx.save_for_backward(x, maps, mean, variance, *parameters, *bottlenecks)
        ctx.stage, ctx.autocast = stage, _Autocast(x.device.type)
        gamma, beta = parameters[-2:]
        return F.avg_pool2d(_normalise(maps, mean, variance, gamma, beta, stage.norm.eps), stage.pool)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stage, (x, maps, mean, variance, *saved) = ctx.stage, ctx.saved_tensors
        parameters, bottlenecks = saved[: len(stage.parameters)], saved[len(stage.parameters) :]
        with ctx.autocast():
            if torch.is_grad_enabled():
                dx, *gradients = gradients_by_definition(eager_stage, gradient, x, stage, parameters)
            else:
                dx, *gradients = _gradients(stage, maps, mean, variance, parameters, bottlenecks, gradient)
        return dx, None, None, *gradients


def _gradients(
    stage: Stage,
    maps: Tensor,
    mean: Tensor,
    variance: Tensor,
    parameters: list[Tensor],
    bottlenecks: list[Tensor],
    gradient: Tensor,
) -> list[Tensor | None]:
    """Gradients of a stage's input and parameters."""
    images, channels, height, width = maps.shape
    pixels, growth = images * height * width, stage.growth_rate
    inverse = (variance + stage.norm.eps).rsqrt()
    gradients: list[Tensor | None] = [None] * len(parameters)
    # G of kernels/ALGEBRA.md, and its sums over pixels: of G, and of G (x - mean).
    map_gradient, map_sum, map_centred_sum = torch.zeros_like(maps), torch.zeros_like(mean), torch.zeros_like(mean)

    def norm_backward(position: int, a: Tensor, da: Tensor) -> None:
        """The way back from a, the ReLU of a batch norm of the first maps, of which `position` is gamma's."""
        gamma, reached = parameters[position], a.shape[1]
        dz = da.masked_fill_(a <= 0, 0)
        dbeta = dz.sum(dim=(0, 2, 3), dtype=mean.dtype)
        centred_sum = (maps[:, :reached] - _channels(mean[:reached])).mul_(dz).sum(dim=(0, 2, 3))
        map_gradient[:, :reached].addcmul_(dz, _channels(gamma))
        map_sum[:reached] += gamma * dbeta
        map_centred_sum[:reached] += gamma * centred_sum
        gradients[position : position + 2] = centred_sum * inverse[:reached], dbeta

    def finish(first: int, last: int) -> Tensor:
        """The gradient of maps whose consumers are all done."""
        part = slice(first, last)
        centred = maps[:, part] - _channels(mean[part])
        dx = _channels(inverse[part]) * (map_gradient[:, part] - _channels(map_sum[part] / pixels))
        dx -= centred.mul_(_channels(inverse[part] ** 3 * map_centred_sum[part] / pixels))
        return dx.to(maps.dtype)

    gamma, beta = parameters[-2:]
    a = _normalise(maps, mean, variance, gamma, beta, stage.norm.eps).requires_grad_()
    with torch.enable_grad():
        pooled = F.avg_pool2d(a, stage.pool)
    norm_backward(len(parameters) - 2, a, torch.autograd.grad(pooled, a, gradient)[0])
    del a, pooled
    for i in reversed(range(len(stage.layers))):
        channels -= growth
        layer, position = stage.layers[i], 6 * i
        gamma1, beta1, weight1, gamma2, beta2, weight2 = parameters[position : position + 6]
        a = _normalise(maps[:, :channels], mean, variance, gamma1, beta1, layer.norm1.eps)
        b = bottlenecks[i] if bottlenecks else F.conv2d(a, weight1)
        with torch.enable_grad():
            b, gamma2, beta2 = (tensor.detach().requires_grad_() for tensor in (b, gamma2, beta2))
            d = F.relu(F.batch_norm(b, None, None, gamma2, beta2, training=True, eps=layer.norm2.eps))
        dd, dweight2 = _conv_backward(d.detach(), weight2, finish(channels, channels + growth), padding=1)
        db, dgamma2, dbeta2 = torch.autograd.grad(d, [b, gamma2, beta2], dd)
        del b, d, dd
        da, dweight1 = _conv_backward(a, weight1, db, padding=0)
        del db
        gradients[position + 2 : position + 6] = dweight1, dgamma2, dbeta2, dweight2
        norm_backward(position, a, da)
    return [finish(0, channels), *gradients]


def _normalise(x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """ReLU(batch norm) of the first maps with statistics that are known; computed in the statistics' precision.

    Autocast does not widen the maps for it, as it would for the same in operators of arithmetic.
    """
    channels, wide = x.shape[1], mean.dtype
    gamma, beta = gamma.to(wide), beta.to(wide)
    return F.batch_norm(x, mean[:channels], variance[:channels], gamma, beta, training=False, eps=epsilon).relu_()


def _statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each map."""
    variance, mean = torch.var_mean(maps.to(_accumulated(maps.dtype)), dim=(0, 2, 3), correction=0)
    return mean, variance


def _conv_backward(x: Tensor, weight: Tensor, gradient: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and weight, in the precision that its input came in."""
    dx = conv2d_input(x.shape, weight.to(x.dtype), gradient, padding=padding)
    return dx, conv2d_weight(x, weight.shape, gradient, padding=padding).to(weight.dtype)


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
