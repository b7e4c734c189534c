"""DenseNet (Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, CVPR 2017).

One class for the ImageNet networks (Table 1) and the CIFAR/SVHN networks (Section 4.1 and Table 2). Module
and parameter names are torchvision's, so that state dictionaries pass between the two unchanged.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from pipeline.models.backends import BACKENDS, Backend
from pipeline.models.blueprint import remember
from pipeline.models.selection import Selection, Selector
from pipeline.models.stage import Layer, Stage, TrackedBatchNorm

if TYPE_CHECKING:  # networks need no pydantic
    from pipeline.config import ActivationCheckpointing

BOTTLENECK_WIDTH = 4  # a bottleneck gives 4k feature maps (Section 3, "Bottleneck layers")


class DenseLayer(nn.Sequential):
    """H_l: BN-ReLU-Conv(3x3), or with a bottleneck BN-ReLU-Conv(1x1)-BN-ReLU-Conv(3x3).

    Shape: (N, in_channels, H, W) -> (N, growth_rate, H, W), the new feature maps only.
    """

    def __init__(self, in_channels: int, growth_rate: int, bottleneck: bool, dropout: float):
        super().__init__()
        width = BOTTLENECK_WIDTH * growth_rate
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
            self._append_dropout("dropout1", dropout)
            self.norm2 = nn.BatchNorm2d(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
            self._append_dropout("dropout2", dropout)
        else:
            self.conv1 = nn.Conv2d(in_channels, growth_rate, kernel_size=3, padding=1, bias=False)
            self._append_dropout("dropout1", dropout)

    def _append_dropout(self, name: str, probability: float) -> None:
        if probability > 0:
            self.add_module(name, nn.Dropout(probability))


class DenseBlock(nn.Sequential):
    """`layers` dense layers; each sees the concatenation of the block's input and all earlier layers' maps.

    Shape: (N, in_channels, H, W) -> (N, in_channels + layers * growth_rate, H, W).
    """

    def __init__(self, layers: int, in_channels: int, growth_rate: int, bottleneck: bool, dropout: float):
        super().__init__()
        for i in range(layers):
            layer = DenseLayer(in_channels + i * growth_rate, growth_rate, bottleneck, dropout)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class Transition(nn.Sequential):
    """BN-ReLU-Conv(1x1)-AvgPool(2x2) between two dense blocks.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H // 2, W // 2).
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        if dropout > 0:
            self.dropout = nn.Dropout(dropout)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


remember(DenseLayer, DenseBlock, Transition)


