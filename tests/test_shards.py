"""WebDataset's shards: found, indexed and read in place as the folders whose images they hold."""

import contextlib
import io
import json
import os
import pickle
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.data.dataset import open_datasets
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes, scan_flat
from pipeline.data.shards import ShardSource
from pipeline.data.verify import verify
from pipeline.errors import UserError


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_shards(folder: Path, out: Path, name: str, shards: int = 3, label: str = "cls") -> Path:
    """The images of class folders, dealt to shards one by one; the pattern that names these."""
    index = scan_classes(folder)
    numbers = {name: k for k, name in enumerate(index.classes)}
    out.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(out / f"{name}-{i:06d}.tar", "w")) for i in range(shards)]
        for i, image in enumerate(reversed(index.names)):
            key, own = os.path.splitext(image.replace("/", "_"))[0], image.split("/")[0]
            text = {
                "cls": str(numbers[own]),
                "txt": f"{own}\n",
                "json": json.dumps({"width": 3, "label": own}),
                "json of numbers": json.dumps({"label": None, "cls": numbers[own]}),
            }[label]
            add(tars[i % shards], f"{key}.jpg", (folder / image).read_bytes())
            add(tars[i % shards], f"{key}.{label.split()[0]}", text.encode())
    return out / f"{name}-{{000000..{shards - 1:06d}}}.tar"


@pytest.mark.parametrize("label", ["cls", "txt", "json", "json of numbers"])
def test_shards_are_indexed_and_read_as_the_folders(image_folders, tmp_path, label, monkeypatch):
    pattern = write_shards(image_folders / "train", tmp_path, "train", label=label)
    index, folders = scan_classes(pattern, tmp_path / "cache"), scan_classes(image_folders / "train")
    by_number = label in ("cls", "json of numbers")
    assert index.classes == (("0", "1", "2") if by_number else folders.classes)
    assert [Path(name).name.replace("_", "/") for name in index.names] == list(folders.names)
    for field in ("labels", "sizes", "lengths"):
        np.testing.assert_array_equal(getattr(index, field), getattr(folders, field))
    assert index.location(0) == f"train-000000.tar/class0_image0000.jpg in {pattern}"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.scan_group._read_header", lambda *_: pytest.fail("read a header again"))
        patch.setattr(ShardSource, "_list", lambda *_: pytest.fail("listed a shard again"))
        assert scan_classes(pattern, tmp_path / "cache").fingerprint == index.fingerprint
    again = pickle.loads(pickle.dumps(index))
    for i, name in enumerate(folders.names):
        expected = (image_folders / "train" / name).read_bytes()
        file, position = again.source.place(again.names[i], int(again.offsets[i]))
        assert Reader(again).read(i).tobytes() == os.pread(file, len(expected), position) == expected


def test_patterns_folders_and_one_file_name_shards(image_folders, tmp_path):
    pattern = write_shards(image_folders / "val", tmp_path / "val", "val", label="txt")
    (tmp_path / "val" / "dataset.json").write_text("{}")
    indexes = [scan_classes(root) for root in (pattern, tmp_path / "val" / "val-*.tar", tmp_path / "val")]
    assert len({index.fingerprint for index in indexes}) == 1 and len(indexes[0]) == 11
    alone = scan_classes(write_shards(image_folders / "val", tmp_path / "one", "val", 1, "txt"))
    assert scan_classes(tmp_path / "one" / "val-000000.tar").fingerprint == alone.fingerprint
    assert list(alone.labels) == list(indexes[0].labels)
    os.rename(tmp_path / "val" / "val-000001.tar", tmp_path / "val" / "val-000003.tar")
    with pytest.raises(UserError, match=r"names 3 shards, and 1 of them are missing, as .*val-000001.tar: download"):
        scan_classes(pattern)
    with pytest.raises(UserError, match=r"none-\{0..1\}.tar does not exist"):
        scan_classes(tmp_path / "none-{0..1}.tar")


def test_one_shard_with_folders_in_its_keys_is_a_shard_if_it_says_classes(image_folders, tmp_path):
    images = sorted((image_folders / "val").rglob("*.jpg"))[:3]
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i, image in enumerate(images):
            add(tar, f"0000{i % 2}/{i:09d}.jpg", image.read_bytes())
            add(tar, f"0000{i % 2}/{i:09d}.cls", f"{i // 2}".encode())
    for root in (tmp_path / "train-0.tar", tmp_path / "train-*.tar"):
        index = scan_classes(root)
        assert index.classes == ("0", "1") and len(index) == 3 and sorted(index.labels.tolist()) == [0, 0, 1]


def test_a_folder_of_shards_may_have_brackets_in_its_name(image_folders, tmp_path):
    folder = tmp_path / "C [v2]"
    write_shards(image_folders / "val", folder, "val", label="txt")
    assert len(scan_classes(folder / "val-*.tar")) == 11
    assert len(scan_classes(tmp_path / "C*" / "val-*.tar")) == 11


