"""ImageNet as it is downloaded: a tar of tars and a flat tar with the development kit, against the unpacked folders."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config
from scipy.io import savemat

from pipeline import trainer
from pipeline.checkpoint import load_checkpoint
from pipeline.data import scan_group
from pipeline.data.archive import RULE
from pipeline.data.index_cache import cache_beside
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes, scan_flat
from pipeline.errors import UserError
from tools.lab import archives


@pytest.fixture(scope="module")
def packed(image_folders, tmp_path_factory) -> Path:
    """`image_folders` as ImageNet's three archives, and its validation images unpacked flat with a label file."""
    root = tmp_path_factory.mktemp("packed")
    classes = sorted(os.listdir(image_folders / "train"))
    with tarfile.open(root / "train.tar", "w") as outer:
        for name in reversed(classes):  # the order within an archive is not the order of the index
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for file in sorted((image_folders / "train" / name).iterdir(), reverse=True):
                    tar.add(file, file.name)
            entry = tarfile.TarInfo(f"{name}.tar")
            entry.size = inner.tell()
            inner.seek(0)
            outer.addfile(entry, inner)
    # Validation: flat names, numbers in the ground truth, ids by number in meta.mat
    (root / "val").mkdir()
    numbers = {name: 3 * i + 5 for i, name in enumerate(classes)}
    truth = []
    files = sorted((image_folders / "val").rglob("*.jpg"), key=lambda file: file.name)
    with tarfile.open(root / "val.tar", "w") as tar:
        for i, file in enumerate(files):
            name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
            tar.add(file, name)
            (root / "val" / name).write_bytes(file.read_bytes())
            truth.append(file.parent.name)
    kit = root / "ILSVRC2012_devkit_t12"
    (kit / "data").mkdir(parents=True)
    synsets = np.array(
        [(numbers[name], name, f"words of {name}") for name in classes],
        dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")],
    )
    savemat(kit / "data" / "meta.mat", {"synsets": synsets})
    lines = "".join(f"{numbers[name]}\n" for name in truth)
    (kit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    with tarfile.open(root / "devkit.tar.gz", "w:gz") as tar:
        tar.add(kit, kit.name)
    (root / "labels.txt").write_text("\n".join(truth) + "\n")
    (root / "train").symlink_to(image_folders / "train")
    return root


def assert_same(a, b):
    assert (a.names, a.classes, a.fingerprint) == (b.names, b.classes, b.fingerprint)
    for field in ("labels", "sizes", "lengths"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_a_tar_of_tars_is_indexed_as_its_folders(packed):
    index = scan_classes(packed / "train.tar")
    assert_same(index, scan_classes(packed / "train"))
    assert index.root == str(packed / "train.tar") and index.location(0).endswith(" in " + index.root)


def test_a_tar_of_folders_is_indexed_as_its_folders(packed, tmp_path):
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        tar.add(packed / "train", "somewhere/train", filter=lambda entry: entry)
        for file in sorted((packed / "train").resolve().rglob("*.jpg"), reverse=True):
            tar.add(file, f"somewhere/train/{file.parent.name}/{file.name}")
    assert_same(scan_classes(tmp_path / "tree.tar"), scan_classes(packed / "train"))


def test_a_flat_tar_with_the_devkit_is_indexed_as_a_folder_with_labels(packed):
    classes = scan_classes(packed / "train").classes
    index = scan_flat(packed / "val.tar", packed / "devkit.tar.gz", classes)
    assert_same(index, scan_flat(packed / "val", packed / "labels.txt", classes))
    assert len(index) == 11


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_training_from_archives_equals_training_from_folders_to_the_bit(packed, tmp_path, loader):
    runs = []
    for name, data in (
        ("folders", {"train": "train", "val": "val", "val_labels": "labels.txt"}),
        ("archives", {"train": "train.tar", "val": "val.tar", "val_labels": "devkit.tar.gz"}),
    ):
        config = small_config(
            tmp_path / name, data={"dir": str(packed), "loader": loader, "crop_size": 24, "resize_size": 28, **data}
        )
        progress = trainer.fit(config)
        runs.append((progress, load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"]))
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name])


def test_the_cache_knows_an_archive_until_it_changes(packed, tmp_path, monkeypatch):
    archive, cache = tmp_path / "train.tar", tmp_path / "cache.jsonl"
    archive.write_bytes((packed / "train.tar").read_bytes())
    first = scan_classes(archive, cache)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.scan_group._read_header", lambda *_: pytest.fail("read a header again"))
        assert_same(scan_classes(archive, cache), first)
    os.utime(archive, ns=(1, 1))
    read = []
    real = scan_group._read_header
    monkeypatch.setattr("pipeline.data.scan_group._read_header", lambda *member: read.append(1) or real(*member))
    assert_same(scan_classes(archive, cache), first)
    assert len(read) == len(first)


def test_what_an_earlier_version_kept_of_an_archive_is_read_again(packed, tmp_path):
    """It may have stopped at a damaged header, or have an image twice."""
    archive, cache = packed / "train.tar", tmp_path / "cache.jsonl"
    first = scan_classes(archive, cache)
    rows = [json.loads(line) for line in cache.read_text().split("\n") if line]
    for row in rows:
        row["stamp"] = row["stamp"].removeprefix(f"{RULE} ")
        for column in ("names", "offsets", "lengths", "sizes"):
            del row[column][0]
    cache.write_text("".join(f"\n{json.dumps(row, separators=(',', ':'))}" for row in rows))
    assert_same(scan_classes(archive, cache), first)


def test_the_cache_lies_beside_the_data_or_in_the_run(packed, tmp_path, monkeypatch):
    assert cache_beside(packed / "train.tar", tmp_path).parent == packed
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert cache_beside(packed / "train.tar", tmp_path).parent == tmp_path


@pytest.mark.parametrize("validation", ["val", "dev"])
def test_a_tar_with_training_and_validation_in_it_is_refused(packed, tmp_path, validation):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for split in ("train", validation):
            tar.add(packed / "train" / "class0" / "image0000.jpg", f"{split}/class0/image.jpg")
            tar.add(packed / "train" / "class1" / "image0001.jpg", f"{split}/logo.jpg")  # a stray one
    with pytest.raises(UserError, match=f"holds {' and '.join(sorted(('train', validation)))}: parts of a data set"):
        scan_classes(tmp_path / "all.tar")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_tar_or_zip_file_has_the_classes_of_the_folder_that_was_packed(image_folders, tmp_path, kind):
    """Of a class that has all its images in folders, beside one that has none; and a whole data set is refused alike."""
    images, folder = sorted((image_folders / "train" / "class0").iterdir()), tmp_path / "folder"
    places = ("cat/1.jpg", "dog/poodle/2.jpg", "dog/beagle/3.jpg")
    for image, place in zip(images, places, strict=False):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, folder / place)
    expected, archive = scan_classes(folder), shutil.make_archive(str(tmp_path / "packed"), kind, folder)
    found = scan_classes(archive)
    assert found.classes == expected.classes == ("cat", "dog") and list(found.names) == list(expected.names)
    np.testing.assert_array_equal(found.labels, expected.labels)
    whole = tmp_path / "whole" / "competition"
    shutil.copytree(folder, whole / "train")
    shutil.copytree(folder / "cat", whole / "test")  # flat, as Kaggle's
    archive = shutil.make_archive(str(tmp_path / "whole"), kind, whole.parent)
    for root in (whole, archive):
        with pytest.raises(UserError, match="holds test and train: parts of a data set, which are no classes"):
            scan_classes(root)


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("inner", ["some", "images"])
def test_a_folder_in_a_class_folder_belongs_to_the_class_as_in_a_folder(image_folders, tmp_path, kind, inner):
    """In one class, beside its images; or in each, as Tiny ImageNet has them."""
    folder = tmp_path / "train"
    shutil.copytree(image_folders / "train", folder)
    for number, of_class in enumerate(sorted(folder.iterdir())):
        (of_class / "boxes.txt").write_text("beside the images")
        moved = sorted(of_class.glob("*.jpg"))[:: 1 if inner == "images" else 2]
        (of_class / inner).mkdir()
        for image in moved if number == 0 or inner == "images" else ():
            image.rename(of_class / inner / image.name)
    file = Path(shutil.make_archive(str(tmp_path / "train"), kind, tmp_path, "train"))
    assert_same(scan_classes(file), scan_classes(folder))


def test_a_sparse_file_is_refused(packed, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "hole.jpg").write_bytes((packed / "train" / "class0" / "image0000.jpg").read_bytes())
    os.truncate(tmp_path / "a" / "hole.jpg", 1 << 20)
    subprocess.run(["tar", "-cSf", tmp_path / "a.tar", "-C", tmp_path, "a"], check=True)
    with pytest.raises(UserError, match="hole.jpg in .*a.tar is a sparse file in the archive: pack it without tar -S"):
        scan_classes(tmp_path / "a.tar")


@pytest.mark.parametrize("damage", ["cut short", "no archive", "no classes"])
def test_wrong_archives_are_explained(packed, tmp_path, damage):
    archive = tmp_path / "train.tar"
    content = (packed / "train.tar").read_bytes()
    if damage == "no classes":
        with tarfile.open(archive, "w") as tar:
            tar.add(packed / "labels.txt", "labels.txt")
    else:
        archive.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"hello" * 1000)
    expected = {
        "cut short": "not a whole tar archive",
        "no archive": r"is of no known kind \(folder, zip file, tar archive, .*\): unpack it",
        "no classes": "no class folders",
    }
    with pytest.raises(UserError, match=expected[damage]):
        scan_classes(archive)


