"""DALI and the reference execute the same plans; the reference is checked against the Torch code and Pillow."""

import dataclasses

import numpy as np
import pytest
import torch
import torch7
from conftest import index_of, photo
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.color import apply_colors
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader, create_image_pipeline
from pipeline.data.plan import evaluation_plans, training_plans
from pipeline.data.reference import resize_as_torch7
from pipeline.data.scan import scan_classes
from pipeline.errors import LocalUserError

CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
SMALL = DataConfig(crop_size=56, resize_size=64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> DatasetIndex:
    """JPEGs of many kinds: sizes, gray, CMYK, progressive, EXIF-rotated, chroma subsampled or not; a PNG among them."""
    root = tmp_path_factory.mktemp("photos")
    (root / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        {"quality": 95},
        {"quality": 75, "subsampling": 0},
        {"quality": 75, "subsampling": 1},
        {"quality": 85, "progressive": True},
        {"quality": 90, "exif": exif},
    ]
    for i in range(20):
        image = photo(i, 90 + 13 * (i % 6), 100 + 17 * (i % 5))
        image.save(root / "a" / f"color{i:02d}.jpg", **kinds[i % len(kinds)])
    photo(50, 120, 100).convert("L").save(root / "a" / "gray.jpg")
    photo(51, 120, 100).convert("CMYK").save(root / "a" / "cmyk.jpg")
    photo(52, 100, 120).save(root / "a" / "png.JPEG", format="PNG")
    return scan_classes(root)


def pixels(index, config, plans, views=1, batch_size=8):
    image_pipeline = create_image_pipeline(index, config, CPU, batch_size, views)
    return torch.cat([result.float() for _, result in image_pipeline.run(plans)])


def plans_for(index, config, crops=None):
    if crops:
        return list(evaluation_plans(index, config, crops=crops, batch_size=8, rank=0, ranks=1))
    options = dict(seed=1, first_step=0, batch_size=8, rank=0, ranks=1, accumulation=1)
    return [plan for epoch in range(4) for plan in training_plans(index, config, epoch=epoch, **options)]


# Differences in units of 1/255. "torch7-bicubic" works in floats throughout; where a crop is enlarged, the outermost pixels
# differ because DALI repeats the edge where Torch7 extrapolates it, so the frame of 4 pixels is gated apart. Pillow
# rounds to bytes between its two passes and at the end, and clips what overshoots.
@pytest.mark.parametrize(
    ("resize", "mean", "inner", "frame"),
    [("torch7-bicubic", 0.02, 2.5, 30), ("pil-bilinear", 0.3, 1, 20), ("pil-bicubic", 0.3, 25, 25)],
)
@pytest.mark.parametrize("crops", [None, 1, 10])
def test_dali_and_the_reference_agree(photos, resize, mean, inner, frame, crops):
    config = dataclasses.replace(SMALL, interpolation=resize)
    plans = plans_for(photos, config, crops)
    results = [
        pixels(photos, dataclasses.replace(config, loader=loader), plans, crops or 1)
        for loader in ("dali", "reference")
    ]
    difference = (results[0] - results[1]).abs()
    assert results[0].shape == (sum(map(len, plans)), crops or 1, 56, 56, 3)
    assert difference.mean() < mean
    assert difference[:, :, 4:-4, 4:-4].max() <= inner
    assert difference.max() <= frame


@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_an_image_whose_short_side_fits_is_not_resampled(tmp_path, loader):
    (tmp_path / "a").mkdir()
    image = photo(0, 230, 224)
    image.save(tmp_path / "a" / "image.png")
    config = DataConfig(loader=loader, resize_size=224)
    actual = pixels(scan_classes(tmp_path), config, plans_for(scan_classes(tmp_path), config, crops=1))
    np.testing.assert_allclose(actual[0, 0], np.asarray(image)[3:227], rtol=0, atol=1e-3)


@pytest.mark.parametrize("sizes", [(20, 30, 9, 11), (9, 11, 20, 30), (12, 12, 12, 7), (2, 3, 5, 5), (1, 4, 3, 6)])
def test_the_reference_resize_is_torch7s(sizes):
    height, width, new_height, new_width = sizes
    image = np.random.default_rng(0).random((height, width, 3))
    ours = resize_as_torch7(image.astype(np.float32) * 255, new_height, new_width) / 255
    expected = torch7.scale(image, new_height, new_width) if height > 1 else None
    if expected is None:  # one row stays the same everywhere
        line = torch7.scale(np.repeat(image, 2, axis=0), 2, new_width)[:1]
        expected = np.repeat(line, new_height, axis=0)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize(("resize", "kernel"), [("pil-bilinear", Image.BILINEAR), ("pil-bicubic", Image.BICUBIC)])
def test_the_reference_follows_pillow(photos, resize, kernel):
    config = dataclasses.replace(SMALL, loader="reference", interpolation=resize)
    for plan in plans_for(photos, config):
        actual = pixels(photos, config, [plan])
        for i in range(len(plan)):
            top, left, height, width = plan.crop_boxes[i].tolist()
            image = (
                Image.open(photos.location(plan.ids[i])).convert("RGB").crop((left, top, left + width, top + height))
            )
            image = image.resize(tuple(plan.sizes[i, ::-1].tolist()), kernel)
            y, x = plan.offsets[i, 0].tolist()
            expected = np.asarray(image)[y : y + 56, x : x + 56]
            expected = expected[:, ::-1] if plan.hflip[i, 0] else expected
            np.testing.assert_array_equal(actual[i, 0].numpy(), expected)


def test_a_training_batch_is_the_torch_codes_from_file_to_tensor(photos):
    """Crop, bicubic resize, jitter, lighting and normalisation as a whole, in float64 and step by step."""
    config = dataclasses.replace(SMALL, loader="dali")
    loader = TrainingLoader(photos, config, CPU, seed=3, batch_size=8, accumulation=1)
    (batch, *_) = loader.batches(epoch=0)
    (plan, *_) = training_plans(
        photos, config, seed=3, epoch=0, first_step=0, batch_size=8, rank=0, ranks=1, accumulation=1
    )
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for i in range(8):
        top, left, height, width = plan.crop_boxes[i].tolist()
        image = np.asarray(Image.open(photos.location(plan.ids[i])).convert("RGB"), np.float64) / 255
        image = torch7.scale(image[top : top + height, left : left + width], *plan.sizes[i].tolist())
        y, x = plan.offsets[i, 0].tolist()
        image = image[y : y + 56, x : x + 56]
        expected = image @ plan.color[i].T.astype(float) + plan.mean_color[i] @ image.mean(axis=(0, 1)) + plan.shift[i]
        expected = expected[:, ::-1] if plan.hflip[i, 0] else expected
        actual = batch.images[i].permute(1, 2, 0).numpy()
        # 0.01 after division by a standard deviation of 0.23 is half a unit of 1/255.
        assert (
            np.abs(actual - expected)[4:-4, 4:-4].mean() < 1e-3 and np.abs(actual - expected)[4:-4, 4:-4].max() < 0.05
        )


def test_colors_are_applied_image_by_image():
    torch.manual_seed(0)
    index = index_of([(40, 40)] * 5)
    (plan,) = plans_for(index, SMALL)[:1]
    for shape in ((5, 1, 6, 6, 3), (5, 1, 5, 7, 3)):
        raw = torch.randint(0, 256, shape, dtype=torch.uint8)
        actual = apply_colors(raw, plan, torch.device("cpu"))
        for i in range(5):
            image = raw[i, 0].double() / 255
            expected = image @ torch.tensor(plan.color[i]).double().T + torch.tensor(
                plan.mean_color[i].astype(float) @ image.mean(dim=(0, 1)).numpy() + plan.shift[i]
            )
            torch.testing.assert_close(actual[i].permute(1, 2, 0).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loader", ["native", "dali", "reference", "synthetic"])
def test_an_abandoned_epoch_leaves_no_trace(photos, loader):
    config = dataclasses.replace(SMALL, loader=loader)
    training = TrainingLoader(photos, config, CPU, seed=1, batch_size=8, accumulation=1)
    whole = [batch.images.clone() for batch in training.batches(epoch=0)]
    next(iter(training.batches(epoch=1)))
    again = [batch.images.clone() for batch in training.batches(epoch=0, first_step=1)]
    assert len(whole) == 3 and len(again) == 2
    for a, b in zip(whole[1:], again, strict=True):
        assert torch.equal(a, b)


def test_a_rank_without_images_loads_none(photos):
    shard = dataclasses.replace(CPU, rank=30, ranks=40)
    config = dataclasses.replace(SMALL, loader="dali")
    assert list(EvaluationLoader(photos, config, shard, batch_size=8, crops=1).batches()) == []


@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("cut short before the scan", "3.jpg does not decode"),
        ("text", "3.jpg does not decode"),
        ("shorter", "3.jpg ends after .* it changed since the scan"),
        ("missing", "cannot read the image .*3.jpg: No such file"),
    ],
)
def test_a_file_that_does_not_decode_is_named(tmp_path, loader, damage, expected):
    (tmp_path / "a").mkdir()
    for i in range(5):
        photo(i, 60, 60).save(tmp_path / "a" / f"{i}.jpg")
    file = tmp_path / "a" / "3.jpg"
    content = file.read_bytes()
    if damage == "cut short before the scan":
        file.write_bytes(content[:-900])
    index = scan_classes(tmp_path)
    if damage == "missing":
        file.unlink()
    elif damage in ("text", "shorter"):
        file.write_bytes({"text": b"x" * len(content), "shorter": content[:-900]}[damage])
    config = dataclasses.replace(SMALL, loader=loader)
    with pytest.raises(LocalUserError, match=expected):
        list(EvaluationLoader(index, config, CPU, batch_size=2, crops=1).batches())
