"""Compare loading from class folders and from a tar archive: ``python -m tools.lab.archives PHOTOS``.

Copies the images of PHOTOS into class folders and into an archive built like ILSVRC2012_img_train.tar (a tar of tars), times
indexing and loading of both in turn with a cold and a warm page cache, and estimates how long indexing all of ImageNet
takes. Cold means that Linux was told to drop the files' contents from its page cache (posix_fadvise); it may keep their names.
"""

import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import Shard, TrainingLoader
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes
from pipeline.machine import available_cores, keep_freed_memory
from tools.lab.imagenet import TRAINING_IMAGES
from tools.support.outputs import made_folder

BATCH_SIZE = 64
SOURCES = {"folders": "train", "tar of tars": "train.tar"}


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.lab.archives", description=__doc__)
    parser.add_argument("photos", metavar="PHOTOS", help="folder of class folders, or a tar archive of them")
    parser.add_argument("--classes", type=positive_integer, metavar="N", default=100, help="number of classes [100]")
    parser.add_argument("--images", type=positive_integer, metavar="N", default=60, help="images per class [60]")
    parser.add_argument("--repeats", type=positive_integer, metavar="N", default=3, help="repetitions [3]")
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="where to put the copies: on the disk to be measured [the system's temporary folder]",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # the loader needs the other cores
    keep_freed_memory()
    place = options.folder and made_folder(options.folder, "--folder")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        root = Path(folder)
        pack(scan_classes(options.photos, progress=True), root, options.classes, options.images)
        seconds = measure(root, options.repeats)
    print(report(seconds, options.classes * options.images))


def pack(index: DatasetIndex, root: Path, classes: int, images: int) -> None:
    """Write `classes` x `images` copies of the indexed images as ``train/CLASS/IMAGE`` and as ``train.tar``."""
    reader = Reader(index)
    with tarfile.open(root / "train.tar", "w") as outer:
        for c in range(classes):
            inner = io.BytesIO()
            (root / "train" / f"n{c:08d}").mkdir(parents=True)
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(images):
                    content = reader.read((c * images + i) % len(index)).tobytes()
                    name = f"n{c:08d}_{i}.JPEG"
                    (root / "train" / f"n{c:08d}" / name).write_bytes(content)
                    _add(tar, name, content)
            _add(outer, f"n{c:08d}.tar", inner.getvalue())


def measure(root: Path, repeats: int) -> dict[tuple[str, str], float]:
    """Median seconds of each (task, source), the sources taking turns."""
    seconds: dict[tuple[str, str], list[float]] = {}

    def clock(task: str, source: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds.setdefault((task, source), []).append(time.perf_counter() - start)

    for repeat in range(repeats):
        for source, name in SOURCES.items():
            cache = root / f"{name}.{repeat}.jsonl"
            _forget(root / name)
            clock("index, cold", source, lambda: scan_classes(root / name))  # noqa: B023 - called at once
            clock("index, warm", source, lambda: scan_classes(root / name, cache))  # noqa: B023
            clock("index again", source, lambda: scan_classes(root / name, cache))  # noqa: B023
        for task in ("load, cold", "load, warm"):
            for source, name in SOURCES.items():
                loader = _loader(scan_classes(root / name))
                if task == "load, cold":
                    _forget(root / name)
                clock(task, source, lambda: sum(len(batch.ids) for batch in loader.batches(0)))  # noqa: B023
    return {key: statistics.median(values) for key, values in seconds.items()}


def report(seconds: dict[tuple[str, str], float], images: int) -> str:
    """A Markdown table and the estimate for ImageNet."""
    lines = [f"{images:,} images, {available_cores()} cores", "", f"| | {' | '.join(SOURCES)} |", "|---|--:|--:|"]
    for task in dict.fromkeys(task for task, _ in seconds):
        cells = [seconds[task, source] for source in SOURCES]
        texts = [f"{images / c:.0f} images/s" if task.startswith("load") else f"{c:.2f} s" for c in cells]
        lines.append(f"| {task} | {' | '.join(texts)} |")
    minutes = [seconds[task, "tar of tars"] * TRAINING_IMAGES / images / 60 for task in ("index, warm", "index, cold")]
    lines += [
        "",
        f"Estimate for indexing ImageNet's {TRAINING_IMAGES:,} images: {minutes[0]:.1f} minutes warm, {minutes[1]:.1f} cold.",
    ]
    return "\n".join(lines)


def _loader(index: DatasetIndex) -> TrainingLoader:
    shard = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=available_cores())
    return TrainingLoader(index, DataConfig(), shard, seed=1, batch_size=BATCH_SIZE, accumulation=1)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _forget(path: Path) -> None:
    """Drop a file, or all files of a folder, from the page cache."""
    for file in [path] if path.is_file() else path.rglob("*.JPEG"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    exit_on_user_error(main)
