"""What a submission would be, in words: for the dry run, and before a real one."""

from datetime import datetime, timedelta
from pathlib import Path

from launch.cluster import Cluster
from launch.estimate import estimate
from launch.resumption import epochs_done
from pipeline.batches import Batches, microbatches_of
from pipeline.cautions import cautions
from pipeline.config import Config
from pipeline.config_file import changed_fields
from pipeline.data.dataset import images_text, open_datasets
from pipeline.data.plan import together
from pipeline.errors import UserError
from pipeline.history import batch_split
from pipeline.pace import duration
from pipeline.parsing import text_to_read
from pipeline.words import counted


class Turns:
    """When runs that are submitted together begin, so many of them at a time."""

    def __init__(self, at_once: int):
        self._free = [0.0] * at_once

    def take(self, seconds: float) -> float:
        """The seconds from now on until the next run begins, which takes so long."""
        begins = min(self._free)
        self._free[self._free.index(begins)] = begins + seconds
        return begins


def describe(
    config: Config, cluster: Cluster, images_per_second: float | None, turns: Turns, writes: bool = True
) -> str:
    """A run in a few lines: what differs from the defaults, batch arithmetic, and the time it takes if a rank's speed is known.

    Args:
        turns: of the runs that are submitted with it.
        writes: what is found about the images is kept; a dry run leaves nothing behind.

    Raises:
        UserError: the data are not there, the batch cannot be split over the ranks, or the run that is there may not resume so.
    """
    optim, ranks = config.optim, cluster.ranks
    split_text = f"{counted(cluster.nodes, 'node')} x {batch_split(cluster.ranks_per_node, optim.grad_accum_steps)}"
    try:
        parts = microbatches_of(config, ranks, split_text)
    except UserError as error:
        raise UserError(f"{config.run_dir}: {error}") from None
    cache = Path(config.run_dir) / "index" if writes else None
    train, val = open_datasets(config.data, cache, progress=True, download=writes)
    done = epochs_done(config, cluster, train, val)
    changed = [f"{key} {text_to_read(value)}" for key, (value, _) in changed_fields(config).items()]
    lines = [
        f"{config.run_dir}: {config.model.name}, {images_text(train, val, config.data)}, "
        f"{counted(len(train.classes), 'class', 'classes')}",
        f"{Batches(len(train), optim.batch_size, parts, together(config.data)).text(split_text)}, "
        f"{counted(optim.epochs, 'epoch')}",
        f"other than the defaults: {', '.join(changed) or 'nothing'}",
    ]
    if done:
        lines.append(f"resumes after {done:.4g} of {counted(optim.epochs, 'epoch')}")
    lines += [f"warning: {line}" for line in cautions(config, train, val, ranks)]
    if images_per_second:
        validated = len(val) * (2 if config.train.ema_decay else 1)  # by the raw weights and by their average
        sizes, speed = (len(train), validated), images_per_second * ranks
        time_ = estimate(sizes, max(optim.epochs - done, 0.0), speed, cluster.seconds, cluster.warning_seconds)
        waits = turns.take(time_.run)
        end = datetime.now() + timedelta(seconds=waits + time_.run)
        turn = f"begins in {duration(waits)} at the earliest, " if waits else ""
        fit = f"{time_.epochs_per_attempt:.1f} epochs an attempt of {cluster.time}, " if time_.attempts > 1 else ""
        lines.append(
            f"at {counted(round(speed), 'image')}/s: {duration(time_.epoch)} an epoch, "
            f"{fit}{counted(time_.attempts, 'attempt')}, "
            f"{duration(time_.run)} in all, {turn}ends not before {end:%Y-%m-%d %H:%M}"
        )
    return "\n".join(lines)


def processes(configs: list[Config], cluster: Cluster) -> str:
    """What a submission starts on this machine, in words."""
    ranks = f"{counted(cluster.ranks, 'process', 'processes')} of this machine for each run"
    at_once = min(cluster.parallel or 1, len(configs))
    turns = "" if len(configs) == 1 else f"; {at_once} of {len(configs)} runs at a time (--parallel)"
    turns += ", each on its share of the cores and GPUs" if at_once > 1 else ""
    return (
        f"{ranks}{turns}; {cluster.time} an attempt; a copy of the code, and a log of each rank, in "
        f"{Path(configs[0].run_dir).parent / 'jobs' / 'TIME'}"
    )
