"""MSDNet against published counts, and against a forward pass written again from the paper's description."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import with_random_norms
from torch import nn

from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.models.msdnet import MSDNet, even_blocks, growing_blocks
from tools.inspect import exit_table, own_size, stages_of
from tools.support.facts import exit_costs, multiply_accumulates, on_meta, parameters

# Parameters, and million operations of each exit. Those of msdnet_imagenet_7 are published (kalviny/MSDNet-PyTorch, issue 10).
KNOWN = {
    "msdnet_imagenet_7": (62_314_472, "615.69 1436.39 2283.21 2967.42 3253.79"),
    "msdnet_imagenet_6": (None, "514.66 1171.18 1844.52 2501.40 2742.06"),
    "msdnet_imagenet_4": (23_958_440, "339.90 685.46 1008.16 1254.47 1360.53"),
    "msdnet_cifar_10": (4_839_544, "15.13 25.48 37.75 52.02 62.12 74.00 87.65 99.95 110.02 121.56"),
    "msdnet_cifar_budget_5": (2_020_874, "6.85 14.33 27.50 41.67 58.42"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_operations_of_each_exit_are_the_published(name):
    network = on_meta(create_model, name, 10 if "cifar" in name else 1000)
    expected, operations = KNOWN[name]
    costs = exit_costs(network, own_size(network))
    assert [f"{cost.operations / 1e6:.2f}" for cost in costs] == operations.split()
    assert costs[-1].parameters == parameters(network) == (expected or parameters(network))
    assert len(exit_table(costs)) == 2 + network.exits == 2 + len(operations.split())


def test_the_table_of_blocks_and_exits_adds_up():
    network = on_meta(create_model, "msdnet_cifar_budget_3", 10)
    costs, stages = exit_costs(network, 32), stages_of(network, 32)
    assert [stage.name for stage in stages] == ["block 1", "exit 1", "block 2", "exit 2", "block 3", "exit 3"]
    for i, cost in enumerate(costs):
        until = stages[: 2 * i + 2]
        assert sum(stage.parameters for stage in until) == cost.parameters
        assert sum(stage.multiply_accumulates for stage in until) == cost.multiply_accumulates
    assert multiply_accumulates(network, 32) == costs[-1].multiply_accumulates


def reference(state: dict[str, torch.Tensor], x: torch.Tensor, sizes, factors, imagenet: bool) -> list:
    """The logits of each exit in evaluation, by the paper's description and a state dictionary's tensors alone."""

    def unit(x, name, stride=1, first=0):
        weight = state[f"{name}.{first}.weight"]
        x = F.conv2d(x, weight, state.get(f"{name}.{first}.bias"), stride, padding=weight.shape[-1] // 2)
        mean, var, gamma, beta = (
            state[f"{name}.{first + 1}.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * gamma + beta).clamp(min=0)

    def with_bottleneck(x, name, stride=1):
        return unit(unit(x, name), name, stride, first=3)

    total, scales, answers = sum(sizes), len(factors), []
    stem = "blocks.0.0.layers.0"
    scale = F.max_pool2d(unit(x, stem, 2), 3, 2, 1) if imagenet else unit(x, f"{stem}.net")
    maps = {0: scale}
    for s in range(1, scales):
        maps[s] = unit(maps[s - 1], f"blocks.0.0.layers.{s}.net", 2)
    layer = 0
    for b, size in enumerate(sizes):
        place = 1 if b == 0 else 0
        for _ in range(size):
            layer += 1
            interval = math.ceil(total / scales)
            given = scales - max(0, layer - 2) // interval
            left = scales - (layer - 1) // interval
            assert sorted(maps) == list(range(scales - given, scales))
            kept = range(scales - left, scales)
            new = {}
            for i, s in enumerate(kept):
                name = f"blocks.{b}.{place}.layers.{i}"
                parts = [maps[s]]
                if s > 0 and s - 1 in maps:
                    parts.append(with_bottleneck(maps[s - 1], f"{name}.conv_down.net", 2))
                parts.append(with_bottleneck(maps[s], f"{name}.conv_normal.net"))
                new[s] = torch.cat(parts, dim=1)
            maps, place = new, place + 1
            if left < given:
                for i, s in enumerate(kept):
                    before = maps[s].shape[1]
                    maps[s] = unit(maps[s], f"blocks.{b}.{place}.m.{i}.net")
                    assert maps[s].shape[1] == before // factors[s] // 2 * factors[s]
                place += 1
        y = unit(unit(maps[scales - 1], f"classifier.{b}.m.0.net", 2), f"classifier.{b}.m.1.net", 2)
        y = F.avg_pool2d(y, 2).flatten(1)
        answers.append(y @ state[f"classifier.{b}.linear.weight"].T + state[f"classifier.{b}.linear.bias"])
    return answers


@pytest.mark.parametrize(
    ("sizes", "factors", "stem", "side"),
    [
        (growing_blocks(1, 1, 3), (1, 2, 4), "cifar", 32),
        (even_blocks(4, 3, 2), (1, 2, 4, 4), "imagenet", 224),
    ],
)
def test_logits_of_each_exit_equal_a_forward_pass_written_again(sizes, factors, stem, side):
    torch.manual_seed(0)
    network = MSDNet(sizes, 6, factors, factors, stem, 8, None, num_classes=5)
    network = with_random_norms(network).double().eval()
    images = torch.randn(1, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = (
            network(images),
            reference(network.state_dict(), images, sizes, factors, stem == "imagenet"),
        )
    assert len(ours) == len(theirs) == network.exits == len(sizes)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_channels_halve_where_the_finest_scale_is_dropped():
    """The known places of msdnet_imagenet_4: layers 6, 11 and 16; 128 to 64 and 144 to 72 at the first two."""
    network = on_meta(create_model, "msdnet_imagenet_4", 1000)
    for block, place in ((1, 2), (2, 3), (3, 4)):  # after layers 6, 11 and 16
        assert type(network.blocks[block][place]).__name__ == "Transition"
    first, second = (network.blocks[block][place].m for block, place in ((1, 2), (2, 3)))
    assert (first[0].net[0].in_channels // 2, first[0].net[0].out_channels // 2) == (128, 64)
    assert (second[0].net[0].in_channels // 4, second[0].net[0].out_channels // 4) == (144, 72)


def test_initialisation_is_the_torch_codes():
    torch.manual_seed(0)
    network = create_model("msdnet_cifar_budget_5", num_classes=100)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all() and module.out_features == 100


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("msdnet_cifar_1", {}, "no network 'msdnet_cifar_1': the smallest is msdnet_cifar_2"),
        ("msdnet_cifer_10", {}, "did you mean 'msdnet_cifar_10'"),
        (
            "msdnet_cifar_10",
            {"dropout": 0.2},
            "model.dropout is 0.2, which msdnet_cifar_10 does not know: leave it out",
        ),
        ("msdnet_cifar_10", {"dense_block": "fused"}, "model.dense_block is fused, which"),
        ("msdnet_cifar_10", {"activation_checkpointing": "all"}, "model.activation_checkpointing is all, which"),
    ],
)
def test_what_no_network_is_or_knows_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **options)


def test_layers_that_no_exit_would_read_are_refused():
    with pytest.raises(ValueError, match="with 4 layers no exit reads the finer scales"):
        MSDNet((4,), 6, (1, 2, 4), (1, 2, 4), "cifar", 16, 128)
