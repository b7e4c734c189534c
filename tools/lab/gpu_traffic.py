"""Bytes moved and kernels launched in a training step on a GPU, counted without one.

``python -m tools.lab.gpu_traffic [MODEL] [--batch-size N] [--size PIXELS] [--precision bf16] [--details]`` counts the forward
and backward pass of each implementation of the dense block that is for GPUs, on torch's fake tensors, with the tiles that
--architecture has. Nothing is computed and
nothing is measured. A kernel counts each number that it touches once: what its programs read again comes from the cache if
the card's cache holds it, which is assumed.

Torch's operators read their inputs and write their outputs. Each is one kernel, except that batch norm reads its input once
for the statistics and once for the result, backward likewise; a convolution's gradients of input and weight are a kernel
each; and the operators over lists of tensors are a kernel for 64 tensors. What cuDNN copies for itself is not known.

The Triton kernels' numbers follow from their arguments and tiles (`TRAFFIC`).

The time is bytes over the card's bandwidth: no step with this traffic can take less. It leaves out arithmetic and launches.
"""

import argparse
import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.models import triton_kernels
from pipeline.models.triton_block import MULTIPROCESSORS
from tools.support.fake_gpu import PRECISIONS, Launch, Step, run_step
from tools.support.markdown import table

IMPLEMENTATIONS = "eager", "memory_efficient", "triton"
BANDWIDTHS = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8e12}
"""Bytes a second of a card's memory (SXM, A100 of 80 GB), from NVIDIA's data sheets; a B200's is an eighth of DGX B200's."""
TENSORS_A_LAUNCH = 64  # of torch's operators over two lists of tensors (ATen/native/cuda/MultiTensorApply.cuh)

_NORM = "mean:channels variance:channels gamma:channels beta:channels"
_POOLED = "pixels//(height*width)*out_height*out_width*channels"
_PART = "min(BLOCK_N,features-first)"
# Of each kernel: what it reads and what it writes. NAME:NUMBERS is an argument and an expression of the other arguments, the
# constants and the grid: `tiles` is its first side, where that is no argument, and `ranges` its second. An argument that is
# None is not touched.
TRAFFIC = {
    "copy_and_measure": ("x:pixels*channels", "out:pixels*channels partial:2*tiles*channels"),
    "reduce_moments": ("partial:2*tiles*channels", "mean:channels variance:channels"),
    "reduce_shared_norm": (
        "partial:2*tiles*channels variance:channels gamma:channels map_sum:channels*(1-FIRST) "
        "map_centred_sum:channels*(1-FIRST)",
        "dgamma:channels dbeta:channels map_sum:channels map_centred_sum:channels",
    ),
    "reduce_own_norm": (
        "partial:2*tiles*channels mean:channels variance:channels gamma:channels",
        "dgamma:channels dbeta:channels coefficients:3*channels",
    ),
    "reduce_weights": ("partial:splits*numbers", "out:numbers"),
    "fold_norm": (_NORM, "scale:channels shift:channels"),
    "bottleneck_forward": (
        "x:pixels*channels weight:features*channels scale:channels shift:channels",
        "out:pixels*features partial:2*tiles*features",
    ),
    "norm_forward": (f"b:pixels*channels {_NORM}", "out:pixels*channels"),
    "conv3x3_forward": (
        "d:pixels*channels weight:9*features*channels",
        "out:pixels*features partial:2*tiles*features",
    ),
    "pool_forward": (f"x:out_pixels*pool_height*pool_width*channels {_NORM}", "out:out_pixels*channels"),
    "stem_forward": (
        f"y:out_pixels//(out_height*out_width)*height*width*channels {_NORM}",
        "out:out_pixels*channels argmax:out_pixels*channels",
    ),
    "finish_gradient": (
        "G:pixels*channels x:pixels*channels mean:channels variance:channels map_sum:channels map_centred_sum:channels",
        "out:pixels*channels",
    ),
    "pool_backward": (
        f"x:pixels*channels gradient:{_POOLED} {_NORM}",
        "G:pixels*channels partial:2*tiles*channels",
    ),
    "stem_backward": (
        f"y:pixels*channels gradient:{_POOLED} argmax:{_POOLED} {_NORM}",
        "G:pixels*channels partial:2*tiles*channels",
    ),
    "conv3x3_backward_data": (
        f"gradient:pixels*features weight:9*features*channels b:pixels*channels {_NORM}",
        "dz:pixels*channels partial:2*tiles*channels",
    ),
    "conv3x3_backward_data_persistent": (
        f"gradient:pixels*features weight:9*features*channels b:pixels*channels {_NORM}",
        "dz:pixels*channels partial:2*ranges*channels",
    ),
    "conv3x3_backward_weights": (
        f"b:pixels*channels gradient:pixels*features {_NORM}",
        "partial:ranges*9*features*channels",
    ),
    "norm_backward": ("dz:pixels*channels b:pixels*channels coefficients:3*channels", "dz:pixels*channels"),
    "bottleneck_backward": (
        f"db:pixels*{_PART} weight:channels*{_PART} x:pixels*channels G:pixels*channels {_NORM}",
        f"G:pixels*channels weight_partial:ranges*channels*{_PART} partial:2*ranges*channels",
    ),
}


