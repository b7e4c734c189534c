"""Recipes of others: each configuration states its source's facts, and trains."""

import dataclasses
import re

import pytest
import torch
from conftest import REPOSITORY
from timm.scheduler import CosineLRScheduler

from pipeline import trainer
from pipeline.audit import audit, differences
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.measured import has_batch_norms
from pipeline.models import create_model
from pipeline.parsing import flatten
from pipeline.recipes import OUTSIDE, RECIPES, audit_recipe
from tools.audit import main
from tools.support.facts import on_meta

PADDLECLAS = sorted((REPOSITORY / "configs" / "paddleclas").glob("*.yaml"))
MODERN = sorted((REPOSITORY / "configs" / "modern").glob("*.yaml"))
ACCURACY = {121: (75.7, 92.6), 161: (78.6, 94.1), 169: (76.8, 93.3), 201: (77.6, 93.7), 264: (78.0, 93.9)}  # its page's


@pytest.mark.parametrize("path", PADDLECLAS, ids=lambda path: path.stem)
def test_paddleclas_recipe_is_the_papers_but_for_five_parts(path):
    config, header = load_config(path), path.read_text().split("model:")[0]
    top1, top5 = (pytest.approx(100 - accuracy) for accuracy in ACCURACY[int(path.stem.removeprefix("densenet"))])
    assert (config.model.name, config.published.top1, config.published.top5) == (path.stem, top1, top5)
    assert re.search(r"top-1 error ([\d.]+) %, top-5 ([\d.]+) %", header).groups() == (
        str(config.published.top1),
        str(config.published.top5),
    )
    assert {row.part: row.here for row in differences(audit(config, microbatches=4))} == {
        "epochs": "120",
        "learning-rate schedule": "times 0.1 after epochs 30, 60, 90 of 120",
        "momentum": "0.9",
        "brightness, contrast, saturation": "0",
        "PCA noise": "0",
    }


@pytest.mark.parametrize("path", PADDLECLAS, ids=lambda path: path.stem)
def test_a_configuration_follows_the_recipe_that_it_names(monkeypatch, capsys, path):
    monkeypatch.setattr("sys.argv", ["audit", str(path), "--recipe"])
    main()
    printed = capsys.readouterr().out
    assert "on 4 ranks beside PaddleClas" in printed and "Differs from PaddleClas in 3 of" in printed
    assert re.search(r"resize filter +\| OpenCV's bilinear, without antialias +\| torch7-bicubic +\| DIFFERS", printed)


@pytest.mark.parametrize("path", MODERN, ids=lambda path: path.stem)
def test_a_modern_configuration_differs_from_its_recipe_in_what_its_header_says(path):
    config, header = load_config(path), path.read_text().split("model:")[0]
    odd = [row.part for row in differences(audit_recipe(config, RECIPES[config.published.recipe].ranks))]
    words = " ".join(header.replace("#", "").split())
    no_depth = ["model.drop_path"] if "DenseNets have no stochastic depth" in words else []
    assert "mixed with" in words and "resized with" in words
    erasing = ["random erasing"] if "erased before" in words else []
    assert "warps are bilinear alone" in words and "An epoch's last batch" in words
    crops = ["resize filter", "training crop", "warp filter"]
    assert odd == [*no_depth, *crops, "last batch", *erasing, "mixup", "warm-up epochs"]
    assert "have an aspect that is uniform (in timm its logarithm is)" in words
    optim, optimizer = config.optim, torch.optim.SGD([torch.zeros(1)], config.optim.lr)
    theirs = CosineLRScheduler(
        optimizer, optim.epochs, optim.min_lr, warmup_t=int(optim.warmup_epochs), warmup_lr_init=1e-4
    )
    theirs.step(int(optim.warmup_epochs))
    begins = re.search(r"begins at ([\d.]+) % of it", words).group(1)
    assert begins == f"{100 * optimizer.param_groups[0]['lr'] / optim.lr:.2f}"


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.epochs", 90), ("optim.label_smoothing", 0.1), ("data.scale", (0.2, 1)), ("train.ema_decay", 0.9)],
)
def test_a_departure_from_a_recipe_is_noticed(key, value):
    config = load_config(PADDLECLAS[0], {key: value, "optim.milestones": (30, 60, 90)})
    odd = [row.part for row in differences(audit_recipe(config, ranks=4))]
    assert odd == [key, "resize filter", "training crop", "initial weights"]
    assert len(differences(audit_recipe(config, ranks=8))) == 5  # and the batch-norm statistic


def test_a_recipe_of_networks_without_batch_norms_has_no_statistic_of_one():
    """RDNet has layer norms, and so any number of ranks."""
    for name, recipe in RECIPES.items():
        config = next(c for c in map(load_config, [*PADDLECLAS, *MODERN]) if c.published.recipe == name)
        norms = name != "rdnet"
        assert recipe.batch_norms == norms == has_batch_norms(on_meta(create_model, config.model.name))
        parts = [row.part for row in audit_recipe(config, ranks=1)]
        assert ("images in a batch-norm statistic" in parts) == norms


def test_a_part_of_a_batch_has_the_images_that_the_sources_name():
    """PaddleClas 64 a GPU of 4, ResNet strikes back 2048 on 4, RDNet 64 a GPU and accumulation step."""
    parts = {name: recipe.fields.get("optim.batch_size", 256) / recipe.ranks for name, recipe in RECIPES.items()}
    assert parts == {"paddleclas": 64, "rsb-a1": 512, "rsb-a2": 512, "rsb-a3": 512, "rdnet": 64}


def test_fields_outside_of_recipes_exist():
    assert set(flatten(dataclasses.asdict(Config()))) >= OUTSIDE
    for recipe in RECIPES.values():
        named = {key for _, key in recipe.elsewhere.values() if "." in key}  # others are words
        assert set(flatten(dataclasses.asdict(Config()))) >= {*recipe.fields, *named}


def test_a_configuration_without_a_recipe_is_told_which_there_are(user_error):
    file = REPOSITORY / "configs" / "densenet121.yaml"
    assert "set published.recipe to one of paddleclas" in user_error(main, file, "--recipe")
    assert "published.recipe" in user_error(main, file, "--recipe", "--published.recipe", "paddle")


def test_there_is_one_for_each_network():
    assert {path.stem for path in PADDLECLAS} == {f"densenet{depth}" for depth in ACCURACY}


@pytest.mark.slow
def test_paddleclas_recipe_trains_a_step(tmp_path):
    """With the smallest network; the others differ in that alone."""
    assert trains_a_step(PADDLECLAS[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in MODERN if "161" not in path.stem], ids=lambda path: path.stem)
def test_a_modern_configuration_trains_a_step(tmp_path, path):
    """Those of DenseNets with a small one."""
    small = {"data.train_crop_size": (24,)} if "a3" in path.stem else {}
    assert trains_a_step(
        path, tmp_path, **small, **({"model.name": "densenet_bc22_k8"} if path.stem.startswith("densenet") else {})
    )


def trains_a_step(path, folder, **overrides):
    overrides |= {
        "run_dir": str(folder), "data.loader": "synthetic", "data.synthetic_images": 8, "data.crop_size": 32,
        "data.resize_size": 36, "optim.epochs": 1, "optim.batch_size": 8, "optim.warmup_epochs": 0, "train.device": "cpu",
        "train.precision": "fp32", "train.pictures_every": 0,
    }  # fmt: skip
    return trainer.fit(load_config(path, overrides)).epoch == 1
