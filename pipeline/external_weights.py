"""Weights that others have written: which network they are of, and what their tensors are called here."""

import functools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.models.parts import first_convolution
from pipeline.models.zoo import DENSENETS
from pipeline.preprocessing import timm_config
from pipeline.words import agreed

FEW = 0.05  # of a file's tensors that may be odd while it is still said which
PREFIXES = re.compile(r"(module|model|_orig_mod|net|network)\.")
# Names that others give to our modules.
RENAMES = [
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), lambda m: f"{m[1]}{m[2]}."),  # torchvision before 0.3
    (re.compile(r"backbone\.stem\.0\."), lambda m: "features.conv0."),  # openmmlab from here on
    (re.compile(r"backbone\.stem\.1\."), lambda m: "features.norm0."),
    (
        re.compile(r"backbone\.stages\.(\d+)\.block\.(\d+)\."),
        lambda m: f"features.denseblock{int(m[1]) + 1}.denselayer{int(m[2]) + 1}.",
    ),
    (
        re.compile(r"backbone\.transitions\.(\d+)\.(norm|conv)\."),
        lambda m: f"features.transition{int(m[1]) + 1}.{m[2]}.",
    ),
    (re.compile(r"backbone\.transitions\.\d+\.0\."), lambda m: "features.norm5."),
    (re.compile(r"head\.fc(?:_cls)?\."), lambda m: "classifier."),
]


def match(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Tensor], str]:
    """Find each entry of a network's state dictionary in another's, each of which is used once.

    By name after the known renamings, else by order if all shapes agree in it, and all names of a module's tensors, as in
    ports that number their modules.
    Counts of batches are 0 then, as they are of files that lack them.

    Returns:
        The state dictionary with our names, and a note on how names were understood, empty if they were ours.

    Raises:
        UserError: something is left over on either side, or two names mean the same tensor.
    """
    stripped = theirs if own.keys() & theirs.keys() else _strip(theirs)
    renamed: dict[str, Tensor] = {}
    for name, tensor in stripped.items():
        ours = name if name in own else _rename(name)
        if ours in renamed:
            raise UserError(f"{origin} has the network's '{ours}' twice, once as '{name}': which is to be taken?")
        renamed[ours] = tensor
    counts = {name for name in own if name.endswith("num_batches_tracked")}
    found = {
        name: tensor for name, tensor in renamed.items() if name in own or not name.endswith("num_batches_tracked")
    }
    wanted = [name for name in own if name not in counts]
    note = "" if renamed.keys() == theirs.keys() else "names translated"
    if not found.keys() >= set(wanted) or not own.keys() >= found.keys():
        values = {name: tensor for name, tensor in stripped.items() if not name.endswith("num_batches_tracked")}
        if len(values) != len(wanted) or not all(
            values[name].shape == own[other].shape and _leaf(name) in (None, _leaf(other))
            for name, other in zip(values, wanted, strict=True)
        ):
            _refuse(wanted, own, found, origin)
        found, note = dict(zip(wanted, values.values(), strict=True)), "names unknown, matched by order and shape"
    return {name: found.get(name, torch.zeros((), dtype=torch.int64)) for name in own}, note


def name_network(error: UserError, found: str | None, tried: str, flag: str) -> UserError:
    """The error that weights do not fit the network `tried`, with the flag for the one that they are of, if that is known."""
    return UserError(f"{error}: they are of {found}: give {flag} {found}") if found and found != tried else error


def channels_of(state: Mapping[str, Tensor], network: nn.Module) -> int:
    """Of the images that weights are for, by their first convolution: 1 for gray ones, else 3.

    Args:
        network: of the same names, for images of any channels.
    """
    weight = state.get(first_convolution(network))
    return 1 if weight is not None and weight.dim() == 4 and weight.shape[1] == 1 else 3


