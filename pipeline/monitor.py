"""What a run shows: TensorBoard events, JSON lines, a progress bar or plain lines. Rank 0 only."""

import itertools
import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline import preemption
from pipeline.distributed import World
from pipeline.run_dir import RECORDS, io_as_user_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


OWN = ".run"  # the end of our event files' names


class Monitor:
    """Records scalars by optimiser step; on other ranks than 0 every method does nothing.

    Args:
        run_dir: TensorBoard events and ``metrics.jsonl`` go here.
        done_steps: optimiser steps that the run starts after.
        lengths: what `sync` returned at that time. Later records of an interrupted run are dropped.
    """

    def __init__(self, run_dir: Path, world: World, done_steps: int, lengths: dict[str, int]):
        self._active, self._run_dir = world.is_main, run_dir
        self._bar: tqdm | None = None
        if self._active:
            with io_as_user_error(self._run_dir):
                _cut_records(run_dir, lengths)
                self._lines = open(run_dir / RECORDS, "a")  # noqa: SIM115 - closed by close()
                # A TensorBoard that has read the dropped records must forget them.
                self._board = SummaryWriter(str(run_dir), purge_step=done_steps + 1, filename_suffix=OWN)

    def close(self) -> None:
        if self._active:
            with io_as_user_error(self._run_dir):
                self._lines.close()
                self._board.close()

    def scalars(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Record `values` (name -> number) after optimiser step `step`."""
        if self._active:
            finite = {
                name: value if math.isfinite(value) else None for name, value in values.items()
            }  # JSON has no NaN
            with io_as_user_error(self._run_dir):
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
                self._lines.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
                self._lines.flush()

    def sync(self) -> dict[str, int]:
        """Have the disk know all records; return the length of each of their files in bytes."""
        if not self._active:
            return {}
        lengths = {}
        with io_as_user_error(self._run_dir):
            self._board.flush()
            for file in _record_files(self._run_dir):
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
                    lengths[file.name] = os.fstat(stream.fileno()).st_size
        return lengths

    def text(self, name: str, text: str) -> None:
        if self._active:
            with io_as_user_error(self._run_dir):
                self._board.add_text(name, f"```\n{text}\n```", 0)

    def images(self, name: str, images: torch.Tensor, step: int) -> None:
        """Record (n, C, H, W) images, C 3 or 1, in [0, 1] as a grid."""
        if self._active:
            with io_as_user_error(self._run_dir):
                self._board.add_images(name, images.float().cpu(), step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """Record a picture that Matplotlib has drawn."""
        if self._active:
            with io_as_user_error(self._run_dir):
                self._board.add_figure(name, figure, step)

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._active:
            try:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
            except (
                BrokenPipeError
            ):  # Ctrl-C, or a terminal that closes, ends `| tee` too: there is a checkpoint to save
                if not preemption.received():
                    raise
                preemption.leave_closed_outputs()

    def show_progress(self, title: str, total: int, done: int) -> None:
        """Show a bar over `total` steps on a terminal, if none is shown yet."""
        if self._active and self._bar is None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=title, unit=" steps", leave=False)

    def hide_progress(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the GPU's allocator, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _record_files(run_dir: Path) -> list[Path]:
    return [*run_dir.glob(RECORDS), *run_dir.glob(f"events.out.tfevents.*{OWN}")]


def _cut_records(run_dir: Path, lengths: dict[str, int]) -> None:
    """Cut each file of records to the length in `lengths`, and put away our own that no checkpoint knows of.

    What other programs have written into the directory stays. Without any checkpoint nothing is deleted, but renamed.
    """
    for file in _record_files(run_dir):
        if file.name in lengths:
            continue
        if lengths:
            file.unlink()  # of an attempt that has come no further than the checkpoint, and is made again
        elif file.stat().st_size:  # of a start before the first checkpoint, or of a run that is gone
            earlier = file.name.replace("events.out.tfevents", "earlier")  # a name that TensorBoard does not read
            os.replace(file, next(p for i in itertools.count(1) if not (p := run_dir / f"{earlier}.{i}").exists()))
    for name, length in lengths.items():
        file = run_dir / name
        if file.exists() and file.stat().st_size > length:
            os.truncate(file, length)
