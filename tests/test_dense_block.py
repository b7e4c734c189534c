"""The dense block's implementations against torchvision's networks in float64, and all that they must fall back from."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import with_random_norms
from torch import Tensor, nn

from pipeline.models import create_model, kernels, parts
from pipeline.models.densenet import DenseNet
from pipeline.models.zoo import DENSENETS

pytestmark = pytest.mark.slow  # for the most part

FUSED = ("fused", "none"), ("fused", "first"), ("fused", "all")
MEMORY_EFFICIENT = ("memory_efficient", "none"), ("memory_efficient", "all")
CLASSES = 7
needs_kernels = pytest.mark.skipif(kernels.unavailable_reason() is not None, reason=str(kernels.unavailable_reason()))
each_fast = pytest.mark.parametrize("method", [pytest.param("fused", marks=needs_kernels), "memory_efficient"])


def torchvision_network(name: str) -> nn.Module:
    spec = DENSENETS[name]
    network = torchvision.models.DenseNet(
        spec["growth_rate"], spec["block_sizes"], spec["stem_channels"], num_classes=CLASSES
    )
    if spec["stem"] == "cifar":
        network.features.conv0 = nn.Conv2d(3, spec["stem_channels"], kernel_size=3, padding=1, bias=False)
        network.features.norm0 = network.features.relu0 = network.features.pool0 = nn.Identity()
    return network


def ours(name: str, like: nn.Module, method: str, recompute: str = "none", **options) -> nn.Module:
    network = create_model(name, CLASSES, dense_block=method, activation_checkpointing=recompute, **options)
    network = network.to(next(like.parameters()).dtype)
    network.load_state_dict(like.state_dict())
    return network


def backward(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def batch(images: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(images, 3, height, width, dtype=dtype), torch.randint(CLASSES, (images,))


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, gradient in expected.items():
        error = ((actual[name] - gradient).norm() / gradient.norm()).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_equal_state(actual: nn.Module, expected: nn.Module) -> None:
    """Weights, running statistics to 1e-12 and the number of batches that they saw."""
    theirs = expected.state_dict()
    for name, value in actual.state_dict().items():
        if value.is_floating_point():
            error = (value - theirs[name]).norm().item()
            assert error <= 1e-12 * theirs[name].norm(), f"{name}: error {error:.1e}"
        else:
            assert torch.equal(value, theirs[name]), name


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


NETWORKS = [
    ("densenet_bc40_k12", 3, 16, 16),
    ("densenet_bc40_k12", 2, 13, 19),
    ("densenet_bc100_k12", 2, 16, 16),
    ("densenet_bc190_k40", 2, 8, 8),
    ("densenet_bc250_k24", 2, 8, 8),
    ("densenet121", 1, 97, 131),
    ("densenet121", 2, 96, 96),
    ("densenet161", 2, 64, 96),
    ("densenet169", 2, 96, 64),
    ("densenet201", 2, 96, 64),
    ("densenet264", 2, 96, 64),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images", "height", "width"), NETWORKS)
def test_gradients_and_statistics_equal_torchvisions(name, images, height, width):
    theirs = with_random_norms(torchvision_network(name)).double()
    start = copy.deepcopy(theirs)
    data = batch(images, height, width)
    expected = backward(theirs, *data)
    quick = name == "densenet_bc40_k12"
    for method, recompute in FUSED + MEMORY_EFFICIENT if quick else (("fused", "first"), ("memory_efficient", "all")):
        if method == "fused" and kernels.unavailable_reason():
            continue
        network = ours(name, start, method, recompute)
        assert_equal_gradients(backward(network, *data), expected)
        assert network.selection.method == method
        assert_equal_state(network, theirs)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("name", ["densenet121", "densenet_bc40_k12"])
def test_evaluation_equals_torchvisions_before_and_after_training(name):
    theirs = with_random_norms(torchvision_network(name)).double()
    network = ours(name, theirs, "fused")
    images, labels = batch(4, 75, 94)
    for _ in range(2):
        with torch.no_grad():
            assert_close(network.eval()(images), theirs.eval()(images))
        assert network.selection.method == "fused"
        assert_equal_gradients(backward(network.train(), images, labels), backward(theirs.train(), images, labels))
    assert_equal_state(network, theirs)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


@needs_kernels
def test_evaluation_of_an_image_depends_on_nothing_but_the_image():
    network = with_random_norms(create_model("densenet_bc40_k12", CLASSES, dense_block="fused")).eval()
    network.classifier = nn.Identity()  # which is torch's own
    images, before = torch.randn(7, 3, 18, 22), torch.get_num_threads()
    with torch.inference_mode():
        together = network(images)
        torch.set_num_threads(3)
        apart = torch.cat([network(images[:4]), network(images[4:])])
    torch.set_num_threads(before)
    assert torch.equal(together, apart)


@each_fast
def test_gradients_add_up_over_passes(method):
    eager = with_random_norms(create_model("densenet_bc40_k12", CLASSES, dense_block="eager")).double()
    network = ours("densenet_bc40_k12", eager, method)
    for _ in range(2):
        images, labels = batch(3, 9, 12)
        for each in (eager, network):
            F.cross_entropy(each(images), labels).backward()
    expected = {name: parameter.grad for name, parameter in eager.named_parameters()}
    assert_equal_gradients({name: parameter.grad for name, parameter in network.named_parameters()}, expected)
    assert_equal_state(network, eager)


@each_fast
@pytest.mark.parametrize("trained", ["classifier", "features.norm5", "features.denseblock2.denselayer3.norm1"])
def test_networks_of_which_a_part_is_trained(method, trained):
    eager = with_random_norms(create_model("densenet_bc40_k12", CLASSES, dense_block="eager")).double()
    network = ours("densenet_bc40_k12", eager, method)
    data = batch(3, 9, 12)
    gradients = []
    for each in (eager, network):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        F.cross_entropy(each(data[0]), data[1]).backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert network.selection.method == method
    assert gradients[0].keys() == gradients[1].keys() and all(n.startswith(trained) for n in gradients[0])
    assert_equal_gradients(gradients[1], gradients[0])


@each_fast
def test_the_input_has_a_gradient(method):
    eager = with_random_norms(create_model("densenet121", CLASSES, dense_block="eager")).double()
    images, labels = batch(2, 64, 48)
    gradients = []
    for network in (eager, ours("densenet121", eager, method)):
        leaf = images.clone().requires_grad_()
        F.cross_entropy(network(leaf), labels).backward()
        gradients.append(leaf.grad)
    assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@each_fast
def test_second_derivatives(method):
    """A gradient penalty, as in WGAN-GP: its gradient needs the backward pass to be differentiable."""
    eager = with_random_norms(create_model("densenet121", CLASSES, dense_block="eager")).double()
    network = ours("densenet121", eager, method)
    images, labels = batch(2, 64, 48)
    results = []
    for each in (eager, network):
        loss = F.cross_entropy(each(images), labels)
        gradients = torch.autograd.grad(loss, list(each.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        results.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert network.selection.method == method
    assert_equal_gradients(results[1], results[0], 1e-11)  # of a square of ill-conditioned gradients
    assert_equal_state(network, eager)


@each_fast
def test_the_graph_can_be_kept(method):
    network = create_model("densenet_bc40_k12", CLASSES, dense_block=method)
    images, labels = batch(2, 8, 8, torch.float32)
    loss = F.cross_entropy(network(images), labels)
    first = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_fast
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_a_step_has_the_same_bits_each_time(method, recompute):
    network = create_model("densenet121", CLASSES, dense_block=method, activation_checkpointing=recompute)
    images, labels = batch(4, 64, 64, torch.float32)
    first = backward(network, images, labels)
    for _ in range(3):
        again = backward(network, images, labels)
        assert all(torch.equal(first[name], again[name]) for name in first)


@needs_kernels
def test_recomputing_changes_no_bit():
    start = create_model("densenet121", CLASSES)
    images, labels = batch(2, 64, 64, torch.float32)
    results = [backward(ours("densenet121", start, "fused", r), images, labels) for r in ("none", "first", "all")]
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def freeze_a_norm(network: nn.Module) -> None:
    network.features.denseblock1.denselayer2.norm1.eval()


def count_calls(network: nn.Module) -> None:
    network.features.denseblock1.denselayer1.register_forward_hook(lambda *_: None)


def average_over_all_batches(network: nn.Module) -> None:
    network.features.norm5.momentum = None


def forget_statistics(network: nn.Module) -> None:
    channels = network.features.transition1.norm.num_features
    network.features.transition1.norm = nn.BatchNorm2d(channels, track_running_stats=False).double()


def another_epsilon(network: nn.Module) -> None:
    network.features.denseblock3.denselayer1.norm1.eps = 1e-3


@each_fast
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (freeze_a_norm, "denseblock1.denselayer2.norm1 is frozen"),
        (count_calls, "a hook on denseblock1.denselayer1"),
        (average_over_all_batches, "norm5.momentum is None"),
        (forget_statistics, "transition1.norm.track_running_stats is False, not True"),
        (another_epsilon, "batch norms with different epsilons"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_shared_statistics_cannot_do_goes_through_the_modules(method, change, reason):
    eager = create_model("densenet_bc40_k12", CLASSES, dense_block="eager").double()
    network = ours("densenet_bc40_k12", eager, method)
    data = batch(3, 9, 12)
    change(eager), change(network)
    expected, actual = backward(eager, *data), backward(network, *data)
    assert network.selection.method == "eager" and network.selection.reason == reason
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@each_fast
def test_dropout_and_networks_without_bottleneck_go_through_the_modules(method):
    images = torch.randn(2, 3, 8, 8)
    network = create_model("densenet_bc40_k12", CLASSES, dropout=0.2, dense_block=method)
    network(images)
    assert str(network.selection) == "eager (dropout)"
    network = create_model("densenet40_k12", CLASSES, dense_block=method)
    network(images)
    assert str(network.selection) == "eager (no bottlenecks)"


@needs_kernels
def test_dropout_is_no_obstacle_to_evaluation():
    network = create_model("densenet_bc40_k12", CLASSES, dropout=0.2).eval()
    with torch.no_grad():
        network(torch.randn(2, 3, 8, 8))
    assert network.selection.method == "fused"


def test_synchronised_batch_norms_go_through_the_modules():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(create_model("densenet_bc40_k12", CLASSES)).eval()
    with torch.no_grad():
        network(torch.randn(2, 3, 8, 8))
    assert str(network.selection) == "eager (denseblock1.denselayer1.norm1 is a SyncBatchNorm)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_efficient_under_autocast_is_as_near_to_float64_as_eager(dtype):
    """In the mean over three networks: a sign that rounding turns makes one of them differ by a fifth either way. The
    kernels have no float16: asked for them, a network takes memory_efficient."""
    errors: Counter[str] = Counter()
    for seed in range(3):
        torch.manual_seed(seed)
        exact = with_random_norms(create_model("densenet_bc40_k12", CLASSES, dense_block="eager")).double()
        images, labels = batch(16, 12, 12)
        expected = backward(copy.deepcopy(exact), images, labels)
        for method in ("eager", "memory_efficient", *["fused"] * (dtype is torch.float16)):
            network = create_model("densenet_bc40_k12", CLASSES, dense_block=method)
            network.load_state_dict(exact.state_dict())
            with torch.autocast("cpu", dtype=dtype):
                logits = network(images.float())
            F.cross_entropy(logits.float(), labels).backward()
            gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
            wanted = torch.cat([gradient.flatten() for gradient in expected.values()])
            errors[method] += ((gradients - wanted).norm() / wanted.norm()).item()
            assert network.selection.method == ("eager" if method == "eager" else "memory_efficient")
    assert (errors["fused"] or errors["memory_efficient"]) == errors["memory_efficient"] <= 1.1 * errors["eager"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch calls it deprecated
def test_torch_jit_traces_the_modules():
    network = create_model("densenet_bc22_k6", 3).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(network, images)
        torch.testing.assert_close(traced(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_takes_the_modules_whole():
    network = create_model("densenet_bc40_k12", CLASSES).double()
    expected = ours("densenet_bc40_k12", network, "eager")
    data = batch(2, 8, 8)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    F.cross_entropy(compiled(data[0]), data[1]).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert_equal_gradients(gradients, backward(expected, *data))


@each_fast
@pytest.mark.parametrize(
    ("size", "message"), [((1, 32, 32), "more than one value"), ((2, 16, 64), "cannot halve maps of 1x4")]
)
def test_images_that_are_too_small(method, size, message):
    network = create_model("densenet121", CLASSES, dense_block=method)
    images, height, width = size
    with pytest.raises(ValueError, match=message):
        network(torch.randn(images, 3, height, width))


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("name", ["densenet_bc40_k12", "densenet_bc100_k12"])
def test_the_first_20_steps_have_the_same_losses(name):
    """In float64. In float32 training itself multiplies rounding by a million in 20 steps, in eager as in fused."""
    start = create_model(name, CLASSES)
    patterns = torch.randn(CLASSES, 3, 12, 12)
    batches = [(patterns[y] + torch.randn(16, 3, 12, 12), y) for y in torch.randint(CLASSES, (20, 16))]
    exact = losses(ours(name, start.double(), "eager"), batches)
    fused = losses(ours(name, start.double(), "auto"), batches)
    assert fused == pytest.approx(exact, rel=1e-7)
    distance = {
        method: sum(
            abs(a / b - 1) for a, b in zip(losses(ours(name, start.float(), method), batches), exact, strict=True)
        )
        for method in ("eager", "auto")
    }
    assert distance["auto"] <= 5 * distance["eager"]


def losses(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Train a step on each batch, as the paper trains on CIFAR."""
    dtype = next(network.parameters()).dtype
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    found = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images.to(dtype)), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_auto_without_kernels_is_eager_and_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "no C++ compiler")
    network = create_model("densenet_bc40_k12", CLASSES)
    network(torch.randn(2, 3, 8, 8))
    assert str(network.selection) == "eager (no C++ compiler)"


