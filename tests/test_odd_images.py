"""What `verify` says of odd files is what the index and all loaders do, and what they read they read alike."""

import dataclasses
import io
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo, run_module, write_class_folders
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.dali_stages import CutPipeline
from pipeline.data.decoding import CorruptImageError, decode
from pipeline.data.formats import is_plain
from pipeline.data.image_files import ASK_FOR_UPRIGHT, OPAQUE, PixelFormat
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader, create_image_pipeline
from pipeline.data.plan import evaluation_plans, training_plans
from pipeline.data.scan import scan_classes
from pipeline.data.sources import open_source
from pipeline.data.verify import verify
from pipeline.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Palette images:UserWarning")
CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)

READ_AS_RGB = "read as RGB through Pillow, alike by all loaders"
READ_WITH_8_BITS = "read with 8 bits through Pillow, alike by all loaders"
READ_AS_IT_IS = "read as what it is"
READ_AS_FIRST = "read as its first"
STOPS = "stops a run, or is left out of training with data.corrupt_images skip"
REFUSED = "the index refuses it, or it is left out of training with data.corrupt_images skip; repair or remove it"
REFUSED_AS_DEEP = "the index refuses it; set data.depth 16 and data.channels 1, or convert or remove it"

# By name: what verify says, and whether DALI decodes the file itself.
EXPECTED = {
    "gray.jpg": ([], True),
    "progressive.jpg": ([], True),
    "progressive, scans missing.jpg": ([], False),
    "restarts.jpg": ([], True),
    "trailing bytes.jpg": ([], True),
    "two frames.jpg": ([], True),
    "second frame cut.jpg": ([], True),
    "rotated.jpg": ([("is rotated by EXIF", ASK_FOR_UPRIGHT)], True),
    "pixel.jpg": ([], True),
    "cmyk.jpg": ([("has CMYK colours", READ_AS_RGB)], False),
    "junk in the header.jpg": ([], False),
    "png.jpg": ([("is PNG, not what its suffix says", READ_AS_IT_IS)], True),
    "gif.jpg": ([("is GIF, not what its suffix says", READ_AS_IT_IS)], False),
    "truncated.jpg": ([("is truncated", STOPS)], False),
    "truncated progressive.jpg": ([("is truncated", STOPS)], False),
    "text.jpg": ([("is not an image that can be read", REFUSED)], False),
    "empty.jpg": ([("is not an image that can be read", REFUSED)], False),
    "gray.png": ([], True),
    "rgb.png": ([], True),
    "bilevel.png": ([], False),
    "rgba.png": ([("has transparent pixels", OPAQUE)], False),
    "la.png": ([("has transparent pixels", OPAQUE)], False),
    "palette.png": ([("has transparent pixels", OPAQUE)], False),
    "colour key.png": ([], False),  # no pixel has that colour
    "animated.png": ([("holds several pictures", READ_AS_FIRST)], False),
    "rgb16.png": ([("has more than 8 bits a colour", READ_WITH_8_BITS)], False),
    "gray16.png": ([("has more than 8 bits a colour", REFUSED_AS_DEEP)], False),
    "truncated.png": ([("is truncated", STOPS)], False),
    "bad data.png": ([("does not decode", STOPS)], True),
    "webp.webp": ([], False),
    "bmp.bmp": ([], False),
}


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray) -> bytes:
    """A PNG of (h, w) or (h, w, channels) uint16 pixels, which Pillow does not write."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 1]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_of_palette(*chunks: bytes) -> bytes:
    """A PNG of 16 x 16 pixels that count through 256 colours, with these parts before them."""
    header = struct.pack(">IIBBBBB", 16, 16, 8, 3, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(range(16 * row, 16 * row + 16)) for row in range(16))
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def odd_files() -> dict[str, bytes]:
    pictures = iter(photo(seed, 100 + 3 * seed, 160 - 2 * seed) for seed in range(100))
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient = Image.linear_gradient("L")

    def transparent(mode: str) -> Image.Image:
        image = next(pictures).convert(mode)
        image.putalpha(gradient.resize(image.size))
        return image

    jpeg, progressive = (encode(next(pictures), "JPEG", progressive=choice) for choice in (False, True))
    two = encode(next(pictures), "MPO", save_all=True, append_images=[next(pictures)])
    scans = [i for i in range(len(progressive)) if progressive.startswith(b"\xff\xda", i)]
    deep = np.asarray(next(pictures), np.uint16) * 256 + np.uint16(77)
    rgb = encode(next(pictures), "PNG")
    data = rgb.index(b"IDAT") + 400
    return {
        "gray.jpg": encode(next(pictures).convert("L"), "JPEG"),
        "progressive.jpg": progressive,
        "progressive, scans missing.jpg": progressive[: scans[4]] + b"\xff\xd9",
        "restarts.jpg": encode(next(pictures), "JPEG", restart_marker_blocks=3),
        "trailing bytes.jpg": jpeg + b"\0" * 100,
        "two frames.jpg": two,
        "second frame cut.jpg": two[:-500],
        "rotated.jpg": encode(next(pictures), "JPEG", exif=exif),
        "pixel.jpg": encode(next(pictures).resize((1, 1)), "JPEG"),
        "cmyk.jpg": encode(next(pictures).convert("CMYK"), "JPEG"),
        "junk in the header.jpg": jpeg[:20] + b"junk" + jpeg[20:],
        "png.jpg": encode(next(pictures), "PNG"),
        "gif.jpg": encode(next(pictures), "GIF"),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated progressive.jpg": progressive[: scans[4]],
        "text.jpg": b"not an image",
        "empty.jpg": b"",
        "gray.png": encode(next(pictures).convert("L"), "PNG"),
        "rgb.png": rgb,
        "bilevel.png": encode(gradient.convert("1", dither=Image.Dither.NONE), "PNG"),
        "rgba.png": encode(transparent("RGB"), "PNG"),
        "la.png": encode(transparent("L"), "PNG"),
        "palette.png": encode(next(pictures).quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
        "colour key.png": encode(next(pictures), "PNG", transparency=(100, 100, 100)),
        "animated.png": encode(next(pictures), "PNG", save_all=True, append_images=[gradient.convert("RGB")]),
        "rgb16.png": png(deep),
        "gray16.png": png(deep[..., 0]),
        "truncated.png": rgb[: len(rgb) // 2],
        "bad data.png": rgb[:data] + bytes(x ^ 0xFF for x in rgb[data : data + 40]) + rgb[data + 40 :],
        "webp.webp": encode(next(pictures), "WEBP"),
        "bmp.bmp": encode(next(pictures), "BMP"),
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A class folder of all the files."""
    root = tmp_path_factory.mktemp("odd")
    write(root, odd_files())
    return root


