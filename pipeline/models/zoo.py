"""The networks by name: those of the paper, others of its family by depth and growth rate, MSDNets by their number of blocks
or layers, and timm's as ``timm:NAME``."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.errors import UserError, did_you_mean, first_line
from pipeline.models import backends
from pipeline.models.densenet import DenseNet
from pipeline.models.msdnet import CIFAR_CLASSIFIER_WIDTH, MSDNet, even_blocks, growing_blocks

if TYPE_CHECKING:  # networks need no pydantic
    from pipeline.config import ActivationCheckpointing, ModelConfig


def _imagenet(*block_sizes: int, growth_rate: int = 32) -> dict[str, Any]:
    """Table 1: DenseNet-BC with compression 0.5 and 2k stem channels."""
    return dict(growth_rate=growth_rate, block_sizes=block_sizes, stem="imagenet", stem_channels=2 * growth_rate)


_CIFAR_NAME = re.compile(r"densenet(?:_(?P<kind>b|c|bc))?(?P<depth>\d{1,4})_k(?P<growth_rate>\d{1,4})")


def cifar_densenet(name: str) -> dict[str, Any] | None:
    """The arguments of the network for CIFAR and SVHN of this name, None if it is none such (Section 4.1).

    ``densenet_bc100_k12`` has depth L=100 and growth rate k=12, bottlenecks (b) and compression 0.5 (c), where
    ``densenet100_k12`` has neither. The depth counts the convolutions and the classifier; three blocks share it equally.

    Raises:
        UserError: no network has that depth.
    """
    match = _CIFAR_NAME.fullmatch(name)
    if not match:
        return None
    kind, depth, growth_rate = match["kind"] or "", int(match["depth"]), int(match["growth_rate"])
    layers, rest = divmod(depth - 4, 6 if "b" in kind else 3)
    if layers < 1 or rest or not growth_rate:
        step = 6 if "b" in kind else 3
        raise UserError(
            f"model.name: there is no network '{name}': its depth must be 4 + {step} times the layers of a block, as "
            f"{4 + step * max(1, layers)}, and its growth rate at least 1"
        )
    return dict(
        growth_rate=growth_rate,
        block_sizes=(layers,) * 3,
        stem="cifar",
        stem_channels=2 * growth_rate if kind == "bc" else 16,
        bottleneck="b" in kind,
        compression=0.5 if "c" in kind else 1.0,
    )


CIFAR_NETWORKS = (
    "densenet40_k12", "densenet100_k12", "densenet100_k24", "densenet_bc100_k12", "densenet_bc250_k24", "densenet_bc190_k40",
)  # fmt: skip


def _known_cifar_densenet(name: str) -> dict[str, Any]:
    spec = cifar_densenet(name)
    assert spec is not None, name
    return spec


DENSENETS: dict[str, dict[str, Any]] = {
    "densenet121": _imagenet(6, 12, 24, 16),
    "densenet161": _imagenet(6, 12, 36, 24, growth_rate=48),
    "densenet169": _imagenet(6, 12, 32, 32),
    "densenet201": _imagenet(6, 12, 48, 32),
    "densenet264": _imagenet(6, 12, 64, 48),
    **{name: _known_cifar_densenet(name) for name in CIFAR_NETWORKS},
    "densenet_bc40_k12": _known_cifar_densenet("densenet_bc40_k12"),  # not in the paper: small enough for the demo
}

_MSDNET_NAME = re.compile(r"msdnet_(?P<kind>cifar|cifar_budget|imagenet)_(?P<number>\d{1,3})")
MSDNETS = (
    "msdnet_cifar_7", "msdnet_cifar_10", "msdnet_cifar_budget_5", "msdnet_cifar_budget_7",
    "msdnet_imagenet_4", "msdnet_imagenet_6", "msdnet_imagenet_7",
)  # fmt: skip


def msdnet(name: str) -> dict[str, Any] | None:
    """The arguments of the MSDNet of this name, None if it is none.

    ``msdnet_cifar_10`` has ten blocks, of 4 layers and then 2 each, for answers at any time; ``msdnet_cifar_budget_5`` five
    of 1 to 5 layers, for a budget; ``msdnet_imagenet_7`` five of 7 layers each. An exit stands after each block.

    Raises:
        UserError: there is none so small.
    """
    match = _MSDNET_NAME.fullmatch(name)
    if not match:
        return None
    kind, number = match["kind"], int(match["number"])
    if number < 2:
        raise UserError(f"model.name: there is no network '{name}': the smallest is msdnet_{kind}_2")
    if kind == "imagenet":
        return dict(
            block_sizes=even_blocks(number, number, 5),
            growth_rate=16,
            factors=(1, 2, 4, 4),
            bottleneck_factors=(1, 2, 4, 4),
            stem="imagenet",
            stem_channels=32,
            classifier_width=None,
        )
    return dict(
        block_sizes=even_blocks(4, 2, number) if kind == "cifar" else growing_blocks(1, 1, number),
        growth_rate=6,
        factors=(1, 2, 4),
        bottleneck_factors=(1, 2, 4),
        stem="cifar",
        stem_channels=16,
        classifier_width=CIFAR_CLASSIFIER_WIDTH,
    )


NETWORKS: dict[str, Callable[..., nn.Module]] = {}
"""Networks of other kinds by name; each takes num_classes, dropout, dense_block and activation_checkpointing, and, to serve
gray images, in_channels."""


def create_model(
    name: str,
    num_classes: int = 1000,
    dropout: float = 0.0,
    dense_block: str = "auto",
    activation_checkpointing: "ActivationCheckpointing" = "none",
    drop_path: float = 0.0,
    in_channels: int = 3,
) -> nn.Module:
    """Build a network with freshly drawn weights from torch's global generator.

    Args:
        name: a key of `DENSENETS`, a name that `cifar_densenet` or `msdnet` knows, or ``timm:NAME`` for any of timm's models.
        dense_block: who computes the dense blocks of our own networks (backends.py); timm's networks do not use it.
        activation_checkpointing: the blocks whose bottlenecks are computed again in the backward pass, likewise.
        drop_path: stochastic depth of timm's networks.
        in_channels: of the images: 3, or 1 for gray ones.

    Raises:
        UserError: there is no such network or `dense_block`; or the network has no stochastic depth.
    """
    backends.candidates(dense_block)
    if name.startswith("timm:"):
        return _create_timm_model(name.removeprefix("timm:"), num_classes, dropout, drop_path, in_channels)
    if drop_path:
        raise UserError(f"model.drop_path is for timm's networks, and model.name is {name}: leave it out")
    if name in NETWORKS:
        return NETWORKS[name](
            num_classes=num_classes,
            dropout=dropout,
            dense_block=dense_block,
            activation_checkpointing=activation_checkpointing,
            **({} if in_channels == 3 else {"in_channels": in_channels}),
        )
    if arguments := msdnet(name):
        asked = {"dropout": dropout, "dense_block": dense_block, "activation_checkpointing": activation_checkpointing}
        for field, value in asked.items():
            if value not in (0, "auto", "eager", "none"):
                raise UserError(f"model.{field} is {value}, which {name} does not know: leave it out")
        return MSDNet(**arguments, num_classes=num_classes, in_channels=in_channels)
    spec = DENSENETS.get(name) or cifar_densenet(name)
    if spec is None:
        nearest = did_you_mean(name, [*DENSENETS, *MSDNETS])
        raise UserError(
            f"model.name: there is no network '{name}'{nearest}; choose {', '.join(DENSENETS)}, another depth or growth "
            f"rate of the latter kinds, {', '.join(MSDNETS)}, or timm:NAME"
        )
    return DenseNet(
        **spec,
        dropout=dropout,
        num_classes=num_classes,
        dense_block=dense_block,
        activation_checkpointing=activation_checkpointing,
        in_channels=in_channels,
    )


def refuse_what_is_ignored(config: "ModelConfig") -> None:
    """For a run that begins: weights of before may have a field that did nothing.

    Raises:
        UserError: names the field.
    """
    if not config.name.startswith("timm:"):
        return
    given = {
        "dense_block": config.dense_block not in ("auto", "eager"),
        "activation_checkpointing": config.activation_checkpointing != "none",
    }
    for field in (field for field, does_nothing in given.items() if does_nothing):
        raise UserError(f"model.{field} is for our own networks, and model.name is {config.name}: leave it out")


def create_network(config: "ModelConfig", num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build the network that a configuration names, with freshly drawn weights; see `create_model`."""
    return create_model(
        config.name,
        num_classes=num_classes,
        dropout=config.dropout,
        dense_block=config.dense_block,
        activation_checkpointing=config.activation_checkpointing,
        drop_path=config.drop_path,
        in_channels=in_channels,
    )


def _create_timm_model(name: str, num_classes: int, dropout: float, drop_path: float, in_channels: int) -> nn.Module:
    import timm  # takes seconds to import

    if "." in name:
        raise UserError(
            f"model.name: 'timm:{name}' names pretrained weights: take timm:{name.partition('.')[0]} to train from random "
            f"weights, with --model.weights timm:{name} from those, or evaluate a file of them with tools.evaluate --model"
        )
    if not timm.is_model(name):
        raise UserError(f"model.name: timm has no model '{name}'{did_you_mean(name, timm.list_models())}")
    try:
        depth: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}  # which not all of them take
        return timm.create_model(name, num_classes=num_classes, drop_rate=dropout, in_chans=in_channels, **depth)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"model.name: timm cannot build '{name}': {first_line(error)}") from None
