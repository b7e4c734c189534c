"""Images that do not decode stop a loader, or another of their batch stands in: the same with DALI and the reference."""

import dataclasses
import gc
import io
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from nvidia.dali.pipeline import Pipeline

from pipeline.config import DataConfig
from pipeline.data import dali, decoding
from pipeline.data.dali import DaliPipeline
from pipeline.data.decoding import CorruptImageError
from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader
from pipeline.data.plan import epoch_order
from pipeline.data.scan import scan_classes
from pipeline.errors import LocalUserError

CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
IMAGES, BATCH = 22, 8
all_loaders = pytest.mark.parametrize("loader", ["native", "dali", "reference"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    (root / "a").mkdir()
    for i in range(IMAGES):
        photo(i, 60 + i, 90 - i).save(root / "a" / f"{i:02d}.jpg")
    return root


@pytest.fixture
def images(sound, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "images"))


def file(root: Path, i: int) -> Path:
    return root / "a" / f"{i:02d}.jpg"


def truncate(*files: Path) -> None:
    for path in files:
        path.write_bytes(path.read_bytes()[:-400])


def training(index, loader: str, corrupt_images: str = "skip", **options) -> TrainingLoader:
    config = DataConfig(crop_size=24, resize_size=28, loader=loader, corrupt_images=corrupt_images)
    return TrainingLoader(index, config, CPU, **{"seed": 1, "batch_size": BATCH, "accumulation": 1, **options})


def evaluation(index, loader: str) -> EvaluationLoader:
    config = DataConfig(crop_size=24, resize_size=28, loader=loader, corrupt_images="skip")
    return EvaluationLoader(index, config, CPU, batch_size=BATCH, crops=1)


def test_a_warning_that_nobody_reads_ends_no_epoch(images, monkeypatch):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    truncate(file(images, 3))
    monkeypatch.setattr("sys.stderr", Closed())
    assert sum(len(batch.ids) for batch in training(scan_classes(images), "reference").batches(0)) == IMAGES


@all_loaders
def test_the_next_sound_image_stands_in_and_does_not_count(sound, images, loader, capfd):
    order = epoch_order(IMAGES, 1, 0)
    corrupt = [1, 2, 7, 10]  # positions of the epoch: two neighbours, the last of a batch, and one of the next
    expected = {1: 3, 2: 3, 7: 0, 10: 11}
    truncate(*(file(images, order[position]) for position in corrupt))
    whole = list(training(scan_classes(sound), loader).batches(0))
    batches = list(training(scan_classes(images), loader).batches(0))
    pixels, ids = torch.cat([batch.images for batch in whole]), np.concatenate([batch.ids for batch in whole])
    rows = [expected.get(i, i) for i in range(IMAGES)]
    assert torch.equal(torch.cat([batch.images for batch in batches]), pixels[rows])
    np.testing.assert_array_equal(np.concatenate([batch.ids for batch in batches]), ids[rows])
    weights = torch.cat([batch.weights for batch in batches])
    assert weights.tolist() == [float(i not in corrupt) for i in range(IMAGES)]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("warning: skipping the image ") for line in lines)
    assert all(str(file(images, order[position])) in "".join(lines) for position in corrupt)