@pytest.fixture(scope="module")
def readable(odd, tmp_path_factory) -> DatasetIndex:
    """Those of the files at which nothing stops."""
    root = tmp_path_factory.mktemp("readable")
    stopping = {Path(finding.location).name for finding in verify([open_source(odd)], []) if finding.stops}
    write(root, {name: content for name, content in odd_files().items() if name not in stopping})
    return scan_classes(root)


def write(root: Path, files: dict[str, bytes]) -> Path:
    (root / "a").mkdir(parents=True)
    for name, content in files.items():
        (root / "a" / name).write_bytes(content)
    return root


def plans_for(index, config, crops=None):
    if crops:
        return list(evaluation_plans(index, config, crops=crops, batch_size=8, rank=0, ranks=1))
    options = dict(seed=1, first_step=0, batch_size=8, rank=0, ranks=1, accumulation=1)
    return [plan for epoch in range(4) for plan in training_plans(index, config, epoch=epoch, **options)]


def test_what_is_said_of_each_file(odd):
    said = {name: [] for name in EXPECTED}
    for finding in verify([open_source(odd)], []):
        said[Path(finding.location).name].append((finding.fault, finding.outcome))
    assert said == {name: findings for name, (findings, _) in EXPECTED.items()}


def test_which_files_dali_decodes(odd):
    plain = {name: is_plain(np.fromfile(odd / "a" / name, np.uint8)) for name in EXPECTED}
    assert plain == {name: by_dali for name, (_, by_dali) in EXPECTED.items()}


