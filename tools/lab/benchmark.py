"""How fast and in how much memory the networks run, beside torchvision's and timm's.

``python -m tools.lab.benchmark step`` measures training steps (forward, cross entropy, backward, SGD), and
``python -m tools.lab.benchmark inference`` forward passes in evaluation mode, for every combination of the given models,
batch sizes and precisions. All implementations of a combination have the same weights and images, must agree in their loss
and what a step does to it, or in their logits, and take turns in one process. Memory is the growth of each one's peak
over 3 steps in a process of its own, counted from where network, optimiser and data exist. The tables are printed;
benchmark-step.json, .md and .png, and benchmark-step-growth.png for several models or batch sizes, go to FOLDER.

Compiling takes about 5 minutes for DenseNet-121 on 2 cores, and more for deeper networks; --no-compile leaves it out.

Linux only, which tells a process's peak memory. Nothing of it has been run on a GPU yet.
"""

import argparse
import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import machine, precision
from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import ActivationCheckpointing, OptimConfig
from pipeline.distributed import choose_device
from pipeline.errors import UserError, first_line, is_out_of_memory
from pipeline.machine import available_cores, keep_freed_memory
from pipeline.models import create_model
from pipeline.models.backends import BACKENDS
from pipeline.models.densenet import DenseNet
from pipeline.models.zoo import DENSENETS
from pipeline.optim import create_optimizer
from tools.lab.benchmark_report import BASELINE, COMPILED, plot_growth, plot_implementations, report, summarise
from tools.lab.machine import describe_machine
from tools.support.outputs import made_folder

# A server imports the libraries, and forks into the processes that measure.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["timm", "torchvision", "pipeline.config", "tools.lab.benchmark_report"])
SEED = 1
LEARNING_RATE = 2e-4  # so low that what a step does to the loss follows from the gradients
MEMORY_STEPS = 3
# Relative: of losses and logits; of the loss's fall by a step. TF32 is for GPUs, and has fp16's 10 bits.
TOLERANCES = {"fp32": (1e-3, 0.2), "tf32": (0.01, 0.3), "bf16": (0.03, 0.5), "fp16": (0.01, 0.3)}
MODELS = [name for name, spec in DENSENETS.items() if spec.get("bottleneck", True)]  # torchvision's and timm's have it


@dataclasses.dataclass(frozen=True)
class Workload:
    """What all implementations of one table share."""

    task: str
    model: str
    batch_size: int
    size: int
    precision: str
    device: str

    @property
    def classes(self) -> int:
        return 1000 if DENSENETS[self.model]["stem"] == "imagenet" else 10

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.size} px, {self.precision}"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A network's implementation and how it is run."""

    create: Callable[..., nn.Module]
    channels_last: bool = True
    compiled: bool = False


def create_torchvision(name: str, num_classes: int, memory_efficient: bool = False) -> nn.Module:
    network = torchvision.models.DenseNet(
        **_sizes(name),
        num_init_features=DENSENETS[name]["stem_channels"],
        num_classes=num_classes,
        memory_efficient=memory_efficient,
    )
    return _with_stem(network, name)


def create_timm(name: str, num_classes: int) -> nn.Module:
    return _with_stem(timm.models.DenseNet(**_sizes(name), num_classes=num_classes), name)


def _sizes(name: str) -> dict[str, Any]:
    return dict(growth_rate=DENSENETS[name]["growth_rate"], block_config=DENSENETS[name]["block_sizes"])


def _with_stem(network: nn.Module, name: str) -> nn.Module:
    """Give a network with the ImageNet stem the one of `name`."""
    if DENSENETS[name]["stem"] == "cifar":
        features = network.get_submodule("features")
        features.conv0 = nn.Conv2d(3, DENSENETS[name]["stem_channels"], kernel_size=3, padding=1, bias=False)
        for part in {"norm0", "relu0", "pool0"} & dict(features.named_children()).keys():
            setattr(features, part, nn.Identity())
    return network


def _ours(dense_block: str, blocks: ActivationCheckpointing = "none") -> Implementation:
    return Implementation(functools.partial(create_model, dense_block=dense_block, activation_checkpointing=blocks))


PEERS = {
    BASELINE: Implementation(create_torchvision, channels_last=False),
    "torchvision channels_last": Implementation(create_torchvision),
    "torchvision memory_efficient": Implementation(functools.partial(create_torchvision, memory_efficient=True)),
    COMPILED: Implementation(create_torchvision, compiled=True),
    "timm channels_last": Implementation(create_timm),
}
OURS = {
    "eager": _ours("eager"),
    **{
        name if blocks == "none" else f"{name}, checkpointing {blocks}": _ours(name, blocks)
        for name in BACKENDS
        for blocks in get_args(ActivationCheckpointing)
    },
}
IMPLEMENTATIONS = PEERS | OURS
TASKS = {
    "step": list(IMPLEMENTATIONS),
    "inference": [BASELINE, "torchvision channels_last", COMPILED, "timm channels_last", "eager", *BACKENDS],
}


