"""Times tiles of the Triton kernels on a GPU, with the shapes of a network's training step.

``python -m tools.lab.gpu_tiles [MODEL] [--batch-sizes 256 32] [--precision bf16] [--tasks NAME ...] [--seconds N]
[--json FILE]`` prints a table for each task, which is a kernel or several alike: milliseconds that all its launches in a step
take with each candidate tile, the present tile among them. What adds up a kernel's partial sums is timed with it. Of a
block's layers two are timed, at a quarter and at three quarters of its depth, and stand for half of the layers each.

Candidates are compiled in parallel processes first; those that need more registers or shared memory than there are drop out.
Each must give the present tile's results. The most valuable kernels come first: where the time is over, those that were not
reached are named, and the file has all that was measured.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.errors import UserError
from pipeline.machine import available_cores
from pipeline.models import triton_block, triton_kernels
from pipeline.models.triton_block import TILES, Tile, _Launches
from pipeline.precision import AUTOCAST_TYPES, set_tf32
from tools.lab.gpu_kernels import SHARED_MEMORY, identity, read_binary
from tools.support.fake_gpu import PRECISIONS, Launch, Step, launches_seen, run_step
from tools.support.markdown import table

DEVICE = torch.device("cuda")
SPILLED = 96  # bytes of a thread's registers; a few that are used outside the loops cost little
TOLERANCE = 0.01  # relative; in bfloat16 a rounding is 0.004 of a number, and 0.001 of a matrix
MEASUREMENTS, RUNS = 3, 3
WAIT = 2_000_000  # cycles, about a millisecond
HOPELESS = 2.0  # a candidate that takes so many times the best one's time for a call is timed no further


@dataclass(frozen=True)
class Candidate:
    """Values that take the place of present ones: of a `Tiles`' fields, or of constants of triton_block.py."""

    tiles: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = self.tiles | self.constants
        return "; ".join(f"{name}={_text(value)}" for name, value in values.items()) or "present"


PRESENT = Candidate()


class Task(NamedTuple):
    """Methods of `_Launches` that are timed together, and candidates for them."""

    methods: tuple[str, ...]
    candidates: list[Candidate]


class Call(NamedTuple):
    """A method's call in a step, for images of a size.

    Attributes:
        arguments: of fake tensors.
        weight: for how many calls of the step it stands.
    """

    method: str
    images: tuple[int, ...]
    arguments: Any
    weight: float


def _text(value: Any) -> str:
    if not isinstance(value, Tile):
        return str(value)
    sides = "x".join(map(str, value[:3]))
    return f"{sides}, stages {value.stages}, warps {value.warps}, programs {value.programs}"


def _tiles(name: str, *tiles: tuple[Any, ...], **others: None) -> list[Candidate]:
    """Of (block_p, block_n, block_k, stages, programs, warps), the last two as far as they are given."""
    return [Candidate({name: Tile(*tile), **others}) for tile in tiles]


