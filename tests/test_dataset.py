"""From the data section to two sets: layouts that people have, and what is said of those that do not fit."""

import dataclasses
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import photo, small_config, write_class_folders

from pipeline.config import DataConfig
from pipeline.data.checks import same_images, warnings_about
from pipeline.data.dataset import images_text, open_datasets
from pipeline.data.index import DatasetIndex
from pipeline.data.index_cache import cache_beside
from pipeline.data.scan import scan_classes
from pipeline.data.splits import find_splits
from pipeline.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    write_class_folders(tmp_path / "data" / "train", 3, 12)
    write_class_folders(tmp_path / "data" / "val", 3, 6, seed=1000)
    return tmp_path / "data"


def config_of(root: Path, **fields) -> DataConfig:
    return small_config(root, data={"dir": str(root), "loader": "reference", **fields}).data


def open_all(root: Path, **fields):
    return open_datasets(config_of(root, **fields), root.parent / "cache", progress=False)


def flat(folder: Path, images: int) -> None:
    folder.mkdir(parents=True)
    for i in range(images):
        photo(2000 + i, 30, 30).save(folder / f"val_{i}.jpg")


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (("valid",), "valid"),
        (("validation",), "validation"),
        (("test", "test.txt", "valid.json"), "test"),
        (("val.tar",), "val.tar"),
        (("val.csv", "test"), "val.csv"),
        (("valid-0000.tar", "valid-0001.tar"), "valid-*.tar"),
        (
            ("data/validation-00000-of-00002.parquet", "data/validation-00001-of-00002.parquet"),
            "data/validation-*.parquet",
        ),
        (("valid", "test"), "valid"),
        (("LOC_val_solution.csv", "ILSVRC/Data/CLS-LOC/val"), "LOC_val_solution.csv"),
        (("val/val_annotations.txt", "val/images", "val/a"), "val/val_annotations.txt"),
    ],
)
def test_the_validation_set_is_found_under_another_usual_name(root, capfd, there, expected):
    shutil.rmtree(root / "val")
    for name in there:
        file = "." in name and name != "val.tar"
        (root / name if not file else (root / name).parent).mkdir(parents=True, exist_ok=True)
        if file:
            (root / name).touch()
    assert find_splits(config_of(root)) == config_of(root, val=expected)
    said = f"data.val is {expected}, as {root} has no 'val' with a folder a class\n"
    assert capfd.readouterr().err == said
    if "*" not in expected:  # shards would be opened
        assert find_splits(config_of(root, val=expected)).val == expected and not capfd.readouterr().err


@pytest.mark.parametrize(
    ("there", "name", "expected"),
    [
        (("valid",), "validate", "validate does not exist: there is valid: set data.val valid, or data.holdout"),
        (
            ("data/test-00.parquet", "data/test-01.parquet"),
            "validate",
            r"there is 'data/test-\*.parquet': set data.val 'data/test-\*.parquet', or",
        ),
        (
            ("val.csv", "val.zip"),
            "val",
            "val does not exist: there are val.csv, val.zip: set data.val to one of them, or data.holdout",
        ),
        (("test", "test.csv"), "val", "there are test, test.csv: set data.val to one of them, or data.holdout to"),
        (
            ("a/test", "data/test", "test.zip", "test.tar"),
            "odd",
            "are test.tar, test.zip, data/test: set data.val to one",
        ),
        ((), "val", r"set data.dir, or data.val, or data.holdout .*\(data.dir holds train\)"),
    ],
)
def test_another_name_of_the_validation_set_is_offered(root, monkeypatch, there, name, expected):
    shutil.rmtree(root / "val")
    for entry in there:
        (root / entry).mkdir(parents=True)
    monkeypatch.setattr("pipeline.data.dataset.scan_classes", lambda *_: pytest.fail("scanned before it was checked"))
    with pytest.raises(UserError, match=expected):
        open_all(root, val=name)


