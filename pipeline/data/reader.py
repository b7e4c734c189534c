"""Reads images' bytes by position, some batches ahead of their use."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan
from pipeline.errors import LocalUserError

READ_THREADS = 8  # reading waits for the disk, or for the network behind it
BATCHES_AHEAD = 2


class Reader:
    """Reads from loose files and archives alike."""

    def __init__(self, index: DatasetIndex):
        self._index = index
        self._pool = ThreadPoolExecutor(READ_THREADS)
        self._archive = open(index.root, "rb", buffering=0) if index.packed else None  # noqa: SIM115 - lives as long as this

    def read_ahead(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, list[np.ndarray]]]:
        """Yield each plan with the bytes of its images, each (length) uint8.

        Raises:
            LocalUserError: a file cannot be read.
        """
        ahead: deque = deque()
        for plan in plans:
            ahead.append((plan, [self._pool.submit(self.read, i) for i in plan.ids.tolist()]))
            if len(ahead) > BATCHES_AHEAD:
                plan, futures = ahead.popleft()
                yield plan, [future.result() for future in futures]
        for plan, futures in ahead:
            yield plan, [future.result() for future in futures]

    def read(self, i: int) -> np.ndarray:
        """Return the bytes of image `i` of the index, (length) uint8."""
        index = self._index
        length = int(index.lengths[i])
        content = np.empty(length, np.uint8)
        try:
            if self._archive:
                got = os.preadv(self._archive.fileno(), [content], int(index.offsets[i]))
            else:
                with open(index.file(i), "rb", buffering=0) as stream:
                    got = stream.readinto(content)
        except OSError as error:
            raise LocalUserError(f"cannot read the image {index.place(i)}: {error.strerror}") from None
        if got != length:
            raise LocalUserError(
                f"the image {index.place(i)} ends after {got} of {length} bytes: it changed since the scan"
            )
        return content
