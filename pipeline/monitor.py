"""What a run shows: TensorBoard events, JSON lines, a progress bar or plain lines. Rank 0 only."""

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.distributed import World


class Monitor:
    """Records scalars by optimiser step; on other ranks than 0 every method does nothing.

    Args:
        run_dir: TensorBoard events and ``metrics.jsonl`` go here.
        done_steps: optimiser steps that the run starts after; later records of an interrupted run are dropped.
    """

    def __init__(self, run_dir: Path, world: World, done_steps: int):
        self._active = world.is_main
        self._bar: tqdm | None = None
        if self._active:
            _drop_lines_after(run_dir / "metrics.jsonl", done_steps)
            self._lines = open(run_dir / "metrics.jsonl", "a")  # noqa: SIM115 - closed by close()
            self._board = SummaryWriter(str(run_dir), purge_step=done_steps + 1)

    def close(self) -> None:
        if self._active:
            self._lines.close()
            self._board.close()

    def scalars(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Record `values` (name -> number) after optimiser step `step`."""
        if self._active:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            finite = {
                name: value if math.isfinite(value) else None for name, value in values.items()
            }  # JSON has no NaN
            self._lines.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
            self._lines.flush()

    def text(self, name: str, text: str) -> None:
        if self._active:
            self._board.add_text(name, f"```\n{text}\n```", 0)

    def images(self, name: str, images: torch.Tensor, step: int) -> None:
        """Record (n, 3, H, W) images in [0, 1] as a grid."""
        if self._active:
            self._board.add_images(name, images.float().cpu(), step)

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def progress(self, title: str, total: int, done: int) -> Iterator[None]:
        """Show a bar over `total` steps on a terminal."""
        if self._active and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=title, unit=" steps", leave=False)
        try:
            yield
        finally:
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


def _drop_lines_after(file: Path, step: int) -> None:
    """Remove the records of steps that will be done again (and a last line cut short by a crash)."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, file)
