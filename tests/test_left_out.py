"""One rule says which files are images: nothing is left out without a line, and what stops is named together.

Tests may run as root, who may read everything: permissions are simulated where the operating system is asked.
"""

import dataclasses
import errno
import io
import os
import pickle
import re
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo, run_module, write_class_folders
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.dataset import open_datasets
from pipeline.data.image_files import RefusedImageError, is_image_by_content, open_image
from pipeline.data.loader import EvaluationLoader, Shard
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes
from pipeline.data.sources import open_source
from pipeline.data.verify import verify
from pipeline.errors import UserError

CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
READ = {
    "a.jpg": "JPEG", "b.JPEG": "JPEG", "c.jpe": "JPEG", "d.jfif": "JPEG", "e.png": "PNG", "f.gif": "GIF", "g.tif": "TIFF",
    "h.tiff": "TIFF", "i.bmp": "BMP", "j.webp": "WEBP", "k.jp2": "JPEG2000", "l.avif": "AVIF", "m.ppm": "PPM", "n.tga": "TGA",
    "without suffix": "JPEG", "odd.xyz": "PNG", "dots.in.name.2024": "JPEG",
}  # fmt: skip


@pytest.fixture
def images(tmp_path) -> Path:
    return write_class_folders(tmp_path / "train", 2, 6)


def test_what_pillow_reads_is_read(tmp_path, capfd):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for i, (name, kind) in enumerate(READ.items()):
        photo(i, 40 + i, 50).save(tmp_path / "train" / "cat" / name, kind)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "train" / "cat", "cat")
    index = scan_classes(tmp_path / "train")
    assert sorted(index.names) == sorted(f"cat/{name}" for name in READ)
    assert scan_classes(tmp_path / "train.tar").fingerprint == index.fingerprint
    assert capfd.readouterr().err == ""
    for loader in ("native", "dali", "reference"):
        config = DataConfig(crop_size=24, resize_size=28, loader=loader)
        batches = EvaluationLoader(index, config, CPU, batch_size=8, crops=1).batches()
        assert sum(len(batch.ids) for batch in batches) == len(READ)


