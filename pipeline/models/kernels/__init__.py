"""The C++ kernels of the fused dense block: compiled at first use, kept in the user's cache, called through ctypes."""

import ctypes
import functools
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import cpp

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
FLAGS = [*cpp.FLAGS, "-fopenmp"]
AMX = "-DMAY_USE_AMX"
# Of Linux on x86_64: a process asks for the registers of AMX by arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
ARCH_PRCTL, REQUEST_REGISTERS, TILE_REGISTERS = 158, 0x1023, 18
SUFFIXES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}  # of maps

# The arguments of each kernel in dense_block.cpp after the number of threads. A word NAME is an integer; NAME:KIND(SIZES)
# a tensor, where SIZES are expressions of the integers. With a question mark, None may stand for it. KIND is
#   rows       in the dtype of the maps: a matrix with so many rows and columns at least, and from one row to the next LD
#              elements, as in
#              rows(ROWS,COLUMNS)/LD; images (N, C, H, W) in channels-last order have a row a pixel
#   flat       in the computing dtype: so many numbers side by side, in the order of the tensor's indices
#   sums       the same in float64
#   bytes      images in channels-last order, in uint8
#   norm       a `BatchNorm` of so many channels in the computing dtype
# `padded` rounds up to whole vectors.
SIGNATURES = {
    "copy_and_measure": (
        "x:rows(pixels,channels)/channels pixels channels out:rows(pixels,channels)/ldout? ldout mean:flat(channels)? "
        "variance:flat(channels)?"
    ),
    "bottleneck_forward": (
        "x:rows(pixels,channels)/ldx ldx pixels channels norm:norm(channels) weight:flat(width*channels) width "
        "b:rows(pixels,width)/padded(width) mean:flat(width)? variance:flat(width)?"
    ),
    "bottleneck_backward": (
        "dz:rows(pixels,width)/padded(width) b:rows(pixels,width)/padded(width) pixels width norm2:norm(width) "
        "sum2:sums(width) centred_sum2:sums(width) dgamma2:flat(width) dbeta2:flat(width) "
        "x:rows(pixels,channels)/ldx g:rows(pixels,channels)/ldx ldx channels norm1:norm(channels) "
        "weight:flat(width*channels) dweight:flat(width*channels) dgamma1:flat(channels) dbeta1:flat(channels) "
        "map_sum:sums(channels) map_centred_sum:sums(channels)"
    ),
    "conv3x3_forward": (
        "b:rows(images*height*width,channels)/padded(channels) images height width channels norm:norm(channels) "
        "weight:flat(9*channels*growth) growth out:rows(images*height*width,growth)/ldout ldout "
        "mean:flat(growth)? variance:flat(growth)?"
    ),
    "conv3x3_backward": (
        "b:rows(images*height*width,channels)/padded(channels) images height width channels norm:norm(channels) "
        "weight:flat(9*channels*growth) growth gradient:rows(images*height*width,growth)/padded(growth) "
        "dz:rows(images*height*width,channels)/padded(channels) dweight:flat(9*channels*growth) "
        "sum:sums(channels) centred_sum:sums(channels)"
    ),
    "finish_gradient": (
        "g:rows(pixels,channels)/ldx x:rows(pixels,channels)/ldx ldx pixels channels norm:norm(channels) "
        "map_sum:sums(channels) map_centred_sum:sums(channels) out:rows(pixels,channels)/ldout ldout"
    ),
    "pool_forward": (
        "x:rows(images*height*width,channels)/ldx ldx images height width channels norm:norm(channels) side_y side_x "
        "out:rows(images*(height//side_y)*(width//side_x),channels)/channels"
    ),
    "pool_backward": (
        "x:rows(images*height*width,channels)/ldx g:rows(images*height*width,channels)/ldx ldx images height width "
        "channels norm:norm(channels) side_y side_x "
        "gradient:rows(images*(height//side_y)*(width//side_x),channels)/channels "
        "dgamma:flat(channels) dbeta:flat(channels) map_sum:sums(channels) map_centred_sum:sums(channels)"
    ),
    "stem_forward": (
        "y:rows(images*height*width,channels)/channels images height width channels norm:norm(channels) "
        "out:rows(images*((height+1)//2)*((width+1)//2),channels)/channels "
        "argmax:bytes(images*((height+1)//2)*((width+1)//2)*channels)"
    ),
    "stem_backward": (
        "y:rows(images*height*width,channels)/channels images height width channels norm:norm(channels) "
        "gradient:rows(images*((height+1)//2)*((width+1)//2),channels)/channels "
        "argmax:bytes(images*((height+1)//2)*((width+1)//2)*channels) "
        "dy:rows(images*height*width,channels)/channels dgamma:flat(channels) dbeta:flat(channels)"
    ),
}