def tasks() -> dict[str, Task]:
    """By name; what takes the most of a step's time first."""
    found = {
        "bottleneck_backward": _tiles(
            "bottleneck_backward", (64, 128, 64, 2), (64, 128, 64, 3), (64, 128, 64, 4), (64, 128, 64, 3, 1, 16),
            (32, 128, 64, 3, 2, 4), (64, 128, 32, 3, 2, 8), (64, 128, 32, 3, 2, 4),
            (32, 128, 128, 3), (32, 128, 128, 3, 1, 16),
        ),
        "bottleneck_forward": _tiles(
            "bottleneck_forward", (128, 128, 32, 3), (128, 128, 32, 4), (128, 128, 32, 5), (128, 128, 32, 3, 1, 4),
            (128, 128, 32, 4, 1, 4), (128, 128, 64, 3), (64, 128, 64, 3, 1, 4),
            (64, 128, 64, 4, 1, 4), (64, 128, 32, 4, 1, 4), (256, 128, 32, 3),
        ),
        "conv3x3_forward": _tiles(
            "conv3x3_forward", (128, 32, 64, 2), (128, 32, 64, 3), (128, 32, 64, 4), (128, 32, 64, 3, 1, 4),
            (128, 32, 128, 2), (64, 32, 64, 3, 1, 4), (64, 32, 128, 2, 1, 4), (256, 32, 64, 3), (256, 32, 32, 4),
        ),
        "conv3x3_backward_data": [
            *_tiles(
                "conv3x3_backward_data_persistent", (32, 128, 32, 2, 2, 8), (32, 128, 32, 2, 2, 4), (32, 128, 32, 3, 1, 8),
                (32, 64, 32, 2, 3, 4), (32, 64, 32, 3, 3, 4), (64, 64, 32, 2, 1, 8), (64, 64, 32, 3, 1, 8),
            ),
            *_tiles(
                "conv3x3_backward_data", (64, 128, 32, 3, 1, 4), (64, 64, 32, 4, 1, 4), (128, 64, 32, 3, 1, 4),
                conv3x3_backward_data_persistent=None,
            ),
        ],
        "conv3x3_backward_weights": _tiles(
            "conv3x3_backward_weights", (64, 32, 128, 3, 1), (64, 32, 128, 3, 2), (64, 32, 128, 4, 2), (64, 32, 64, 3, 2, 4),
            (64, 32, 64, 3, 4, 4), (128, 32, 64, 3, 2, 4), (128, 32, 64, 3, 2), (128, 32, 128, 3, 1), (32, 32, 128, 4, 2),
        ),
        "sums": [
            Candidate(constants={"SUMS": dict(BLOCK_T=rows, BLOCK_C=channels, warps=warps)}) for rows, channels, warps in (
                (512, 2, 4), (512, 4, 8), (1024, 2, 8), (1024, 4, 16), (2048, 2, 16), (2048, 4, 16), (1024, 1, 4),
            )
        ],
        "numbers": [
            Candidate(constants={"NUMBERS": dict(BLOCK_T=rows, BLOCK=numbers)})
            for rows, numbers in ((4, 512), (8, 256), (8, 512), (16, 128), (16, 256), (32, 128), (64, 64))
        ],
        "points": [
            Candidate(constants={"POINT": numbers, "POINT_CHANNELS": channels})
            for numbers, channels in ((2048, 32), (4096, 32), (4096, 64), (4096, 128), (8192, 32), (8192, 64))
        ],
    }  # fmt: skip
    methods = {
        "sums": ("_reduce_moments", "_reduce_shared_norm", "_reduce_own_norm"),
        "numbers": ("_reduce_weights",),
        "points": (
            "finish_gradient", "copy_and_measure", "pool_forward", "pool_backward", "stem_forward", "stem_backward"
        ),
    }  # fmt: skip
    return {name: Task(methods.get(name, (name,)), candidates) for name, candidates in found.items()}


@functools.cache
def recorded(step: Step) -> list[Call]:
    """All calls of the timed methods in a step."""
    found: list[Call] = []

    def recording(method: str) -> Callable[..., None]:
        run = getattr(_Launches, method)

        def record(self: _Launches, *arguments: Any, **others: Any) -> None:
            images = self.images, self.channels, self.height, self.width
            if arguments[0] is not None:  # else there are no sums
                found.append(Call(method, images, (arguments, others), 1.0))
            run(self, *arguments, **others)

        return record

    with ExitStack() as stack:
        for method in {method for task in tasks().values() for method in task.methods}:
            stack.enter_context(mock.patch.object(_Launches, method, recording(method)))
        run_step(step, lambda launch: None)
    return found


