"""tools.pack: shards that hold the same images in the same order, indexed."""

import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
from conftest import photo
from test_zip_archive import zip_folder

from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes
from tools import pack


def packed(monkeypatch, *words) -> None:
    monkeypatch.setattr("sys.argv", ["pack", *map(str, words)])
    pack.main()


@pytest.mark.parametrize("place", ["folders", "zip"])
def test_shards_hold_the_same_images_in_the_same_order(image_folders, tmp_path, monkeypatch, capsys, place):
    root = image_folders / "train"
    folders = scan_classes(root)
    if place == "zip":
        root = zip_folder(root, tmp_path / "train.zip", method=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(pack, "MIB", 30_000)  # several shards of these few images
    packed(monkeypatch, root, tmp_path / "out", "--shard-size", 1)
    files = sorted(name for name in os.listdir(tmp_path / "out") if name.endswith(".tar"))
    assert files == [f"train-{i:06d}.tar" for i in range(len(files))] and len(files) > 2
    pattern = f"train-{{000000..{len(files) - 1:06d}}}.tar"
    out = f"--data.dir {tmp_path / 'out'} --data.train '{pattern}'"
    assert capsys.readouterr().out.endswith(f"\ntrain on them with {out}\n")
    monkeypatch.setattr("pipeline.data.scan_group._read_header", lambda *_: pytest.fail("the shards have an index"))
    shards = scan_classes(tmp_path / "out" / pattern, tmp_path / "out" / f".{pattern}.index.jsonl")
    assert shards.classes == folders.classes
    for field in ("labels", "sizes", "lengths"):
        np.testing.assert_array_equal(getattr(shards, field), getattr(folders, field))
    for i in range(len(folders)):
        assert Reader(shards).read(i).tobytes() == Reader(folders).read(i).tobytes()
    with tarfile.open(tmp_path / "out" / files[0]) as tar:
        assert tar.getnames()[:2] == ["00000000_image0000.jpg", "00000000_image0000.json"]
        about = json.load(tar.extractfile("00000000_image0000.json"))
        assert about == {"label": "class0", "name": "class0/image0000.jpg"}


def test_odd_names_keep_their_order_and_their_bytes(image_folders, tmp_path, monkeypatch):
    names = ("a.b.JPG", "a-c.jpg", "a", "a.jpg", "ä b.jpeg", "sub/a.jpg", "10.jpg", "9.jpg", "x" * 120 + ".jpg")
    for i, name in enumerate(names):
        for own in ("b", "a"):
            file = tmp_path / "in" / own / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((image_folders / "train" / f"class{i % 3}" / f"image{i:04d}.jpg").read_bytes())
    folders = scan_classes(tmp_path / "in")
    packed(monkeypatch, tmp_path / "in", tmp_path / "out", "--name", "val")
    shards = scan_classes(tmp_path / "out" / "val-000000.tar")
    assert [Reader(shards).read(i).tobytes() for i in range(18)] == [
        Reader(folders).read(i).tobytes() for i in range(18)
    ]
    np.testing.assert_array_equal(shards.labels, folders.labels)


def test_images_whose_names_do_not_say_so_get_the_suffix_of_their_format(tmp_path, monkeypatch):
    """What is in their names stays there."""
    formats = {
        "scan.2": ("PNG", "00000000_scan_2.png"),
        "scan.3": ("JPEG2000", "00000001_scan_3.jp2"),
        "three": ("JPEG2000", "00000002_three.jp2"),
        "two": ("MPO", "00000003_two.jpg"),
        "v.jpg_large": ("JPEG", "00000004_v_jpg_large.jpeg"),
        "w.mpo": ("MPO", "00000005_w_mpo.jpg"),
        "x.cls": ("TIFF", "00000006_x_cls.tiff"),
        "y.PNG": ("JPEG", "00000007_y.png"),
        "z.": ("PPM", "00000008_z_.ppm"),
    }
    (tmp_path / "in" / "cat").mkdir(parents=True)
    for i, (name, (kind, _)) in enumerate(formats.items()):
        more = {"save_all": True, "append_images": [photo(50 + i, 30, 30)]} if kind == "MPO" else {}
        photo(i, 30, 30).save(tmp_path / "in" / "cat" / name, kind, **more)
    folders = scan_classes(tmp_path / "in")
    packed(monkeypatch, tmp_path / "in", tmp_path / "out")
    shards = scan_classes(tmp_path / "out" / "train-000000.tar")
    assert [os.path.basename(name) for name in shards.names] == [name for _, name in formats.values()]
    for i in range(len(formats)):
        assert Reader(shards).read(i).tobytes() == Reader(folders).read(i).tobytes()


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("val", "validate on them with --data.dir 'a place' --data.val 'val-{000000..000000}.tar'"),
        ("photos", "train on them with --data.dir 'a place' --data.train 'photos-{000000..000000}.tar'"),
    ],
)
def test_the_flags_that_are_told_can_be_pasted(image_folders, tmp_path, monkeypatch, capsys, name, use):
    monkeypatch.chdir(tmp_path)
    packed(monkeypatch, image_folders / "val", "a place", "--name", name)
    assert capsys.readouterr().out.splitlines()[-1] == use


def test_what_is_there_is_not_written_over(image_folders, tmp_path, monkeypatch, user_error):
    packed(monkeypatch, image_folders / "val", tmp_path / "out")
    assert "train-000000.tar exists: remove the old shards" in user_error(
        pack.main, image_folders / "val", tmp_path / "out"
    )
    (tmp_path / "file").write_text("")
    assert f"cannot write {tmp_path}/file" in user_error(
        pack.main, image_folders / "val", tmp_path / "file", "--name", "x"
    )


def test_classes_that_are_numbers_are_told(image_folders, tmp_path, monkeypatch, capsys):
    for i in (9, 10):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
        (tmp_path / "in" / str(i) / "a.jpg").write_bytes((image_folders / "train/class0/image0000.jpg").read_bytes())
    packed(monkeypatch, tmp_path / "in", tmp_path / "out")
    assert "outputs stand in another order than with DATA" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_leaves_no_shard(image_folders, tmp_path, monkeypatch, user_error):
    real = Reader.read

    def read(self, i):
        if i == 5:
            os.remove(tmp_path / "in" / "class0" / "image0005.jpg")
        return real(self, i)

    (tmp_path / "in" / "class0").mkdir(parents=True)
    for i in range(7):
        content = (image_folders / "train" / "class0" / "image0000.jpg").read_bytes()
        (tmp_path / "in" / "class0" / f"image{i:04d}.jpg").write_bytes(content)
    monkeypatch.setattr(Reader, "read", read)
    assert "cannot read the image" in user_error(pack.main, tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
