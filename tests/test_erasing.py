"""Cutout and random erasing: their boxes against the papers' and torchvision's rules, the same pixels with every loader."""

import dataclasses
import math
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from conftest import index_of
from scipy import stats
from test_plan import kolmogorov_distance, philox
from torchvision import transforms

from pipeline.config import DataConfig
from pipeline.data import plan as planning
from pipeline.data.decoding import CorruptImageError
from pipeline.data.erasing import erase
from pipeline.data.loader import Shard, TrainingLoader
from pipeline.data.plan import BatchPlan, training_plans
from pipeline.data.replacements import collect
from pipeline.data.scan import scan_classes

SMALL = DataConfig(crop_size=32, resize_size=36)
BOTH = dataclasses.replace(SMALL, cutout=16, random_erasing=0.7, erasing_fill="noise")
ERASED = ("cutout", "erasing", "noise_seeds")


def plans_of(
    config: DataConfig, images: int = 51, rank: int = 0, ranks: int = 1, first_step: int = 0
) -> list[BatchPlan]:
    index = index_of([(40 + i % 9, 50) for i in range(images)])
    options = dict(seed=7, epoch=3, first_step=first_step, batch_size=24, rank=rank, ranks=ranks, accumulation=1)
    return list(training_plans(index, config, **options))


def test_boxes_belong_to_a_position_and_other_draws_keep_their_bits():
    whole = plans_of(BOTH)
    assert all(
        getattr(whole[1], name).dtype.name == kind
        for name, kind in zip(ERASED, ("int32", "int32", "uint64"), strict=True)
    )
    for before, after in zip(plans_of(SMALL), whole, strict=True):
        for name, value in vars(before).items():
            assert value is None if name in ERASED else np.array_equal(value, getattr(after, name))
    ranks = [plans_of(BOTH, rank=rank, ranks=3) for rank in range(3)]
    resumed = plans_of(BOTH, first_step=1)
    for name in ERASED:
        for step, plan in enumerate(whole):
            assert np.array_equal(np.concatenate([getattr(parts[step], name) for parts in ranks]), getattr(plan, name))
        assert np.array_equal(getattr(resumed[0], name), getattr(whole[1], name))
        assert len(np.unique(getattr(whole[0], name), axis=0)) > 12


