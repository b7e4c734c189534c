"""The commands as a user meets them: mistakes end in one line and exit code 2, and the demo runs from end to end."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, override_flags, photo, run_module, small_config, write_class_folders

from pipeline.checkpoint import CheckpointFolder
from pipeline.models import create_model
from pipeline.train import main as train
from tools.demo import main as demo
from tools.evaluate import main as evaluate


def flags(run_dir: Path, data: Path, **more: object) -> list[str]:
    config = small_config(run_dir, data={"dir": str(data), "loader": "auto"}, optim={"epochs": 1})
    return [
        "configs/demo.yaml",
        *override_flags(config),
        *(str(w) for key, value in more.items() for w in (f"--{key}", value)),
    ]


@pytest.fixture
def images(image_folders, tmp_path) -> Path:
    """A data set of this test's own, to damage."""
    return Path(shutil.copytree(image_folders, tmp_path / "images"))


@pytest.mark.parametrize("command", ["train", "demo"])
def test_command_line_mistakes(user_error, monkeypatch, command):
    monkeypatch.chdir(REPOSITORY)
    main, words = {"train": (train, ["configs/demo.yaml"]), "demo": (demo, [])}[command]
    assert "did you mean '--optim.lr'" in user_error(main, *words, "--optim.lrr", 1)
    assert "--optim.epochs: a whole number is needed" in user_error(main, *words, "--optim.epochs", "many")


def test_a_command_without_a_config(user_error):
    assert "CONFIG.yaml" in user_error(train)


