"""Reads images' bytes by position, some batches ahead of their use."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline.data.arrays import read_arrays
from pipeline.data.formats import to_pnm
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan
from pipeline.errors import LocalUserError

READ_THREADS = 8  # reading waits for the disk, or for the network behind it
BATCHES_AHEAD = 2


class Reader:
    """Reads from loose files, archives and memory alike."""

    def __init__(self, index: DatasetIndex):
        self._index = index
        self._pool = ThreadPoolExecutor(READ_THREADS)
        self._pixels = read_arrays(index.arrays).pixels if index.arrays else None
        archive = index.packed and not index.arrays
        self._archive = open(index.root, "rb", buffering=0) if archive else None  # noqa: SIM115 - lives as long as this

    def read_ahead(
        self, plans: Iterable[BatchPlan], convert: Callable[[np.ndarray, str], np.ndarray] | None = None
    ) -> Iterator[tuple[BatchPlan, list[Future[np.ndarray]]]]:
        """Yield each plan with the bytes of its images, futures of (length) uint8.

        Args:
            convert: what the reading threads make of a file's bytes and its place; see `DatasetIndex.location`.
        """

        def read(i: int) -> np.ndarray:
            content = self.read(i)
            return convert(content, self._index.location(i)) if convert and not self._index.arrays else content

        ahead: deque = deque()
        for plan in plans:
            ahead.append((plan, [self._pool.submit(read, i) for i in plan.ids.tolist()]))
            if len(ahead) > BATCHES_AHEAD:
                yield ahead.popleft()
        yield from ahead

    def read(self, i: int) -> np.ndarray:
        """Return the bytes of image `i` of the index, (length) uint8; those of a PPM or PGM file if it is in memory.

        Raises:
            LocalUserError: the file cannot be read, or has changed since the scan.
        """
        index = self._index
        if self._pixels is not None:
            return to_pnm(self._pixels[index.offsets[i]])
        length = int(index.lengths[i])
        content = np.empty(length, np.uint8)
        try:
            if self._archive:
                got = os.preadv(self._archive.fileno(), [content], int(index.offsets[i]))
            else:
                with open(index.file(i), "rb", buffering=0) as stream:
                    got = stream.readinto(content)
        except OSError as error:
            raise LocalUserError(f"cannot read the image {index.location(i)}: {error.strerror}") from None
        if got != length:
            raise LocalUserError(
                f"the image {index.location(i)} ends after {got} of {length} bytes: it changed since the scan"
            )
        return content
