"""What ``auto`` means on a GPU: candidates for computing a training step are checked, timed, and the fastest right one taken.

Each candidate computes on a network as the run's, with a batch of its size. One that fails, or that is farther from float32
than `TIMES_EAGER` times the modules and `ROUNDING` in anything that a run gets from it, costs the run one line. That is
logits in training and evaluation and running statistics; and of a shallow network as wide as the run's gradients, too. A
deep network's gradients show little: it multiplies rounding. DenseNet-121's are 0.02 apart in float32 for another memory
format, and in bfloat16 0.7 from float32's, where zeros are 1.

All this is in a process of its own (``python -m pipeline.autotune``), as a kernel that writes where it must not leaves a
process that can use its GPU no more. That process says before each candidate what it has found so far, so that its end costs
the run no more than the candidates from there on.
The choice is kept in the checkpoint, and rank 0 makes it for all. On CPU nothing is measured.

An H200 has run it in bf16; the tests run it on CPU.
"""

import copy
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compilation import BY_TORCH, compile_network, in_words, refuse_graphs
from pipeline.config import Compile, Config, MemoryFormat
from pipeline.config_file import from_dict
from pipeline.cuda_graphs import ReplayedNetwork
from pipeline.distributed import is_usable
from pipeline.errors import first_line, is_out_of_memory
from pipeline.machine import ask_for_signal_when_parent_dies
from pipeline.models import create_network
from pipeline.models.backends import BACKENDS
from pipeline.models.densenet import DenseNet
from pipeline.models.folding import folded
from pipeline.precision import AUTOCAST_TYPES, autocast, choose_kernels, memory_format, set_tf32

MEASURED_ON = ("cuda",)  # kinds of devices
TIMES_EAGER, ROUNDING = 2.0, 1e-2  # of a distance, relative
CHANCE = 0.1  # in place of ROUNDING for gradients in bf16 and fp16: a ReLU that rounding turns off changes them by more than it
FARTHEST = 0.9  # what is all zeros is 1 away, whatever rounding does to the modules
FEW, WIDEST = 4, 512  # images, and maps into the first block, of the shallow network, to which less memory is enough
WARM_UP, TIMED = 3, 5  # steps
SCALE = 2.0**10  # of the loss in fp16, whose gradients would vanish
PATIENCE = 600, 2400  # seconds, the second if something is compiled; other ranks wait an hour (distributed.PATIENCE)
# Of the GPU's memory. A step must find room there, and beside CUDA graphs a second one; a run has more than its steps:
# momentum, the buckets of gradients, batches that are made ahead.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How a training step is computed; the words are those of the configuration."""

    dense_block: str
    memory_format: MemoryFormat
    compile: Compile

    def __str__(self) -> str:
        return f"{self.dense_block} {self.memory_format} {in_words(self.compile)}".rstrip()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The implementation that a run has chosen.

    Attributes:
        asked: what the choice was made for; a run that asks for something else makes another.
        text: lines on what was measured.
        card: the GPU on which it was measured; empty if that is not known.
    """

    chosen: Implementation
    asked: dict[str, Any]
    text: str
    card: str = ""

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "Tuning":
        return Tuning(Implementation(**state["chosen"]), dict(state["asked"]), state["text"], state.get("card", ""))

    @staticmethod
    def of_checkpoint(state: Mapping[str, Any]) -> "Tuning | None":
        """What a checkpoint's run has measured, also where its last start asked otherwise; None if it has not."""
        if not (stored := state.get("tuning") or state.get("tuning_left")):
            return None
        kept, recomputed = Tuning.from_state(stored), state["config"]["model"].get("activation_checkpointing", "none")
        if recomputed == "none":
            return kept
        # A checkpoint of before does not say that there.
        return dataclasses.replace(kept, asked={"activation_checkpointing": recomputed, **kept.asked})


def as_configured(config: Config) -> Implementation:
    """What a run computes with where nothing is measured."""
    mode = config.train.compile
    return Implementation(config.model.dense_block, config.train.memory_format, "none" if mode == "auto" else mode)


