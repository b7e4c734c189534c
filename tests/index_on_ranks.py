"""Under torchrun: what the ranks of a machine share of an index, and ranks of a machine that does not see rank 0's file.

Arguments: a folder of class folders. Each rank prints a line of JSON.
"""

import json
import os
import socket
import sys
import tempfile

import numpy as np

from pipeline.data import shared
from pipeline.data.scan import scan_classes
from pipeline.data.shared import share_on_machines
from pipeline.distributed import init_distributed


def inode_at(address):
    """Of the file that is mapped there; 0 if none is."""
    for line in open("/proc/self/maps"):  # noqa: SIM115 - for as long as the process lives
        span, *_, inode = line.split()[:5]
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return int(inode)
    return 0


def first_sees_nothing(mapped):
    firsts = iter([None])
    return lambda path, mark: next(firsts, mapped(path, mark))


with init_distributed("cpu") as world:

    def make():
        assert world.is_main
        return scan_classes(sys.argv[1])

    tempfile.tempdir = os.environ["INDEX_FOLDER"]
    for case in ("one machine", "two machines", "no room"):
        mapped = shared._map
        if case == "two machines" and not world.is_main:  # its own host, where rank 0's file is not
            shared._map = first_sees_nothing(mapped)
            socket.gethostname = lambda: "another"
            world = type(world)(world.rank, 0, world.size, 1, world.device, world.hosts, world.store)
        if case == "no room":
            tempfile.tempdir = "/nowhere"
        index = share_on_machines(world, make)
        shared._map = mapped
        base = index.labels
        while isinstance(base, np.ndarray) and base.base is not None:
            base = base.base
        while isinstance(base, memoryview):
            base = base.obj
        print(
            json.dumps(
                [
                    case,
                    world.rank,
                    len(index),
                    index.fingerprint,
                    list(index.names)[-1],
                    index.labels.sum().item(),
                    type(base).__name__,
                    inode_at(index.labels.__array_interface__["data"][0]),
                ]
            ),
            flush=True,
        )
