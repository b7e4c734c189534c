"""What `auto` measures on a GPU, here on CPU: which candidates there are, which are refused; a run keeps its choice."""

import dataclasses
import io
import json
import re
import signal
import types

import pytest
import torch
from conftest import small_config

from pipeline import api, autotune, compilation, distributed, trainer
from pipeline.autotune import Implementation, Tuning, candidates, measure, measure_apart
from pipeline.errors import UserError
from pipeline.hooks import Hook
from pipeline.models import create_model, create_network, fused, memory_efficient
from pipeline.run import Run
from pipeline.weights import Weights

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
    monkeypatch.setattr(autotune._Work, "seconds", lambda self, *_: seconds[self._network.dense_block])
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
    wrong = [
        line for line in others if line.startswith("left out memory_efficient channels_last: its logits of a shall")
    ]
    failed = "left out fused channels_last: an illegal access"
    assert len(wrong) == 1 and (failed in others) == (precision != "fp16")  # in which another stands in for it


def test_dropout_parts_no_candidates_by_chance(tmp_path):
    """Who computes blocks without their modules is no candidate: the run would have the modules in its place."""
    network = create_model("densenet_bc22_k8", num_classes=3, dropout=0.5)
    for precision in ("fp32", "bf16"):
        config = small_config(tmp_path, train={"memory_format": "channels_last", "precision": precision})
        tuning = measure(network, config, CPU, 8)
        assert "8 images: eager channels_last" in tuning.text and "left out" not in tuning.text
        assert "fused" not in tuning.text and tuning.chosen.dense_block == "eager"
    assert {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}


def loses_statistics(monkeypatch):
    monkeypatch.setattr(memory_efficient, "blend_running_statistics", lambda *_: None)


def is_wrong_in_evaluation(monkeypatch):
    right = fused.stage
    monkeypatch.setattr(fused, "stage", lambda x, stage: right(x, stage) + (not stage.norm.training))


def forgets_gammas(monkeypatch):
    right = memory_efficient._gradients

    def gradients(*arguments):
        found = right(*arguments)
        return [found[0], *(0 * tensor if tensor.dim() == 1 else tensor for tensor in found[1:])]

    monkeypatch.setattr(memory_efficient, "_gradients", gradients)


@pytest.mark.parametrize(
    ("block", "spoil", "what"),
    [
        ("memory_efficient", loses_statistics, "running statistics"),
        ("fused", is_wrong_in_evaluation, "logits in evaluation"),
        ("memory_efficient", forgets_gammas, "gradients of norms"),
    ],
)
def test_whatever_a_run_gets_is_compared(network, tmp_path, monkeypatch, block, spoil, what):
    spoil(monkeypatch)
    if what == "gradients of norms":  # what is all zeros is wrong, however coarse the precision
        monkeypatch.setattr(autotune, "TIMES_EAGER", 1e9)
    monkeypatch.setattr(autotune._Work, "seconds", lambda self, *_: 1.0)
    only = Implementation(block, "channels_last", "none")
    text = measure(network, config_of(tmp_path), CPU, 4, only).text
    assert text.startswith(f"left out {block} channels_last: its {what} of a shallow network are "), text


def test_a_gpu_that_a_kernel_has_spoilt_costs_what_comes_after(network, tmp_path, monkeypatch):
    """A later call to a spoilt GPU fails, whatever it is for."""

    def spoils(x, stage):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(memory_efficient, "stage", spoils)
    monkeypatch.setattr(autotune, "is_usable", lambda device: False)
    tuning = measure(network, config_of(tmp_path), CPU, 4)
    first, second, third = tuning.text.splitlines()
    assert tuning.chosen.dense_block == "eager" and "eager channels_last " in first
    assert second == "left out memory_efficient channels_last: CUDA error: an illegal memory access was encountered"
    assert third == "left out fused channels_last: the GPU cannot be used any more"
    monkeypatch.setattr(autotune, "is_out_of_memory", lambda error: True)
    assert "any more" not in measure(network, config_of(tmp_path), CPU, 4).text


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
        return step(self, x, labels)

    monkeypatch.setattr(autotune._Work, "step", limited)
    monkeypatch.setattr(torch, "compile", lambda inner, **_: inner)
    config = small_config(tmp_path, train={"memory_format": "channels_last", "compile": "default"})
    tuning = measure(network, config, CPU, 16)
    assert seen[:4] == [16, 8, 4, autotune.FEW] and 16 in seen[4:] and "ms a step of 16 images" in tuning.text
    assert "eager channels_last compiled (default) " in tuning.text  # which is checked on the shallow network alone


