"""Whose turn it is among runs of this machine that were submitted together: a file for each, locked until the run has ended.

The lock of a controller that is killed goes with it.
"""

import fcntl
from pathlib import Path
from typing import IO


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


def _file(folder: Path, index: int) -> Path:
    return folder / "turns" / str(index)


def _is_locked(file: Path) -> bool:
    with open(file, "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
