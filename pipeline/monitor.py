"""What a run shows: TensorBoard events, JSON lines, a progress bar or plain lines. Rank 0 only.

TensorBoard shows a run as several: NAME by optimiser step, NAME/train and NAME/val by epoch, and NAME/val_raw or NAME/val_ema
of the weights that the best epoch is not chosen by. All but the first have the same tags, so that they stand in one chart. The
alphabet is the order of interest: epoch, images, labels, train, usage.
"""

import io
import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from pipeline import machine
from pipeline.distributed import World
from pipeline.preemption import PreemptionHandler, leave_closed_outputs
from pipeline.run_dir import RECORDS, io_as_user_error, now

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard.writer import FileWriter


OWN = ".run"  # the end of our event files' names
BY_STEP = ""  # the run directory itself; the other folders are in it, and TensorBoard takes each for a run
# The beginning of a record's name, the folder of its events, and what their tag begins with instead.
BOARDS = (
    ("epoch/train_", "train", "epoch/"),
    ("val/", "val", "epoch/"),
    ("val_raw/", "val_raw", "epoch/"),
    ("val_ema/", "val_ema", "epoch/"),
    ("epoch/", BY_STEP, "usage/"),  # images that were left out
    ("speed/", BY_STEP, "usage/"),
    ("memory/", BY_STEP, "usage/"),
    ("", BY_STEP, ""),
)
FOLDERS = tuple(dict.fromkeys(folder for _, folder, _ in BOARDS))


