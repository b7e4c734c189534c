"""What an addition to the models costs, shown by one: a new implementation of the dense block is a registry line."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.config_file import from_dict
from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.models.backends import BACKENDS
from pipeline.models.stage import Stage, eager_stage, eager_stem
from tools import inspect
from tools.lab import benchmark


class Toy:
    """A backend in a few lines: the stages in torch's own operators. It is for training of at most float64."""

    AUTOMATIC = False
    FROZEN_PARTS = False

    def refusal(self, device: torch.device) -> str:
        return ""

    def unsupported(self, features: nn.Module, x: Tensor) -> str:
        return "" if features.training else "toy is for training"

    def stem(self, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        return eager_stem(x, norm, norm.weight, norm.bias)

    def stage(self, x: Tensor, stage: Stage) -> Tensor:
        return eager_stage(x, stage, *stage.parameters)


@pytest.fixture
def toy(monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "toy", Toy())


@pytest.mark.parametrize(("name", "size"), [("densenet121", 64), ("densenet_bc22_k6", 8)])
def test_a_new_backend_is_selected_and_computes(toy, name, size):
    torch.manual_seed(0)
    network = create_model(name, 5, dense_block="toy").double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    outputs = network(images)
    assert str(network.selection) == "toy"
    network.dense_block = "eager"
    torch.testing.assert_close(outputs, network(images), rtol=1e-9, atol=1e-9)
    network.dense_block = "toy"
    network.eval()(images)
    assert network.selection.method == "eager" and "evaluation" in network.selection.reason
    with torch.no_grad():
        network(images)
    assert str(network.selection) == "eager (toy is for training)"


def test_a_new_backend_is_configured_by_its_name(toy):
    config = from_dict({"run_dir": "r", "model": {"dense_block": "toy"}}, "test")
    assert create_model("densenet_bc22_k6", 5, dense_block=config.model.dense_block).dense_block == "toy"


def test_auto_takes_the_first_automatic_backend_that_can(toy, monkeypatch):
    monkeypatch.setattr(BACKENDS["fused"], "unsupported", lambda *_: "the kernels are away")
    network, images = create_model("densenet_bc22_k6", 5), torch.randn(2, 3, 8, 8)
    network(images)
    assert str(network.selection) == "eager (the kernels are away)"
    monkeypatch.setattr(BACKENDS["toy"], "AUTOMATIC", True, raising=False)
    network = create_model("densenet_bc22_k6", 5)
    network(images)
    assert str(network.selection) == "toy (the kernels are away)"


def test_the_tools_list_the_registry():
    names = ["eager", *BACKENDS]
    on_cpu = [name for name in BACKENDS if not BACKENDS[name].refusal(torch.device("cpu"))]
    assert list(dict.fromkeys(name for name, _ in inspect.MODES)) == ["eager", *on_cpu]
    assert [name for name in benchmark.OURS if "," not in name] == names
    assert set(BACKENDS) < set(benchmark.TASKS["inference"])


@pytest.mark.parametrize("name", ["densenet_bc22_k6", "timm:resnet18"])
def test_an_unknown_backend_is_one_line(toy, name):
    with pytest.raises(UserError) as error:
        create_model(name, 5, dense_block="fusd")
    assert str(error.value) == (
        "model.dense_block: there is no 'fusd' (did you mean 'fused'?); "
        "choose auto, eager, triton, fused, memory_efficient, toy"
    )
