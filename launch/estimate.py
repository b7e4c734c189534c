"""How long a run takes, and how many attempts its job needs: arithmetic for the dry run."""

import math
from dataclasses import dataclass

from pipeline.pace import VALIDATION_SPEED


@dataclass(frozen=True)
class Estimate:
    """Seconds of an epoch and of the run, and how they fall into attempts of the job."""

    epoch: float
    run: float
    epochs_per_attempt: float
    attempts: int


def estimate(
    images: tuple[int, int], epochs: float, images_per_second: float, limit: float, warning: float
) -> Estimate:
    """Estimate a run from the speed of all ranks together.

    Args:
        images: that an epoch trains on, and that its end validates, over all sets of weights.
        epochs: that are left to train; 0 where at most a validation is left, which is an attempt too.
        limit: seconds of one attempt, of which the last `warning` are not trained in.
    """
    epoch = (images[0] + images[1] / VALIDATION_SPEED) / images_per_second
    usable = max(limit - warning, 1)
    attempts = max(1, math.ceil(epochs * epoch / usable))
    return Estimate(epoch, epochs * epoch, min(usable / epoch, epochs), attempts)
