"""What this machine gives a process: its cores, GPUs, network interfaces, memory and how its C library handles it, and notice
of its parent's death."""

import ctypes
import os
import platform
import re
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

MANY_FILES = 65_536


def usable_cores() -> list[int]:
    """Numbers of the CPU cores that this process may use (a scheduler's binding included)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """How many CPU cores this process may use."""
    return len(usable_cores())


def cpu_name() -> str:
    """What the processor is called."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def allow_many_files() -> None:
    """Let this process have as many files open as its hard limit allows, up to `MANY_FILES`: each shard stays open, and each
    thread of the native loader has some."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if most == resource.RLIM_INFINITY else min(most, MANY_FILES)
    if allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def present_gpus(folder: Path = Path("/dev")) -> list[Path]:
    """NVIDIA's GPUs that this process may open, whether or not a driver or torch can use them.

    Not all that lie there: SLURM gives a job without GPUs no access to those of its machine.
    """
    found = []
    for device in sorted(folder.glob("nvidia[0-9]*")):
        with suppress(OSError):
            os.close(os.open(device, os.O_RDWR))
            found.append(device)
    return found


def network_interfaces() -> dict[str, str]:
    """The network interfaces that have an IPv4 address, and it; none where the system does not tell."""
    found: dict[str, str] = {}
    with suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        import fcntl  # not on every system

        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(asking, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR of Linux
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def peak_memory() -> int:
    """Bytes of memory that this process has had at most."""
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    # Not first: on Linux it survives exec, so that a process starts with its parent's.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: giving them back and faulting them in again costs a fifth of a step on CPU."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another system's malloc
        return
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Have glibc give back what is free, after work that will not be done again; see `keep_freed_memory`."""
    with suppress(OSError, AttributeError):  # another system's malloc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def ask_for_signal_when_parent_dies(number: signal.Signals) -> None:
    """Have Linux send this process `number` when the process that started it is gone."""
    set_parent_death_signal = 1  # prctl.h
    try:
        ctypes.CDLL("libc.so.6").prctl(set_parent_death_signal, int(number))
    except OSError:  # another system
        return
