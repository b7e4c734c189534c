"""What the Triton kernels of the dense block use of a GPU, as compiled for it. No GPU is needed, and none runs anything.

``python -m tools.lab.gpu_kernels [MODEL] [--precisions bf16 ...] [--architectures 80 90 100]`` compiles each kernel of a
training step once for each tile, as the step would launch it, and prints registers of a thread, numbers spilled to memory,
shared memory of a program, and the instructions of the tensor cores.
"""

import argparse
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.models import triton_kernels
from pipeline.models.triton_block import MULTIPROCESSORS
from tools.support.fake_gpu import PRECISIONS, Launch, Step, run_step
from tools.support.markdown import table

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one program may have (CUDA C++ Programming Guide, "Compute Capabilities")."""
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""Instructions of an architecture's tensor cores, in PTX."""
_TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
}  # fmt: skip


class Compiled(NamedTuple):
    """A kernel as compiled for an architecture.

    Attributes:
        registers: of a thread, at most 255.
        spills: instructions that store to or load from a thread's own memory for lack of registers.
        shared_memory: bytes of a program.
        products: instructions of the tensor cores by name.
    """

    launch: Launch
    architecture: int
    registers: int
    spills: int
    shared_memory: int
    products: dict[str, int]
    ptx: str


def launches(step: Step) -> list[Launch]:
    """Of a step: each kernel once for each tile and kind of arguments."""
    found: dict[Any, Launch] = {}

    def record(launch: Launch) -> None:
        found.setdefault(identity(launch), launch)

    run_step(step, record)
    return list(found.values())


def identity(launch: Launch) -> tuple[Any, ...]:
    """What two launches of the same compiled kernel have in common."""
    signature, constants, aligned = _specialisation(launch)
    return launch.kernel, tuple(signature.items()), tuple(constants.items()), aligned, launch.warps, launch.stages


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compile a kernel for the arguments of a launch, as Triton would at the launch."""
    kernel = getattr(triton_kernels, launch.kernel)
    signature, constants, aligned = _specialisation(launch)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage = read_binary(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    code = read_binary(compiled.asm["cubin"], "nvdisasm")
    ptx = compiled.asm["ptx"]
    products = {name: len(re.findall(re.escape(name), ptx)) for name in PRODUCTS.values()}
    return Compiled(
        launch,
        architecture,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared_memory=compiled.metadata.shared,
        products={name: count for name, count in products.items() if count},
        ptx=ptx,
    )


def _specialisation(launch: Launch) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """The types of a kernel's arguments, the values of constants, and which arguments are multiples of 16.

    Triton finds them at each launch in the same way, and compiles a kernel once for each combination.
    """
    names = list(inspect.signature(getattr(triton_kernels, launch.kernel).fn).parameters)
    values = dict(zip(names, launch.arguments, strict=False)) | launch.constants
    assert list(values) == names, f"{launch.kernel} takes {names}"
    signature, constants, aligned = {}, {}, []
    for name, value in values.items():
        changing = name in triton_kernels.SIZES
        if name in launch.constants or value is None or (type(value) is int and value == 1 and not changing):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not changing:
                aligned.append(name)
    return signature, constants, tuple(aligned)


def read_binary(cubin: bytes, program: str, *options: str) -> str:
    """What a program of Triton's says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command: list[str | Path] = [BINARIES / program, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    for precision in options.precisions:
        for architecture in options.architectures:
            step = Step(options.model, "triton", options.batch_size, options.size, precision, architecture)
            for launch in launches(step):
                found = compile_launch(launch, architecture)
                tile = " ".join(f"{name}={value}" for name, value in launch.constants.items() if "BLOCK" in name)
                yield [
                    launch.kernel, precision, str(architecture), tile, str(launch.warps), str(launch.stages),
                    str(found.registers), str(found.spills), f"{found.shared_memory / 1024:.1f}",
                    ", ".join(f"{name} {count}" for name, count in found.products.items()),
                ]  # fmt: skip


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.lab.gpu_kernels", description=__doc__)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="densenet121", help="of the zoo [densenet121]")
    parser.add_argument("--batch-size", type=positive_integer, metavar="N", default=64, help="images [64]")
    parser.add_argument("--size", type=positive_integer, metavar="PIXELS", default=224, help="side of an image [224]")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"], help="[bf16]")
    parser.add_argument(
        "--architectures", nargs="+", type=int, choices=list(MULTIPROCESSORS), default=list(MULTIPROCESSORS),
        help="compute capabilities times 10 [80 90 100]",
    )  # fmt: skip
    options = parser.parse_args()
    names = "kernel", "precision", "architecture", "tile", "warps", "stages", "registers", "spills", "shared KiB"
    print("\n".join(table([*names, "tensor cores"], list(rows(options)), names=4)))


if __name__ == "__main__":
    exit_on_user_error(main)