@pytest.mark.parametrize("name", [name for name, (findings, _) in EXPECTED.items() if findings])
def test_what_is_said_is_what_happens(odd, tmp_path, name):
    content = (odd / "a" / name).read_bytes()
    ((_, outcome),) = EXPECTED[name][0]
    write(tmp_path, {name: content, **{f"{i}.jpg": encode(photo(i, 60, 60), "JPEG") for i in range(3)}})
    if outcome in (REFUSED, REFUSED_AS_DEEP):
        with pytest.raises(UserError, match=f"{name} .*: {outcome.split('; ')[1]}"):
            scan_classes(tmp_path)
        return
    index = scan_classes(tmp_path)
    for loader in ("native", "dali", "reference"):
        config = DataConfig(crop_size=56, resize_size=64, loader=loader)
        skip = DataConfig(crop_size=56, resize_size=64, loader=loader, corrupt_images="skip")
        evaluation = EvaluationLoader(index, skip, CPU, batch_size=4, crops=1)
        training, skipping = (
            TrainingLoader(index, choice, CPU, seed=1, batch_size=4, accumulation=1) for choice in (config, skip)
        )
        if outcome == STOPS:
            for batches in (training.batches(0), evaluation.batches()):
                with pytest.raises(CorruptImageError, match=f"{name} does not decode"):
                    list(batches)
        else:
            assert next(training.batches(0)).weights.sum() == 4 and next(evaluation.batches()).weights.sum() == 4
        assert next(skipping.batches(0)).weights.sum() == (3 if outcome == STOPS else 4)
    if outcome in (READ_AS_RGB, READ_WITH_8_BITS):
        assert not is_plain(np.frombuffer(content, np.uint8))
    elif outcome == ASK_FOR_UPRIGHT:
        stored = Image.open(io.BytesIO(content))
        i = index.names.index(f"a/{name}")
        assert stored.getexif()[0x0112] != 1 and index.sizes[i].tolist() == [stored.height, stored.width]


def test_both_loaders_decode_alike_to_the_bit(readable):
    image_pipeline = CutPipeline("decode", readable, "torch7-bicubic", threads=2, batch_size=8)
    compared = set()
    for plan, images in image_pipeline.run(plans_for(readable, DataConfig(crop_size=56, resize_size=64))):
        for i, image, (top, left, height, width) in zip(
            plan.ids.tolist(), images, plan.crop_boxes.tolist(), strict=True
        ):
            expected = np.asarray(decode(np.fromfile(readable.location(i), np.uint8), readable.location(i)))
            expected = expected[top : top + height, left : left + width]
            np.testing.assert_array_equal(np.asarray(image), expected, err_msg=readable.location(i))
            compared.add(i)
    assert len(compared) == len(readable)


@pytest.mark.parametrize("crops", [None, 1, 10])
def test_both_loaders_make_the_same_of_them(readable, crops):
    """Within the tolerances of test_image_pipelines.py."""
    results = []
    for loader in ("dali", "reference"):
        config = DataConfig(crop_size=56, resize_size=64, loader=loader)
        image_pipeline = create_image_pipeline(readable, config, CPU, batch_size=8, views=crops or 1)
        results.append(torch.cat([pixels for _, pixels in image_pipeline.run(plans_for(readable, config, crops))]))
    difference = (results[0] - results[1]).abs()
    assert difference.mean() < 0.02 and difference[:, :, 4:-4, 4:-4].max() <= 2.5 and difference.max() <= 30


