import hashlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, photo, write_class_folders
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.dataset import open_datasets
from pipeline.data.scan import scan_classes, scan_flat
from pipeline.errors import UserError
from tools import pack
from tools.index import main


def test_class_folders_give_sorted_classes_paths_labels_and_sizes(image_folders):
    index = scan_classes(image_folders / "train")
    assert index.classes == ("class0", "class1", "class2")
    assert len(index) == 37 and np.bincount(index.labels).tolist() == [13, 12, 12]
    assert list(index.names) == sorted(index.names)
    for i, (label, size) in enumerate(zip(index.labels, index.sizes, strict=True)):
        file = index.location(i)
        with Image.open(file) as image:
            assert (image.height, image.width) == tuple(size)
        assert f"class{label}" in file


def test_sizes_ignore_exif_orientation(tmp_path):
    (tmp_path / "a").mkdir()
    image = photo(0, 30, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a" / "turned.jpg", exif=exif)
    assert scan_classes(tmp_path).sizes.tolist() == [[30, 50]]


@pytest.mark.parametrize("style", ["in order", "by file", "by stem with header"])
def test_a_flat_folder_takes_its_labels_from_a_file(tmp_path, style):
    (tmp_path / "val").mkdir()
    names = ["b", "a", "c"]
    for i, name in enumerate(names):
        photo(i, 20, 20).save(tmp_path / "val" / f"{name}.jpg")
    lines = {
        "in order": ["dog", "cat", "dog"],
        "by file": ["c.jpg dog", "a.jpg dog", "b.jpg cat"],
        "by stem with header": ["ImageId,PredictionString", "b,cat 85 1 499 272", "a,dog 3 4 5 6", "c,dog 1 2 3 4"],
    }[style]
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n")
    index = scan_flat(tmp_path / "val", tmp_path / "labels.txt", ("cat", "dog"))
    assert index.names == ("a.jpg", "b.jpg", "c.jpg") and index.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["cat", "dog"], "has 2 labels for 3 images"),
        (["cat", "dog", "dgo"], "'dgo' is none of the network's \\(did you mean 'dog'"),
        (["a.jpg cat", "b.jpg dog"], "no line for the image c.jpg: expected 'FILE CLASS' for each image"),
        (["a.jpg cat"], "no line for the image b.jpg and 1 more of 3: expected"),
    ],
)
def test_wrong_label_files_are_explained(tmp_path, lines, expected):
    (tmp_path / "val").mkdir()
    for name in "abc":
        photo(0, 20, 20).save(tmp_path / "val" / f"{name}.jpg")
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=expected):
        scan_flat(tmp_path / "val", tmp_path / "labels.txt", ("cat", "dog"))


def test_wrong_folders_are_explained(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        scan_classes(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class folders"):
        scan_classes(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="class cat in .* has no images"):
        scan_classes(tmp_path)
    (tmp_path / "cat" / "text.jpg").write_text("not an image")
    with pytest.raises(UserError, match="text.jpg is not an image"):
        scan_classes(tmp_path)


def test_the_cache_spares_reading_but_sees_changes(tmp_path, monkeypatch):
    root, cache = write_class_folders(tmp_path / "images", 2, 6), tmp_path / "cache" / "index.jsonl"
    first = scan_classes(root, cache)
    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda stream: opened.append(1) or real_open(stream))
    again = scan_classes(root, cache)
    assert not opened and again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.sizes, first.sizes)

    photo(99, 33, 44).save(root / "class0" / "image0002.jpg")
    changed = scan_classes(root, cache)
    assert len(opened) == 3  # the class that changed
    assert changed.sizes[1].tolist() == [33, 44] and changed.fingerprint != first.fingerprint


