"""Which nvJPEG DALI decodes with on a GPU: the one of requirements.txt, whatever ``module load cuda`` puts first.

Loading the library and asking for its version is tested; decoding with it has not been run on a GPU yet.
"""

import ctypes
import functools
import importlib.metadata
import sys
from contextlib import suppress
from pathlib import Path

# Before, nvImageCodec refuses to decode a region of a JPEG image with the smooth upsampling of colours that libjpeg-turbo
# does, and the whole image is decoded on the CPU.
NEEDED = (13, 2)
LIBRARY = "libnvjpeg.so"


@functools.cache
def load_nvjpeg() -> None:
    """Load nvJPEG before DALI does, which then takes this one; say in one line if it is too old to decode on the GPU."""
    path = installed_nvjpeg() or LIBRARY
    version = nvjpeg_version(path)
    if version and version[:2] >= NEEDED:
        return
    found = f"nvJPEG {'.'.join(map(str, version))} ({path}) is too old" if version else f"nvJPEG ({path}) does not load"
    print(
        f"warning: {found}: JPEG images are decoded on the CPU; pip install 'nvidia-nvjpeg>={'.'.join(map(str, NEEDED))}' "
        "to decode them on the GPU",
        file=sys.stderr,
        flush=True,
    )


def installed_nvjpeg() -> str | None:
    """The library in the wheel nvidia-nvjpeg; None if that is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-nvjpeg") or []:
            if file.name.startswith(LIBRARY):
                return str(Path(str(file.locate())).resolve())
    return None


def nvjpeg_version(path: str) -> tuple[int, ...]:
    """Load the library; return its major, minor and patch version, or nothing if it does not load."""
    try:
        get_property = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL).nvjpegGetProperty
    except (OSError, AttributeError):
        return ()
    version, value = [], ctypes.c_int()
    for part in range(3):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL of library_types.h
        if get_property(part, ctypes.byref(value)):
            return ()
        version.append(value.value)
    return tuple(version)
