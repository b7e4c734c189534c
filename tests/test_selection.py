"""Modules that only look like ours, tensors in another layout, and torch's modes: what no backend may compute."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import with_random_norms
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import create_model, densenet, kernels, selection
from pipeline.models.densenet import DenseBlock, DenseLayer, Transition

pytestmark = pytest.mark.slow  # for the most part

CLASSES = 5
SMALL = "densenet_bc22_k6"
Change = Callable[[nn.Module], object]
needs_kernels = pytest.mark.skipif(kernels.unavailable_reason() is not None, reason=str(kernels.unavailable_reason()))
each_backend = pytest.mark.parametrize("method", [pytest.param("fused", marks=needs_kernels), "memory_efficient"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(method: str, name: str = SMALL) -> tuple[nn.Module, nn.Module]:
    """An eager network and its copy with another dense block, in float64."""
    eager = with_random_norms(create_model(name, CLASSES, dense_block="eager")).double()
    other = copy.deepcopy(eager)
    other.dense_block = method
    return eager, other


def step(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits, gradients and running statistics of a step."""
    network.zero_grad()
    logits = network(images)
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [logits.detach(), *gradients, *network.buffers()]


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def layer(network: nn.Module) -> nn.Sequential:
    return network.features.denseblock2.denselayer2


def other_conv2(**options: object) -> Change:
    """Replace the 3x3 convolution of a layer by one with the same weight where the shapes are equal."""

    def change(network: nn.Module) -> None:
        old = layer(network).conv2
        arguments = dict(kernel_size=3, padding=1, bias=False) | options
        new = nn.Conv2d(old.in_channels, old.out_channels, **arguments).double()
        torch.manual_seed(1)
        nn.init.normal_(new.weight)
        if new.bias is not None:
            nn.init.normal_(new.bias)
        layer(network).conv2 = new

    return change


def put(path: str, create: Callable[[], nn.Module]) -> Change:
    def change(network: nn.Module) -> None:
        torch.manual_seed(1)
        parent, _, name = path.rpartition(".")
        setattr(network.features.get_submodule(parent), name, create().double())

    return change


class HalvedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def override_forward(network: nn.Module) -> None:
    conv = layer(network).conv1
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)


def override_a_part_of_forward(network: nn.Module) -> None:
    conv = layer(network).conv2
    conv._conv_forward = lambda x, weight, bias: 3 * nn.Conv2d._conv_forward(conv, x, weight, bias)


def override_the_blocks_forward(network: nn.Module) -> None:
    block = network.features.denseblock1
    block.forward = lambda x: type(block).forward(block, x) + 1


def add_to_a_layer(network: nn.Module) -> None:
    layer(network).append(nn.Hardtanh())


def remove_a_relu(network: nn.Module) -> None:
    del layer(network).relu2


def put_pooling_first(network: nn.Module) -> None:
    transition = network.features.transition1
    for name in ("norm", "relu", "conv"):  # to the end
        module = transition._modules.pop(name)
        transition.add_module(name, module)


def narrower_layer(network: nn.Module) -> None:
    channels = layer(network).conv1.in_channels
    layer(network).conv1 = nn.Conv2d(channels, 16, kernel_size=1, bias=False).double()
    layer(network).norm2 = nn.BatchNorm2d(16).double()
    layer(network).conv2 = nn.Conv2d(16, 6, kernel_size=3, padding=1, bias=False).double()
    for parameter in layer(network).parameters():
        torch.manual_seed(1)
        nn.init.normal_(parameter)


