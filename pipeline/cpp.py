"""C++ that is compiled at first use for the CPU it runs on, and kept in the user's cache."""

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

# The kernels look for NaN, which compilers with fast arithmetic as their default, as icpx, would take away.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"
)  # fmt: skip
COMPILE_ERROR = re.compile(r":\d+: (fatal )?[Ee]rror:")


class CppUnavailableError(Exception):
    """Code cannot be compiled or loaded here; the message is one line."""


def load_cpp(sources: Sequence[Path], flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """Compile the one .cpp file among `sources`, which may include the others, unless the cache has it; load it.

    Raises:
        CppUnavailableError: no compiler, or it failed, or the cache cannot be written.
    """
    compiler = find_compiler()
    source = next(path for path in sources if path.suffix == ".cpp")
    folder = _cache_folder()
    library = folder / f"{source.stem}-{fingerprint(compiler, sources, flags)}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with open(library.with_suffix(".lock"), "w") as lock:
                with suppress(OSError):  # of a file system without locks: then each compiles
                    fcntl.flock(lock, fcntl.LOCK_EX)  # one of a machine's ranks compiles, the others wait
                if not library.exists():
                    _compile(compiler, source, flags, library)
    except OSError as error:
        raise CppUnavailableError(f"cannot write {folder} ({error.strerror}): set XDG_CACHE_HOME") from None
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        remedy = "delete it, or set XDG_CACHE_HOME to a folder from which programs may run"
        raise CppUnavailableError(f"cannot load {library} ({error}): {remedy}") from None


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "densenet-pipeline"
    except RuntimeError:  # as of a user whom the system does not know, in a bare container
        raise CppUnavailableError("there is no home directory to keep compiled code in: set XDG_CACHE_HOME") from None


def reason_if_unavailable(load: Callable[[], object]) -> str | None:
    """Why code cannot be loaded on this machine, in one line; None if it can."""
    try:
        load()
    except CppUnavailableError as error:
        return str(error)
    return None


def find_compiler() -> str:
    failed = ""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            try:
                version_of(name)
            except OSError as error:
                failed = failed or f": {name} cannot be run ({error.strerror})"
                continue
            return name
    raise CppUnavailableError(f"no C++ compiler (c++, g++, clang++ or $CXX){failed}")


def version_of(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout


def fingerprint(compiler: str, sources: Sequence[Path], flags: Sequence[str]) -> str:
    """Of all that the compiled code depends on, so that a cache shared by different machines is safe."""
    parts = [version_of(compiler), cpu().encode(), " ".join(flags).encode(), *(path.read_bytes() for path in sources)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def cpu() -> str:
    """The CPU's maker, model and instruction sets, of which -march=native makes use, in the words of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    keys = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(line for line in lines if line.startswith(keys))


def _compile(compiler: str, source: Path, flags: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        new = Path(folder) / library.name
        result = subprocess.run(
            [compiler, *flags, str(source), "-o", str(new)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
            # Of an error in a header it comes after "In file included from".
            said = next((line for line in lines if COMPILE_ERROR.search(line)), lines[0])
            raise CppUnavailableError(f"{compiler} cannot compile {source.name}: {said}")
        try:
            os.link(new, library)  # a library that others have loaded, perhaps on other machines, is never replaced
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            new.replace(library)