def calls(task: Task, step: Step) -> list[Call]:
    """Of a task's methods in a step. Of more than two kinds of calls for images of one size two stand for all."""
    found: dict[Any, list[Call]] = defaultdict(list)
    for call in recorded(step):
        if call.method in task.methods:
            images, _, *size = call.images
            found[call.method, images, *size].append(call)
    chosen = []
    for group in found.values():
        kinds: dict[Any, list[Call]] = defaultdict(list)
        for call in group:
            kinds[_sizes(call)].append(call)
        if len(kinds) <= 2:
            chosen += [own[0]._replace(weight=len(own)) for own in kinds.values()]
        else:
            ordered = sorted(group, key=lambda call: sum(map(sum, _sizes(call))))
            chosen += [ordered[len(group) * part // 4]._replace(weight=len(group) / 2) for part in (1, 3)]
    return chosen


def _sizes(call: Call) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(leaf.shape) if isinstance(leaf, Tensor) else (leaf,) if type(leaf) is int else ()
        for leaf in tree_leaves(call.arguments)
    )


@contextmanager
def _with(candidate: Candidate, step: Step) -> Iterator[None]:
    """A candidate's values in the place of the present ones."""
    key = step.architecture, triton_block.products(_dtype(step))
    with (
        mock.patch.dict(TILES, {key: TILES[key]._replace(**candidate.tiles)}),
        mock.patch.dict(vars(triton_block), candidate.constants),
    ):
        yield


def _run(call: Call, arguments: Any, dtype: torch.dtype) -> None:
    images = torch.empty((), dtype=dtype, device=DEVICE).expand(call.images)
    positional, named = arguments
    getattr(_Launches(images), call.method)(*positional, **named)


def needed(call: Call, candidate: Candidate, step: Step) -> list[Launch]:
    """The launches of a call with a candidate."""
    found: list[Launch] = []
    mode = next(leaf.fake_mode for leaf in tree_leaves(call.arguments) if isinstance(leaf, FakeTensor))
    with mode, _with(candidate, step), launches_seen(found.append, step.architecture):
        _run(call, call.arguments, _dtype(step))
    return found


def _memory(leaf: Any) -> Any:
    """New memory for a tensor of a recorded call, laid out as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    last = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    memory = torch.empty(int(leaf.storage_offset()) + last + 1, dtype=leaf.dtype, device=DEVICE)
    return memory.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())


def _dtype(step: Step) -> torch.dtype:
    return AUTOCAST_TYPES.get(step.precision, torch.float32)


# Compiling: in processes that have no GPU


class _Target:
    """Stands for Triton's driver in a process that only compiles."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class _Pointer:
    """A tensor as Triton looks at it when it compiles."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        return self.offset


class Job(NamedTuple):
    """A kernel to be compiled."""

    kernel: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    architecture: int


def job(launch: Launch, architecture: int) -> Job:
    arguments = tuple(
        _Pointer(a.dtype, int(a.storage_offset()) * a.element_size()) if isinstance(a, Tensor) else a
        for a in launch.arguments
    )
    options = dict(num_warps=launch.warps, num_stages=launch.stages) | launch.constants
    return Job(launch.kernel, arguments, options, architecture)


def compile_job(job: Job) -> dict[str, int]:
    """Compile a kernel into Triton's cache, where its launch will find it.

    Returns:
        Registers of a thread, bytes of them that spill to memory, and bytes of shared memory.
    """
    driver.set_active(_Target(job.architecture))
    compiled = getattr(triton_kernels, job.kernel).warmup(*job.arguments, grid=(1,), **job.options)
    usage = read_binary(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    with suppress(Exception):  # what starts it, which needs CUDA's library and a compiler; else the launch makes it
        driver.default.launcher_cls(compiled.src, compiled.metadata)
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return dict(registers=registers, spilled=stack, shared=compiled.metadata.shared)


# Timing


def timed(run: Callable[[], None]) -> float:
    """Milliseconds of a run, the median of several measurements. The device waits until the host has queued all runs of one,
    so that the host's part does not count.
    """
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(MEASUREMENTS)]
    for begin, end in events:
        torch.cuda._sleep(WAIT)
        begin.record()
        for _ in range(RUNS):
            run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / RUNS


class Inputs:
    """Random arguments of a call on the GPU, and what the present tile makes of them."""

    def __init__(self, call: Call):
        torch.manual_seed(0)
        leaves, self.structure = tree_flatten(tree_map(_memory, call.arguments))
        self.leaves = leaves
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in self.tensors:
            if tensor.dtype is torch.uint8:
                tensor.random_(0, 9)
            elif tensor.dtype in triton_block.HALVES:
                tensor.normal_()
            else:
                tensor.uniform_(0.5, 1.5)
        self.first = [tensor.clone() for tensor in self.tensors]
        self.expected: dict[int, Tensor] = {}

    @property
    def arguments(self) -> Any:
        return tree_unflatten(self.leaves, self.structure)

    def keep_results(self) -> None:
        self.expected = {
            i: tensor.clone()
            for i, (tensor, first) in enumerate(zip(self.tensors, self.first, strict=True))
            if not torch.equal(tensor, first)
        }

    def reset(self) -> None:
        for tensor, first in zip(self.tensors, self.first, strict=True):
            tensor.copy_(first)

    def error(self) -> float:
        """The largest relative distance of a result from the present tile's."""
        errors = []
        for i, expected in self.expected.items():
            difference = torch.linalg.vector_norm(self.tensors[i].float() - expected.float())
            errors.append(difference / torch.linalg.vector_norm(expected.float()))
        return torch.stack(errors).max().item()


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tools.lab.gpu_tiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="densenet121", help="of the zoo [densenet121]")
    parser.add_argument(
        "--batch-sizes", type=positive_integer, nargs="+", metavar="N", default=[256, 32], help="[256 32]"
    )
    parser.add_argument("--size", type=positive_integer, metavar="PIXELS", default=224, help="side of an image [224]")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="[bf16]")
    parser.add_argument("--tasks", nargs="+", choices=list(tasks()), default=list(tasks()), help="[all]")
    parser.add_argument(
        "--seconds", type=positive_integer, metavar="N", default=600, help="start nothing after these [600]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file, after each table")
    parser.add_argument(
        "--compile", type=int, metavar="ARCHITECTURE", choices=sorted({key[0] for key in TILES}),
        help="only compile for a compute capability times 10, into Triton's cache; needs no GPU",
    )  # fmt: skip
    options = parser.parse_args()
    if options.compile is None and not torch.cuda.is_available():
        raise UserError("tools.lab.gpu_tiles: there is no GPU here; --compile 90 compiles the candidates without one")
    Sweep(options).run()


