"""A run on images with several labels each: training, resuming, validation, evaluation with its report, and prediction."""

import csv
import json
import math
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch7
from conftest import small_config
from labelled_images import COLOURS, open_label_table, write_labelled_images
from PIL import Image
from scipy.stats import mannwhitneyu
from test_trainer import assert_equal_weights, comparable_records, last_state, records, weights
from training_hooks import InterruptAfter, InterruptionError

from pipeline import api, trainer
from pipeline.config import DataConfig
from pipeline.data.loader import Batch, EvaluationLoader, Shard
from pipeline.data.scan import scan_label_table
from pipeline.distributed import init_distributed
from pipeline.errors import UserError
from pipeline.evaluation import _average
from pipeline.evaluation import evaluate as evaluate_network
from pipeline.objective import BinaryCrossEntropy
from pipeline.report import summary
from pipeline.run import Run
from pipeline.weights import read_weights, write_safetensors
from tools import evaluate, export, predict
from tools.support import evaluated_images
from tools.support.weights_arguments import read_weights_of

pytestmark = pytest.mark.slow  # for the most part


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_labelled_images(tmp_path_factory.mktemp("labelled"))


def config_of(run_dir: Path, images: Path):
    return small_config(
        run_dir,
        data={
            "loader": "reference", "dir": str(images), "labels": "multi", "train": "train.csv", "val": "val.csv",
            "color_jitter": 0, "pca_noise": 0, "scale": [0.6, 1],
        },
        optim={"objective": "binary_cross_entropy", "class_weights": "balanced", "epochs": 3, "lr": 0.03},
        train={"checkpoint_every": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("run"), images)
    trainer.fit(config)
    return config


def truth_of(images: Path) -> dict[str, list[int]]:
    """Of each validation image its labels, without anything of pipeline/data."""
    with open(images / "val.csv", newline="") as stream:
        rows = [*csv.reader(stream)][1:]
    return {row[0]: [int(colour in row[1].split("|")) for colour in COLOURS] for row in rows}


def test_the_records_are_an_independent_computation(run, images):
    """AUROC by scipy and the loss by torch, of the logits that the last weights give."""
    found = read_weights(Path(run.run_dir, "checkpoints", "last.pt"))
    answers = api.evaluate(Path(run.run_dir, "checkpoints", "last.pt"), images, labels=images / "val.csv", device="cpu")
    last = [record for record in records(run) if "val/loss" in record][-1]
    names = [Path(name).name for name in sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))]
    truth = truth_of(images)
    labels = np.array([truth[name] for name in names if name in truth])
    config = found.config.data
    logits = []
    for name in (name for name in names if name in truth):
        image = Image.open(next(images.rglob(name))).convert("RGB")
        pixels = np.asarray(image, np.float64) / 255
        pixels = torch7.scale(pixels, *torch7.short_side_to(*pixels.shape[:2], 16))
        view = torch7.normalise(torch7.centre_crop(pixels, 16), config.mean, config.std)
        with torch.no_grad():
            logits.append(found.network(torch.from_numpy(view).permute(2, 0, 1)[None].float())[0].double())
    scores = torch.stack(logits)
    loss = F.binary_cross_entropy_with_logits(scores, torch.from_numpy(labels).double()).item()
    assert last["val/loss"] == pytest.approx(loss, rel=1e-4)
    assert answers.score.loss == pytest.approx(last["val/loss"], rel=1e-5)
    wrong = ((scores.numpy() > 0) != labels).mean()
    assert last["val/label_error"] == pytest.approx(100 * wrong)
    for k, colour in enumerate(COLOURS):
        positive = scores[labels[:, k] == 1, k].numpy(), scores[labels[:, k] == 0, k].numpy()
        expected = mannwhitneyu(*positive).statistic / (len(positive[0]) * len(positive[1]))
        assert last[f"val/auroc/{colour}"] == pytest.approx(expected, abs=1e-9)
    assert last["val/mean_auroc"] == pytest.approx(np.mean([last[f"val/auroc/{c}"] for c in COLOURS]))


@pytest.mark.parametrize("holdout", [0, 9])
def test_a_published_auroc_is_told_to_be_of_other_images_than_held_out_ones(images, tmp_path, holdout):
    data = {"loader": "reference", "dir": str(images), "labels": "multi", "train": "train.csv"}
    data |= {"holdout": holdout} if holdout else {"val": "val.csv"}
    published = {"source": "someone", "auroc": 0.841}
    config = small_config(tmp_path, data=data, optim={"objective": "binary_cross_entropy"}, published=published)
    with init_distributed("cpu") as world:
        (line,) = [line for line in summary(Run(config, world)).splitlines() if line.startswith("someone")]
    note = " (test images; ours are held-out training images)" if holdout else ""
    assert line == f"someone: mean AUROC 0.841{note}"


