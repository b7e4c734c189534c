"""Run by test_triton_block.py in a process of its own, in which Triton interprets kernels on CPU.

The networks are tiny, and their sizes fit no tile. In bfloat16 the interpreter's product is wrong, so float16 stands for both.
"""

import argparse
import copy
import functools
import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import with_random_norms
from torch import Tensor, nn
from triton.runtime import interpreter

from pipeline.errors import UserError
from pipeline.models import backends, triton_block
from pipeline.models.densenet import DenseNet
from tools.lab import gpu_tiles, gpu_traffic
from tools.support import fake_gpu, gpu_checks
from tools.support.fake_gpu import Launch
from tools.support.gpu_checks.check import Setting

CLASSES = 7
Size = tuple[int, int, int]  # images, height, width
IMAGENET = functools.partial(DenseNet, 5, (2, 1), "imagenet", 10, num_classes=CLASSES)  # rows of 20 channels and fewer
WIDE = functools.partial(
    DenseNet, 40, (1, 1), "cifar", 9, num_classes=CLASSES
)  # 160 features: two parts of a bottleneck
SMALL = 3, 19, 29
# With so few multiprocessors, pixels come in several ranges, or in one of several tiles.
NETWORKS = [pytest.param(IMAGENET, SMALL, 3, id="imagenet"), pytest.param(WIDE, (2, 5, 7), 1, id="wide")]
STEM = "stem_forward", "stem_backward"
each_network = pytest.mark.parametrize(("create", "size", "multiprocessors"), NETWORKS)


