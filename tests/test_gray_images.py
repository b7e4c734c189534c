"""Images of one channel, of 16 bits, and turned as EXIF says: what the network sees of them, through every loader."""

import dataclasses
import io
import json
import struct

import numpy as np
import pytest
import torch
from conftest import photo, small_config, with_random_norms
from PIL import Image, ImageOps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from pipeline import api, trainer
from pipeline.config import DataConfig
from pipeline.data.formats import to_pnm
from pipeline.data.image_files import (
    ASK_FOR_UPRIGHT,
    PixelFormat,
    RefusedImageError,
    deep_mode,
    open_image,
    pixel_format,
)
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader, choose_loader
from pipeline.data.plan import GRAY
from pipeline.data.scan import scan_classes
from pipeline.data.verify import examine
from pipeline.distributed import init_distributed
from pipeline.errors import UserError
from pipeline.evaluation import why_size_is_refused
from pipeline.models import create_model
from pipeline.run import Run
from pipeline.start import find_start
from pipeline.weights import read_weights, write_safetensors
from tools import export, predict

CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=1)
LOADERS = ("reference", "native", "dali")
SMALL = DataConfig(crop_size=24, resize_size=28)
ONE = {"channels": 1, "mean": (0.4,), "std": (0.2,)}


def training_images(index, config, loader):
    config = dataclasses.replace(config, loader=loader)
    return next(TrainingLoader(index, config, CPU, seed=3, batch_size=len(index), accumulation=1).batches(0)).images


def evaluation_images(index, config, loader, crops=1):
    config = dataclasses.replace(config, loader=loader)
    return next(EvaluationLoader(index, config, CPU, batch_size=len(index), crops=crops).batches()).images


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> DatasetIndex:
    """Gray and colour images, JPEG and PNG."""
    folder = tmp_path_factory.mktemp("mixed") / "class"
    folder.mkdir()
    for i in range(6):
        image = photo(i, 40 + i, 50 - i)
        (image.convert("L") if i % 2 else image).save(folder / f"{i}.{'png' if i > 2 else 'jpg'}")
    return scan_classes(folder.parent)