def odd_ones_into(images: Path) -> dict[str, int]:
    """Put in what is no image or belongs to no class; return the faults and how many have each."""
    cat, jpeg = images / "class0", (images / "class0" / "image0000.jpg").read_bytes()
    for hidden in (cat / "._image0000.jpg", cat / ".DS_Store", images / ".directory"):
        hidden.write_bytes(jpeg)
    for folder in (cat / ".ipynb_checkpoints", cat / "@eaDir", images / "__MACOSX", images / "lost+found"):
        folder.mkdir()
        (folder / "image0000-checkpoint.jpg").write_bytes(jpeg)
    (cat / "notes.txt").write_text("of cats")
    (cat / "labels").write_text("cat")
    (cat / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (images / "README.md").write_text("about")
    (images / "loose.jpg").write_bytes(jpeg)
    os.mkfifo(cat / "pipe.jpg")
    Image.new("RGB", (30, 30)).save(
        cat / "moving.gif", save_all=True, append_images=[Image.new("RGB", (30, 30), (255, 0, 0))]
    )
    return {
        "is hidden": 4,
        "was made by the operating system": 3,
        "is no image": 2,
        "is a .heic file, which Pillow does not read here": 1,
        "lies beside the class folders": 2,
        "is a named pipe, a socket or a device": 1,
        "holds several pictures": 1,
    }


@pytest.mark.slow
def test_what_is_left_out_is_told_once_with_its_number(images, tmp_path, capfd):
    before = scan_classes(images)
    faults = odd_ones_into(images)
    capfd.readouterr()
    index = scan_classes(images, tmp_path / "cache")
    assert set(index.names) == {*before.names, "class0/moving.gif"}
    lines = capfd.readouterr().err.splitlines()
    others = {
        fault: re.search(r"\(and (\d+) more\)", line) for line in lines for fault in faults if f" {fault}" in line
    }
    told = {fault: 1 + int(found[1] if found else 0) for fault, found in others.items()}
    assert told == faults and len(lines) == len(faults)
    assert all(line.startswith("warning: ") and str(images) in line for line in lines)
    scan_classes(images, tmp_path / "cache")
    assert capfd.readouterr().err == ""  # they are as they were

    issues = list(verify([open_source(images)], []))
    counts = {fault: sum(issue.fault == fault for issue in issues) for fault in faults}
    assert counts == faults and not any(issue.stops for issue in issues)
    done = run_module("tools.index", images, "--verify")
    assert done.returncode == 0, done.stderr
    assert "no image is odd" not in done.stdout and "         4  is hidden: left out" in done.stdout


def test_archives_leave_out_the_same(images, tmp_path, capfd):
    odd_ones_into(images)
    (images / "class1" / "twin.jpg").symlink_to(images / "class1" / "image0001.jpg")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(images, "train")
    capfd.readouterr()
    index = scan_classes(tmp_path / "train.tar")
    assert set(index.names) == {f"class{i % 2}/image{i:04d}.jpg" for i in range(6)} | {"class0/moving.gif"}
    text = capfd.readouterr().err
    for fault in (
        "is hidden", "was made by the operating system", "is no image", ".heic file", "is a link inside an archive",
        "is a named pipe", "holds several pictures", "lies beside the class folders",
    ):  # fmt: skip
        assert fault in text


def test_the_first_picture_is_read_of_several(tmp_path):
    (tmp_path / "cat").mkdir()
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    pictures = [Image.new("RGB", (20, 20), color) for color in colors]
    for name in ("a.gif", "b.tif", "c.webp", "d.png"):
        options = {"lossless": True} if name == "c.webp" else {}
        pictures[0].save(tmp_path / "cat" / name, save_all=True, append_images=pictures[1:], **options)
    said = [str(issue).split("/")[-1] for issue in verify([open_source(tmp_path)], [])]
    for name in ("a.gif", "b.tif", "c.webp", "d.png"):
        assert f"{name} holds several pictures: read as its first" in said
    for loader in ("native", "dali", "reference"):
        config = DataConfig(crop_size=20, resize_size=20, loader=loader, mean=(0, 0, 0), std=(1, 1, 1))
        (batch,) = EvaluationLoader(scan_classes(tmp_path), config, CPU, batch_size=8, crops=1).batches()
        np.testing.assert_allclose(batch.images[:, 0].mean(dim=(1, 2)), 200 / 255, atol=0.01)
        np.testing.assert_allclose(batch.images[:, 1:].mean(), 0, atol=0.01)


def refuse(monkeypatch, function: str, path: Path, number: int) -> None:
    """Have ``os.FUNCTION`` fail for this path, as for a user who may not, or on a broken disk."""
    real = getattr(os, function)

    def failing(name, *arguments, **options):
        if os.fspath(name) == str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("number", [13, 5])  # EACCES, EIO
@pytest.mark.parametrize("function", ["listdir", "stat"])
@pytest.mark.parametrize("below", [".", "class0", "class0/more"])
def test_a_folder_that_cannot_be_read_stops(images, monkeypatch, function, below, number):
    write_class_folders(images / "class0" / "more", 1, 3)
    assert len(scan_classes(images)) == 9
    folder = images / below if below != "." else images
    refuse(monkeypatch, function, folder, number)
    with pytest.raises(UserError, match=f"{folder}.*{os.strerror(number)}.*permissions") as error:
        scan_classes(images)
    assert "has no images" not in str(error.value)


def test_a_cached_class_does_not_hide_a_folder_that_cannot_be_read_any_more(images, tmp_path, monkeypatch):
    (images / "class0" / "empty").mkdir()
    scan_classes(images, tmp_path / "cache")
    refuse(monkeypatch, "listdir", images / "class0" / "empty", 13)
    with pytest.raises(UserError, match="class0/empty cannot be read"):
        scan_classes(images, tmp_path / "cache")


def test_a_file_that_may_not_be_opened_stops(images, monkeypatch):
    file, real = images / "class1" / "image0001.jpg", io.open

    def failing(name, *arguments, **options):
        if name == str(file):
            raise PermissionError(13, "Permission denied", name)
        return real(name, *arguments, **options)

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(UserError, match=r"image0001.jpg cannot be read \(Permission denied\).*permissions"):
        scan_classes(images)


def test_all_that_stops_is_named_together_up_to_a_few(images):
    (images / "class2").mkdir()
    (images / "class3").symlink_to(images / "nowhere")
    (images / "class0" / "text.jpg").write_text("no image")
    (images / "class0" / "itself.jpg").symlink_to(images / "class0" / "itself.jpg")
    with pytest.raises(UserError) as error:
        scan_classes(images)
    for part in (
        "4 things stop the index of", "class2 in", "class3 cannot be read (a link that leads nowhere)",
        "text.jpg is not an image", "itself.jpg cannot be read (Too many levels of symbolic links)", "--verify lists all",
    ):  # fmt: skip
        assert part in str(error.value)
    for i in range(7):
        (images / "class1" / f"text{i}.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"11 things stop .*; and 6 more \(python -m tools.index"):
        scan_classes(images)
    done = run_module("tools.index", images, "--verify")
    assert done.returncode == 2 and done.stdout.count("is not an image that can be read") == 8 + 1


def test_files_that_are_no_images_are_left_out_of_training_on_request(images, tmp_path, capfd):
    """They are told at each start, and an index that does not leave them out stops at them, whatever the cache knows."""
    before = scan_classes(images)
    odd, jpeg = images / "class0", (images / "class0" / "image0000.jpg").read_bytes()
    (odd / "empty.jpg").write_bytes(b"")
    (odd / "text.jpg").write_text("no image")
    (odd / "cut.jpg").write_bytes(jpeg[:100])
    shutil.copytree(images, tmp_path / "val")
    config = DataConfig(dir=str(tmp_path), corrupt_images="skip", holdout=1)
    for _ in range(2):
        parts = open_datasets(config, tmp_path / "cache", progress=False)
        assert sorted(name for part in parts for name in part.names) == sorted(before.names)
        assert "class0/cut.jpg is not an image that can be read (and 2 more): left out" in capfd.readouterr().err
    for fields in ({"corrupt_images": "stop"}, {"holdout": 0}):  # an error is over all images
        with pytest.raises(UserError, match="3 things stop the index") as error:
            open_datasets(dataclasses.replace(config, **fields), tmp_path / "cache", progress=False)
        for name, reason in (
            ("empty", "the file is empty"),
            ("text", "Pillow knows no such format"),
            ("cut", "[Tt]run"),
        ):
            assert re.search(rf"{name}.jpg is not an image that can be read \([^)]*{reason}", str(error.value))
        remedy = "or have it left out of training with data.corrupt_images skip"
        assert (remedy in str(error.value)) == ("corrupt_images" in fields)  # it helps training images alone


@pytest.mark.parametrize("labels", ["single", "multi"])
def test_lines_of_a_table_that_name_no_image_are_left_out_on_request(images, labels, capfd):
    files = sorted(str(file.relative_to(images)) for file in images.rglob("*.jpg"))
    rows = [f"{file},{'even' if i % 2 else 'odd'}" for i, file in enumerate(files)]
    for table, lines in (("train.csv", rows), ("val.csv", rows[:3])):
        (images / table).write_text("\n".join(["file,label" if labels == "single" else "file,labels", *lines]))
    config = DataConfig(dir=str(images), train="train.csv", val="val.csv", labels=labels, corrupt_images="skip")

    def training(**fields) -> dict[str, object]:
        index, _ = open_datasets(dataclasses.replace(config, **fields), None, progress=False)
        return dict(zip(index.names, index.labels.tolist(), strict=True))

    whole = training()
    (images / files[3]).write_bytes(b"")
    assert training() == {name: label for name, label in whole.items() if name != files[3]}
    assert f"{files[3]} is not an image that can be read: left out" in capfd.readouterr().err
    with pytest.raises(UserError, match=f"{files[3]} is not an image that can be read"):
        training(corrupt_images="stop")


@pytest.mark.parametrize("target", [".", "class0", "class1"])
def test_links_in_a_circle_end(images, target):
    (images / "class0" / "again").symlink_to(images / target, target_is_directory=True)
    if target == "class1":  # no circle
        assert len(scan_classes(images)) == 9
        return
    with pytest.raises(
        UserError, match="the link .*class0/again leads to a folder that is already part of .*: remove it"
    ):
        scan_classes(images)


def test_a_link_to_itself_beside_the_classes_stops(images):
    (images / "loop").symlink_to(images / "loop")
    with pytest.raises(UserError, match="loop cannot be read .Too many levels"):
        scan_classes(images)


def test_links_to_classes_and_images_are_followed(images, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in ("class0", "class1"):
        (tmp_path / "linked" / name).symlink_to(images / name)
    assert scan_classes(tmp_path / "linked").fingerprint == scan_classes(images).fingerprint


def test_a_cache_of_another_user_is_no_obstacle(images, tmp_path, monkeypatch, capfd):
    cache = tmp_path / "cache" / "index.jsonl"
    first = scan_classes(images, cache)
    real = io.open

    def failing(name, *arguments, **options):
        if name == cache:
            raise PermissionError(13, "Permission denied", name)
        return real(name, *arguments, **options)

    monkeypatch.setattr("builtins.open", failing)
    assert scan_classes(images, cache).fingerprint == first.fingerprint
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "cannot be read (Permission denied)" in lines[0] and "cannot be written" in lines[1]
    assert all(str(cache) in line for line in lines)


def test_a_limit_on_threads_is_one_line(images, monkeypatch):
    def no_more(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with pytest.raises(UserError, match="not enough memory or threads to index .*: raise the limits"):
        scan_classes(images)


def test_indexes_go_to_other_processes(images, tmp_path):
    """Without what is open in this one."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(images, "train")
    for root in (images, tmp_path / "train.tar"):
        index = scan_classes(root)
        expected = Reader(index).read(2)
        again = pickle.loads(pickle.dumps(index))
        np.testing.assert_array_equal(Reader(again).read(2), expected)
        assert again.location(2) == index.location(2) and again.root == str(root)


def test_compressed_archives_are_named_as_such(images, tmp_path):
    for suffix, program in (("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")):
        with tarfile.open(tmp_path / f"train.tar.{suffix}", f"w:{suffix}") as tar:
            tar.add(images, "train")
        with pytest.raises(UserError, match=f"train.tar.{suffix} is compressed.*: {program} it"):
            scan_classes(tmp_path / f"train.tar.{suffix}")
    shutil.move(tmp_path / "train.tar.gz", tmp_path / "class0.tar")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "class0.tar", "class0.tar")
    with pytest.raises(UserError, match="train.tar holds a compressed archive: .*gunzip"):
        scan_classes(tmp_path / "train.tar")


def test_an_error_of_the_disk_makes_no_image_corrupt(tmp_path):
    """It may pass: data.corrupt_images skip must not leave the image out, nor must a file without a suffix vanish."""

    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    for look in (lambda stream: open_image(stream, "a.jpg"), is_image_by_content):
        with pytest.raises(OSError, match="Input/output error"):
            look(Broken(b"x" * 100))


def test_a_format_that_pillow_gives_up_in_its_own_way_is_named(tmp_path):
    photo(1, 8, 8).save(whole := io.BytesIO(), "DDS")
    content = bytearray(whole.getvalue())
    content[80:84] = (4).to_bytes(4, "little")  # DDPF_FOURCC
    content[84:88] = b"ABCD"  # a pixel format that Pillow does not know: NotImplementedError
    with pytest.raises(RefusedImageError, match=r"a.dds is not an image that can be read \(Unimplemented pixel format"):
        open_image(io.BytesIO(content), "a.dds")