def test_the_training_folder_in_place_of_the_one_above(root, capsys):
    assert [index.root for index in open_all(root / "train")] == [str(root / "train"), str(root / "val")]
    assert f"data.dir {root}/train is the training images: {root} is taken, which holds them" in capsys.readouterr().err
    for old, new in (("train", "training"), ("val", "valid")):  # under other usual names likewise
        (root / old).rename(root / new)
    assert [index.root for index in open_all(root / "training")] == [str(root / "training"), str(root / "valid")]
    (root / "training").rename(root / "train")
    shutil.rmtree(root / "valid")
    with pytest.raises(UserError, match=f"train/train does not exist: data.dir is the folder above: set it to {root}$"):
        open_all(root / "train")


def test_a_missing_training_set(root):
    (root / "train").rename(root / "Training")
    with pytest.raises(UserError, match="there is Training: set data.train Training$"):
        open_all(root, train="trainings")
    assert find_splits(config_of(root)).train == "Training"
    with pytest.raises(UserError, match="nowhere/train does not exist: set data.dir, or data.train$"):
        open_all(root / "nowhere")
    with pytest.raises(UserError, match="no.txt does not exist: set data.val_labels"):
        open_all(root, train="Training", val_labels="no.txt")
    with pytest.raises(UserError, match=f"if {root}/val holds the classes, set data.dir {root} and data.train val$"):
        open_all(root / "val", holdout=3)
    with pytest.raises(UserError, match="there is Training: set data.train Training$"):
        open_all(root, train="trainings", holdout=3)


def pack(archive: Path, folder: Path, mode: str = "w") -> None:
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, ".")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("class folders", "train/class1 holds class1.tar and no images: unpack the archive in each class folder$"),
        ("val class folder", "val/class1 holds class1.tar and no images: unpack the archive in each class folder$"),
        ("a tar a class", r"train holds class0.tar \(and 2 more\) and no class folders: if each is a class, unpack it into "
         r"a folder of its name, or put all into one archive \(tar -cf .*train.tar -C .*train \.\) and give it$"),
        ("train.tar in train", "train holds train.tar and no class folders: give .*train/train.tar itself, which is read in "),
        ("train.tar.gz in train", "train holds train.tar.gz and no class folders: unpack it$"),
        ("train.tar.gz", "train does not exist: there is train.tar.gz, of which no image can be read by itself: unpack it$"),
        ("ILSVRC2012_img_train.tar", r"are read as they are: set data.train ILSVRC2012_img_train.tar \(for validation add "
         r"ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or data.holdout to validate on training images\)$"),
        ("ILSVRC2012_img_val.tar", "val does not exist: ImageNet's archives are read as they are: set data.val ILSVRC2012_img_"
         "val.tar, data.val_labels ILSVRC2012_devkit_t12.tar.gz$"),
        ("train.tar alone", "val does not exist: set data.dir, or data.val, or data.holdout .*holds train.tar"),
        ("train.tar as data.dir", "data.dir is a file: set data.dir .*/data and data.train train.tar$"),
    ],
)  # fmt: skip
def test_archives_as_they_are_downloaded_are_answered_with_the_next_step(root, capfd, given, expected):
    folder = root
    if given.endswith("class folder") or given == "class folders":
        of_class = root / ("val" if given.startswith("val") else "train") / "class1"
        pack(root / "class1.tar", of_class)
        shutil.rmtree(of_class)
        of_class.mkdir()
        (root / "class1.tar").rename(of_class / "class1.tar")
    elif given == "a tar a class":
        for of_class in list((root / "train").iterdir()):
            pack(of_class.with_suffix(".tar"), of_class)
            shutil.rmtree(of_class)
    elif given == "ILSVRC2012_img_val.tar":
        shutil.rmtree(root / "val")
        for name in (given, "ILSVRC2012_devkit_t12.tar.gz"):
            (root / name).touch()
    else:
        name = given.split()[0]
        pack(root / name, root / "train", "w:gz" if name.endswith("gz") else "w")
        shutil.rmtree(root / "train")
        if given.endswith(" in train"):
            (root / "train").mkdir()
            (root / name).rename(root / "train" / name)
        elif given.endswith("alone"):
            shutil.rmtree(root / "val")
        folder = root / name if given.endswith("data.dir") else root
    with pytest.raises(UserError, match=expected):
        open_all(folder)
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("validation", "parts", "one"), [("val", "train and val", "val"), ("dev", "dev and train", "train")]
)
def test_parts_of_a_data_set_are_no_classes(root, validation, parts, one):
    (root / "val").rename(root / validation)
    with pytest.raises(
        UserError, match=f"holds {parts}: parts of a data set, which are no classes: give one of them, as .*/{one}$"
    ):
        scan_classes(root)