def test_a_missing_data_folder(user_error, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert "nowhere/train does not exist" in user_error(train, *flags(tmp_path / "run", tmp_path / "nowhere"))


def test_a_data_folder_without_images(user_error, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "val").mkdir()
    assert "holds no class folders" in user_error(train, *flags(tmp_path / "run", tmp_path / "images"))


def test_class_sets_that_differ(user_error, images, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (images / "val" / "class2").rename(images / "val" / "other")
    line = user_error(train, *flags(tmp_path / "run", images))
    assert "has no class 'other'" in line and str(images) in line


@pytest.mark.parametrize("damage", ["text", "truncated"])
@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_a_file_that_does_not_decode(user_error, images, tmp_path, monkeypatch, damage, loader):
    monkeypatch.chdir(REPOSITORY)
    file = images / "train" / "class1" / "image0004.jpg"
    file.write_bytes(b"text" if damage == "text" else file.read_bytes()[:-600])
    line = user_error(train, *flags(tmp_path / "run", images, **{"data.loader": loader}))
    assert str(file) in line and "repair or remove" in line


def test_a_run_directory_that_cannot_be_written(user_error, images, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "file").write_text("")
    assert "set --run_dir" in user_error(train, *flags(tmp_path / "file" / "run", images))


def test_a_batch_that_cannot_be_split(user_error, images, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    line = user_error(train, *flags(tmp_path / "run", images, **{"optim.batch_size": 10, "optim.grad_accum_steps": 4}))
    assert "optim.batch_size 10" in line and "multiple of 4" in line


def test_an_unknown_network(user_error, images, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert "did you mean 'densenet121'" in user_error(
        train, *flags(tmp_path / "run", images, **{"model.name": "densnet121"})
    )


def write_checkpoint(folder: Path, name: str, weights_of: str | None = None, classes: int = 3) -> Path:
    network = create_model(weights_of or name, num_classes=classes)
    config = small_config("unused", model={"name": name}, data={"loader": "auto", "crop_size": 32, "resize_size": 36})
    state = {
        "model": network.state_dict(),
        "config": dataclasses.asdict(config),
        "classes": [f"class{i}" for i in range(3)],
    }
    folder.mkdir(exist_ok=True)
    CheckpointFolder(folder).save(state, best=False)
    return CheckpointFolder(folder).last


def test_evaluating_what_is_no_checkpoint(user_error, image_folders, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt is damaged, or no file of weights" in user_error(
        evaluate, tmp_path / "text.pt", "--data", image_folders
    )
    assert "missing.pt: No such file" in user_error(evaluate, tmp_path / "missing.pt", "--data", image_folders)


def test_evaluating_a_checkpoint_of_another_network_or_class_count(user_error, image_folders, tmp_path):
    other = write_checkpoint(tmp_path / "a", "densenet_bc40_k12", weights_of="densenet40_k12")
    assert "another architecture" in user_error(evaluate, other, "--data", image_folders)
    fewer = write_checkpoint(tmp_path / "b", "densenet_bc40_k12", classes=2)
    assert "number of classes" in user_error(evaluate, fewer, "--data", image_folders)


def test_evaluating_on_classes_that_the_network_does_not_know(user_error, tmp_path):
    write_class_folders(tmp_path / "animals", 2, 4)
    (tmp_path / "animals" / "class1").rename(tmp_path / "animals" / "zebra")
    checkpoint = write_checkpoint(tmp_path / "a", "densenet_bc40_k12")
    assert "'zebra' is none of the network's" in user_error(evaluate, checkpoint, "--data", tmp_path / "animals")
    assert "--data" in user_error(evaluate, checkpoint)
    assert "invalid choice" in user_error(evaluate, checkpoint, "--data", tmp_path, "--crops", 7)


def test_evaluating_a_flat_folder_with_a_label_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        photo(i, 50, 60).save(tmp_path / "photos" / f"{i}.jpg")
    (tmp_path / "labels.txt").write_text("class0\nclass1\nclass1\nclass0\nclass1\n")
    torch.manual_seed(0)
    checkpoint = write_checkpoint(tmp_path / "a", "densenet_bc40_k12")
    words = [
        checkpoint,
        "--data",
        tmp_path / "photos",
        "--labels",
        tmp_path / "labels.txt",
        "--json",
        tmp_path / "r.json",
    ]
    monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
    evaluate()
    (result,) = json.loads((tmp_path / "r.json").read_text())["evaluations"]
    assert (result["images"], result["classes"], result["classes_present"]) == (5, 3, 2)
    assert "images of 2 of the 3 classes" in capsys.readouterr().out


@pytest.mark.slow
def test_under_our_torchrun_a_mistake_is_one_line(tmp_path):
    words = flags(tmp_path / "run", tmp_path / "nowhere")
    done = run_module("pipeline.torchrun", "--nproc-per-node=2", "-m", "pipeline.train", *words)
    assert done.returncode == 2 and re.fullmatch(r"error: .*nowhere.* does not exist.*\n", done.stderr), done.stderr
    assert not (tmp_path / "run").exists()  # a mistake before there is a run leaves nothing, on several ranks too


@pytest.mark.slow
def test_a_dry_run_builds_everything_and_writes_nothing(images, tmp_path):
    for cache in images.rglob("*.index.jsonl"):
        cache.unlink()
    before = {*images.rglob("*")}
    done = run_module("pipeline.train", *flags(tmp_path / "run", images), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "37 training and 11 validation images through the native loader" in done.stdout
    assert "batch_size: 12" in done.stdout
    assert "  epochs: 1 (the paper: 300)" in done.stdout  # each part of the recipe that differs
    assert not (tmp_path / "run").exists() and {*images.rglob("*")} == before


@pytest.mark.slow
def test_the_demo_from_the_archive_to_the_table(tmp_path):
    """Two real processes on the embedded images, a network and an epoch that are cut short."""
    words = ["--data.dir", tmp_path / "data", "--run_dir", tmp_path / "runs" / "demo", "--optim.epochs", 1]
    words += ["--model.name", "densenet_bc22_k8"]
    small = ["--data.crop_size", 12, "--data.resize_size", 14, "--optim.batch_size", 256]
    done = run_module("tools.demo", *words, *small, "--optim.milestones", "1")
    assert done.returncode == 0, done.stderr
    assert sum(len(files) for *_, files in os.walk(tmp_path / "data")) == 10_002  # and two caches of the index
    table = [line.split() for line in done.stdout.splitlines() if line.strip().startswith(("1 ", "10 "))]
    assert [row[0] for row in table] == ["1", "10"]
    assert all(0 < float(row[1]) < 80 and float(row[3]) < float(row[1]) for row in table)
    assert "tensorboard --logdir" in done.stdout
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= set(os.listdir(tmp_path / "runs" / "demo"))
