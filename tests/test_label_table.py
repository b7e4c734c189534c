"""Tables of several labels an image: what they may say, and what is refused in one line."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from labelled_images import COLOURS, open_label_table, write_labelled_images

from pipeline.audit import audit, differences
from pipeline.config import DataConfig
from pipeline.config_file import load_config
from pipeline.data.dataset import open_datasets
from pipeline.data.label_table import match_files, read_label_table
from pipeline.data.scan import scan_label_table
from pipeline.errors import UserError
from pipeline.metrics import LabelScore
from pipeline.ranking import NOT_DEFINED, MeanRanking
from pipeline.run import Progress
from tools import index


def table(folder: Path, text: str) -> Path:
    (folder / "table.csv").write_text(text, errors="surrogateescape")
    return folder / "table.csv"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_labelled_images(tmp_path_factory.mktemp("labelled"))


def test_names_between_bars_and_columns_of_0_and_1_say_the_same(tmp_path):
    names = read_label_table(table(tmp_path, 'file,labels\na.png,"wolf|cat"\nb.png,\nc.png, No Finding\nd.png,cat\n'))
    assert names.files == ("a.png", "b.png", "c.png", "d.png") and names.classes == ("cat", "wolf")
    columns = read_label_table(
        table(tmp_path, "\ufeffcat,image,wolf\n1,a.png,1.0\n0,b.png,0\n0,c.png,0\n1,d.png,0\n\n")
    )
    assert columns.files == names.files and columns.classes == names.classes
    assert columns.labels.tolist() == names.labels.tolist() == [[1, 1], [0, 0], [0, 0], [1, 0]]
    assert read_label_table(table(tmp_path, "file,labels\na,cat\n"), ("wolf", "cat")).labels.tolist() == [[0, 1]]
    assert read_label_table(table(tmp_path, "file,cat,wolf\na,1,0\n"), ("wolf", "cat")).labels.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("text", "classes", "expected"),
    [
        ("file,labels\n", None, "no table of labels"),
        ("file,labels\na\n", None, "line 2 has 1 column, and the header has 2"),
        ("file,labels\na,cat\n\nb,cat\n", None, "line 3 has 0 columns"),
        ("file,cat,cat\na,1,0\n", None, "two columns 'cat'"),
        ("file,cat,age\na,1,0\nb,1,56\n", None, "line 3: '56' in the column 'age' is not 0 or 1"),
        ("file,cat\na,\n", None, "line 2: '' in the column 'cat' is not 0 or 1"),
        ("file,labels\na,\n", None, "holds no label"),
        ("file,labels\na,cat|dgo\n", ("cat", "dog"), r"line 2: the label 'dgo' is none of .*did you mean 'dog'"),
        ("file,cat\na,1\n", ("cat", "dog"), "has no column 'dog'"),
        ("file,cat,dog\na,1,0\n", ("cat",), "has the column 'dog'"),
        ("file,cat,\udcc9pi\na,1,0\n", None, r"line 1: '.udcc9pi' is not in UTF-8: save the table in that encoding"),
        ("file,labels\na,cat\nb,cat|\udcc9pi\n", None, r"line 3: 'cat\|.udcc9pi' is not in UTF-8"),
    ],
)
def test_what_a_table_may_not_say(tmp_path, text, classes, expected):
    with pytest.raises(UserError, match=expected):
        read_label_table(table(tmp_path, text), classes)


def test_an_entry_that_is_no_image_is_not_said_to_lie_elsewhere(tmp_path):
    (tmp_path / "photo.heic").touch()
    for entry in ("", "photo.heic", "."):
        with pytest.raises(UserError, match=f"line 2: there is no image '{entry}'"):
            match_files(tmp_path / "t.csv", [entry], ["a.png"], str(tmp_path))


def test_an_entry_means_one_image():
    names = ["a/1.png", "a/2.png", "b/2.png", "lists/3.png"]
    assert match_files(Path("/data/lists/t"), ["1.png", "./a/2.png", "3"], names, "/data") == [
        "a/1.png",
        "a/2.png",
        "lists/3.png",
    ]
    assert match_files(Path("/data/lists/t"), ["3.png", "../b/2.png"], names, "/data") == ["lists/3.png", "b/2.png"]
    for wanted, expected in (
        (["2.png"], "line 2: it is not clear which image is '2.png': it may be a/2.png or b/2.png: give paths"),
        (["1", "4.png"], "line 3: there is no image '4.png': remove the line"),
        (["b/1.png"], "line 2: there is no image 'b/1.png': there is 'a/1.png': correct or remove the line"),
        (["1.png", "a/1.png"], r"line 3: a second line for the image 'a/1.png' \(line 2\)"),
    ):
        with pytest.raises(UserError, match=expected):
            match_files(Path("/data/t"), wanted, names, "/data")
    both = ["images/1.png", "test/images/1.png"]  # right from the data folder, and from the table's
    with pytest.raises(UserError, match="it may be images/1.png or test/images/1.png: give paths that only one"):
        match_files(Path("/data/test/t"), ["images/1.png"], both, "/data")
    for entry, meant in (("../images/1.png", both[0]), ("test/images/1.png", both[1]), ("/data/images/1.png", both[0])):
        assert match_files(Path("/data/test/t"), [entry], both, "/data") == [meant]


@pytest.mark.parametrize(
    ("entry", "names", "meant"),
    [
        ("val/1.png", ["train/1.png"], None),  # what is wrong is no shorter form of what is right
        ("a.png", ["x/a.jpg"], None),
        ("x/a.png", ["x/a.jpg"], None),
        ("x/a", ["y/a.png"], None),
        ("scan.2", ["scan.png"], None),
        ("scan", ["scan.2"], None),
        ("../../1.png", ["1.png"], None),
        ("/elsewhere/1.png", ["1.png"], None),
        ("y/x/a", ["x/a.png", "z/x/a.png"], None),
        ("a.png", ["x/a.png", "x/a.jpg"], "x/a.png"),
        ("x/a.png", ["top/x/a.png", "top/y/a.png"], "top/x/a.png"),
        ("x/a", ["top/x/a.png", "top/y/a.png"], "top/x/a.png"),
        ("x/a.png", ["x/a.png", "y/x/a.png"], "x/a.png"),
        ("x/a", ["x/a.png", "y/a.png"], "x/a.png"),
        ("a", ["lists/x/b.png", "lists/a.png"], "lists/a.png"),
        ("x/b", ["lists/x/b.png", "b.png"], "lists/x/b.png"),
        ("./scan.2", ["x/scan.2.PNG", "scan.png"], "x/scan.2.PNG"),
        ("scan.2", ["x/scan.2"], "x/scan.2"),
        ("/data/lists/a.png", ["lists/a.png", "a.png"], "lists/a.png"),
        ("/data/x/a.png", ["x/a.png"], "x/a.png"),
        ("../x/a.png", ["x/a.png"], "x/a.png"),
    ],
)
def test_an_entry_may_lack_folder_and_suffix_but_have_no_others(entry, names, meant):
    if meant:
        assert match_files(Path("/data/lists/t.csv"), [entry], names, "/data") == [meant]
        return
    with pytest.raises(UserError, match=f"line 2: there is no image '{entry}'"):
        match_files(Path("/data/lists/t.csv"), [entry], names, "/data")


def test_the_images_of_a_table_are_indexed_with_their_labels(images, capfd):
    config = DataConfig(dir=str(images), labels="multi", train="train.csv", val="val.csv")
    train, val = open_datasets(config, images / "cache", progress=True)
    assert "left out" not in capfd.readouterr().err  # an image is of one of the two
    assert train.classes == val.classes == COLOURS and (len(train), len(val)) == (44, 16)
    (images / "train.csv").write_text("\n".join((table := (images / "train.csv").read_text()).splitlines()[:-1]))
    open_datasets(config, images / "cache", progress=True)
    told = f"image043.png is not in the table {images}/train.csv nor in {images}/val.csv: left out\n"
    assert (said := capfd.readouterr().err).count("left out") == 1 and told in said
    (images / "train.csv").write_text(table)
    assert list(train.names) == sorted(train.names)
    for name, labels in zip(val.names, val.labels.tolist(), strict=True):
        number = int(name[-7:-4])
        assert labels == [number >> k & 1 for k in range(3)] and name.startswith(f"folder{number % 2}/")
    part = train.take(np.array([3, 1]))
    assert part.labels.tolist() == train.labels[[3, 1]].tolist()
    other = scan_label_table(open_label_table(images, images / "val.csv", ("red", "green", "gold", "blue")))
    assert other.labels[:, [3, 1, 0]].tolist() == val.labels.tolist() and not other.labels[:, 2].any()
    assert other.with_classes(("blue", "green", "red", "gold")).labels[:, :3].tolist() == val.labels.tolist()
    assert len({train.fingerprint, val.fingerprint, other.fingerprint}) == 3


@pytest.mark.parametrize("kind", ["columns", "names"])
def test_one_table_of_both_splits(images, kind, capfd):
    """Every fourth of sixty images is for validation."""
    rows = []
    for i in range(60):
        of = (
            [str(i >> k & 1) for k in range(3)]
            if kind == "columns"
            else ["|".join(c for k, c in enumerate(COLOURS) if i >> k & 1)]
        )
        rows.append(",".join([f"image{i:03d}", *of, "valid" if i % 4 == 0 else "train"]))
    header = ["file", *(COLOURS if kind == "columns" else ["labels"]), "split"]
    (images / f"{kind}.csv").write_text("\n".join([",".join(header), *rows]))
    config = DataConfig(dir=str(images), labels="multi", train=f"{kind}.csv", val=f"{kind}.csv")
    for _ in range(3):
        train, val = open_datasets(config, images / "cache", progress=True)
    assert (
        len((images / f".{kind}.csv.index.jsonl").read_text().split()) == 2
    )  # a line for each split, of which none replaces the other
    assert (len(train), len(val)) == (45, 15) and set(train.classes) == set(val.classes) == set(COLOURS)
    assert not {name[-7:-4] for name in train.names} & {f"{i:03d}" for i in range(0, 60, 4)}
    assert "left out" not in capfd.readouterr().err
    whole = scan_label_table(open_label_table(images, images / f"{kind}.csv"))
    told = f"{kind}.csv has lines of several splits (45 of train, 15 of valid): all are taken"
    assert len(whole) == 60 and told in capfd.readouterr().err
    (images / f"{kind}.csv").write_text("\n".join([",".join(header), *rows, "image001" + rows[0][8:]]))
    with pytest.raises(UserError, match="has lines of two splits for the image 'folder1/image001"):
        open_datasets(config, None, progress=False)
    rows = [row.replace("valid", "te").replace("train", "tr") for row in rows]
    (images / f"{kind}.csv").write_text("\n".join([",".join(header), *rows]))
    with pytest.raises(
        UserError, match=f"{kind}.csv, line 2: 'te' is no split: give train, .*, or call the column other"
    ):
        open_datasets(config, None, progress=False)


def test_files_whose_names_say_nothing_are_counted_right(images, tmp_path, capfd):
    shutil.copytree(images / "folder0", tmp_path / "folder0")
    for file in (tmp_path / "folder0").iterdir():
        file.rename(file.with_suffix("") if file.stem < "image010" else file)
    names = sorted(file.name for file in (tmp_path / "folder0").iterdir())
    rows = [f"{name},{i % 2}" for i, name in enumerate(names[:6])]
    (tmp_path / "some.csv").write_text("\n".join(["file,blue", *rows]))
    scan_label_table(open_label_table(tmp_path, tmp_path / "some.csv"), progress=True)
    by_name = sum("." in name for name in names[6:])
    told = f"{tmp_path}/folder0/{names[6]} is not in the table {tmp_path}/some.csv (and {by_name - 1} more): left out"
    assert names[6].endswith(".png") and told in capfd.readouterr().err


def test_tools_index_knows_tables_of_several_labels(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["index", *map(str, words), "--several-labels"])
        index.main()
        return capsys.readouterr().out

    data = write_labelled_images(tmp_path / "data")
    rows = (data / "train.csv").read_text().splitlines()
    told = run(data)
    sets = open_datasets(DataConfig(dir=str(data), labels="multi"), None, progress=False)
    for name, index_of in zip(("train", "val"), sets, strict=True):
        per_class, none = index_of.labels.sum(axis=0), sum(not any(row) for row in index_of.labels)
        of = f"of {per_class.min()} to {per_class.max()} images, several an image, {none} images with none"
        assert f"images     {len(index_of)} in {data}" in told and of in told and index_of.fingerprint in told
        assert len((data / f".{name}.csv.index.jsonl").read_text().split()) == 1  # what training reads
    assert "no image is odd" in run(data, "--verify")
    validated = next(iter(sets[1].names))
    (data / "train.csv").write_text("\n".join([*rows, validated + rows[1][rows[1].index(",") :]]))
    cut = data / sets[0].names[0]
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(UserError, match="1 of what is listed would stop"):
        run(data, "--verify")
    told = capsys.readouterr().out
    assert f"{cut} is truncated" in told and f"{data / validated} is a validation image too" in told
    with pytest.raises(UserError, match="1 of what is listed would stop"):
        run(data / "train.csv", "--verify", "--against", data / "val.csv")
    told = capsys.readouterr().out
    assert f"{cut} is truncated" in told and f"{data / validated} is a validation image too" in told
    (elsewhere := tmp_path / "lists").mkdir()
    (data / "val.csv").rename(elsewhere / "val.csv")
    with pytest.raises(UserError, match="is not in the folder of the images|there is no image"):
        run(elsewhere / "val.csv")
    assert f"images     {len(sets[1])} in {data}" in run(data, "--labels", elsewhere / "val.csv")
    with pytest.raises(UserError, match="--several-labels is for tables with a header: leave out --classes"):
        run(data, "--file-column", "a")
    with pytest.raises(UserError, match=f"{data} holds no tables train.csv and val.csv: give the table itself"):
        run(data)
    assert f"images     {len(sets[0]) + 1} in " in run(data / "train.csv")


def test_a_table_without_anything_to_learn_is_refused(images, capfd):
    (images / "all.csv").write_text("file,blue\nimage001,1\nimage003,1\n")
    config = DataConfig(dir=str(images), labels="multi", train="all.csv", holdout=1)
    with pytest.raises(UserError, match=r"all\.csv: no class has images with and images without it"):
        open_datasets(config, images, progress=False)
    with pytest.raises(UserError, match="folder0 is a folder: with data.labels multi"):
        open_datasets(DataConfig(dir=str(images), labels="multi", train="folder0", holdout=1), images, progress=False)
    (images / "some.csv").write_text("file,blue,red\nimage001,1,0\nimage003,1,1\n")
    open_datasets(DataConfig(dir=str(images), labels="multi", train="some.csv", val="some.csv"), images, progress=False)
    assert "some.csv all images or none have 'blue' (1 of 2 classes are so)" in capfd.readouterr().err


def test_a_missing_table_is_answered_with_those_that_are_there(images, tmp_path):
    def complaint(folder: Path, **fields) -> str:
        with pytest.raises(UserError) as caught:
            open_datasets(DataConfig(dir=str(folder), labels="multi", **fields), tmp_path, progress=False)
        return str(caught.value)

    for name in ("train", "val", "train.zip"):
        (tmp_path / name).mkdir()  # with class folders these would be offered
    (tmp_path / "empty").mkdir()
    for name in ("labels.csv", "Other.CSV", ".hidden.csv"):
        (tmp_path / name).write_text("file,blue\nimage001,1\nimage002,0\n")
    there = "to Other.CSV or labels.csv, which data.dir holds"
    assert complaint(tmp_path, train="train.csv").endswith(f"with data.labels multi, set data.train {there}")
    said = complaint(tmp_path, train="labels.csv", val="val.csv")
    assert f"{tmp_path}/val.csv does not exist" in said and f"set data.val {there}, or data.holdout" in said
    assert "set data.train to a CSV file" in complaint(tmp_path / "empty", train="train.csv", holdout=1)


def test_each_part_of_a_table_that_is_held_out_from_must_tell_something(images, capfd):
    """Row 0 of nine images is the only one with the third class; blue is in every second one, none has gold."""
    rows = [f"image{i:03d},{i % 2},{int(i == 0)},0" for i in range(9)]
    (images / "nine.csv").write_text("\n".join(["file,blue,rare,gold", *rows]))

    def opened(holdout: int):
        config = DataConfig(dir=str(images), labels="multi", train="nine.csv", holdout=holdout)
        capfd.readouterr()
        parts = open_datasets(config, images, progress=False)
        return parts, [line for line in capfd.readouterr().err.splitlines() if "all images or none" in line]

    with pytest.raises(UserError, match="among the 1 held-out images no class has .*: raise data.holdout"):
        opened(1)
    with pytest.raises(UserError, match="among the 1 images left for training no class has .*: lower data.holdout"):
        opened(8)
    (train, val), said = opened(4)
    poor = train if not train.labels[:, 1].any() else val
    words = "held-out images" if poor is val else "images left for training"
    assert len(said) == 2 and "nine.csv all images or none have 'gold' (1 of 3 classes" in said[0]
    assert f"of the {len(poor)} {words} all images or none have 'rare' (1 of 3 classes are so)" in said[1]


def test_no_epoch_stays_the_best_whose_auroc_is_not_defined():
    progress = Progress()

    def better(auroc: float) -> bool:
        mean = MeanRanking(int(auroc == auroc), auroc, NOT_DEFINED, auroc)
        return progress.finish_epoch({"raw": LabelScore(4, ("a",), 2, 1.0, (), mean)})

    assert [better(x) for x in (math.nan, math.nan, 0.6, math.nan, 0.5, 0.7)] == [True, True, True, False, False, True]
    assert (progress.best_epoch, progress.best_auroc) == (5, 0.7)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"data.labels": "multi"}, "optim.objective: cross_entropy is for data.labels single"),
        (
            {
                "optim.objective": "binary_cross_entropy",
                "optim.bce_target_threshold": 0.2,
                "optim.label_smoothing": 0.1,
            },
            "which undoes label_smoothing",
        ),
        ({"data.labels": "multi", "data.val_labels": "val.txt"}, "leave out val_labels"),
        ({"data.labels": "multi", "data.sampling": "balanced"}, "set optim.class_weights instead"),
        ({"data.labels": "multi", "data.dataset": "cifar10"}, "labels multi is for files of images"),
    ],
)
def test_fields_that_do_not_go_together(fields, expected):
    with pytest.raises(UserError, match=expected):
        load_config(REPOSITORY / "configs/densenet121.yaml", fields)


def test_several_labels_are_audited():
    fields = {"data.labels": "multi", "optim.objective": "binary_cross_entropy"}
    (only,) = differences(audit(load_config(REPOSITORY / "configs/densenet121.yaml", fields), 4))
    assert only.part == "labels of an image"
