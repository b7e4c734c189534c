import functools
import math
import re

import pytest
import timm
import torch
import torchvision
from conftest import with_random_norms
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.models import create_model, create_network
from pipeline.models.densenet import DenseBlock
from pipeline.models.zoo import refuse_what_is_ignored

PARAMETERS = {
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet264": 33_337_704,
    "densenet40_k12": 1_019_722,
    "densenet100_k12": 6_979_642,
    "densenet100_k24": 27_249_082,
    "densenet_bc100_k12": 769_162,
    "densenet_bc250_k24": 15_324_406,
    "densenet_bc190_k40": 25_624_430,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        network = create_model(name, num_classes=1000 if PARAMETERS[name] and "_k" not in name else 10)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_logits_equal_torchvisions_with_the_same_weights(name):
    torch.manual_seed(0)
    ours = with_random_norms(create_model(name)).double()
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().double()
    theirs.to_empty(device="cpu")
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 80, 64, dtype=torch.float64)
    with torch.no_grad():
        for mode in (False, True):
            a, b = ours.train(mode)(images), theirs.train(mode)(images)
            assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12)


def test_initialisation_is_the_torch_codes():
    torch.manual_seed(0)
    network = create_model("densenet121")
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    bound = 1 / math.sqrt(network.classifier.in_features)
    assert (network.classifier.bias == 0).all()
    assert 0.99 * bound < network.classifier.weight.abs().max() <= bound


@pytest.mark.parametrize(("name", "convolutions"), [("densenet40_k12", 39), ("densenet_bc100_k12", 99)])
def test_dropout_follows_every_convolution_but_the_first(name, convolutions):
    network = create_model(name, num_classes=10, dropout=0.2)
    kinds = [type(m) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Dropout))]
    assert kinds == [nn.Conv2d] + [nn.Conv2d, nn.Dropout] * (convolutions - 1)
    assert create_model(name, num_classes=10).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("name", ["densenet40_k12", "densenet_bc100_k12"])
def test_cifar_networks_halve_the_map_twice(name):
    network = create_model(name, num_classes=10).eval()
    with torch.no_grad():
        assert network.features(torch.zeros(1, 3, 32, 32)).shape[2:] == (8, 8)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "stem_channels", "layers"),
    [
        ("densenet_b46_k6", 16, 7),
        ("densenet_c22_k8", 16, 6),
        ("densenet_bc22_k6", 12, 3),
        ("densenet10_k5", 16, 2),
    ],
)
def test_networks_by_depth_and_growth_rate(name, stem_channels, layers):
    network = create_model(name, num_classes=4)
    blocks = [module for module in network.modules() if isinstance(module, DenseBlock)]
    assert [len(block) for block in blocks] == [layers] * 3
    kind, depth, growth_rate = re.fullmatch(r"densenet_?([bc]*)(\d+)_k(\d+)", name).groups()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) + 1 == int(depth)  # the classifier
    assert convolutions[0].out_channels == stem_channels
    assert ("conv2" in dict(blocks[0][0].named_children())) == ("b" in kind)
    into = stem_channels + layers * int(growth_rate)
    transition = network.features.transition1.conv
    assert (transition.in_channels, transition.out_channels) == (into, into // 2 if "c" in kind else into)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "nearest"), [("densenet_bc99_k12", 94), ("densenet3_k12", 7), ("densenet_b8_k12", 10)]
)
def test_depths_that_no_network_has_are_refused(name, nearest):
    with pytest.raises(UserError, match=f"no network '{name}': its depth must be .* as {nearest},"):
        create_model(name)


def test_a_name_that_promises_weights_is_refused():
    with pytest.raises(
        UserError, match=r"'timm:densenet121.tv_in1k' names pretrained weights.* take timm:densenet121 to"
    ):
        create_model("timm:densenet121.tv_in1k")


def test_timm_models_by_name():
    network = create_model("timm:resnet18", num_classes=7)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'densenet121'"):
        create_model("densnet121")
    with pytest.raises(UserError, match="timm has no model 'resnet5O'.*did you mean"):
        create_model("timm:resnet5O")


def test_stochastic_depth_reaches_timms_networks_and_is_refused_elsewhere():
    network = create_network(ModelConfig(name="timm:test_convnext", drop_path=0.2), 7)
    depths = [module.drop_prob for module in network.modules() if type(module).__name__ == "DropPath"]
    assert max(depths) == pytest.approx(0.2) and depths == sorted(depths)
    ignored = ModelConfig(name="timm:test_resnet", activation_checkpointing="all")
    with pytest.raises(
        UserError, match="activation_checkpointing is for our own networks, and model.name is timm:test_resnet"
    ):
        refuse_what_is_ignored(ignored)
    with pytest.raises(
        UserError, match="model.dense_block is for our own networks, and model.name is timm:test_resnet"
    ):
        refuse_what_is_ignored(ModelConfig(name="timm:test_resnet", dense_block="fused"))
    refuse_what_is_ignored(ModelConfig(name="timm:test_resnet", dense_block="eager"))
    assert create_network(ignored, 10)  # as a checkpoint of before has it
    with pytest.raises(UserError, match="model.drop_path is for timm's networks, and model.name is densenet121"):
        create_network(ModelConfig(drop_path=0.1), 10)
    with pytest.raises(UserError, match="timm cannot build 'densenet121'.*drop_path_rate"):
        create_network(ModelConfig(name="timm:densenet121", drop_path=0.1), 10)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        *((name, getattr(torchvision.models, name)) for name in ("densenet121", "densenet161", "densenet201")),
        *((name, functools.partial(timm.create_model, name)) for name in ("densenet161", "densenet169", "densenet201")),
        ("densenet264", functools.partial(torchvision.models.DenseNet, 32, (6, 12, 64, 48), 64)),
    ],
)
def test_those_for_imagenet_have_the_tensors_of_others(name, theirs):
    with torch.device("meta"):
        own, other = (network.state_dict() for network in (create_model(name, 5), theirs(num_classes=5)))
    assert {name: tensor.shape for name, tensor in own.items()} == {
        name: tensor.shape for name, tensor in other.items()
    }