def test_draws_are_philoxs_beyond_those_of_the_crops():
    """Pinned, because another stream would change every run that is under way."""
    (plan, *_), first = plans_of(BOTH), []
    for position in range(24):
        numbers = philox((7, 3), (1 << 200) + position * 16 + 1)
        first.append([(number >> 11) / 2**53 for number in numbers])
    row, column, noise, _ = np.array(first).T
    assert np.array_equal(plan.noise_seeds, (noise * 2**53).astype(np.uint64))
    for box, y, x in zip(plan.cutout.tolist(), row * 32 // 1, column * 32 // 1, strict=True):
        mask = np.ones((32, 32))  # as the authors' code makes it
        mask[int(max(y - 8, 0)) : int(min(y + 8, 32)), int(max(x - 8, 0)) : int(min(x + 8, 32))] = 0
        ours = np.ones((32, 32))
        ours[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = 0
        assert np.array_equal(ours, mask)


def test_erased_rectangles_follow_torchvisions_distribution():
    config = DataConfig(random_erasing=0.3)
    size = 64
    boxes = planning._erasing_boxes(
        dataclasses.replace(config, crop_size=size), iter(np.random.default_rng(0).random((64, 20_000)))
    )
    drawn = boxes[boxes[:, 2] > 0].astype(float)
    assert len(drawn) / len(boxes) == pytest.approx(0.3, abs=0.015)
    torch.manual_seed(0)
    image = torch.zeros(1, size, size)
    expected = np.array(
        [
            transforms.RandomErasing.get_params(image, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=[0.0])[:4]
            for _ in range(2000)
        ],
        float,
    )
    for ours, theirs in (
        (drawn[:, 2] * drawn[:, 3], expected[:, 2] * expected[:, 3]),
        (drawn[:, 2] / drawn[:, 3], expected[:, 2] / expected[:, 3]),
        (drawn[:, 0], expected[:, 0]),
        (drawn[:, 1], expected[:, 1]),
    ):
        assert kolmogorov_distance(ours, theirs) < 0.055  # what equal distributions keep in 999 of 1000 draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_a_batch_is_erased_as_a_loop_over_images_does(dtype, fill):
    plan = plans_of(dataclasses.replace(BOTH, erasing_fill=fill))[0]
    images = torch.randn(len(plan), 32, 32, 3).to(dtype).permute(0, 3, 1, 2)
    expected = images.clone()
    for i in range(len(plan)):
        top, left, height, width = plan.erasing[i].tolist()
        box = expected[i, :, top : top + height, left : left + width]
        if fill == "zero":
            box.zero_()
        elif height:
            halves = np.random.Philox(key=int(plan.noise_seeds[i])).random_raw((box.numel() + 1) // 2)
            numbers = []
            for number in halves.tolist():  # Box-Muller in float64
                low, high = (number >> 8) % 2**24 / 2**24, (number >> 40) / 2**24
                radius = math.sqrt(-2 * math.log1p(-low))
                numbers += [radius * math.cos(2 * math.pi * high), radius * math.sin(2 * math.pi * high)]
            box.copy_(torch.tensor(numbers[: box.numel()]).view(height, width, 3).permute(2, 0, 1))
        top, left, height, width = plan.cutout[i].tolist()
        expected[i, :, top : top + height, left : left + width] = 0
    assert erase(images, plan) is images
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6 if dtype is torch.float32 else 2**-7)
    assert torch.equal(images == 0, expected == 0)


def test_noise_is_normal_and_independent_of_other_images():
    plan = plans_of(dataclasses.replace(BOTH, cutout=0, random_erasing=1))[0]
    images = erase(torch.full((len(plan), 3, 32, 32), torch.nan), plan)
    noise = images[~images.isnan()].double().numpy()
    assert len(noise) > 5000 and stats.kstest(noise, "norm").pvalue > 1e-3 and len(np.unique(noise)) > 0.99 * len(noise)
    rows = np.array([5, 3])
    few = erase(torch.full((2, 3, 32, 32), torch.nan), plan.take(rows))
    assert torch.equal(few.nan_to_num(), images[rows].nan_to_num())


def test_every_loader_erases_the_same_boxes(image_folders):
    index = scan_classes(image_folders / "train")
    cpu = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
    noises = []
    kinds = [(name, torch.float32) for name in ("native", "dali", "reference")] + [("native", torch.bfloat16)]
    for loader, dtype in kinds:
        config = dataclasses.replace(BOTH, loader=loader)
        options = dict(seed=1, batch_size=37, accumulation=1, dtype=dtype)
        (erased,) = TrainingLoader(index, config, cpu, **options).batches(0)
        (plain,) = TrainingLoader(
            index, dataclasses.replace(config, cutout=0, random_erasing=0), cpu, **options
        ).batches(0)
        assert erased.images.dtype is dtype and erased.images.is_contiguous(memory_format=torch.channels_last)
        (plan,) = training_plans(
            index, config, seed=1, epoch=0, first_step=0, batch_size=37, rank=0, ranks=1, accumulation=1
        )
        nan = erase(torch.full((37, 3, 32, 32), torch.nan), plan)
        kept = nan.isnan()
        assert 0.3 < kept.float().mean() < 0.9 and torch.equal(erased.images[kept], plain.images[kept])
        noises.append(erased.images.float()[~kept])
        assert torch.equal(noises[-1], nan[~kept].to(dtype).float())
    assert torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])


def test_a_replacement_of_a_corrupt_image_has_the_others_box():
    plan, futures = plans_of(BOTH)[0].take(np.array([4, 5])), [Future(), Future()]
    futures[0].set_exception(CorruptImageError("here", "damaged"))
    futures[1].set_result(1)
    replaced, _ = collect(plan, futures, "skip")
    assert all(np.array_equal(getattr(replaced, name), getattr(plan, name)[[1, 1]]) for name in ERASED)
