"""What ``auto`` means on a GPU: candidates for computing a training step are checked, timed, and the fastest right one taken.

Each candidate computes on a network as the run's, with a batch of its size. One that fails, or whose gradients are farther
from float32's than `TIMES_EAGER` times the modules' and `ROUNDING`, costs the run one line. All this is in a process of its
own (``python -m pipeline.autotune``), as a kernel that writes where it must not leaves a process that can use its GPU no more.
The choice is kept in the checkpoint, and rank 0 makes it for all. On CPU nothing is measured.

No GPU has run this; the tests run it on CPU.
"""

import copy
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compilation import compile_network, refuse_graphs
from pipeline.config import Compile, Config, MemoryFormat, from_dict
from pipeline.errors import is_out_of_memory
from pipeline.models import create_network
from pipeline.models.backends import BACKENDS
from pipeline.models.densenet import DenseNet
from pipeline.precision import autocast, choose_kernels, memory_format, set_tf32

MEASURED_ON = ("cuda",)  # kinds of devices
TIMES_EAGER, ROUNDING = 2.0, 1e-2  # of the distance of gradients, all as one, relative
WARM_UP, TIMED = 3, 5  # steps
SCALE = 2.0**10  # of the loss in fp16, whose gradients would vanish
PATIENCE = 600, 3600  # seconds, the second if something is compiled


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How a training step is computed; the words are those of the configuration."""

    dense_block: str
    memory_format: MemoryFormat
    compile: Compile

    def __str__(self) -> str:
        compiled = "" if self.compile == "none" else f" compiled ({self.compile})"
        return f"{self.dense_block} {self.memory_format}{compiled}"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The implementation that a run has chosen.

    Attributes:
        asked: what the choice was made for; a run that asks for something else makes another.
        text: lines on what was measured.
    """

    chosen: Implementation
    asked: dict[str, Any]
    text: str

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "Tuning":
        return Tuning(Implementation(**state["chosen"]), dict(state["asked"]), state["text"])


def as_configured(config: Config) -> Implementation:
    """What a run computes with where nothing is measured."""
    return Implementation(config.model.dense_block, config.train.memory_format, config.train.compile)


def what_is_asked(config: Config, device: torch.device, images: int) -> dict[str, Any]:
    train = config.train
    return {
        "dense_block": config.model.dense_block, "memory_format": train.memory_format, "compile": train.compile,
        "precision": train.precision, "device": device.type, "images": images,
    }  # fmt: skip


def leaves_a_choice(config: Config, device: torch.device, network: nn.Module) -> bool:
    """Whether a run of this configuration is one to measure for; one with frozen norms leaves its blocks to the modules."""
    free = config.model.dense_block == "auto" or (
        config.train.memory_format == "auto" and config.train.precision == "fp32"
    )
    frozen = config.model.freeze is not None
    return free and not frozen and device.type in MEASURED_ON and isinstance(network, DenseNet)


def candidates(config: Config, device: torch.device) -> list[Implementation]:
    """What may be the fastest: the modules, each backend that can run here, both memory formats in fp32, compiled if asked."""
    train = config.train
    usual: MemoryFormat = "channels_last"
    if memory_format(train.memory_format, train.precision, device) is torch.contiguous_format:
        usual = "contiguous"
    both: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
    formats = both if train.memory_format == "auto" and train.precision == "fp32" else (usual,)
    blocks = [config.model.dense_block]
    if config.model.dense_block == "auto":
        # From the best known to the least: what spoils the process spoils what comes after it.
        blocks = ["eager", *(name for name, backend in reversed(BACKENDS.items()) if not backend.refusal(device))]
    found = [Implementation(block, layout, "none") for block in blocks for layout in formats]
    if train.compile != "none":  # which traces the modules, whatever computes the blocks elsewhere
        found = [Implementation("eager", layout, train.compile) for layout in formats] + found
    return found


def measure_apart(config: Config, classes: int, device: torch.device, images: int) -> Tuning:
    """`measure` in a process of its own; what a run does as it is configured, if that process fails.

    Raises:
        UserError: the run could not be compiled as it asks.
    """
    refuse_graphs(config.train.compile, config.optim.grad_accum_steps)
    task = {"config": dataclasses.asdict(config), "classes": classes, "device": str(device), "images": images}
    here = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    patience = PATIENCE[config.train.compile != "none"]
    try:
        outcome = subprocess.run(
            [sys.executable, "-m", "pipeline.autotune"],
            input=json.dumps(task),
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience,
        )
        if outcome.returncode == 0:
            return Tuning.from_state(json.loads(outcome.stdout.splitlines()[-1]))
        said = (outcome.stderr.strip().splitlines() or ["without a word"])[-1]
        reason = f"the process that measures ended with {outcome.returncode}: {said}"
    except subprocess.TimeoutExpired:
        reason = f"it took more than {patience} s"
    return Tuning(as_configured(config), what_is_asked(config, device, images), f"nothing was measured: {reason}")


