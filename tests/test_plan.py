import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch7
from conftest import index_of
from torchvision import transforms

from pipeline.config import DataConfig
from pipeline.data import plan as planning
from pipeline.data.plan import evaluation_plans, steps_per_epoch, training_plans

DRAWN = DataConfig()


PHOTOS = index_of([(300 + 7 * (i % 31), 280 + 11 * (i % 29)) for i in range(107)])


def train(rank=0, ranks=1, accumulation=1, first_step=0, epoch=3, batch_size=24, index=PHOTOS, config=DRAWN):
    plans = training_plans(
        index, config, seed=5, epoch=epoch, first_step=first_step, batch_size=batch_size, rank=rank, ranks=ranks,
        accumulation=accumulation,
    )  # fmt: skip
    return list(plans)


def stacked(plans, field):
    return np.concatenate([getattr(p, field)[p.weights > 0] for p in plans])


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    orders = [stacked(train(epoch=epoch), "ids").tolist() for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(107))
    assert orders[0] != orders[1]


def test_the_last_batch_is_kept():
    assert steps_per_epoch(1_281_167, 256) == 5005
    assert 1_281_167 - 5004 * 256 == 143
    assert [len(p) for p in train()] == [24, 24, 24, 24, 11]


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 1), (3, 1), (2, 3), (8, 3)])
def test_ranks_share_an_epoch_and_draw_what_one_rank_draws(ranks, accumulation):
    """Step by step, the parts of all ranks together are the global batch, augmentation included."""
    alone = train()
    shares = [train(rank=r, ranks=ranks, accumulation=accumulation) for r in range(ranks)]
    for step, whole in enumerate(alone):
        parts = [p for share in shares for p in share[step * accumulation : (step + 1) * accumulation]]
        assert len(parts) == ranks * accumulation
        assert max(len(p) for p in parts) - min(len(p) for p in parts) <= 1
        for field in ("ids", "crop_boxes", "sizes", "offsets", "hflip", "color", "mean_color", "shift"):
            np.testing.assert_array_equal(stacked(parts, field), getattr(whole, field))


def test_an_empty_part_gets_a_stand_in_that_does_not_count():
    parts = [train(rank=r, ranks=24)[-1] for r in range(24)]  # 11 images for 24 ranks
    assert [len(p) for p in parts] == [1] * 24
    assert sum(p.weights.sum() for p in parts) == 11


def test_resuming_at_a_step_draws_the_same():
    for a, b in zip(train()[2:], train(first_step=2), strict=True):
        for field, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, field))


def philox(key: tuple[int, int], block: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011): the four 64-bit numbers of one counter value."""
    word = (1 << 64) - 1
    c0, c1, c2, c3 = (block >> shift & word for shift in (0, 64, 128, 192))
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & word, (a >> 64) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return [c0, c1, c2, c3]


def test_random_numbers_are_philoxs_by_seed_epoch_and_position():
    """Pinned, because another stream would change every run that is under way."""
    seed, epoch, position = 7, 3, 5
    blocks = [philox((seed, epoch), position * 16 + i + 1) for i in range(16)]  # NumPy counts before it draws
    expected = [(number >> 11) / 2**53 for block in blocks for number in block]
    assert planning.uniforms(seed, epoch, range(position, position + 1))[0].tolist() == expected
    numbers = [number for i in range(3) for number in philox((seed, epoch), (1 << 192) + i + 1)][:10]
    assert planning.epoch_order(10, seed, epoch).tolist() == sorted(range(10), key=numbers.__getitem__)


def test_crops_are_what_the_torch_code_makes_of_the_draws():
    """Try by try with the numbers that were drawn: RandomSizedCrop one image at a time."""
    random = np.random.default_rng(0)
    sizes = [(375, 500), (500, 333), (60, 400), (224, 453), (230, 224), (30, 31), (906, 224)] * 40
    draws = random.random((50, len(sizes)))
    crop_boxes, resized, offsets = planning._random_resized_crops(np.array(sizes), DRAWN, iter(draws))
    fallbacks = 0
    for i, (height, width) in enumerate(sizes):
        expected = None
        for area, aspect, swap, top, left in draws[:, i].reshape(10, 5):
            target, ratio = (0.08 + 0.92 * area) * height * width, 3 / 4 + (4 / 3 - 3 / 4) * aspect
            w, h = int(math.sqrt(target * ratio) + 0.5), int(math.sqrt(target / ratio) + 0.5)
            if swap < 0.5:
                w, h = h, w
            if h <= height and w <= width:  # torch.random(0, n) is any of 0 to n
                expected = ([int(top * (height - h + 1)), int(left * (width - w + 1)), h, w], [224, 224], [0, 0])
                break
        if expected is None:
            fallbacks += 1
            scaled = list(torch7.short_side_to(height, width, 224))
            expected = ([0, 0, height, width], scaled, [math.ceil((side - 224) / 2) for side in scaled])
        assert (crop_boxes[i].tolist(), resized[i].tolist(), offsets[i].tolist()) == expected
    assert 0 < fallbacks < 80


def kolmogorov_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference between the empirical distribution functions."""
    values = np.union1d(a, b)
    return np.abs(
        np.searchsorted(np.sort(a), values, side="right") / len(a)
        - np.searchsorted(np.sort(b), values, side="right") / len(b)
    ).max()