LOOKALIKES = [
    (other_conv2(padding_mode="reflect"), "denseblock2.denselayer2.conv2.padding_mode is reflect, not zeros"),
    (other_conv2(padding_mode="circular"), "denseblock2.denselayer2.conv2.padding_mode is circular, not zeros"),
    (other_conv2(dilation=2, padding=2), "conv2.padding is (2, 2), not (1, 1)"),
    (other_conv2(groups=2), "conv2.groups is 2, not 1"),
    (other_conv2(kernel_size=5, padding=2), "conv2.kernel_size is (5, 5), not (3, 3)"),
    (other_conv2(kernel_size=(1, 3), padding=(0, 1)), "conv2.kernel_size is (1, 3), not (3, 3)"),
    (other_conv2(bias=True), "denseblock2.denselayer2.conv2 has other parameters or buffers than it was built with"),
    (narrower_layer, "denseblock2.denselayer2.conv1.out_channels is 16, not 24"),
    (put("transition1.pool", lambda: nn.AvgPool2d(2, 2, padding=1)), "transition1.pool.padding is 1, not 0"),
    (put("transition1.pool", lambda: nn.AvgPool2d(2, 2, ceil_mode=True)), "transition1.pool.ceil_mode is True"),
    (put("transition1.pool", lambda: nn.AvgPool2d(2, 2, divisor_override=3)), "pool.divisor_override is 3, not None"),
    (put("transition1.pool", lambda: nn.MaxPool2d(2, 2)), "transition1.pool is a MaxPool2d"),
    (put("transition1.conv", lambda: nn.Conv2d(30, 15, 1, stride=2, bias=False)), "transition1.conv.stride is (2, 2)"),
    (put("denseblock2.denselayer2.relu1", lambda: nn.LeakyReLU(0.5)), "denselayer2.relu1 is a LeakyReLU"),
    (put("denseblock2.denselayer2.relu1", nn.Identity), "denselayer2.relu1 is a Identity"),
    (put("denseblock1.denselayer1.conv1", lambda: HalvedConv(12, 24, 1, bias=False)), "conv1 is a HalvedConv"),
    (put("norm5", lambda: nn.GroupNorm(2, 34)), "norm5 is a GroupNorm"),
    (override_forward, "denseblock2.denselayer2.conv1.forward is overridden"),
    (override_a_part_of_forward, "denseblock2.denselayer2.conv2._conv_forward is overridden"),
    (override_the_blocks_forward, "denseblock1.forward is overridden"),
    (add_to_a_layer, "denseblock2.denselayer2.6 was added"),
    (remove_a_relu, "denseblock2.denselayer2.relu2 is missing"),
    (put_pooling_first, "the modules are in another order"),
    (lambda n: nn.utils.parametrizations.weight_norm(layer(n).conv2), "conv2 is a ParametrizedConv2d"),
    (lambda n: nn.utils.parametrizations.orthogonal(layer(n).conv1), "conv1 is a ParametrizedConv2d"),
    (lambda n: nn.utils.spectral_norm(layer(n).conv2), "a hook on denseblock2.denselayer2.conv2"),
    (lambda n: layer(n).register_forward_hook(lambda m, i, output: 2 * output), "a hook on denseblock2.denselayer2"),
    (
        lambda n: layer(n).norm1.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
        "a hook on denseblock2.denselayer2.norm1",
    ),
    (
        lambda n: n.features.transition1.conv.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
        "a hook on transition1.conv",
    ),
    (lambda n: n.features.register_forward_hook(lambda m, i, output: output + 1), "a hook on features"),
]


@each_backend
@pytest.mark.parametrize(("change", "reason"), LOOKALIKES, ids=[reason for _, reason in LOOKALIKES])
def test_modules_that_only_look_like_ours_are_called(method, change, reason):
    """Changed after a first pass, so that the earlier selection must be dropped."""
    eager, network = pair(method)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    for each in (eager, network):
        each(images)
        torch.manual_seed(2)
        change(each)
    expected, actual = step(eager, images), step(network, images)
    assert network.selection.method == "eager" and reason in network.selection.reason, network.selection
    assert_near(actual, expected)


@each_backend
@pytest.mark.parametrize(
    "change",
    [
        put("pool0", lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        put("pool0", lambda: nn.MaxPool2d(3, 2, padding=0)),
        put("pool0", lambda: nn.MaxPool2d(3, 2, 1, dilation=2)),
        put("relu0", nn.ReLU6),
    ],
    ids=["ceil_mode", "padding", "dilation", "relu6"],
)
def test_another_stem_is_called(method, change):
    eager, network = pair(method, "densenet121")
    change(eager), change(network)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(network(images), eager(images))
    assert network.selection.method == "eager" and network.selection.reason.startswith(("pool0.", "relu0 is a"))


@each_backend
@pytest.mark.parametrize(
    "register",
    [
        lambda: register_module_forward_hook(lambda m, i, output: 2 * output if isinstance(m, nn.Conv2d) else None),
        lambda: register_module_forward_pre_hook(lambda m, i: (2 * i[0],) if isinstance(m, nn.ReLU) else None),
    ],
    ids=["forward", "forward_pre"],
)
def test_hooks_on_all_modules_are_called(method, register):
    eager, network = pair(method)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    network(images), eager(images)
    handle = register()
    try:
        assert torch.equal(network(images), eager(images))
        assert str(network.selection) == "eager (a hook on all modules)"
    finally:
        handle.remove()
    network(images)
    assert network.selection.method == method


@each_backend
@pytest.mark.parametrize("kind", [nn.ReLU, DenseLayer, DenseBlock, Transition])
def test_a_forward_that_is_replaced_in_its_class_is_called(method, kind, monkeypatch):
    eager, network = pair(method)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    network(images), eager(images)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) + 1)
    assert torch.equal(network(images), eager(images))
    assert str(network.selection) == f"eager ({kind.__name__}.forward is replaced)"


