"""Label files as people have them: each kind gives the same labels, and what does not fit is one line that says what to do."""

import random
import re
import tarfile
from pathlib import Path

import pytest
from conftest import photo

from pipeline.data.labels import find_classes, read_labels
from pipeline.data.scan import scan_flat
from pipeline.errors import UserError

NAMES = ["val_0.jpg", "val_1.jpg", "val_10.jpg", "val_2.jpg"]  # as they are sorted
CLASSES = ("n01", "n02", "n03")
LABELS = ["n01", "n03", "n01", "n02"]
BY_FILE = {
    "Tiny-ImageNet": "val_0.jpg\tn01\t0\t32\t44\t62\nval_1.jpg\tn03\t52\t55\t57\t59\nval_2.jpg\tn02\t4\t0\t60\t55\n"
    "val_10.jpg\tn01\t3\t3\t63\t63\n",
    "Tiny-ImageNet with a header": "File\tClass\tX\tY\tH\tW\nval_2.jpg\tn02\t4\t0\t60\t55\nval_0.jpg\tn01\t0\t32\t44\t62\n"
    "val_1.jpg\tn03\t52\t55\t57\t59\nval_10.jpg\tn01\t3\t3\t63\t63\n",
    "Caffe": "val_0.jpg 0\nval_1.jpg 2\nval_10.jpg 0\nval_2.jpg 1\n",
    "Kaggle": "ImageId,PredictionString\nval_2,n02 85 1 499 272\nval_0,n01 1 2 3 4 n01 9 9 9 9\nval_10,n01 1 2 3 4\n"
    "val_1,n03 1 1 1 1\n",
    "quoted CSV": '"file","label"\n"val_0.jpg","n01"\n"val_1.jpg","n03"\n"val_10.jpg","n01"\n"val_2.jpg","n02"\n',
    "quoted CSV with blanks": '"val_0.jpg", "n01"\n"val_1.jpg", "n03"\n"val_10.jpg", "n01"\n"val_2.jpg", "n02"\n',
    "with folders": "val/images/val_0.jpg n01\n./val_1.jpg n03\nimages/val_10.jpg n01\nval_2 n02\n",
    "a mark at the start and Windows' line ends": "\ufeffval_0.jpg n01\r\nval_1.jpg n03\r\nval_10.jpg n01\r\nval_2.jpg n02\r\n",
    "one a line": "n01\nn03\nn01\nn02\n",
    "numbers, one a line": "0\n2\n0\n1\n",
}  # fmt: skip


def test_a_line_of_another_folder_is_of_another_image(tmp_path):
    """Cameras call each day's images alike."""
    names, root = ["0.jpg", "sub/1.jpg"], tmp_path / "cam" / "day2"
    root.mkdir(parents=True)
    for folder in ("", "./", "day2/", "cam/day2/", f"{tmp_path}/cam/day2/", "/"):
        (tmp_path / "labels").write_text(f"file,label\n{folder}0.jpg,n01\n{folder}sub/1,n03\n")
        assert read_labels(tmp_path / "labels", names, CLASSES, str(root)) == ["n01", "n03"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "labels").write_text("../cam/day2/0.jpg,n01\n../cam/day2/sub/1.jpg,n03\n")
    assert read_labels(tmp_path / "other" / "labels", names, CLASSES, str(root)) == ["n01", "n03"]
    others = (
        "day1/0.jpg",
        "other/day2/0.jpg",
        "sub/0.jpg",
        "day2/other/1.jpg",
        "/data/day2/0.jpg",
        "day2/1.jpg",
        "../0.jpg",
    )
    for other, label in ((other, label) for other in others for label in ("n01", "zebra")):
        (tmp_path / "labels").write_text(f"{other},{label}\nsub/1.jpg,n03\n")
        expected = f"line 1: '{other}' is not in {root}, where an image {Path(other).name} is: give the images"
        with pytest.raises(UserError, match=re.escape(expected)):
            read_labels(tmp_path / "labels", names, CLASSES, str(root))


def test_paths_in_archives_may_lack_their_first_folders_and_others_are_told(tmp_path, capfd):
    (tmp_path / ".val.zip").touch()
    names = ["archive/images/a.jpg", "archive/images/b.jpg"]
    (tmp_path / "labels").write_text("images/a.jpg n01\nimages/b n03\n")
    assert read_labels(tmp_path / "labels", names, CLASSES, str(tmp_path / ".val.zip")) == ["n01", "n03"]
    assert capfd.readouterr().err == ""
    (tmp_path / "labels").write_text("val/a.jpg n01\nval/b.jpg n03\n")
    assert read_labels(tmp_path / "labels", names, CLASSES, str(tmp_path / ".val.zip")) == ["n01", "n03"]
    assert (
        "folders that" in (told := capfd.readouterr().err)
        and "as val/a.jpg: they are taken by their names alone" in told
    )


def test_a_whole_path_wins_over_what_is_short_for_another(tmp_path):
    names = ["a.jpg", "x/a.jpg", "x/a.jpg.png", "y/b.jpg", "z/b.jpg"]
    labels = ["n01", "n02", "n03", "n01", "n02"]
    (tmp_path / "labels").write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True)))
    assert read_labels(tmp_path / "labels", names, CLASSES, str(tmp_path)) == labels
    (tmp_path / "labels").write_text("b.jpg n01\n" * 5)
    with pytest.raises(UserError, match=r"no image 'b.jpg' \(two images are called so: give their paths\)"):
        read_labels(tmp_path / "labels", names, CLASSES, str(tmp_path))


