"""Steps without work for the host: what is launched, copied and waited for, counted on CPU and under fake tensors."""

import contextlib
import math
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from test_trainer import EVERYTHING
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import compilation, cuda_graphs, optim, trainer, watchdog
from pipeline.compilation import compile_network, refuse_graphs_elsewhere
from pipeline.config import OptimConfig
from pipeline.data.loader import TrainingLoader
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.finite import all_finite
from pipeline.hooks import Hook
from pipeline.metrics import MetricAccumulator, batch_sums
from pipeline.models import create_model, memory_efficient, selection
from pipeline.models.densenet import DenseBlock
from pipeline.models.stage import Layer, Stage, eager_stage
from pipeline.optim import create_optimizer, load_state, sgd
from pipeline.run import Run
from pipeline.watchdog import Watchdog

pytestmark = pytest.mark.slow

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALONE = World(0, 0, 1, 1, CPU)
WAITS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal", "aten.masked_select")
OFF_THE_DEVICE = ("tolist", "cpu", "numpy")


class Calls(TorchDispatchMode):
    """Counts operators by name, and the bytes that they read and write.

    Of what waits for a GPU some are no operators, or copies, on CPU: ``tolist``, ``numpy`` and ``cpu`` are counted as they are
    called, and an index of truth values, whose number of elements the host must know, as one.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __enter__(self):
        self._methods = {name: getattr(torch.Tensor, name) for name in OFF_THE_DEVICE}
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, self._counting(name, method))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def _counting(self, name, method):
        def called(tensor, *args, **kwargs):
            self.counts[name] += 1
            return method(tensor, *args, **kwargs)

        return called

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outcome = function(*args, **(kwargs or {}))
        self.counts[str(function.overloadpacket)] += 1
        indices = args[1] if str(function.overloadpacket) in ("aten.index", "aten.index_put", "aten.index_put_") else ()
        self.counts["by truth values"] += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        moves = function.namespace == "aten" and "empty" not in str(function)
        if moves and not function.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, outcome))
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))
        return outcome

    @property
    def waits(self) -> int:
        return sum(self.counts[name] for name in (*WAITS, *OFF_THE_DEVICE, "by truth values"))


class CountsWaits(Hook):
    """Counts the waits within the loop's part of each step, whose hooks come before and after."""

    changes_network = False

    def __init__(self):
        self.waits: dict[bool, list[int]] = {False: [], True: []}  # by whether the step was logged

    def on_step_start(self, trainer):
        self.calls = Calls()
        self.calls.__enter__()

    def on_step(self, trainer, result):
        self.calls.__exit__(None, None, None)
        self.waits[result.logged].append(self.calls.waits)


@pytest.mark.parametrize(
    ("corrupt_images", "pieces"), [("stop", {}), ("skip", {}), ("stop", EVERYTHING)], ids=["stop", "skip", "everything"]
)
def test_a_step_that_is_not_logged_waits_for_no_device(tmp_path, corrupt_images, pieces):
    """On CPU, where the same operators run; that a GPU waits at these only is torch's word. LAMB counts its steps there."""
    config = small_config(
        tmp_path,
        data={
            "corrupt_images": corrupt_images,
            **pieces.get("data", {}),
            "train_crop_size": [],
            "train_crop_milestones": [],
        },
        optim={**pieces.get("optim", {}), "epochs": 1, "grad_accum_steps": 2, "optimizer": "sgd"},
        train={"log_every": 2, **pieces.get("train", {})},
    )
    counted = CountsWaits()
    with trainer.init_distributed("cpu") as world:
        run = Run(config, world)
        trainer.Trainer(run, [counted, *trainer.create_hooks(run)]).fit(None)
    assert counted.waits[False] == [0, 0] and all(counted.waits[True]) and len(counted.waits[True]) == 2


def test_all_tensors_are_looked_at_with_one_wait():
    tensors = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.int64)]
    with Calls() as calls:
        assert all_finite(tensors)
    assert calls.waits == 1
    assert not all_finite([*tensors, torch.tensor([1.0, math.inf])]) and all_finite([])
    waits = (lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 0], lambda x: bool(x.sum()), lambda x: x.item())
    for wait in waits:
        with Calls() as calls:
            wait(torch.ones(1))
        assert calls.waits == 1