class Monitor:
    """Records by optimiser step and by epoch; on other ranks than 0 every method does nothing.

    Args:
        run_dir: TensorBoard events and ``metrics.jsonl`` go here.
        done_steps, done_epochs: optimiser steps and whole epochs that the run starts after.
        lengths: what `sync` returned at that time. Later records of an interrupted run are dropped.
        preemption: asked for a stop when nobody reads what is printed any more.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        done_steps: int,
        done_epochs: int,
        lengths: dict[str, int],
        preemption: PreemptionHandler,
    ):
        self._active, self._run_dir, self._preemption = world.is_main, run_dir, preemption
        self._bar: tqdm | None = None
        if self._active:
            with io_as_user_error(self._run_dir):
                _cut_records(run_dir, lengths)
                self._lines = open(run_dir / RECORDS, "a")  # noqa: SIM115 - closed by close()
                self._done, self._boards = (done_steps, done_epochs), dict[str, SummaryWriter]()
                for folder in FOLDERS:  # a TensorBoard that has read the dropped records must forget them
                    if (run_dir / folder).exists():
                        self._board(folder)

    def close(self) -> None:
        if self._active:
            with io_as_user_error(self._run_dir):
                self._lines.close()
                for board in self._boards.values():
                    board.close()

    def _board(self, folder: str) -> SummaryWriter:
        """The writer of a folder's events, made when there is something to say."""
        if folder not in self._boards:
            done = self._done[folder != BY_STEP]
            self._boards[folder] = SummaryWriter(str(self._run_dir / folder), purge_step=done + 1, filename_suffix=OWN)
        return self._boards[folder]

    def scalars(self, step: int, epochs: float, values: dict[str, float]) -> None:
        """Record `values` (name -> number) after so many optimiser steps, which are so many epochs.

        Where TensorBoard has them, and whether by step or by epoch, see `BOARDS`.
        """
        if self._active:
            finite = {
                name: value if math.isfinite(value) else None for name, value in values.items()
            }  # JSON has no NaN
            with io_as_user_error(self._run_dir):
                for name, value in values.items():
                    folder, tag = _board_of(name)
                    self._board(folder).add_scalar(_in_utf8(tag), value, step if folder == BY_STEP else round(epochs))
                self._lines.write(json.dumps({"step": step, "epochs": epochs, **finite}) + "\n")
                self._lines.flush()

    def sync(self) -> dict[str, int]:
        """Have the disk know all records; return the length in bytes of each of their files, by its path in the run."""
        if not self._active:
            return {}
        lengths = {}
        with io_as_user_error(self._run_dir):
            for board in self._boards.values():
                board.flush()
            for file in _record_files(self._run_dir):
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
                    lengths[_name(file, self._run_dir)] = os.fstat(stream.fileno()).st_size
        return lengths

    def text(self, name: str, text: str, step: int) -> None:
        """Record Markdown."""
        if self._active:
            with io_as_user_error(self._run_dir):
                self._board(BY_STEP).add_text(name, _in_utf8(text), step)

    def hyperparameters(self, values: dict[str, bool | float | str]) -> None:
        """Record what TensorBoard's HParams compares runs by. Of several calls the first one counts there."""
        _, start, _ = hparams({k: _in_utf8(v) if isinstance(v, str) else v for k, v in values.items()}, {})
        self._add(start)

    def completed(self) -> None:
        """Record that the run has come to its end."""
        _, _, end = hparams({}, {})
        self._add(end)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Record (height, width, 3) uint8 as a JPEG: PNG makes photographs many times as large."""
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=90)
        height, width, _ = pixels.shape
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
        self._add(Summary(value=[Summary.Value(tag=_in_utf8(name), image=picture)]), step)

    def _add(self, summary: Summary, step: int | None = None) -> None:
        """What a `SummaryWriter` has no method for."""
        if self._active:
            with io_as_user_error(self._run_dir):
                cast("FileWriter", self._board(BY_STEP).file_writer).add_summary(summary, step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """Record a picture that Matplotlib has drawn."""
        if self._active:
            with io_as_user_error(self._run_dir):
                self._board(BY_STEP).add_figure(_in_utf8(name), figure, step)

    def say(self, line: str) -> None:
        """Print a line, or several, with the time before each, without breaking the progress bar."""
        if self._active:
            stamp = now()
            try:
                tqdm.write("".join(f"{stamp} {part}\n" for part in line.split("\n")), file=sys.stdout, end="")
                sys.stdout.flush()
            except BrokenPipeError:  # `| head` has read enough; Ctrl-C ends `| tee` too. There is a checkpoint to save
                leave_closed_outputs()
                self._preemption.ask(signal.SIGPIPE)

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
    return machine.peak_memory()


def _board_of(name: str) -> tuple[str, str]:
    """Folder and tag of the events of a record; those of a single class have a group of their own, as there are many."""
    beginning, folder, group = next(row for row in BOARDS if name.startswith(row[0]))
    rest = name.removeprefix(beginning)
    return folder, f"{'labels/' if group and '/' in rest else group}{rest}"


def _in_utf8(text: str) -> str:
    """As TensorBoard takes it: a class may be called as a folder whose name is of another encoding."""
    return text.encode(errors="backslashreplace").decode()


def _record_files(run_dir: Path) -> list[Path]:
    events = (file for folder in FOLDERS for file in (run_dir / folder).glob(f"events.out.tfevents.*{OWN}"))
    return [*run_dir.glob(RECORDS), *events]


def _name(file: Path, run_dir: Path) -> str:
    return file.relative_to(run_dir).as_posix()


def _cut_records(run_dir: Path, lengths: dict[str, int]) -> None:
    """Cut each file of records to the length in `lengths`, and put away our own that no checkpoint knows of.

    What other programs have written into the directory stays. Without any checkpoint nothing is deleted, but renamed.
    """
    for file in _record_files(run_dir):
        if _name(file, run_dir) in lengths:
            continue
        if lengths:
            file.unlink()  # of an attempt that has come no further than the checkpoint, and is made again
        elif file.stat().st_size:  # of a start before the first checkpoint, or of a run that is gone
            earlier = file.name.replace("events.out.tfevents", "earlier")  # a name that TensorBoard does not read
            os.replace(file, next(p for i in itertools.count(1) if not (p := file.parent / f"{earlier}.{i}").exists()))
    for name, length in lengths.items():
        file = run_dir / name
        if file.exists() and file.stat().st_size > length:
            os.truncate(file, length)