def what_is_asked(config: Config, device: torch.device, images: int) -> dict[str, Any]:
    train, recomputed = config.train, config.model.activation_checkpointing
    return {
        **({} if recomputed == "none" else {"activation_checkpointing": recomputed}),
        "dense_block": config.model.dense_block, "memory_format": train.memory_format, "compile": train.compile,
        "precision": train.precision, "device": device.type, "images": images,
    }  # fmt: skip


def asked_otherwise(kept: Tuning, asked: Mapping[str, Any]) -> list[str]:
    """What a checkpoint's choice was made for, where something else is asked now. Graphs change no bit: they do not count."""
    alike = ("none", "graphs", "auto")
    both = {name: (kept.asked.get(name, "none"), asked.get(name, "none")) for name in {**kept.asked, **asked}}
    return [
        f"{name} {was}"
        for name, (was, now) in both.items()
        if was != now and not (name == "compile" and was in alike and now in alike)
    ]


def as_chosen(chosen: Implementation, config: Config) -> Implementation:
    """What a run computes with by a choice that may have been made when graphs were asked for, or could be used, otherwise."""
    mode = config.train.compile
    if mode == "auto":
        mode = chosen.compile if config.optim.grad_accum_steps == 1 else "none"
    return chosen if mode in BY_TORCH else dataclasses.replace(chosen, compile=mode)


def leaves_a_choice(config: Config, device: torch.device, network: nn.Module) -> bool:
    """Whether a run of this configuration is one to measure for; one with frozen norms leaves its blocks to the modules."""
    train = config.train
    free = "auto" in (config.model.dense_block, train.compile) or (
        train.memory_format == "auto" and train.precision == "fp32"
    )
    frozen = config.model.freeze is not None
    return free and not frozen and device.type in MEASURED_ON and isinstance(network, DenseNet)


def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def candidates(config: Config, device: torch.device) -> list[Implementation]:
    """What may be the fastest: the modules, each backend that can run here, both memory formats in fp32; each as CUDA graphs,
    too, or compiled if asked.

    From the best known to the least: what ends the process ends it for what comes after, too.
    """
    train = config.train
    usual: MemoryFormat = "channels_last"
    if memory_format(train.memory_format, train.precision, device) is torch.contiguous_format:
        usual = "contiguous"
    both: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
    formats = both if train.memory_format == "auto" and train.precision == "fp32" else (usual,)
    blocks = [config.model.dense_block]
    if config.model.dense_block == "auto":
        backends = [name for name, backend in reversed(BACKENDS.items()) if not backend.refusal(device)]
        # The modules do not compute again what less memory was asked for.
        spares = config.model.activation_checkpointing != "none" and backends
        blocks = [*([] if spares else ["eager"]), *backends]
    modes: list[Compile] = ["graphs"] if train.compile == "graphs" else ["none"]
    if train.compile == "auto" and config.optim.grad_accum_steps == 1 and device.type == "cuda":
        modes.append("graphs")
    found = [Implementation(block, layout, mode) for block in blocks for mode in modes for layout in formats]
    if train.compile in BY_TORCH:  # which traces the modules, whatever computes the blocks elsewhere
        found[len(formats) : len(formats)] = [Implementation("eager", layout, train.compile) for layout in formats]
    return found


def choose(
    config: Config, classes: int, device: torch.device, images: int, cards: Sequence[str], kept: Tuning | None = None
) -> Tuning:
    """The implementation for a run on these GPUs, one a rank.

    Args:
        kept: the choice of the run that resumes. On another GPU it is checked again, not made again: if it fails there, the run
            does as its configuration says.

    Raises:
        UserError: as `measure_apart`.
    """
    kinds = sorted({*cards})
    nothing_was = kept and kept.chosen.dense_block == "auto"  # measured: the modules compute
    if kept and (nothing_was or kept.chosen.dense_block == "eager" or kinds == [kept.card]):
        return kept
    if len(kinds) > 1:  # what is right on one may fail on another
        reason = f"nothing was measured: the ranks have different GPUs ({', '.join(kinds)})"
        return Tuning(as_configured(config), what_is_asked(config, device, images), reason)
    return measure_apart(config, classes, device, images, kept.chosen if kept else None)