@pytest.mark.parametrize("kind", BY_FILE)
def test_each_kind_of_file_gives_the_labels(tmp_path, kind, capfd):
    (tmp_path / "labels").write_bytes(BY_FILE[kind].encode())
    assert read_labels(tmp_path / "labels", NAMES, CLASSES, root="data/val/images") == LABELS
    said = capfd.readouterr().err
    assert ("counted from 0 (0 is n01, 2 is n03)" in said) == (kind in ("Caffe", "numbers, one a line"))
    assert ("in the order of text, val_10.jpg before val_2.jpg: if they" in said) == kind.endswith("one a line")


def test_files_that_are_no_labels_at_all_are_one_line(tmp_path):
    (tmp_path / "labels.json").write_text("a b " + "x" * 200_000 + "\nc d")
    with pytest.raises(UserError, match=r"labels.json has no lines 'FILE CLASS' \(field larger than field limit"):
        read_labels(tmp_path / "labels.json", NAMES, CLASSES)
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as tar:
        (tmp_path / "ground_truth.txt").write_bytes(random.Random(1).randbytes(100_000))
        tar.add(tmp_path / "ground_truth.txt")
    content = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "devkit.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot read the label file .*devkit.tar.gz"):
        read_labels(tmp_path / "devkit.tar.gz", NAMES, CLASSES)


def test_names_with_blanks_and_commas(tmp_path):
    (tmp_path / "labels").write_text('my cat.jpg n01\n"dog, big.jpg" n03\nthird one.jpg n02\n')
    assert read_labels(tmp_path / "labels", ["dog, big.jpg", "my cat.jpg", "third one.jpg"], CLASSES)[1:] == [
        "n01",
        "n02",
    ]
    (tmp_path / "labels").write_text('"dog, big.jpg",n03\nmy cat.jpg,n01\n')
    assert read_labels(tmp_path / "labels", ["dog, big.jpg", "my cat.jpg"], CLASSES) == ["n03", "n01"]
    (tmp_path / "labels").write_text("a.jpg night gown\nb.jpg T-shirt, red\n")
    assert read_labels(tmp_path / "labels", ["a.jpg", "b.jpg"], ("T-shirt, red", "night gown")) == [
        "night gown",
        "T-shirt, red",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("val_9.jpg\tn01\nval_1.jpg\tn03\n", "line 1: there is no image 'val_9.jpg'"),
        ("val_9.jpg 0\nval_1.jpg 1\n", "line 1: there is no image 'val_9.jpg'"),
        ("val_0.jpg n01\nval_9.jpg n03\n", "line 2: there is no image 'val_9.jpg'"),
        ("val_0.jpg n01\nval_1.png n03\nval_10.jpg n01\nval_2.jpg n02\n", "line 2: there is no image 'val_1.png'"),
        ("val_0.jpg n01\nval_0 n03\n", "line 2: a second label for the image 'val_0.jpg': remove one"),
        (
            "val_0.jpg 1\nval_1.jpg 3\nval_10.jpg 1\nval_2.jpg 2\n",
            "numbers from 1 to 3 in an order that is not known; .*n01",
        ),
        ("val_0.jpg 0\nval_1.jpg 3\nval_10.jpg 1\nval_2.jpg 2\n", "numbers from 0 to 3 in an order that is not known"),
        ("490\n361\n171\n822\n", "numbers from 171 to 822 .*development kit"),
        ("n01\nn02\n", "has 2 labels for 4 images"),
        (
            "val_0.jpg x1\nval_1.jpg x2\nval_10.jpg x3\nval_2.jpg x3\n",
            "'x1' is none of the network's, nor is any other",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, text, expected):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=f"labels.txt.*{expected}"):
        read_labels(tmp_path / "labels.txt", NAMES, CLASSES)


def test_two_files_of_the_same_name_need_their_paths(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "val" / folder).mkdir(parents=True)
        photo(0, 20, 20).save(tmp_path / "val" / folder / "1.jpg")
    labels = tmp_path / "labels.txt"
    labels.write_text("1.jpg n01\n1.jpg n02\n")
    with pytest.raises(UserError, match="two images are called so: give their paths"):
        scan_flat(tmp_path / "val", labels, CLASSES)
    labels.write_text("b/1.jpg n01\na/1.jpg n02\n")
    index = scan_flat(tmp_path / "val", labels, CLASSES)
    assert index.names == ("a/1.jpg", "b/1.jpg") and index.labels.tolist() == [1, 0]


def test_class_folders_that_are_numbers(capfd):
    ids = ("n01", "n02", "n03")
    assert find_classes("val", ["0", "1", "2"], ids) == list(ids)
    assert "the classes of val are numbers: taken as positions" in capfd.readouterr().err
    for names in (["1", "2", "3"], ["1", "2"], ["0", "3"]):
        with pytest.raises(UserError, match="order that is not known; give labels by name, as 'n01'"):
            find_classes("val", names, ids)
    with pytest.raises(UserError, match="'x' is none of the network's$"):
        find_classes("val", ["0", "n02", "x"], ("0", "n02", "n03"))