def test_a_training_set_without_class_folders_is_not_sent_to_the_labels_of_validation(root):
    shutil.rmtree(root / "train")
    flat(root / "train", 2)
    with pytest.raises(UserError, match=r"train holds no class folders with images: expected CLASS/IMAGE.jpg [^;]*$"):
        open_all(root)


def test_a_flat_validation_folder_names_the_label_file(root):
    shutil.rmtree(root / "val")
    flat(root / "val", 3)
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    with pytest.raises(
        UserError, match="val holds no class folders .*as data.val_labels, which may be .*solution.csv$"
    ):
        open_all(root)


def test_tiny_imagenets_table_is_found_and_serves_as_a_label_file_too(root, capfd):
    shutil.rmtree(root / "val")
    flat(root / "val" / "images", 3)
    (root / "val" / "val_annotations.txt").write_text("".join(f"val_{i}.jpg\tclass{i}\t0\t1\t2\t3\n" for i in range(3)))
    for labels in (None, "val/val_annotations.txt"):
        _, val = open_all(root, val_labels=labels)
        assert val.labels.tolist() == [0, 1, 2]
        assert ("data.val is val/val_annotations.txt" in capfd.readouterr().err) == (labels is None)


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_validation_set_may_lack_classes(root, how, capfd):
    shutil.rmtree(root / "val" / "class1")
    if how == "empty":
        (root / "val" / "class1").mkdir()
    train, val = open_all(root)
    assert val.classes == train.classes == ("class0", "class1", "class2")
    assert val.labels.tolist() == [0, 0, 2, 2]
    assert "has images of 2 of the 3 training classes (none of 'class1')" in capfd.readouterr().err


def test_a_validation_set_may_not_have_more_classes(root):
    (root / "val" / "class0").rename(root / "val" / "class7")
    with pytest.raises(
        UserError, match="train has no class 'class7', which .*val has: remove it there, or set data.holdout"
    ):
        open_all(root)
    (root / "train" / "class9").mkdir()
    with pytest.raises(UserError, match="the class class9 in .*train has no images: fill or remove it"):
        open_all(root)


def test_a_data_set_of_another_user(root, monkeypatch, capfd):
    """`os.access` says what another user may; root may do all."""
    open_all(root)
    cache = root / ".train.index.jsonl"
    assert cache.exists() and capfd.readouterr().err == ""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != cache and real(path, mode))
    open_all(root)
    assert cache_beside(root / "train", root.parent / "cache").exists()
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot be read and written by this user" in line and str(root.parent / "cache") in line


def test_one_folder_of_class_folders_is_refused(root):
    (root / "above").mkdir()
    (root / "train").rename(root / "above" / "images")
    with pytest.raises(UserError, match=f"would be one class: .* in which are 3 folders .*give {root}/above/images$"):
        open_all(root, train="above")


def test_what_looks_wrong_is_said(root, tmp_path):
    def said(**fields):
        config = config_of(root, **fields)
        return warnings_about(*open_datasets(config, tmp_path / "cache", progress=False), config)

    assert said() == [] and said(holdout=3) == []
    (line,) = said(val="train")
    assert "training and validation images are the same" in line and "data.holdout" in line
    (root / "link").symlink_to(root / "train")
    assert said(val="link") == [line.replace("train)", "link)")]

    twin = root / "val" / "class1" / "renamed.jpg"
    shutil.copy(root / "train" / "class1" / "image0004.jpg", twin)
    (line,) = said()
    assert "validation images are training images too, at least 1 of 7, as" in line
    assert f"{twin} is {root}/train/class1/image0004.jpg" in line
    twin.unlink()
    (root / "val" / "class1" / "image0004.jpg").unlink()
    os.link(root / "train" / "class1" / "image0004.jpg", root / "val" / "class1" / "image0004.jpg")
    assert "too, at least 1 of" in said()[0]