@each_backend
def test_a_network_of_other_classes_is_left_to_its_modules(method, monkeypatch):
    class OwnBlock(DenseBlock):
        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setattr(densenet, "DenseBlock", OwnBlock)
    eager, network = pair(method)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(network(images), eager(images)) and network.selection.reason == "denseblock1 is a OwnBlock"


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, -tensor], dim=-1)[..., 0]


LAYOUTS = [
    ("denseblock1.denselayer2.conv1.weight", transposed),
    ("denseblock2.denselayer1.norm1.weight", every_second),
    ("denseblock2.denselayer1.norm2.bias", every_second),
    ("transition1.norm.weight", lambda tensor: tensor[:1].expand(len(tensor))),
    ("norm5.bias", lambda tensor: torch._neg_view(-tensor)),
    ("denseblock1.denselayer1.norm1.running_mean", every_second),
    ("norm5.running_var", every_second),
]


@needs_kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["new tensor", "in place"])
@pytest.mark.parametrize(("name", "arrange"), LAYOUTS, ids=[name for name, _ in LAYOUTS])
def test_tensors_in_another_layout_are_not_read_as_if_they_were_flat(name, arrange, whole, training):
    eager, network = (each.train(training) for each in pair("auto"))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        network(images), eager(images)
        for each in (eager, network):
            path, _, key = name.rpartition(".")
            module = each.features.get_submodule(path)
            old = getattr(module, key)
            if whole:
                new = arrange(old.detach())
                setattr(module, key, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
            else:
                old.data = arrange(old.data)
        assert torch.equal(network(images), eager(images))
    assert network.selection.method == "eager"
    assert network.selection.reason in (f"{name} is not contiguous", f"{name} is a negated view")


@needs_kernels
def test_weights_in_channels_last_order_are_fused():
    eager, network = pair("auto")
    network = network.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(step(network, images), step(eager, images), rtol=1e-9, atol=1e-9)
    assert network.selection.method == "fused"


@needs_kernels
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda n: n.features.denseblock1.half(), "the kernels have no float16"),
        (lambda n: n.features.denseblock2.to("meta"), "denseblock2.denselayer1.norm1.weight is on meta"),
        (
            lambda n: n.features.norm5.float(),
            "the kernels take images and parameters in float32, in float64 or in bfloat16",
        ),
    ],
    ids=["dtype", "device", "dtype of norm5"],
)
def test_parameters_that_do_not_fit_together_are_not_read(change, reason):
    network = create_model(SMALL, CLASSES).double()
    network(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    change(network)
    with pytest.raises((RuntimeError, ValueError)):  # torch's own, of the modules
        network(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert str(network.selection) == f"eager ({reason})"


@each_backend
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_changes_no_statistics(method, training):
    eager, network = (each.train(training) for each in pair(method))
    empty = torch.empty(0, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert network(empty).shape == eager(empty).shape == (0, CLASSES)
    assert str(network.selection) == "eager (the batch is empty)"
    assert_near(list(network.buffers()), list(eager.buffers()))
    assert all(buffer.isfinite().all() for buffer in network.buffers())


class CountingMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.convolutions = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.convolutions += function is torch.conv2d
        return function(*arguments, **(options or {}))


@each_backend
def test_who_needs_each_operation_sees_it(method):
    eager, network = (each.eval() for each in pair(method))
    eager.requires_grad_(False), network.requires_grad_(False)
    network.train(method == "memory_efficient"), eager.train(method == "memory_efficient")
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    flops = [FlopCounterMode(display=False), FlopCounterMode(display=False)]
    for counter, each in zip(flops, (eager, network), strict=True):
        with torch.no_grad(), counter:
            each(images)
    assert flops[0].get_total_flops() == flops[1].get_total_flops() > 0
    assert "needs each operation" in network.selection.reason or network.selection.reason == "a hook on all modules"

    with torch.no_grad(), CountingMode() as mode:
        network(images)
    with torch.no_grad():
        eager(images)
    assert mode.convolutions == 2 * 9 + 3 and "a function mode" in network.selection.reason

    network.eval(), eager.eval()
    with torch.no_grad():
        expected = torch.func.vmap(eager)(images[None])
        assert torch.equal(torch.func.vmap(network)(images[None]), expected)
    tangents = [torch.func.jvp(each, (images,), (torch.ones_like(images),))[1] for each in (eager, network)]
    assert torch.equal(*tangents)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(images, torch.ones_like(images))
        tangents = [torch.autograd.forward_ad.unpack_dual(each(dual)).tangent for each in (eager, network)]
    assert torch.equal(*tangents) and "forward-mode" in network.selection.reason
    gradients = [torch.func.grad(lambda x, each=each: each(x).square().sum())(images) for each in (eager, network)]
    assert torch.equal(*gradients) and "torch.func" in network.selection.reason


@each_backend
def test_fake_and_meta_tensors_go_through_the_modules(method, monkeypatch):
    """And a network for another device does not compile the CPU's kernels."""
    monkeypatch.setattr(kernels, "load", lambda: pytest.fail("the kernels were compiled"))
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: pytest.fail("the kernels were compiled"))
    with FakeTensorMode():
        network = create_model(SMALL, CLASSES, dense_block=method)
        assert network(torch.randn(2, 3, 8, 8)).shape == (2, CLASSES)
        assert network.selection.method == "eager"
    with torch.device("meta"):
        network = create_model(SMALL, CLASSES, dense_block=method)
        assert network(torch.zeros(2, 3, 8, 8)).shape == (2, CLASSES)
    assert network.selection.method == "memory_efficient"  # torch's own operators


@pytest.mark.parametrize(("name", "size"), [("densenet121", 15), (SMALL, 3)])
def test_images_that_are_too_small_are_found_on_the_device_meta(name, size):
    with torch.device("meta"):
        network = create_model(name, CLASSES)
        network(torch.zeros(2, 3, 2 * size, 2 * size))
        with pytest.raises((RuntimeError, ValueError)):
            network(torch.zeros(2, 3, size, size))
    assert str(network.selection) == "eager (the kernels are for CPU)"


@each_backend
def test_another_default_device_does_not_matter(method):
    eager, network = pair(method)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = step(eager, images)
    with torch.device("meta"):
        actual = step(network, images)
    assert network.selection.method == method
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@needs_kernels
def test_saved_tensors_that_come_back_in_another_layout():
    """Hooks on saved tensors (to keep them elsewhere) may give them back as torch.empty and copy_ make them."""

    def flat(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    eager, network = pair("fused", "densenet121")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = step(eager, images)
    with torch.autograd.graph.saved_tensors_hooks(flat, lambda tensor: tensor):
        actual = step(network, images)
    assert network.selection.method == "fused"
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def freeze(network: nn.Module) -> None:
    layer(network).norm1.eval()


def unfreeze(network: nn.Module) -> None:
    layer(network).norm1.train()


def hook(network: nn.Module) -> None:
    network.handle = layer(network).register_forward_hook(lambda *_: None)


def new_parameter(network: nn.Module) -> None:
    network.kept = layer(network).norm2.weight
    layer(network).norm2.weight = nn.Parameter(every_second(network.kept.detach()))


def old_parameter(network: nn.Module) -> None:
    layer(network).norm2.weight = network.kept


def new_module(network: nn.Module) -> None:
    network.kept = layer(network).relu2
    layer(network).relu2 = nn.ReLU6()


def old_module(network: nn.Module) -> None:
    layer(network).relu2 = network.kept


def other_epsilon(network: nn.Module) -> None:
    network.features.norm5.eps = 1e-2


def same_epsilon(network: nn.Module) -> None:
    network.features.norm5.eps = 1e-5


def no_momentum(network: nn.Module) -> None:
    network.features.norm5.momentum = None


def momentum(network: nn.Module) -> None:
    network.features.norm5.momentum = 0.1


@needs_kernels
@pytest.mark.parametrize(
    ("change", "back"),
    [
        (freeze, unfreeze),
        (hook, lambda n: n.handle.remove()),
        (new_parameter, old_parameter),
        (new_module, old_module),
        (other_epsilon, same_epsilon),
        (no_momentum, momentum),
        (lambda n: n.eval(), lambda n: n.train()),
        (lambda n: setattr(layer(n).conv2, "forward", layer(n).conv2.forward), lambda n: delattr(layer(n).conv2, "forward")),
        (lambda n: setattr(n, "features", copy.deepcopy(n.features).to("meta")), None),
        (lambda n: n.half(), lambda n: n.float()),
        (lambda n: n.bfloat16(), lambda n: n.float()),  # of which the images are not
    ],
)  # fmt: skip
def test_a_change_is_noticed_at_the_next_pass_and_so_is_its_end(change, back):
    network, images = create_model(SMALL, CLASSES), torch.randn(2, 3, 8, 8)
    network(images)
    assert str(network.selection) == "fused"
    change(network)
    selected = network._selector.select(network.features, images, "auto")
    assert selected.method == "eager" and selected.reason
    if back:
        back(network)
        assert str(network._selector.select(network.features, images, "auto")) == "fused"


@needs_kernels
def test_the_circumstances_of_a_pass_are_noticed():
    network, images = create_model(SMALL, CLASSES).eval(), torch.randn(2, 3, 8, 8)

    def selected() -> str:
        network(images)
        return str(network.selection)

    assert selected() == "eager (gradients in evaluation mode)"
    with torch.no_grad():
        assert selected() == "fused"
        with torch.autocast("cpu", torch.bfloat16):
            assert selected() == "fused"
        with torch.autocast("cpu", torch.float16):
            assert selected() == "eager (the kernels have no float16)"
        assert selected() == "fused"
    network.dense_block = "eager"
    assert selected() == "eager"


@needs_kernels
def test_a_selection_is_made_once(monkeypatch):
    looks = []
    difference = selection.difference
    monkeypatch.setattr(selection, "difference", lambda *arguments: looks.append(1) or difference(*arguments))
    network = create_model(SMALL, CLASSES)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for batch_size in (2, 3, 2):
        optimizer.zero_grad(set_to_none=True)
        network(torch.randn(batch_size, 3, 8, 8)).sum().backward()
        optimizer.step()
    network.load_state_dict(network.state_dict())
    network(torch.randn(2, 3, 8, 8))
    assert len(looks) == 1
    network.eval()
    with torch.no_grad():
        network(torch.randn(2, 3, 8, 8))
    assert len(looks) == 2


@needs_kernels
def test_copies_and_pickles_select_for_themselves():
    network, images = create_model(SMALL, CLASSES), torch.randn(2, 3, 8, 8)
    network(images)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert other._selector._last is None  # no second copy of all parameters
        other(images)
        assert str(other.selection) == "fused"
        freeze(other)
        other(images)
        assert other.selection.method == "eager"
        network(images)
        assert str(network.selection) == "fused"


@needs_kernels
def test_threads_that_share_a_network_select_each_for_itself():
    network, images = create_model(SMALL, CLASSES).eval(), torch.randn(1, 3, 8, 8)
    wrong = []

    def run(grad: bool) -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(50):
                selected = network._selector.select(network.features, images, "auto").method
                if selected != ("eager" if grad else "fused"):
                    wrong.append(selected)

    threads = [threading.Thread(target=run, args=(grad,)) for grad in (True, False)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_a_forward_pass_goes_by_its_own_selection_and_not_by_another_threads(monkeypatch):
    """That of a thread without gradients would leave those of this one's input unwritten."""
    network, leaf = create_model(SMALL, CLASSES).eval(), torch.randn(2, 3, 8, 8).requires_grad_()
    with torch.no_grad():
        network(leaf)
        others = network.selection
    network(leaf).sum().backward()
    expected, leaf.grad = leaf.grad, None

    def store(self, name, value):  # and another thread has stored its own by then
        nn.Module.__setattr__(self, name, others if name == "selection" else value)

    monkeypatch.setattr(densenet.DenseNet, "__setattr__", store)
    network(leaf).sum().backward()
    assert others.method == "fused" and torch.equal(leaf.grad, expected)