def test_a_scan_that_was_broken_off_goes_on_where_it_was(tmp_path, monkeypatch):
    root, cache = write_class_folders(tmp_path / "images", 4, 12), tmp_path / "index.jsonl"
    (root / "class2" / "image0002.jpg").write_text("not an image")
    with pytest.raises(UserError):
        scan_classes(root, cache)
    rows = cache.read_text().split("\n")
    assert [row[21:27] for row in rows if row] == ["class0", "class1", "class3"]  # all but the class that stops
    cache.write_text("\n".join([*rows[:-1], rows[-1][:30]]))  # cut short by a crash
    photo(0, 20, 20).save(root / "class2" / "image0002.jpg")
    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda stream: opened.append(1) or real_open(stream))
    index = scan_classes(root, cache)
    assert len(index) == 12 and len(opened) == 6  # classes 2 and 3
    scan_classes(root, cache)
    assert len(opened) == 6


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"sizes":[[', '"sizes":[[{"rule":"3","group":"class0",'),  # two lines in one another
        ('"sizes"', '"other"'),
        ('"stamp"', '"other"'),
        ('"names":["image0001.jpg",', '"names":['),
        ('"orientations":[]', '"orientations":[[3,6]]'),
        ('"orientations":[]', '"orientations":[[1]]'),
        ('"offsets":[0,', '"offsets":["a",'),
        ('"offsets":[0,', '"offsets":[["0"],'),
        ('"group":"class1"', '"group":["class1"]'),
        ('"deep":[]', '"deep":null'),
    ],
)
def test_a_damaged_line_of_the_cache_is_read_again(tmp_path, monkeypatch, before, after):
    root, cache = write_class_folders(tmp_path / "images", 2, 6), tmp_path / "index.jsonl"
    first = scan_classes(root, cache)
    whole, damaged = cache.read_text().strip().split("\n")
    assert damaged.count(before) == 1
    cache.write_text("\n".join([whole, damaged.replace(before, after)]))
    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda stream: opened.append(1) or real_open(stream))
    for _ in range(2):
        again = scan_classes(root, cache)
        assert again.fingerprint == first.fingerprint and np.array_equal(again.sizes, first.sizes)
        assert len(opened) == 3  # the damaged class, once


def test_the_command_takes_both_sets_of_a_folder_as_training_finds_them(image_folders, tmp_path, monkeypatch, capfd):
    def printed(folder, *flags: str):
        monkeypatch.setattr("sys.argv", ["index", str(folder), *flags])
        main()
        return capfd.readouterr()

    data, table = tmp_path / "data", tmp_path / "table"
    shutil.copytree(image_folders / "train", data / "training")
    shutil.copytree(image_folders / "val", data / "test")
    same = shutil.copyfile(data / "training/class0/image0000.jpg", data / "test/class0/same.jpg")
    shutil.copytree(data / "training", table / "pictures")
    lines = [f"{file.relative_to(table)},{file.parent.name}" for file in sorted((table / "pictures").rglob("*.jpg"))]
    rows = [f"{line},{'test' if i % 4 == 0 else 'train'}" for i, line in enumerate(lines)]
    for name in ("train", "val"):  # two names of one table, of which each set takes its lines
        (table / f"{name}.csv").write_text("\n".join(["file,label,split", *rows]))

    said = printed(data, "--verify")
    assert f"images     37 in {data}/training\n" in said.out and f"images     12 in {data}/test\n" in said.out
    assert f"{data}/training/class0/image0000.jpg is a validation image too ({same})" in said.out
    assert said.err.count("data.val is test, as") == 1
    assert f"images     37 in {data}/training\n" in printed(data / "training").out  # of one set nothing else is taken
    out = printed(table, "--verify").out
    assert f"images     27 in {table}/train.csv" in out and f"images     10 in {table}/val.csv" in out
    assert "validation image too" not in out


def test_the_commands_take_a_tables_columns(image_folders, tmp_path, monkeypatch, capsys):
    files = sorted((image_folders / "val").rglob("*.jpg"))
    rows = [f"images/{file.parent.name}/{file.name},{file.parent.name},x" for file in files]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["picture,kind,remark", *rows]))
    (tmp_path / "images").symlink_to(image_folders / "val")

    def run(command, *words):
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        command()
        return capsys.readouterr().out

    flags = ["--file-column", "picture", "--label-column", "kind"]
    with pytest.raises(UserError, match="none of the columns picture, kind, remark is called label"):
        run(main, table)
    assert "no image is odd" in (said := run(main, table, *flags, "--verify")) and "images     11 in" in said
    assert "11 images of 3 classes" in run(pack.main, table, tmp_path / "out", *flags)
    with pytest.raises(UserError, match="--file-column and --label-column are for a table, and .*val is none"):
        run(main, image_folders / "val", *flags)