def test_held_out_images_are_said_to_be_that_and_which_others_are_not_read(root):
    def said(**fields):
        config = config_of(root, **fields)
        return images_text(*open_datasets(config, None, progress=False), config)

    assert said() == "12 training and 6 validation images"
    held_out = "9 training and 3 validation images (held out of the training images"
    assert said(holdout=3) == f"{held_out}; {root}/val is not read)"
    assert said(holdout=3, train="val").endswith("3 validation images (held out of the training images)")
    assert said(dir=str(root / "train"), holdout=3) == f"{held_out}; {root}/val is not read)"
    rows = [f"{file.relative_to(root)},{file.parent.name}" for file in sorted(root.glob("val/*/*.jpg"))]
    (root / "labels.csv").write_text("\n".join(["file,label", *rows]))  # a table of the images in val
    assert said(holdout=3, train="labels.csv").endswith("3 validation images (held out of the training images)")
    for name in ("val", "x"):  # classes that are called so
        shutil.copytree(root / "train" / "class0", root / "classes" / name)
    assert said(dir=str(root / "classes"), train=".", holdout=3).endswith("(held out of the training images)")
    (root / "val").rename(root / "testing")
    assert said(holdout=3) == f"{held_out})"


def test_sets_that_can_hardly_be_meant(tmp_path):
    config = DataConfig()
    one_a_class = warnings_about(scan_classes(write_class_folders(tmp_path / "a", 4, 4)), None, config)
    assert len(one_a_class) == 1 and "one image a class (4 of them)" in one_a_class[0]
    one_class = warnings_about(scan_classes(write_class_folders(tmp_path / "b", 1, 4)), None, config)
    assert len(one_class) == 1 and "one class ('class0'), so that every answer is right" in one_class[0]
    for kind in ("animals", "plants"):
        write_class_folders(tmp_path / "c" / kind, 2, 6)
    nested = warnings_about(scan_classes(tmp_path / "c"), None, config)
    assert len(nested) == 1 and "holds folders of images (4 in all)" in nested[0]
    files = sorted(file.relative_to(tmp_path) for file in (tmp_path / "c").rglob("*.jpg"))
    lines = [f"{file},{file.parts[1]}" for file in files]
    (tmp_path / "kinds.csv").write_text("\n".join(["file,label", *lines]))  # a table says itself which the classes are
    assert warnings_about(scan_classes(tmp_path / "kinds.csv"), None, config) == []
    for kind in ("n01", "n02"):  # as Tiny-ImageNet has it
        write_class_folders(tmp_path / "d" / kind, 1, 3)
    assert warnings_about(scan_classes(tmp_path / "d"), None, config) == []


def test_held_out_images_of_classes_that_nothing_teaches(tmp_path):
    """Three classes of one image each, and one of six; or none but classes of one image, in folders or in a table."""
    for name, images in (("some", 6), ("none", 1)):
        write_class_folders(tmp_path / name / "train", 3, 3)
        for i in range(images):
            (tmp_path / name / "train" / "large").mkdir(exist_ok=True)
            photo(i, 30, 30).save(tmp_path / name / "train" / "large" / f"{i}.jpg")
    config = config_of(tmp_path / "some", holdout=5)
    train, val = open_datasets(config, tmp_path / "cache", progress=False)
    lost = len({*val.labels.tolist()} - {*train.labels.tolist()})  # classes, and images, as each has one
    (line,) = warnings_about(train, val, config)
    assert 0 < lost < 5 and line.startswith(f"{lost} of the 5 held-out images are of classes of which no image is left")
    with pytest.raises(UserError, match="none of the 2 held-out images is of a class of which other images are left"):
        open_datasets(config_of(tmp_path / "none", holdout=2), tmp_path / "cache", progress=False)

    rows = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in sorted(tmp_path.glob("none/train/*/*.jpg"))]
    (tmp_path / "t.csv").write_text("\n".join(["file,label", *rows]))
    (line,) = warnings_about(scan_classes(tmp_path / "t.csv"), None, config)
    assert line.endswith("holds one image a class (4 of them): if these are not the classes, set data.label_column to the "
                         "column of the classes")  # fmt: skip