DAMAGES = {
    "a flipped bit": lambda whole, at, end: whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
    "cut before it": lambda whole, at, end: whole[:at],
    "cut in it": lambda whole, at, end: whole[: at + 100],
    "a hole of zeros": lambda whole, at, end: whole[: at - 700] + bytes(1212) + whole[at + 512 :],
    "nothing but zeros": lambda whole, at, end: whole[:at] + bytes(2 << 20),
    "no end": lambda whole, at, end: whole[:end],
    "another archive after the end": lambda whole, at, end: whole + whole,
}


@pytest.mark.parametrize("header", ["an image", "a class", "an image in a class"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_is_not_taken_for_the_end(packed, tmp_path, header, damage):
    """As tarfile takes it."""
    archive = tmp_path / "train.tar"
    if header == "an image":
        with tarfile.open(archive, "w") as tar:
            tar.add((packed / "train").resolve(), "train")
    else:
        archive.write_bytes((packed / "train.tar").read_bytes())
    last_image = int(scan_classes(archive).offsets.max()) - 512
    with tarfile.open(archive) as tar:
        last = tar.getmembers()[-1].offset
        content = DAMAGES[damage](archive.read_bytes(), last if header == "a class" else last_image, tar.offset)
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"train.tar is not a whole tar archive \(.*\): download or pack it again"):
        scan_classes(archive)


@pytest.mark.parametrize("writer", ["GNU tar", "GNU tar, the greatest record", "one block of zeros", "a cut end"])
def test_archives_end_in_several_ways(packed, tmp_path, writer):
    archive, folders = tmp_path / "train.tar", (packed / "train").resolve()
    blocks = "2048" if "greatest" in writer else "20"
    subprocess.run(["tar", "-b", blocks, "-cf", archive, "-C", folders.parent, "train"], check=True)
    with tarfile.open(archive) as tar:
        tar.getmembers()
        end = tar.offset
    if writer in ("one block of zeros", "a cut end"):
        os.truncate(archive, end + (512 if writer == "one block of zeros" else 700))
    assert_same(scan_classes(archive), scan_classes(folders))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["folders", "flat", "an archive a class", "a class again"])
