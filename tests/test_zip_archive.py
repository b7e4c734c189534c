"""Images in zip files: read in place, by position where they are stored, as from folders."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_archive import assert_same

from pipeline.config import DataConfig
from pipeline.data.dataset import open_datasets
from pipeline.data.index_cache import cache_beside
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes, scan_flat
from pipeline.data.verify import verify
from pipeline.data.zip_archive import ZipSource
from pipeline.errors import UserError

METHODS = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}


def zip_folder(
    folder: Path, file: Path, above: str = "", method: int = zipfile.ZIP_STORED, zip64: bool = False
) -> Path:
    """Pack the images of class folders in an order that is not that of the index."""
    with zipfile.ZipFile(file, "a", method) as archive:
        for image in sorted(folder.rglob("*.jpg"), reverse=True):
            info = zipfile.ZipInfo.from_file(image, os.path.join(above, image.parent.name, image.name))
            info.compress_type = method
            with archive.open(info, "w", force_zip64=zip64) as stream:
                stream.write(image.read_bytes())
    return file


@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_zip_file_is_indexed_and_read_as_its_folders(image_folders, tmp_path, monkeypatch, method, zip64):
    file = zip_folder(image_folders / "train", tmp_path / "train.zip", "a/train", method, zip64)
    folders = scan_classes(image_folders / "train")
    index = scan_classes(file, tmp_path / "cache")
    assert_same(index, folders)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.scan_group._read_header", lambda *_: pytest.fail("read a header again"))
        assert_same(scan_classes(file, tmp_path / "cache"), folders)
    again = pickle.loads(pickle.dumps(index))
    content = file.read_bytes()
    for i, name in enumerate(again.names):
        expected = (image_folders / "train" / name).read_bytes()
        assert Reader(again).read(i).tobytes() == expected
        place = again.source.place(name, int(again.offsets[i]))
        if method == zipfile.ZIP_DEFLATED:
            assert place is None
        else:
            assert os.pread(place[0], len(expected), place[1]) == expected == content[place[1] :][: len(expected)]


def test_what_lies_before_the_archive_moves_it(image_folders, tmp_path):
    packed = zip_folder(image_folders / "val", tmp_path / "val.zip")
    packed.write_bytes(b"#!/bin/sh\n" + packed.read_bytes())
    index = scan_classes(packed)
    assert Reader(index).read(0).tobytes() == (image_folders / "val" / index.names[0]).read_bytes()


def test_a_folder_in_a_zip_file_is_a_data_set_as_kaggle_has_it(image_folders, tmp_path, capfd):
    file = tmp_path / "imagenet.zip"
    for split in ("train", "val"):
        zip_folder(image_folders / split, file, f"ILSVRC/Data/CLS-LOC/{split}")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("ILSVRC/Annotations/CLS-LOC/train/class0/image0000.xml", "<annotation/>")
        archive.writestr("ILSVRC/Data/CLS-LOC/train/.DS_Store", "")
        flat = scan_classes(image_folders / "val")
        for name in flat.names:
            archive.write(image_folders / "val" / name, f"ILSVRC/Data/CLS-LOC/flat/{Path(name).name}")
        lines = [f"{Path(name).stem},{name.split('/')[0]} 1 2 3 4" for name in flat.names]
    (tmp_path / "solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]))
    inside = "ILSVRC/Data/CLS-LOC"
    for root in (tmp_path, file):
        name = "imagenet.zip/" if root == tmp_path else ""
        config = DataConfig(dir=str(root), train=f"{name}{inside}/train", val=f"{name}{inside}/val")
        for split, index in zip(("train", "val"), open_datasets(config, tmp_path / "run", progress=False), strict=True):
            assert_same(index, scan_classes(image_folders / split))
    assert not (tmp_path / "run").exists()
    assert cache_beside(file / inside / "train", tmp_path).name == ".imagenet.zip.ILSVRC.Data.CLS-LOC.train.index.jsonl"
    assert ".DS_Store in" in (told := capfd.readouterr().err) and "is hidden" in told and "Annotations" not in told
    config = DataConfig(
        dir=str(file), train=f"{inside}/train", val=f"{inside}/flat", val_labels=str(tmp_path / "solution.csv")
    )
    _, val = open_datasets(config, tmp_path / "run", progress=False)
    assert val.labels.tolist() == [flat.labels[[Path(n).name for n in flat.names].index(name)] for name in val.names]
    table = DataConfig(dir=str(file / inside / "flat"), train=str(tmp_path / "solution.csv"), holdout=2)
    train, held = open_datasets(table, tmp_path / "run", progress=False)
    assert (len(train), len(held), train.classes) == (9, 2, flat.classes)
    with pytest.raises(UserError, match="there is no folder ILSVRC/Data/train in .*imagenet.zip: unzip -l"):
        scan_classes(file / "ILSVRC" / "Data" / "train")
    with pytest.raises(UserError, match="'class2' 2 times: give one of the folders in it, as .*Data/CLS-LOC/train$"):
        scan_classes(file / "ILSVRC" / "Data")


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's own
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_of_files_of_one_name_the_last_is_taken_and_told(image_folders, tmp_path, capfd, method):
    """As zipfile appends them."""
    folders = scan_classes(image_folders / "val")
    file = tmp_path / "val.zip"
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in folders.names[:2]:
            archive.writestr(name, b"damaged")
    assert_same(scan_classes(zip_folder(image_folders / "val", file, method=method)), folders)
    told = "is there more than once (and 1 more): the last one is taken, as when the archive is unpacked"
    assert capfd.readouterr().err == f"warning: {folders.names[0]} in {file} {told}\n"
    (tmp_path / "labels.txt").write_text("".join(f"{name} {name[:6]}\n" for name in folders.names))
    assert scan_flat(file, tmp_path / "labels.txt", folders.classes).names == folders.names
    assert told in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["cut short", "encrypted", "lzma", "moved", "link"])
def test_what_cannot_be_read_is_named(image_folders, tmp_path, damage, capfd):
    file = zip_folder(image_folders / "val", tmp_path / "val.zip", method=zipfile.ZIP_LZMA if damage == "lzma" else 0)
    content = bytearray(file.read_bytes())
    first = content.index(b"PK\1\2")
    if damage == "cut short":
        content[-12:] = b"\xff" * 12
    elif damage == "encrypted":
        content[first + 8] |= 1
    elif damage == "moved":
        content[first + 42] += 3
    elif damage == "link":
        content[first + 38 : first + 42] = (0o120777 << 16).to_bytes(4, "little")
    file.write_bytes(content)
    if damage == "link":
        assert len(scan_classes(file)) == 10 and "is a link inside an archive" in capfd.readouterr().err
        return
    expected = {
        "cut short": "of no known kind|not a whole zip file",
        "encrypted": "is encrypted: unpack the zip file",
        "lzma": "neither stored nor deflated: unpack the zip file, or pack it with zip -0",
        "moved": "is not where the zip file says: download or pack",
    }
    with pytest.raises(UserError, match=expected[damage]):
        scan_classes(file)


def test_a_damaged_deflated_image_is_named_by_what_reads_it(image_folders, tmp_path):
    file = zip_folder(image_folders / "val", tmp_path / "val.zip", method=zipfile.ZIP_DEFLATED)
    index = scan_classes(file)
    content = bytearray(file.read_bytes())
    content[index.offsets[0] >> 1] = 0xFF  # a block of the kind that there is not
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the image class0/.*it is damaged in .*val.zip"):
        Reader(index).read(0)


def test_flat_zip_files_take_labels_and_verify_reads_them(image_folders, tmp_path):
    file = zip_folder(image_folders / "val", tmp_path / "val.zip", method=zipfile.ZIP_DEFLATED)
    folders = scan_classes(image_folders / "val")
    (tmp_path / "labels.txt").write_text("".join(f"{name} {name[:6]}\n" for name in folders.names))
    np.testing.assert_array_equal(scan_flat(file, tmp_path / "labels.txt", folders.classes).labels, folders.labels)
    assert list(verify([ZipSource.at(str(file))], [])) == []
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("class0/broken.jpg", io.BytesIO(b"\xff\xd8\xff").getvalue())
    assert [issue.fault for issue in verify([ZipSource.at(str(file))], [])] == ["is not an image that can be read"]
