"""MSDNet (Huang et al.: Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018).

Each layer has feature maps at several scales, so that coarse ones, which a classifier needs, are there from the first layer
on. A classifier stands after each block: an answer can be had early, and easy images need no more than that. Module and
parameter names are those of kalviny/MSDNet-PyTorch, so that state dictionaries pass between the two unchanged.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from pipeline.models.densenet import draw_weights

CIFAR_CLASSIFIER_WIDTH = 128

Maps = list[Tensor]
"""Feature maps of n images, from the finest scale to the coarsest: (n, channels, side, side) each."""


def even_blocks(base: int, step: int, blocks: int) -> tuple[int, ...]:
    """Layers of each block: `base`, then `step` in each further one."""
    return (base, *[step] * (blocks - 1))


def growing_blocks(base: int, step: int, blocks: int) -> tuple[int, ...]:
    """Layers of each block: `base`, then `step` more in each further one than in the one before."""
    return (base, *(step * i + 1 for i in range(1, blocks)))


class Convolution(nn.Module):
    """Convolution-BN-ReLU, one after another for each of `widths`: a 1x1 bottleneck is one of them.

    Shape: (n, in_channels, H, W) -> (n, widths[-1], H / stride, W / stride), rounded up. The last convolution has the stride.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], kernel_sizes: Sequence[int], stride: int = 1):
        super().__init__()
        self.net = nn.Sequential()
        for i, (width, size) in enumerate(zip(widths, kernel_sizes, strict=True), start=1):
            own_stride = stride if i == len(widths) else 1
            self.net.append(nn.Conv2d(in_channels, width, size, own_stride, padding=size // 2, bias=False))
            self.net.append(nn.BatchNorm2d(width))
            self.net.append(nn.ReLU(inplace=True))
            in_channels = width

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _bottleneck(in_channels: int, out_channels: int, factor: int, stride: int = 1) -> Convolution:
    """1x1 to at most `factor` times the outputs, then 3x3."""
    return Convolution(in_channels, (min(in_channels, factor * out_channels), out_channels), (1, 3), stride)


class FinestScale(nn.Module):
    """A layer at the finest scale that it has: what is there, and the new maps."""

    def __init__(self, in_channels: int, new: int, factor: int):
        super().__init__()
        self.conv_normal = _bottleneck(in_channels, new, factor)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv_normal(x)], dim=1)