def test_a_configuration_names_shards(image_folders, tmp_path, capfd):
    train = write_shards(image_folders / "train", tmp_path, "train", label="txt").name
    val = write_shards(image_folders / "val", tmp_path, "val", label="json").name
    config = DataConfig(dir=str(tmp_path), train=train, val=val)
    for split, index in zip(("train", "val"), open_datasets(config, tmp_path / "run", progress=False), strict=True):
        assert index.labels.tolist() == scan_classes(image_folders / split).labels.tolist()
    assert not capfd.readouterr().err and not (tmp_path / "run").exists()
    (tmp_path / "labels.txt").write_text("".join(f"{index.names[i]} {'abc'[k]}\n" for i, k in enumerate(index.labels)))
    flat = scan_flat(tmp_path / val, tmp_path / "labels.txt", ("a", "b", "c"))
    assert sorted(flat.names) == sorted(index.names) and np.bincount(flat.labels).tolist() == [4, 4, 3]
    assert list(verify([ShardSource.at(str(tmp_path / train))], [ShardSource.at(str(tmp_path / val))])) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"b.jpg": b"image"}, r"s-0.tar/b in .* has no label \(no b.cls, .json with 'label' or .txt\)"),
        ({"b.jpg": b"image", "b.json": b'{"label": [1]}'}, "s-0.tar/b in .* has no label"),
        ({"b.cls": b"cat"}, "s-0.tar/b in .* has no image: pack the shard with one image a key"),
        ({"b.jpg": b"image", "b.png": b"image", "b.cls": b"1"}, "is several images of one key"),
        ({"b.jpg": b"no", "b.cls": b"1"}, "s-0.tar/b.jpg in .* is not an image that can be read"),
        ({"b.jpg": b"image", "b.mask.png": b"image", "b.cls": b"1"}, None),
        ({"b.mask.jpg": b"image", "b.cls": b"1"}, None),
        ({"b.jpg": b"image", "b.JPG": b"image", "b.cls": b"1"}, "is several images of one key"),
    ],
)
def test_odd_samples_stop_the_index(image_folders, tmp_path, files, expected):
    image = (image_folders / "val" / "class0" / "image0000.jpg").read_bytes()
    with tarfile.open(tmp_path / "s-0.tar", "w") as tar:
        for name, content in {"a.jpg": b"image", "a.cls": b"0", **files}.items():
            add(tar, name, image if content == b"image" else content)
    if expected:
        with pytest.raises(UserError, match=expected):
            scan_classes(tmp_path / "s-{0..0}.tar")
    else:
        assert scan_classes(tmp_path / "s-{0..0}.tar").labels.tolist() == [0, 1]


def test_compressed_shards_are_refused(image_folders, tmp_path):
    write_shards(image_folders / "val", tmp_path, "val", 1)
    with tarfile.open(tmp_path / "val-000001.tar", "w:gz") as tar:
        add(tar, "a.cls", b"1")
    with pytest.raises(UserError, match="val-000001.tar is compressed.*: gunzip it"):
        scan_classes(tmp_path / "val-{000000..000001}.tar")


@pytest.mark.parametrize("header", [1, 2, -1])
@pytest.mark.parametrize("shard", [0, 1])
def test_a_damaged_shard_is_named(image_folders, tmp_path, shard, header):
    pattern = write_shards(image_folders / "val", tmp_path, "val", 2)
    file = tmp_path / f"val-00000{shard}.tar"
    with tarfile.open(file) as tar:
        at = tar.getmembers()[header].offset
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    for place in (pattern, tmp_path):
        with pytest.raises(UserError, match=f"{file.name} is not a whole tar archive"):
            scan_classes(place)


def test_of_files_of_one_name_the_last_is_taken_and_told(image_folders, tmp_path, capfd):
    pattern = write_shards(image_folders / "val", tmp_path, "val", 2)
    image = (image_folders / "train" / "class0" / "image0000.jpg").read_bytes()
    before = scan_classes(pattern)
    with tarfile.open(tmp_path / "val-000001.tar", "a") as tar:
        key = tar.getnames()[0].removesuffix(".jpg")
        add(tar, f"{key}.jpg", image)
        add(tar, f"{key}.cls", b"0")
    index = scan_classes(pattern)
    i = index.names.index(f"val-000001.tar/{key}.jpg")
    assert len(index) == len(before) == 11 and index.labels[i] == 0 and Reader(index).read(i).tobytes() == image
    told = "is there more than once (and 1 more): the last one is taken, as when the archive is unpacked"
    assert capfd.readouterr().err == f"warning: val-000001.tar/{key}.cls in {pattern} {told}\n"


def test_more_shards_than_files_may_be_open(image_folders, tmp_path):
    pattern = write_shards(image_folders / "train", tmp_path, "train", shards=37)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
        assert len(scan_classes(pattern)) == 37
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert allowed == (65_536 if before[1] == resource.RLIM_INFINITY else min(before[1], 65_536))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_archive_of_class_folders_with_other_files_is_no_shard(image_folders, tmp_path, capfd):
    folders = scan_classes(image_folders / "val")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name in folders.names:
            add(tar, name, (image_folders / "val" / name).read_bytes())
            add(tar, name.replace(".jpg", ".json"), b'{"label": "of something else"}')
    index = scan_classes(tmp_path / "val.tar")
    assert (index.names, index.fingerprint) == (folders.names, folders.fingerprint)
    assert "is no image (and 10 more): " in capfd.readouterr().err