def for_evaluation(
    network: nn.Module, tuning: Mapping[str, Any] | None, precision: str, device: torch.device
) -> tuple[nn.Module, torch.memory_format]:
    """A network on its device, laid out and computed as it is evaluated in this precision; and the order of its images.

    `auto` means what the network's run has measured, if that was on such a GPU and in this precision, as it meant in the run's
    own validation. Nothing is measured for an evaluation: that takes longer than most evaluations save by it.

    Args:
        tuning: `Tuning` as a checkpoint holds it; None of other weights.
    """
    found = Tuning.from_state(tuning) if tuning else None
    here = found and (found.card, found.asked.get("precision")) == (card_name(device), precision)
    layout: MemoryFormat = "auto"
    if found and here and isinstance(network, DenseNet) and network.dense_block == "auto":
        network.dense_block, layout = found.chosen.dense_block, found.chosen.memory_format
    order = memory_format(layout, precision, device)
    return folded(network).to(device).to(memory_format=order), order


def measure_apart(
    config: Config, classes: int, device: torch.device, images: int, only: Implementation | None = None
) -> Tuning:
    """`measure` in a process of its own; what that has found before its end, if it fails.

    Raises:
        UserError: the run could not be compiled as it asks.
    """
    refuse_graphs(config.train.compile, config.optim.grad_accum_steps)
    task = {
        "config": dataclasses.asdict(config), "classes": classes, "device": str(device), "images": images,
        "only": only and dataclasses.asdict(only),
    }  # fmt: skip
    here = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    patience = PATIENCE[config.train.compile in BY_TORCH]
    printed: str | bytes | None = None
    try:
        outcome = subprocess.run(
            [sys.executable, "-m", "pipeline.autotune"],
            input=json.dumps(task),
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
        )
        printed, said = outcome.stdout, (outcome.stderr.strip().splitlines() or ["without a word"])[-1]
        reason = f"the process that measures ended with {outcome.returncode}: {said}"
    except subprocess.TimeoutExpired as error:
        printed, reason = error.stdout, f"it took more than {patience} s"
    except OSError as error:
        reason = f"no process could be started: {error.strerror}"
    tuning, following = _last_word(printed)
    if tuning is None:
        return Tuning(as_configured(config), what_is_asked(config, device, images), f"nothing was measured: {reason}")
    if following:
        lost = f"left out {following}: {reason}"
        return dataclasses.replace(tuning, text="\n".join(filter(None, [tuning.text, lost])))
    return tuning


def _last_word(printed: str | bytes | None) -> tuple[Tuning | None, str]:
    """What the process that measures has written last: what it had found, and which candidates were to follow."""
    text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""
    for line in reversed(text.splitlines()):  # libraries may write there, too
        try:
            found = json.loads(line)
            return Tuning.from_state(found["tuning"]), found["following"]
        except (ValueError, TypeError, KeyError):
            continue
    return None, ""


