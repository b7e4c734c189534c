"""Whose turn it is among runs of this machine that were submitted together, and which part of the machine is whose.

A run locks a file of its own until it has ended, and while it trains one of its part. The lock of a controller that is killed
goes with it.
"""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TypeVar

T = TypeVar("T")


def take_turn(folder: Path, index: int) -> IO[bytes]:
    """Lock the file of a run; the lock belongs to whoever has the file open, here or in a process that inherits it.

    Args:
        folder: the submission's.
        index: of the run; runs train in this order.
    """
    file = _file(folder, index)
    file.parent.mkdir(exist_ok=True)
    stream = open(file, "wb")  # noqa: SIM115 - closing it would unlock it
    fcntl.flock(stream, fcntl.LOCK_EX)
    return stream


def has_turn(folder: Path, index: int, parallel: int) -> bool:
    """Whether fewer than `parallel` of the runs before this one have still to end."""
    return sum(_is_locked(_file(folder, before)) for before in range(index)) < parallel


def take_part(folder: Path, parts: int) -> tuple[int, IO[bytes]] | None:
    """The number of a part of the machine that no other run trains on, and the lock on it; None while there is none."""
    (folder / "parts").mkdir(exist_ok=True)
    for part in range(parts):
        stream = open(folder / "parts" / str(part), "wb")  # noqa: SIM115 - closing it would unlock it
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
        else:
            return part, stream
    return None


def part_of(things: Sequence[T], part: int, parts: int) -> list[T]:
    """The share of one of so many parts in a machine's cores, or GPUs: neighbours; where there are too few, one that others
    have too."""
    share = list(things[part * len(things) // parts : (part + 1) * len(things) // parts])
    return share or list(things[part % len(things) :][:1] if things else [])


def visible_gpus(present: int) -> list[str]:
    """The GPUs that runs of this machine may use, as CUDA_VISIBLE_DEVICES names them, of so many that there are."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(map(str, range(present)))
    return [name for name in named.split(",") if name not in ("", "-1")]


def gpus_for_part(present: int, part: int, parts: int) -> str | None:
    """What CUDA_VISIBLE_DEVICES is for a part of the machine; None where there is no GPU to divide.

    Args:
        present: as of `visible_gpus`.
    """
    return ",".join(part_of(visible_gpus(present), part, parts)) or None


def _file(folder: Path, index: int) -> Path:
    return folder / "turns" / str(index)


def _is_locked(file: Path) -> bool:
    with open(file, "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