class Sweep:
    def __init__(self, options: argparse.Namespace):
        self.options, self.begin = options, time.monotonic()
        self.architecture = options.compile or triton_block.architecture(DEVICE)
        self.records: list[dict[str, Any]] = []
        self.tasks = {name: task for name, task in tasks().items() if name in options.tasks}
        self.jobs: dict[Any, Future[dict[str, int]]] = {}
        set_tf32(options.precision)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.begin > self.options.seconds

    def run(self) -> None:
        o = self.options
        steps = [Step(o.model, "triton", size, o.size, o.precision, self.architecture) for size in o.batch_sizes]
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(available_cores(), mp_context=context)
        try:
            for _ in range(available_cores()):
                pool.submit(os.getpid)  # the processes import what they need while this one looks at the step
            wanted = {
                (name, str(candidate)): [
                    self._submit(pool, launch)
                    for call in calls(task, steps[0])  # other batch sizes need the same
                    for launch in needed(call, candidate, steps[0])
                ]
                for name, task in self.tasks.items()
                for candidate in (PRESENT, *task.candidates)
            }
            plan = [(step, name, task, calls(task, step)) for step in steps for name, task in self.tasks.items()]
            print(f"{len(self.jobs)} kernels to compile, {time.monotonic() - self.begin:.0f} s", flush=True)
            missing = []
            for step, name, task, own in plan:
                if self.late:
                    missing.append(f"{name} at batch {step.batch_size}")
                    continue
                usages: dict[str, Any] = {}
                for candidate in (PRESENT, *task.candidates):
                    try:
                        usages[str(candidate)] = [future.result() for future in wanted[name, str(candidate)]]
                    except Exception as error:  # a candidate that does not compile is left out, and said to be
                        usages[str(candidate)] = f"{type(error).__name__}: {error}"[-300:]
                self._task(step, name, task, own, usages)
            if missing:
                print("no time was left for " + ", ".join(missing))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, pool: ProcessPoolExecutor, launch: Launch) -> Future[dict[str, int]]:
        key = identity(launch)
        if key not in self.jobs:
            self.jobs[key] = pool.submit(compile_job, job(launch, self.architecture))
        return self.jobs[key]

    def _task(self, step: Step, name: str, task: Task, own: list[Call], usages: dict[str, Any]) -> None:
        fitting = []
        for candidate in (PRESENT, *task.candidates):
            usage = usages[str(candidate)]
            record: dict[str, Any] = dict(task=name, batch_size=step.batch_size, candidate=str(candidate), calls=[])
            if isinstance(usage, str):
                record["refused"] = usage
            else:
                record |= {key: max(own[key] for own in usage) for key in usage[0]}
                if record["spilled"] > SPILLED and candidate is not PRESENT:
                    record["refused"] = f"{record['spilled']} bytes of registers spill"
                elif record["shared"] > SHARED_MEMORY[self.architecture]:
                    record["refused"] = f"{record['shared']} bytes of shared memory"
            self.records.append(record)
            if "refused" not in record:
                fitting.append((candidate, record))
        if self.options.compile is None:
            for call in own:
                if self.late:
                    break
                self._time(step, call, fitting)
        self._print(step, name)
        if self.options.json:
            self.options.json.write_text(json.dumps(self.records, indent=1))

    def _time(self, step: Step, call: Call, fitting: list[tuple[Candidate, dict[str, Any]]]) -> None:
        inputs, best = Inputs(call), math.inf
        for candidate, record in fitting:
            if "refused" in record:
                continue
            try:
                with _with(candidate, step):
                    run = functools.partial(_run, call, inputs.arguments, _dtype(step))
                    inputs.reset()
                    run()
                    if not inputs.expected:
                        inputs.keep_results()
                    error = inputs.error()
                    milliseconds = timed(run)
            except Exception as fault:
                if "CUDA error" in str(fault):
                    raise
                record["refused"] = f"{type(fault).__name__}: {fault}"[:300]
                continue
            record["error"] = max(record.get("error", 0.0), error)
            if not error <= TOLERANCE:
                record["refused"] = f"results are {error:.1e} off the present tile's"
            sizes = [list(leaf.shape) for leaf in inputs.tensors]
            record["calls"].append(
                dict(method=call.method, images=call.images, sizes=sizes, weight=call.weight, ms=milliseconds)
            )
            record["ms"] = sum(own["weight"] * own["ms"] for own in record["calls"])
            best = min(best, milliseconds)
            if milliseconds > HOPELESS * best and candidate is not PRESENT:
                record["refused"] = f"took {milliseconds / best:.1f} times the best one's time"

    def _print(self, step: Step, name: str) -> None:
        own = [record for record in self.records if (record["task"], record["batch_size"]) == (name, step.batch_size)]
        own.sort(key=lambda record: (-len(record["calls"]), record.get("ms", 0.0)))
        rows = [
            [
                record["candidate"],
                f"{record['ms']:.3f}" if "ms" in record else "-",
                str(record.get("registers", "-")), f"{record.get('shared', 0) / 1024:.0f}",
                f"{record['error']:.0e}" if "error" in record else "-",
                record.get("refused", ""),
            ]
            for record in own
        ]  # fmt: skip
        print(f"\n{name}, batch {step.batch_size}, after {time.monotonic() - self.begin:.0f} s\n")
        print(
            "\n".join(table(["candidate", "ms", "registers", "shared KiB", "error", "refused"], rows, names=1)),
            flush=True,
        )


if __name__ == "__main__":
    exit_on_user_error(main)
