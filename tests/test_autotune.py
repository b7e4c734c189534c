"""What `auto` measures on a GPU, here on CPU: which candidates there are, which are refused; a run keeps its choice."""

import dataclasses
import types

import pytest
import torch
from conftest import small_config

from pipeline import autotune, trainer
from pipeline.autotune import Implementation, Tuning, candidates, measure, measure_apart
from pipeline.errors import UserError
from pipeline.hooks import Hook
from pipeline.models import create_model, fused, memory_efficient
from pipeline.run import Run

pytestmark = pytest.mark.slow

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return create_model("densenet_bc22_k8", num_classes=3)


def config_of(tmp_path, **sections):
    """One in which `auto` has one memory format to choose from."""
    return small_config(tmp_path, train={"memory_format": "channels_last"}, **sections)


def test_the_fastest_is_taken_and_the_network_left_as_it_is(network, tmp_path, monkeypatch):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state, tuning = torch.random.get_rng_state(), measure(network, config_of(tmp_path), CPU, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state()) and network.selection is None
    (line,) = tuning.text.splitlines()
    for name in ("eager", "memory_efficient", "fused"):
        assert f"{name} channels_last " in line
    seconds = {"eager": 3.0, "memory_efficient": 2.0, "fused": 4.0}
    monkeypatch.setattr(autotune._Work, "seconds", lambda self, *_: seconds[self._candidate.dense_block])
    tuning = measure(network, config_of(tmp_path), CPU, 4)
    assert tuning.chosen == Implementation("memory_efficient", "channels_last", "none")
    assert tuning.text.startswith(
        "computes with memory_efficient channels_last; ms a step of 4 images: memory_efficient"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_wrong_or_fails_costs_a_line(network, tmp_path, monkeypatch, precision):
    right = memory_efficient.stage

    def fails(x, stage):
        raise RuntimeError("an illegal access\nand more")

    monkeypatch.setattr(memory_efficient, "stage", lambda x, stage: 3 * right(x, stage) + 1)
    monkeypatch.setattr(fused, "stage", fails)
    config = small_config(tmp_path, train={"memory_format": "channels_last", "precision": precision})
    tuning = measure(network, config, CPU, 4)
    assert tuning.chosen.dense_block == "eager"
    first, *others = tuning.text.splitlines()
    assert "eager channels_last" in first and "fused" not in first and "memory_efficient" not in first
    wrong = [line for line in others if line.startswith("left out memory_efficient channels_last: its gradients are ")]
    failed = "left out fused channels_last: an illegal access"
    assert len(wrong) == 1 and (failed in others) == (precision != "fp16")  # in which another stands in for it


def test_where_nothing_can_be_measured_the_run_does_as_asked(network, tmp_path, monkeypatch):
    def fails(self, *_):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(autotune._Work, "step", fails)
    tuning = measure(network, config_of(tmp_path), CPU, 4)
    assert tuning.chosen == Implementation("auto", "channels_last", "none")
    assert tuning.text == "nothing was measured: no such GPU"


def test_a_reference_that_does_not_fit_is_of_fewer_images(network, tmp_path, monkeypatch):
    step, seen = autotune._Work.step, []

    def limited(self, x, labels):
        seen.append(len(x))
        if len(x) > 4 and len(seen) < 3:
            raise RuntimeError("CUDA out of memory")
        step(self, x, labels)

    monkeypatch.setattr(autotune._Work, "step", limited)
    monkeypatch.setattr(torch, "compile", lambda inner, **_: inner)
    config = small_config(tmp_path, train={"memory_format": "channels_last", "compile": "default"})
    tuning = measure(network, config, CPU, 16)
    assert seen[:4] == [16, 8, 4, 4] and 16 in seen[4:] and "ms a step of 16 images" in tuning.text
    assert "left out eager channels_last compiled (default): the modules in float32" in tuning.text


def test_candidates_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp32 = candidates(small_config(tmp_path), GPU)
    assert {(c.dense_block, c.memory_format) for c in fp32} == {
        (block, layout)
        for block in ("eager", "memory_efficient", "fused", "triton")
        for layout in ("contiguous", "channels_last")
    }
    assert fp32[-1].dense_block == "triton"  # last: it is the least known
    bf16 = candidates(small_config(tmp_path, train={"precision": "bf16", "compile": "default"}), GPU)
    assert {c.memory_format for c in bf16} == {"channels_last"}
    assert Implementation("eager", "channels_last", "default") in bf16 and len(bf16) == 5
    named = candidates(small_config(tmp_path, model={"dense_block": "eager"}), GPU)
    assert [(c.dense_block, c.memory_format) for c in named] == [("eager", "contiguous"), ("eager", "channels_last")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "triton" not in {c.dense_block for c in candidates(small_config(tmp_path), GPU)}


def test_a_run_measures_where_it_has_a_choice_on_a_gpu(network, tmp_path):
    asks = small_config(tmp_path)
    assert autotune.leaves_a_choice(asks, GPU, network) and not autotune.leaves_a_choice(asks, CPU, network)
    assert not autotune.leaves_a_choice(asks, GPU, torch.nn.Linear(1, 1))
    named = {"model": {"dense_block": "eager"}}
    assert autotune.leaves_a_choice(small_config(tmp_path, **named), GPU, network)  # of the memory format
    for train in ({"memory_format": "contiguous"}, {"precision": "bf16"}):
        assert not autotune.leaves_a_choice(small_config(tmp_path, train=train, **named), GPU, network)
    assert not autotune.leaves_a_choice(small_config(tmp_path, model={"freeze": 1}), GPU, network)


def test_the_process_that_measures(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    tuning = measure_apart(config, 3, CPU, 4)
    assert tuning.chosen.memory_format == "channels_last" and "fused channels_last " in tuning.text
    assert tuning == Tuning.from_state(dataclasses.asdict(tuning))
    monkeypatch.setattr(autotune.sys, "executable", "/bin/false")
    lost = measure_apart(config, 3, CPU, 4)
    assert lost.chosen == Implementation("auto", "channels_last", "none")
    assert lost.text == "nothing was measured: the process that measures ended with 1: without a word"
    graphs = small_config(tmp_path, optim={"grad_accum_steps": 2}, train={"compile": "reduce-overhead"})
    with pytest.raises(UserError, match="cannot accumulate"):
        measure_apart(graphs, 3, CPU, 4)


def test_rank_0_decides_for_all(network, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(autotune, "measure_apart", lambda *_: pytest.fail("measured by another rank"))
    world = types.SimpleNamespace(device=CPU, broadcast_from_rank0=lambda make: "what rank 0 has chosen")
    rank_1 = types.SimpleNamespace(
        config=small_config(tmp_path), world=world, conditions=types.SimpleNamespace(classes=[1])
    )
    assert Run._tune(rank_1, network, 12, None) == "what rank 0 has chosen"


class Stop(Exception):  # noqa: N818 - no error
    pass


class StopAfterAnEpoch(Hook):
    changes_network = False

    def on_step_start(self, trainer):
        if trainer.run.progress.epoch == 1:
            raise Stop


def test_a_resumed_run_keeps_its_choice(tmp_path, monkeypatch, capsys):
    calls = []

    def choose(config, classes, device, images):
        calls.append((classes, images))
        chosen = Implementation("memory_efficient", "contiguous", "none")
        return Tuning(chosen, autotune.what_is_asked(config, device, images), "computes with memory_efficient")

    monkeypatch.setattr(autotune, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(autotune, "measure_apart", choose)
    cut = small_config(tmp_path / "cut")
    with pytest.raises(Stop):
        trainer.fit(cut, [StopAfterAnEpoch()])
    capsys.readouterr()
    trainer.fit(cut)
    assert "\ncomputes with memory_efficient\n" in capsys.readouterr().out
    assert calls == [(3, 12)]
    with trainer.init_distributed("cpu") as world:
        start = trainer.find_start(cut)
        run = Run(cut, world, start)
        assert run.network.dense_block == "memory_efficient" and run.memory_format is torch.contiguous_format
        asks_otherwise = small_config(tmp_path / "cut", train={"memory_format": "channels_last"})
        run = Run(asks_otherwise, world, start)
        assert run.network.dense_block == "auto" and run.memory_format is torch.channels_last
        start.checkpoint.state.pop("tuning")  # as of a version before
        assert Run(cut, world, start).network.dense_block == "auto"
    assert calls == [(3, 12)]


def test_on_a_cpu_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "measure_apart", lambda *_: pytest.fail("measured"))
    with trainer.init_distributed("cpu") as world:
        run = Run(small_config(tmp_path), world)
        assert run.tuning is None and run.network.dense_block == "auto" and run.memory_format is torch.channels_last
        assert run.state_dict()["tuning"] is None
