"""Reading through to the end, and what is said where that cannot be."""

import dataclasses
import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pytest
import torch
from conftest import PATIENCE, REPOSITORY, photo, write_class_folders
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import Shard, TrainingLoader
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes
from pipeline.data.source import Source
from pipeline.errors import LocalUserError


class Drips(io.RawIOBase):
    """A stream that gives a few bytes at a time, as a network file system may."""

    def __init__(self, stream: BinaryIO, end: int):
        self._stream, self._end, self.reads = stream, end, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.reads += 1
        left = self._end - self._stream.tell()
        return self._stream.readinto(memoryview(buffer)[: min(100, left)])


@dataclass(frozen=True)
class Dripping:
    source: Source
    end: int = 10**9

    @property
    def root(self) -> str:
        return self.source.root

    def open(self, name: str, offset: int, length: int) -> BinaryIO:
        return Drips(self.source.open(name, offset, length), self.end)

    def location(self, name: str) -> str:
        return self.source.location(name)


@pytest.fixture
def index(tmp_path) -> DatasetIndex:
    return scan_classes(write_class_folders(tmp_path / "train", 2, 4))


def test_short_reads_are_read_on(index):
    dripping = dataclasses.replace(index, source=Dripping(index.source))
    for i in range(len(index)):
        with open(index.location(i), "rb") as file:
            assert Reader(dripping).read(i).tobytes() == file.read()


def test_an_end_that_comes_too_soon_is_named(index):
    dripping = dataclasses.replace(index, source=Dripping(index.source, end=250))
    with pytest.raises(
        LocalUserError, match=r"image0000.jpg ends after 250 of \d+ bytes: it changed since the scan: .*anew"
    ):
        Reader(dripping).read(0)


@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_an_image_that_has_grown_since_the_scan_is_not_called_corrupt(index, loader):
    """Not even where corrupt ones may be left out: it may be whole, and its size is another."""
    photo(9, 90, 90).save(index.location(0), quality=95)
    shard = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=1)
    config = DataConfig(crop_size=24, resize_size=28, loader=loader, corrupt_images="skip")
    with pytest.raises(
        LocalUserError,
        match=rf"image0000.jpg goes on after {index.lengths[0]} bytes: it changed since the scan: .*anew",
    ):
        list(TrainingLoader(index, config, shard, seed=1, batch_size=4, accumulation=1).batches(0))


def test_short_reads_of_an_archive_are_read_on(index, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(index.root, "train")
    real, calls = os.preadv, []

    def short(descriptor, buffers, offset):
        calls.append(1)
        return real(descriptor, [memoryview(buffers[0])[:100]], offset)

    monkeypatch.setattr(os, "preadv", short)
    packed = scan_classes(tmp_path / "train.tar")
    assert packed.fingerprint == index.fingerprint
    calls.clear()
    for i in range(len(index)):
        np.testing.assert_array_equal(Reader(packed).read(i), np.fromfile(index.location(i), np.uint8))
    assert len(calls) > 3 * len(index)
    with open(tmp_path / "train.tar", "r+b") as file:
        file.truncate(int(packed.offsets[-1]) + 50)
    with pytest.raises(LocalUserError, match=r"ends after 50 of \d+ bytes"):
        Reader(packed).read(3)


@pytest.mark.slow
def test_a_limit_on_memory_is_one_line(tmp_path):
    """A picture that is small as a file and large when it is decoded."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("L", (9000, 9000)).save(tmp_path / "train" / "a" / "large.png")
    script = f"""
import resource, torch
from pipeline.config import DataConfig
from pipeline.data.scan import scan_classes
from pipeline.data.loader import EvaluationLoader, Shard
from pipeline.command import exit_on_user_error

def main():
    index = scan_classes({str(tmp_path / "train")!r})
    shard = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=1)
    loader = EvaluationLoader(index, DataConfig(loader="reference"), shard, batch_size=1, crops=1)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
    list(loader.batches())

exit_on_user_error(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "error: not enough memory to decode the image" in line and "large.png: raise the limit on memory" in line