def test_of_files_of_one_name_the_last_is_taken_and_told(packed, tmp_path, kind, capfd):
    """As tar -r and tar -u leave them: the repaired image comes after the damaged one."""
    archive = tmp_path / "train.tar"
    images = {f"{i}.jpg": (packed / "train" / "class0" / f"image{3 * i:04d}.jpg").read_bytes() for i in range(4)}
    before = {name: content[:-300] for name, content in images.items()}
    repaired = {f"./{name}" if name == "1.jpg" else name: images[name] for name in ("1.jpg", "2.jpg", "3.jpg")}
    inside = {"an archive a class": "cat.tar", "a class again": "cat.tar", "folders": "all/cat", "flat": ""}[kind]
    with tarfile.open(archive, "w") as tar:
        if kind in ("folders", "flat"):
            for name, content in (*before.items(), *repaired.items()):
                add(tar, os.path.join(inside, name), content)
        else:
            inner = tmp_path / "cat.tar"
            with tarfile.open(inner, "w") as of_class:
                for name, content in (*before.items(), *repaired.items()):
                    add(of_class, name, content)
            if kind == "a class again":
                add(tar, inside, b"no archive")
            tar.add(inner, inside)
    if kind == "flat":
        (tmp_path / "labels.txt").write_text("cat\n" * 4)
        index = scan_flat(archive, tmp_path / "labels.txt", ("cat",))
    else:
        index = scan_classes(archive)
    found = {os.path.basename(name): Reader(index).read(i).tobytes() for i, name in enumerate(index.names)}
    assert found == {**images, "0.jpg": before["0.jpg"]} and len(index) == 4
    first = {"folders": "all/cat/1.jpg", "flat": "1.jpg"}.get(kind, "cat/1.jpg")
    more = 3 if kind == "a class again" else 2
    told = f"is there more than once (and {more} more): the last one is taken, as when the archive is unpacked"
    assert capfd.readouterr().err == f"warning: {first} in {archive} {told}\n"


def test_labels_of_another_devkit_are_refused(packed):
    with pytest.raises(UserError, match="'class2' is none of the network's"):
        scan_flat(packed / "val.tar", packed / "devkit.tar.gz", ("class0", "class1"))


def test_an_image_in_an_archive_is_named_with_it(packed, tmp_path):
    index = scan_classes(packed / "train.tar")
    assert index.location(0) == f"class0/image0000.jpg in {packed / 'train.tar'}"
    assert scan_classes(packed / "train").location(0) == str(packed / "train" / "class0" / "image0000.jpg")


def test_the_benchmark_packs_the_same_images_twice_and_measures_both(image_folders, tmp_path, monkeypatch, capsys):
    archives.pack(scan_classes(image_folders / "train"), tmp_path, classes=3, images=20)
    assert_same(scan_classes(tmp_path / "train.tar"), scan_classes(tmp_path / "train"))
    words = [image_folders / "train", "--classes", 2, "--images", 5, "--repeats", 1]
    monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
    archives.main()
    printed = capsys.readouterr().out
    assert "10 images" in printed and printed.count("images/s") == 4 and "indexing ImageNet" in printed
