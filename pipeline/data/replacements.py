"""What becomes of a batch in which images are corrupt."""

import dataclasses
import sys
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import numpy as np

from pipeline.config import CorruptImages
from pipeline.data.decoding import CorruptImageError
from pipeline.data.plan import BatchPlan
from pipeline.errors import LocalUserError

T = TypeVar("T")


def collect(
    plan: BatchPlan, futures: list[Future[T]], corrupt_images: CorruptImages | None
) -> tuple[BatchPlan, list[T]]:
    """Wait for the (n) results of a plan's images, and replace corrupt ones.

    A corrupt image is replaced by the next one of the plan that decodes (after the last comes the first), with that one's
    crop and colours, and with weight 0. This depends on the plan and the files' bytes alone, so that a run that resumes
    skips the same images.

    Args:
        corrupt_images: None stops at them as "stop" does: they are not for training.

    Raises:
        CorruptImageError: an image is corrupt, and `corrupt_images` is not "skip".
        LocalUserError: all are corrupt; or a file could not be read, which may be temporary, so that it is not replaced.
    """
    results = []
    for future in futures:
        result = _result(future)
        results.append(result)
    sound = [not isinstance(result, CorruptImageError) for result in results]
    corrupt = [result for result in results if isinstance(result, CorruptImageError)]
    decoded = [result for result in results if not isinstance(result, CorruptImageError)]
    if not corrupt:
        return plan, decoded
    first = corrupt[0]
    if corrupt_images != "skip":
        # Not `first`: in a frame of its own traceback it would keep all of them alive, DALI's threads included.
        raise CorruptImageError(first.location, first.reason, training=corrupt_images == "stop")
    if not decoded:
        raise LocalUserError(
            f"no image of a rank's batch decodes, and none can replace {first.location} ({first.reason}): repair or remove it "
            "and start anew, or go on with other batches (optim.grad_accum_steps, --train.allow_world_size_change)"
        )
    for result, weight in zip(results, plan.weights, strict=True):
        if isinstance(result, CorruptImageError) and weight:
            with suppress(OSError):  # whoever read it has gone, which the run notices where it can save a checkpoint
                print(f"warning: skipping the image {result.location} ({result.reason})", file=sys.stderr, flush=True)
    n, position = len(results), np.cumsum(sound) - 1
    rows = np.array([next(j % n for j in range(i, i + n) if sound[j % n]) for i in range(n)])
    weights = np.where(sound, plan.weights, np.float32(0))
    return dataclasses.replace(plan.take(rows), weights=weights), [decoded[i] for i in position[rows]]


def _result(future: Future[T]) -> T | CorruptImageError:
    error = future.exception()  # not by raising it, which would tie it and the image's bytes to this frame in a cycle
    return error if isinstance(error, CorruptImageError) else future.result()
