"""tools.figures makes its pictures from real run directories, and the facts that it draws are right."""

import json

import pytest
import torchvision_sets
from conftest import run_module, small_config
from PIL import Image

from pipeline import trainer
from pipeline.models import create_model
from tools.figures import draw_curves, draw_imagenet, draw_small_images, main, read_run, runs_in
from tools.support.facts import multiply_accumulates, on_meta, parameters

# Billions of multiply-accumulates of convolutions and linear layers at 224 and at 32 pixels.
WORK = {
    "densenet121": (224, 2.834), "densenet161": (224, 7.728), "densenet169": (224, 3.360), "densenet201": (224, 4.291),
    "densenet264": (224, 5.752), "densenet40_k12": (32, 0.265), "densenet100_k12": (32, 1.770),
    "densenet100_k24": (32, 6.890), "densenet_bc100_k12": (32, 0.288), "densenet_bc250_k24": (32, 5.419),
    "densenet_bc190_k40": (32, 9.302),
}  # fmt: skip

pytestmark = pytest.mark.slow  # for the most part


@pytest.mark.parametrize("name", WORK)
def test_multiply_accumulates_are_the_papers(name):
    size, expected = WORK[name]
    network = on_meta(create_model, name, 1000 if size == 224 else 10, dense_block="eager")
    assert multiply_accumulates(network, size) / 1e9 == pytest.approx(expected, abs=1e-3)


def points(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(map(float, xy)) for xy in line.get_xydata()] for line in axes.lines}


@pytest.mark.slow
def test_pictures_of_runs_and_of_a_checkpoint(tmp_path, monkeypatch):
    torchvision_sets.write_cifar(tmp_path / "cifar", monkeypatch, 10)
    data = {"dataset": "cifar10", "dir": str(tmp_path / "cifar"), "loader": "auto", "train_crop": "random_crop"}
    runs = tmp_path / "runs"
    trainer.fit(small_config(runs / "densenet121"))
    trainer.fit(small_config(runs / "cifar", data=data, published={"source": "someone", "top1": 5.0}))

    checkpoint = runs / "cifar" / "checkpoints" / "best.pt"
    done = run_module("tools.figures", runs, checkpoint, "--output", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    files = {file.name for file in (tmp_path / "figures").iterdir()}
    assert files == {
        "curves.png",
        "parameters.png",
        "imagenet.png",
        "reuse-cifar-last.png",
        "reuse-densenet121-last.png",
        "reuse-cifar-best.png",
    }
    for file in files:
        Image.open(tmp_path / "figures" / file).verify()

    found = [read_run(run) for run in runs_in(runs)]
    assert [(run.name, run.data) for run in found] == [("cifar", "C10+"), ("densenet121", "synthetic images")]
    lines = [json.loads(line) for line in (runs / "cifar" / "metrics.jsonl").read_text().splitlines()]
    own = parameters(create_model("densenet_bc22_k8", 10)) / 1e6
    panel = points(draw_small_images(found).axes[0])
    assert panel["ours: cifar"] == [(own, [r for r in lines if "val/loss" in r][-1]["val/top1_error"])]
    assert (0.769162, 4.51) in panel["DenseNet-BC, paper"] and (1.019722, 5.24) in panel["DenseNet, paper"]

    axes, by_work = draw_imagenet(found).axes  # among them a run that is called as one of the paper's networks
    assert points(axes)["ours: densenet121"][0][1] == found[1].error
    curves = points(draw_curves(found).axes[0])
    assert [y for _, y in curves["cifar, validation"]] == [r["val/top1_error"] for r in lines if "val/loss" in r]
    assert {y for _, y in curves["someone: 5.0 %"]} == {5.0}
    assert (7.978856, 25.02) in points(axes)["DenseNet, paper"]
    work = {error: x for x, error in points(by_work)["DenseNet, paper"]}
    assert work[25.02] == pytest.approx(WORK["densenet121"][1], abs=1e-3)
    ((own_work, _),) = points(by_work)["ours: densenet121"]  # a small network at its 16 pixels
    assert own_work == pytest.approx(multiply_accumulates(found[1].network(), 16) / 1e9)
    assert points(axes)["ResNet, fb.resnet.torch"][1] == (25.557032, 24.01)


@pytest.mark.slow
def test_errors_that_are_not_of_test_images_are_called_so(tmp_path, monkeypatch):
    torchvision_sets.write_svhn(tmp_path / "svhn", monkeypatch)
    data = {
        "dataset": "svhn",
        "dir": str(tmp_path / "svhn"),
        "loader": "auto",
        "train_crop": "random_crop",
        "holdout": 4,
    }
    trainer.fit(small_config(tmp_path / "held", data=data, published={"top1": 5.0}))
    trainer.fit(small_config(tmp_path / "drawn"))
    held, drawn = read_run(tmp_path / "held"), read_run(tmp_path / "drawn")
    assert (held.data, drawn.data) == ("SVHN", "synthetic images")
    assert held.label == "ours: held, held-out training images"
    assert "published: 5.0 % (test images)" in points(draw_curves([held]).axes[0])
    panels = {axes.get_title(): points(axes) for axes in draw_small_images([held, drawn]).axes}
    assert panels["SVHN"][held.label][0][1] == held.error == min(r["val/top1_error"] for r in held.epochs)
    assert drawn.label in panels["synthetic images"]


def test_damaged_records_are_passed_over(tmp_path):
    trainer.fit(small_config(tmp_path / "run"))
    whole = read_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as records:
        records.write(b'x}\n[1]\n\xff\x00\x00{"step": 1}\n{"step": 9, "val/top1')
    assert read_run(tmp_path / "run").epochs == whole.epochs


def test_mistakes_are_one_line(tmp_path, user_error):
    for path, expected in ((tmp_path, "holds no run"), (tmp_path / "none.pt", "cannot read the weights")):
        assert expected in user_error(main, path, "--output", tmp_path / "figures")
