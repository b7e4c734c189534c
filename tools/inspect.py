"""What a network consists of and costs: ``python -m tools.inspect MODEL [--size 224] [--classes 1000] [--batch N]``.

Of our DenseNets it prints the paper's Table 1 with the parameters and multiply-accumulates of each stage; of MSDNets their
blocks and exits, and what an answer at each exit takes; of timm's networks their outermost modules. Activation memory is
measured: a forward pass in training (float32, channels-last, on CPU) says what it keeps for the backward pass. Each piece of
memory counts once, the images included; parameters and the statistics that batch norms run do not count, as they are there
anyway.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import ActivationCheckpointing
from pipeline.errors import UserError, first_line
from pipeline.models import create_model
from pipeline.models.backends import BACKENDS
from pipeline.models.densenet import DenseBlock, DenseNet
from pipeline.models.msdnet import Layer, MSDNet
from pipeline.models.zoo import cifar_densenet
from pipeline.words import counted
from tools.support.facts import ExitCost, exit_costs, multiply_accumulates_by_module, on_meta, parameters
from tools.support.markdown import table

_ON_CPU = [name for name, backend in BACKENDS.items() if not backend.refusal(torch.device("cpu"))]
MODES = [  # model.dense_block, model.activation_checkpointing
    ("eager", "none"),
    *((name, blocks) for name in _ON_CPU for blocks in get_args(ActivationCheckpointing)),
]
KINDS = {nn.Conv2d: "conv", nn.MaxPool2d: "max pool", nn.AvgPool2d: "average pool"}


@dataclass(frozen=True)
class StageCost:
    """A row of the table.

    Attributes:
        layers: what it consists of.
        output: its shape for one image, empty where it is not known.
    """

    name: str
    layers: str
    output: tuple[int, ...]
    parameters: int
    multiply_accumulates: int


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.inspect", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a network of pipeline/models/zoo.py, or timm:NAME")
    parser.add_argument("--size", type=positive_integer, metavar="PIXELS", help="side of an image [the network's own]")
    parser.add_argument("--classes", type=positive_integer, metavar="N", help="outputs [1000, CIFAR's networks 10]")
    parser.add_argument(
        "--batch", type=positive_integer, metavar="N", default=2, help="images of the pass that is measured [2]"
    )
    options = parser.parse_args()
    small = cifar_densenet(options.model) or options.model.startswith("msdnet_cifar")
    classes = options.classes or (10 if small else 1000)
    network = create_model(options.model, classes, dense_block="eager")
    size = options.size or own_size(network)
    try:
        stages = stages_of(network, size)
        memory = memory_rows(network, torch.randn(options.batch, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:  # what networks raise over images of a wrong size
        raise UserError(
            f"{options.model} cannot take {counted(options.batch, 'image')} of {size} x {size} pixels: {first_line(error)}"
        ) from None

    count, work = parameters(network), sum(stage.multiply_accumulates for stage in stages)
    print(f"{options.model}: {size} x {size} pixels, {counted(classes, 'class', 'classes')}")
    print(f"{count:,} parameters, {work / 1e9:.3f} billion multiply-accumulates an image\n")
    print("\n".join(stage_table(stages)))
    if isinstance(network, MSDNet):
        print("\nAn answer at each exit, with all before it:\n")
        bare = on_meta(create_model, options.model, classes)
        print("\n".join(exit_table(exit_costs(cast("MSDNet", bare), size))))
    print(f"\nKept for the backward pass, measured with {counted(options.batch, 'image')}:\n")
    print("\n".join(table(["dense_block", "activation_checkpointing", "computed", "MiB an image"], memory, names=3)))


def own_size(network: nn.Module) -> int:
    """Side of the images that a network is made for, in pixels."""
    if isinstance(network, DenseNet):
        return 224 if hasattr(network.features, "pool0") else 32
    if isinstance(network, MSDNet):
        return 224 if network.stem_kind == "imagenet" else 32
    return cast("dict[str, Any]", network.pretrained_cfg)["input_size"][1]  # as all of timm's networks have it


def stages_of(network: nn.Module, size: int) -> list[StageCost]:
    """The rows of a network's table, which add up to its parameters and multiply-accumulates."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    network.to("meta")  # on CPU torch does not count its attention
    names = {module: name for name, module in network.named_modules()}
    shapes = {}

    def record(module: nn.Module, _: tuple, output: object) -> None:
        output = output[-1] if isinstance(output, list) else output  # of several scales the coarsest
        if module in names and isinstance(output, Tensor):
            shapes[names[module]] = tuple(output.shape[1:])

    with register_module_forward_hook(record):
        work = multiply_accumulates_by_module(network, size)
    if isinstance(network, DenseNet):
        rows = densenet_rows(network, last_side=shapes["features.norm5"][-1])
    elif isinstance(network, MSDNet):
        rows = msdnet_rows(network)
    else:
        rows = [(name, type(module).__name__, [name]) for name, module in network.named_children()]
    stages: list[StageCost] = []
    seen: set[nn.Parameter] = set()
    for title, layers, parts in rows:
        own = {p for part in parts for p in network.get_submodule(part).parameters()} - seen  # modules may share
        seen |= own
        numbers = sum(p.numel() for p in own), sum(work[part] for part in parts)
        stages.append(StageCost(title, layers, shapes.get(parts[-1], ()), *numbers))
    rest = StageCost(
        name="the rest",
        layers="outside of these modules",
        output=(),
        parameters=parameters(network) - sum(stage.parameters for stage in stages),
        multiply_accumulates=work[""] - sum(stage.multiply_accumulates for stage in stages),
    )
    return [*stages, rest] if rest.parameters or rest.multiply_accumulates else stages


