"""The same images as folders, as a table, in zip files, shards and parquet files train to the same weights, bit for bit."""

import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import run_module, small_config
from test_parquet import write_parquet
from test_shards import write_shards
from test_table import files_of, write_table
from test_zip_archive import zip_folder

from pipeline import trainer
from pipeline.checkpoint import load_checkpoint
from pipeline.config_file import to_yaml

pytestmark = pytest.mark.slow

PLACES = {
    "folders": ("train", "val"),
    "table": ("train.tsv", "all.csv"),
    "zip": ("stored.zip/data/train", "deflated.zip"),
    "shards": ("train-{000000..000002}.tar", "val-*.tar"),
}
if importlib.util.find_spec("pyarrow"):  # tests/test_parquet.py says aloud where it is not
    PLACES["parquet"] = ("parquet/train-*.parquet", "parquet/val-*.parquet")


@pytest.fixture(scope="module")
def data(image_folders, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("places")
    zip_folder(image_folders / "train", root / "stored.zip", "data/train")
    zip_folder(image_folders / "val", root / "deflated.zip", method=zipfile.ZIP_DEFLATED)
    every = []
    for split in ("train", "val"):
        (root / split).symlink_to(image_folders / split)
        write_shards(image_folders / split, root, split, label="txt")
        if "parquet" in PLACES:
            write_parquet(image_folders / split, root / "parquet", split)
        rows = [(f"{split}/{file}", name) for file, name in reversed(files_of(image_folders / split))]
        write_table(root / f"{split}.tsv", ("file", "label"), *rows, delimiter="\t")
        every += [(*row, split) for row in rows]
    write_table(root / "all.csv", ("file", "label", "split"), *every)
    return root


def config_of(data: Path, run_dir: Path, place: str, loader: str):
    train, val = PLACES[place]
    fields = {"dir": str(data), "train": train, "val": val, "loader": loader, "crop_size": 24, "resize_size": 28}
    return small_config(run_dir, data=fields, optim={"epochs": 1})


@pytest.mark.parametrize("loader", ["native", "dali"])
def test_training_is_the_same_to_the_bit(data, tmp_path, loader):
    results = []
    for place in PLACES:
        progress = trainer.fit(config_of(data, tmp_path / place, place, loader))
        results.append((progress, load_checkpoint(tmp_path / place / "checkpoints" / "last.pt")["model"]))
    for progress, weights in results[1:]:
        assert progress == results[0][0]
        assert all(torch.equal(value, weights[name]) for name, value in results[0][1].items())


@pytest.mark.parametrize("loader", ["native", "dali"])
def test_two_ranks_train_the_same_to_the_bit(data, tmp_path, loader):
    files = []
    for place in PLACES:
        files.append(tmp_path / f"{place}.yaml")
        files[-1].write_text(to_yaml(config_of(data, tmp_path / place, place, loader)))
    result = run_module("tests.training_on_ranks", *files, ranks=2)
    assert result.returncode == 0, result.stderr
    states = [load_checkpoint(tmp_path / place / "checkpoints" / "last.pt") for place in PLACES]
    assert {state["conditions"]["ranks"] for state in states} == {2}
    for state in states[1:]:
        assert all(torch.equal(value, state["model"][name]) for name, value in states[0]["model"].items())
