"""Times of several implementations on a machine that has other work too: interleaved, and the median over the rounds."""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def median_seconds(
    work: Mapping[Name, Callable[[], object]], rounds: int, after_piece: Callable[[], object] = lambda: None
) -> dict[Name, float]:
    """The seconds that each piece of work takes, the median over the rounds of `seconds_by_round`."""
    taken = seconds_by_round(work, rounds, after_piece)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def percent_apart(taken: Iterable[Sequence[float]]) -> float:
    """How much longer the slowest round took than the fastest, in percent: the median over pieces of work."""
    return 100 * statistics.median(max(seconds) / min(seconds) - 1 for seconds in taken)


def seconds_by_round(
    work: Mapping[Name, Callable[[], object]], rounds: int, after_piece: Callable[[], object] = lambda: None
) -> dict[Name, list[float]]:
    """The seconds that each piece of work takes in each round, after a first one that does not count.

    Each round does every piece once, so that what slows the machine down for a while slows all of them.
    `after_piece` is called (1 + rounds) times for each piece.
    """
    taken: dict[Name, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, once in work.items():
            start = time.perf_counter()
            once()
            if number:
                taken[name].append(time.perf_counter() - start)
            after_piece()
    return taken