class BatchNorm(ctypes.Structure):
    """`BatchNorm` of dense_block.cpp: statistics and parameters, one number a channel; `gamma` and `beta` may be None.

    Raises:
        TypeError: they are not all flat, of one dtype, and on the CPU.
    """

    _fields_ = [
        ("mean", ctypes.c_void_p),
        ("variance", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("epsilon", ctypes.c_double),
    ]

    def __init__(self, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, epsilon: float):
        self.tensors = (mean, variance, gamma, beta)  # that they live as long as this
        given = [tensor for tensor in self.tensors if tensor is not None]
        self.dtype, self.channels = mean.dtype, min(map(len, given))
        pointers = [
            None if tensor is None else _pointer(tensor, mean.dtype, tensor.is_contiguous(), "a batch norm's tensor")
            for tensor in self.tensors
        ]
        super().__init__(*pointers, epsilon)


Argument = Tensor | BatchNorm | int | None


def call(kernel: str, dtype: torch.dtype, *arguments: Argument) -> None:
    """Run a kernel of dense_block.cpp on torch's number of threads.

    Tensors are passed as pointers to their first elements, None as a null pointer.

    Args:
        dtype: of the maps.

    Raises:
        TypeError: the arguments are not those of `SIGNATURES`, or a tensor has another dtype, device or layout.
        torch.OutOfMemoryError: there is no memory for what the kernel needs besides its arguments.
    """
    parameters, function = _function(kernel, dtype)
    if len(arguments) != len(parameters):
        raise TypeError(f"{kernel} takes {len(parameters)} arguments, not {len(arguments)}")
    for parameter, argument in zip(parameters, arguments, strict=True):
        if parameter.kind == "int" and type(argument) is not int:
            raise TypeError(f"{parameter.name} must be a whole number, not {argument!r}")
    values = [parameter.as_c(argument, arguments) for parameter, argument in zip(parameters, arguments, strict=True)]
    if function(torch.get_num_threads(), *values):
        raise torch.OutOfMemoryError(f"the kernel {kernel} cannot allocate memory: take fewer images at once")


class _Parameter(NamedTuple):
    """An argument as a kernel declares it; see `SIGNATURES`.

    Attributes:
        dtype: of a tensor or batch norm.
        sizes: of the values of all arguments, in their order: what is in the parentheses, and for rows what follows.
    """

    name: str
    kind: str
    optional: bool
    dtype: torch.dtype
    sizes: Callable[..., tuple[int, ...]]

    @property
    def c_type(self) -> Any:
        return ctypes.c_long if self.kind == "int" else ctypes.c_void_p

    def as_c(self, value: Argument, arguments: tuple[Argument, ...]) -> Any:
        kind = self.kind
        if kind == "int":
            return value
        if value is None and self.optional:
            return None
        if kind == "norm":
            if (
                not isinstance(value, BatchNorm)
                or value.dtype != self.dtype
                or value.channels < self.sizes(*arguments)[0]
            ):
                raise TypeError(
                    f"{self.name} must be a BatchNorm of {self.sizes(*arguments)[0]} channels in {self.dtype}"
                )
            return ctypes.addressof(value)
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.name} must be a tensor, not {value!r}")
        if kind == "rows":
            rows, columns, leading = self.sizes(*arguments)
            shape = _as_matrix(value)
            fits = shape[2] == leading and shape[0] >= rows and shape[1] >= columns
        elif kind == "bytes":
            fits = value.is_contiguous(memory_format=torch.channels_last) and value.numel() >= self.sizes(*arguments)[0]
        else:
            fits = value.is_contiguous() and value.numel() >= self.sizes(*arguments)[0]
        return _pointer(value, self.dtype, fits, self.name)