@pytest.fixture
def multiprocessors() -> int:
    return 3


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch, multiprocessors) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(triton_block.MULTIPROCESSORS, 80, multiprocessors)
    for products in ("ieee", "tf32", "half"):
        tiles = triton_block.TILES[80, products]._replace(
            conv3x3_forward=triton_block.Tile(32, 32, 32, stages=1),  # several tiles, whose pixels overlap
            # For the few features of IMAGENET; elsewhere 9.0 alone has it.
            conv3x3_backward_data_persistent=triton_block.Tile(32, 16, 16, stages=1),
        )
        monkeypatch.setitem(triton_block.TILES, (80, products), tiles)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def networks(create, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """With the same random weights: eager in float64, eager, triton."""
    eager = with_random_norms(create(dense_block="eager")).to(dtype)
    triton = create(dense_block="triton").to(dtype)
    triton.load_state_dict(eager.state_dict())
    return {"exact": copy.deepcopy(eager).double(), "eager": eager, "triton": triton}


def batch(size: Size) -> tuple[Tensor, Tensor]:
    return torch.randn(size[0], 3, *size[1:]), torch.randint(CLASSES, size[:1])


def step(network: nn.Module, images: Tensor, labels: Tensor, half: bool = False) -> dict[str, list[Tensor]]:
    """Gradients, running statistics and logits; `half` is a step of a float32 network under autocast to float16."""
    network.zero_grad()
    dtype = next(network.parameters()).dtype
    with torch.autocast("cpu", torch.float16, enabled=half and dtype is torch.float32):
        logits = network(images.to(dtype))
    F.cross_entropy(logits.double(), labels).backward()
    return {
        "gradients": [parameter.grad.clone() for parameter in network.parameters()],
        "statistics": [buffer.clone() for buffer in network.buffers()],
        "logits": [logits.detach()],
    }


def errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [((a.double() - e).norm() / e.double().norm()).item() for a, e in zip(actual, expected, strict=True)]


def equal(first: dict[str, list[Tensor]], second: dict[str, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for what in first for a, b in zip(first[what], second[what], strict=True))


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Relative, of all tensors as one."""
    return errors(*([torch.cat([tensor.double().flatten() for tensor in tensors])] for tensors in (actual, expected)))[
        0
    ]


@contextmanager
def new_memory_full_of_nan() -> Iterator[None]:
    """As torch fills it where it must be deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@each_network
def test_a_step_in_float32_is_as_near_to_float64_as_eager_and_the_same_with_recomputation(create, size):
    data, built = batch(size), networks(create)
    again = copy.deepcopy(built["triton"])
    found = {name: step(network, *data) for name, network in built.items()}
    assert str(built["triton"].selection) == "triton"
    for what, expected in found["exact"].items():
        own, eager = (distance(found[name][what], expected) for name in ("triton", "eager"))
        assert own <= max(2 * eager, 5e-7), f"{what}: {own}, eager {eager}"
        assert max(errors(found["triton"][what], expected)) <= 2e-4, what  # a norm's small gradient by itself
    if create is IMAGENET:
        again.activation_checkpointing = "all"
        with new_memory_full_of_nan():
            assert equal(step(again, *data), found["triton"])  # so nothing is read before it is written, either


def nearest_tf32(x: Tensor) -> Tensor:
    """By arithmetic in float64: 11 significant bits."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def test_products_in_tf32_are_of_numbers_rounded_to_the_nearest(monkeypatch):
    """Tensor cores cut float32 off, which makes every product smaller; the interpreter multiplies what it is given."""
    dot, products = interpreter.InterpreterBuilder.create_dot, 0

    def checked(self, a, b, *others):
        nonlocal products
        products += 1
        for factor in (a.data, b.data):
            assert not (factor.view(np.int32) & 0x1FFF).any()
        return dot(self, a, b, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", checked)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    step(networks(IMAGENET)["triton"], *batch(SMALL))
    assert products

    x, weight = torch.randn(2, 40, 5, 7).contiguous(memory_format=torch.channels_last), torch.randn(24, 40)
    maps, out, ones = x.permute(0, 2, 3, 1).reshape(70, 40), torch.empty(70, 24), torch.ones(40)
    norm = triton_block._Norm(0 * ones, ones, ones, 0 * ones, 0.0)
    parameters = [torch.empty(0)] * 2 + [weight[:, :, None, None]] + [torch.empty(0)] * 2 + [torch.randn(4, 24, 3, 3)]
    ((packed, _),) = triton_block._packed([*parameters, torch.empty(0), torch.empty(0)], torch.float32, "tf32")
    triton_block._Launches(x).bottleneck_forward(maps, 40, norm, packed, out, None)
    expected = nearest_tf32(maps.relu()) @ nearest_tf32(weight).T
    assert errors([out], [expected])[0] <= 1e-6
    assert errors([maps.relu().double() @ weight.double().T], [expected])[0] > 1e-4  # so the tolerance means something
    # The bits that run over when they are rounded.
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    infinite = torch.tensor([nan, float("inf"), -float("inf")]).view(1, 3, 1, 1)
    parameters[2] = infinite
    ((packed, _),) = triton_block._packed([*parameters, torch.empty(0), torch.empty(0)], torch.float32, "tf32")
    assert torch.allclose(packed, infinite.flatten(1), equal_nan=True)
    d = torch.empty(16, 16)
    tile = dict(PRECISION="tf32", BLOCK_P=16, BLOCK_C=16)
    triton_block.launch("norm_forward", (1, 1), torch.full_like(d, nan), *norm, d, 16, 16, **tile)
    assert d.isnan().all()


@pytest.mark.parametrize(
    ("create", "size", "dtype", "multiprocessors"),
    [
        pytest.param(IMAGENET, SMALL, torch.float32, 3, id="imagenet-autocast"),
        pytest.param(IMAGENET, SMALL, torch.float16, 3, id="imagenet-parameters in float16"),
        pytest.param(WIDE, (2, 5, 7), torch.float32, 1, id="wide-autocast"),
    ],
)
def test_a_step_in_float16_is_about_as_near_to_float64_as_eager(create, size, dtype):
    """A ReLU that rounding turns on or off changes a gradient by more than rounding does, in either."""
    torch.manual_seed(1)
    data, built = batch(size), networks(create, dtype)
    found = {name: step(network, *data, half=name != "exact") for name, network in built.items()}
    assert str(built["triton"].selection) == "triton"
    for what, expected in found["exact"].items():
        own, eager = (distance(found[name][what], expected) for name in ("triton", "eager"))
        few = {"gradients": 0.005, "logits": 5e-4, "statistics": 0.0}[what]  # how far chance may part few numbers
        assert own <= 1.5 * eager + few, f"{what}: {own}, eager {eager}"


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_evaluation_uses_running_statistics(half):
    data, built = batch(SMALL), networks(IMAGENET)
    found = {}
    for name, network in built.items():
        with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=half and name != "exact"):
            found[name] = network.eval()(data[0].to(next(network.parameters()).dtype))
    assert str(built["triton"].selection) == "triton"
    triton, eager = (errors([found[name]], [found["exact"]])[0] for name in ("triton", "eager"))
    assert triton <= max(2 * eager, 1e-6) and triton <= (5e-3 if half else 1e-6)
    for name, buffer in built["triton"].named_buffers():
        assert torch.equal(buffer, built["eager"].get_buffer(name))


def test_second_derivatives_and_the_gradient_of_the_images():
    images, labels = batch(SMALL)
    results = {}
    for name, network in networks(IMAGENET).items():
        leaf = images.to(next(network.parameters()).dtype).requires_grad_()
        loss = F.cross_entropy(network(leaf), labels)
        inputs = [leaf, *network.parameters()]
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)
        results[name] = [*gradients, *second]
    assert distance(results["triton"], results["exact"]) <= 3 * distance(results["eager"], results["exact"]) <= 1e-4


def test_norms_of_which_a_part_is_trained_and_other_momenta():
    data, built = batch((2, 24, 24)), networks(IMAGENET)
    found = []
    for network in built.values():
        network.features.denseblock1.denselayer2.norm1.momentum = 0.3
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("features.denseblock1.denselayer2"))
        F.cross_entropy(network(data[0].to(next(network.parameters()).dtype)), data[1]).backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        assert len(gradients) == 6
        found.append(gradients + list(network.buffers()))
    assert max(errors(found[2], found[0])) <= 2e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda features: features.denseblock1.denselayer2.norm1.eval(), "denseblock1.denselayer2.norm1 is frozen"),
        (lambda features: features.double(), "the kernels take images and parameters in float32, bfloat16 or float16"),
        (lambda features: features.bfloat16(), "Triton's interpreter multiplies bfloat16 wrongly"),
    ],
)
def test_what_the_kernels_cannot_do_others_do_and_say_why(change, reason):
    built = networks(IMAGENET)
    for name in ("eager", "triton"):
        change(built[name].features)
    images = batch((2, 24, 24))[0].to(next(built["eager"].features.parameters()).dtype)
    features = built["triton"].features
    selection = built["triton"]._selector.select(features, images, "triton")
    assert selection.method != "triton" and selection.reason == reason


def test_auto_does_not_take_what_nobody_has_measured():
    assert "triton" not in backends.candidates("auto")
    backends.refuse_elsewhere("triton", torch.device("cpu"))  # here it can run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value):
    images, labels = batch((2, 24, 24))
    network = networks(IMAGENET)["triton"]
    images[1, 0, 3, 3] = value
    assert not F.cross_entropy(network(images), labels).isfinite()


class Touched:
    """The addresses that the programs of one launch load and store."""

    def __init__(self) -> None:
        self.loaded: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []

    def within(self, tensor: Tensor, addresses: np.ndarray) -> np.ndarray:
        start = tensor.untyped_storage().data_ptr()
        return addresses[(addresses >= start) & (addresses < start + tensor.untyped_storage().nbytes())]


@pytest.fixture
def touched(monkeypatch) -> Iterator[Touched]:
    found, builder = Touched(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def masked_load(self, pointers, mask, *others):
        found.loaded.append(np.unique(pointers.data[mask.data]))
        return load(self, pointers, mask, *others)

    def masked_store(self, pointers, value, mask, *others):
        found.stored.append(np.unique(pointers.data[mask.data]))
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    yield found


@each_network
def test_addresses_lie_in_the_arguments_and_the_traffic_that_is_counted_is_what_is_touched(
    create, size, touched, monkeypatch
):
    """On a GPU a wrong address would be a crash or a wrong number; the interpreter by itself does not notice it."""
    run, kernels = triton_block.launch, set()

    def launch(kernel, grid, *arguments, warps=4, stages=1, **constants):
        touched.loaded, touched.stored = [], []
        run(kernel, grid, *arguments, warps=warps, stages=stages, **constants)
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        widths = {tensor.untyped_storage().data_ptr(): tensor.element_size() for tensor in tensors}
        moved = []
        for parts in (touched.loaded, touched.stored):
            addresses = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
            known, size = 0, 0
            for tensor in {t.untyped_storage().data_ptr(): t for t in tensors}.values():
                own = len(touched.within(tensor, addresses))
                known, size = known + own, size + own * widths[tensor.untyped_storage().data_ptr()]
            assert known == len(addresses), f"{kernel} reaches beyond its arguments"
            moved.append(size)
        count = gpu_traffic.of_launch(Launch(kernel, grid, arguments, constants, warps, stages))
        assert (count.read, count.written) == tuple(moved), kernel
        kernels.add(kernel)

    monkeypatch.setattr(triton_block, "launch", launch)
    network = networks(create)["triton"]
    network.activation_checkpointing = "all"
    step(network, *batch(size))
    others = {"conv3x3_backward_data"} if create is IMAGENET else {"conv3x3_backward_data_persistent", *STEM}
    assert kernels == gpu_traffic.TRAFFIC.keys() - others


def test_the_check_of_a_gpu_sees_what_is_wrong_in_evaluation_alone(tmp_path, monkeypatch):
    """`tools.gpu` runs it on GPUs alone. It comes to evaluation after it has found all else right."""
    right = triton_block.stage
    monkeypatch.setattr(
        triton_block, "stage", lambda x, stage: right(x, stage) * (1 + 1e-3 * (not stage.norm.training))
    )
    monkeypatch.setattr(gpu_checks.triton, "some_images", lambda setting: batch((2, 17, 19)))
    monkeypatch.setattr(
        gpu_checks.networks, "sizes", lambda setting: dict(growth_rate=4, blocks=(1, 1), stem_channels=8)
    )
    for module in (gpu_checks.networks, gpu_checks.triton):
        monkeypatch.setattr(module, "SHALLOW", (1, 1))
    with pytest.raises(AssertionError, match="fp32: answers are"):
        gpu_checks.triton.triton_beside_modules(Setting(torch.device("cpu"), tmp_path, 0.0), ("fp32",))


def test_a_device_of_another_kind_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(triton_block, "_is_interpreted", lambda: False)
    with pytest.raises(
        UserError, match=r"^model.dense_block: 'triton' cannot run here: its kernels are for CUDA devices"
    ):
        backends.refuse_elsewhere("triton", torch.device("cpu"))


class Compiler:
    """Stands for the processes that compile for a GPU."""

    def __init__(self, *_, **__) -> None:
        pass

    def submit(self, *_) -> Future:
        done: Future = Future()
        done.set_result(dict(registers=32, spilled=0, shared=0))
        return done

    def shutdown(self, **_) -> None:
        pass


def test_what_is_timed_has_the_candidates_tiles():
    step = fake_gpu.Step("densenet_bc22_k6", "triton", 1, 8, "fp32", 80)
    (call, *_) = gpu_tiles.calls(gpu_tiles.tasks()["conv3x3_backward_data"], step)
    without: dict = dict(conv3x3_backward_data_persistent=None)
    other = without | dict(conv3x3_backward_data=triton_block.Tile(128, 16, 16, stages=1))
    found = [
        gpu_tiles.needed(call, candidate, step)[0]
        for candidate in (gpu_tiles.PRESENT, gpu_tiles.Candidate(without), gpu_tiles.Candidate(other))
    ]
    assert [(launch.kernel, launch.constants["BLOCK_P"]) for launch in found] == [
        ("conv3x3_backward_data_persistent", 32), ("conv3x3_backward_data", 64), ("conv3x3_backward_data", 128)
    ]  # fmt: skip


def test_tiles_are_timed_where_their_results_agree_with_the_present_ones(tmp_path, monkeypatch, capsys):
    """`tools.lab.gpu_tiles` runs on GPUs alone. Here a candidate that leaves what fills no block out is refused."""
    candidates = [
        gpu_tiles.Candidate(constants={"NUMBERS": dict(BLOCK_T=2, BLOCK=64)}),
        gpu_tiles.Candidate(constants={"_blocks": lambda size, block: max(1, size // block)}),
    ]
    task = gpu_tiles.tasks()["numbers"]._replace(candidates=candidates)
    monkeypatch.setattr(gpu_tiles, "tasks", lambda: {"numbers": task})
    monkeypatch.setattr(gpu_tiles, "ProcessPoolExecutor", Compiler)
    monkeypatch.setattr(gpu_tiles, "timed", lambda run: 2.0)
    monkeypatch.setattr(gpu_tiles, "DEVICE", torch.device("cpu"))
    file = tmp_path / "tiles.json"
    options = dict(model="densenet_bc22_k6", batch_sizes=[1], size=8, precision="fp32", tasks=["numbers"], seconds=60)
    gpu_tiles.Sweep(argparse.Namespace(**options, json=file, compile=None)).run()
    present, right, wrong = json.loads(file.read_text())
    assert present["candidate"] == "present"
    assert present["ms"] == right["ms"] == 2.0 * 18  # of 9 layers, each with two weights
    assert "refused" not in right and right["error"] <= 1e-6
    assert "off the present tile's" in wrong["refused"]
    assert "| present " in capsys.readouterr().out