def main() -> None:
    """Measure what the standard input says, and write the `Tuning` as the last line of the standard output."""
    task = json.load(sys.stdin)
    config, device = from_dict(task["config"], "the run"), torch.device(task["device"])
    choose_kernels(config.train.cudnn_benchmark, config.train.deterministic)
    network = create_network(config.model, task["classes"], config.data.channels)
    assert isinstance(network, DenseNet)
    print(json.dumps(dataclasses.asdict(measure(network, config, device, task["images"]))))


def measure(network: DenseNet, config: Config, device: torch.device, images: int) -> Tuning:
    """Choose the fastest right implementation for batches of so many images; the network is left as it is."""
    start, size, precision = time.perf_counter(), max(config.data.train_sizes), config.train.precision
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, config.data.channels, size, size, generator=generator).to(device)
    labels = torch.randint(network.classifier.out_features, (images,), generator=generator).to(device)
    network = copy.deepcopy(network).to(device).train()
    notes: list[str] = []
    times: dict[Implementation, float] = {}
    try:
        eager = dataclasses.replace(candidates(config, device)[0], dense_block="eager", compile="none")
        set_tf32("fp32")
        checked, exact = _reference(network, eager, x, labels)
        set_tf32(precision)
        work = _Work(network, eager, config, images)
        nearest = _distance(work.gradients(x[:checked], labels[:checked]), exact)
        for candidate in candidates(config, device):
            try:
                if candidate.compile != "none" and checked < images:
                    raise ValueError("the modules in float32, with which it would be compared, do not fit into memory")
                work = _Work(network, candidate, config, images)
                far = _distance(work.gradients(x[:checked], labels[:checked]), exact)
                if not work.is_as_asked:  # another stands in, and is a candidate itself
                    continue
                if not far <= TIMES_EAGER * nearest + ROUNDING:  # nor NaN
                    raise ValueError(f"its gradients are {far:.1e} from float32's, the modules' {nearest:.1e}")
                times[candidate] = work.seconds(x, labels)
            except Exception as error:
                reason = "out of memory" if is_out_of_memory(error) else (str(error) or repr(error)).splitlines()[0]
                notes.append(f"left out {candidate}: {reason}")
            finally:
                work = None  # type: ignore[assignment]
                _free(device)
    except Exception as error:
        notes.append(f"nothing was measured: {(str(error) or repr(error)).splitlines()[0]}")
    finally:
        set_tf32(precision)
        _free(device)
    chosen = min(times, key=times.__getitem__) if times else as_configured(config)
    figures = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in sorted(times.items(), key=lambda i: i[1]))
    line = f"computes with {chosen}; ms a step of {images} images: {figures} (measured in {time.perf_counter() - start:.0f} s)"
    return Tuning(chosen, what_is_asked(config, device, images), "\n".join([*([line] if times else []), *notes]))


class _Work:
    """A candidate on a copy of a network."""

    def __init__(self, network: DenseNet, candidate: Implementation, config: Config, images: int):
        self._network = copy.deepcopy(network)
        self._network.dense_block = candidate.dense_block
        self._device = self._network.classifier.weight.device
        self._precision, self._candidate = config.train.precision, candidate
        self._layout = memory_format(candidate.memory_format, self._precision, self._device)
        self._network.to(memory_format=self._layout)
        self._call = compile_network(self._network, candidate.compile, images, 1)
        self._scale = SCALE if self._precision == "fp16" else 1.0

    @property
    def is_as_asked(self) -> bool:
        selection = self._network.selection
        return selection is not None and selection.method == self._candidate.dense_block

    def step(self, x: Tensor, labels: Tensor) -> None:
        self._network.zero_grad()
        with autocast(self._precision, self._device):
            logits = self._call(x)
        (self._scale * F.cross_entropy(logits.float(), labels)).backward()

    def gradients(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        self.step(x.contiguous(memory_format=self._layout), labels)
        return [p.grad / self._scale for p in self._network.parameters() if p.grad is not None]

    def seconds(self, x: Tensor, labels: Tensor) -> float:
        """Of a forward and a backward pass, the median of a few."""
        x, found = x.contiguous(memory_format=self._layout), []
        for _ in range(WARM_UP + TIMED):
            _wait(self._device)
            start = time.perf_counter()
            self.step(x, labels)
            _wait(self._device)
            found.append(time.perf_counter() - start)
        return sorted(found[WARM_UP:])[TIMED // 2]


def _reference(network: DenseNet, eager: Implementation, x: Tensor, labels: Tensor) -> tuple[int, list[Tensor]]:
    """The modules' gradients in float32, of as many of the images as memory allows."""
    images = len(x)
    config = Config()  # fp32
    while True:
        try:
            return images, _Work(network, eager, config, images).gradients(x[:images], labels[:images])
        except Exception as error:
            if not is_out_of_memory(error) or images < 4:
                raise
        images //= 2
        _free(x.device)


def _distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (actual, expected))
    return ((a - b).norm() / b.norm()).item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