def test_graphs_must_leave_memory_to_an_epochs_last_batch(network, tmp_path, monkeypatch):
    """Whole batches are computed twice before they are captured, and then in the graphs' memory; others never are."""
    taken = {}

    class Replayed(torch.nn.Module):
        def __init__(self, network, images):
            super().__init__()
            self.network, self.images = network, images

        def forward(self, x):
            if len(x) == self.images:
                taken[id(self)] = self.images
            elif taken.get(id(self), 0) + len(x) > room:
                raise RuntimeError("CUDA out of memory")
            return self.network(x)

    monkeypatch.setattr(
        autotune,
        "compile_network",
        lambda network, mode, images, _: Replayed(network, images) if mode == "graphs" else network,
    )
    both = [Implementation("eager", "channels_last", mode) for mode in ("none", "graphs")]
    monkeypatch.setattr(autotune, "candidates", lambda *_: both)
    for room in (16, 15, 14):
        tuning = measure(network, config_of(tmp_path), CPU, 8)
        left_out = "left out eager channels_last in CUDA graphs: out of memory" in tuning.text
        assert left_out == (room < 15) and "8 images: eager" in tuning.text


def test_candidates_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp32 = candidates(small_config(tmp_path), GPU)
    assert {*fp32} == {
        Implementation(block, layout, mode)
        for block in ("eager", "memory_efficient", "fused", "triton")
        for layout in ("contiguous", "channels_last")
        for mode in ("none", "graphs")
    }
    assert [(c.dense_block, c.compile) for c in fp32[:3:2]] == [("eager", "none"), ("eager", "graphs")]
    assert fp32[-1].dense_block == "triton"  # last: it is the least known
    sparing = small_config(tmp_path, model={"activation_checkpointing": "all"})
    assert "eager" in {c.dense_block for c in fp32} and "eager" not in {c.dense_block for c in candidates(sparing, GPU)}
    usual, asked_less = (autotune.what_is_asked(config, GPU, 4) for config in (small_config(tmp_path), sparing))
    for before, now, was in ((usual, asked_less, "none"), (asked_less, usual, "all")):
        assert autotune.asked_otherwise(Tuning(fp32[0], before, ""), now) == [f"activation_checkpointing {was}"]
    accumulates = candidates(small_config(tmp_path, optim={"grad_accum_steps": 2}), GPU)
    assert {c.compile for c in accumulates} == {"none"}
    for mode in ("none", "graphs"):
        assert {c.compile for c in candidates(small_config(tmp_path, train={"compile": mode}), GPU)} == {mode}
    bf16 = candidates(small_config(tmp_path, train={"precision": "bf16", "compile": "default"}), GPU)
    assert {c.memory_format for c in bf16} == {"channels_last"}
    assert bf16[1] == Implementation("eager", "channels_last", "default") and len(bf16) == 5  # after what it comes from
    one = small_config(tmp_path, model={"dense_block": "eager"}, train={"compile": "none"})
    named = candidates(one, GPU)
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
        how = small_config(tmp_path, train=train, **named)
        assert autotune.leaves_a_choice(how, GPU, network)  # of CUDA graphs
        how = small_config(tmp_path, train={**train, "compile": "none"}, **named)
        assert not autotune.leaves_a_choice(how, GPU, network)
    assert not autotune.leaves_a_choice(small_config(tmp_path, model={"freeze": 1}), GPU, network)