@dataclass
class Count:
    """Launches, and bytes read and written."""

    launches: int = 0
    read: int = 0
    written: int = 0

    def add(self, other: "Count") -> None:
        self.launches += other.launches
        self.read += other.read
        self.written += other.written


@dataclass
class Traffic(TorchDispatchMode):
    """Counts torch's operators while it is entered, and launches of own kernels by `add_launch`."""

    by_kernel: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        if func.namespace == "aten" and not func.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.by_kernel[name.partition(".")[0]].add(_of_operator(name, args, kwargs, out))
        return out

    def add_launch(self, launch: Launch) -> None:
        self.by_kernel[launch.kernel].add(of_launch(launch))

    @property
    def total(self) -> Count:
        total = Count()
        for count in self.by_kernel.values():
            total.add(count)
        return total


def _of_operator(name: str, args: Any, kwargs: Any, out: Any) -> Count:
    read, written = _bytes((args, kwargs)), _bytes(out)
    if name.startswith("convolution_backward"):
        gradient, x, weight, *_, wanted = args
        kernels = [_bytes(other) for other, want in zip((weight, x), wanted, strict=False) if want]
        return Count(len(kernels), sum(kernels) + len(kernels) * _bytes(gradient), written)
    if "batch_norm_backward" in name:  # its sums, then the result
        return Count(2, read + _bytes(args[:2]), written)
    if "batch_norm" in name or name.startswith("var_mean"):
        passes = 2 if "batch_norm" in name else 1
        return Count(passes, read + (passes - 1) * _bytes(args[0]), written)
    if name.startswith("_foreach"):
        written = _bytes(args[0])
        return Count(-(-len(args[0]) // TENSORS_A_LAUNCH), read - (written if "copy" in name else 0), written)
    if name.startswith("copy_"):
        return Count(1, _bytes(args[1]), written)
    return Count(1, read, written)


def _bytes(tensors: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


def of_launch(launch: Launch) -> Count:
    """The bytes that a launch of an own kernel touches, each once."""
    names = list(inspect.signature(getattr(triton_kernels, launch.kernel).fn).parameters)
    values = dict(zip(names, launch.arguments, strict=False)) | launch.constants
    numbers = {name: value for name, value in values.items() if isinstance(value, int)}
    if len(launch.grid) > 1:
        numbers["ranges"] = launch.grid[1]
    numbers.setdefault("tiles", launch.grid[0])

    def size(items: str) -> int:
        found = 0
        for item in items.split():
            name, _, expression = item.partition(":")
            if values[name] is not None:
                found += values[name].element_size() * int(eval(expression, {"min": min}, numbers))
        return found

    read, written = TRAFFIC[launch.kernel]
    return Count(1, size(read), size(written))


def traffic(step: Step) -> Traffic:
    """What a step reads, writes and launches."""
    found = Traffic()
    run_step(step, found.add_launch, found)
    return found


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tools.lab.gpu_traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="densenet121", help="of the zoo [densenet121]")
    parser.add_argument("--batch-size", type=positive_integer, metavar="N", default=64, help="images [64]")
    parser.add_argument("--size", type=positive_integer, metavar="PIXELS", default=224, help="side of an image [224]")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="[bf16]")
    parser.add_argument(
        "--architecture", type=int, choices=list(MULTIPROCESSORS), default=90, help="compute capability times 10 [90]"
    )
    parser.add_argument("--details", action="store_true", help="also each kernel's share")
    options = parser.parse_args()
    found = {
        name: traffic(
            Step(options.model, name, options.batch_size, options.size, options.precision, options.architecture)
        )
        for name in IMPLEMENTATIONS
    }
    titles = [
        "dense_block",
        "launches",
        "read, GB",
        "written, GB",
        *(f"ms at {'an' if card[0] in 'AH' else 'a'} {card}'s bandwidth" for card in BANDWIDTHS),
    ]
    rows = []
    for name, own in found.items():
        moved = own.total.read + own.total.written
        times = [f"{1e3 * moved / bandwidth:.1f}" for bandwidth in BANDWIDTHS.values()]
        rows.append([name, *_cells(own.total), *times])
    print(
        f"{options.model}, batch {options.batch_size}, {options.size} px, {options.precision}; counted, not measured\n"
    )
    print("\n".join(table(titles, rows, names=1)))
    if options.details:
        for name, own in found.items():
            kernels = sorted(own.by_kernel.items(), key=lambda item: -item[1].read - item[1].written)
            rows = [[kernel, *_cells(count)] for kernel, count in kernels]
            print(f"\n{name}:\n\n" + "\n".join(table(["kernel", *titles[1:4]], rows, names=1)))


def _cells(count: Count) -> list[str]:
    return [f"{count.launches:,}", f"{count.read / 1e9:.1f}", f"{count.written / 1e9:.1f}"]


if __name__ == "__main__":
    exit_on_user_error(main)
