"""Reads images' bytes by position, some batches ahead of their use."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline.data.index import DatasetIndex
from pipeline.data.plan import BatchPlan
from pipeline.data.source import Stream
from pipeline.errors import LocalUserError

READ_THREADS = 8  # reading waits for the disk, or for the network behind it
BATCHES_AHEAD = 2


class Reader:
    """Prefetches from an index, whatever its source is."""

    def __init__(self, index: DatasetIndex):
        self._index = index
        self._pool = ThreadPoolExecutor(READ_THREADS)

    def read_ahead(
        self, plans: Iterable[BatchPlan], convert: Callable[[np.ndarray, str], np.ndarray] | None = None
    ) -> Iterator[tuple[BatchPlan, list[Future[np.ndarray]]]]:
        """Yield each plan with the bytes of its images, futures of (length) uint8.

        Args:
            convert: what the reading threads make of a file's bytes and its location; see `DatasetIndex.location`.
        """

        def read(i: int) -> np.ndarray:
            content = self.read(i)
            return convert(content, self._index.location(i)) if convert else content

        ahead: deque = deque()
        for plan in plans:
            ahead.append((plan, [self._pool.submit(read, i) for i in plan.ids.tolist()]))
            if len(ahead) > BATCHES_AHEAD:
                yield ahead.popleft()
        yield from ahead

    def read(self, i: int) -> np.ndarray:
        """Return the bytes of image `i` of the index, (length) uint8.

        Raises:
            LocalUserError: the file cannot be read, or has changed since the scan.
        """
        index, length = self._index, int(self._index.lengths[i])
        try:
            with index.open(i) as stream:
                # One byte more: the beginning of a file that has grown would look damaged.
                content = read_all(stream, length + 1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise LocalUserError(
                f"cannot read the image {index.location(i)}: {reason}: check that it is there and may be read"
            ) from None
        except MemoryError:
            raise LocalUserError(
                f"not enough memory to read the image {index.location(i)} ({length:,} bytes): raise the limit on memory "
                "(ulimit -v, or the job's), or lower optim.batch_size"
            ) from None
        if (got := len(content)) != length:
            how = f"ends after {got} of {length} bytes" if got < length else f"goes on after {length} bytes"
            raise LocalUserError(
                f"the image {index.location(i)} {how}: it changed since the scan: restore it, or start again to scan it anew"
            )
        return content


def read_all(stream: Stream, length: int) -> np.ndarray:
    """Read up to `length` bytes, (n) uint8, where a read may give fewer than it was asked for; fewer only at the end."""
    content = np.empty(length, np.uint8)
    got = 0
    while got < length:
        more = stream.readinto(content.data[got:])
        if not more:
            break
        got += more
    return content[:got]
