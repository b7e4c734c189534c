"""Which nvJPEG DALI decodes with on a GPU: the one of requirements.txt, whatever else the process or the machine brings.

nvImageCodec, DALI's decoder, asks the dynamic linker for NAME. It gets the first library of this soname that the process has
loaded, and only without one are paths searched. torchvision's wheel has an nvJPEG of that soname and an older version, so
that `pipeline` loads the right one when it is imported. That takes 10 ms, and no GPU.
"""

import ctypes
import functools
import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

# Of CUDA 13, for which requirements.txt has DALI.
NAME = "libnvjpeg.so.13"
FOLDER = Path("cu13/lib")  # in the package nvidia, to which NVIDIA's wheels add


class _Symbol(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


@functools.cache
def load_nvjpeg() -> None:
    """Load the wheel's nvJPEG, before something else brings an older one."""
    with suppress(OSError):  # what DALI then gets is told by `check_nvjpeg`
        ctypes.CDLL(installed_nvjpeg() or NAME)


@functools.cache
def check_nvjpeg() -> None:
    """Say in one line if DALI gets no nvJPEG, or another than the wheel's."""
    load_nvjpeg()
    installed, found = installed_nvjpeg(), nvjpeg_of_process()
    if found is None:
        trouble = (
            "no nvJPEG is found, without which DALI decodes JPEG images on the CPU: pip install -r requirements.txt"
        )
    elif installed and found[0] != installed:
        trouble = (
            f"JPEG images are decoded with nvJPEG {found[1]} ({found[0]}), which was loaded before {installed}: pixels may "
            f"differ in their last bits; start with LD_PRELOAD={installed}"
        )
    else:
        return
    print(f"warning: {trouble}", file=sys.stderr, flush=True)


def installed_nvjpeg() -> str | None:
    """The library of the wheel nvidia-nvjpeg; None if that is not installed."""
    package = importlib.util.find_spec("nvidia")
    places = [Path(folder) / FOLDER / NAME for folder in package.submodule_search_locations or ()] if package else []
    return next((str(place.resolve()) for place in places if place.is_file()), None)


def nvjpeg_of_process() -> tuple[str, str] | None:
    """File and version of the nvJPEG that nvImageCodec gets in this process; None if none loads."""
    try:
        get_property = ctypes.CDLL(NAME).nvjpegGetProperty
    except (OSError, AttributeError):
        return None
    version, value, symbol = [], ctypes.c_int(), _Symbol()
    for part in range(3):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL of library_types.h
        if get_property(part, ctypes.byref(value)):
            return None
        version.append(str(value.value))
    ctypes.CDLL(None).dladdr(ctypes.cast(get_property, ctypes.c_void_p), ctypes.byref(symbol))
    return str(Path((symbol.file or b"").decode()).resolve()), ".".join(version)
