"""The parts of a network from the images to the classifier: stem, blocks, classifier. Fine-tuning treats them differently."""

import re
from typing import Any, cast

from torch import nn

from pipeline.errors import UserError
from pipeline.models.densenet import DenseNet
from pipeline.models.msdnet import MSDNet

_BLOCK = re.compile(r"features\.(?:denseblock|transition)(\d+)\.")
_MSDNET_BLOCK = re.compile(r"blocks\.(\d+)\.")


def parts_of(network: nn.Module, name: str) -> dict[str, int]:
    """Number of the part that each entry of a network's state dictionary belongs to, by the entry's name.

    0 is the stem, i the i-th block with the transition after it, the last number the classifier and what stands right before
    it (the last batch norm), or the classifiers of all exits. Those of timm's networks are timm's groups of layers.

    Args:
        name: the network's, for messages.

    Raises:
        UserError: the network does not say what its parts are.
    """
    entries = network.state_dict()
    if isinstance(network, DenseNet):
        return {entry: _part(entry, network.block_count + 1) for entry in entries}
    if isinstance(network, MSDNet):
        return {entry: _msdnet_part(entry, network.exits + 1) for entry in entries}
    if not hasattr(network, "group_matcher"):
        raise UserError(
            f"{name} does not say what its parts are: leave out model.freeze and optim.layer_decay, or take another network"
        )
    from timm.models._manipulate import group_with_matcher  # takes seconds to import

    matcher = cast("Any", network).group_matcher(coarse=True)
    return cast("dict[str, int]", group_with_matcher(iter(entries.items()), matcher, reverse=True))


def classifier_of(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules that give the logits."""
    if isinstance(network, DenseNet):
        return ("classifier",)
    if isinstance(network, MSDNet):
        return tuple(f"classifier.{i}.linear" for i in range(network.exits))
    about = getattr(network, "pretrained_cfg", None)  # of timm's networks
    if about:
        found = about["classifier"]
        return (found,) if isinstance(found, str) else tuple(found)
    return ([name for name, module in network.named_children() if any(True for _ in module.parameters())][-1],)


def first_convolution(network: nn.Module) -> str:
    """Name of the weight, in the state dictionary, of the convolution that sees the images; empty if there is none."""
    found = (name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    name = next(found, None)
    return "" if name is None else f"{name}.weight"


def freeze(network: nn.Module, blocks: int, name: str) -> list[nn.Module]:
    """Keep the stem and the first `blocks` blocks from training.

    Returns:
        The modules that must be in evaluation mode in training too: their batch norms then keep their statistics.

    Raises:
        UserError: the network has fewer blocks; see also `parts_of`.
    """
    part = parts_of(network, name)
    last = max(part.values())
    if blocks >= last:
        raise UserError(f"model.freeze is {blocks}, and {name} has {last - 1} blocks: choose 0 to {last - 1}")
    for entry, parameter in network.named_parameters():
        parameter.requires_grad_(part[entry] > blocks)
    still = []
    for path, module in network.named_modules():
        inside = [part[f"{path}.{entry}" if path else entry] for entry in module.state_dict()]
        if inside and max(inside) <= blocks:
            still.append(module)
    return still


def _part(entry: str, last: int) -> int:
    block = _BLOCK.match(entry)
    if block:
        return int(block[1])
    return last if entry.startswith(("features.norm5.", "classifier.")) else 0


def _msdnet_part(entry: str, last: int) -> int:
    block = _MSDNET_BLOCK.match(entry)
    if block is None:
        return last
    return 0 if entry.startswith("blocks.0.0.") else int(block[1]) + 1
