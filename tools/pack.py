"""Write images into tar shards and index them: ``python -m tools.pack DATA OUT``.

DATA is whatever training reads by class: a folder, a table, an archive, other shards. OUT gets NAME-000000.tar and so on, in
WebDataset's form: for each image KEY.jpg, as it is, and KEY.json with its class and its name in DATA. An image whose name
does not say that it is one gets its format's suffix. Training on them is training on DATA, to the bit: the order of the
images is the same (not where all classes are numbers, which folders sort as text). A million files become some dozens, which
a network file system serves better, and which can be copied.
"""

import io
import json
import os
import shlex
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.command import ArgumentParser, exit_on_user_error
from pipeline.data.image_files import is_image_by_name, suffix_of
from pipeline.data.index import DatasetIndex
from pipeline.data.index_cache import cache_beside, known_cache
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes
from pipeline.errors import UserError
from pipeline.words import counted
from tools.support.tables import add_columns_arguments, open_with_columns

MIB = 2**20


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.pack", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="folder, table, archive or shards of images with classes")
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument("--name", default="train", help="what the shards' names begin with [train]")
    parser.add_argument("--shard-size", metavar="MIB", type=int, default=1024, help="of a shard, in MiB [1024]")
    add_columns_arguments(parser)
    options = parser.parse_args()
    if options.shard_size < 1:
        parser.error("--shard-size must be at least 1")
    start = time.perf_counter()
    source, out = Path(options.data), Path(options.out)
    if there := sorted(out.glob(f"{options.name}-*.tar")):
        raise UserError(f"{there[0]} exists: remove the old shards, or give another OUT or --name")
    images = open_with_columns(source, options)
    index = scan_classes(images, known_cache(source), progress=True, pixel_format=None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        shards = pack(index, out, options.name, options.shard_size * MIB)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}: check its permissions and the free space") from None
    pattern = out / f"{options.name}-{{000000..{len(shards) - 1:06d}}}.tar"
    packed = scan_classes(pattern, cache_beside(pattern, out), progress=True, pixel_format=None)
    if packed.classes != index.classes:  # numbers count as numbers in shards, and as text in names of folders
        print(
            f"warning: the classes of {source} are numbers, which shards put into their order: the network's outputs stand in "
            "another order than with DATA",
            file=sys.stderr,
        )
    elif not np.array_equal(packed.labels, index.labels) or not np.array_equal(packed.lengths, index.lengths):
        raise UserError(f"{pattern} does not hold what {source} does: the disk or the memory is faulty; pack again")
    use, field = ("validate", "val") if options.name == "val" else ("train", "train")
    size = sum(shard.stat().st_size for shard in shards)
    print(
        f"{counted(len(packed), 'image')} of {counted(len(packed.classes), 'class', 'classes')}, {size / MIB:,.0f} MiB in "
        f"{counted(len(shards), 'shard')}, in "
        f"{time.perf_counter() - start:.0f} s\n{use} on them with --data.dir {shlex.quote(str(out))} --data.{field} "
        f"{shlex.quote(pattern.name)}"
    )


def pack(index: DatasetIndex, out: Path, name: str, shard_size: int) -> list[Path]:
    """Write the images of an index into shards of about so many bytes; they get their names when all are whole.

    Raises:
        UserError: an image cannot be read.
        OSError: a shard cannot be written.
    """
    shards: list[Path] = []
    tar: tarfile.TarFile | None = None
    reader = Reader(index)
    try:
        with tqdm(desc=f"pack {index.root}", total=len(index), unit=" images", disable=None, leave=False) as bar:
            for key, content, about in _samples(index, reader):
                bar.update()
                if tar and tar.offset + len(content) > shard_size:
                    tar.close()
                    tar = None
                if tar is None:
                    shards.append(out / f"{name}-{len(shards):06d}.tar")
                    tar = tarfile.open(_unfinished(shards[-1]), "w")  # noqa: SIM115 - until it is full
                _add(tar, f"{key}{about.pop('suffix')}", content)
                _add(tar, f"{key}.json", json.dumps(about).encode())
        if tar:
            tar.close()
    except BaseException:
        for shard in shards:
            _unfinished(shard).unlink(missing_ok=True)
        if tar:
            with suppress(OSError):  # what is left to write is no longer wanted
                tar.close()
        raise
    for shard in shards:
        os.replace(_unfinished(shard), shard)
    return shards


def _samples(index: DatasetIndex, reader: Reader) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Each image's key, bytes, and class, name and suffix. Keys are in the order of the index."""
    for i, name in enumerate(index.names):
        content = reader.read(i).tobytes()
        stem, suffix = os.path.splitext(os.path.basename(name))
        if not is_image_by_name(name):  # nor would that of the shard's file be
            stem, suffix = stem + suffix, _suffix_for(content, index.location(i))
        key = f"{i:08d}_{stem.replace('.', '_')}"
        yield key, content, {"label": index.classes[index.labels[i]], "name": name, "suffix": suffix.lower()}


def _suffix_for(content: bytes, location: str) -> str:
    """The suffix of an image's format.

    Raises:
        UserError: there is none.
    """
    with Image.open(io.BytesIO(content)) as image:
        suffix = suffix_of(image.format or "")
    if not suffix:
        raise UserError(f"{location} is {image.format}, of which no suffix says that it is an image: convert it")
    return suffix


def _unfinished(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.part")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    exit_on_user_error(main)