def test_sums_of_a_batch_are_computed_once(tmp_path):
    with trainer.init_distributed("cpu") as world:
        run = Run(small_config(tmp_path), world)
        outcome = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(4), torch.tensor([1.0, 1, 0, 1])
        with Calls() as calls:
            run.count([outcome])
    assert calls.counts["aten.topk"] == 1
    apart = MetricAccumulator(ALONE, run.conditions.classes)
    apart.add(batch_sums(*outcome))
    assert run.epoch_metrics.score() == run.window_metrics.score() == apart.score() and apart.score().images == 3


class FreezesANorm(Hook):
    def on_step_start(self, trainer):
        if trainer.run.done_steps == 2:
            trainer.run.network.features.norm5.eval()


@pytest.mark.parametrize("hooks", [[], [FreezesANorm()]], ids=["ours", "another"])
def test_a_training_compares_the_modules_where_a_hook_may_change_them(monkeypatch, tmp_path, capsys, hooks):
    compared = []
    has_changed = selection._State.has_changed
    monkeypatch.setattr(
        selection._State, "has_changed", lambda self, features: compared.append(1) or has_changed(self, features)
    )
    trainer.fit(small_config(tmp_path, optim={"epochs": 1}), hooks)
    assert bool(compared) == bool(hooks)
    assert ("norm5 is frozen" in capsys.readouterr().out) == bool(hooks)


def test_a_held_selection_knows_another_mode_and_forgets_what_was_before():
    network, x = create_model("densenet_bc22_k8", num_classes=3), torch.zeros(2, 3, 16, 16)
    network(x)
    network.features.norm5.eval()
    with network.selection_held():
        assert network(x).shape == (2, 3) and network.selection.method == "eager"
        network.eval()
        with torch.no_grad():
            network(x)
        assert network.selection.method == "fused"
    network.features.norm5.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        network(x)
    assert network.selection.method == "eager"


