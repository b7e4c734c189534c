"""How fast a run goes, and how long it takes to the end of its epoch and to its own."""

from collections import deque

VALIDATION_SPEED = 3.0  # forward alone, in units of a training step's forward, backward and update
WINDOWS = 20  # stretches of steps whose pace counts


class Pace:
    """Measures this process's steps and validations.

    Args:
        images: that an epoch trains on, and that its end validates, over all sets of weights.
    """

    def __init__(self, steps_per_epoch: int, epochs: int, images: tuple[int, int]):
        self._steps_per_epoch, self._epochs, self._images = steps_per_epoch, epochs, images
        self._windows: deque[tuple[int, float]] = deque(maxlen=WINDOWS)
        self._first: tuple[int, float] | None = None  # in it kernels are chosen and caches filled
        self._validation: float | None = None

    def steps(self, number: int, seconds: float) -> None:
        """So many steps took so long, with the wait for their images and all that is written."""
        if self._first is None:
            self._first = (number, seconds)
        else:
            self._windows.append((number, seconds))

    def validation(self, seconds: float) -> None:
        self._validation = seconds

    def remaining(self, done_steps: int) -> tuple[float, float]:
        """Seconds to the end of the present epoch and of the run, validation included, after a step of that epoch.

        Args:
            done_steps: of the whole run, at least one.
        """
        windows = self._windows or [self._first or (1, 0.0)]
        a_step = sum(seconds for _, seconds in windows) / sum(number for number, _ in windows)
        training, validation = self._images
        estimated = a_step * self._steps_per_epoch * validation / training / VALIDATION_SPEED
        check = estimated if self._validation is None else self._validation
        epoch = (done_steps - 1) // self._steps_per_epoch
        in_epoch = ((epoch + 1) * self._steps_per_epoch - done_steps) * a_step + check
        return in_epoch, in_epoch + (self._epochs - epoch - 1) * (self._steps_per_epoch * a_step + check)


def duration(seconds: float) -> str:
    """Days and hours, hours and minutes, minutes, or seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 1440:
        return f"{minutes // 1440} d {minutes % 1440 // 60} h"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