@pytest.mark.parametrize("loader", LOADERS)
def test_one_channel_is_the_luma_of_what_three_would_be(mixed, loader):
    """Augmentation included, and the colour around a padded image; a gray image keeps its own values so."""
    mean, std = torch.tensor([0.4]), torch.tensor([0.2])
    more = {
        "auto_augment": "randaugment-timm",
        "cutout": 6,
        "random_erasing": 0.5,
        "mixup_alpha": 0.5,
        "cutmix_alpha": 1.0,
    }
    for changes in ({}, more, {"train_crop": "random_crop", "padding": 6, "resize_size": 24}):
        colors = dataclasses.replace(SMALL, **changes, mean=(0.4,) * 3, std=(0.2,) * 3)
        gray = dataclasses.replace(SMALL, **changes, **ONE)
        seen = training_images(mixed, colors, loader).permute(0, 2, 3, 1).double() * std + mean
        expected = seen @ torch.from_numpy(GRAY)
        found = training_images(mixed, gray, loader)
        assert found.shape == (6, 1, 24, 24) and found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found[:, 0].double() * std + mean, expected, rtol=0, atol=3e-6)
    expected = evaluation_images(mixed, colors, loader, crops=10)[10:20]  # of a gray image
    found = evaluation_images(mixed, gray, loader, crops=10)[10:20]
    torch.testing.assert_close(found.expand(-1, 3, -1, -1), expected, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Gray images of 16 bits in two classes, (n, H, W) uint16 in the order of the index, and the folder of the data set."""
    root = tmp_path_factory.mktemp("deep")
    pixels = []
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            (folder := root / split / f"class{i // (count // 2)}").mkdir(parents=True, exist_ok=True)
            luma = np.asarray(photo(i, 28, 28), np.float64).mean(axis=2)
            values = (luma * 200 + 50 * i + np.arange(28) % 13).astype(np.uint16)  # fractions of 1/255
            Image.fromarray(values).save(folder / f"{i}.{'png' if i % 2 else 'tif'}")
            pixels.append(values)
    return np.stack(pixels[:8]), root


DEEP = DataConfig(crop_size=28, resize_size=28, depth=16, loader="reference", **ONE)


@pytest.mark.parametrize("loader", ("reference", "native"))
def test_sixteen_bits_are_kept(deep, loader):
    pixels, root = deep
    index = scan_classes(root / "train", pixel_format=pixel_format(DEEP))
    expected = (torch.from_numpy(pixels.astype(np.float64)) / 65535 - 0.4) / 0.2
    found = evaluation_images(index, DEEP, loader)[:, 0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    rounded = (torch.from_numpy((pixels // 257).astype(np.float64)) / 255 - 0.4) / 0.2
    assert (found - rounded).abs().max() > 0.01
    # Pillow's antialiased bilinear filter neither rounds nor clips, as torch's does not.
    smaller = dataclasses.replace(DEEP, crop_size=12, resize_size=12, interpolation="pil-bilinear")
    expected = F.interpolate(expected[:, None], (12, 12), mode="bilinear", antialias=True)
    torch.testing.assert_close(evaluation_images(index, smaller, loader).double(), expected, rtol=0, atol=2e-5)
    if loader != "reference":
        expected = training_images(index, SMALL_DEEP, "reference")
        torch.testing.assert_close(training_images(index, SMALL_DEEP, loader), expected, rtol=0, atol=1e-6)


SMALL_DEEP = dataclasses.replace(DEEP, crop_size=16, resize_size=20)


def test_images_of_eight_bits_are_the_same_at_sixteen(mixed):
    eight, sixteen = (dataclasses.replace(SMALL, **ONE, depth=depth) for depth in (8, 16))
    difference = training_images(mixed, eight, "native") - training_images(mixed, sixteen, "native")
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("interpolation", ["torch7-bicubic", "pil-bilinear"])
def test_plain_pnm_files_are_read_at_sixteen_bits_as_others(tmp_path, interpolation):
    """Of colours and gray: native takes those of 8 bits as they are."""
    (tmp_path / "a").mkdir()
    for name, image in (("colours.ppm", photo(0, 28, 36)), ("gray.pgm", photo(1, 36, 28).convert("L"))):
        (tmp_path / "a" / name).write_bytes(to_pnm(np.asarray(image)).tobytes())
    config = dataclasses.replace(SMALL_DEEP, interpolation=interpolation)
    index = scan_classes(tmp_path, pixel_format=pixel_format(config))
    found, expected = (evaluation_images(index, config, loader) for loader in ("native", "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_what_cannot_be_read_so_is_refused_with_a_remedy(deep, tmp_path):
    _, root = deep
    with pytest.raises(
        UserError, match=r"has more than 8 bits a colour \(I;16\): set data\.depth 16 and data\.channels 1"
    ):
        scan_classes(root / "train")
    with pytest.raises(UserError, match=r"data\.loader is dali, but it decodes to 8 bits, and data\.depth is 16"):
        choose_loader(dataclasses.replace(DEEP, loader="dali"), CPU.device)
    assert choose_loader(dataclasses.replace(DEEP, loader="auto"), CPU.device) == "native"
    with pytest.raises(ValueError, match="auto_augment randaugment computes with 8 bits, and depth is 16: leave one"):
        dataclasses.replace(DEEP, auto_augment="randaugment")
    (tmp_path / "a").mkdir()
    # A PNG of one pixel of three colours of 16 bits, which Pillow does not write.
    (tmp_path / "a" / "rgb.png").write_bytes(
        bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000000f49444154789c6360646266616503"
            "00003f001621bad4540000000049454e44ae426082"
        )
    )
    with pytest.raises(
        UserError, match=r"has 16 bits a colour, of which Pillow reads 8 \(RGB;16B\): convert it to gray"
    ):
        scan_classes(tmp_path, pixel_format=PixelFormat(depth=16))


def tiff(photometric: int, channels: int, byte_order: str) -> bytes:
    """A TIFF file of two pixels of 16 bits, which Pillow does not write."""
    tags = {256: 2, 257: 1, 258: 16, 259: 1, 262: photometric, 273: 0, 277: channels, 278: 1, 279: 4 * channels}
    bits = 10 + 12 * len(tags) + 4
    tags |= {258: bits if channels > 1 else 16, 273: bits + 2 * channels}
    mark = {"<": b"II", ">": b"MM"}[byte_order]
    content = mark + struct.pack(f"{byte_order}HIH", 42, 8, len(tags))
    for tag, value in tags.items():
        count, long = channels if tag == 258 else 1, tag in (273, 279) or (tag == 258 and channels > 1)
        content += struct.pack(f"{byte_order}HHI", tag, 3 if tag == 258 or not long else 4, count)
        content += struct.pack(f"{byte_order}I" if long else f"{byte_order}HH", *([value] if long else [value, 0]))
    return content + struct.pack(f"{byte_order}I{channels}H", 0, *[16] * channels) + bytes(range(4 * channels))


@pytest.mark.parametrize(
    ("name", "content", "deep"),
    [
        ("a.tif", tiff(2, 3, "<"), "RGB;16L"),
        ("b.tif", tiff(2, 3, ">"), "RGB;16B"),
        ("c.ppm", b"P6 2 1 65535\n" + bytes(range(12)), "RGB;16B"),
        ("d.ppm", b"P6 2 1 255\n" + bytes(range(6)), ""),
        ("e.tif", tiff(1, 1, "<"), "I;16"),
    ],
)
def test_colours_of_16_bits_in_any_format_are_known(tmp_path, name, content, deep):
    """With 8 bits they are read, and --verify says so; with 16 they are refused, as Pillow would read 8."""
    (folder := tmp_path / "class0").mkdir()
    (folder / name).write_bytes(content)
    found = open_image(io.BytesIO(content), name)
    assert deep_mode(found) == deep
    if not deep.startswith("RGB"):
        return
    assert len(scan_classes(tmp_path)) == 1
    with pytest.raises(UserError, match="has 16 bits a colour, of which Pillow reads 8"):
        scan_classes(tmp_path, pixel_format=PixelFormat(depth=16))
    (issue, *_) = examine(np.frombuffer(content, np.uint8), name, name, True)
    assert issue.fault == "has more than 8 bits a colour"


def test_gray_of_12_bits_is_refused(tmp_path):
    """Pillow reads its values as they are, of which the largest is 4,095."""
    (folder := tmp_path / "class0").mkdir()
    content = tiff(1, 1, "<").replace(struct.pack("<HHIHH", 258, 3, 1, 16, 0), struct.pack("<HHIHH", 258, 3, 1, 12, 0))
    (folder / "a.tif").write_bytes(content)
    for depth in (8, 16):
        with pytest.raises(UserError, match="has 12 bits a colour .*: convert it to 16 bits, or remove it"):
            scan_classes(tmp_path, pixel_format=PixelFormat(depth=depth))


def test_gray_of_16_bits_with_white_as_0_is_refused():
    """Pillow turns it round with 8 bits and not with 16."""
    with pytest.raises(RefusedImageError, match="stores white as 0, which Pillow reads as black"):
        open_image(io.BytesIO(tiff(0, 1, "<")), "a.tif")


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """Folders of the same JPEG images, with each EXIF orientation, and turned upright without one."""
    root = tmp_path_factory.mktemp("turned")
    for i in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = i
        for kind in ("stored", "upright"):
            (root / kind / "a").mkdir(parents=True, exist_ok=True)
        photo(i, 40, 56).save(root / "stored" / "a" / f"{i}.jpg", exif=exif, quality=95)
        with Image.open(root / "stored" / "a" / f"{i}.jpg") as image:
            upright = ImageOps.exif_transpose(image)
            upright.info.pop("exif", None)
            upright.save(root / "upright" / "a" / f"{i}.png")
    return root


@pytest.mark.parametrize("loader", LOADERS)
def test_images_are_turned_as_exif_says_where_asked(turned, loader, capfd, tmp_path):
    config = dataclasses.replace(SMALL, exif_orientation=True)
    upright = scan_classes(turned / "upright")
    for _ in range(2):  # from the images, then from the cache
        index = scan_classes(turned / "stored", tmp_path / "cache", pixel_format=pixel_format(config))
        assert index.sizes.tolist() == upright.sizes.tolist() and index.turned.tolist() == [False] + [True] * 7
    assert not capfd.readouterr().err
    torch.testing.assert_close(
        training_images(index, config, loader), training_images(upright, SMALL, loader), rtol=0, atol=2e-3
    )
    part = index.take(np.array([5, 0]))
    found = evaluation_images(part, config, loader)
    assert (found - evaluation_images(upright.take(np.array([5, 0])), SMALL, loader)).abs().max() < 2e-3


@pytest.mark.parametrize("asked", [False, True])
def test_a_tiff_that_pillow_turns_itself_is_turned_once(tmp_path, asked, capfd):
    for i in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = i
        for kind in ("stored", "upright"):
            (tmp_path / kind / "a").mkdir(parents=True, exist_ok=True)
        photo(i, 40, 56).save(tmp_path / "stored" / "a" / f"{i}.tif", exif=exif)
        with Image.open(tmp_path / "stored" / "a" / f"{i}.tif") as image:
            image.load()
            Image.fromarray(np.asarray(image)).save(tmp_path / "upright" / "a" / f"{i}.png")
    config = dataclasses.replace(SMALL, exif_orientation=asked)
    index, upright = (
        scan_classes(tmp_path / kind, pixel_format=pixel_format(config)) for kind in ("stored", "upright")
    )
    assert "rotated" not in capfd.readouterr().err
    assert index.sizes.tolist() == upright.sizes.tolist() and len(set(map(tuple, index.sizes.tolist()))) == 2
    found, expected = (training_images(of, config, "native") for of in (index, upright))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_photos_that_lie_on_their_side_are_named_at_each_start(turned, capfd, tmp_path):
    for _ in range(2):
        index = scan_classes(turned / "stored", tmp_path / "cache")
        said = capfd.readouterr().err
        assert f"{turned / 'stored' / 'a' / '2.jpg'} is rotated by EXIF (and 6 more): " in said
        assert said.count("\n") == 1 and ASK_FOR_UPRIGHT in said
    assert index.turned is None and {tuple(size) for size in index.sizes.tolist()} == {(40, 56)}


def initial(tmp_path, name, source, **data):
    config = small_config(tmp_path, model={"name": name, "weights": str(source)}, data=data)
    with init_distributed("cpu") as world:
        start = find_start(config)
        return Run(start.config, world, start)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("densenet_bc22_k8", "timm:test_resnet"))
def test_weights_serve_images_of_the_other_number_of_channels(name, tmp_path):
    torch.manual_seed(5)
    images = torch.randn(2, 1, 32, 32)
    for theirs, ours in ((3, 1), (1, 3))[: 1 if name.startswith("timm:") else 2]:
        network = with_random_norms(create_model(name, 3, in_channels=theirs)).eval()
        torch.save(network.state_dict(), tmp_path / f"{theirs}.pth")
        data = {"channels": ours, "from_weights": ["mean", "std"]}
        run = initial(tmp_path / str(ours), name, tmp_path / f"{theirs}.pth", **data)
        how = "summed over the three colours" if ours == 1 else "repeated for the three colours, a third each"
        assert how in run.description() and len(run.config.data.mean) == ours
        adapted = run.network.eval()
        head = "classifier" if hasattr(adapted, "classifier") else "fc"
        getattr(adapted, head).load_state_dict(getattr(network, head).state_dict())  # which was drawn anew
        with torch.no_grad():
            found, expected = adapted(images.expand(-1, ours, -1, -1)), network(images.expand(-1, theirs, -1, -1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_network_of_one_channel_trains_on_sixteen_bits_and_serves(deep, tmp_path, monkeypatch, capsys):
    """Trained, evaluated, converted, predicted with and exported: it takes images as its run did."""
    _, root = deep
    config = small_config(
        tmp_path / "run",
        data={"dir": str(root), "loader": "auto", "channels": 1, "depth": 16, **ONE},
        optim={"epochs": 1, "batch_size": 4},
        train={"pictures_every": 1},
    )
    trainer.fit(config)
    assert "images/validation_answers" in EventAccumulator(config.run_dir).Reload().Tags()["images"]
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    audit = (tmp_path / "run" / "audit.md").read_text()
    assert "| 1 (gray) " in audit and "| bits of a pixel's colour " in audit
    weights = read_weights(best)
    assert weights.network.features.conv0.weight.shape[1] == 1
    write_safetensors(weights, tmp_path / "gray.safetensors")
    converted = read_weights(tmp_path / "gray.safetensors")
    assert converted.config.data == weights.config.data
    evaluation = api.evaluate(tmp_path / "gray.safetensors", root / "val", device="cpu")
    # As a bare state dictionary, whose number of channels its first convolution tells.
    torch.save(weights.network.state_dict(), tmp_path / "bare.pth")
    bare = read_weights(tmp_path / "bare.pth", "densenet_bc22_k8")
    assert (bare.config.data.channels, len(bare.config.data.mean)) == (1, 1)
    assert why_size_is_refused(bare.network, 1, 16, 1) == ""

    monkeypatch.setattr(
        "sys.argv", ["predict", str(best), str(root / "val"), "--json", str(tmp_path / "answers.json"), "--top", "1"]
    )
    predict.main()
    answers = json.loads((tmp_path / "answers.json").read_text())
    found = [answer["answers"][0]["class"] for answer in answers]
    assert found == [f"class{k}" for k in evaluation.top5[:, 0]]
    monkeypatch.setitem(export.FORMATS, ".kept", (lambda program, _: program, lambda program: program.module()))
    program, difference = export.export(weights, ".kept")  # without torch's slow formats
    assert difference < 1e-4 and program.module()(torch.zeros(2, 1, 16, 16)).shape == (2, 2)
    assert json.loads(export.metadata_of(weights)["preprocessing"])["bits"] == 16
