"""Training crops of another size than the test's, sizes that grow, repeated augmentation; all resume to the same bits."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import index_of, small_config
from timm.data.distributed_sampler import RepeatAugSampler

from pipeline import compilation, trainer
from pipeline.config import DataConfig
from pipeline.config_file import from_dict
from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader
from pipeline.data.plan import repeat, sample_order, training_plans
from pipeline.data.scan import scan_classes
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.report import warnings_of
from pipeline.run import Run
from pipeline.watchdog import Watchdog

CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
pytestmark = pytest.mark.slow  # for the most part

GROWING = DataConfig(crop_size=32, resize_size=36, train_crop_size=(16, 24), train_crop_milestones=(2,))


def test_an_epoch_has_its_size_and_everything_else_is_kept():
    sizes = [(GROWING.of_epoch(epoch).crop_size, GROWING.of_epoch(epoch).resize_size) for epoch in range(4)]
    assert sizes == [(16, 18), (16, 18), (24, 27), (24, 27)] and GROWING.train_sizes == (16, 24)
    own = DataConfig(cutout=5)
    assert own.of_epoch(7) is own and own.train_sizes == (224,)
    one = DataConfig(train_crop_size=(160,), hflip=False)
    assert one.of_epoch(9) == DataConfig(crop_size=160, resize_size=183, hflip=False)


@pytest.mark.parametrize("ranks", [1, 3])
def test_repeats_are_timms(ranks):
    """Each global batch has the images that timm's sampler gives its ranks in that step, each with draws of its own."""
    images, batch_size = 50, 12
    index, config = index_of([(60, 80)] * images), DataConfig(crop_size=32, resize_size=36, aug_repeats=3)
    plain = sample_order(index, config, seed=3, epoch=2)
    samplers = [
        list(RepeatAugSampler(range(images), ranks, rank, shuffle=False, num_repeats=3, selected_round=0))
        for rank in range(ranks)
    ]
    options = dict(seed=3, epoch=2, first_step=0, batch_size=batch_size, ranks=ranks, accumulation=1)
    shares = [list(training_plans(index, config, rank=rank, **options)) for rank in range(ranks)]
    loader = TrainingLoader(
        index, dataclasses.replace(config, loader="synthetic"), CPU, seed=3, batch_size=batch_size, accumulation=1
    )
    each, neighbours = batch_size // ranks, []
    for step, plans in enumerate(zip(*shares, strict=True)):
        ids = [plan.ids[plan.weights > 0] for plan in plans]
        assert np.array_equal(np.concatenate(ids), loader.global_ids(2, step))
        boxes = np.concatenate([plan.crop_boxes[plan.weights > 0] for plan in plans])
        assert len(np.unique(boxes, axis=0)) > 0.8 * len(boxes)
        if step < images // batch_size:  # in the last one timm's ranks have equally many
            theirs = [plain[i] for sampler in samplers for i in sampler[step * each : (step + 1) * each]]
            assert sorted(np.concatenate(ids)) == sorted(theirs)
            assert ranks == 1 or all(len(set(own.tolist())) == each for own in ids)
            pairs = np.concatenate(ids).reshape(-1, 2)
            assert (pairs[:, 0] != pairs[:, 1]).all()
            neighbours += map(tuple, np.sort(pairs, axis=1).tolist())
    assert len(neighbours) == 24 and len(set(neighbours)) == 16  # 4 images have other neighbours in two turns
    assert sum((plan.weights > 0).sum() for plans in shares for plan in plans) == images


@pytest.mark.parametrize(("batch_size", "repeats"), [(12, 4), (30, 2), (64, 3), (64, 5)])
def test_neighbours_of_a_batch_are_different_images(batch_size, repeats):
    """Where a batch begins again with its images too: a pair that is mixed may lie across that place."""
    order = repeat(np.arange(20 * batch_size), repeats, batch_size)
    batches = order.reshape(-1, batch_size)
    assert (batches[:, 1:] != batches[:, :-1]).all()
    counts = np.unique(order, return_counts=True)[1]
    assert (counts[:-1] == repeats).all()