def _pointer(tensor: Tensor, dtype: torch.dtype, fits: bool, name: str) -> int:
    """The address of a tensor's first element.

    Raises:
        TypeError: it is not what the kernels can read; `fits` says whether its layout is.
    """
    if not (fits and tensor.is_cpu and tensor.dtype is dtype) or tensor.is_neg():
        raise TypeError(
            f"{name} must be {dtype} on the CPU in the layout that the kernel declares, not {tensor.dtype} on "
            f"{tensor.device} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        )
    pointer = tensor.data_ptr()
    if not pointer and tensor.numel():
        raise TypeError(f"{name} has no memory")
    return pointer


def _as_matrix(tensor: Tensor) -> tuple[int, int, int]:
    """Rows, columns and leading dimension; the latter is -1 if the elements of a row do not lie side by side."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        images, channels, height, width = tensor.shape
        return images * height * width, channels, channels
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return *tensor.shape, tensor.stride(0)
    return 0, 0, -1


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the parameters, statistics and sums, for maps of `dtype`."""
    return torch.float32 if dtype is torch.bfloat16 else dtype


def vector_lanes(dtype: torch.dtype) -> int:
    """Numbers in a vector register, for maps of `dtype`: rows of intermediate matrices are a multiple of it."""
    return ctypes.c_long.in_dll(load(), "vector_bytes").value // computing_dtype(dtype).itemsize


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot be used on this machine, in one line; None if they can."""
    return cpp.reason_if_unavailable(load)


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels; see `load_cpp`."""
    flags = instruction_flags()
    try:
        return cpp.load_cpp(SOURCES, [*flags, *FLAGS])
    except cpp.CppUnavailableError:
        if AMX not in flags:
            raise
        flags.remove(AMX)  # an assembler may be older than its compiler
        return cpp.load_cpp(SOURCES, [*flags, *FLAGS])


def instruction_flags() -> list[str]:
    """What the compiler cannot know of the instructions that multiply bfloat16; see simd.h."""
    if platform.machine() != "x86_64":
        return []
    cpu = cpp.cpu()
    flags = []
    if "amx_bf16" in cpu and _may_use_amx():
        flags.append(AMX)
    if "GenuineIntel" in cpu:  # VDPBF16PS: a step takes 1.1 to 1.35 times as long as with products in float
        flags.append("-DSLOW_PAIRS")
    return flags


def _may_use_amx() -> bool:
    """Ask Linux, before 5.16 in vain, to let this process and its threads use AMX."""
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_REGISTERS, TILE_REGISTERS) == 0


@functools.cache
def _function(kernel: str, dtype: torch.dtype) -> tuple[list[_Parameter], Any]:
    """The parameters of a kernel for maps of this dtype, and it as a function."""
    lanes, dtypes = vector_lanes(dtype), {"rows": dtype, "sums": torch.float64, "bytes": torch.uint8}
    names = [word.split(":")[0] for word in SIGNATURES[kernel].split()]
    parameters = []
    for word in SIGNATURES[kernel].split():
        match = re.fullmatch(r"(\w+)(?::(\w+)\((.*?)\)(?:/([\w()]+))?\??)?", word)
        assert match, word
        name, kind, sizes, leading = match.groups()
        expression = f"lambda {', '.join(names)}: ({sizes}{f', {leading}' if leading else ''},)" if kind else "None"
        parameters.append(
            _Parameter(
                name=f"{kernel}'s {name}",
                kind=kind or "int",
                optional=word.endswith("?"),
                dtype=dtypes.get(kind, computing_dtype(dtype)),
                sizes=eval(expression, {"padded": lambda n: -(-n // lanes) * lanes}),
            )
        )
    # The library exports pointers to instances of its templates.
    address = ctypes.c_void_p.in_dll(load(), f"{kernel}_{SUFFIXES[dtype]}").value
    assert address is not None
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long, *(parameter.c_type for parameter in parameters))
    return parameters, prototype(address)