@all_loaders
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 2), (5, 1)])
def test_the_weights_of_a_step_add_up_to_the_images_that_count(images, loader, ranks, accumulation):
    """Over all ranks and parts of a step, so that a loss divided by their sum is a mean over images that count."""
    order = epoch_order(IMAGES, 1, 0)
    corrupt = {order[0], order[9], order[17]}
    truncate(*(file(images, i) for i in corrupt))
    index = scan_classes(images)
    config = DataConfig(crop_size=24, resize_size=28, loader=loader, corrupt_images="skip")
    steps: dict[int, list] = {}
    for rank in range(ranks):
        shard = dataclasses.replace(CPU, rank=rank, ranks=ranks)
        part = TrainingLoader(index, config, shard, seed=1, batch_size=20, accumulation=accumulation)
        for i, batch in enumerate(part.batches(0)):
            steps.setdefault(i // accumulation, []).append(batch)
    for step, batches in steps.items():
        of_step = order[20 * step : 20 * step + 20]
        assert sum(batch.weights.sum() for batch in batches) == len(of_step) - len(corrupt & set(of_step))
        counting = [
            i for batch in batches for i, weight in zip(batch.ids, batch.weights.tolist(), strict=True) if weight
        ]
        assert sorted(counting) == sorted(set(of_step) - corrupt)
        assert all(
            len(batch.ids) >= 1 and batch.weights.sum() >= (len(of_step) >= ranks * accumulation) for batch in batches
        )


@all_loaders
def test_a_run_that_resumes_skips_the_same_images(images, loader):
    truncate(*(file(images, i) for i in (3, 9, 15)))
    index = scan_classes(images)
    whole = list(training(index, loader).batches(0))
    for a, b in zip(whole[1:], training(index, loader).batches(0, first_step=1), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.weights, b.weights)


@all_loaders
def test_evaluation_always_stops(images, loader):
    truncate(file(images, 3))
    with pytest.raises(CorruptImageError, match="03.jpg does not decode .*repair or remove it .*--verify") as error:
        list(evaluation(scan_classes(images), loader).batches())
    assert "skip" not in str(error.value)  # which leaves out training images alone
    with pytest.raises(CorruptImageError, match="03.jpg does not decode .*data.corrupt_images skip leaves"):
        list(training(scan_classes(images), loader, "stop").batches(0))


@all_loaders
def test_without_a_sound_image_in_a_batch_training_stops(images, loader):
    order = epoch_order(IMAGES, 1, 0)
    truncate(*(file(images, i) for i in order[8:10]))
    with pytest.raises(LocalUserError, match="no image of a rank's batch decodes"):
        list(training(scan_classes(images), loader, accumulation=4).batches(0))


@all_loaders
@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_what_cannot_be_read_is_not_skipped(images, loader, damage):
    index = scan_classes(images)
    if damage == "missing":
        file(images, 3).unlink()
    else:
        truncate(file(images, 3))
    with pytest.raises(LocalUserError, match="03.jpg"):
        list(training(index, loader).batches(0))


def test_where_dali_refuses_an_image_pillow_is_asked(images, monkeypatch, capfd):
    """Batches of GIF files, that DALI does not read, of corrupt ones and of ordinary ones, all said to be plain."""
    monkeypatch.setattr(decoding, "is_plain", lambda content: True)
    for i in (2, 3, 12):
        photo(i, 60, 60).save(file(images, i), "GIF")
    index = scan_classes(images)
    for i in (7, 17):
        file(images, i).write_bytes(b"x" * index.lengths[i])  # after the scan, which would refuse it
    batches = [list(training(index, loader).batches(0)) for loader in ("dali", "reference")]
    for a, b in zip(*batches, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert torch.equal(a.weights, b.weights)
        assert (a.images - b.images).abs().mean() < 0.01
    assert sum(batch.weights.sum() for batch in batches[0]) == IMAGES - 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 4 and len(set(lines)) == 2  # once by each loader
    with pytest.raises(CorruptImageError, match=r"(07|17).jpg does not decode \(not an image\)"):
        list(training(index, "dali", "stop").batches(0))


def test_an_error_of_dali_that_is_no_images_fault_is_raised(images, monkeypatch):
    monkeypatch.setattr(decoding, "is_plain", lambda content: True)
    monkeypatch.setattr(dali, "as_ppm", lambda content, place: content)
    photo(0, 60, 60).save(file(images, 3), "GIF")
    with pytest.raises(RuntimeError, match="decoders"):
        list(training(scan_classes(images), "dali").batches(0))


def test_runs_that_stop_fail_or_are_abandoned_leave_no_pipeline(images, monkeypatch):
    alive = weakref.WeakSet()
    build = DaliPipeline._build

    def build_and_note(image_pipeline: DaliPipeline) -> Pipeline:
        pipeline = build(image_pipeline)
        alive.add(pipeline)
        return pipeline

    monkeypatch.setattr(DaliPipeline, "_build", build_and_note)
    truncate(file(images, 3))
    photo(0, 60, 60).save(file(images, 5), "GIF")
    index = scan_classes(images)
    stopping, going_on = training(index, "dali", "stop"), training(index, "dali")
    gc.disable()  # which would come in its own time
    try:
        for _ in range(3):
            with pytest.raises(CorruptImageError):
                list(stopping.batches(0))
            assert not alive
            next(going_on.batches(0))
            assert not alive
            with monkeypatch.context() as patch:
                patch.setattr(decoding, "is_plain", lambda content: True)  # DALI fails
                list(going_on.batches(0))
            assert len(alive) == 1  # kept for the next epoch
            next(going_on.batches(0))
    finally:
        gc.enable()