def test_archives_are_verified_as_folders_are(odd, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(odd / "a", "a")
    loose, packed = (list(verify([open_source(root)], [])) for root in (odd, tmp_path / "train.tar"))
    at_home = [dataclasses.replace(x, location=f"a/{Path(x.location).name} in {tmp_path / 'train.tar'}") for x in loose]
    assert packed == at_home and len(packed) > 10


def test_what_cannot_be_read_is_listed(odd, tmp_path):
    write(tmp_path, {"good.jpg": odd_files()["gray.jpg"]})
    (tmp_path / "a" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    unreadable, again, duplicate = verify([open_source(tmp_path)], [open_source(tmp_path)])
    assert unreadable == again and unreadable.fault == "cannot be read" and unreadable.stops
    assert "link.jpg" in unreadable.location and "good.jpg" in duplicate.location
    with pytest.raises(UserError, match="link.jpg cannot be read"):
        scan_classes(tmp_path)


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder in which a training image is also in the validation set."""
    write_class_folders(tmp_path / "data" / "train", 2, 6)
    write_class_folders(tmp_path / "data" / "val", 2, 4, seed=1000)
    twin = tmp_path / "data" / "val" / "class1" / "twin.jpg"
    twin.write_bytes((tmp_path / "data" / "train" / "class1" / "image0003.jpg").read_bytes())
    return tmp_path / "data"


@pytest.mark.slow
def test_images_in_both_sets_are_listed(data, tmp_path):
    expected = f"{data}/train/class1/image0003.jpg is a validation image too ({data}/val/class1/twin.jpg): counted as"
    (finding,) = verify([open_source(data / "train")], [open_source(data / "val")])
    assert str(finding).startswith(expected) and not finding.stops
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        tar.add(data / "val" / "class1" / "twin.jpg", "ILSVRC2012_val_00000001.JPEG")
    for words in (
        [data],
        [data / "train", "--against", data / "val"],
        [data / "train", "--against", tmp_path / "flat.tar"],
    ):
        done = run_module("tools.index", *words, "--verify")
        assert done.returncode == 0, done.stderr
        assert "image0003.jpg is a validation image too" in done.stdout
        assert "         1  is a validation image too: counted as" in done.stdout
        assert done.stdout.count("images     6 in") == 1
        assert done.stdout.count("images     5 in") == (words == [data])


def test_images_twice_in_a_set_are_listed_by_what_comes_of_them(data):
    image = (data / "train" / "class0" / "image0000.jpg").read_bytes()
    (data / "val" / "class1" / "twin.jpg").unlink()
    for place in ("train/class0/copy.jpg", "train/class1/copy.jpg"):
        (data / place).write_bytes(image)
    image = (data / "val" / "class1" / "image0001.jpg").read_bytes()
    for place in ("val/class1/copy.jpg", "val/class0/image0001.jpg"):  # the latter is then the first
        (data / place).write_bytes(image)
    trained, validated = f"{data}/train/class0/copy.jpg", f"{data}/val/class0/image0001.jpg"
    assert [str(issue) for issue in verify([open_source(data / "train")], [open_source(data / "val")])] == [
        f"{data}/val/class1/copy.jpg has another class in validation too ({validated}): at least one is counted as wrong; "
        "remove the wrong one",
        f"{data}/val/class1/image0001.jpg has another class in validation too ({validated}): at least one is counted as wrong; "
        "remove the wrong one",
        f"{data}/train/class0/image0000.jpg is in training twice ({trained}): trained on twice an epoch, and data.holdout may "
        "hold out one of the two; remove one",
        f"{data}/train/class1/copy.jpg has another class in training too ({trained}): the network learns both; remove the "
        "wrong one",
    ]
    table = data / "train" / "list.csv"
    table.write_text("file,label\nclass0/image0000.jpg,a\nclass0/copy.jpg,b\nclass0/image0002.jpg,b\n")
    *_, issue = verify([open_source(table)], [])  # the ones before: images that the table does not name
    assert (issue.location, issue.fault) == (
        str(data / "train/class0/image0000.jpg"),
        "has another class in training too",
    )


def test_transparent_and_empty_images_are_listed(tmp_path, capsys):
    """By their pixels where these are read, by their headers where an index is made."""
    flat, symbol = Image.new("RGB", (40, 40), (9, 0, 0)), Image.new("RGBA", (40, 40))
    symbol.paste((0, 0, 0, 255), (10, 10, 20, 20))  # black on transparent black
    opaque = photo(0, 40, 40)
    opaque.putalpha(255)
    deep = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)
    files = {"flat.png": encode(flat, "PNG"), "symbol.png": encode(symbol, "PNG"), "opaque.png": encode(opaque, "PNG")}
    write(tmp_path / "colours", files)
    keyed = {"none.png": encode(deep, "PNG", transparency=41), "one.png": encode(deep, "PNG", transparency=80)}
    write(tmp_path / "gray", {**keyed, "white.png": encode(Image.new("I;16", (9, 9), 65535), "PNG")})
    listed = [
        verify([open_source(tmp_path / "colours")], []),
        verify([open_source(tmp_path / "gray")], [], PixelFormat(16)),
    ]
    assert [[(Path(issue.location).name, issue.fault) for issue in issues] for issues in listed] == [
        [
            ("flat.png", "is of one colour"),
            ("symbol.png", "has transparent pixels"),
            ("symbol.png", "is of one colour"),
        ],
        [("one.png", "has transparent pixels"), ("white.png", "is of one colour")],
    ]
    clear = np.dstack([np.arange(256, dtype=np.uint16).reshape(16, 16) * 256] * 4)  # of 16 bits, also the transparency
    write(tmp_path / "deep", {"la.png": png(clear[..., :2]), "rgba.png": png(clear), "rgb.png": png(clear[..., :3])})
    faults = [issue.fault for issue in verify([open_source(tmp_path / "deep")], []) if "bits" not in issue.fault]
    assert faults == ["has transparent pixels"] * 2
    write(tmp_path / "small", {"pixel.png": encode(flat.resize((1, 1)), "PNG")})
    assert list(verify([open_source(tmp_path / "small")], [])) == []
    capsys.readouterr()
    scan_classes(tmp_path / "colours", tmp_path / "index")
    first = f"{tmp_path}/colours/a/opaque.png may have transparent pixels (and 1 more): {OPAQUE}"
    assert capsys.readouterr().err == f"warning: {first}\n"
    scan_classes(tmp_path / "colours", tmp_path / "index")
    assert not capsys.readouterr().err


def test_damaged_palettes_stop_nothing(tmp_path, capsys):
    """Pillow reads such files, and stumbles over the question whether they have transparent pixels."""
    short, long = chunk(b"PLTE", bytes(range(30))), chunk(b"tRNS", bytes(300))
    content = {"none.png": png_of_palette(), "long.png": png_of_palette(short, long)}
    (issue,) = verify([open_source(write(tmp_path, content))], [])
    assert (Path(issue.location).name, issue.fault) == ("none.png", "is of one colour")  # black
    assert len(scan_classes(tmp_path)) == 2
    assert "none.png" not in capsys.readouterr().err


def test_an_image_with_one_class_in_training_and_another_in_validation_is_listed_as_that(data, tmp_path):
    """Of a flat set, whose labels are elsewhere, the classes are not known, nor where a table spells them otherwise."""
    (data / "val" / "class1" / "twin.jpg").rename(data / "val" / "class0" / "twin.jpg")
    place, twin = data / "train" / "class1" / "image0003.jpg", data / "val" / "class0" / "twin.jpg"
    (issue,) = verify([open_source(data / "train")], [open_source(data / "val")])
    assert str(issue) == (
        f"{place} is a validation image of another class too ({twin}): counted as wrong if the network has learned it; correct "
        "the label that is wrong, or remove one"
    )
    (tmp_path / "flat").mkdir()
    shutil.copyfile(twin, tmp_path / "flat" / "twin.jpg")
    (issue,) = verify([open_source(data / "train")], [open_source(tmp_path / "flat")])
    assert issue.fault == "is a validation image too"
    table = data / "val" / "list.csv"
    table.write_text("file,label\nclass0/twin.jpg,1\n")  # numbers, of which training has none
    *_, issue = verify([open_source(data / "train")], [open_source(table)])
    assert issue.fault == "is a validation image too"


@pytest.mark.slow
def test_the_command_lists_all_and_fails_if_something_would_stop(data):
    for name, content in (("text.jpg", b"text"), ("cut.jpg", odd_files()["truncated.jpg"])):
        (data / "train" / "class0" / name).write_bytes(content)
        (data / "val" / "class0" / name).write_bytes(content)
    (data / "val" / "class0" / "cmyk.jpg").write_bytes(odd_files()["cmyk.jpg"])
    done = run_module("tools.index", data, "--verify")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: 4 of what is listed would stop the index or a run")
    for line in (
        "val/class0/cmyk.jpg has CMYK",
        "train/class0/text.jpg is not an image",
        f"train/class0/cut.jpg is truncated: {STOPS}",
        "val/class0/cut.jpg is truncated: stops a run; repair or remove it",
    ):
        assert line in done.stdout
    assert "class0/cut.jpg is a validation image too" not in done.stdout  # nothing that a network can learn
    assert "images     " not in done.stdout  # there is no index of these


def test_nothing_odd(data):
    (data / "val" / "class1" / "twin.jpg").unlink()
    done = run_module("tools.index", data, "--verify")
    assert done.returncode == 0 and re.search(r"no image is odd \(\d+ images read\)", done.stdout)


@pytest.mark.slow
def test_arguments_that_do_not_fit(data):
    for words in ([data, "--against", data / "val", "--verify"], [data / "train", "--against", data / "val"]):
        done = run_module("tools.index", *words)
        assert done.returncode == 2 and "--against needs --verify" in done.stderr