@pytest.mark.parametrize("batch_size", [2048, 250, 64])
def test_no_two_images_are_mixed_twice_in_a_batch(batch_size):
    """Wherever the pairs lie: a batch begins again with its images at an odd place, too."""
    order = repeat(np.arange(20 * batch_size), 3, batch_size)
    for batch in order.reshape(-1, batch_size):
        pairs = np.sort(batch.reshape(-1, 2), axis=1)
        assert len(np.unique(pairs, axis=0)) == len(pairs)


@pytest.mark.parametrize("train_crop", ["random_resized_crop", "random_crop"])
@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_a_loader_gives_each_epoch_its_size_and_evaluation_the_tests(image_folders, loader, train_crop):
    index, shard = scan_classes(image_folders / "train"), CPU
    config = dataclasses.replace(GROWING, loader=loader, train_crop=train_crop, cutout=8)
    growing = TrainingLoader(index, config, shard, seed=1, batch_size=37, accumulation=1)
    for epoch, size in ((1, 16), (2, 24), (1, 16)):
        (batch,) = growing.batches(epoch)
        assert batch.images.shape == (37, 3, size, size)
        fixed = dataclasses.replace(
            config, crop_size=size, resize_size=size * 9 // 8, train_crop_size=(), train_crop_milestones=()
        )
        (expected,) = TrainingLoader(index, fixed, shard, seed=1, batch_size=37, accumulation=1).batches(epoch)
        assert torch.equal(batch.images, expected.images)
    evaluated = next(EvaluationLoader(index, config, shard, batch_size=5, crops=1).batches())
    assert evaluated.images.shape == (5, 3, 32, 32)


def test_the_watchdog_waits_for_each_size_to_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation.torch, "compile", lambda network, **_: network)
    compiling: list[str] = []
    monkeypatch.setattr(
        Watchdog, "beat", lambda self, where, compiles=False: compiling.extend([where] if compiles else [])
    )
    data = {
        "crop_size": 24, "resize_size": 28, "train_crop_size": [16, 20, 20], "train_crop_milestones": [1, 2],
        "synthetic_images": 24,
    }  # fmt: skip
    trainer.fit(small_config(tmp_path, data=data, optim={"epochs": 3}, train={"compile": "default"}))
    assert compiling == ["epoch 1/3, step 0/2", "epoch 2/3, step 0/2"]


def test_a_run_says_which_sizes_its_crops_have_and_of_which_images_an_epoch_is(tmp_path):
    data = {
        "crop_size": 24, "resize_size": 28, "train_crop_size": [16, 20], "train_crop_milestones": [1],
        "aug_repeats": 3, "sampling": "balanced",
    }  # fmt: skip
    config = small_config(tmp_path, data=data, optim={"warmup_epochs": 1.5})
    run = Run(config, World(0, 0, 1, 1, torch.device("cpu")))
    said = run.description().splitlines()
    assert "training crops of 16 pixels, 20 from epoch 2 on" in said
    assert "an epoch has a part of the training images, each 3 times (data.aug_repeats)" in said
    assert any(line.startswith("training loss and error are of equally many images of each class") for line in said)
    (line,) = [line for line in warnings_of(run, None) if "warms up" in line]
    assert "still warms up, over 1.5 epochs, when it drops after epoch 1: set optim.warmup_epochs" in line


def test_sizes_that_cannot_be_trained_are_refused(tmp_path):
    for fields, expected in (
        ({"train_crop_size": [16, 20]}, "has 0 epochs, and train_crop_size 2 sizes"),
        ({"train_crop_milestones": [3]}, "has 1 epoch, and train_crop_size 0 sizes"),
        ({"train_crop_size": [8, 9, 10], "train_crop_milestones": [4, 4]}, "each epoch must come after the one before"),
        (
            {"train_crop_size": [8, 9], "train_crop_milestones": [90]},
            "never reached with optim.epochs 90: give earlier ones",
        ),
        ({"train_crop_size": [0]}, "a number above 0 is needed"),
    ):
        with pytest.raises(UserError, match=expected):
            from_dict({"data": fields}, "test")
    for fields, expected in (
        ({"train_crop_size": [2]}, "cannot train on 2 images of 2 pixels.*choose another data.train_crop_size"),
        ({"train_crop_size": [16], "crop_size": 2}, "cannot take images of 2 x 2 pixels"),
    ):
        config = small_config(tmp_path, data=fields)
        with pytest.raises(UserError, match=expected):
            Run(config, World(0, 0, 1, 1, torch.device("cpu")))