def test_validation_images_that_are_training_images_of_another_class(root, tmp_path):
    """Contradictory labels make an error too high; of several labels an image a part may agree, and nothing is said."""
    train, _ = open_all(root)
    part = train.take(np.arange(0, 12, 4))  # one of each class
    some, every = (dataclasses.replace(part, labels=(part.labels + by) % 3) for by in (np.array([0, 1, 1]), 1))
    some_of_them, all_of_them = (f" ({count} of these 3 with another class there)" for count in (2, 3))
    for val, example, conflicts, effect in (
        (part, 0, "", "they make the error too low; remove them from"),
        (
            some,
            1,
            some_of_them,
            "those of the same class make the error too low, the others too high; correct the labels",
        ),
        (every, 0, all_of_them, "they make the error too high; correct the labels"),
    ):
        (line,) = warnings_about(train, val, config_of(root))
        assert f"as {part.location(example)}{conflicts}: {effect}" in line
    rows = np.eye(3, dtype=np.uint8)
    several = dataclasses.replace(train, labels=rows[train.labels])
    same = same_images(several, dataclasses.replace(part, labels=rows[part.labels] | rows[[1, 1, 1]]))
    assert same and (same.found, same.conflicts) == (3, 0)

    for label in ("a", "b"):  # in training with both classes, of which one is the right one, whichever comes first
        (tmp_path / "both" / label).mkdir(parents=True)
        photo(1, 30, 30).save(tmp_path / "both" / label / "x.jpg")
    both = scan_classes(tmp_path / "both")
    for i in (0, 1):
        same = same_images(both, both.take(np.array([i])))
        assert same and (same.found, same.conflicts) == (1, 0) and " is " not in same.text  # its copy is itself


def test_archives_and_arrays_are_compared_too(root, tmp_path):
    train, _ = open_all(root)
    config = config_of(root)
    part = train.take(np.arange(0, 12, 4))
    assert "at least 3 of 3, as" in warnings_about(train, part, config)[0]
    arrays = dataclasses.replace(part, lengths=np.full(3, 7))
    assert warnings_about(train, arrays, config) == []


def test_how_many_images_are_in_both_sets_is_told_of_those_taken_evenly(tmp_path):
    """20 of 200 validation images are training images: under their own names, which are all compared, or under others, of which
    only those taken evenly are found. Neither is told as a share of what was compared. Four images have one length."""
    folders = {name: tmp_path / name for name in ("train", "named", "renamed")}
    for folder in folders.values():
        (folder / "c").mkdir(parents=True)
    for i in range(200):
        old, new = (b"P6 8 8 255\n" + np.random.default_rng([i, new]).bytes(192 + i % 50) for new in (False, True))
        (folders["train"] / "c" / f"{i:03d}.ppm").write_bytes(old)
        content, own = (new, "new") if i % 10 else (old, "")  # new ones have training's lengths, not its names
        (folders["named"] / "c" / f"{own}{i:03d}.ppm").write_bytes(content)
        (folders["renamed"] / "c" / f"new{i:03d}.ppm").write_bytes(content)
    train, named, renamed = (scan_classes(folder) for folder in folders.values())

    def told(train: DatasetIndex, val: DatasetIndex) -> str:
        same = same_images(train, val)
        return same.told() if same else ""

    for val, all_named in ((named, True), (renamed, False)):
        taken = [val.names[200 * k // 32] for k in range(32)]
        evenly = sum(int(name[-7:-4]) % 10 == 0 for name in taken)
        assert evenly
        found = f"at least {20 if all_named else evenly} of 200 and {evenly} of 32 taken evenly, as {val.root}/c/"
        assert told(train, val).startswith(found)
    assert told(train, train).startswith("at least 32 of 200 and 32 of 32 taken evenly, as")
    copies = [int(name[-7:-4]) % 10 == 0 for name in renamed.names]
    assert "taken evenly" not in told(train, renamed.take(np.flatnonzero(copies)))  # all of so few are looked at
    assert told(train, renamed.take(np.flatnonzero(copies))).startswith("at least 20 of 20, as")
    assert same_images(train, renamed.take(np.flatnonzero(np.logical_not(copies)))) is None