def test_the_process_that_measures(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    tuning = measure_apart(config, 3, CPU, 4)
    assert tuning.chosen.memory_format == "channels_last" and "fused channels_last " in tuning.text
    assert tuning == Tuning.from_state(dataclasses.asdict(tuning))
    alone = measure_apart(config, 1, CPU, 4)  # a single label an image, whose logits a softmax says nothing of
    assert "fused channels_last " in alone.text and "left out fused" not in alone.text
    monkeypatch.setattr(autotune.sys, "executable", "/bin/false")
    lost = measure_apart(config, 3, CPU, 4)
    assert lost.chosen == Implementation("auto", "channels_last", "none")
    assert lost.text == "nothing was measured: the process that measures ended with 1: without a word"
    monkeypatch.setattr(autotune.sys, "executable", "/bin/none")
    assert (
        measure_apart(config, 3, CPU, 4).text
        == "nothing was measured: no process could be started: No such file or directory"
    )
    graphs = small_config(tmp_path, optim={"grad_accum_steps": 2}, train={"compile": "reduce-overhead"})
    with pytest.raises(UserError, match="cannot accumulate"):
        measure_apart(graphs, 3, CPU, 4)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (
            "kill -SEGV $$",
            "left out fused channels_last, triton channels_last: the process that measures ended with -11: oh",
        ),
        ("exec sleep 60", "left out fused channels_last, triton channels_last: it took more than 20 s"),
        ("exit 3", "left out fused channels_last, triton channels_last: the process that measures ended with 3: oh"),
    ],
)
def test_an_end_of_the_process_costs_what_it_had_not_measured(tmp_path, monkeypatch, end, said):
    found = Tuning(Implementation("eager", "channels_last", "none"), {"a": 1}, "computes with eager", "a card")
    line = json.dumps({"tuning": dataclasses.asdict(found), "following": "fused channels_last, triton channels_last"})
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho noise\necho '{line}'\necho '[1]' {{}}\necho 1\necho oh >&2\n{end}\n")
    program.chmod(0o700)
    monkeypatch.setattr(autotune.sys, "executable", str(program))
    monkeypatch.setattr(autotune, "PATIENCE", (20 if "sleep" in end else 600, 0))
    tuning = measure_apart(config_of(tmp_path), 3, CPU, 4)
    assert tuning == dataclasses.replace(found, text=f"computes with eager\n{said}")


def test_other_ranks_wait_longer_than_rank_0_measures():
    assert max(autotune.PATIENCE) < 0.8 * distributed.PATIENCE.total_seconds()


def test_the_process_ends_with_its_run_and_leaves_it_memory(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(autotune, "ask_for_signal_when_parent_dies", calls.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *words: calls.append(words))
    found = Tuning(Implementation("eager", "channels_last", "none"), {}, "computes with eager", "a card")
    monkeypatch.setattr(autotune, "measure", lambda network, config, device, images, only, report: found)
    task = {
        "config": dataclasses.asdict(config_of(tmp_path)),
        "classes": 3,
        "device": "cuda:0",
        "images": 4,
        "only": None,
    }
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(task)))
    autotune.main()
    assert calls == [signal.SIGKILL, (autotune.USABLE, GPU)]
    assert autotune._last_word(capsys.readouterr().out) == (found, "")


