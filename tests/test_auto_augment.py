"""RandAugment's and TrivialAugment's operations against torchvision's and timm's on Pillow's images, on the same draws."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import index_of, photo
from PIL import Image
from timm.data import auto_augment as timms
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import autoaugment as torchvisions

from pipeline.config import DataConfig
from pipeline.config_file import from_dict
from pipeline.data.auto_augment import AutoAugment
from pipeline.data.color import apply_colors
from pipeline.data.erasing import erase
from pipeline.data.loader import Shard, TrainingLoader, create_image_pipeline
from pipeline.data.plan import BatchPlan, training_plans
from pipeline.data.policies import SPACES, Operation, draw_operations
from pipeline.data.scan import scan_classes
from pipeline.errors import UserError
from tools.support.gpu_checks.host import WAITS

CPU = torch.device("cpu")
SIDE = 33
NAMES = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
    "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
POLICIES = [
    DataConfig(auto_augment="randaugment", warp_interpolation="nearest"),
    DataConfig(auto_augment="trivialaugment", warp_interpolation="nearest"),
    DataConfig(auto_augment="randaugment-timm", randaugment_magnitude_std=0.5, warp_interpolation="nearest"),
]


@functools.cache
def images() -> list[Image.Image]:
    """Photographs, noise, an image of one colour, one of two, and a dark one."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    flat = np.full_like(noise, (7, 200, 255))
    two = np.where(noise < 200, np.uint8(30), np.uint8(31))
    return [photo(1, SIDE, SIDE), photo(2, SIDE, SIDE), *map(Image.fromarray, (noise, flat, two, noise // 4))]


def run(operations: np.ndarray, arguments: np.ndarray, config: DataConfig) -> np.ndarray:
    """(n, SIDE, SIDE, 3) bytes: the images after (n, K) operations."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images()]))[:, None]
    nothing = np.zeros(len(operations))
    plan = BatchPlan(*[nothing] * 9, operations=operations, arguments=arguments)
    return AutoAugment(config)(pixels, plan, CPU)[:, 0].numpy()


def run_one(choice, value: float, config: DataConfig) -> np.ndarray:
    """All images after one operation."""
    arguments = np.zeros((len(images()), 1, 6))
    for k, argument in enumerate(choice.arguments(np.array(value), SIDE)):
        arguments[:, 0, k] = argument
    return run(np.full((len(images()), 1), int(choice.operation), np.int8), arguments, config)


def stacked(expected) -> np.ndarray:
    return np.stack([np.asarray(image) for image in expected]).astype(int)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
@pytest.mark.parametrize("place", range(14), ids=NAMES)
def test_an_operation_is_torchvisions(policy, place):
    """At every magnitude. The warp's filter `bilinear` may differ by 1, or where a pixel lies on the border to rounding."""
    transform = torchvisions.RandAugment() if policy == "randaugment" else torchvisions.TrivialAugmentWide()
    space = (
        transform._augmentation_space(31, (SIDE, SIDE))
        if policy == "randaugment"
        else transform._augmentation_space(31)
    )
    (name, (theirs, signed)), choice = list(space.items())[place], SPACES[policy][place]
    assert (name, signed) == (NAMES[place], choice.signed)
    theirs = theirs.expand(31).double().numpy()
    ours = np.broadcast_to(choice.value(np.arange(31) / 30, SIDE), 31)
    if theirs.any():
        theirs = np.trunc(theirs + 1e-5) if "Translate" in name else theirs  # float32 makes 15.999999 of 32 / 2
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    for bin in (0, 1, 10, 20, 29, 30):
        for sign in (1, -1) if signed else (1,):
            value = sign * ours[bin]
            for filter in ("nearest", "bilinear") if choice.operation == Operation.WARP else ("nearest",):
                actual = run_one(choice, value, DataConfig(auto_augment=policy, warp_interpolation=filter))
                mode = transforms.InterpolationMode(filter)
                expected = stacked(torchvisions._apply_op(image, name, float(value), mode, None) for image in images())
                difference = np.abs(actual - expected)
                assert filter == "bilinear" or difference.max() == 0
                assert (difference > 1).mean() < 2e-3 and (difference > 0).mean() < 0.02


def test_a_bilinear_warp_is_pillows_to_1_on_the_border_too():
    random = np.random.default_rng(1)
    config = DataConfig(auto_augment="trivialaugment")
    for _ in range(20):
        matrix = np.array([1, 0, 0, 0, 1, 0]) + random.normal(size=6) * np.array([0.5, 0.5, 9, 0.5, 0.5, 9])
        arguments = np.broadcast_to(matrix, (len(images()), 1, 6))
        actual = run(np.ones((len(images()), 1), np.int8), arguments, config)
        filter = Image.Resampling.BILINEAR
        expected = stacked(i.transform(i.size, Image.Transform.AFFINE, tuple(matrix), filter) for i in images())
        assert np.abs(actual - expected).max() <= 1 and (actual != expected).mean() < 0.02
        assert np.array_equal(actual[3], expected[3])  # of one colour


@pytest.mark.parametrize("place", range(15), ids=timms._RAND_INCREASING_TRANSFORMS)
def test_an_operation_is_timms(monkeypatch, place):
    """timm draws its filter of two; here it is given. Where a warp finds no pixel there is the mean colour."""
    name, choice = timms._RAND_INCREASING_TRANSFORMS[place], SPACES["randaugment-timm"][place]
    config = DataConfig(auto_augment="randaugment-timm", warp_interpolation="nearest")
    mean = tuple(round(255 * value) for value in config.mean)
    hparams = {"translate_const": 250, "img_mean": mean, "interpolation": Image.Resampling.NEAREST}
    for level in (0.0, 3.3, 7.0, 9.9):
        for sign in (1, -1) if choice.signed else (1,):
            monkeypatch.setattr(timms, "_randomly_negate", lambda value, sign=sign: sign * value)
            operation = timms.AugmentOp(name, prob=1, magnitude=level, hparams=hparams)
            shift = choice.operation == Operation.WARP and name.startswith("Translate")
            value = (
                sign * choice.value(np.array(level / 10), SIDE) * (-1 if shift else 1)
            )  # its shifts have the other sign
            assert np.array_equal(run_one(choice, value, config), stacked(map(operation, images())))


def test_a_sequence_of_operations_is_torchvisions_on_the_same_draws():
    config = dataclasses.replace(POLICIES[0], randaugment_ops=3, crop_size=SIDE)
    draws = np.random.default_rng(2).random((15, len(images())))
    operations, arguments = draw_operations(config, iter(draws))
    expected = []
    for i, image in enumerate(images()):
        for layer in range(3):
            place, magnitude = int(draws[5 * layer, i] * 14), 0.0
            magnitudes, signed = torchvisions.RandAugment()._augmentation_space(31, (SIDE, SIDE))[NAMES[place]]
            if magnitudes.ndim:
                magnitude = float(magnitudes[9]) * (-1 if signed and draws[5 * layer + 1, i] < 0.5 else 1)
            image = torchvisions._apply_op(image, NAMES[place], magnitude, transforms.InterpolationMode.NEAREST, None)
        expected.append(image)
    difference = np.abs(run(operations, arguments, config) - stacked(expected))
    assert difference.max() <= 1  # torchvision's magnitudes are float32, and a byte may fall to the other side
    assert (difference > 0).mean() < 1e-3 and len(np.unique(operations)) > 5


@pytest.mark.parametrize("config", POLICIES, ids=lambda config: config.auto_augment)
def test_operations_are_drawn_equally_often(config):
    operations, arguments = draw_operations(config, iter(np.random.default_rng(3).random((64, 30_000))))
    layers = 1 if config.auto_augment == "trivialaugment" else 2
    assert operations.shape == (30_000, layers) and arguments.shape == (30_000, layers, 6)
    half = 0.5 if config.auto_augment == "randaugment-timm" else 1
    expected = np.zeros(12)
    for choice in SPACES[config.auto_augment]:
        expected[choice.operation] += half / len(SPACES[config.auto_augment])
    expected[Operation.IDENTITY] += 1 - half
    shares = np.bincount(operations.ravel(), minlength=12) / operations.size
    np.testing.assert_allclose(shares, expected, atol=0.008)
    factors = arguments[operations == Operation.BRIGHTNESS][:, 0]
    assert np.mean(factors > 1) == pytest.approx(0.5, abs=0.05)
    if config.auto_augment == "randaugment":
        assert np.unique(factors.round(6)).tolist() == [0.73, 1.27]
    elif config.auto_augment == "trivialaugment":
        assert len(np.unique(factors.round(6))) == 61
    else:  # |factor - 1| is 0.09 times a level from N(9, 0.5), cut at 10
        levels = np.abs(factors[factors > 0.1] - 1) / 0.09
        assert np.median(np.abs(factors - 1) / 0.09) == pytest.approx(9, abs=0.05) and levels.max() <= 10 + 1e-9
        assert np.quantile(np.abs(factors - 1) / 0.09, 0.16) == pytest.approx(8.5, abs=0.06)


@pytest.mark.parametrize("config", POLICIES, ids=lambda config: config.auto_augment)
def test_operations_belong_to_a_position_and_other_draws_keep_their_bits(config):
    index = index_of([(40, 50)] * 51)

    def plans(config=config, rank=0, ranks=1, first_step=0):
        options = dict(seed=7, epoch=3, first_step=first_step, batch_size=24, rank=rank, ranks=ranks, accumulation=1)
        return list(training_plans(index, config, **options))

    whole, shares = plans(), [plans(rank=rank, ranks=3) for rank in range(3)]
    for name, value in vars(plans(DataConfig(cutout=16, random_erasing=1))[0]).items():
        mine = getattr(plans(dataclasses.replace(config, cutout=16, random_erasing=1))[0], name)
        assert value is None if name in ("operations", "arguments", "noise_seeds") else np.array_equal(value, mine)
    for name in ("operations", "arguments"):
        assert np.array_equal(getattr(plans(first_step=1)[0], name), getattr(whole[1], name))
        for step, plan in enumerate(whole):
            assert np.array_equal(np.concatenate([getattr(s[step], name) for s in shares]), getattr(plan, name))


def test_an_images_pixels_do_not_depend_on_its_batch():
    config = dataclasses.replace(POLICIES[2], crop_size=SIDE, warp_interpolation="bilinear")
    operations, arguments = draw_operations(config, iter(np.random.default_rng(4).random((10, 60))))
    pixels = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (60, 1, SIDE, SIDE, 3), np.uint8))
    plan = BatchPlan(*[np.zeros(60)] * 9, operations=operations, arguments=arguments)
    augment, before = AutoAugment(config), pixels.clone()
    together = augment(pixels, plan, CPU)
    assert torch.equal(pixels, before)  # which belong to the image pipeline
    for rows in (np.arange(7), np.array([59, 3]), np.array([20])):
        assert torch.equal(augment(pixels[rows], plan.take(rows), CPU), together[rows])
    near = pixels.float() + torch.empty(pixels.shape).uniform_(-0.49, 0.49)
    assert torch.equal(augment(near, plan, CPU), together)


def test_gray_images_are_augmented_as_images_of_equal_colours():
    config = dataclasses.replace(POLICIES[2], crop_size=SIDE, mean=(0.5, 0.5, 0.5))
    of_gray = dataclasses.replace(config, channels=1, mean=(0.5,), std=(0.2,))
    operations, arguments = draw_operations(config, iter(np.random.default_rng(4).random((10, 60))))
    gray = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (60, 1, SIDE, SIDE, 1), np.uint8))
    plan = BatchPlan(*[np.zeros(60)] * 9, operations=operations, arguments=arguments)
    ours, three = (AutoAugment(c)(gray.expand(-1, -1, -1, -1, 3), plan, CPU) for c in (of_gray, config))
    assert torch.equal(ours, three) and torch.equal(ours[..., :1].expand_as(ours), ours)