def fake_stage(layers: int) -> tuple[torch.Tensor, Stage]:
    """So many layers of DenseNet-121's first block, in training on a GPU that is not there."""
    with torch.device("cuda"):
        block, norm = DenseBlock(layers, 64, 32, bottleneck=True, dropout=0.0), nn.BatchNorm2d(64 + 32 * layers)
        x = torch.empty(16, 64, 56, 56, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    parts = tuple(Layer(layer.norm1, layer.conv1, layer.norm2, layer.conv2) for layer in block)
    return x, Stage(parts, norm, (2, 2), False)


@pytest.fixture
def bf16_on_cuda():
    """Autocast for a GPU that is not there: torch.autocast would turn itself off."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


def test_autocast_widens_no_maps_of_the_memory_efficient_block(bf16_on_cuda):
    """Under fake tensors: its forward pass moves little more than the modules' does (which keeps far more)."""
    with FakeTensorMode(), torch.no_grad():
        x, stage = fake_stage(6)
        with Calls() as ours:
            memory_efficient.stage(x, stage)
        with Calls() as eager:
            eager_stage(x, stage, *stage.parameters)
    assert ours.bytes < 1.15 * eager.bytes, (ours.bytes, eager.bytes)
    assert ours.counts["aten._foreach_add_"] == 1 and not ours.counts["aten.addcmul"]


def test_the_running_statistics_of_the_memory_efficient_block_are_torchs():
    torch.manual_seed(1)
    networks = [
        create_model("densenet_bc22_k8", num_classes=3, dense_block=kind) for kind in ("eager", "memory_efficient")
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(4, 3, 16, 16)
    for network in networks:
        network(x), network(x)
    for (name, a), b in zip(networks[0].named_buffers(), networks[1].buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)


def test_a_momentum_of_another_layout_is_laid_out_as_its_parameter():
    def trained(layout):
        network = nn.Conv2d(8, 8, 3).to(memory_format=layout)
        optimizer = create_optimizer(network, OptimConfig())
        network(torch.ones(1, 8, 4, 4)).sum().backward()
        optimizer.step()
        return network, optimizer

    _, saved = trained(torch.contiguous_format)
    network, optimizer = trained(torch.channels_last)
    load_state(optimizer, network, saved.state_dict())
    momentum = optimizer.state[network.weight]["momentum_buffer"]
    assert momentum.stride() == network.weight.stride() != saved.state_dict()["state"][0]["momentum_buffer"].stride()
    assert torch.equal(momentum, saved.state_dict()["state"][0]["momentum_buffer"])


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_on_a_gpu_are_updated_in_one_kernel(fused):
    config = OptimConfig(fused=fused)
    with FakeTensorMode():
        on_gpu = [torch.zeros(3, device="cuda", requires_grad=True)]
        assert bool(sgd(on_gpu, config).defaults["fused"]) == fused
        assert bool(sgd(iter([{"params": on_gpu, "weight_decay": 0.0}]), config).defaults["fused"]) == fused
    assert not sgd(nn.Linear(2, 2).parameters(), config).defaults["fused"]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(2, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_whole_batches_are_compiled_and_the_last_is_not(monkeypatch, mode):
    """torch.compile is a stub here; test_trainer.py has the real one."""
    network, asked, graphs = Counting(), [], []
    monkeypatch.setattr(
        compilation.torch, "compile", lambda inner, **options: asked.append(options) or (lambda x: inner(x) + 1)
    )
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: graphs.append(1))
    compiled = compile_network(network, mode, images=4, accumulation=1)
    assert asked == [{"mode": mode, "dynamic": False}]
    whole, last = torch.ones(4, 2), torch.ones(3, 2)
    assert torch.equal(compiled(whole), network(whole) + 1) and torch.equal(compiled(last), network(last))
    assert len(graphs) == (mode != "default")
    assert [*compiled.parameters()] == [*network.parameters()]


def test_what_cuda_graphs_cannot_do_is_refused():
    network = Counting()
    assert compile_network(network, "none", 4, 2) is network
    for mode in ("reduce-overhead", "graphs"):
        with pytest.raises(UserError, match=rf"{mode} uses CUDA graphs.*choose optim.grad_accum_steps 1"):
            compile_network(network, mode, 4, 2)
    refuse_graphs_elsewhere("graphs", 1, GPU)
    with pytest.raises(UserError, match=r"train.compile graphs: CUDA graphs need a GPU, .* on 'cpu'; choose auto"):
        refuse_graphs_elsewhere("graphs", 1, CPU)
    with pytest.raises(UserError, match=r"train.compile graphs: a network with several exits cannot be captured"):
        refuse_graphs_elsewhere("graphs", 3, GPU)


class Pass:
    """In place of a CUDA graph: computes again what was captured, from and into the same tensors."""

    def __init__(self, compute, *outputs):
        self.compute, self.outputs = compute, outputs

    def replay(self):
        for output, new in zip(self.outputs, self.compute(), strict=True):
            output.copy_(new)


def captured_on_cpu(replayed, images, aliases):
    """`ReplayedNetwork._captured` for CPU."""
    network, parameters = replayed.network, [*replayed.network.parameters()]

    @torch.enable_grad()
    def without_effect():
        buffers = [buffer.clone() for buffer in network.buffers()]
        logits = network(images)
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return logits

    logits = torch.full_like(without_effect().detach(), math.nan)
    gradient, gradients = logits.clone(), [torch.full_like(p, math.nan) for p in parameters]
    forward = Pass(lambda: [network(images).detach()], logits)
    backward = Pass(lambda: torch.autograd.grad(without_effect(), parameters, gradient), *gradients)
    return cuda_graphs._Graphs(forward, backward, images, logits, gradient, gradients)


def test_whole_training_batches_are_replayed(monkeypatch):
    """Of the capture itself only a GPU can tell (`python -m tools.gpu --groups G6`)."""
    captured = []
    monkeypatch.setattr(
        cuda_graphs.ReplayedNetwork, "_captured", lambda *args: captured.append(args[1].shape) or captured_on_cpu(*args)
    )
    network, reference = Counting(), Counting()
    reference.load_state_dict(network.state_dict())
    replayed = compile_network(network, "graphs", images=4, accumulation=1)
    assert [*replayed.parameters()] == [*network.parameters()]
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (replayed, reference)]
    sizes = [(4, 2), (4, 2), (4, 2), (3, 2), (4, 2), (4, 5, 2), (4, 5, 2), (4, 5, 2), (4, 2)]
    kept = []
    for i, size in enumerate(sizes):
        x = torch.randn(size, generator=torch.Generator().manual_seed(i))
        if i:
            replayed.capture(torch.randn(size))
        outputs = []
        for n in (replayed, reference):
            output = n(x.clone())
            output.square().sum().backward()
            outputs.append(output)
        kept.append(outputs)
        assert all(
            torch.equal(a.grad, b.grad) for a, b in zip(network.parameters(), reference.parameters(), strict=True)
        )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        calls = network.calls
        replayed.eval()
        assert torch.equal(replayed(x), reference(x)) and network.calls == calls + 1
        replayed.train()
        with torch.no_grad():
            assert torch.equal(replayed(x), reference(x)) and network.calls == calls + 2
    assert captured == [(4, 2), (4, 5, 2)]
    assert all(torch.equal(*outputs) for outputs in kept)  # which later replays have left as they were
    replayed.enabled, calls = False, network.calls
    assert torch.equal(replayed(x), reference(x)) and network.calls == calls + 1


@pytest.mark.parametrize("dense_block", ["eager", "memory_efficient"])
def test_a_capture_differentiates_by_aliases_and_leaves_the_network(monkeypatch, dense_block):
    """With contexts that do nothing in the place of torch's for a GPU, so that it computes."""
    cached = []
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    for name in ("CUDAGraph", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: object())
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)  # of the gradient that a replay fills
    networks = [create_model("densenet_bc22_k8", num_classes=3, dense_block=dense_block) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    network, reference = networks
    for n in networks:
        n.features.conv0.weight.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:  # as DDP looks at them
        parameter.register_hook(lambda _: pytest.fail("the parameters' own graph is captured"))
    forward = network.forward

    def watched(x):
        cached.append(torch.is_autocast_cache_enabled())
        if len(cached) <= cuda_graphs.BEFORE_CAPTURE:
            torch.rand(())  # as dropout does; a capture itself leaves that to its replays
        return forward(x)

    network.forward = watched
    before, x = [*network.parameters()], torch.randn(4, 3, 16, 16)
    with network.selection_held(), torch.autocast("cpu", torch.bfloat16):
        state = torch.random.get_rng_state()
        replayed = compile_network(network, "graphs", 4, 1)
        replayed.capture(x)
        (found,) = replayed._graphs.values()
        assert torch.equal(torch.random.get_rng_state(), state)
        expected = reference(x)
    assert network.selection.method == dense_block and cached == [True, True, False]
    assert torch.equal(found.logits, expected) and found.logits.dtype is torch.bfloat16
    gradients = torch.autograd.grad(
        expected, [p for p in reference.parameters() if p.requires_grad], found.logits_gradient
    )
    assert all(torch.equal(*pair) for pair in zip(found.gradients, gradients, strict=True))
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), reference.buffers(), strict=True))