def test_rank_0_decides_for_all(network, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(autotune, "measure_apart", lambda *_: pytest.fail("measured by another rank"))
    of_rank_0 = Tuning(Implementation("fused", "channels_last", "none"), {}, "what rank 0 has chosen", "new")
    world = types.SimpleNamespace(
        device=CPU, broadcast_from_rank0=lambda make: of_rank_0, gather=lambda card: [card] * 2
    )
    rank_1 = types.SimpleNamespace(
        config=small_config(tmp_path), world=world, conditions=types.SimpleNamespace(classes=[1])
    )
    assert Run._tune(rank_1, network, 12, None) is of_rank_0
    kept = Tuning(
        Implementation("fused", "channels_last", "none"), autotune.what_is_asked(rank_1.config, CPU, 12), "", "old"
    )
    state = {"tuning": dataclasses.asdict(kept), "config": dataclasses.asdict(rank_1.config)}
    found = types.SimpleNamespace(state=state)
    assert Run._tune(rank_1, network, 12, found) is of_rank_0  # by its own card


def test_a_choice_is_kept_on_its_card_and_checked_on_another(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(autotune, "measure_apart", lambda *words: asked.append(words[4]) or "checked")
    config = config_of(tmp_path)
    triton, eager = (Implementation(block, "channels_last", "none") for block in ("triton", "eager"))

    def choose(cards, kept=None):
        return autotune.choose(config, 3, CPU, 4, cards, kept)

    nothing = autotune.Tuning(Implementation("auto", "auto", "none"), {}, "nothing was measured: it died", "")
    assert choose(["A100"], nothing) is nothing  # the modules compute, which need no check
    failed = dataclasses.replace(nothing, card="V100")  # there all candidates had failed
    assert choose(["A100"], failed) is failed
    kept = Tuning(triton, {}, "", "A100")
    assert choose(["A100", "A100"], kept) is kept and not asked
    assert (
        choose(["H100", "H100"], kept) == "checked"
        and choose(["A100"], dataclasses.replace(kept, card="")) == "checked"
    )
    assert choose(["H100"]) == "checked" and asked == [triton, triton, None]
    for before in (None, kept):
        mixed = choose(["A100", "V100"], before)
        assert mixed.chosen.dense_block == "auto" and "different GPUs (A100, V100)" in mixed.text
    of_modules = dataclasses.replace(kept, chosen=eager)
    assert choose(["V100", "A100"], of_modules) is of_modules and len(asked) == 3


@pytest.mark.parametrize(
    ("card", "precision", "dense_block"), [("cpu", "bf16", "eager"), ("cpu", "fp32", "auto"), ("A100", "bf16", "auto")]
)
def test_an_evaluation_computes_as_its_run_did_on_such_a_card(network, card, precision, dense_block):
    tuning = Tuning(Implementation("eager", "contiguous", "none"), {"precision": "bf16"}, "", card)
    _, order = autotune.for_evaluation(network, dataclasses.asdict(tuning), precision, CPU)
    chosen = dense_block == "eager"
    assert network.dense_block == dense_block and (order is torch.contiguous_format) == chosen
    network.dense_block = "fused"
    assert autotune.for_evaluation(network, dataclasses.asdict(tuning), precision, CPU)[0].dense_block == "fused"
    linear, order = autotune.for_evaluation(torch.nn.Linear(1, 1), None, precision, CPU)
    assert isinstance(linear, torch.nn.Linear) and order is torch.channels_last


def test_the_library_evaluates_in_fp32_and_not_in_tf32(network, tmp_path, monkeypatch):
    """torch's own default is TF32."""
    asked = []
    monkeypatch.setattr(api, "set_tf32", asked.append)
    weights = Weights("a.pth", network, small_config(tmp_path), ("a", "b", "c"), None)
    monkeypatch.setattr(api, "read_weights", lambda path, ema: weights)
    monkeypatch.setattr(api, "scan_classes", lambda *_, **__: types.SimpleNamespace(with_classes=lambda classes: None))
    monkeypatch.setattr(api, "evaluate_network", lambda network, *_, **__: asked.append(network))
    api.evaluate("weights", tmp_path, device="cpu")
    assert asked == ["fp32", network]


class Stop(Exception):  # noqa: N818 - no error
    pass


class StopAfterAnEpoch(Hook):
    changes_network = False

    def on_step_start(self, trainer):
        if trainer.run.progress.epoch == 1:
            raise Stop


def test_what_stands_in_for_what_cannot_compute_is_measured(network, tmp_path):
    """Else nothing would be, and graphs would never be tried."""
    named = config_of(tmp_path, model={"dense_block": "triton"})
    tuning = measure(network, named, CPU, 4)
    assert re.match(r"computes with (eager|memory_efficient|fused) channels_last; ms a step", tuning.text), tuning
    spares = config_of(tmp_path, model={"activation_checkpointing": "all", "dropout": 0.2})
    tuning = measure(create_network(spares.model, 3, 3), spares, CPU, 4)
    assert tuning.text.startswith("computes with eager channels_last; ms a step of 4 images: eager channels_last ")
    assert tuning.text.count("channels_last") == 2  # once, whatever it stands in for


def test_a_choice_that_other_cards_cannot_take_is_kept_for_those_that_can(network, tmp_path, monkeypatch):
    config, cards = config_of(tmp_path), ["A100", "V100"]
    asked = autotune.what_is_asked(config, CPU, 12)
    kept = Tuning(Implementation("triton", "channels_last", "graphs"), asked, "computes with it", "A100")
    monkeypatch.setattr(autotune, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(
        autotune, "measure_apart", lambda *_: Tuning(autotune.as_configured(config), asked, "a\nb", "V100")
    )
    world = types.SimpleNamespace(device=CPU, broadcast_from_rank0=lambda make: make(), gather=lambda _: cards)
    run = types.SimpleNamespace(config=config, world=world, conditions=types.SimpleNamespace(classes=[1]))
    state = {"tuning": dataclasses.asdict(kept), "config": dataclasses.asdict(config)}
    mixed = "nothing was measured: the ranks have different GPUs (A100, V100)"
    for there, why in ((["A100", "V100"], mixed), (["V100"], "a; b")):
        cards[:] = there
        assert Run._tune(run, network, 12, types.SimpleNamespace(state=state)) is None
        assert run._tuning_left == (kept, why)
        state = {"tuning": None, "tuning_left": dataclasses.asdict(kept), "config": state["config"]}
    cards[:] = ["A100"]
    assert Run._tune(run, network, 12, types.SimpleNamespace(state=state)) == kept


def test_a_resumed_run_keeps_its_choice(tmp_path, monkeypatch, capsys):
    calls = []

    def choose(config, classes, device, images, only):
        calls.append((classes, images))
        chosen = Implementation("memory_efficient", "contiguous", "none")
        return Tuning(chosen, autotune.what_is_asked(config, device, images), "computes with memory_efficient", "cpu")

    monkeypatch.setattr(autotune, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(autotune, "measure_apart", choose)
    cut = small_config(tmp_path / "cut")
    with pytest.raises(Stop):
        trainer.fit(cut, [StopAfterAnEpoch()])
    capsys.readouterr()
    trainer.fit(cut)
    assert capsys.readouterr().out.count("computes with memory_efficient\n") == 1
    assert calls == [(3, 12)]
    with trainer.init_distributed("cpu") as world:
        start = trainer.find_start(cut)
        run = Run(cut, world, start)
        assert run.network.dense_block == "memory_efficient" and run.memory_format is torch.contiguous_format
        start.checkpoint.state["tuning"]["asked"]["compile"] = "none"  # as of a version before auto
        assert "computes now with" not in run.description()
        start.checkpoint.state["tuning"]["chosen"]["compile"] = "graphs"
        without = Run(small_config(tmp_path / "cut", train={"compile": "none"}), world, start)
        assert without.network.dense_block == "memory_efficient" and without.compiled is without.network
        assert "\ncomputes now with memory_efficient contiguous" in without.description()
        start.checkpoint.state["tuning"]["chosen"]["compile"] = "none"
        asks_otherwise = small_config(tmp_path / "cut", train={"memory_format": "channels_last"})
        run = Run(asks_otherwise, world, start)
        assert run.network.dense_block == "auto" and run.memory_format is torch.channels_last
        assert "\nwhat the run has measured before (memory_efficient contiguous" in run.description()
        assert "is not taken: it was for memory_format auto" in run.description()
        named = small_config(tmp_path / "cut", model={"dense_block": "eager"}, train={"compile": "none"})
        for between in (asks_otherwise, named):  # a start that asks otherwise, and one that leaves nothing to choose
            saved = Run(between, world, start).state_dict()
            start.checkpoint.state.update({key: saved[key] for key in ("tuning", "tuning_left")})
            assert start.checkpoint.state["tuning"] is None
        assert Run(cut, world, start).network.dense_block == "memory_efficient"  # back as it was
        start.checkpoint.state.pop("tuning_left")
        start.checkpoint.state.pop("tuning")  # as of a version before
        assert Run(cut, world, start).network.dense_block == "auto"
    assert calls == [(3, 12)]


@pytest.mark.parametrize(
    ("asked", "chosen", "now", "accumulation", "expected"),
    [
        ("auto", "graphs", "auto", 1, "graphs"),
        ("auto", "graphs", "auto", 2, "none"),  # which is another split of the same batches
        ("auto", "graphs", "none", 1, "none"),
        ("auto", "none", "graphs", 1, "graphs"),
        ("none", "none", "auto", 1, "none"),  # of a version whose default that was
        ("default", "none", "default", 1, "none"),
        ("default", "default", "auto", 1, None),
        ("auto", "graphs", "default", 1, None),
    ],
)
def test_graphs_come_and_go_and_the_choice_is_kept(tmp_path, asked, chosen, now, accumulation, expected):
    then = small_config(tmp_path, train={"compile": asked})
    kept = Tuning(Implementation("triton", "channels_last", chosen), autotune.what_is_asked(then, GPU, 12), "", "a")
    config = small_config(tmp_path, train={"compile": now}, optim={"grad_accum_steps": accumulation})
    others = autotune.asked_otherwise(kept, autotune.what_is_asked(config, GPU, 12))
    assert others == ([] if expected else [f"compile {asked}"])
    if expected:
        found = autotune.as_chosen(kept.chosen, config)
        assert found == Implementation("triton", "channels_last", expected)
        compilation.compile_network(
            torch.nn.Linear(1, 1), found.compile, 12, accumulation
        )  # which refuses what it cannot
    other = small_config(tmp_path, train={"compile": now, "precision": "bf16"})
    assert "precision fp32" in autotune.asked_otherwise(kept, autotune.what_is_asked(other, GPU, 12))


def test_on_a_cpu_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "measure_apart", lambda *_: pytest.fail("measured"))
    with trainer.init_distributed("cpu") as world:
        run = Run(small_config(tmp_path), world)
        assert run.tuning is None and run.network.dense_block == "auto" and run.memory_format is torch.channels_last
        assert run.state_dict()["tuning"] is None
