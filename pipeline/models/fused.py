"""The fused dense block: C++ kernels for CPU that compute batch norm and ReLU inside the convolutions.

In float32, float64 or bfloat16. The latter is mixed precision, as under torch's autocast: maps and their gradients are in
bfloat16, parameters, their gradients, statistics and sums in float32.

It keeps for the backward pass: the maps of a block once, its input once more (for second derivatives), their batch
statistics, and each bottleneck's output unless that is recomputed. The formulas are in kernels/ALGEBRA.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pipeline.models import kernels
from pipeline.models.kernels import BatchNorm, call, computing_dtype, vector_lanes
from pipeline.models.stage import (
    Stage,
    TrackedBatchNorm,
    eager_stage,
    eager_stem,
    gradients_by_definition,
    update_running_statistics,
)

AUTOMATIC = True
FROZEN_PARTS = True

# Of the convolutions that torch computes, and of the 3x3 ones, whose weight is copied into the kernels' order.
_ANY_STRIDES = ("conv0.weight", "conv.weight", "conv2.weight")
_empty = functools.partial(torch.empty, device="cpu")  # whatever the default device is


def refusal(device: torch.device) -> str:
    return ""


def unsupported(features: nn.Module, x: Tensor) -> str:
    if x.device.type != "cpu":
        return "the kernels are for CPU"
    dtypes = set()
    for name, tensor in (*features.named_parameters(), *features.named_buffers()):
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}"
        if tensor.layout is not torch.strided:
            return f"{name} is not dense"
        if not tensor.is_contiguous() and not name.endswith(_ANY_STRIDES):
            return f"{name} is not contiguous"
        if tensor.is_neg():
            return f"{name} is a negated view"
        if tensor.is_floating_point() or tensor.is_complex():
            dtypes.add(tensor.dtype)
    return _unsupported_dtypes(x.dtype, dtypes) or kernels.unavailable_reason() or ""


def _unsupported_dtypes(images: torch.dtype, parameters: set[torch.dtype]) -> str:
    autocast = torch.is_autocast_enabled("cpu")
    if torch.float16 in parameters or (autocast and torch.get_autocast_dtype("cpu") is torch.float16):
        return "the kernels have no float16"
    if autocast and images is not torch.float64 and parameters in ({torch.float32}, {torch.bfloat16}):
        return ""  # the first convolution gives maps in bfloat16
    if autocast or parameters != {images} or images not in kernels.SUFFIXES:
        return "the kernels take images and parameters in float32, in float64 or in bfloat16"
    return ""


def stem(x: Tensor, norm: TrackedBatchNorm) -> Tensor:
    dtype = computing_dtype(x.dtype)
    return _Stem.apply(
        x.contiguous(memory_format=torch.channels_last), norm, norm.weight.to(dtype), norm.bias.to(dtype)
    )


def stage(x: Tensor, stage: Stage) -> Tensor:
    keep = torch.is_grad_enabled() and stage.norm.training and not stage.recompute
    parameters = [parameter.to(computing_dtype(x.dtype)) for parameter in stage.parameters]
    return _Stage.apply(x.contiguous(memory_format=torch.channels_last), stage, keep, *parameters)


def _gradients_by_definition(eager: Callable[..., Tensor], gradient: Tensor, x: Tensor, *arguments: Any) -> list[Any]:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.bfloat16, cache_enabled=False):
        return gradients_by_definition(eager, gradient, x, *arguments)


class _Stem(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, norm: TrackedBatchNorm, gamma: Tensor, beta: Tensor) -> Tensor:
        images, channels, height, width = y.shape
        mean, variance = norm.running_mean.to(gamma.dtype), norm.running_var.to(gamma.dtype)
        if norm.training:
            mean, variance = _empty(2, channels, dtype=gamma.dtype)
            pixels = images * height * width
            call("copy_and_measure", y.dtype, y, pixels, channels, None, 0, mean, variance)
            update_running_statistics(norm, mean, variance, pixels)
        shape = (images, channels, (height + 1) // 2, (width + 1) // 2)
        out = _empty(shape, dtype=y.dtype, memory_format=torch.channels_last)
        argmax = _empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        batch_norm = BatchNorm(mean, variance, gamma, beta, norm.eps)
        call("stem_forward", y.dtype, y, images, height, width, channels, batch_norm, out, argmax)
        ctx.save_for_backward(y, gamma, beta, mean, variance, argmax)
        ctx.norm = norm
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, gamma, beta, mean, variance, argmax = ctx.saved_tensors
        y, argmax = (
            saved.contiguous(memory_format=torch.channels_last) for saved in (y, argmax)
        )  # hooks may change it
        if torch.is_grad_enabled():
            dy, *others = _gradients_by_definition(eager_stem, gradient, y, ctx.norm, (gamma, beta))
            return dy, None, *others
        images, channels, height, width = y.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        dy, dgamma, dbeta = torch.empty_like(y), torch.empty_like(gamma), torch.empty_like(beta)
        batch_norm = BatchNorm(mean, variance, gamma, beta, ctx.norm.eps)
        call(
            "stem_backward", y.dtype, y, images, height, width, channels, batch_norm, gradient, argmax,
            dy, dgamma, dbeta,
        )  # fmt: skip
        return dy, None, dgamma, dbeta


class _Stage(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Stage, keep: bool, *parameters: Tensor) -> Tensor:
        dtype, sizes = x.dtype, _Sizes(x, stage)
        images, height, width, pixels = sizes.images, sizes.height, sizes.width, sizes.pixels
        maps = _empty(pixels, sizes.row, dtype=dtype)
        mean, variance = _empty(2, sizes.channels_out, dtype=computing_dtype(dtype))
        training = stage.norm.training

        def batch_norm(
            norm: TrackedBatchNorm, batch_mean: Tensor, batch_variance: Tensor, gamma: Tensor, beta: Tensor
        ) -> BatchNorm:
            if not training:
                running = norm.running_mean.to(gamma.dtype), norm.running_var.to(gamma.dtype)
                return BatchNorm(*running, gamma, beta, norm.eps)
            channels = norm.num_features
            update_running_statistics(norm, batch_mean[:channels], batch_variance[:channels], pixels)
            return BatchNorm(batch_mean, batch_variance, gamma, beta, norm.eps)

        def measured(tensor: Tensor) -> Tensor | None:
            return tensor if training else None

        channels = sizes.channels_in
        call("copy_and_measure", dtype, x, pixels, channels, maps, sizes.row, measured(mean), measured(variance))
        bottleneck, bottlenecks, statistics = None, [], []
        for i, layer in enumerate(stage.layers):
            gamma1, beta1, weight1, gamma2, beta2, weight2 = parameters[6 * i : 6 * i + 6]
            if keep or bottleneck is None:
                bottleneck = _empty(pixels, sizes.bottleneck_row, dtype=dtype)
            mean2, variance2 = _empty(2, sizes.bottleneck, dtype=mean.dtype)
            weight2 = weight2.permute(2, 3, 1, 0).contiguous()
            call(
                "bottleneck_forward", dtype, maps, sizes.row, pixels, channels,
                batch_norm(layer.norm1, mean, variance, gamma1, beta1), weight1, sizes.bottleneck,
                bottleneck, measured(mean2), measured(variance2),
            )  # fmt: skip
            call(
                "conv3x3_forward", dtype, bottleneck, images, height, width, sizes.bottleneck,
                batch_norm(layer.norm2, mean2, variance2, gamma2, beta2), weight2, sizes.growth,
                maps[:, channels:], sizes.row, measured(mean[channels:]), measured(variance[channels:]),
            )  # fmt: skip
            channels += sizes.growth
            statistics += [mean2, variance2]
            if keep:
                bottlenecks.append(bottleneck)
        shape = (images, channels, height // stage.pool[0], width // stage.pool[1])
        out = _empty(shape, dtype=dtype, memory_format=torch.channels_last)
        last_norm = batch_norm(stage.norm, mean, variance, *parameters[-2:])
        call("pool_forward", dtype, maps, sizes.row, images, height, width, channels, last_norm, *stage.pool, out)

        ctx.save_for_backward(x, maps, mean, variance, *parameters, *statistics, *bottlenecks)
        ctx.stage = stage
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stage, saved = ctx.stage, ctx.saved_tensors
        x, maps, mean, variance = saved[:4]
        layers = len(stage.layers)
        parameters, statistics, bottlenecks = (
            saved[4 : 6 + 6 * layers],
            saved[6 + 6 * layers : 6 + 8 * layers],
            saved[6 + 8 * layers :],
        )
        if torch.is_grad_enabled():
            dx, *others = _gradients_by_definition(eager_stage, gradient, x, stage, parameters)
            return dx, None, None, *others
        dtype, sizes = x.dtype, _Sizes(x, stage)
        images, height, width, pixels, growth = sizes.images, sizes.height, sizes.width, sizes.pixels, sizes.growth
        gradients = [torch.empty_like(parameter) for parameter in parameters]
        for i in range(5, len(parameters), 6):  # the kernel writes 3x3 weights as [3][3][in][out]
            gradients[i] = _empty(3, 3, sizes.bottleneck, sizes.growth, dtype=mean.dtype).permute(3, 2, 0, 1)
        map_gradient = torch.empty_like(maps)
        # The sums over pixels of map_gradient, and of it times (x - mean), of each map.
        map_sum, map_centred_sum = _empty(2, sizes.channels_out, dtype=torch.float64)
        new_gradient = _empty(pixels, sizes.growth_row, dtype=dtype)
        dz = _empty(pixels, sizes.bottleneck_row, dtype=dtype)
        recomputed = None if bottlenecks else torch.empty_like(dz)
        sum2, centred_sum2 = _empty(2, sizes.bottleneck, dtype=torch.float64)

        def finish_gradient(first: int, channels: int, out: Tensor, row: int) -> None:
            norm = BatchNorm(mean[first:], variance[first:], None, None, stage.norm.eps)
            call(
                "finish_gradient", dtype, map_gradient[:, first:], maps[:, first:], sizes.row, pixels, channels, norm,
                map_sum[first:], map_centred_sum[first:], out, row,
            )  # fmt: skip

        gamma, beta = parameters[-2:]
        last_norm = BatchNorm(mean, variance, gamma, beta, stage.norm.eps)
        call(
            "pool_backward", dtype, maps, map_gradient, sizes.row, images, height, width, sizes.channels_out, last_norm,
            *stage.pool, gradient.contiguous(memory_format=torch.channels_last), *gradients[-2:],
            map_sum, map_centred_sum,
        )  # fmt: skip
        channels = sizes.channels_out
        for i in reversed(range(layers)):
            channels -= growth
            layer = stage.layers[i]
            gamma1, beta1, weight1, gamma2, beta2, weight2 = parameters[6 * i : 6 * i + 6]
            dgamma1, dbeta1, dweight1, dgamma2, dbeta2, dweight2 = gradients[6 * i : 6 * i + 6]
            norm1 = BatchNorm(mean, variance, gamma1, beta1, layer.norm1.eps)
            mean2, variance2 = statistics[2 * i : 2 * i + 2]
            norm2 = BatchNorm(mean2, variance2, gamma2, beta2, layer.norm2.eps)
            if recomputed is None:
                bottleneck = bottlenecks[i]
            else:
                bottleneck = recomputed
                call(
                    "bottleneck_forward", dtype, maps, sizes.row, pixels, channels, norm1, weight1, sizes.bottleneck,
                    bottleneck, None, None,
                )  # fmt: skip
            finish_gradient(channels, growth, new_gradient, sizes.growth_row)
            call(
                "conv3x3_backward", dtype, bottleneck, images, height, width, sizes.bottleneck,
                norm2, weight2.permute(2, 3, 0, 1).contiguous(), growth, new_gradient, dz, dweight2.permute(2, 3, 1, 0),
                sum2, centred_sum2,
            )  # fmt: skip
            call(
                "bottleneck_backward", dtype, dz, bottleneck, pixels, sizes.bottleneck, norm2, sum2, centred_sum2,
                dgamma2, dbeta2, maps, map_gradient, sizes.row, channels, norm1, weight1, dweight1, dgamma1, dbeta1,
                map_sum, map_centred_sum,
            )  # fmt: skip
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        finish_gradient(0, sizes.channels_in, dx, sizes.channels_in)
        return dx, None, None, *gradients


class _Sizes:
    """The sizes of a stage; rows are lengths of the kernels' matrices, in whole vectors."""

    def __init__(self, x: Tensor, stage: Stage):
        self.images, self.channels_in, self.height, self.width = x.shape
        self.pixels = self.images * self.height * self.width
        self.growth = stage.growth_rate
        self.bottleneck = stage.layers[0].conv1.out_channels
        self.channels_out = self.channels_in + len(stage.layers) * self.growth
        lanes = vector_lanes(x.dtype)
        self.row, self.growth_row, self.bottleneck_row = (
            -(-channels // lanes) * lanes for channels in (self.channels_out, self.growth, self.bottleneck)
        )