def test_it_learns_and_its_best_epoch_is_that_of_the_greatest_auroc(run):
    epochs = [record for record in records(run) if "val/loss" in record]
    aurocs = [record["val/mean_auroc"] for record in epochs]
    assert max(aurocs) > 0.85  # by chance 0.5
    progress = last_state(run)["progress"]
    assert (progress["best_epoch"], progress["best_auroc"]) == (int(np.argmax(aurocs)), max(aurocs))
    assert epochs[-1]["epoch/train_loss"] < epochs[0]["epoch/train_loss"]
    assert {"train/loss", "train/label_error"} < records(run)[0].keys() and "train/top1_error" not in records(run)[0]


def test_a_resumed_run_ends_with_the_same_bits(run, images, tmp_path):
    config = config_of(tmp_path, images)
    with pytest.raises(InterruptionError):
        trainer.fit(config, hooks=[InterruptAfter(6)])
    trainer.fit(config)
    assert_equal_weights(weights(config), weights(run))
    assert comparable_records(config) == comparable_records(run)
    table = images / "train.csv"
    before = table.read_text()
    table.write_text(before.replace("|", ";", 1) if "|" not in before else before.replace("blue|", "", 1))
    with pytest.raises(UserError, match="the data in .* were .* and are now"):
        trainer.fit(config)
    table.write_text(before)


