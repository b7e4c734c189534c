"""How far a command's long work is: a bar on a terminal; elsewhere, as in a job's log, a line now and then. On stderr."""

import sys
import time

from tqdm import tqdm

from pipeline.pace import duration

FIRST, EVERY = 10.0, 60.0  # seconds until the first line, and between two: quick work needs none


class Progress:
    """Counts parts of a piece of work.

    Args:
        what: the work, in words.
        total: number of its parts.
        unit: what they are, in the plural.
        shown: whether this process says anything; of several ranks one does.
    """

    def __init__(self, what: str, total: int, unit: str, shown: bool = True):
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        bar = shown and sys.stderr.isatty()
        self._bar = tqdm(desc=what, total=total, unit=f" {unit}", leave=False) if bar else None
        self._done, self._begin = 0, time.monotonic()
        self._due = self._begin + FIRST

    def advance(self) -> None:
        """One more part is done."""
        self._done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
        elif self._shown and now >= self._due and self._done < self._total:
            self._due = now + EVERY
            left = (now - self._begin) / self._done * (self._total - self._done)
            text = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, about {duration(left)} left"
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