def densenet_rows(network: DenseNet, last_side: int) -> list[tuple[str, str, list[str]]]:
    """The paper's Table 1: each row's name, what it consists of, and the names of its modules.

    Args:
        last_side: of the last block's maps, in pixels.
    """
    features = network.features
    stem = [f"features.{name}" for name in ("conv0", "norm0", "relu0") if hasattr(features, name)]
    rows = [("convolution", describe(features.get_submodule("conv0")), stem)]
    if hasattr(features, "pool0"):
        rows.append(("pooling", describe(features.get_submodule("pool0")), ["features.pool0"]))
    for i in range(1, network.block_count + 1):
        block = cast("DenseBlock", features.get_submodule(f"denseblock{i}"))
        layer = ", ".join(describe(part) for part in block[0].children() if isinstance(part, nn.Conv2d))
        rows.append((f"dense block {i}", f"[{layer}] x {len(block)}", [f"features.denseblock{i}"]))
        if i < network.block_count:
            name = f"features.transition{i}"
            convolution, pool = (describe(network.get_submodule(f"{name}.{part}")) for part in ("conv", "pool"))
            rows.append((f"transition {i}", convolution, [f"{name}.{part}" for part in ("norm", "relu", "conv")]))
            rows.append((f"transition {i}", pool, [f"{name}.pool"]))
    classification = f"{last_side}x{last_side} global average pool, {network.classifier.out_features}D fully-connected"
    return [*rows, ("classification", classification, ["features.norm5", "classifier"])]


def msdnet_rows(network: MSDNet) -> list[tuple[str, str, list[str]]]:
    """The blocks and exits of an MSDNet, as `densenet_rows`. A block's output is that at the coarsest scale."""
    rows = []
    for i, block in enumerate(network.blocks):
        layers = [len(module.layers) for module in block.modules() if isinstance(module, Layer)]
        scales = f"{layers[0]}" if layers[0] == layers[-1] else f"{layers[0]} to {layers[-1]}"
        stem = "stem, " if i == 0 else ""
        text = (
            f"{stem}{len(layers)} layer{'s' if len(layers) > 1 else ''} of {scales} scale{'' if scales == '1' else 's'}"
        )
        rows.append((f"block {i + 1}", text, [f"blocks.{i}"]))
        outputs = network.classifier[i].get_submodule("linear").out_features
        classifier = f"2 x 3x3 conv, stride 2, average pool, {outputs}D fully-connected"
        rows.append((f"exit {i + 1}", classifier, [f"classifier.{i}"]))
    return rows


def exit_table(costs: list[ExitCost]) -> list[str]:
    """Lines of the table of what each exit takes. The last column adds ReLU and pooling, as the authors of MSDNet do."""
    rows = [
        [
            str(number),
            f"{cost.parameters:,}",
            f"{cost.multiply_accumulates / 1e6:,.2f}",
            f"{cost.operations / 1e6:,.2f}",
        ]
        for number, cost in enumerate(costs, start=1)
    ]
    titles = ["exit", "parameters", "million multiply-accumulates", "with ReLU and pooling"]
    return table(titles, rows, names=1)


def describe(layer: nn.Module) -> str:
    """A convolution or pooling as the paper writes it."""
    assert isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d), layer
    side, stride = (value[0] if isinstance(value, tuple) else value for value in (layer.kernel_size, layer.stride))
    return f"{side}x{side} {KINDS[type(layer)]}{f', stride {stride}' if stride > 1 else ''}"


def stage_table(stages: list[StageCost]) -> list[str]:
    """Lines of the table with a last row of sums."""
    count = sum(stage.parameters for stage in stages)
    work = sum(stage.multiply_accumulates for stage in stages)
    rows = [
        [
            stage.name,
            " x ".join(map(str, stage.output)),
            stage.layers,
            f"{stage.parameters:,}",
            f"{stage.multiply_accumulates / 1e6:,.1f}",
        ]
        for stage in [*stages, StageCost("all", "", (), count, work)]
    ]
    return table(["stage", "output", "layers", "parameters", "million multiply-accumulates"], rows, names=3)


def memory_rows(network: nn.Module, images: Tensor) -> list[list[str]]:
    """Of each mode of the dense blocks: its names, what was computed (selection.py) and MiB an image."""
    network = network.to(memory_format=torch.channels_last).train()
    images = images.contiguous(memory_format=torch.channels_last)
    if not isinstance(network, DenseNet):
        how = "module by module" if isinstance(network, MSDNet) else "as timm does"
        return [["", "", how, mebibytes(kept_bytes(network, images) / len(images))]]
    rows = []
    for network.dense_block, network.activation_checkpointing in MODES:
        kept = kept_bytes(network, images)
        rows.append(
            [
                network.dense_block,
                network.activation_checkpointing,
                str(network.selection),
                mebibytes(kept / len(images)),
            ]
        )
    return rows


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, besides the network's parameters and buffers."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # which lives on, so that no address is used twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    for tensor in (*network.parameters(), *network.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f}"


if __name__ == "__main__":
    exit_on_user_error(main)
