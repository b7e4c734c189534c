"""Tables of images and classes: what is read as one, the shapes that are known, and what is refused in one line."""

import csv
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from labelled_images import open_label_table
from PIL import Image
from test_zip_archive import zip_folder

from pipeline.config import DataConfig
from pipeline.data.checks import warnings_about
from pipeline.data.dataset import open_datasets, to_evaluate
from pipeline.data.image_files import COLORS
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes, scan_label_table
from pipeline.data.sources import open_source
from pipeline.data.table import Columns, TableSource, is_table, read_table
from pipeline.data.verify import verify
from pipeline.distributed import init_distributed
from pipeline.errors import UserError
from pipeline.report import warnings_of
from pipeline.run import Run
from tools.index import list_odd_images, main


def write_table(file: Path, *rows: tuple[str, ...], delimiter: str = ",") -> Path:
    with open(file, "w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    return file


def files_of(folder: Path) -> list[tuple[str, str]]:
    """(path relative to the folder, class) of its images, in no order."""
    return [(str(file.relative_to(folder)), file.parent.name) for file in folder.rglob("*.jpg")]


@pytest.fixture
def images(image_folders, tmp_path) -> Path:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(image_folders / split)
    return tmp_path


def assert_same_images(index, folders, prefix=""):
    """The same images in the same order with the same labels, so that a plan is the same."""
    assert index.names == tuple(prefix + name for name in folders.names) and index.classes == folders.classes
    for field in ("labels", "sizes", "lengths"):
        np.testing.assert_array_equal(getattr(index, field), getattr(folders, field))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_is_indexed_as_the_folders_that_it_names(images, image_folders, suffix, capfd):
    delimiter = "\t" if suffix == ".tsv" else ","
    for split in ("train", "val"):
        rows = [(f"{split}/{file}", name) for file, name in files_of(image_folders / split)]
        write_table(images / f"{split}{suffix}", ("file", "label"), *rows, delimiter=delimiter)
    config = DataConfig(dir=str(images), train=f"train{suffix}", val=f"val{suffix}")
    for split, index in zip(("train", "val"), open_datasets(config, images, progress=False), strict=True):
        assert_same_images(index, scan_classes(image_folders / split), f"{split}/")
        assert index.root == str(images / f"{split}{suffix}") and index.location(0) == str(images / index.names[0])
    told = capfd.readouterr().err
    assert "left out" not in told  # an image is of one of the two
    assert_same_images(scan_classes(images / f"train{suffix}"), scan_classes(image_folders / "train"), "train/")


def test_a_line_for_a_file_that_is_no_image_is_not_dropped(images, image_folders):
    """Also where its name does not say that it is one."""
    rows = files_of(image_folders / "train")
    for content in (b"", (image_folders / "train" / rows[0][0]).read_bytes()[:2]):
        (images / "odd").write_bytes(content)
        table = write_table(
            images / "t.csv", ("file", "label"), ("odd", rows[0][1]), *((f"train/{f}", k) for f, k in rows)
        )
        with pytest.raises(UserError, match="odd is not an image that can be read"):
            scan_classes(table)
    assert len(scan_classes(table, corrupt_images="skip")) == len(rows)


@pytest.mark.parametrize("table_of", ["train", "val"])
def test_images_of_the_other_sets_folder_are_not_left_out(images, image_folders, table_of, capfd):
    rows = [(f"{table_of}/{file}", name) for file, name in files_of(image_folders / table_of)]
    shutil.copyfile(image_folders / rows[0][0], images / "beside.jpg")
    write_table(images / "t.csv", ("file", "label"), *rows)
    config = DataConfig(dir=str(images), **{"train": "train", "val": "val", table_of: "t.csv"})
    open_datasets(config, images / "run", progress=False)
    assert (
        f"{images}/beside.jpg is not in the table {images}/t.csv: left out\n" in capfd.readouterr().err
    )  # and no others


def test_the_cache_knows_the_images_until_a_label_changes(images, image_folders, monkeypatch):
    rows = [(f"train/{file}", name) for file, name in sorted(files_of(image_folders / "train"))]
    table, cache = write_table(images / "train.csv", ("file", "label"), *rows), images / "cache"
    first = scan_classes(table, cache)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.scan_group._read_header", lambda *_: pytest.fail("read a header again"))
        assert scan_classes(table, cache).fingerprint == first.fingerprint
    write_table(table, ("file", "label"), (rows[0][0], "class2"), *rows[1:])
    changed = scan_classes(table, cache)
    assert changed.labels.sum() == first.labels.sum() + 2 and changed.fingerprint != first.fingerprint


@pytest.mark.parametrize("labels", ["single", "multi"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_the_cache_sees_that_images_of_an_archive_have_changed_places(tmp_path, kind, labels):
    """Though names, lengths and labels are what they were."""
    colors = {"a": (200, 0, 0), "b": (0, 200, 0), "c": (0, 0, 200)}
    for name, color in colors.items():
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{name}.bmp")
    write_table(tmp_path / "t.csv", ("file", "label"), *((f"{name}.bmp", f"class {name}") for name in colors))
    for order in ("abc", "cab", "bca"):
        archive = tmp_path / f"images.{kind}"
        with tarfile.open(archive, "w") if kind == "tar" else zipfile.ZipFile(archive, "w") as packed:
            for name in order:
                (packed.add if kind == "tar" else packed.write)(tmp_path / f"{name}.bmp", f"{name}.bmp")
        if labels == "single":
            index = scan_classes(TableSource(str(tmp_path / "t.csv"), open_source(archive)), tmp_path / "cache")
        else:
            index = scan_label_table(open_label_table(archive, tmp_path / "t.csv"), cache=tmp_path / "cache")
        for i, name in enumerate(colors):
            assert Reader(index).read(i).tobytes() == (tmp_path / f"{name}.bmp").read_bytes()


@pytest.mark.parametrize("labels", ["single", "multi"])
def test_images_that_are_in_an_archive_twice_are_told(image_folders, tmp_path, labels, capfd):
    rows = files_of(image_folders / "val")
    table = write_table(tmp_path / "t.csv", ("file", "label"), *rows)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(image_folders / "train" / rows[0][0], rows[0][0])
        for file, _ in rows:
            tar.add(image_folders / "val" / file, file)
    if labels == "single":
        index = scan_classes(TableSource(str(table), open_source(tmp_path / "val.tar")))
    else:
        index = scan_label_table(open_label_table(tmp_path / "val.tar", table))
    assert (
        Reader(index).read(index.names.index(rows[0][0])).tobytes() == (image_folders / "val" / rows[0][0]).read_bytes()
    )
    told = "is there more than once: the last one is taken, as when the archive is unpacked"
    assert capfd.readouterr().err == f"warning: {rows[0][0]} in {tmp_path / 'val.tar'} {told}\n"


def test_columns_by_name_by_option_and_a_column_of_splits(images, image_folders, capfd):
    rows = [
        ("7", f"{split}/{file}", "old", name, {"train": "Train", "val": "valid"}[split])
        for split in ("train", "val")
        for file, name in files_of(image_folders / split)
    ]
    table = write_table(images / "all.csv", ("age", "picture", "place", "kind", "split"), *rows)
    columns = {"file_column": "picture", "label_column": "kind"}
    config = DataConfig(dir=str(images), train="all.csv", val="all.csv", **columns)
    for _ in range(2):  # found, and out of the cache that both splits share
        train, val = open_datasets(config, images, progress=False)
        assert_same_images(train, scan_classes(image_folders / "train"), "train/")
        assert_same_images(val, scan_classes(image_folders / "val"), "val/")
    assert "not in the table" not in capfd.readouterr().err
    assert len((images / ".all.csv.index.jsonl").read_text().split()) == 2
    read = read_table(table, Columns("picture", "place"))
    assert len(read) == 48 and {entry.label for entry in read} == {"old"}


def test_several_splits_are_no_odd_image(images, image_folders, capsys):
    rows = [(f"{s}/{file}", name, s) for s in ("train", "val") for file, name in files_of(image_folders / s)]
    table = write_table(images / "all.csv", ("file", "label", "split"), *rows)
    told = f"{table} has lines of several splits (37 of train, 11 of val): all are taken"
    list_odd_images([open_source(table)], [], COLORS)
    assert capsys.readouterr().out.splitlines() == [told, "no image is odd (48 images read)"]
    write_table(table, ("file", "label", "split"), *rows[:-1])
    list_odd_images([open_source(table)], [], COLORS)
    assert capsys.readouterr().out.splitlines() == [
        told.replace("11", "10"),
        f"{images}/{rows[-1][0]} is not in the table {table}: left out",
        f"         1  is not in the table {table}: left out",
    ]


@pytest.mark.parametrize("labels", ["single", "multi"])
def test_validation_lines_beside_held_out_images_are_told(images, image_folders, labels):
    rows = [(f"{s}/{file}", name, s) for s in ("train", "val") for file, name in files_of(image_folders / s)]
    table = write_table(images / "all.csv", ("file", "label", "split"), *rows)
    write_table(images / "train.csv", ("file", "label"), *(row[:2] for row in rows[:37]))

    def told(**fields: object) -> list[str]:
        config = DataConfig(dir=str(images), labels=labels, **fields)
        return warnings_about(*open_datasets(config, None, progress=False), config)

    assert told(train="all.csv", holdout=9) == [
        f"of {table} the 11 lines of other splits are not read, as 9 training images are held out to validate on: to validate "
        "on those set data.val all.csv and leave out data.holdout"
    ]
    assert told(train="all.csv", val="all.csv", holdout=9) == told(train="all.csv", holdout=9)
    assert told(train="train.csv", val="all.csv", holdout=9) == [
        "data.val all.csv is not read, as 9 training images are held out to validate on: to validate on it leave out "
        "data.holdout"
    ]
    assert told(train="train.csv", holdout=9) == [] == told(train="all.csv", val="all.csv")


def test_a_column_that_looks_like_splits_is_told_at_each_start(images, image_folders):
    """Else the test images would be trained on in silence."""
    rows = [
        (f"{s}/{file}", name, {"val": "Test"}.get(s, s))
        for s in ("train", "val")
        for file, name in files_of(image_folders / s)
    ]
    table = write_table(images / "all.csv", ("file", "label", "part"), *rows)
    config = DataConfig(dir=str(images), train="all.csv", holdout=9)
    for _ in range(2):
        (told,) = warnings_about(*open_datasets(config, images / "cache", progress=False), config)
        assert told.startswith(f"{table} has a column 'part' of nothing but names of splits, which is not read")
    for others in ([(*row[:2], "train") for row in rows], [*rows[:-1], (*rows[-1][:2], "female")]):
        write_table(images / "all.csv", ("file", "label", "part"), *others)
        assert warnings_about(*open_datasets(config, None, progress=False), config) == []


def test_a_table_beside_other_images_says_where_to_give_their_folder(
    images, image_folders, tmp_path, monkeypatch, capsys
):
    (elsewhere := tmp_path / "lists").mkdir()
    files = sorted((image_folders / "val").rglob("*.jpg"))
    for named in (lambda file: str(file), lambda file: os.path.relpath(file, elsewhere)):
        table = write_table(
            elsewhere / "t.csv", ("file", "label"), *((named(file), file.parent.name) for file in files)
        )
        with pytest.raises(
            UserError, match=r"line 2: '.*' is not in the folder of the images: give that folder as data.dir, or"
        ):
            scan_classes(table)
        monkeypatch.setattr("sys.argv", ["index", str(image_folders / "val"), "--labels", str(table), "--verify"])
        main()
        said = capsys.readouterr().out
        assert "no image is odd (11 images read)" in said and f"images     11 in {table}\n" in said


def test_a_table_where_a_folder_is_missing_is_offered(images, image_folders):
    write_table(
        images / "labels.csv",
        ("file", "label"),
        *((f"train/{f}", name) for f, name in files_of(image_folders / "train")),
    )
    (images / "train").rename(images / "pictures")
    with pytest.raises(UserError, match=r"if labels.csv names the images and their classes, set data.train labels.csv"):
        open_datasets(DataConfig(dir=str(images)), None, progress=False)


@pytest.mark.parametrize("splits", [False, True])
def test_training_finds_what_tools_index_has_kept(images, image_folders, splits, monkeypatch, capsys):
    folders = [(split, image_folders / split) for split in ("train", "val")]
    rows = [(f"{split}/{file}", name, split) for split, folder in folders for file, name in files_of(folder)]
    names = ("both", "both") if splits else ("train", "val")
    for name in names:
        own = rows if splits else [row[:2] for row in rows if row[2] == name]
        write_table(images / f"{name}.csv", ("file", "label", "split")[: len(own[0])], *own)
    monkeypatch.setattr("sys.argv", ["index", str(images / f"{names[0]}.csv")])
    main()
    config = DataConfig(dir=str(images), train=f"{names[0]}.csv", val=f"{names[1]}.csv")
    kept = images / f".{names[0]}.csv.index.jsonl"
    lines = kept.read_text()
    sets = open_datasets(config, images, progress=False)
    assert kept.read_text() == lines
    told = capsys.readouterr().out
    assert all(index.fingerprint in told for index in (sets if splits else sets[:1]))


@pytest.mark.parametrize("of", ["of ", ""])  # where DIR holds train and val, the table still counts
@pytest.mark.parametrize(("training", "validation"), [("train", "val"), ("Training", "test")])
def test_tools_index_takes_the_two_sets_of_a_table(
    tmp_path, image_folders, monkeypatch, capfd, user_error, training, validation, of
):
    """As a run takes them: an image of both is told as such, and none as twice in training; what is kept, a run finds."""
    images, third = tmp_path / "images", "dev" if validation == "test" else "test"
    for split in ("train", "val"):
        shutil.copytree(image_folders / split, images / f"{of}{split}")
    splits = {"train": training, "val": validation}
    rows = [(f"{of}{s}/{file}", name, splits[s]) for s in splits for file, name in files_of(images / f"{of}{s}")]
    content = (images / rows[0][0]).read_bytes()
    for name in (f"{of}val/class1/twin.jpg", "third/twin.jpg", "third/stray.jpg", "third/stray2.jpg"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(content)
    rows += [(f"{of}val/class1/twin.jpg", "class1", validation), ("third/twin.jpg", "class0", third)]
    table = write_table(images / "all.csv", ("file", "label", "split"), *rows)
    own, there = (
        " and ".join(splits.values()).lower(),
        ", ".join(sorted([*splits.values(), third], key=str.lower)).lower(),
    )
    for words in ([table], [images, "--labels", "all.csv"]):
        monkeypatch.setattr("sys.argv", ["index", *map(str, words), "--verify"])
        main()
        said = capfd.readouterr()
        assert f"of {table} the splits {own} are taken (there are {there})" in said.err
        assert (
            f"{images / rows[0][0]} is a validation image of another class too ({images}/{of}val/class1/twin.jpg)"
            in said.out
        )
        assert "twice" not in said.out and "third/twin" not in said.out
        assert f"         2  is not in the table {table}: left out" in said.out
        found = [line.split()[1] for line in said.out.splitlines() if line.startswith(("split ", "images "))]
        assert found == [training.lower(), "37", validation, "12"]
    kept = (images / ".all.csv.index.jsonl").read_text()
    for index in open_datasets(DataConfig(dir=str(images), train="all.csv", val="all.csv"), None, progress=False):
        assert index.fingerprint in said.out
    assert (images / ".all.csv.index.jsonl").read_text() == kept
    assert "a DIR that does not hold both sets" in user_error(main, table, "--verify", "--against", table)
    write_table(table, ("file", "label", "split"), *rows, (rows[0][0], "class0", validation))
    monkeypatch.setattr("sys.argv", ["index", str(table)])
    with pytest.raises(UserError, match="all.csv has lines of two splits for the image"):
        main()
    write_table(table, ("file", "label", "split"), *rows, ("third/stray.jpg", "zebra", validation))
    with pytest.raises(
        UserError,
        match="differ: of .*all.csv training's lines have no class 'zebra', which validation's have: remove it there",
    ):
        main()


def test_a_run_warns_of_lines_of_the_table_that_it_has_found(image_folders, tmp_path):
    rows = [(f"pictures/{s}/{file}", name, s) for s in ("train", "val") for file, name in files_of(image_folders / s)]
    table = write_table(tmp_path / "train.csv", ("file", "label", "split"), *rows)
    (tmp_path / "pictures").symlink_to(image_folders)
    config = small_config(tmp_path / "run", data={"dir": str(tmp_path), "loader": "reference", "holdout": 9})
    with init_distributed("cpu") as world:
        told = warnings_of(Run(config, world), None)
    assert [line for line in told if line.startswith(f"of {table} the 11 lines of other splits are not read")]


def test_lines_of_other_splits_are_neither_lacking_nor_taken(images, image_folders, capfd):
    """Those that are not evaluated may name files that are not there; an image is of one split."""
    rows = [(f"{s}/{file}", name, s) for s in ("train", "val") for file, name in files_of(image_folders / s)]
    table = write_table(images / "all.csv", ("file", "label", "split"), *rows, ("test/x.jpg", "class0", "test"))
    config = DataConfig(dir=str(images), train="all.csv", val="all.csv")
    open_datasets(config, None, progress=False)
    of_val = scan_classes(image_folders / "val")
    assert_same_images(scan_classes(to_evaluate(table, DataConfig())), of_val, "val/")
    assert capfd.readouterr().err == ""
    write_table(table, ("file", "label", "split"), *rows[1:])
    assert len(scan_classes(table)) == 47
    told = capfd.readouterr().err
    assert f"{table} has lines of several splits (36 of train, 11 of val): all are taken" in told
    assert f"{rows[0][0]} is not in the table {table}: left out" in told
    write_table(table, ("file", "label", "split"), *rows, (rows[-1][0], "class1", "test"))
    open_datasets(config, None, progress=False)  # an image for validation and for a later test: of neither for training
    write_table(table, ("file", "label", "split"), *rows, (rows[0][0], "class1", "val"))
    with pytest.raises(UserError, match=f"all.csv has lines of two splits for the image '{rows[0][0]}', one of them"):
        open_datasets(config, None, progress=False)
    write_table(table, ("file", "label", "split"), *rows[:37])
    with pytest.raises(UserError, match="all.csv has no line of split val, but of train"):
        scan_classes(to_evaluate(table, DataConfig()))


def test_numbers_are_classes_in_their_order(images):
    rows = [(f"train/class{i % 3}/image{i:04d}.jpg", str((10, 9, 100)[i % 3])) for i in range(37)]
    index = scan_classes(write_table(images / "t.csv", ("id", "target"), *rows))
    assert index.classes == ("9", "10", "100") and index.labels[0] == 0
    assert index.names[0] == "train/class1/image0001.jpg"


def test_kaggle_tiny_imagenet_and_cub_are_known(images, image_folders):
    val = scan_classes(image_folders / "val")
    files = [(name, name.split("/")[0], Path(name).stem) for name in reversed(val.names)]
    boxes = [(stem, f"{label} 1 2 30 40 {label} 5 6 7 8 ") for _, label, stem in files]
    os.remove(images / "train")  # whose images are called as those of val
    write_table(images / "LOC_val_solution.csv", ("ImageId", "PredictionString"), *boxes)
    assert_same_images(scan_classes(images / "LOC_val_solution.csv"), val, "val/")
    lines = [f"{Path(name).name}\t{label}\t0\t1\t20\t30\n" for name, label, _ in files]
    (images / "val_annotations.txt").write_text("".join(lines))
    assert_same_images(scan_classes(images / "val_annotations.txt"), val, "val/")

    cub = images / "CUB_200_2011"
    cub.mkdir()
    (cub / "images").symlink_to(image_folders / "train")
    both = scan_classes(image_folders / "train")
    (cub / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(both.names, 1)))
    (cub / "image_class_labels.txt").write_text("".join(f"{i} {k + 1}\n" for i, k in enumerate(both.labels, 1)))
    (cub / "classes.txt").write_text("".join(f"{k} {name}\n" for k, name in enumerate(both.classes, 1)))
    (cub / "train_test_split.txt").write_text("".join(f"{i} {i % 4 and 1}\n" for i in range(1, 38)))
    split = "CUB_200_2011/train_test_split.txt"
    train, test = open_datasets(DataConfig(dir=str(images), train=split, val=split), images, progress=False)
    of_test = np.arange(1, 38) % 4 == 0
    for index, rows in ((train, ~of_test), (test, of_test)):
        assert_same_images(index, both.take(np.flatnonzero(rows)), "CUB_200_2011/images/")
    (cub / "classes.txt").unlink()
    with pytest.raises(UserError, match="is CUB's, and .*classes.txt beside it is missing"):
        scan_classes(images / split)


def test_the_training_classes_hold_for_a_validation_table(images, image_folders):
    rows = [(f"val/{file}", "clas0" if i == 3 else name) for i, (file, name) in enumerate(files_of(images / "val"))]
    write_table(images / "val.csv", ("file", "label"), *rows)
    with pytest.raises(UserError, match="has no class 'clas0', which .*val.csv has"):
        open_datasets(DataConfig(dir=str(images), val="val.csv"), images, progress=False)
    rows = [row for row in rows if row[1] == "class1"]
    write_table(images / "val.csv", ("file", "label"), *rows)
    _, val = open_datasets(DataConfig(dir=str(images), val="val.csv"), images, progress=False)
    assert val.classes == ("class0", "class1", "class2") and set(val.labels.tolist()) == {1}


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("a.jpg,cat\nb.jpg,dog\n", {}, "has no header: put a line such as 'file,label' above"),
        ("file,a,b\nx,1,2\n", {}, "none of the columns file, a, b is called label: set data.label_column"),
        ("file,label\nx,\n", {}, "line 2: the image 'x' has no label"),
        ("file,label\nx,1\n", {"label": "lable"}, r"no column 'lable' \(data.label_column\).*did you mean 'label'"),
        ("file,label\nx,1\n", {"file": "label", "label": "label"}, "cannot be that of files and of labels"),
        ("file,label,split\nx,1,train\nx,1,Odd\n", {"split": "val"}, "line 3: 'Odd' is no split"),
        ("file,label,split\nx,1,train\n", {"split": "val"}, r"no line of split val, but of train: give .*\(data.val\)"),
        (
            "file,label,split\nx,1,train\nx,1,training\n",
            {"split": "train"},
            "split train and of training, which mean the same",
        ),
        (
            "file,label,split\nx,1,valid\nx,1,val\n",
            {"split": "val"},
            "of split val and of valid, which mean the same: call",
        ),
        ("file,label\nx,1,2\n", {}, "line 2 has 3 columns"),
        ("file,label\nx,\udce9toile\n", {}, r"line 2: '.udce9toile' is not in UTF-8: save the table"),
        ("file,label\ntrain/class0/image0000.jpg,1\nx,1\n", {}, "line 3: there is no image 'x'"),
    ],
)
def test_what_a_table_may_not_say(images, text, columns, expected):
    (images / "t.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=expected):
        source = TableSource(str(images / "t.csv"), TableSource.at(str(images / "t.csv")).images, Columns(**columns))
        scan_classes(source)


def test_another_table_is_evaluated_by_the_columns_that_it_has(images, image_folders):
    """By the run's, where it has them, or by the usual names; parts of another kind are no matter where no split is wanted."""
    rows = [(f"val/{file}", "x", name) for file, name in files_of(image_folders / "val")]
    config, expected = DataConfig(file_column="picture", label_column="kind"), scan_classes(image_folders / "val")
    for header in (("picture", "place", "kind"), ("file", "place", "label")):
        table = write_table(images / "other.csv", header, *rows)
        assert_same_images(scan_classes(to_evaluate(table, config)), expected, "val/")
    table = write_table(
        images / "parts.csv", ("subset", "path", "label"), *(("AB"[i % 2], *row[::2]) for i, row in enumerate(rows))
    )
    assert_same_images(scan_classes(table), expected, "val/")
    write_table(images / "nameless.csv", ("split", "where", "label"), *(("val", *row[::2]) for row in rows))
    assert_same_images(scan_classes(images / "nameless.csv"), expected, "val/")


def test_columns_are_for_tables(images):
    with pytest.raises(UserError, match="train is no table, and data.file_column"):
        open_datasets(DataConfig(dir=str(images), file_column="file"), images, progress=False)
    with pytest.raises(UserError, match="label_column is for a table of files with one class each"):
        small_config(images / "run", data={"label_column": "x"})


def test_a_text_file_of_another_kind_is_no_table(images):
    (images / "notes.txt").write_text("a.jpg\tcat\n")
    assert not is_table(images / "notes.txt") and not is_table(images / "train")
    with pytest.raises(UserError, match="notes.txt is of no known kind"):
        scan_classes(images / "notes.txt")


def test_verify_takes_a_table(images, image_folders):
    rows = [(f"train/{file}", name) for file, name in files_of(image_folders / "train")]
    source = TableSource.at(str(write_table(images / "train.csv", ("file", "label"), *rows)))
    (told,) = verify([source], [])
    assert str(told).endswith(f"image0000.jpg is not in the table {images}/train.csv: left out") and told.count == 11


def test_cub_in_a_zip_file_with_its_text_files_unpacked(images, image_folders):
    both = scan_classes(image_folders / "train")
    zip_folder(image_folders / "train", images / "CUB.zip", "CUB_200_2011/images")
    (images / "text").mkdir()
    (images / "text" / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(both.names, 1)))
    labels = "".join(f"{i} {k + 1}\n" for i, k in enumerate(both.labels, 1))
    (images / "text" / "image_class_labels.txt").write_text(labels)
    (images / "text" / "classes.txt").write_text("".join(f"{k} {name}\n" for k, name in enumerate(both.classes, 1)))
    (images / "text" / "train_test_split.txt").write_text("".join(f"{i} {i % 2}\n" for i in range(1, 38)))
    split = str(images / "text" / "train_test_split.txt")
    config = DataConfig(dir=str(images / "CUB.zip"), train=split, val=split)
    train, test = open_datasets(config, images / "run", progress=False)
    rows = np.arange(37)
    assert_same_images(train, both.take(rows[::2]), "CUB_200_2011/images/")
    assert_same_images(test, both.take(rows[1::2]), "CUB_200_2011/images/")
