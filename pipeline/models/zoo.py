"""The networks by name: those of the paper, and timm's as ``timm:NAME``."""

from typing import Any

from torch import nn

from pipeline.config import DenseBlock, Recompute
from pipeline.errors import UserError, did_you_mean
from pipeline.models.densenet import DenseNet


def _imagenet(*block_sizes: int, growth_rate: int = 32) -> dict[str, Any]:
    """Table 1: DenseNet-BC with compression 0.5 and 2k stem channels."""
    return dict(growth_rate=growth_rate, block_sizes=block_sizes, stem="imagenet", stem_channels=2 * growth_rate)


def _cifar(depth: int, growth_rate: int, bc: bool = False) -> dict[str, Any]:
    """Section 4.1: three blocks of equal depth; `depth` counts convolutions and the classifier."""
    layers = (depth - 4) // (6 if bc else 3)
    return dict(
        growth_rate=growth_rate,
        block_sizes=(layers,) * 3,
        stem="cifar",
        stem_channels=2 * growth_rate if bc else 16,
        bottleneck=bc,
        compression=0.5 if bc else 1.0,
    )


DENSENETS: dict[str, dict[str, Any]] = {
    "densenet121": _imagenet(6, 12, 24, 16),
    "densenet161": _imagenet(6, 12, 36, 24, growth_rate=48),
    "densenet169": _imagenet(6, 12, 32, 32),
    "densenet201": _imagenet(6, 12, 48, 32),
    "densenet264": _imagenet(6, 12, 64, 48),
    "densenet40_k12": _cifar(40, 12),
    "densenet100_k12": _cifar(100, 12),
    "densenet100_k24": _cifar(100, 24),
    "densenet_bc100_k12": _cifar(100, 12, bc=True),
    "densenet_bc250_k24": _cifar(250, 24, bc=True),
    "densenet_bc190_k40": _cifar(190, 40, bc=True),
    "densenet_bc40_k12": _cifar(40, 12, bc=True),  # not in the paper: small enough for the demo
}


def create_model(
    name: str,
    num_classes: int = 1000,
    dropout: float = 0.0,
    dense_block: DenseBlock = "auto",
    recompute: Recompute = "none",
) -> nn.Module:
    """Build a network with freshly drawn weights from torch's global generator.

    Args:
        name: a key of `DENSENETS`, or ``timm:NAME`` for any of timm's models.
        dense_block: how our own networks compute (choice.py); no matter for timm's.
        recompute: whose bottlenecks are computed again in the backward pass, likewise.

    Raises:
        UserError: there is no such network.
    """
    if name.startswith("timm:"):
        return _create_timm_model(name.removeprefix("timm:"), num_classes, dropout)
    if name not in DENSENETS:
        nearest = did_you_mean(name, DENSENETS)
        raise UserError(
            f"model.name: there is no network '{name}'{nearest}; choose {', '.join(DENSENETS)} or timm:NAME"
        )
    return DenseNet(
        **DENSENETS[name], dropout=dropout, num_classes=num_classes, dense_block=dense_block, recompute=recompute
    )


def _create_timm_model(name: str, num_classes: int, dropout: float) -> nn.Module:
    import timm  # takes seconds to import

    if not timm.is_model(name):
        raise UserError(f"model.name: timm has no model '{name}'{did_you_mean(name, timm.list_models())}")
    try:
        return timm.create_model(name, num_classes=num_classes, drop_rate=dropout)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"model.name: timm cannot build '{name}': {str(error).splitlines()[0]}") from None
