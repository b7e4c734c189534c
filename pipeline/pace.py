"""How fast a run goes, and how long it takes to the end of its epoch and to its own."""

from collections import deque
from collections.abc import Callable

VALIDATION_SPEED = 3.0  # forward alone, in units of a training step's forward, backward and update
WINDOWS = 5  # log lines whose steps tell the present pace: after a change of load the estimate is right that soon


class Pace:
    """Measures this process's steps and ends of epochs.

    Args:
        images: that an epoch trains on, and that its end validates, over all sets of weights.
        draws: whether pictures are drawn at the end of an epoch, counted from 0; such ends are measured by themselves.
        cost: of an image in an epoch's training, in units of that of a validation image's size (by its pixels).
    """

    def __init__(
        self,
        steps_per_epoch: int,
        epochs: int,
        images: tuple[int, int],
        draws: Callable[[int], bool] = lambda epoch: False,
        cost: Callable[[int], float] = lambda epoch: 1.0,
    ):
        self._steps_per_epoch, self._epochs, self._images, self._draws = steps_per_epoch, epochs, images, draws
        self._cost = cost
        # What was done, in steps of cost 1, and seconds.
        self._windows: deque[tuple[float, float]] = deque(maxlen=WINDOWS)
        self._first: tuple[float, float] | None = None  # in it kernels are chosen and caches filled
        self._ends: dict[bool, float] = {}  # seconds of the last end of an epoch without pictures, and with them

    def steps(self, epoch: int, number: int, seconds: float) -> None:
        """So many steps of an epoch took so long, with the wait for their images and all that is written."""
        done = (number * self._cost(epoch), seconds)
        if self._first is None:
            self._first = done
        else:
            self._windows.append(done)

    def epoch_end(self, epoch: int, seconds: float) -> None:
        """So long it took from this epoch's last step to the next one's first: validation, pictures and saving."""
        self._ends[self._draws(epoch)] = seconds

    def remaining(self, done_steps: int) -> tuple[float, float]:
        """Seconds to the end of the present epoch and of the run, ends of epochs included, after a step of that epoch.

        Until an end is measured it is estimated by the images that are validated.

        Args:
            done_steps: of the whole run, at least one.
        """
        epoch, step = (done_steps - 1) // self._steps_per_epoch, self._a_step()  # the epoch of a step that is done
        in_epoch = ((epoch + 1) * self._steps_per_epoch - done_steps) * step * self._cost(epoch)
        later = self._steps_per_epoch * step * sum(map(self._cost, range(epoch + 1, self._epochs)))
        ends = [self._end(other) for other in range(epoch, self._epochs)]
        return in_epoch + ends[0], in_epoch + later + sum(ends)

    def text(self, done_steps: int) -> str:
        """The same in words, and that no end of an epoch is measured as long as that is so: what it takes to begin a
        validation, to draw and to save, an estimate by images does not know."""
        in_epoch, in_run = map(duration, self.remaining(done_steps))
        left = f"{in_epoch} to the epoch's end, {in_run} to the run's"
        return left if self._ends else f"{left} (validation not measured yet)"

    def _a_step(self) -> float:
        """Seconds, of cost 1."""
        windows = self._windows or [self._first or (1, 0.0)]
        return sum(seconds for _, seconds in windows) / sum(number for number, _ in windows)

    def _end(self, epoch: int) -> float:
        """Of an epoch: as measured, else as the other kind was, else estimated."""
        training, validation = self._images
        estimated = self._a_step() * self._steps_per_epoch * validation / training / VALIDATION_SPEED
        drawn = self._draws(epoch)
        return self._ends.get(drawn, self._ends.get(not drawn, estimated))


def duration(seconds: float) -> str:
    """Days and hours, hours and minutes, minutes, or seconds, rounded to the last unit shown."""
    whole, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if whole < 60:
        return f"{whole} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 1440 else f"{hours // 24} d {hours % 24} h"