class CoarserScale(nn.Module):
    """A layer at a further scale: what is there, then new maps, one half from the next finer scale and one from this."""

    def __init__(self, finer_channels: int, in_channels: int, new: int, finer_factor: int, factor: int):
        super().__init__()
        self.conv_down = _bottleneck(finer_channels, new // 2, finer_factor, stride=2)
        self.conv_normal = _bottleneck(in_channels, new // 2, factor)

    def forward(self, finer: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv_down(finer), self.conv_normal(x)], dim=1)


class Stem(nn.Module):
    """The first layer: all scales of the images, each from the one before."""

    def __init__(self, kind: Literal["imagenet", "cifar"], in_channels: int, channels: int, factors: Sequence[int]):
        super().__init__()
        width = channels * factors[0]
        first: nn.Module = Convolution(in_channels, (width,), (3,))
        if kind == "imagenet":
            first = nn.Sequential(
                nn.Conv2d(in_channels, width, 7, stride=2, padding=3),  # with a bias, as published counts have it
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        self.layers = nn.ModuleList([first])
        for factor in factors[1:]:
            self.layers.append(Convolution(width, (channels * factor,), (3,), stride=2))
            width = channels * factor

    def forward(self, x: Tensor) -> Maps:
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


class Layer(nn.Module):
    """A layer of several scales, which may drop the finest of the scales that it gets.

    Args:
        channels: of the maps at a scale of factor 1.
        factors, bottleneck_factors: of the scales that it gets.
        drops: the finest is only read.
    """

    def __init__(
        self,
        channels: int,
        growth_rate: int,
        factors: Sequence[int],
        bottleneck_factors: Sequence[int],
        drops: bool,
    ):
        super().__init__()
        self.drops = drops
        self.layers = nn.ModuleList()
        if not drops:
            self.layers.append(FinestScale(channels * factors[0], growth_rate * factors[0], bottleneck_factors[0]))
        for s in range(1, len(factors)):
            self.layers.append(
                CoarserScale(
                    channels * factors[s - 1],
                    channels * factors[s],
                    growth_rate * factors[s],
                    bottleneck_factors[s - 1],
                    bottleneck_factors[s],
                )
            )

    def forward(self, maps: Maps) -> Maps:
        inputs = itertools.pairwise(maps)  # of each coarser scale: the next finer one, and itself
        if self.drops:
            return [layer(*pair) for layer, pair in zip(self.layers, inputs, strict=True)]
        finest, *coarser = self.layers
        return [finest(maps[0]), *(layer(*pair) for layer, pair in zip(coarser, inputs, strict=True))]


class Transition(nn.Module):
    """1x1 convolution-BN-ReLU at each scale, which leaves fewer channels."""

    def __init__(self, channels: int, kept: int, factors: Sequence[int]):
        super().__init__()
        self.m = nn.ModuleList(Convolution(channels * factor, (kept * factor,), (1,)) for factor in factors)

    def forward(self, maps: Maps) -> Maps:
        return [convolution(x) for convolution, x in zip(self.m, maps, strict=True)]


class Classifier(nn.Module):
    """An exit: two 3x3 convolutions of stride 2 on the coarsest scale, average pooling, linear.

    The pooling is over the whole map, which has 2x2 pixels for the images that the networks are made for.
    """

    def __init__(self, channels: int, width: int, num_classes: int):
        super().__init__()
        self.m = nn.Sequential(
            Convolution(channels, (width,), (3,), stride=2),
            Convolution(width, (width,), (3,), stride=2),
            nn.AdaptiveAvgPool2d(1),
        )
        self.linear = nn.Linear(width, num_classes)

    def forward(self, maps: Maps) -> Tensor:
        return self.linear(self.m(maps[-1]).flatten(1))


class MSDNet(nn.Module):
    """A multi-scale DenseNet. Shape: (n, in_channels, H, W) -> logits (n, num_classes) of each exit, the first exit first.

    Args:
        block_sizes: layers of each block, after which an exit stands.
        growth_rate: feature maps that a layer adds at a scale of factor 1.
        factors: of the numbers of feature maps at each scale, the finest first.
        bottleneck_factors: a bottleneck has at most so many times the outputs of its 3x3 convolution, by the scale it reads.
        stem: "imagenet" is a 7x7 convolution of stride 2 with 3x3 max pooling; "cifar" a 3x3 convolution.
        stem_channels: feature maps that the stem gives at a scale of factor 1.
        classifier_width: of an exit's convolutions; None for that of the maps which come in.
        num_classes: outputs of each exit.
        in_channels: of the images.

    Raises:
        ValueError: there are too few layers to drop all scales but the coarsest, so that no exit would read some maps.
    """

    def __init__(
        self,
        block_sizes: Sequence[int],
        growth_rate: int,
        factors: Sequence[int],
        bottleneck_factors: Sequence[int],
        stem: Literal["imagenet", "cifar"],
        stem_channels: int,
        classifier_width: int | None,
        num_classes: int = 1000,
        in_channels: int = 3,
    ):
        super().__init__()
        self.stem_kind = stem
        self.blocks, self.classifier = nn.ModuleList(), nn.ModuleList()
        layers, channels = sum(block_sizes), stem_channels
        if _scales_after(layers, layers, len(factors)) != 1:
            raise ValueError(
                f"with {layers} layers no exit reads the finer scales of the last one: another number is needed"
            )
        ends = list(itertools.accumulate(block_sizes))
        for size, end in zip(block_sizes, ends, strict=True):
            block = nn.Sequential()
            if not self.blocks:
                block.append(Stem(stem, in_channels, stem_channels, factors))
            for number in range(end - size + 1, end + 1):
                before = _scales_after(max(number - 1, 1), layers, len(factors))
                after = _scales_after(number, layers, len(factors))
                block.append(
                    Layer(channels, growth_rate, factors[-before:], bottleneck_factors[-before:], drops=after < before)
                )
                channels += growth_rate
                if after < before:
                    kept = channels // 2
                    block.append(Transition(channels, kept, factors[-after:]))
                    channels = kept
            self.blocks.append(block)
            last = channels * factors[-1]
            self.classifier.append(Classifier(last, classifier_width or last, num_classes))
        if not cast("Classifier", self.classifier[0]).linear.weight.is_meta:
            draw_weights(self)

    @property
    def exits(self) -> int:
        """How many answers it gives."""
        return len(self.classifier)

    def first_exits(self, exits: int) -> "MSDNet":
        """The network up to an exit, counted from 1, with the same parameters."""
        part = copy.copy(self)
        part._modules = dict(self._modules)
        part.blocks, part.classifier = self.blocks[:exits], self.classifier[:exits]
        return part

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        answers = []
        for block, classifier in zip(self.blocks, self.classifier, strict=True):
            x = block(x)
            answers.append(classifier(x))
        return tuple(answers)


def _scales_after(number: int, layers: int, scales: int) -> int:
    """How many scales layer `number` gives, counted from 1: the finest is dropped after each S-th part of the layers."""
    return scales - (number - 1) // math.ceil(layers / scales)
