"""Index as many images as ImageNet has: ``python -m tools.lab.index_scale [--images N]``.

Writes N tiny JPEG files in 1000 classes into WebDataset's shards, a zip file and parquet files (row groups of 100 images, as
Hugging Face writes them), and trains on them with two ranks as far as the first batch. Each kind is measured in processes of
its own: seconds to index for the first time and again from the cache, the memory of a rank that the index adds (what a rank
shares with another counts half), what rank 0 needed at most while it indexed, and seconds to the first batch of an epoch and
of a resume in the middle of one. With --random also how random access behaves: images/s in the order of an epoch and in the
order of the files. Linux only: it reads /proc. What the disk must hold: 2.3 KB an image, the largest kind.
"""

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import Shard, TrainingLoader
from pipeline.data.plan import epoch_order
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes
from pipeline.data.shared import share_on_machines
from pipeline.distributed import init_distributed
from pipeline.machine import available_cores, peak_memory
from tools.lab.imagenet import TRAINING_IMAGES
from tools.support.markdown import table
from tools.support.outputs import made_folder
from tools.support.torchrun import torchrun

CLASSES, SIDE, BATCH, RANKS = 1000, 8, 256, 2
SHARD = 8716  # images: 147 shards hold ImageNet
ROW_GROUP, FILE = 100, 12_800  # images of a parquet file
MIB = 2**20

Images = Iterator[tuple[str, str, bytes]]


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.lab.index_scale", description=__doc__)
    parser.add_argument(
        "--images", type=positive_integer, default=TRAINING_IMAGES, help="number of images [%(default)s, ImageNet's]"
    )
    parser.add_argument("--kinds", nargs="+", choices=WRITERS, default=list(WRITERS), help="what holds them [all]")
    parser.add_argument("--folder", metavar="DIR", help="where to put them [the system's temporary folder]")
    parser.add_argument(
        "--random", type=positive_integer, metavar="N", default=0, help="read so many images in both orders"
    )
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)  # what a rank is started with
    options = parser.parse_args()
    if options.rank:
        measure(Path(options.rank[0]), Path(options.rank[1]), options.random)
        return
    place = options.folder and made_folder(options.folder, "--folder")
    rows = []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            pattern = WRITERS[kind](images(options.images), Path(folder))
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / MIB
            print(f"{kind}: {options.images:,} images, {size:,.0f} MiB", flush=True)
            first = start_ranks(Path(folder, pattern), Path(folder, "cache"), 0)
            again = start_ranks(Path(folder, pattern), Path(folder, "cache"), options.random)
        rows.append([kind, *describe(first[0], again)])
        print(" ".join(rows[-1]), flush=True)
    titles = ["", "index, s", "again, s", "at most on rank 0, MiB", "a rank, MiB", "first batch, s", "resume, s"]
    if options.random:
        titles += ["images/s in an epoch's order", "in the files' order"]
    print("\n".join(table(titles, rows, names=1)))


def describe(first: dict[str, float], again: list[dict[str, float]]) -> list[str]:
    """The cells of a kind's row: rank 0 of the first start, and all ranks of the second."""
    memory = max(rank["added"] for rank in again)
    cells = [f"{first['seconds']:.1f}", f"{again[0]['seconds']:.1f}", f"{first['most']:.0f}", f"{memory:.0f}"]
    cells += [f"{max(rank[name] for rank in again):.2f}" for name in ("first_batch", "resume")]
    return cells + [f"{again[0][name]:,.0f}" for name in ("random", "in_order") if name in again[0]]


def images(number: int) -> Images:
    """Class, name and content of so many JPEG files, class by class."""
    kinds = []
    for seed in range(16):  # the loader sees each file anew, whatever is in it
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=50)
        kinds.append(buffer.getvalue())
    for i in range(number):
        name = f"n{i * CLASSES // number:08d}"
        yield name, f"{name}_{i}", kinds[i % len(kinds)]


