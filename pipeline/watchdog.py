"""Ends a run whose ranks make no progress, and says which of them the others wait for.

Every rank has a thread that keeps what the rank is doing in the store that all share. A rank that is stuck for too
long reads what the others do: one whose thread is silent has been stopped or lost its machine; one that has come less
far than the others is what they wait for.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from pipeline.distributed import PATIENCE, World
from pipeline.exits import EXIT_RESUME, record_for_torchrun

_STORE_PATIENCE = timedelta(seconds=10)
_SILENT_TICKS = 3


@dataclass(frozen=True)
class Status:
    """What a rank was doing at a tick of its thread's clock; `beats` counts what it has begun."""

    ticks: int
    beats: int
    activity: str
    host: str
    pid: int


class Watchdog:
    """Ends this process with exit code 75 after `patience` seconds without a `beat`. Watches from the first beat on.

    What compiles may take as long as other ranks wait for each other.

    The time for which the process itself was stopped (Ctrl-Z) does not count.
    """

    def __init__(self, world: World, patience: float):
        self._rank, self._ranks, self._patience = world.rank, world.size, patience
        self._tick = min(5.0, patience / 10)  # seconds
        self._store: dist.Store | None = None
        if world.store is not None:
            # A connection of its own: the main thread may be waiting in the other.
            self._store = dist.PrefixStore("watchdog", world.store.clone())
            self._store.set_timeout(_STORE_PATIENCE)
        self._ticks = self._beats = self._idle_ticks = 0
        self._limit = patience  # of the present activity
        self._activity = "starting"
        self._watched_thread = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def beat(self, activity: str, compiles: bool = False) -> None:
        """Say what this rank begins to do now. All ranks must call this at the same places."""
        self._activity = activity
        self._limit = max(self._patience, PATIENCE.total_seconds()) if compiles else self._patience
        self._beats += 1
        self._idle_ticks = 0

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            self._ticks += 1
            self._idle_ticks += self._beats > 0
            try:
                self._publish()
            except dist.DistError:  # its keeper is gone or stuck: what the main thread waits for will not come either
                continue
            finally:
                if self._idle_ticks * self._tick >= self._limit:
                    self._end()

    def _publish(self) -> None:
        if self._store is not None:
            status = Status(self._ticks, self._beats, self._activity, socket.gethostname(), os.getpid())
            self._store.set(str(self._rank), json.dumps(asdict(status)))

    def _end(self) -> None:
        idle = f"rank {self._rank}: no progress for {self._limit:.0f} s in '{self._activity}'"
        error = f"{idle}; {self._diagnose_stall()}"
        record_for_torchrun(error, EXIT_RESUME)
        try:
            with suppress(OSError):  # whoever read it has gone, or the disk is full
                print(f"interrupted: {error}", file=sys.stderr, flush=True)
                traceback.print_stack(sys._current_frames()[self._watched_thread])
        finally:
            os._exit(EXIT_RESUME)  # the main thread may never return from where it waits

    def _diagnose_stall(self) -> str:
        """Which rank the others wait for, as far as the store tells."""
        try:
            before = self._read()
            time.sleep(_SILENT_TICKS * self._tick)
            self._publish()
            after = self._read()
        except dist.DistError:
            return "the store of the ranks does not answer: the machine or the process of rank 0 (or torchrun) is gone"
        return diagnose_stall(before, after, self._rank)

    def _read(self) -> list[Status]:
        if self._store is None:
            return []
        found = self._store.multi_get([str(rank) for rank in range(self._ranks)])
        return [Status(**json.loads(text)) for text in found]


def diagnose_stall(before: list[Status], after: list[Status], reader: int) -> str:
    """Name the rank that the others wait for, from all ranks' statuses at two moments as rank `reader` saw them."""
    lines = []
    least, most = (f(status.beats for status in after) for f in (min, max)) if after else (0, 0)
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        where = f"rank {rank} (process {new.pid} on {new.host}"
        if old.ticks == new.ticks and rank != reader:
            lines.append(
                f"{where}) does not respond, last seen in '{new.activity}': stopped, dead, or its machine is gone"
            )
        elif new.beats == least < most:
            lines.append(f"{where}) is behind, in '{new.activity}'")
    return "; ".join(lines) or "no rank is behind another"