def test_the_loss_is_torchs_with_weights_of_positive_images():
    torch.manual_seed(0)
    outputs, labels = torch.randn(5, 3), (torch.rand(5, 3) > 0.6).to(torch.uint8)
    batch = Batch(torch.zeros(5, 3, 2, 2), labels, torch.ones(5), np.arange(5), 1)
    objective = BinaryCrossEntropy(label_smoothing=0.2)
    objective.class_weights = torch.tensor([1.0, 4.0, 0.5])
    p, y = outputs.double().sigmoid(), 0.8 * labels.double() + 0.1
    expected = -(objective.class_weights * y * p.log() + (1 - y) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(objective.losses(outputs, batch).double(), expected, rtol=1e-5, atol=1e-6)


def words(run, images: Path, *more: object) -> list[str]:
    last = Path(run.run_dir, "checkpoints", "last.pt")
    return ["evaluate", str(last), "--data", str(images), "--labels", str(images / "val.csv"), *map(str, more)]


def test_evaluation_and_its_report(run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", words(run, images, "--report", tmp_path, "--device", "cpu", "--loader", "reference")
    )
    evaluate.main()
    printed = capsys.readouterr().out
    (result,) = json.loads((tmp_path / "report.json").read_text())["evaluations"]
    last = [record for record in records(run) if "val/loss" in record][-1]
    assert result["mean_auroc"] == pytest.approx(last["val/mean_auroc"])
    assert result["data"] == f"{images}, labels of {images / 'val.csv'}"
    low, high = result["mean_average_precision_interval"]
    assert low <= result["mean_average_precision"] <= high
    assert f"mean AUROC {result['mean_auroc']:.4f}" in printed
    for row in result["by_class"]:
        assert row["auroc"] == pytest.approx(last[f"val/auroc/{row['class']}"])
        for page in ("report.md", "report.html"):
            text = (tmp_path / page).read_text()
            assert row["class"] in text and f"{row['auroc']:.4f}" in text
    logits = np.load(next(tmp_path.glob("*.npy")))
    with open(next(tmp_path.glob("*.csv")), newline="") as stream:
        rows = [*csv.DictReader(stream)]
    assert [float(row["red"]) for row in rows] == pytest.approx((1 / (1 + np.exp(-logits[:, 2]))).tolist(), abs=1e-6)
    truth = truth_of(images)
    for row in rows:
        assert [int(c in row["labels"].split("|")) for c in COLOURS] == truth[Path(row["file"]).name]


@pytest.mark.parametrize("kind", ["multi", "single"])
def test_labels_are_looked_for_in_the_working_directory_and_with_the_images(images, tmp_path, monkeypatch, capfd, kind):
    """Of both kinds; with either file another image is red."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (1, 2):
        (folder / f"image{i}.png").write_bytes((images / f"folder{i % 2}/image00{i}.png").read_bytes())
    texts = {"multi": "file,red,blue\nimage1,{},0\nimage2,{},1\n", "single": "image1.png {}\nimage2.png {}\n"}
    red, blue = (1, 0) if kind == "multi" else ("red", "blue")
    (folder / "test.csv").write_text(texts[kind].format(red, blue))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data = DataConfig(dir=str(folder), labels=kind)

    def first_is_red() -> bool:
        capfd.readouterr()
        labels = evaluated_images.open_images(data, "test.csv", ("red", "blue")).labels
        return bool(labels[0, 0] == 1 if kind == "multi" else labels[0] == 0)

    assert first_is_red() and "warning: --labels" not in capfd.readouterr().err
    Path("test.csv").write_text(texts[kind].format(blue, red))
    assert not first_is_red()
    said = capfd.readouterr().err
    assert f"is {tmp_path}/here/test.csv; that of the images, {folder}/test.csv, is not read" in said
    (folder / "test.csv").unlink()
    assert not first_is_red() and "warning: --labels" not in capfd.readouterr().err
    Path("test.csv").unlink()
    with pytest.raises(UserError, match=r"test\.csv"):
        first_is_red()


def test_evaluation_needs_the_table(run, images, user_error):
    """That of the run is taken where it lies in the folder."""
    line = user_error(evaluate.main, Path(run.run_dir, "checkpoints", "last.pt"), "--data", images / "folder0")
    assert "give the CSV file of them as --labels" in line
    with pytest.raises(UserError, match="gives multi labels an image"):
        api.evaluate(Path(run.run_dir, "checkpoints", "last.pt"), images)


def test_ten_crops_average_probabilities(run, images, tmp_path, monkeypatch, capsys):
    """The report's logits are the log-odds of the mean of the ten sigmoids, and all ten answers come from the network."""
    views: list[torch.Tensor] = []

    def read(*arguments):
        found = read_weights_of(*arguments)
        found.network.register_forward_hook(sharper)
        return found

    def sharper(_module, _inputs, outputs):  # answers that are far apart
        views.append(30 * outputs)
        return views[-1]

    monkeypatch.setattr(evaluate, "read_weights_of", read)
    report = ("--crops", 10, "--average", "softmax", "--device", "cpu", "--loader", "reference", "--report", tmp_path)
    monkeypatch.setattr("sys.argv", words(run, images, *report))
    evaluate.main()
    assert "10 crops (softmax averaged)" in capsys.readouterr().out
    ten = torch.cat([v for v in views if v.device.type == "cpu"]).double().unflatten(0, (-1, 10))
    p = ten.sigmoid().mean(dim=1)
    logits = np.load(next(tmp_path.glob("*.npy")))
    assert ten.shape == (16, 10, 3)
    np.testing.assert_allclose(logits, (p / (1 - p)).log(), rtol=1e-5, atol=1e-6)
    assert np.abs(logits - ten.mean(dim=1).numpy()).max() > 0.1  # which averaged logits would give


def test_a_mean_probability_next_to_1_is_a_finite_logit():
    """Against 1,000 digits, in which no sigmoid is 1."""
    rows = [[40.0, 36.0], [80.0, 90.0], [-40.0, 60.0], [-700.0, -90.0], [0.0, 2.0]]
    logits = torch.tensor(rows).unsqueeze(2)
    with localcontext(prec=1000):
        p = [[1 / (1 + Decimal(-x).exp()) for x in row] for row in rows]
        expected = [float((sum(row) / (2 - sum(row))).ln()) for row in p]
    found = _average(logits, "softmax", several=True)
    np.testing.assert_allclose(found[:, 0].tolist(), expected, rtol=1e-6, atol=1e-12)
    for bad in (math.nan, math.inf, -math.inf):  # one such view is an answer that is not finite
        answers = torch.tensor([[[bad, 1.0], [2.0, 3.0]]])
        assert _average(answers, "softmax", several=True).isfinite().tolist() == [[False, True]]
        assert _average(answers, "logits", several=True).isfinite().tolist() == [[False, True]]


def test_evaluation_waits_for_no_device_between_batches(images, monkeypatch):
    """A copy to the host waits for the device; all are made after the last batch."""
    index = scan_label_table(open_label_table(images, images / "val.csv"))
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: [copies.append(tensor.shape), copy(tensor)][1])
    with init_distributed("cpu") as world:
        shard = Shard(0, 1, world.device, 1)
        loader = EvaluationLoader(
            index, DataConfig(loader="reference", crop_size=16, resize_size=16), shard, batch_size=4, crops=1
        )
        done: list[int] = []
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
        evaluate_network(network, loader, world, between_batches=lambda: done.append(len(copies)), keep_logits=True)
    assert done == [0] * 4 and len(copies) == 16


def test_prediction_and_export_have_a_probability_for_each_class(run, images, tmp_path, monkeypatch, capsys):
    last = Path(run.run_dir, "checkpoints", "last.pt")
    write_safetensors(read_weights(last), tmp_path / "out.safetensors")
    monkeypatch.setattr(
        "sys.argv", ["predict", str(tmp_path / "out.safetensors"), str(images), "--csv", str(tmp_path / "p.csv")]
    )
    monkeypatch.setattr(predict, "AT_ONCE", 7)
    predict.main()
    assert "60 images" in capsys.readouterr().out
    with open(tmp_path / "p.csv", newline="") as stream:
        rows = [*csv.DictReader(stream)]
    assert len(rows) == 60 and [*rows[0]] == ["file", *COLOURS]
    answers = api.evaluate(last, images, labels=images / "val.csv", device="cpu")
    sure = {row["file"]: max(float(row[c]) for c in COLOURS) for row in rows}
    truth = truth_of(images)
    files = [file for file in sorted(sure) if Path(file).name in truth]
    assert [sure[file] for file in files] == pytest.approx(answers.probability.tolist(), abs=2e-4)
    assert export.metadata_of(read_weights(last))["probabilities"] == "sigmoid"