def test_crops_follow_the_papers_distribution():
    index = index_of([(375, 500)] * 4000)
    plans = train(index=index, batch_size=1000)
    crop_boxes = stacked(plans, "crop_boxes").astype(float)
    top, left, height, width = crop_boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
    drawn = (stacked(plans, "sizes") == 224).all(axis=1)
    area, aspect = (height * width / (375 * 500))[drawn], (width / height)[drawn]
    assert drawn.mean() > 0.99
    assert area.min() >= 0.079 and aspect.min() > 0.74 and aspect.max() < 1.35

    random = np.random.default_rng(0)  # the same rule, by rejection, drawn otherwise
    areas, aspects, tops = [], [], []
    while len(areas) < 20_000:
        target, ratio = random.uniform(0.08, 1) * 375 * 500, random.uniform(3 / 4, 4 / 3)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if random.random() < 0.5:
            w, h = h, w
        if h <= 375 and w <= 500:
            areas.append(w * h / (375 * 500))
            aspects.append(w / h)
            tops.append(random.integers(0, 375 - h + 1))
    for ours, expected in ((area, areas), (aspect, aspects), (top[drawn], tops)):
        assert (
            kolmogorov_distance(ours, np.array(expected)) < 0.035
        )  # what equal distributions keep in 999 of 1000 draws
    assert abs(stacked(plans, "hflip").mean() - 0.5) < 0.03


def test_an_image_in_which_no_crop_fits_is_resized_and_cut_at_the_centre():
    (plan,) = train(index=index_of([(40, 4000)] * 8), batch_size=8)
    for i in range(8):
        if plan.crop_boxes[i].tolist() == [0, 0, 40, 4000]:
            assert plan.sizes[i].tolist() == [224, 22400] and plan.offsets[i, 0].tolist() == [0, 11088]
    assert (plan.crop_boxes[:, 2] == 40).any()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_color_maps_are_the_torch_codes_chain_in_any_order(order):
    """With the factors and alphas that were drawn, pixel by pixel in float64."""
    random = np.random.default_rng(0)
    n = 20
    draws = random.random(
        (9, n)
    )  # factors of brightness, contrast and saturation; two uniforms for each of three normals
    color, mean_color, shift = planning._color_maps(DRAWN, iter(draws))
    steps = (torch7.brightness, torch7.contrast, torch7.saturation)
    for i in range(n):
        image = random.random((6, 5, 3))
        expected = image
        for kind in order:
            expected = steps[kind](expected, 0.6 + 0.8 * draws[kind, i])
        alphas = [
            0.1 * math.sqrt(-2 * math.log(1 - draws[3 + 2 * k, i])) * math.cos(2 * math.pi * draws[4 + 2 * k, i])
            for k in range(3)
        ]
        expected = torch7.normalise(torch7.lighting(expected, alphas), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        actual = image @ color[i].T + mean_color[i] @ image.mean(axis=(0, 1)) + shift[i]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_jitter_and_lighting_follow_their_distributions():
    index = index_of([(300, 300)] * 6000)
    without_normalisation = DataConfig(mean=(0, 0, 0), std=(1, 1, 1))
    plans = train(index=index, batch_size=2000, config=without_normalisation)
    # A gray image of value 1 keeps its gray under contrast and saturation: only brightness, U(0.6, 1.4), is left.
    gray = stacked(plans, "color").sum(axis=2) + stacked(plans, "mean_color").sum(axis=2)
    np.testing.assert_allclose(gray[:, 0], gray[:, 2], atol=1e-5)
    assert np.abs(np.quantile(gray[:, 0], [0.01, 0.25, 0.5, 0.75, 0.99]) - [0.608, 0.8, 1.0, 1.2, 1.392]).max() < 0.015
    # What is added is lighting: its covariance is that of the eigenvectors.
    vectors, values = np.array(torch7.EIGENVECTORS), np.array(torch7.EIGENVALUES)
    expected = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(stacked(plans, "shift").T), expected, atol=0.06 * expected.max())


def test_switched_off_noise_leaves_the_normalisation():
    (plan,) = train(index=index_of([(50, 50)] * 4), config=DataConfig(color_jitter=0, pca_noise=0, hflip=False))
    np.testing.assert_allclose(plan.color, np.broadcast_to(np.diag(1 / np.array(DRAWN.std)), (4, 3, 3)), rtol=1e-6)
    assert not plan.mean_color.any() and not plan.hflip.any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 200])
