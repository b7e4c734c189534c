"""What the user of a run should know before hours of training, as its configuration and its images tell it."""

import math

from pipeline.config import Config, OptimConfig
from pipeline.data.checks import warnings_about
from pipeline.data.index import DatasetIndex
from pipeline.data.splits import with_sets_found
from pipeline.parsing import value_text
from pipeline.words import counted

RANKS_OF_A_LARGE_RUN = 8  # from so many on, few images a rank are mostly waiting for each other
SMALL_STATISTIC = 16  # images of a batch-norm statistic below which it is poor
LARGE_STATISTIC = 32  # what Goyal et al. 2017 gave each GPU


def cautions(config: Config, train: DatasetIndex, val: DatasetIndex, ranks: int) -> list[str]:
    """A line for each such thing.

    Args:
        train, val: its images, which have been opened before.
    """
    optim = config.optim
    lines = warnings_about(train, val, with_sets_found(config).data) + about_schedule(optim)
    if split := poor_split(optim.batch_size, ranks, optim.grad_accum_steps):
        lines.append(split)
    if max(config.data.mean) > 1:
        lines.append(
            f"data.mean {value_text(config.data.mean)} looks like that of pixels from 0 to 255, and here they are from 0 to 1: "
            "divide it by 255, and data.std too"
        )
    if optim.class_weights == "balanced" and config.data.sampling == "balanced":
        lines.append(
            "optim.class_weights balanced and data.sampling balanced correct for rare classes twice, so that rare ones count "
            "more than frequent ones: leave one of them out"
        )
    return lines


def about_schedule(optim: OptimConfig) -> list[str]:
    """What looks wrong in when the learning rate rises and drops, a line each."""
    lines = []
    late = [epoch for epoch in optim.milestones if epoch >= optim.epochs]
    if optim.schedule == "step" and late:
        lines.append(
            f"the learning rate never drops after epoch {', '.join(map(str, late))}: the run has optim.epochs {optim.epochs}; "
            "set optim.milestones"
        )
    first_drop = min(optim.milestones, default=math.inf) if optim.schedule == "step" else math.inf
    if optim.warmup_epochs >= optim.epochs:
        lines.append(
            f"the learning rate rises to the end of the run and never falls: of its {counted(optim.epochs, 'epoch')} "
            f"{optim.warmup_epochs:g} warm up; set optim.warmup_epochs"
        )
    elif optim.warmup_epochs > first_drop:
        lines.append(
            f"the learning rate still warms up, over {optim.warmup_epochs:g} epochs, when it drops after epoch {first_drop}: "
            "set optim.warmup_epochs or optim.milestones"
        )
    return lines


def poor_split(batch_size: int, ranks: int, grad_accum_steps: int) -> str:
    """What a batch that is cut into many small parts means, and what to do, in one line; empty if it is not."""
    each = batch_size // (ranks * grad_accum_steps)
    if ranks < RANKS_OF_A_LARGE_RUN or each >= SMALL_STATISTIC:
        return ""
    steps = f" x {counted(grad_accum_steps, 'accumulation step')}" if grad_accum_steps > 1 else ""
    return (
        f"batch {batch_size} on {ranks} ranks{steps} leaves each rank {counted(each, 'image')} at once, all that a batch norm "
        f"sees (the paper: 64), and the ranks mostly wait for each other: --optim.batch_size {ranks * LARGE_STATISTIC} "
        f"--optim.large_batch gives each {LARGE_STATISTIC} images, with the learning rate of Goyal et al. 2017 and a warm-up "
        "(another recipe than the paper's)"
    )
