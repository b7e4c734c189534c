"""What an addition costs: a new kind of place for images, and a new loader, are one class and one registry line each.

The whole of both additions is in this file. Nothing else knows of databases.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import sqlite3
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config

from pipeline import trainer
from pipeline.checkpoint import load_checkpoint
from pipeline.config import DataConfig
from pipeline.data import loader, sources
from pipeline.data.image_files import is_image_by_name
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader, ImagePipeline, PipelineOptions, Shard, TrainingLoader
from pipeline.data.reference import ReferencePipeline
from pipeline.data.scan import scan_classes, scan_flat
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member
from pipeline.data.verify import verify
from tools import evaluate

pytestmark = pytest.mark.slow  # for the most part

CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)


@dataclasses.dataclass(frozen=True)
class DatabaseSource:
    """Images in an SQLite file with a table of class, name and content."""

    root: str

    @classmethod
    def at(cls, root: str) -> FileSource | None:
        return cls(root) if root.endswith(".sqlite") else None

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        classes: dict[str, list[Member]] = {}
        for member in self._members():
            folder, name = os.path.split(member.name)
            classes.setdefault(folder, []).append(dataclasses.replace(member, name=name))
        return [
            Group(name, partial(Listing, tuple(of_it)), self._stamp()) for name, of_it in sorted(classes.items())
        ], []

    def flat(self) -> Group:
        return Group("", lambda: Listing(tuple(self._members())), self._stamp())

    def open(self, name: str, offset: int, length: int):
        return io.BytesIO(self._rows("SELECT content FROM images WHERE rowid = ?", offset)[0][0])

    def location(self, name: str) -> str:
        return f"{name} in {self.root}"

    def _members(self) -> list[Member]:
        rows = self._rows("SELECT class || '/' || name, rowid, length(content) FROM images ORDER BY 1")
        return [Member(name, row, length, by_name=is_image_by_name(name)) for name, row, length in rows]

    def _rows(self, query: str, *values: int) -> list[tuple]:
        with contextlib.closing(sqlite3.connect(self.root)) as database:
            return database.execute(query, values).fetchall()

    def _stamp(self) -> str:
        return f"{os.stat(self.root).st_mtime_ns} {os.path.getsize(self.root)}"


@pytest.fixture
def stored(image_folders, tmp_path, monkeypatch) -> Path:
    """`image_folders` as two databases."""
    monkeypatch.setitem(sources.SOURCES, "database", DatabaseSource)
    for split in ("train", "val"):
        with contextlib.closing(sqlite3.connect(tmp_path / f"{split}.sqlite")) as database:
            database.execute("CREATE TABLE images (class, name, content)")
            for file in sorted((image_folders / split).rglob("*.jpg"), reverse=True):
                row = (file.parent.name, file.name, file.read_bytes())
                database.execute("INSERT INTO images VALUES (?, ?, ?)", row)
            database.commit()
    return tmp_path


def test_the_index_is_that_of_the_folders_and_is_cached(stored, image_folders, monkeypatch):
    index, folders = scan_classes(stored / "train.sqlite", stored / "cache"), scan_classes(image_folders / "train")
    assert (index.names, index.classes, index.fingerprint) == (folders.names, folders.classes, folders.fingerprint)
    np.testing.assert_array_equal(index.sizes, folders.sizes)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.scan_group._read_header", lambda *_: pytest.fail("read a header again"))
        assert scan_classes(stored / "train.sqlite", stored / "cache").fingerprint == folders.fingerprint
    (stored / "labels.txt").write_text("".join(f"{name} {name[:6]}\n" for name in index.names))
    flat = scan_flat(stored / "train.sqlite", stored / "labels.txt", index.classes)
    assert flat.names == index.names and flat.labels.tolist() == index.labels.tolist()


@pytest.mark.parametrize("name", ["native", "dali", "reference"])
def test_all_loaders_read_it_in_another_process_too(stored, image_folders, name):
    config = DataConfig(crop_size=24, resize_size=28, loader=name)
    batches = []
    for root in (stored / "train.sqlite", image_folders / "train"):
        index: DatasetIndex = pickle.loads(pickle.dumps(scan_classes(root)))
        training = TrainingLoader(index, config, CPU, seed=1, batch_size=8, accumulation=1)
        evaluation = EvaluationLoader(index.take(np.arange(5)), config, CPU, batch_size=8, crops=10)
        batches.append([*training.batches(0), *evaluation.batches()])
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_it_is_trained_on_evaluated_and_verified(stored, image_folders, tmp_path, monkeypatch, capsys):
    """From the command's entry to the result, as from folders."""
    weights, results = [], []
    for name, folder, suffix in (("database", stored, ".sqlite"), ("folders", image_folders, "")):
        data = {"dir": str(folder), "train": f"train{suffix}", "val": f"val{suffix}", "loader": "auto"}
        config = small_config(tmp_path / name, data=data, optim={"epochs": 1, "milestones": []})
        trainer.fit(config)
        checkpoint = tmp_path / name / "checkpoints" / "last.pt"
        weights.append(load_checkpoint(checkpoint)["model"])
        words = [checkpoint, "--data", folder / f"val{suffix}", "--json", tmp_path / f"{name}.json"]
        monkeypatch.setattr("sys.argv", ["evaluate", *map(str, words)])
        evaluate.main()
        (result,) = json.loads((tmp_path / f"{name}.json").read_text())["evaluations"]
        results.append((result["images"], result["loss"], result["by_class"]))
    assert results[0] == results[1] and results[0][0] == 11
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert (
        list(verify([DatabaseSource(str(stored / "train.sqlite"))], [DatabaseSource(str(stored / "val.sqlite"))])) == []
    )


def test_without_the_line_it_is_refused_with_what_there_is(stored, monkeypatch):
    monkeypatch.delitem(sources.SOURCES, "database")
    with pytest.raises(
        Exception,
        match=r"train.sqlite is of no known kind \(folder, zip file, .*, table\): unpack it",
    ):
        scan_classes(stored / "train.sqlite")


class UpsideDown:
    """Another loader: the reference's images turned over."""

    def __init__(self, options: PipelineOptions):
        self._reference = ReferencePipeline(options.index, options.config, options.threads, options.corrupt_images)

    def run(self, plans):
        for plan, pixels in self._reference.run(plans):
            yield plan, pixels.flip(2)


def test_another_loader_is_one_line(image_folders, monkeypatch):
    index = scan_classes(image_folders / "val")
    config = DataConfig(crop_size=24, resize_size=28, loader="reference")

    def images() -> torch.Tensor:
        loaded = EvaluationLoader(index, config, CPU, batch_size=4, crops=1).batches()
        return torch.cat([batch.images for batch in loaded])

    expected = images().flip(2)
    factory: type[ImagePipeline] = UpsideDown
    monkeypatch.setitem(loader.IMAGE_PIPELINES, "reference", factory)
    assert torch.equal(images(), expected)