@pytest.mark.parametrize("crops", [1, 10])
def test_evaluation_visits_every_image_once(ranks, crops):
    shares = [
        list(evaluation_plans(PHOTOS, DRAWN, crops=crops, batch_size=8, rank=r, ranks=ranks)) for r in range(ranks)
    ]
    ids = [i for share in shares for p in share for i in p.ids.tolist()]
    assert sorted(ids) == list(range(107))
    assert all(p.offsets.shape == (len(p), crops, 2) for share in shares for p in share)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (256, 256), (333, 257), (600, 601)])
def test_evaluation_crops_are_the_torch_codes(size):
    height, width = torch7.short_side_to(*size, 256)
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, rows * 0], axis=2)
    for crops, expected in ((1, [torch7.centre_crop(image, 224)]), (10, torch7.ten_crop(image, 224))):
        (plan,) = evaluation_plans(index_of([size]), DRAWN, crops=crops, batch_size=1, rank=0, ranks=1)
        assert plan.sizes[0].tolist() == [height, width]
        for (top, left), mirrored, view in zip(plan.offsets[0], plan.hflip[0], expected, strict=True):
            ours = image[top : top + 224, left : left + 224]
            np.testing.assert_array_equal(ours[:, ::-1] if mirrored else ours, view)


@pytest.mark.parametrize("short", [224, 299, 32])
def test_an_image_whose_short_side_fits_stays_as_it_is(short):
    """transforms.lua's Scale returns it. By its formula some would lose a row: h / w * w is not always h in floats."""
    long = np.arange(short, 5001)
    sizes = np.stack([long, np.full_like(long, short)], axis=1)
    assert short != 224 or sum(int(side / short * short) != side for side in long.tolist()) == 140
    for both in (sizes, sizes[:, ::-1]):
        np.testing.assert_array_equal(planning._short_side_to(both, short), both)
    odd = [(side, short) for side in long.tolist() if int(side / short * short) != side][:3] or [(40, 32)]
    config = DataConfig(crop_size=short, resize_size=short)
    (evaluated,) = evaluation_plans(index_of(odd), config, crops=1, batch_size=9, rank=0, ranks=1)
    (padded,) = train(index=index_of(odd), config=dataclasses.replace(config, train_crop="random_crop"))
    for plan in (evaluated, padded):
        assert sorted(plan.sizes.tolist()) == sorted(map(list, odd))


def test_padded_crops_are_at_every_place_equally_often():
    """transforms.lua's RandomCrop: torch.random(0, size + 2 padding - crop), both ends included."""
    config = DataConfig(train_crop="random_crop", crop_size=28, resize_size=30, padding=3)
    plans = train(index=index_of([(30, 33)] * 6000), batch_size=2000, config=config)
    assert (stacked(plans, "sizes") == [30, 33]).all() and (stacked(plans, "crop_boxes") == [0, 0, 30, 33]).all()
    offsets = stacked(plans, "offsets")[:, 0]
    for axis, last in ((0, 30 + 3 - 28), (1, 33 + 3 - 28)):
        places, counts = np.unique(offsets[:, axis], return_counts=True)
        assert places.tolist() == list(range(-3, last + 1))
        assert np.abs(counts / 6000 * len(places) - 1).max() < 0.17  # 4 standard deviations of 6000 / 12


@pytest.mark.parametrize("crops", [1, 10])
def test_evaluation_crops_with_pillows_filters_are_torchvisions(crops):
    """Odd and even differences, and sizes at which the two rules of truncation could part."""
    sizes = [(375, 500), (500, 333), (261, 256), (256, 263), (301, 499), (49, 52), (55, 45)]
    config = DataConfig(interpolation="pil-bicubic")
    plans = evaluation_plans(index_of(sizes), config, crops=crops, batch_size=1, rank=0, ranks=1)
    for size, plan in zip(sizes, plans, strict=True):
        rows, columns = np.mgrid[: size[0], : size[1]]
        places = torch.from_numpy(np.stack([rows, columns, rows * 0]))
        resized = transforms.Resize(256, transforms.InterpolationMode.NEAREST)(places)
        assert plan.sizes[0].tolist() == list(resized.shape[1:])
        rows, columns = np.mgrid[: resized.shape[1], : resized.shape[2]]
        places = torch.from_numpy(np.stack([rows, columns, rows * 0]))
        expected = [transforms.CenterCrop(224)(places)] if crops == 1 else transforms.TenCrop(224)(places)
        ours = []
        for (top, left), mirrored in zip(plan.offsets[0], plan.hflip[0], strict=True):
            view = places[:, top : top + 224, left : left + 224]
            ours.append(view.flip(2) if mirrored else view)
        assert {view.numpy().tobytes() for view in ours} == {view.contiguous().numpy().tobytes() for view in expected}