def test_what_a_graph_would_not_see_is_not_replayed(monkeypatch):
    monkeypatch.setattr(cuda_graphs.ReplayedNetwork, "_captured", captured_on_cpu)
    network, x = Counting(), torch.ones(4, 2)
    replayed = compile_network(network, "graphs", images=4, accumulation=1)
    replayed.capture(x)
    replayed(x)
    asks = x.clone().requires_grad_()
    replayed(asks).sum().backward()
    assert torch.equal(asks.grad, network.linear.weight.detach().sum(0).expand(4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert replayed(x).dtype is torch.bfloat16
    calls = network.calls
    assert replayed(x).dtype is torch.float32 and network.calls == calls + 1 and len(replayed._graphs) == 1


def test_a_replay_says_who_computes_the_blocks(monkeypatch):
    """That was who did when it was captured, and not who computed a validation in between."""

    def captured(replayed, images, aliases):
        graphs, network = captured_on_cpu(replayed, images, aliases), replayed.network
        compute = graphs.forward.compute

        def in_silence():
            said = network.selection
            try:
                return compute()
            finally:
                network.selection = said

        graphs.forward.compute = in_silence
        return graphs

    monkeypatch.setattr(cuda_graphs.ReplayedNetwork, "_captured", captured)
    network, x = create_model("densenet_bc22_k8", num_classes=3), torch.randn(4, 3, 16, 16)
    network.dense_block = "memory_efficient"
    replayed = compile_network(network, "graphs", images=4, accumulation=1)
    replayed.capture(x)
    replayed.eval()(x)
    assert network.selection.method == "eager"
    replayed.train()(x)
    assert network.selection.method == "memory_efficient"


@pytest.mark.parametrize(("first", "expected"), [
    (RuntimeError("an operation is\nnot permitted"), (UserError, r"captured as a CUDA graph \(an operation is\): .*none$")),
    (torch.OutOfMemoryError("CUDA out of memory"), (torch.OutOfMemoryError, "CUDA out of memory")),
])  # fmt: skip
def test_a_capture_that_fails_is_told_by_its_cause(monkeypatch, first, expected):
    """What torch says at the end of it is another thing."""

    def fail(*_):
        try:
            raise first
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda_graphs.ReplayedNetwork, "_captured", fail)
    replayed = compile_network(Counting(), "graphs", images=4, accumulation=1)
    replayed.capture(torch.ones(3, 2))  # no whole batch
    with pytest.raises(expected[0], match=expected[1]):
        replayed.capture(torch.ones(4, 2))


class Keeps(Hook):
    changes_network, state = False, None

    def on_end(self, trainer):
        Keeps.state = {name: tensor.clone() for name, tensor in trainer.run.network.state_dict().items()}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_a_run_captures_before_its_images_are_loaded_and_replays(tmp_path, monkeypatch, channels, memory_format):
    """DALI's threads end a capture. Each size is captured when its first epoch begins; all whole batches are replayed."""
    notes, load, replays, replay = [], TrainingLoader.batches, [], Pass.replay
    monkeypatch.setattr(Pass, "replay", lambda self: replays.append(1) or replay(self))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr("pipeline.run.compile_network", lambda network, *_: cuda_graphs.ReplayedNetwork(network, 8))
    monkeypatch.setattr(
        cuda_graphs.ReplayedNetwork, "_captured", lambda *args: notes.append(args[1].shape) or captured_on_cpu(*args)
    )
    monkeypatch.setattr(TrainingLoader, "batches", lambda self, *args: notes.append("loads") or load(self, *args))
    sizes = {"crop_size": 16, "resize_size": 16, "train_crop_size": [12, 16], "train_crop_milestones": [1]}
    images = {"channels": channels, **({"color_jitter": 0, "pca_noise": 0} if channels == 1 else {})}
    weights = []
    for compiled in (True, False):
        config = small_config(
            tmp_path / str(compiled), data=sizes | images, optim={"epochs": 3, "batch_size": 8},
            train={"memory_format": memory_format},
        )  # fmt: skip
        Keeps.state = None
        if not compiled:
            monkeypatch.undo()
        trainer.fit(config, [Keeps()])
        weights.append(Keeps.state)
    small, large = torch.Size((8, channels, 12, 12)), torch.Size((8, channels, 16, 16))
    assert notes == [small, "loads", large, "loads", "loads"]
    whole = config.data.synthetic_images // 8
    assert whole > 1 and len(replays) == 3 * whole * 2  # passes
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_first_step_of_a_start_may_compile_for_longer_than_a_step_may_take(monkeypatch, tmp_path):
    compiling = []
    monkeypatch.setattr(
        Watchdog, "beat", lambda self, activity, compiles=False: compiling.extend([activity] if compiles else [])
    )
    monkeypatch.setattr("pipeline.run.compile_network", lambda network, *_: network)
    trainer.fit(small_config(tmp_path, optim={"epochs": 2}, train={"compile": "default"}))
    assert compiling == ["epoch 1/2, step 0/4"]


def test_a_compilation_does_not_end_a_run(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    with Watchdog(ALONE, 2.0) as dog:
        dog.beat("compiling", compiles=True)
        time.sleep(5)
        assert not ended
        dog.beat("a step")
        until = time.monotonic() + 60
        while not ended and time.monotonic() < until:
            time.sleep(0.05)
    assert ended and "in 'a step'" in capsys.readouterr().err


def test_validation_is_in_the_precision_of_the_run(monkeypatch, tmp_path):
    seen = []
    evaluate = trainer.evaluate
    monkeypatch.setattr(
        trainer, "evaluate", lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or evaluate(*a, **k)
    )
    with trainer.init_distributed("cpu") as world:
        for precision in ("fp32", "bf16"):
            run = Run(small_config(tmp_path, train={"precision": precision}), world)
            assert ("bf16 (validation too) on cpu" in run.description()) == (precision == "bf16")
            trainer.Trainer(run, []).validate(run.network)
    assert seen == [False, True]


def test_validation_lays_images_out_as_the_network(monkeypatch, tmp_path):
    """In fp32 on a GPU that is not as they come; cuDNN would lay out each weight anew for each batch."""
    seen = []
    with trainer.init_distributed("cpu") as world:
        for layout in ("contiguous", "channels_last"):
            run = Run(small_config(tmp_path, train={"memory_format": layout}), world)
            run.network.register_forward_pre_hook(lambda _, images: seen.append(images[0].is_contiguous()))
            trainer.Trainer(run, []).validate(run.network)
            assert {*seen} == {layout == "contiguous"}
            seen.clear()


def test_a_run_chooses_its_kernels(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("pipeline.run.choose_kernels", lambda *words: asked.append(words))
    with trainer.init_distributed("cpu") as world:
        Run(small_config(tmp_path), world)
        Run(small_config(tmp_path, train={"deterministic": True, "cudnn_benchmark": False}), world)
    assert asked == [(True, False), (False, True)]


def test_dropout_is_seeded_as_torch_seeds_it(tmp_path):
    with trainer.init_distributed("cpu") as world:
        run = Run(small_config(tmp_path, model={"dropout": 0.2}), world)
        run.seed_dropout(0)
    seed = torch.default_generator.initial_seed()
    ours = F.dropout(torch.ones(100))
    torch.manual_seed(seed)
    assert torch.equal(F.dropout(torch.ones(100)), ours)


@pytest.mark.parametrize("overflows", [False, True])
def test_the_fused_optimizer_begins_with_a_momentum_of_zero(monkeypatch, overflows):
    """torch's kernel leaves it uninitialised after a first step that overflows; with finite steps it has the same bits."""
    monkeypatch.setattr(optim, "_on_gpu", lambda parameters: True)  # the kernel is there on CPU too
    networks = [torch.nn.Linear(5, 3) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    fused = optim.create_optimizer(networks[0], OptimConfig())
    assert fused.param_groups[0]["fused"]
    plain = torch.optim.SGD(
        networks[1].parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 if overflows else 1.0)
    for _ in range(3):
        for network, optimizer in zip(networks, (fused, plain), strict=True):
            optimizer.zero_grad()
            loss = network(torch.ones(2, 5)).sum()
            if optimizer is fused:
                scaler.scale(loss).backward()
                scaler.step(fused)
                scaler.update()
            elif not overflows:
                loss.backward()
                plain.step()
        if overflows:
            assert not any(state["momentum_buffer"].any() for state in fused.state.values())
            return
    assert all(torch.equal(a, b) for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True))


def test_parameters_that_thaw_join_the_fused_optimizer(monkeypatch):
    monkeypatch.setattr(optim, "_on_gpu", lambda parameters: True)
    network = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    network[0].requires_grad_(False)
    frozen = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(2, 5)).sum().backward()
    frozen.step()
    network.requires_grad_(True)
    thawed = optim.create_optimizer(network, OptimConfig())
    optim.load_state(thawed, network, frozen.state_dict())
    network(torch.ones(2, 5)).sum().backward()
    thawed.step()
    assert all(state["momentum_buffer"].any() for state in thawed.state.values())
