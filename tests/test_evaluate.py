import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch7
from conftest import run_module, small_config
from PIL import Image

from pipeline.checkpoint import CheckpointFolder
from pipeline.config import DataConfig
from pipeline.data.index import scan_classes
from pipeline.data.loader import EvaluationLoader, Share
from pipeline.distributed import World
from pipeline.evaluate import evaluate
from pipeline.models import create_model

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
SHARE = Share(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
DATA = DataConfig(crop_size=32, resize_size=36, loader="reference")


@pytest.fixture(scope="module")
def network(image_folders):
    """A network whose answers differ from image to image: its logits have mean 0 and deviation 3 over the images."""
    torch.manual_seed(0)
    network = create_model("densenet_bc40_k12", num_classes=3)
    index = scan_classes(image_folders / "val")
    (batch,) = EvaluationLoader(index, DATA, SHARE, batch_size=11, crops=1).batches()
    with torch.no_grad():
        network.train()(batch.images)
        logits = network.eval()(batch.images)
        network.classifier.weight.mul_(3 / logits.std(dim=0)[:, None])
        network.classifier.bias.copy_(-3 * logits.mean(dim=0) / logits.std(dim=0))
        assert len(network(batch.images).argsort(dim=1).unique(dim=0)) >= 4
    return network


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    folder = CheckpointFolder(tmp_path_factory.mktemp("checkpoint"))
    config = small_config("unused", data={"crop_size": 32, "resize_size": 36, "loader": "auto"})
    state = {
        "model": network.state_dict(),
        "config": dataclasses.asdict(config),
        "classes": ["class0", "class1", "class2"],
    }
    folder.save(state, best=True)
    return folder.best


@pytest.mark.parametrize("average", ["logits", "softmax"])
@pytest.mark.parametrize("crops", [1, 10])
def test_scores_are_those_of_a_loop_over_images(image_folders, network, crops, average):
    """Against the Torch code's crops, cut one by one from Torch7's resize, and float64 arithmetic."""
    index = scan_classes(image_folders / "val")
    loader = EvaluationLoader(index, DATA, SHARE, batch_size=4, crops=crops)
    evaluation = evaluate(network, loader, ALONE, average)
    double = create_model("densenet_bc40_k12", num_classes=3).double().eval()
    double.load_state_dict(network.state_dict())
    wrong, losses = 0, []
    for i in range(len(index)):
        image = np.asarray(Image.open(index.file(i)), np.float64) / 255
        image = torch7.scale(image, *torch7.short_side_to(*image.shape[:2], 36))
        views = torch7.ten_crop(image, 32) if crops == 10 else [torch7.centre_crop(image, 32)]
        views = [torch7.normalise(view, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for view in views]
        with torch.no_grad():
            logits = double(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2))
        answer = logits.mean(0).log_softmax(0) if average == "logits" else logits.softmax(1).mean(0).log()
        losses.append(-answer[index.labels[i]].item())
        wrong += answer.argmax().item() != index.labels[i]
        assert evaluation.top5[i].tolist() == answer.argsort(descending=True).tolist()
        assert evaluation.probability[i] == pytest.approx(answer.exp().max().item(), abs=1e-4)
    assert evaluation.score.images == 11
    assert evaluation.score.top1_error == pytest.approx(100 * wrong / 11)
    assert evaluation.score.loss == pytest.approx(np.mean(losses), abs=1e-4)


class Fixed(torch.nn.Module):
    """Answers every view with the same logits."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


@pytest.mark.parametrize("average", ["logits", "softmax"])
def test_classes_of_vanishing_probability_are_still_ranked(image_folders, average):
    index = scan_classes(image_folders / "val").with_classes(("class0", "class1", "class2", "x", "y", "z", "w"))
    loader = EvaluationLoader(index, DATA, SHARE, batch_size=11, crops=1)
    evaluation = evaluate(Fixed([300.0, 150, 100, 90, 80, 70, 60]), loader, ALONE, average)
    assert (evaluation.top5 == [0, 1, 2, 3, 4]).all()
    assert evaluation.score.loss == pytest.approx((4 * 0 + 4 * 150 + 3 * 200) / 11)


def test_evaluation_leaves_the_network_as_it_was(image_folders, network):
    index = scan_classes(image_folders / "val")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    evaluate(network, EvaluationLoader(index, DATA, SHARE, batch_size=4, crops=1), ALONE)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_image_that_is_missing_or_doubled_is_an_error(image_folders, network):
    index = scan_classes(image_folders / "val")
    for share in (dataclasses.replace(SHARE, ranks=2), dataclasses.replace(SHARE, rank=1, ranks=2)):
        with pytest.raises(RuntimeError, match="images"):
            evaluate(network, EvaluationLoader(index, DATA, share, batch_size=4, crops=1), ALONE)


def test_the_tool_gives_the_same_result_on_1_2_and_3_ranks(image_folders, checkpoint, tmp_path):
    """11 images divide by none of them."""
    results, predictions = [], []
    for ranks in (1, 2, 3):
        files = ["--json", tmp_path / f"{ranks}.json", "--predictions", tmp_path / f"{ranks}.csv"]
        done = run_module(
            "tools.evaluate", checkpoint, "--data", image_folders, "--crops", 10, "--batch-size", 2, *files, ranks=ranks
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
        predictions.append(list(csv.DictReader((tmp_path / f"{ranks}.csv").read_text().splitlines())))
    assert results[0]["images"] == 11 and results[0]["crops"] == 10 and results[0]["average"] == "logits"
    for key in ("images", "top1_error", "top5_error", "top1_wrong", "top5_wrong"):
        assert results[0][key] == results[1][key] == results[2][key]
    assert (
        results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6) == pytest.approx(results[2]["loss"], rel=1e-6)
    )
    assert len({row["answer1"] for row in predictions[0]}) > 1
    for rows in predictions:
        for column in ("file", "class", "answer1", "answer2", "answer3"):
            assert [row[column] for row in rows] == [row[column] for row in predictions[0]]
        ours, first = ([float(row["probability"]) for row in r] for r in (rows, predictions[0]))
        assert ours == pytest.approx(first, abs=2e-6)
        assert sum(row["answer1"] != row["class"] for row in rows) == results[0]["top1_wrong"]
