"""The fused dense block in bfloat16: as right as torch's own autocast, against float64, and the same bits each time."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import override_flags, run_module, small_config, with_random_norms
from torch import Tensor, nn

from pipeline.models import create_model, kernels
from pipeline.trainer import fit

pytestmark = [
    pytest.mark.skipif(kernels.unavailable_reason() is not None, reason=str(kernels.unavailable_reason())),
    pytest.mark.slow,
]
CLASSES = 7
Step = dict[str, list[Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The bits of a step, and with them the errors, follow from the number of threads. conftest.py gives them back."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def exact_network(name: str, random_norms: bool = True) -> nn.Module:
    network = create_model(name, CLASSES, dense_block="eager").double()
    return with_random_norms(network) if random_norms else network


def like(
    exact: nn.Module, name: str, method: str, dtype: torch.dtype = torch.float32, recompute: str = "none"
) -> nn.Module:
    network = create_model(name, CLASSES, dense_block=method, activation_checkpointing=recompute).to(dtype)
    network.load_state_dict(exact.state_dict())
    return network


def batch(images: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(images, 3, height, width), torch.randint(CLASSES, (images,))


def step(network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Of a network in float32 under autocast; of another in its own precision."""
    network.zero_grad()
    dtype = next(network.parameters()).dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        logits = network(images.to(dtype))
    F.cross_entropy(logits.double(), labels).backward()
    return {
        "gradients": [parameter.grad.clone() for parameter in network.parameters()],
        "statistics": [buffer.clone() for buffer in network.buffers() if buffer.is_floating_point()],
        "logits": [logits.detach()],
    }


