"""What this machine gives a process: its cores, how its C library handles memory, and notice of its parent's death."""

import ctypes
import os
import signal


def usable_cores() -> list[int]:
    """Numbers of the CPU cores that this process may use (a scheduler's binding included)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """How many CPU cores this process may use."""
    return len(usable_cores())


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: giving them back and faulting them in again costs a fifth of a step on CPU."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another system's malloc
        return
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def ask_for_signal_when_parent_dies(number: signal.Signals) -> None:
    """Have Linux send this process `number` when the process that started it is gone."""
    set_parent_death_signal = 1  # prctl.h
    try:
        ctypes.CDLL("libc.so.6").prctl(set_parent_death_signal, int(number))
    except OSError:  # another system
        return
