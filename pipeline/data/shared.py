"""One copy of what rank 0 has read for all ranks of a machine: its arrays lie in a file that each rank maps into its memory.

The file is in the system's temporary folder, and has no name any more once every rank of the machine has it: nothing is left
behind. Where there is no room for one, each rank has a copy of its own.
"""

import mmap
import os
import pickle
import secrets
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.machine import return_freed_memory

if TYPE_CHECKING:  # which needs torch
    from pipeline.distributed import World

ALIGNMENT = 64  # bytes
MARK = 16  # random bytes at the beginning of the file

T = TypeVar("T")


@dataclass(frozen=True)
class _Packed:
    """An object whose arrays lie outside.

    Attributes:
        head: the pickle but for the arrays' bytes.
        places: where those lie in the file, as (first, length).
        path: of the file, None if there is no room for one.
        mark: what the file begins with.
    """

    head: bytes
    places: tuple[tuple[int, int], ...]
    path: str | None
    mark: bytes

    def unpack(self, content: memoryview) -> Any:
        return pickle.loads(self.head, buffers=[content[first : first + length] for first, length in self.places])


def share_on_machines(world: "World", make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return what it gives on every rank, with arrays that nobody may write to.

    Every rank must call this.

    Raises:
        UserError: the one of `make`.
    """
    if world.size == 1:
        alone = make()
        return_freed_memory()
        return alone
    kept: list[bytes] = []  # on rank 0, the content of the file

    def pack() -> _Packed:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(make(), protocol=5, buffer_callback=buffers.append)
        mark, places, content = secrets.token_bytes(MARK), [], bytearray()
        content += mark
        for buffer in buffers:
            content += bytes(-len(content) % ALIGNMENT)
            raw = buffer.raw()
            places.append((len(content), raw.nbytes))
            content += raw
        kept.append(bytes(content))
        return _Packed(head, tuple(places), _write(kept[0]), mark)

    packed = world.broadcast_from_rank0(pack)
    written = [packed.path] if world.is_main else []
    seen = _map(packed.path, packed.mark)
    if not all(world.gather(seen is not None)):  # ranks on other machines
        content = world.broadcast_from_rank0(lambda: kept[0])
        own = _write(content) if seen is None and world.local_rank == 0 else None
        written.append(own)
        host = socket.gethostname()
        beside = [path for name, path in world.gather((host, own)) if name == host and path]
        if seen is None:
            seen = _map(beside[0] if beside else None, packed.mark) or memoryview(content)
    world.gather(None)  # each has it now
    for path in written:
        if path:
            with suppress(OSError):
                os.unlink(path)
    kept.clear()
    return_freed_memory()
    return packed.unpack(seen)


def _write(content: bytes) -> str | None:
    """The path of a new file with this content, None where it cannot be written."""
    path = None
    try:
        number, path = tempfile.mkstemp(prefix="densenet-index-")
        with open(number, "wb") as file:
            file.write(content)
        return path
    except OSError:
        if path:
            with suppress(OSError):
                os.unlink(path)
        return None


def _map(path: str | None, mark: bytes) -> memoryview | None:
    """The content of a file without reading it, None where this machine has no such file."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        return None
    return content if content[:MARK] == mark else None