def main() -> None:
    """Measure what the standard input says; write a line of JSON with the `Tuning` so far before each candidate and last."""
    ask_for_signal_when_parent_dies(signal.SIGKILL)
    task = json.load(sys.stdin)
    config, device = from_dict(task["config"], "the run"), torch.device(task["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(USABLE, device)
    choose_kernels(config.train.cudnn_benchmark, config.train.deterministic)
    # The loss that is minimised here would be 0 for a single output, whatever that is.
    classes = max(2, task["classes"])
    network = create_network(config.model, classes, config.data.channels)
    assert isinstance(network, DenseNet)
    only = Implementation(**task["only"]) if task["only"] else None

    def report(tuning: Tuning, following: str) -> None:
        print(json.dumps({"tuning": dataclasses.asdict(tuning), "following": following}), flush=True)

    report(measure(network, config, device, task["images"], only, report), "")


def measure(
    network: DenseNet,
    config: Config,
    device: torch.device,
    images: int,
    only: Implementation | None = None,
    report: Callable[[Tuning, str], None] = lambda tuning, following: None,
) -> Tuning:
    """Choose the fastest right implementation for batches of so many images; the network is left as it is.

    Args:
        only: the one candidate.
        report: is called before each candidate with what has been found, and with the names of those that follow.
    """
    start, size, precision = time.perf_counter(), max(config.data.train_sizes), config.train.precision
    channels, card = config.data.channels, card_name(device)
    generator = torch.Generator().manual_seed(0)
    notes: list[str] = []
    times: dict[Implementation, float] = {}

    def found() -> Tuning:
        chosen = min(times, key=times.__getitem__) if times else as_configured(config)
        figures = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in sorted(times.items(), key=lambda item: item[1]))
        seconds = time.perf_counter() - start
        line = f"computes with {chosen}; ms a step of {images} images: {figures} (measured in {seconds:.0f} s)"
        text = "\n".join([*([line] if times else []), *notes])
        return Tuning(chosen, what_is_asked(config, device, images), text, card)

    def check(own: dict[str, Tensor], exact: dict[str, Tensor], nearest: dict[str, float], of: str) -> None:
        for what, value in _distances(own, exact).items():
            slack = CHANCE if what.startswith("gradients") and precision in AUTOCAST_TYPES else ROUNDING
            if not value <= min(TIMES_EAGER * nearest[what] + slack, FARTHEST):  # nor NaN
                raise ValueError(f"its {what}{of} are {value:.1e} from float32's, the modules' {nearest[what]:.1e}")

    those = [only] if only else candidates(config, device)
    try:
        x = torch.randn(images, channels, size, size, generator=generator).to(device)
        labels = torch.randint(network.classifier.out_features, (images,), generator=generator).to(device)
        few = torch.arange(FEW, device=device) % images
        few_x, few_labels = x[few], labels[few]
        network, shallow = copy.deepcopy(network).to(device), _shallow(network).to(device)
        eager = dataclasses.replace(those[0], dense_block="eager", compile="none")
        set_tf32("fp32")
        checked, exact = _reference(network, eager, x, labels)
        exact_few = _Work(shallow, eager, Config(), FEW).results(few_x, few_labels)
        set_tf32(precision)
        nearest = _distances(_Work(network, eager, config, images).results(x[:checked], labels[:checked], False), exact)
        nearest_few = _distances(_Work(shallow, eager, config, FEW).results(few_x, few_labels), exact_few)
    except Exception as error:
        set_tf32(precision)
        notes.append(f"nothing was measured: {_reason(error)}")
        return found()
    stood_in: set[Implementation] = set()
    for i, candidate in enumerate(those):
        report(found(), ", ".join(map(str, those[i:])))
        work = None
        try:
            _free(device)
            work = _Work(shallow, candidate, config, FEW)
            results = work.results(few_x, few_labels)
            if work.selected != candidate.dense_block:  # another stands in, and is measured once
                if only:
                    raise ValueError(f"here the modules would be computed by {work.selected}")
                candidate = dataclasses.replace(candidate, dense_block=work.selected)
                if candidate in those or candidate in stood_in:
                    continue
                stood_in.add(candidate)
            check(results, exact_few, nearest_few, " of a shallow network")
            work = _Work(network, candidate, config, images)
            if candidate.compile == "none" or checked == images:  # else it is compiled or captured for so many
                check(work.results(x[:checked], labels[:checked], False), exact, nearest, "")
            seconds = work.seconds(x, labels)
            if candidate.compile == "graphs" and images > 2:
                work.step_beside_graphs(x[1:], labels[1:])
            times[candidate] = seconds
        except Exception as error:
            notes.append(f"left out {candidate}: {_reason(error)}")
            if not is_out_of_memory(error) and not is_usable(device):
                lost = those[i + 1 :]
                notes += [f"left out {', '.join(map(str, lost))}: the GPU cannot be used any more"] if lost else []
                break
        finally:
            work = None
    return found()


def _shallow(network: DenseNet) -> DenseNet:
    """Two layers in each block; the first block begins as wide as the network ends, with `WIDEST` channels at most."""
    features, layer = network.features, network.features.get_submodule("denseblock1.denselayer1")
    last_convolution = [module for module in layer.modules() if isinstance(module, nn.Conv2d)][-1]
    stem_convolution = features.get_submodule("conv0")
    assert isinstance(stem_convolution, nn.Conv2d)
    width = min(WIDEST, network.classifier.in_features)
    stem: Literal["imagenet", "cifar"] = "imagenet" if hasattr(features, "norm0") else "cifar"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseNet(
            last_convolution.out_channels, (2,) * network.block_count, stem, width, bottleneck=hasattr(layer, "conv2"),
            num_classes=network.classifier.out_features, in_channels=stem_convolution.in_channels,
            dropout=float(any(isinstance(module, nn.Dropout) for module in network.modules())),  # `_Work` sets it to 0
            activation_checkpointing=network.activation_checkpointing,
        )  # fmt: skip


def _reason(error: Exception) -> str:
    return "out of memory" if is_out_of_memory(error) else first_line(error)


class _Work:
    """A candidate on a copy of a network.

    Attributes:
        selected: what has computed the blocks in the last `results`.
    """

    selected = ""

    def __init__(self, network: DenseNet, candidate: Implementation, config: Config, images: int):
        self._network = copy.deepcopy(network).train()
        self._network.dense_block = candidate.dense_block
        for module in self._network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # so that one batch is enough for an evaluation; else numbers outgrow float16
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # who keeps dropout's modules has its kernels; but chance would part all results
        self._device = self._network.classifier.weight.device
        self._precision = config.train.precision
        self._layout = memory_format(candidate.memory_format, self._precision, self._device)
        self._network.to(memory_format=self._layout)
        self._call = compile_network(self._network, candidate.compile, images, 1)
        self._scale = SCALE if self._precision == "fp16" else 1.0

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """A forward and a backward pass; its logits."""
        self._network.zero_grad()
        with autocast(self._precision, self._device):
            logits = self._call(x)
        (self._scale * F.cross_entropy(logits.float(), labels)).backward()
        return logits.detach()

    def _capture(self, x: Tensor) -> None:
        if isinstance(self._call, ReplayedNetwork):
            with autocast(self._precision, self._device):
                self._call.capture(x)

    def step_beside_graphs(self, x: Tensor, labels: Tensor) -> None:
        """A step of a smaller batch, which an epoch may end with: it finds no room in the memory that graphs hold.

        cuDNN's kernels are not timed for it: that takes seconds for each size.
        """
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            self.step(x.contiguous(memory_format=self._layout), labels)
            _wait(self._device)
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def results(self, x: Tensor, labels: Tensor, gradients: bool = True) -> dict[str, Tensor]:
        """All that a run gets of a batch, by kind, each as one vector: a kind with small numbers shows by itself.

        Args:
            gradients: else it is only seen to that these are finite.
        """
        x = x.contiguous(memory_format=self._layout)
        self._capture(x)
        found = {"logits": [self.step(x, labels).clone()]}
        self.selected = self._network.selection.method if self._network.selection else ""
        norms = {id(p) for m in self._network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        for kind, of_norms in (("gradients of weights", False), ("gradients of norms", True)):
            own = [p for p in self._network.parameters() if (id(p) in norms) == of_norms]
            of_kind = [p.grad / self._scale for p in own if p.grad is not None]
            if gradients:
                found[kind] = of_kind
            elif not all(bool(gradient.isfinite().all()) for gradient in of_kind):
                raise ValueError(f"its {kind} are not finite")
        found["running statistics"] = [b.clone() for b in self._network.buffers() if b.is_floating_point()]
        self._network.eval()  # as the run validates, which is never compiled
        with torch.no_grad(), autocast(self._precision, self._device):
            found["logits in evaluation"] = [self._network(x)]
        self._network.train()
        return {kind: torch.cat([tensor.double().flatten() for tensor in tensors]) for kind, tensors in found.items()}

    def seconds(self, x: Tensor, labels: Tensor) -> float:
        """Of a forward and a backward pass, the median of a few."""
        x, found = x.contiguous(memory_format=self._layout), []
        self._capture(x)
        for _ in range(WARM_UP + TIMED):
            _wait(self._device)
            start = time.perf_counter()
            self.step(x, labels)
            _wait(self._device)
            found.append(time.perf_counter() - start)
        return sorted(found[WARM_UP:])[TIMED // 2]


def _reference(network: DenseNet, eager: Implementation, x: Tensor, labels: Tensor) -> tuple[int, dict[str, Tensor]]:
    """The modules' results in float32 but for gradients, of as many of the images as memory allows."""
    images = len(x)
    config = Config()  # fp32
    while True:
        try:
            return images, _Work(network, eager, config, images).results(x[:images], labels[:images], False)
        except Exception as error:
            if not is_out_of_memory(error) or images < 4:
                raise
        images //= 2
        _free(x.device)


def _distances(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {what: ((a - expected[what]).norm() / expected[what].norm()).item() for what, a in actual.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