def test_sets_of_one_name_that_cannot_be_written_beside_have_a_cache_each(image_folders, tmp_path, monkeypatch):
    """Else each start would read both anew, and append to it."""
    for split in ("train", "val"):
        shutil.copytree(image_folders / split, tmp_path / split / "images")
    monkeypatch.setattr("pipeline.data.index_cache.os.access", lambda *_: False)
    config = DataConfig(dir=str(tmp_path), train="train/images", val="val/images")
    for _ in range(3):
        open_datasets(config, tmp_path / "kept", progress=False)
        lines = [len(file.read_text().split()) for file in (tmp_path / "kept").iterdir()]
        assert lines == [3, 3]  # classes


def test_commands_print_names_that_are_not_utf_8(tmp_path):
    root = tmp_path / os.fsdecode(b"\xff")
    write_class_folders(root, 2, 6)
    shutil.copyfile(root / "class0/image0000.jpg", root / "class0" / os.fsdecode(b"odd \xe9.png"))
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "tools.index", root, "--verify"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=strict)
    shown = rf"{tmp_path}/\udcff"
    told = rf"{shown}/class0/odd \udce9.png is JPEG, not what its suffix says: read as what it is"
    assert done.returncode == 0 and told in done.stdout.splitlines(), done.stderr
    assert f"images     7 in {shown}" in done.stdout and rf"cache      {tmp_path}/.\udcff.index.jsonl" in done.stdout


def test_labels_can_count_in_a_larger_set_of_classes(image_folders):
    index = scan_classes(image_folders / "val")
    wider = index.with_classes(("aaa", "class0", "class1", "class2", "zzz"))
    np.testing.assert_array_equal(wider.labels, index.labels + 1)
    with pytest.raises(UserError, match="'class2' is none of the network's"):
        index.with_classes(("class0", "class1"))


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_files_without_compression_are_told_apart_by_what_they_hold(tmp_path, place):
    """All BMP files of one size have one length; of 200, 64 are looked at: a set made anew is seen, and a copy is the same."""

    def fingerprint(name: str, seed: int) -> str:
        generator, root = np.random.default_rng(seed), tmp_path / name
        for i in range(200):
            path = root / f"class{i % 2}" / f"{i}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (5, 4, 3), np.uint8)).save(path)
        if place == "folder":
            return scan_classes(root).fingerprint
        return scan_classes(shutil.make_archive(str(root), "zip", root)).fingerprint

    assert fingerprint("first", 1) == fingerprint("copy", 1) != fingerprint("anew", 2)


def test_images_of_many_lengths_are_told_apart_without_reading_them(tmp_path):
    """As in runs of before: the fingerprint is of names, labels and lengths alone."""
    for i in range(6):
        path = tmp_path / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo(i, 20 + 9 * i, 24).save(path)
    index = scan_classes(tmp_path)
    lines = zip(index.names, index.labels.tolist(), index.lengths.tolist(), strict=True)
    text = "class0\0class1" + "".join(f"\n{name}\0{label}\0{length}" for name, label, length in lines)
    assert len(set(index.lengths)) > 3 and index.fingerprint == hashlib.sha256(text.encode()).hexdigest()
