"""Batches that a thread prepares while the device computes, on a CUDA stream of their own.

The thread and its end are tested; the CUDA part has not been run on a GPU yet.
"""

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

DEPTH = 2  # batches that are ready before one is asked for; each is that much memory of the device


def prepare_ahead(items: Iterator[T], depth: int = DEPTH) -> Iterator[T]:
    """Yield the same items, made in a thread that keeps up to `depth` of them ready.

    What making one raises is raised in its place. When the caller leaves early, the thread closes `items` and ends.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    def put(item: T | None, error: BaseException | None = None) -> bool:
        while not left.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as error:  # for the thread that asks
            put(None, error)
        else:
            put(None)
        finally:
            if close := getattr(items, "close", None):
                close()

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        left.set()
        thread.join()


@functools.cache
def stream_for_batches(device: torch.device) -> torch.cuda.Stream:
    """The stream of all loaders of a device: torch's and DALI's pools keep what is freed for the stream that it was freed on,
    so that each new stream would take a batch's memory anew."""
    return torch.cuda.Stream(device)


def on_own_stream(items: Iterator[T], tensors_of: Callable[[T], list[Tensor]], device: torch.device) -> Iterator[T]:
    """Yield the same items, which a thread has queued on a CUDA stream of their own; no host waits for the device.

    Args:
        tensors_of: the tensors of an item, for which the caller's stream is to wait.
    """
    stream = stream_for_batches(device)

    def queued() -> Iterator[tuple[T, torch.cuda.Event]]:
        while True:
            # Both are of a thread; and not over a yield, which would leave them to whatever this thread does next.
            with torch.cuda.device(device), torch.cuda.stream(stream):
                item = next(items, None)
                event = torch.cuda.Event()
                event.record(stream)
            if item is None:
                return
            yield item, event

    for item, event in prepare_ahead(queued()):
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for tensor in tensors_of(item):
            tensor.record_stream(current)  # or its memory would be given to a later batch too soon
        yield item