@needs_kernels
@pytest.mark.parametrize(("stem", "blocks"), [("cifar", 1), ("cifar", 2), ("imagenet", 0), ("imagenet", 1)])
def test_frozen_parts_are_computed_as_in_evaluation_and_the_others_as_in_training(stem, blocks):
    """Their statistics and parameters stay, without gradients; all else has those of the modules, running statistics too."""
    shape = dict(growth_rate=8, block_sizes=(2, 3, 2), stem=stem, stem_channels=16, num_classes=CLASSES)
    eager = with_random_norms(DenseNet(**shape, dense_block="eager")).double()
    network = DenseNet(**shape, dense_block="fused").double()
    network.load_state_dict(eager.state_dict())
    data = batch(3, 33, 48)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for one in (eager, network):
        one.train()
        for module in parts.freeze(one, blocks, "the network"):
            module.eval()
        F.cross_entropy(one(data[0]), data[1]).backward()
    assert network.selection.method == "fused" and not network.selection.reason
    assert_equal_state(network, eager)
    part = parts.parts_of(network, "the network")
    for key, value in network.state_dict().items():
        still = part[key] <= blocks or not ("running" in key or "tracked" in key)
        assert torch.equal(value, before[key]) == still, key
    gradients, expected = (
        {key: parameter.grad for key, parameter in one.named_parameters() if parameter.grad is not None}
        for one in (network, eager)
    )
    assert gradients.keys() == expected.keys() == {k for k, _ in network.named_parameters() if part[k] > blocks}
    assert_equal_gradients(gradients, expected)
    # A gradient that is wanted through a frozen part, or one that trains again, goes through the modules.
    network(data[0].clone().requires_grad_())
    assert network.selection.method == "eager"
    network(data[0])
    assert network.selection.method == "fused"
    next(network.parameters()).requires_grad_()
    network(data[0])
    assert network.selection.method == ("eager" if blocks or stem == "imagenet" else "fused")


def test_a_backend_that_does_not_know_frozen_parts_leaves_them_to_the_modules():
    network = create_model("densenet_bc40_k12", CLASSES, dense_block="memory_efficient").double()
    for module in parts.freeze(network, 1, "the network"):
        module.eval()
    network(batch(2, 8, 8)[0])
    assert str(network.selection) == "eager (denseblock1.denselayer1.norm1 is frozen)"
