"""The C++ kernels of the fused dense block: compiled at first use, kept in the user's cache, called through ctypes."""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}


class KernelsUnavailableError(Exception):
    """The kernels cannot be compiled or loaded here; the message is one line."""


class BatchNorm(ctypes.Structure):
    """`BatchNorm` of dense_block.cpp: statistics of so many channels and the parameters of `module`."""

    _fields_ = [
        ("mean", ctypes.c_void_p),
        ("variance", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("epsilon", ctypes.c_double),
    ]

    def __init__(self, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, epsilon: float):
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (mean, variance, gamma, beta)]
        super().__init__(*pointers, epsilon)
        self.tensors = (mean, variance, gamma, beta)  # that they live as long as this


def call(kernel: str, dtype: torch.dtype, *arguments: Tensor | BatchNorm | tuple[int, ...] | int | None) -> None:
    """Run a kernel of dense_block.cpp on torch's number of threads.

    Tensors are passed as pointers to their first elements, tuples as arrays, None as a null pointer.
    """
    function = _function(f"{kernel}_{SUFFIXES[dtype]}")
    function(ctypes.c_long(torch.get_num_threads()), *(_as_c(argument) for argument in arguments))


def vector_lanes(dtype: torch.dtype) -> int:
    """Elements of a vector register: rows of intermediate matrices are a multiple of it."""
    return ctypes.c_long.in_dll(load(), "vector_bytes").value // dtype.itemsize


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot be used on this machine, in one line; None if they can."""
    try:
        load()
    except KernelsUnavailableError as error:
        return str(error)
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        KernelsUnavailableError: no compiler, or it failed.
    """
    compiler = _compiler()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "densenet-pipeline"
    library = folder / f"dense_block-{_fingerprint(compiler)}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with open(library.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one of a machine's ranks compiles, the others wait
                if not library.exists():
                    _compile(compiler, library)
    except OSError as error:
        raise KernelsUnavailableError(f"cannot write {folder} ({error.strerror}): set XDG_CACHE_HOME") from None
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelsUnavailableError(f"cannot load {library} ({error}): delete it") from None


@functools.cache
def _function(name: str):
    # The library exports pointers to instances of its templates.
    address = ctypes.c_void_p.in_dll(load(), name).value
    return ctypes.CFUNCTYPE(None)(address)


def _as_c(argument: Tensor | BatchNorm | tuple[int, ...] | int | None):
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, BatchNorm):
        return ctypes.byref(argument)
    if isinstance(argument, tuple):
        return (ctypes.c_long * len(argument))(*argument)
    return ctypes.c_void_p(None) if argument is None else ctypes.c_long(argument)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise KernelsUnavailableError("no C++ compiler (c++, g++, clang++ or $CXX)")


def _fingerprint(compiler: str) -> str:
    """Of all that the compiled code depends on, so that a cache shared by different machines is safe."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [version, _cpu().encode(), " ".join(FLAGS).encode(), *(path.read_bytes() for path in SOURCES)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    """The CPU's model and instruction sets, of which -march=native makes use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(line for line in lines if line.startswith(keys))


def _compile(compiler: str, library: Path) -> None:
    source = next(path for path in SOURCES if path.suffix == ".cpp")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        new = Path(folder) / library.name
        result = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(new)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            first = next(iter(result.stderr.strip().splitlines()), f"exit code {result.returncode}")
            raise KernelsUnavailableError(f"{compiler} cannot compile the kernels: {first}")
        new.replace(library)