def mean_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Relative, in the mean over the tensors."""
    errors = [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    return sum(errors) / len(errors)


def equal(first: Step, second: Step) -> bool:
    return all(torch.equal(a, b) for what in first for a, b in zip(first[what], second[what], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "parameters in bfloat16"])
@pytest.mark.parametrize(
    ("name", "size", "draws", "random_norms"),
    [
        ("densenet_bc40_k12", (16, 12, 12), 6, False),
        ("densenet_bc40_k12", (16, 12, 12), 6, True),
        ("densenet_bc22_k7", (7, 9, 13), 8, True),  # odd numbers of channels, pixels and tiles
    ],
)
def test_a_step_is_as_near_to_float64_as_torchs_own(name, size, draws, random_norms, dtype):
    errors: dict[str, dict[str, float]] = {"eager": {}, "fused": {}}
    for draw in range(draws):
        torch.manual_seed(draw)
        exact = exact_network(name, random_norms)
        networks = {method: like(exact, name, method, dtype) for method in errors}
        exact.load_state_dict(networks["eager"].state_dict())  # rounded, if they are
        data = batch(*size)
        expected = step(exact, *data)
        for method, network in networks.items():
            for what, tensors in step(network, *data).items():
                errors[method][what] = errors[method].get(what, 0) + mean_error(tensors, expected[what]) / draws
            assert str(network.selection) == method
    for what, allowed in {"gradients": 1.1, "statistics": 1.1, "logits": 1.4}.items():
        assert errors["fused"][what] <= allowed * errors["eager"][what], f"{what}: {errors}"
    assert errors["fused"]["statistics"] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "parameters in bfloat16"])
@pytest.mark.parametrize("size", [(1, 12, 12), (9, 11, 13)])
def test_evaluation_is_nearly_as_near_to_float64_as_torchs_own(dtype, size):
    name, errors = "densenet_bc40_k12", {"eager": 0.0, "fused": 0.0}
    for draw in range(8):
        torch.manual_seed(draw)
        exact = exact_network(name, random_norms=draw % 2 == 0)
        for module in exact.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # so that running statistics fit
        exact(torch.randn(32, 3, *size[1:]).double())
        networks = {method: like(exact, name, method, dtype).eval() for method in errors}
        exact.load_state_dict(networks["eager"].state_dict())
        images = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            expected = exact.eval()(images.double())
            for method, network in networks.items():
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
                    errors[method] += mean_error([network(images.to(dtype))], [expected]) / 8
                assert str(network.selection) == method
    assert errors["fused"] <= 1.4 * errors["eager"]  # the rounding of transformed maps and weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "parameters in bfloat16"])
@pytest.mark.parametrize(("name", "size"), [("densenet121", (2, 64, 64)), ("densenet_bc22_k7", (3, 9, 13))])
def test_a_step_has_the_same_bits_each_time_and_with_recomputation(name, size, dtype):
    torch.set_num_threads(2)
    exact, data = exact_network(name), batch(*size)
    first = step(like(exact, name, "fused", dtype), *data)
    assert all(tensor.isfinite().all() for tensors in first.values() for tensor in tensors)
    for recompute in ("none", "first", "all"):
        assert equal(first, step(like(exact, name, "fused", dtype, recompute), *data))


@pytest.mark.parametrize("name", ["densenet_bc22_k7", "densenet121"])
def test_nothing_is_read_before_it_is_written(name):
    """torch fills new memory with NaN where it must be deterministic."""
    torch.set_num_threads(2)
    exact, data = exact_network(name), batch(3, 65, 67)
    expected = step(like(exact, name, "fused"), *data)
    torch.use_deterministic_algorithms(True)
    fills, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        assert torch.empty(3).isnan().all()
        assert equal(step(like(exact, name, "fused"), *data), expected)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "parameters in bfloat16"])
def test_second_derivatives(dtype):
    """A gradient penalty: the backward pass in torch's operators, under the forward pass's autocast."""
    exact = exact_network("densenet_bc22_k6")
    networks = {method: like(exact, "densenet_bc22_k6", method, dtype) for method in ("eager", "fused")}
    exact.load_state_dict(networks["eager"].state_dict())
    images, labels = batch(16, 12, 12)
    results = {}
    for method, network in {"exact": exact, **networks}.items():
        own = next(network.parameters()).dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=own is torch.float32):
            loss = F.cross_entropy(network(images.to(own)), labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        results[method] = [parameter.grad for parameter in network.parameters()]
        assert all(gradient.dtype == own for gradient in results[method])
    assert str(networks["fused"].selection) == "fused"
    errors = {method: mean_error(results[method], results["exact"]) for method in networks}
    assert errors["fused"] <= 1.5 * errors["eager"]


def test_what_goes_through_the_modules_says_why():
    images = torch.randn(2, 3, 8, 8)
    network = create_model("densenet_bc22_k6", CLASSES)

    def selected(dtype: torch.dtype) -> str:
        with torch.autocast("cpu", dtype):
            network(images.to(next(network.parameters()).dtype))
        return str(network.selection)

    assert selected(torch.bfloat16) == "fused"
    assert selected(torch.float16) == "eager (the kernels have no float16)"
    network.half()
    assert (
        str(network._selector.select(network.features, images.half(), "auto")) == "eager (the kernels have no float16)"
    )
    network.bfloat16()
    assert selected(torch.bfloat16) == "fused"
    network(images.bfloat16())
    assert str(network.selection) == "fused"
    network.double()
    only = "the kernels take images and parameters in float32, in float64 or in bfloat16"
    assert network._selector.select(network.features, images.double(), "auto").method == "fused"
    assert str(network._selector.select(network.features, images, "auto")) == f"eager ({only})"
    with torch.autocast("cpu", torch.bfloat16):
        assert str(network._selector.select(network.features, images.double(), "auto")) == f"eager ({only})"
    network.float()
    network.features.norm5.eval()
    assert selected(torch.bfloat16) == "eager (norm5 is frozen)"


def weights(run_dir: Path) -> dict[str, Tensor]:
    return torch.load(run_dir / "checkpoints/last.pt", weights_only=True)["model"]


def test_a_run_resumes_to_the_same_bits(tmp_path, capfd):
    def config(name: str):
        return small_config(tmp_path / name, train={"precision": "bf16", "log_every": 2, "device": "cpu"})

    fit(config("whole"))
    assert "dense blocks: fused\n" in capfd.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    checkpoints = tmp_path / "resumed/checkpoints"
    (checkpoints / "previous.pt").replace(checkpoints / "last.pt")  # of the epoch before the last
    fit(config("resumed"))
    assert "resum" in capfd.readouterr().out.lower()
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_ranks_train_to_the_same_bits_each_time(tmp_path):
    for name in ("first", "second"):
        config = small_config(tmp_path / name, train={"precision": "bf16", "device": "cpu"}, optim={"epochs": 1})
        done = run_module("pipeline.train", "configs/demo.yaml", *override_flags(config), ranks=2)
        assert done.returncode == 0, done.stderr
        assert re.search(r"dense blocks: fused$", done.stdout, re.MULTILINE)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