class DenseNet(nn.Module):
    """A DenseNet. Shape: (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        growth_rate: k, the feature maps that each layer adds.
        block_sizes: dense layers in each block.
        stem: "imagenet" is a 7x7 convolution of stride 2 with BN, ReLU and 3x3 max pooling; "cifar" a 3x3 convolution.
        stem_channels: feature maps that enter the first block.
        bottleneck: put a 1x1 convolution with 4k outputs before each 3x3 convolution (DenseNet-B).
        compression: theta, the fraction of feature maps that a transition keeps (below 1: DenseNet-C).
        dropout: probability after every convolution but the stem's, where the authors' Torch code puts it.
        num_classes: outputs of the classifier.
        in_channels: of the images: 3, or 1 for gray ones.
        dense_block: who computes the dense blocks: "auto", "eager" (the modules), or a name in backends.py. What it cannot
            do right (dropout, frozen batch norms behind those that train, hooks, ...) the modules do. `selection` says who
            computed the last forward pass, and why.
        activation_checkpointing: the blocks whose bottleneck outputs a backend computes again in the backward pass.
    """

    selection: Selection | None = None

    def __init__(
        self,
        growth_rate: int,
        block_sizes: tuple[int, ...],
        stem: Literal["imagenet", "cifar"],
        stem_channels: int,
        bottleneck: bool = True,
        compression: float = 0.5,
        dropout: float = 0.0,
        num_classes: int = 1000,
        dense_block: str = "auto",
        activation_checkpointing: "ActivationCheckpointing" = "none",
        in_channels: int = 3,
    ):
        super().__init__()
        self.dense_block, self.activation_checkpointing = dense_block, activation_checkpointing
        self.block_count = len(block_sizes)
        self.features = nn.Sequential(_stem(stem, in_channels, stem_channels))
        channels = stem_channels
        for i, layers in enumerate(block_sizes, start=1):
            block = DenseBlock(layers, channels, growth_rate, bottleneck, dropout)
            self.features.add_module(f"denseblock{i}", block)
            channels += layers * growth_rate
            if i < len(block_sizes):
                kept = math.floor(channels * compression)
                self.features.add_module(f"transition{i}", Transition(channels, kept, dropout))
                channels = kept
        # torchvision calls the norm after the last of its four blocks so; the name serves any number of blocks.
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self._selector = Selector(self.features)
        self.classifier = nn.Linear(channels, num_classes)
        if not self.classifier.weight.is_meta:  # else there is nothing to draw, for which torch would load its compiler
            draw_weights(self)

    @contextmanager
    def selection_held(self) -> Iterator[None]:
        """While it is entered, a backend is selected again for another mode, device, dtype or autocast only.

        Without it every forward pass compares all modules with what they were. The caller sees to it that nobody changes
        the modules or their attributes.
        """
        self._selector.hold()
        try:
            yield
        finally:
            self._selector.held = False

    def forward(self, x: Tensor) -> Tensor:
        # Not read back from `self`, where another thread that shares the network may have put its own.
        selection = self.selection = self._selector.select(self.features, x, self.dense_block)
        if selection.method == "eager":
            x = torch.relu(self.features(x))
            x = x.mean(dim=(2, 3))  # global average pooling
        else:
            x = self._by_stages(x, BACKENDS[selection.method])
        return self.classifier(x)

    def _by_stages(self, x: Tensor, backend: Backend) -> Tensor:
        """What `forward` does up to the classifier, with a transition's pooling before its 1x1 convolution.

        Their order does not matter: the pooling is linear within a channel, the convolution within a pixel.
        """
        features = self.features
        x = features.get_submodule("conv0")(x)
        if hasattr(features, "norm0"):
            _check_values(_tracked(features.norm0), x)
            x = backend.stem(x, _tracked(features.norm0))
        for i in range(1, self.block_count + 1):
            block = cast("Iterable[DenseLayer]", features.get_submodule(f"denseblock{i}"))
            transition = features.get_submodule(f"transition{i}") if i < self.block_count else None
            norm, pool = (transition.norm, (2, 2)) if transition else (features.norm5, (x.shape[2], x.shape[3]))
            _check_values(_tracked(norm), x)
            if transition and min(x.shape[2:]) < 2:
                raise ValueError(f"a transition cannot halve maps of {x.shape[2]}x{x.shape[3]}")
            layers = tuple(
                Layer(_tracked(layer.norm1), layer.conv1, _tracked(layer.norm2), layer.conv2) for layer in block
            )
            recompute = self.activation_checkpointing == "all" or (self.activation_checkpointing == "first" and i == 1)
            x = backend.stage(x, Stage(layers, _tracked(norm), pool, recompute))
            if transition:
                x = transition.get_submodule("conv")(x)
        return x.flatten(1)


def _check_values(norm: nn.BatchNorm2d, x: Tensor) -> None:
    """
    Raises:
        ValueError: the norm takes statistics of a single value a channel, as torch's own refuses.
    """
    if norm.training and x.numel() == x.shape[1]:
        raise ValueError(f"batch norm in training needs more than one value a channel, got maps {tuple(x.shape)}")


def draw_weights(network: nn.Module) -> None:
    """Draw weights as the authors' Torch code does: fan-out for convolutions, where torchvision has fan-in."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)


def _tracked(norm: Tensor | nn.Module) -> TrackedBatchNorm:
    """A batch norm of a network that a backend computes; the selection has seen that it is as it was built."""
    return cast("TrackedBatchNorm", norm)


def _stem(kind: Literal["imagenet", "cifar"], in_channels: int, channels: int) -> OrderedDict[str, nn.Module]:
    if kind == "cifar":
        return OrderedDict(conv0=nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False))
    return OrderedDict(
        conv0=nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(channels),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