@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_a_loader_gives_what_the_operations_make_of_its_crops(image_folders, loader):
    index = scan_classes(image_folders / "train")
    config = dataclasses.replace(POLICIES[1], loader=loader, crop_size=24, resize_size=28, interpolation="pil-bilinear")
    shard = Shard(rank=0, ranks=1, device=CPU, threads=2)
    (batch,) = TrainingLoader(index, config, shard, seed=1, batch_size=37, accumulation=1).batches(0)
    options = dict(seed=1, epoch=0, first_step=0, batch_size=37, rank=0, ranks=1, accumulation=1)
    plans = list(training_plans(index, config, **options))
    ((plan, pixels),) = create_image_pipeline(index, config, shard, 37, views=1).run(plans)
    expected = apply_colors(AutoAugment(config)(pixels, plan, CPU), plan, CPU)
    assert torch.equal(batch.images, expected)
    assert (batch.images - apply_colors(pixels, plan, CPU)).abs().mean() > 0.1


class Operators(TorchDispatchMode):
    """Notes the names of all operators."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().replace("::", ".").partition(".")[2].partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", POLICIES, ids=lambda config: config.auto_augment)
def test_no_operation_waits_for_a_device(config):
    config = dataclasses.replace(
        config, crop_size=32, warp_interpolation="bilinear", cutout=8, random_erasing=1, erasing_fill="noise"
    )
    index = index_of([(40, 50)] * 64)
    options = dict(seed=7, epoch=3, first_step=0, batch_size=64, rank=0, ranks=1, accumulation=1)
    (plan,) = training_plans(index, config, **options)
    with Operators() as seen:
        pixels = AutoAugment(config)(torch.zeros(64, 1, 32, 32, 3), plan, CPU)
        erase(apply_colors(pixels, plan, CPU), plan)
    waits = {name.removeprefix("aten.") for name in WAITS}
    assert {"grid_sampler_2d", "masked_scatter_"} <= seen.names and not waits & seen.names


def test_what_a_space_does_not_have_is_refused():
    for fields, expected in (
        ({"auto_augment": "randaugment-timm", "randaugment_magnitude": 11}, "at most 10"),
        ({"auto_augment": "randaugment", "randaugment_magnitude": 31}, "at most 30"),
        ({"auto_augment": "autoaugment"}, "choose 'none'"),
    ):
        with pytest.raises(UserError, match=expected):
            from_dict({"data": fields}, "test")


def test_every_operation_is_in_a_space():
    assert {choice.operation for choice in itertools.chain(*SPACES.values())} == set(Operation)