def write_shards(source: Images, folder: Path) -> str:
    shard, count, tar = 0, SHARD, None
    for label, name, content in source:
        if count == SHARD:
            if tar:
                tar.close()
            tar = tarfile.open(folder / f"train-{shard:06d}.tar", "w")  # noqa: SIM115 - until it is full
            shard, count = shard + 1, 0
        assert tar is not None
        for suffix, part in (("jpg", content), ("cls", label.encode())):
            entry = tarfile.TarInfo(f"{name}.{suffix}")
            entry.size = len(part)
            tar.addfile(entry, io.BytesIO(part))
        tar.members.clear()  # type: ignore[attr-defined]
        count += 1
    if tar:
        tar.close()
    return "train-*.tar"


def write_zip(source: Images, folder: Path) -> str:
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for label, name, content in source:
            archive.writestr(f"{label}/{name}.JPEG", content)
    return "train.zip"


def write_parquet(source: Images, folder: Path) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.string())])
    file = 0
    rows: list[tuple[dict[str, Any], str]] = []

    def write() -> None:
        columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
        path = folder / f"train-{file:05d}.parquet"
        parquet.write_table(pa.table(columns, schema=schema), path, row_group_size=ROW_GROUP)

    for label, name, content in source:
        rows.append(({"bytes": content, "path": f"{name}.JPEG"}, label))
        if len(rows) == FILE:
            write()
            file, rows = file + 1, []
    if rows:
        write()
    return "train-*.parquet"


WRITERS: dict[str, Callable[[Images, Path], str]] = {"shards": write_shards, "zip": write_zip, "parquet": write_parquet}


def start_ranks(data: Path, cache: Path, random: int) -> list[dict[str, float]]:
    """What each rank has measured, in processes that begin with nothing."""
    words = ["--rank", data, cache, *(["--random", random] if random else [])]
    done = subprocess.run(
        torchrun(RANKS, "tools.lab.index_scale", *words), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(data: Path, cache: Path, random: int) -> None:
    """Index on this rank and load two batches; rank 0 prints what all have measured, as JSON."""
    config = DataConfig(crop_size=SIDE, resize_size=SIDE, loader="native")
    with init_distributed("cpu") as world:
        TrainingLoader(_nothing(), config, _shard(world), seed=1, batch_size=BATCH, accumulation=1)  # code is loaded
        before = memory()
        start = time.perf_counter()
        index = share_on_machines(world, lambda: scan_classes(data, cache))
        found: dict[str, float] = {"seconds": time.perf_counter() - start, "most": peak_memory() / MIB - before}
        world.gather(None)
        found["added"] = memory() - before
        loader = TrainingLoader(index, config, _shard(world), seed=1, batch_size=BATCH, accumulation=1)
        for name, epoch, step in (("first_batch", 0, 0), ("resume", 3, loader.steps_per_epoch // 2)):
            start = time.perf_counter()
            next(loader.batches(epoch, step))
            found[name] = time.perf_counter() - start
        if random and world.is_main:
            count = min(random, len(index))
            found["random"] = _speed(index, epoch_order(len(index), 1, 0)[:count])
            found["in_order"] = _speed(index, np.argsort(index.offsets, kind="stable")[:count])
        for_all = world.gather_to_rank0(found)
        if world.is_main:
            print(json.dumps(for_all), flush=True)


def _speed(index: DatasetIndex, rows: np.ndarray) -> float:
    """Images that one thread reads in a second, in this order."""
    reader, start = Reader(index), time.perf_counter()
    for i in rows.tolist():
        reader.read(i)
    return len(rows) / (time.perf_counter() - start)


def _shard(world) -> Shard:
    return Shard(world.rank, world.size, world.device, max(1, available_cores() // world.size))


def _nothing() -> DatasetIndex:
    from pipeline.data.synthetic import synthetic_index

    return synthetic_index(BATCH, 2, SIDE, "train")


def memory() -> float:
    """MiB of this process, of which what it shares with others counts by its part."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Pss"].split()[0]) / 1024


if __name__ == "__main__":
    exit_on_user_error(main)
