"""What the laboratory's experiments make: tables, squares with labels, sets of any size, and rows of an ablation."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_1samp
from torchvision_sets import write_fashion_mnist

from pipeline.api import fit
from pipeline.config import DataConfig
from pipeline.config_file import from_dict, load_config
from pipeline.data.dataset import open_datasets
from pipeline.data.scan import scan_classes
from pipeline.errors import UserError
from tools.lab import ablation, archives, fine_tuning, index_scale, several_labels
from tools.support.significance import paired_interval


@pytest.fixture
def gray_classes(tmp_path):
    """Class folders whose images are all of one gray, 10 times the number of their class."""
    for k in range(1, 4):
        (folder := tmp_path / "set" / "train" / f"class{k}").mkdir(parents=True)
        for i in range(6):
            Image.new("L", (28, 28), 10 * k).save(folder / f"{i}.png")
    return tmp_path / "set"


def test_a_table_has_so_many_images_of_each_class_drawn_anew_for_each_seed(gray_classes, tmp_path):
    index = scan_classes(gray_classes / "train")
    tables = []
    for seed in (1, 1, 2):
        fine_tuning.write_table(index, "train", 3, seed, tmp_path / "out" / "table.csv")
        config = DataConfig(dir=str(gray_classes), train=str(tmp_path / "out" / "table.csv"), holdout=1)
        found = open_datasets(config, tmp_path, progress=False)[0]
        assert found.classes == index.classes and len(found) == 8
        tables.append((tmp_path / "out" / "table.csv").read_text())
    assert tables[0] == tables[1] != tables[2]
    with pytest.raises(UserError, match="--test-images 7: a class of .* has 6 images: give as many at most"):
        fine_tuning.write_table(index, "test", 7, 1, tmp_path / "out" / "table.csv")
    text = fine_tuning.report({"fine-tuned": [40.0, 42.0], "from scratch": [55.0, 53.0]}, 3, 9, 2)
    assert (
        "| margin         |  15.00 |  11.00 | 13.00 |" in text
        and "better by 13.00 points (from 11.00 to 15.00)" in text
    )


def test_squares_have_the_labels_of_what_lies_on_them(gray_classes, tmp_path):
    index = scan_classes(gray_classes / "train")
    several_labels.write_squares(index, tmp_path / "out", "train", 20, seed=0)
    with open(tmp_path / "out" / "train.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    quarters = set()
    for row in rows:
        with Image.open(tmp_path / "out" / row["file"]) as image:
            pixels = np.asarray(image)
        seen = [pixels[y, x] for y in (0, 28) for x in (0, 28)]
        quarters |= {i for i, value in enumerate(seen) if value}
        assert {f"class{value // 10}" for value in seen if value} == set(row["labels"].split("|"))
        assert set(np.unique(pixels)) <= {0, *seen}
    assert quarters == {0, 1, 2, 3} and len({row["labels"] for row in rows}) > 3
    from_dict(several_labels.recipe(tmp_path, 1), "recipe")  # which is valid


@pytest.mark.slow
def test_an_ablation_counts_finished_runs_and_compares_seed_by_seed(tmp_path, monkeypatch, capsys):
    write_fashion_mnist(tmp_path / "set")
    words = ["--rows", "cosine", "--seeds", "2", "--epochs", "1", "--images", "24", "--held-out", "12"]
    words += ["--network", "densenet_bc22_k8", "--run-dir", str(tmp_path / "out")]
    trained = []

    def train(fields):  # in this process: another one takes seconds to start
        trained.append(Path(fields["run_dir"]).name)
        fit(load_config(ablation.CONFIG, fields))

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr("sys.argv", ["ablation", str(tmp_path / "set"), *words])
    ablation.main()
    assert trained == ["base-1", "cosine-1", "base-2", "cosine-2"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    assert text.count("; average (EMA)") == 2 and "12 held-out training images" in text
    ablation.main()
    assert capsys.readouterr().out == text and len(trained) == 4


def test_the_rows_of_an_ablation_cost_the_same():
    costs = set()
    for _, changes in ablation.ROWS.values():
        config = load_config(ablation.CONFIG, {**ablation.SHARED, **changes})
        costs.add((config.optim.epochs, config.optim.batch_size, config.data.crop_size, config.data.train_sizes))
    assert len(costs) == 1


def test_a_difference_within_the_noise_is_called_so():
    differences = [-1.0, -2.0, -3.0]
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    mean, half = paired_interval(differences)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    base = [10.0, 12.0, 14.0]
    for found, verdict in (([9.0, 10.9, 13.1], "better"), ([11.0, 13.1, 14.9], "worse"), ([9.0, 10.0, 11.0], "noise")):
        assert verdict in ablation._compared(found, base)[-1]
    assert ablation._compared([9.0], base) == ["-1.00", "-", "one seed says nothing"]


@pytest.mark.parametrize("kind", index_scale.WRITERS)
def test_a_set_of_any_size_is_read_as_it_was_written(kind, tmp_path, monkeypatch):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="PARQUET FILES ARE NOT TESTED: pip install pyarrow")
    for name, value in (("CLASSES", 4), ("SHARD", 7), ("FILE", 8), ("ROW_GROUP", 3)):
        monkeypatch.setattr(index_scale, name, value)
    index = scan_classes(tmp_path / index_scale.WRITERS[kind](index_scale.images(20), tmp_path))
    assert index.classes == tuple(f"n{k:08d}" for k in range(4)) and np.bincount(index.labels).tolist() == [5] * 4
    assert len(list(tmp_path.iterdir())) == {"shards": 3, "zip": 1, "parquet": 3}[kind]
    first, again = {"seconds": 2.0, "most": 30.0}, {"seconds": 1.0, "added": 5.0, "first_batch": 0.5, "resume": 0.25}
    assert index_scale.describe(first, [again, again]) == ["2.0", "1.0", "30", "5", "0.50", "0.25"]


@pytest.mark.parametrize(
    ("tool", "words"), [(index_scale, []), (archives, ["photos"])], ids=["index_scale", "archives"]
)
def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path, user_error, tool, words):
    (tmp_path / "file").touch()
    said = user_error(tool.main, *words, "--folder", tmp_path / "file" / "new")
    assert f"cannot write into --folder {tmp_path}/file/new: Not a directory" in said