def convolution_for_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weight, (out, in, h, w), for images of `channels` channels, 1 or 3.

    Of a gray image and of its three equal colours, alike normalised, it gives the same: the sum over the colours, or a third
    for each of them.
    """
    if weight.shape[1] == channels:
        return weight
    return weight.sum(dim=1, keepdim=True) if channels == 1 else weight.repeat(1, 3, 1, 1) / 3


def _leaf(name: str) -> str | None:
    """Which of its module's tensors this is; four of a batch norm's have the same shape."""
    leaf = name.rpartition(".")[2]
    return leaf if leaf in ("weight", "bias", "running_mean", "running_var") else None


def outputs_of(state: dict[str, Tensor], model: str | None, path: Path) -> int:
    """Rows of the classifier's matrix in external weights, which in a DenseNet is the only one.

    Raises:
        UserError: there is none.
    """
    matrices = [tensor for tensor in state.values() if tensor.dim() == 2]
    if model and model.startswith("timm:"):
        classifier = timm_config(create_model(model, num_classes=1))["classifier"]
        named = [tensor for name, tensor in state.items() if name.endswith(f"{classifier}.weight")]
        matrices = named or matrices[-1:]
    if not matrices:
        raise UserError(f"{path} holds the weights of no classifier")
    return len(matrices[-1])


def recognise(state: dict[str, Tensor], outputs: int) -> str | None:
    """The one of our networks that has such tensors, but for a few, which `match` names; None if none has."""
    if msdnet := _name_of_msdnet(list(_strip(state))):
        return msdnet
    shapes = _count_shapes(state)
    odd: dict[str, int] = {}  # tensors that one side has and the other lacks, by network
    for name in DENSENETS:
        own = _shapes_of(name, outputs)
        odd[name] = ((own - shapes) + (shapes - own)).total()
    nearest = min(odd, key=lambda name: odd[name])
    return nearest if odd[nearest] <= FEW * shapes.total() else None


def _name_of_msdnet(names: list[str]) -> str | None:
    """The MSDNet whose tensors are called so, by its stem, its exits, and the layers of its first block; None if it is none."""
    if not {"blocks.0.0.layers.0.0.weight", "blocks.0.0.layers.0.net.0.weight"} & set(names):
        return None
    exits = sum(name.startswith("classifier.") and name.endswith(".linear.weight") for name in names)
    layers = sum(bool(re.fullmatch(r"blocks\.0\.\d+\.layers\.0\.conv_normal\.net\.0\.weight", name)) for name in names)
    if "blocks.0.0.layers.0.0.weight" in names:
        return f"msdnet_imagenet_{layers}"
    return f"msdnet_cifar_budget_{exits}" if layers == 1 else f"msdnet_cifar_{exits}"


@functools.cache
def _shapes_of(name: str, outputs: int) -> Counter[tuple[int, ...]]:
    with torch.device("meta"):
        return _count_shapes(create_model(name, num_classes=outputs).state_dict())


def _count_shapes(state: Mapping[str, Tensor]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(t.shape) for name, t in state.items() if not name.endswith("num_batches_tracked"))


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries without prefixes that wrappers have put before them; a few entries may lack it."""
    names = list(state)
    while names:
        ((first, count),) = Counter(name.split(".")[0] for name in names).most_common(1)
        if not PREFIXES.match(f"{first}.") or count < (1 - FEW) * len(names):
            break
        shorter = [name.removeprefix(f"{first}.") for name in names]
        if len(set(shorter)) < len(names):  # two would have the same name
            break
        names = shorter
    return dict(zip(names, state.values(), strict=True))


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name, count=1)
    return name


def _refuse(wanted: list[str], own: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: str) -> None:
    lacking = [name for name in wanted if name not in found]
    left_over = [name for name in found if name not in own]
    parts = []
    if lacking:
        are = agreed(len(lacking), "is", "are")
        parts.append(f"{len(lacking)} of the network's {len(wanted)} tensors {are} not there, as '{lacking[0]}'")
    if left_over:
        parts.append(f"{len(left_over)} {agreed(len(left_over), 'is', 'are')} left over, as '{left_over[0]}'")
    raise UserError(f"{origin} holds the weights of another architecture: {'; '.join(parts)}")
