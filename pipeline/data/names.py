"""Many names in little memory: their bytes one after the other, which processes can share, instead of a million objects."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

AT_ONCE = 1 << 16  # names that are decoded at once


@dataclass(frozen=True, eq=False)
class Names(Sequence[str]):
    """A sequence of names as a tuple is one, but that its parts are no tuples.

    Attributes:
        content: (bytes) uint8, the names in the encoding of file names.
        ends: (N) int64, where each name ends in it.
    """

    content: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        encoded = [os.fsencode(name) for name in names]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(lengths))

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """All names of some parts, in order."""
        shifts = np.cumsum([0, *(len(part.content) for part in parts)])
        ends = [part.ends + shift for part, shift in zip(parts, shifts, strict=False)]
        contents = [part.content for part in parts]
        return cls(np.concatenate([*contents, np.zeros(0, np.uint8)]), np.concatenate([*ends, np.zeros(0, np.int64)]))

    def take(self, rows: np.ndarray) -> "Names":
        """The names in these rows, (n) int64."""
        return Names.of(self[row] for row in rows.tolist())

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> "Names": ...
    def __getitem__(self, i: int | slice) -> "str | Names":
        if isinstance(i, slice):
            start, stop, step = i.indices(len(self))
            if step != 1:
                return self.take(np.arange(len(self))[i])
            begin, end = (int(self.ends[k - 1]) if k else 0 for k in (start, max(start, stop)))
            return Names(self.content[begin:end], self.ends[start:stop] - begin)
        end = int(self.ends[i])  # which knows negative numbers, and raises beyond the last
        i = i % len(self)
        return os.fsdecode(self.content[int(self.ends[i - 1]) if i else 0 : end].tobytes())

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), AT_ONCE):
            ends = self.ends[first : first + AT_ONCE].tolist()
            content, begin = self.content[start : ends[-1]].tobytes(), start
            for end in ends:
                yield os.fsdecode(content[start - begin : end - begin])
                start = end

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, Names):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.content, other.content)
        if isinstance(other, tuple | list):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"Names of {len(self)}: {', '.join(self[:3])}{', ...' if len(self) > 3 else ''}"