def main() -> None:
    options = _parser().parse_args()
    workloads = choose_workloads(options)
    names = choose_implementations(options)
    output = made_folder(options.output)
    results = {
        "task": options.task,
        "machine": describe_machine(["torch", "torchvision", "timm"]),
        "device": workloads[0].device,
        "repeats": options.repeats,
        "tables": [],
    }
    with tempfile.TemporaryDirectory() as cache:
        # For the processes to come: compile afresh, then from the cache, and with constant weights where nothing
        # learns. As an option of torch.compile, freezing comes too late to have an effect (torch 2.14).
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FREEZING": "1"}
        for workload in workloads:
            print(f"{workload}: {len(names)} implementations", flush=True)
            rows, left_out = measure(workload, names, options.repeats)
            rows = summarise(rows, workload.batch_size)
            results["tables"].append({**dataclasses.asdict(workload), "rows": rows, "left_out": left_out})
            files = write(results, output)  # after each: the next may take an hour, or all memory
    print(f"\n{report(results)}\n\nin {output}: {', '.join(files)}")


def measure(workload: Workload, names: list[str], repeats: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row of samples for each implementation, and why others could not be measured."""
    rows, left_out = in_own_process(workload, time_implementations, names, repeats)
    for row in tqdm(rows, "memory", leave=False, disable=None):
        row["memory_bytes"] = in_own_process(workload, measure_memory, row["implementation"])
    return rows, left_out


def in_own_process(workload: Workload, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function(workload, *arguments)`` in a new process, which starts as every other one does."""
    try:
        with ProcessPoolExecutor(1, PROCESSES, _prepare_process) as pool:
            return pool.submit(function, workload, *arguments).result()
    except RuntimeError as error:
        if isinstance(error, BrokenProcessPool):
            problem = "the process ended in the middle, most likely for lack of memory"
        elif is_out_of_memory(error):
            problem = "out of memory"
        else:
            raise
        raise UserError(f"{workload}: {problem}; choose smaller --batch-sizes or --size") from None


def _prepare_process() -> None:
    """Have a process run networks as `pipeline.train` does."""
    torch.set_num_threads(available_cores())
    keep_freed_memory()


def time_implementations(
    workload: Workload, names: list[str], repeats: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Seconds of each implementation, all run once a repetition: what disturbs the machine disturbs them alike.

    Also returns who is left out and why: our networks compute some cases otherwise than they were asked to.
    """
    runs, first, left_out = {}, {}, {}
    rows: dict[str, dict[str, Any]] = {}
    for name in tqdm(names, "first calls", leave=False, disable=None):
        network, run = prepare(workload, name)
        try:
            seconds, output = timed(run, workload.device)
        except Exception as error:
            if not IMPLEMENTATIONS[name].compiled:
                raise
            raise UserError(f"{name}: {first_line(error)}; --no-compile leaves it out") from error
        selection = network.selection if isinstance(network, DenseNet) else None  # only ours select
        if selection and selection.method != network.dense_block:
            left_out[name] = selection.reason
            continue
        runs[name], first[name] = run, output
        rows[name] = {"implementation": name, "peer": name in PEERS, "first_call_s": seconds, "seconds": []}
    second = {name: run() for name, run in runs.items()}
    tolerance, tolerance_of_step = TOLERANCES[workload.precision]
    check_agreement(workload, "loss" if workload.task == "step" else "logits", first, tolerance)
    if workload.task == "step":
        falls = {name: first[name] - second[name] for name in runs}
        check_agreement(workload, "fall of the loss by a step", falls, tolerance_of_step)
    for repeat in tqdm(range(repeats), "repetitions", leave=False, disable=None):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            rows[name]["seconds"].append(timed(runs[name], workload.device)[0])
    return list(rows.values()), left_out


def timed(run: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, output


def check_agreement(workload: Workload, what: str, values: dict[str, Tensor], tolerance: float) -> None:
    """Refuse to compare implementations that do not compute the same."""
    expected = values[BASELINE].float()
    for name, actual in values.items():
        difference = ((actual.float() - expected).abs().max() / expected.abs().max()).item()
        if not difference <= tolerance:  # nor NaN
            raise UserError(f"{workload}: {what} of '{name}' and '{BASELINE}' differ by {100 * difference:.2g} %")


def measure_memory(workload: Workload, name: str) -> int:
    """Bytes by which the process's peak grows in a few steps."""
    _, run = prepare(workload, name)
    before = peak_memory(workload.device)
    for _ in range(MEMORY_STEPS):
        run()
    return peak_memory(workload.device) - before


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else machine.peak_memory()


def prepare(workload: Workload, name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """An implementation's network, and its step or pass as a function that returns the loss or logits."""
    precision.set_tf32(workload.precision)
    implementation = IMPLEMENTATIONS[name]
    training = workload.task == "step"
    layout = torch.channels_last if implementation.channels_last else torch.contiguous_format
    network = implementation.create(workload.model, num_classes=workload.classes)
    torch.manual_seed(SEED)
    draw_weights(network)
    network = network.to(memory_format=layout).to(workload.device).train(training)
    optimizer = create_optimizer(network, OptimConfig(lr=LEARNING_RATE))
    labels = torch.randint(workload.classes, (workload.batch_size,)).to(workload.device)
    shape = (workload.batch_size, 3, workload.size, workload.size)
    images = torch.empty(shape, device=workload.device, memory_format=layout)
    for image in images:  # one by one: a second batch would leave memory to be used again, unmeasured
        image.copy_(torch.randn(shape[1:]))
    call = torch.compile(network) if implementation.compiled else network
    device = torch.device(workload.device)
    autocast = functools.partial(precision.autocast, workload.precision, device)
    scaler = precision.create_scaler(workload.precision, device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = F.cross_entropy(call(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    @torch.no_grad()
    def infer() -> Tensor:
        with autocast():
            return call(images)

    return network, step if training else infer


def draw_weights(network: nn.Module) -> None:
    """Draw weights and statistics; networks with the same layers in the same order get the same."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None and module.running_var is not None  # none of the networks lacks them
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)


# Command line


def choose_workloads(options: argparse.Namespace) -> list[Workload]:
    """The combinations of models, batch sizes and precisions."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use")
    device = choose_device(options.device).type
    workloads = []
    for model in options.models:
        spec = DENSENETS[model]
        imagenet = spec["stem"] == "imagenet"
        size = options.size or (224 if imagenet else 32)
        smallest = (4 if imagenet else 1) * 2 ** len(spec["block_sizes"])  # 2 x 2 positions in the last block
        if size < smallest:
            raise UserError(f"--size {size}: {model} needs {smallest} pixels or more")
        workloads += [
            Workload(options.task, model, batch_size, size, precision, device)
            for batch_size in options.batch_sizes
            for precision in options.precisions
        ]
    return workloads


def choose_implementations(options: argparse.Namespace) -> list[str]:
    """The names of the implementations, in the order of the tables."""
    for name in options.implementations or []:
        if name not in TASKS[options.task]:
            raise UserError(f"--implementations: '{name}' takes no part in {options.task}")
    wanted = {BASELINE, *(options.implementations or IMPLEMENTATIONS)} - ({COMPILED} if options.no_compile else set())
    return [name for name in TASKS[options.task] if name in wanted]


def write(results: dict[str, Any], folder: Path) -> list[str]:
    """Write what has been measured so far; return the names of the files."""
    stem = f"benchmark-{results['task']}"
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / f"{stem}.md").write_text(report(results) + "\n")
    plot_implementations(results, folder / f"{stem}.png")
    files = [f"{stem}.json", f"{stem}.md", f"{stem}.png"]
    return files + [f"{stem}-growth.png"] * plot_growth(results, folder / f"{stem}-growth.png")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.lab.benchmark", description=__doc__)
    parser.add_argument("task", choices=TASKS, help="training steps, or forward passes in evaluation mode")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        metavar="NAME",
        default=["densenet121"],
        help=", ".join(MODELS) + " [densenet121]",
    )
    parser.add_argument("--batch-sizes", nargs="+", type=positive_integer, metavar="N", default=[16], help="[16]")
    parser.add_argument(
        "--precision",
        "--precisions",
        nargs="+",
        choices=TOLERANCES,
        metavar="NAME",
        default=["fp32"],
        dest="precisions",
        help="fp32, tf32, bf16 or fp16, all implementations under the same autocast; several make several tables [fp32]",
    )
    parser.add_argument("--size", type=positive_integer, metavar="PIXELS", help="[224, or 32 for the CIFAR networks]")
    parser.add_argument(
        "--repeats", type=positive_integer, metavar="N", default=7, help="repetitions of the timing [7]"
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        metavar="NAME",
        help=f"these, in the tables' words, beside '{BASELINE}' [all]",
    )
    parser.add_argument("--no-compile", action="store_true", help=f"leave '{COMPILED}' out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    parser.add_argument("--output", metavar="FOLDER", default="runs/benchmark", help="[runs/benchmark]")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
