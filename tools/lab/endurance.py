"""Test the loaders for leaks: ``python -m tools.lab.endurance [--files N] [--epochs N]``.

Loads generated JPEG files of 16 x 16 pixels for several epochs as training does, and prints the process's resident memory,
open files and threads after each epoch. Linux only: it reads /proc.
"""

import os
import tempfile
import time
from pathlib import Path

import torch

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import DataConfig
from pipeline.data.loader import Shard, TrainingLoader
from pipeline.data.scan import scan_classes
from pipeline.machine import available_cores
from tools.lab.images import write_images
from tools.support.markdown import table

CLASSES, SIDE, BATCH = 10, 16, 256


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.lab.endurance", description=__doc__)
    parser.add_argument("--files", type=positive_integer, default=20_000, help="number of JPEG files [%(default)s]")
    parser.add_argument("--epochs", type=positive_integer, default=20, help="number of epochs [%(default)s]")
    parser.add_argument("--crop-size", type=positive_integer, default=12, help="side of a crop in pixels [%(default)s]")
    parser.add_argument(
        "--loader", choices=("auto", "native", "dali", "reference"), default="auto", help="image loader [%(default)s]"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), CLASSES, options.files, seed=0, side=SIDE)
        config = DataConfig(
            loader=options.loader, crop_size=options.crop_size, resize_size=max(SIDE, options.crop_size)
        )
        shard = Shard(0, 1, torch.device("cpu"), available_cores())
        loader = TrainingLoader(scan_classes(folder), config, shard, seed=1, batch_size=BATCH, accumulation=1)
        rows = []
        for epoch in range(options.epochs):
            start = time.perf_counter()
            images = sum(len(batch.ids) for batch in loader.batches(epoch))
            speed = images / (time.perf_counter() - start)
            rows.append([str(epoch + 1), *map(str, resources()), f"{speed:,.0f}"])
    print("\n".join(table(["epoch", "resident, MiB", "open files", "threads", "images/s"], rows, names=0)))


def resources() -> tuple[int, int, int]:
    """This process's resident memory in MiB, its open files and its threads."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) // 1024, len(os.listdir("/proc/self/fd")), int(lines["Threads"])


if __name__ == "__main__":
    exit_on_user_error(main)
