"""The paper's Table 2: each configuration states its figure's facts; each network, and each data set, trains a step."""

import re

import pytest
import torchvision_sets
from conftest import REPOSITORY

from pipeline import trainer
from pipeline.config_file import load_config
from tools.support.published import COLUMNS, DENSENETS_ON_SMALL_IMAGES

CONFIGS = sorted((REPOSITORY / "configs" / "table2").glob("*.yaml"))
SMALLEST = "densenet40_k12_"
TRAINED = [path for path in CONFIGS if path.stem.startswith(SMALLEST) or path.stem.endswith("_c100+")]
ROWS = {
    f"{name}_{column.lower()}": error
    for name, row in DENSENETS_ON_SMALL_IMAGES.items()
    for column, error in zip(COLUMNS, row, strict=True)
}


def test_there_is_one_for_each_figure():
    assert {path.stem for path in CONFIGS} == {name for name, error in ROWS.items() if error}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_the_papers(path):
    name, column = path.stem.rsplit("_", 1)
    published = load_config(path)
    assert published.model.name == name and published.published.top1 == ROWS[path.stem]
    assert float(re.search(r"Published: test error ([\d.]+) %", path.read_text())[1]) == ROWS[path.stem]
    assert published.data.dataset == {"c10": "cifar10", "c100": "cifar100", "svhn": "svhn"}[column.rstrip("+")]
    augmented, epochs = column.endswith("+"), 40 if column == "svhn" else 300
    assert (published.data.padding, published.data.hflip, published.model.dropout) == (
        (4, True, 0) if augmented else (0, False, 0.2)
    )
    assert (published.optim.epochs, published.optim.milestones) == (epochs, (epochs // 2, epochs * 3 // 4))


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_it_trains_a_step(tmp_path, monkeypatch, path):
    column = path.stem.rsplit("_", 1)[1]
    monkeypatch.setattr(torchvision_sets, "IMAGES", {"train": 2, "extra": 2, "test": 2})
    if column == "svhn":
        torchvision_sets.write_svhn(tmp_path, monkeypatch)
    else:
        torchvision_sets.write_cifar(tmp_path, monkeypatch, 100 if column.startswith("c100") else 10)
    overrides = {
        "run_dir": str(tmp_path / "run"), "data.dir": str(tmp_path), "data.crop_size": 8, "data.resize_size": 8,
        "data.holdout": 1 if column == "svhn" else 0, "optim.epochs": 1, "optim.batch_size": 2, "train.device": "cpu",
    }  # fmt: skip
    progress = trainer.fit(load_config(path, overrides))
    assert progress.epoch == 1 and 0 <= progress.last_top1_error <= 100
