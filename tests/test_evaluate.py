import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
import torch7
import torchvision
from conftest import REPOSITORY, index_of, run_module, small_config, with_random_norms
from PIL import Image

from pipeline import api
from pipeline.audit import is_papers_data, published_errors_hold
from pipeline.autotune import Implementation, Tuning
from pipeline.checkpoint import CheckpointFolder, load_checkpoint
from pipeline.class_names import imagenet_ids
from pipeline.config import Config, DataConfig
from pipeline.config_file import from_dict, from_stored, load_config
from pipeline.data import dataset
from pipeline.data.dataset import fingerprint_of, open_datasets
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader, Shard
from pipeline.data.scan import scan_classes, scan_flat
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.evaluation import Evaluation, evaluate
from pipeline.measured import Measured
from pipeline.metrics import Score, errors_text
from pipeline.models import create_model
from pipeline.paper import C10, TOP1_ON_IMAGENET
from pipeline.run import Progress
from pipeline.weights import Weights, checksum, read_weights, write_safetensors, write_torch
from tools import predict
from tools.evaluate import main
from tools.support.calibration import calibration
from tools.support.candidate import Candidate
from tools.support.evaluated_images import chosen_by, hold_the_same, open_images, trained_on, where
from tools.support.evaluation_figures import published_errors, real_labels_score, recipe_line
from tools.support.evaluation_report import write_answers, write_report
from tools.support.output_subset import restrict_outputs
from tools.support.published import DENSENETS_ON_IMAGENET, TORCHVISION_ON_IMAGENET
from tools.support.significance import mcnemar, wilson_interval

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
SHARD = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
DATA = DataConfig(crop_size=32, resize_size=36, loader="reference")


@pytest.fixture(scope="module")
def network(image_folders):
    """A network whose answers differ from image to image: its logits have mean 0 and deviation 3 over the images."""
    torch.manual_seed(0)
    network = create_model("densenet_bc40_k12", num_classes=3)
    index = scan_classes(image_folders / "val")
    (batch,) = EvaluationLoader(index, DATA, SHARD, batch_size=11, crops=1).batches()
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
    config = small_config(
        "unused", model={"name": "densenet_bc40_k12"}, data={"crop_size": 32, "resize_size": 36, "loader": "auto"}
    )
    state = {
        "model": network.state_dict(),
        "config": dataclasses.asdict(config),
        "classes": ["class0", "class1", "class2"],
        "tuning": dataclasses.asdict(
            Tuning(Implementation("eager", "contiguous", "none"), {"precision": "bf16"}, "", "cpu")
        ),
    }
    folder.save(state, best=True)
    return folder.best


@pytest.fixture
def evaluated(monkeypatch, capsys):
    """Run the command in this process; return what it prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate", *map(str, words)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("average", ["logits", "softmax"])
@pytest.mark.parametrize("crops", [1, 10])
def test_scores_are_those_of_a_loop_over_images(image_folders, network, crops, average):
    """Against the Torch code's crops, cut one by one from Torch7's resize, and float64 arithmetic."""
    index = scan_classes(image_folders / "val")
    loader = EvaluationLoader(index, DATA, SHARD, batch_size=4, crops=crops)
    evaluation = evaluate(network, loader, ALONE, average)
    double = create_model("densenet_bc40_k12", num_classes=3).double().eval()
    double.load_state_dict(network.state_dict())
    wrong, losses = 0, []
    for i in range(len(index)):
        image = np.asarray(Image.open(index.location(i)), np.float64) / 255
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
    loader = EvaluationLoader(index, DATA, SHARD, batch_size=11, crops=1)
    evaluation = evaluate(Fixed([300.0, 150, 100, 90, 80, 70, 60]), loader, ALONE, average)
    assert (evaluation.top5 == [0, 1, 2, 3, 4]).all()
    assert evaluation.score.loss == pytest.approx((4 * 0 + 4 * 150 + 3 * 200) / 11)


def test_evaluation_leaves_the_network_as_it_was(image_folders, network):
    index = scan_classes(image_folders / "val")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    evaluate(network, EvaluationLoader(index, DATA, SHARD, batch_size=4, crops=1), ALONE)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_image_that_is_missing_or_doubled_is_an_error(image_folders, network):
    index = scan_classes(image_folders / "val")
    for shard in (dataclasses.replace(SHARD, ranks=2), dataclasses.replace(SHARD, rank=1, ranks=2)):
        with pytest.raises(RuntimeError, match="images"):
            evaluate(network, EvaluationLoader(index, DATA, shard, batch_size=4, crops=1), ALONE)


@pytest.mark.slow
def test_the_tool_gives_the_same_result_on_1_2_and_3_ranks(image_folders, checkpoint, tmp_path):
    """11 images divide by none of them."""
    results, answers, logits = [], [], []
    for ranks in (1, 2, 3):
        words = ["--data", image_folders, "--crops", 10, "--batch-size", 2, "--report", tmp_path / f"{ranks}"]
        done = run_module("tools.evaluate", checkpoint, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
        (result,) = json.loads((tmp_path / f"{ranks}" / "report.json").read_text())["evaluations"]
        results.append(result)
        answers.append(list(csv.DictReader((tmp_path / f"{ranks}" / f"{result['name']}.csv").read_text().splitlines())))
        logits.append(np.load(tmp_path / f"{ranks}" / f"{result['name']}.npy"))
    assert results[0]["images"] == 11 and results[0]["crops"] == 10 and results[0]["average"] == "logits"
    for key in ("images", "top1_error", "top5_error", "top1_wrong", "top5_wrong", "by_class", "confusions"):
        assert results[0][key] == results[1][key] == results[2][key]
    for ours in logits[1:]:
        np.testing.assert_allclose(ours, logits[0], atol=1e-5)
    assert len({row["answer1"] for row in answers[0]}) > 1
    for rows in answers:
        for column in ("file", "class", "answer1", "answer2", "answer3"):
            assert [row[column] for row in rows] == [row[column] for row in answers[0]]
        ours, first = ([float(row["probability1"]) for row in r] for r in (rows, answers[0]))
        assert ours == pytest.approx(first, abs=2e-6)
        assert sum(row["answer1"] != row["class"] for row in rows) == results[0]["top1_wrong"]
    labels = [int(row["class"][-1]) for row in answers[0]]
    assert (logits[0].argmax(axis=1) != labels).sum() == results[0]["top1_wrong"]
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits[0]), torch.tensor(labels)).item()
    assert loss == pytest.approx(results[0]["loss"], rel=1e-5)


def timms_preparation(name: str, index):
    """timm's own evaluation transform of each image, (N, 3, H, W)."""
    options = timm.data.resolve_data_config(model=timm.create_model(name))
    transform = timm.data.create_transform(**options)
    return torch.stack([transform(Image.open(index.location(i)).convert("RGB")) for i in range(len(index))])


@pytest.mark.parametrize("images", [160, 4_000, 20_000])
def test_an_error_and_its_accuracy_add_up(images):
    """With two digits each, also where the third is a 5."""
    for wrong in range(images + 1):
        score = Score(images, images - wrong, images - wrong, 0.0)
        error, accuracy = map(float, re.findall(r"\d+\.\d\d", errors_text(score.top1_error, None)))
        assert round(error + accuracy, 9) == 100 and score.top5_error == 100 * wrong / images


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "densenet121"])
def test_logits_are_timms(name, tmp_path, image_folders, evaluated):
    """Random weights of timm through the tool, with timm's preprocessing, against timm's transform and network."""
    torch.manual_seed(0)
    network = with_random_norms(timm.create_model(name, num_classes=3)).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "names.txt").write_text("class0\nclass1\nclass2\n")
    words = [tmp_path / "weights.pth", "--data", image_folders, "--classes", tmp_path / "names.txt"]
    words += ["--report", tmp_path / "report", "--loader", "reference"]
    words += ["--model", f"timm:{name}"] if name != "densenet121" else ["--interpolation", "pil-bicubic"]
    if name == "densenet121":  # timm's resize for it is 224 / 0.875
        assert timm.create_model(name).pretrained_cfg["crop_pct"] == 0.875
    evaluated(*words)
    with torch.no_grad():
        expected = network(timms_preparation(name, scan_classes(image_folders / "val"))).numpy()
    ours = np.load(tmp_path / "report" / "weights.npy")
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_a_report_of_two_networks(image_folders, checkpoint, tmp_path, evaluated):
    """The second answers always class0."""
    state = load_checkpoint(checkpoint)
    state["model"]["classifier.weight"].zero_()
    state["model"]["classifier.bias"].copy_(torch.tensor([3.0, 2, 1]))
    state["config"]["published"] = {"source": "someone", "top1": 12.5, "top5": 1.5}
    fixed = CheckpointFolder(tmp_path / "fixed" / "checkpoints")
    fixed.last.parent.mkdir(parents=True)
    fixed.save(state, best=False)
    printed = evaluated(checkpoint, fixed.last, "--data", image_folders, "--report", tmp_path / "report")
    summary = json.loads((tmp_path / "report" / "report.json").read_text())
    first, second = summary["evaluations"]
    assert second["name"] == "fixed-last" and second["top1_wrong"] == 7 and second["top5_wrong"] is None
    assert second["top1_interval"] == pytest.approx((35.38, 84.83), abs=0.01)  # 7 of 11
    assert second["by_class"][0] == {"class": "class0", "images": 4, "top1_error": 0, "top5_error": None}
    assert second["mean_class_error"] == pytest.approx(200 / 3)  # two of three classes are always wrong
    told = "mean error of a class 66.67 %, however many images each has (3 to 4); the most frequent class as every answer has a"
    assert f"{told} top-1 error of 63.64 %" in printed
    assert first["epochs"] is first["epochs_planned"] is None  # the file does not say for how many it was trained
    assert first["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert second["confusions"] == [
        {"class": "class1", "answer": "class0", "images": 4},
        {"class": "class2", "answer": "class0", "images": 3},
    ]
    assert second["published"] == [{"source": "someone", "top1_error": 12.5, "top5_error": 1.5}]
    rows = [
        list(csv.DictReader((tmp_path / "report" / f"{result['name']}.csv").read_text().splitlines()))
        for result in (first, second)
    ]
    wrong = [[row["answer1"] != row["class"] for row in table] for table in rows]
    (comparison,) = summary["comparisons"]
    only_first, only_second = (sum(x and not y for x, y in zip(*pair, strict=True)) for pair in (wrong, wrong[::-1]))
    assert (comparison["only_a_wrong"], comparison["only_b_wrong"]) == (only_first, only_second)
    text, page = (tmp_path / "report" / "report.md").read_text(), (tmp_path / "report" / "report.html").read_text()
    assert "63.64 (35.38 to 84.83)" in text and "|   someone" in text
    assert page.count("<img src=") == sum(map(sum, wrong)) + only_first + only_second
    assert "<b>predicted</b> class0 (67\u00a0%)</span><span><b>true</b> class1</span>" in page
    assert "someone: top-1 error 12.5 %, top-5 error 1.5 %" in printed and "(McNemar's exact test)" in printed
    assert "; Wilson's 95 % interval 35.38 to 84.83)" in printed
    assert "\nfixed-last:\n" in printed and printed.count("top-5") == page.count("top-5") == 1  # the published one


@pytest.mark.slow
def test_networks_with_their_classes_in_another_order_are_compared(image_folders, checkpoint, tmp_path, evaluated):
    """The same network with its outputs turned round, and the same again: no image tells them apart."""
    state = load_checkpoint(checkpoint)
    order = [2, 0, 1]
    state["classes"] = [state["classes"][k] for k in order]
    for name in ("classifier.weight", "classifier.bias"):
        state["model"][name] = state["model"][name][order]
    turned = CheckpointFolder(tmp_path)
    turned.save(state, best=True)
    words = ["--data", image_folders, "--report", tmp_path / "report"]
    evaluated(checkpoint, turned.last, turned.best, *words)
    summary = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len({result["name"] for result in summary["evaluations"]}) == 3
    assert len({result["top1_wrong"] for result in summary["evaluations"]}) == 1
    assert [(row["only_a_wrong"], row["only_b_wrong"], row["p"]) for row in summary["comparisons"]] == [(0, 0, 1)] * 3


def chosen(logits: np.ndarray, outputs: list[int]) -> tuple[list[int], dict[int, float]]:
    """What a network with only these outputs would say: its outputs from best to worst, and each one's probability."""
    ranked = sorted(outputs, key=lambda k: -logits[k])
    powers = {k: np.exp(np.float64(logits[k]) - np.float64(logits[ranked[0]])) for k in outputs}
    return ranked, {k: power / sum(powers.values()) for k, power in powers.items()}


def test_outputs_are_restricted_as_numpy_does_it():
    """40 images of 7 of 12 classes, one without a finite answer."""
    random = np.random.default_rng(0)
    logits, present = random.normal(0, 3, (40, 12)).astype(np.float32), [1, 2, 4, 5, 8, 9, 11]
    labels = random.choice(present, 40)
    top5 = np.argsort(-logits, axis=1)[:, :5]
    logits[3, 0], top5[3] = np.nan, -1  # of an output that is not used
    zeros = np.zeros(40, np.float32)
    ours = restrict_outputs(Evaluation(Score(40, 0, 0, 0.0), top5, zeros, zeros, logits, 1), labels, np.array(present))
    answers = [chosen(row, present) for row in logits]
    for i, (ranked, probability) in enumerate(answers):
        assert ours.top5[i].tolist() == ([-1] * 5 if i == 3 else ranked[:5])
        assert ours.probability[i] == pytest.approx(probability[ranked[0]], rel=1e-5)
        assert ours.losses[i] == pytest.approx(-np.log(probability[labels[i]]), rel=1e-4, abs=1e-6)
    counted = [(ranked, label) for i, ((ranked, _), label) in enumerate(zip(answers, labels, strict=True)) if i != 3]
    correct = [sum(label in ranked[:k] for ranked, label in counted) for k in (1, 5)]
    assert [ours.score.top1_correct, ours.score.top5_correct] == correct and correct[0] < correct[1] < 39
    assert ours.not_finite == 1 and ours.score.images == 40


@pytest.fixture(scope="module")
def five_outputs(network, tmp_path_factory):
    """A checkpoint with five outputs, of which the images have those at 0, 2 and 4; all five are answers to some image."""
    random = torch.Generator().manual_seed(1)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    mixed = torch.randn(5, 3, generator=random)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = mixed @ state[name]
    folder = CheckpointFolder(tmp_path_factory.mktemp("five"))
    config = small_config(
        "unused", model={"name": "densenet_bc40_k12"}, data={"crop_size": 32, "resize_size": 36, "loader": "auto"}
    )
    tree = dataclasses.asdict(config) | {"published": {"source": "someone", "top1": 12.5}}
    classes = ["class0", "absent1", "class1", "absent3", "class2"]
    folder.save({"model": state, "config": tree, "classes": classes}, best=True)
    return folder.best


@pytest.mark.parametrize(
    ("outputs", "ranks"), [("all", 1), ("present", 1), pytest.param("present", 2, marks=pytest.mark.slow)]
)
def test_images_of_a_part_of_the_classes(image_folders, five_outputs, tmp_path, evaluated, outputs, ranks):
    """Both choices of outputs are told; everything else is of the one that was asked for."""
    names, present = ["class0", "absent1", "class1", "absent3", "class2"], [0, 2, 4]
    words = [five_outputs, "--data", image_folders, "--report", tmp_path]
    words += ["--outputs", outputs] if outputs == "present" else []
    printed = evaluated(*words) if ranks == 1 else run_module("tools.evaluate", *words, ranks=ranks).stdout
    (result,) = json.loads((tmp_path / "report.json").read_text())["evaluations"]
    logits = np.load(tmp_path / f"{result['name']}.npy")
    labels = [present[k] for k in scan_classes(image_folders / "val").labels]
    assert logits.shape == (11, 5)
    answers = {which: [chosen(row, use) for row in logits] for which, use in (("all", range(5)), ("present", present))}
    wrong = {
        which: sum(ranked[0] != label for (ranked, _), label in zip(found, labels, strict=True))
        for which, found in answers.items()
    }
    assert 0 < wrong["present"] < wrong["all"]  # or the test could not tell them apart
    other = {"all": "present", "present": "all"}[outputs]
    assert (result["outputs"], result["outputs_used"]) == (outputs, {"all": 5, "present": 3}[outputs])
    assert (result["classes"], result["classes_present"], result["top1_wrong"]) == (5, 3, wrong[outputs])
    assert result["other_outputs"]["outputs"] == other and result["other_outputs"]["top1_wrong"] == wrong[other]
    losses = [-np.log(share[label]) for (_, share), label in zip(answers[outputs], labels, strict=True)]
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    confusions: dict[tuple[str, str], int] = {}
    for (ranked, _), label in zip(answers[outputs], labels, strict=True):
        if ranked[0] != label:
            pair = names[label], names[ranked[0]]
            confusions[pair] = confusions.get(pair, 0) + 1
    assert {(row["class"], row["answer"]): row["images"] for row in result["confusions"]} == confusions
    assert [row["class"] for row in result["by_class"]] == ["class0", "class1", "class2"]
    rows = list(csv.DictReader((tmp_path / f"{result['name']}.csv").read_text().splitlines()))
    for row, (ranked, share) in zip(rows, answers[outputs], strict=True):
        assert [row[f"answer{i + 1}"] for i in range(len(ranked))] == [names[k] for k in ranked]
        assert float(row["probability1"]) == pytest.approx(share[ranked[0]], abs=2e-6)
    assert result["published"] == [] and "12.5" not in printed
    assert "no published error is shown: those of this network are for all 5 classes" in printed
    among = {"all": "all 5 outputs", "present": "the 3 outputs of those classes"}
    other_error = f"{100 * wrong[other] / 11:.2f} %"
    assert (
        f"images of 3 of the 5 classes: the network chose among {among[outputs]}; among {among[other]} top-1 error "
        f"{other_error}" in printed
    )
    assert f"(--outputs {other})" in printed


def test_images_without_a_finite_answer_are_wrong_and_get_no_name(image_folders, checkpoint, tmp_path, evaluated):
    """A network that looks at one feature alone, with a weight so large that the logits of some images overflow."""
    index, state = scan_classes(image_folders / "val"), load_checkpoint(checkpoint)
    network = read_weights(checkpoint).network
    loader = EvaluationLoader(index, DATA, SHARD, batch_size=11, crops=1)
    with torch.no_grad():
        network.classifier.bias.zero_()
        network.classifier.weight.zero_()[:, 0] = 1
        network.features.norm5.bias[0] = 1
        feature = np.median(evaluate(network, loader, ALONE, keep_logits=True).logits)
        network.features.norm5.weight[0] *= 2 / feature
        network.features.norm5.bias[0] *= 2 / feature
        network.classifier.weight[:, 0] = torch.finfo(torch.float32).max / 2 * torch.tensor([0.25, 0.5, 1])
    evaluation = evaluate(network, loader, ALONE, keep_logits=True)
    assert 0 < evaluation.not_finite < 11
    overflown = CheckpointFolder(tmp_path / "checkpoints")
    overflown.last.parent.mkdir()
    overflown.save(state | {"model": network.state_dict()}, best=False)
    printed = evaluated(
        overflown.last, "--data", image_folders, "--report", tmp_path / "report", "--loader", "reference"
    )

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    text = (tmp_path / "report" / "report.json").read_text()
    (result,) = json.loads(text, parse_constant=refuse)["evaluations"]
    finite = np.isfinite(evaluation.logits).all(axis=1)
    wrong = finite & (evaluation.logits.argmax(axis=1) != index.labels)
    lost = index.location(int(np.flatnonzero(~finite)[0]))
    assert result["not_finite"] == (~finite).sum() and result["top1_wrong"] == (wrong | ~finite).sum()
    assert f"the answers to {(~finite).sum()} images are not finite and count as wrong (the first: {lost})" in printed
    assert sum(row["images"] for row in result["confusions"]) == wrong.sum()
    rows = list(csv.DictReader((tmp_path / "report" / f"{result['name']}.csv").read_text().splitlines()))
    for row, is_finite, best in zip(rows, finite, evaluation.logits.argmax(axis=1), strict=True):
        assert row["answer1"] == (f"class{best}" if is_finite else "")
        assert is_finite or (row["answer2"], row["answer3"], row["probability1"]) == ("", "", "nan")
    assert (tmp_path / "report" / "report.html").read_text().count("<img src=") == wrong.sum()


def test_mistakes_show_before_the_work(image_folders, checkpoint, tmp_path, user_error):
    state = load_checkpoint(checkpoint)
    state["model"]["classifier.bias"][0] = float("nan")
    nan = CheckpointFolder(tmp_path)
    nan.save(state, best=False)
    report = ("--report", tmp_path / "reports" / "a", "--json", tmp_path / "json" / "a.json")
    for words, expected in (
        ([checkpoint, "none.pt", *report], "cannot read the weights none.pt"),
        ([image_folders], f"{image_folders} is a folder without checkpoints/best.pt: give a run's directory"),
        ([checkpoint, "--crop-size", 2, "--resize-size", 2], "cannot take images of 2 x 2 pixels"),
        ([checkpoint, checkpoint, "--predictions", tmp_path / "a.csv"], "--predictions is for one WEIGHTS"),
        ([checkpoint, "--json", tmp_path], "cannot write --json .*: Is a directory"),
        ([nan.last], "last.pt: the answers are not finite"),
    ):
        assert re.search(expected, user_error(main, *words, "--data", image_folders, silent=True))
    assert not (tmp_path / "reports").exists() and not (tmp_path / "json").exists()  # nothing was to be written
    error = user_error(main, nan.last, checkpoint, *report, "--data", image_folders)
    assert "last.pt: the answers are not finite" in error
    found = json.loads((tmp_path / "json" / "a.json").read_text())["evaluations"]
    assert [result["weights"] for result in found] == [str(checkpoint)]
    assert (tmp_path / "reports" / "a" / "report.html").exists()


def test_names_of_files_and_classes_reach_the_page_as_they_are(tmp_path):
    (tmp_path / "images").mkdir()
    names = ("a<b>.png", os.fsdecode(b"\xff.png"))
    for name in names:
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / name)
    index = scan_flat(tmp_path / "images", labels_of(tmp_path, names), ("x&y|z", "|"))
    zeros = np.zeros(2, np.float32)
    evaluation = Evaluation(Score(2, 0, 2, 0.0), np.array([[1, 0], [1, 0]]), zeros, zeros, None, 0)
    row = {"class": "x&y|z", "images": 2, "top1_error": 100, "top5_error": 0}
    result = {
        "name": "n", "weights": "w", "sha256": "0" * 64, "trained": "", "note": "", "model": "m",
        "parameters": 1, "multiply_accumulates": 1, "data": "d",
        "images": 2, "classes": 2, "classes_present": 1, "other_outputs": None, "not_finite": 0,
        "crops": 1, "average": "logits", "precision": "fp32",
        "interpolation": "torch7-bicubic", "resize_size": 9, "crop_size": 9, "loader": "dali",
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2), "assumed": (),
        "top1_error": 100, "top5_error": 0,
        "top1_wrong": 2, "top5_wrong": 0, "top1_interval": (1, 2), "top5_interval": (1, 2), "loss": 1, "real": None,
        "published": [], "published_note": "",
        "begun_with": None, "training": None, "by_class": [row], "confusions": [], "ranks": 1, "seconds": 1,
        "chosen_by_these": False, "chosen_by_some": "", "validated_in": None, "trained_on": "",
    }  # fmt: skip
    result["calibration"] = calibration(zeros, zeros > 0)
    write_report(tmp_path, {"about": {}, "evaluations": [result], "comparisons": []}, [evaluation], [index])
    write_answers(tmp_path / "a.csv", evaluation, index)
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "| x&y" in line)
    assert row.count("|") - row.count("\\|") == 5
    page = (tmp_path / "report.html").read_bytes()
    assert b"a&lt;b&gt;.png" in page and b"a<b>" not in page and page.count(b"<img") == 2
    assert b"<b>true</b> x&amp;y|z" in page
    assert b"\xff.png" in (tmp_path / "a.csv").read_bytes()


def labels_of(folder: Path, names: tuple[str, ...]) -> Path:
    (folder / "labels.txt").write_text("x&y|z\n" * len(names))
    return folder / "labels.txt"


def test_a_runs_directory_stands_for_its_best_checkpoint(image_folders, checkpoint, tmp_path, evaluated):
    run = tmp_path / "my-run" / "checkpoints"
    run.mkdir(parents=True)
    (run / "best.pt").symlink_to(checkpoint)
    summary = evaluated(run.parent, "--data", image_folders, "--crop-size", 16, "--json", tmp_path / "found.json")
    (found,) = json.loads((tmp_path / "found.json").read_text())["evaluations"]
    assert found["weights"] == str(run / "best.pt") and "resize to 18, crop 16" in summary  # 32 of 36 pixels in the run
    assert (found["epochs"], found["trained"]) == (None, "") and summary.startswith("densenet_bc40_k12, 1 crop, ")


def test_the_epoch_of_the_weights_is_told(image_folders, checkpoint, tmp_path, evaluated):
    """Of a run of four epochs, the second of them the best, after the first, second and third, and after a step of the fourth;
    also by the files that they are converted into."""
    progress, run = Progress(), tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    told = []

    def of_last() -> Weights:
        weights = read_weights(run / "last.pt")
        for write, file in ((write_safetensors, tmp_path / "w.safetensors"), (write_torch, tmp_path / "w.pth")):
            write(weights, file)
            assert read_weights(file).trained == weights.trained
        return weights

    for correct in (3, 7, 5):
        state = load_checkpoint(checkpoint)
        state["config"]["optim"] |= {"epochs": 4}
        progress.finish_epoch({"raw": Score(11, correct, None, 1.0)})
        best = progress.best_epoch + 1 == progress.epoch
        CheckpointFolder(run).save(state | {"progress": progress.state_dict()}, best=best)
        weights = of_last()
        told.append(weights.trained)
    progress.step = 1
    CheckpointFolder(run).save(state | {"progress": progress.state_dict()}, best=False)
    out = evaluated(
        run.parent, run / "last.pt", "--data", image_folders, "--crop-size", 16, "--json", tmp_path / "json"
    )
    train = dataclasses.replace(weights.config.train, ema_decay=0.9, best_by="raw")
    averaged = dataclasses.replace(weights, config=dataclasses.replace(weights.config, train=train))
    assert averaged.trained == "epoch 3 of the 4 then planned (the best so far by the raw weights: 2)"
    part = "epoch 3 of the 4 then planned and 1 step of the next (the best so far: 2)"
    assert of_last().trained == part
    assert (
        f"run-best:\n{run}/best.pt: epoch 2 of the 4 then planned, the best so far\n" in out
        and f"{run}/last.pt: {part}\n" in out
    )
    assert told == [
        "epoch 1 of the 4 then planned, the best so far",
        "epoch 2 of the 4 then planned, the best so far",
        "epoch 3 of the 4 then planned (the best so far: 2)",
    ]
    results = json.loads((tmp_path / "json").read_text())["evaluations"]
    assert [(r["epochs"], r["epochs_planned"], r["steps_of_next_epoch"], r["best_epoch"]) for r in results] == [
        (2, 4, 0, 2),
        (3, 4, 1, 2),
    ]


@pytest.fixture
def table_data(image_folders, tmp_path) -> Path:
    """A data set whose images lie in one folder, and which tables cut into two sets."""
    rows = {"train": ["file,label"], "val": ["file,label"]}
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for split, lines in rows.items():
        for file in sorted((image_folders / split).rglob("*.jpg")):
            name = f"pictures/{split}-{file.name}"
            shutil.copyfile(file, tmp_path / "data" / name)
            lines.append(f"{name},{file.parent.name}")
        (tmp_path / "data" / f"{split}.csv").write_text("\n".join(lines))
    both = [f"{line},{split}" for split, lines in rows.items() for line in lines[1:]]
    (tmp_path / "data" / "all.csv").write_text("\n".join(["file,label,split", *both]))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"train": "train.csv", "val": "val.csv"}, "val.csv"),
        ({}, "val.csv"),  # as a run finds it
        ({"train": "all.csv", "val": "all.csv"}, "all.csv"),
        ({"train": "all.csv", "val": "all.csv", "labels": "multi"}, "all.csv"),
    ],
)
def test_the_folder_in_place_of_the_table_that_a_run_validated_on(table_data, capfd, fields, taken):
    data, classes = DataConfig(dir=str(table_data), loader="reference", **fields), ("class0", "class1", "class2")
    _, expected = open_datasets(data, None, progress=False)
    capfd.readouterr()
    index = open_images(data, None, classes)
    assert index.names == expected.names and len(index) == 11 and (index.labels == expected.labels).all()
    assert f"of {table_data} {taken} is taken (data.val)\n" in capfd.readouterr().err
    alone = open_images(dataclasses.replace(data, dir=str(table_data / "val.csv"), labels="single"), None, classes)
    assert sorted(index.names) == sorted(alone.names)  # several labels have no order of classes


@pytest.mark.parametrize("labels", ["single", "multi"])
def test_the_split_of_a_table_is_said_and_can_be_chosen(table_data, capfd, labels):
    table = table_data / "all.csv"
    header, *rows = table.read_text().splitlines()
    rows = [row.replace(",val", ",test") if i % 2 else row for i, row in enumerate(rows)]
    table.write_text("\n".join([header, *rows]))
    classes = ("class0", "class1", "class2")
    data = DataConfig(dir=str(table_data), loader="reference", labels=labels)
    data = data if labels == "multi" else dataclasses.replace(data, dir=str(table))
    file = str(table) if labels == "multi" else None
    for split, name in ((None, "val"), ("val", "val"), ("test", "test"), ("train", "train")):
        index = open_images(data, file, classes, split)
        wanted = [row for row in rows if row.endswith(f",{name}")]
        assert sorted(index.names) == sorted(row.split(",")[0] for row in wanted) and wanted
        told = f"of {table} the split {name} is taken (there are test, train, val)\n"
        assert told in capfd.readouterr().err
        of = Candidate(
            "",
            "",
            Weights("", torch.nn.Identity(), load_config(REPOSITORY / "configs" / "demo.yaml"), classes, 1),
            data,
            index,
            0,
        )
        assert where(of, file, False, split).endswith(f"all.csv, its split {name}")
    with pytest.raises(UserError, match="all.csv has no line of split dev, but of test, train, val"):
        open_images(data, file, classes, "dev")
    with pytest.raises(UserError, match="--split is for a table of image files, and cifar10 has a test set"):
        open_images(dataclasses.replace(data, dataset="cifar10", labels="single"), file, classes, "test")
    if labels == "single":
        with pytest.raises(UserError, match="--split test is for a table, and .*val.csv has a line for each image"):
            open_images(dataclasses.replace(data, dir=str(table_data)), str(table_data / "val.csv"), classes, "test")
    plain = str(table_data / "val.csv")
    data = data if labels == "multi" else dataclasses.replace(data, dir=plain)
    with pytest.raises(UserError, match=r"--split test is for a table whose lines .*val.csv is none"):
        open_images(data, plain if labels == "multi" else None, classes, "test")


def test_a_table_that_lies_elsewhere_is_given_as_labels(table_data, tmp_path, capfd):
    """Its splits hold there too: without them the error would be that of images that were trained on."""
    (elsewhere := tmp_path / "lists").mkdir()
    table = (table_data / "all.csv").rename(elsewhere / "all.csv")
    data = DataConfig(dir=str(table_data), train=str(table), val=str(table))
    classes = open_datasets(data, None, progress=False)[0].classes
    with pytest.raises(UserError, match=f"the run had its images from the table {table}: add --labels {table}$"):
        open_images(dataclasses.replace(data, dir=str(table_data)), None, classes)
    whole = len(open_images(data, str(table), classes, "train")) + len(found := open_images(data, str(table), classes))
    assert 0 < len(found) < whole and f"of {table} the split val is taken" in capfd.readouterr().err


def test_networks_that_were_validated_on_two_tables_of_a_folder_are_not_compared(
    table_data, checkpoint, tmp_path, evaluated
):
    *few, _ = (table_data / "val.csv").read_text().splitlines()
    (table_data / "few.csv").write_text("\n".join(few))
    state, files = load_checkpoint(checkpoint), []
    for table in ("val.csv", "few.csv"):
        folder = CheckpointFolder(tmp_path / table / "checkpoints")
        folder.last.parent.mkdir(parents=True)
        state["config"]["data"] |= {"train": "train.csv", "val": table}
        folder.save(state, best=False)
        files.append(folder.last)
    with pytest.raises(UserError, match=f"{files[1]} and {files[0]} are not for the same images"):
        evaluated(*files, "--data", table_data, "--crop-size", 16)


def test_networks_of_one_label_and_of_several_are_not_compared(table_data, checkpoint, tmp_path, evaluated):
    state, files = load_checkpoint(checkpoint), []
    for labels, objective in (("single", "cross_entropy"), ("multi", "binary_cross_entropy")):
        folder = CheckpointFolder(tmp_path / labels / "checkpoints")
        folder.last.parent.mkdir(parents=True)
        state["config"]["data"] |= {"train": "train.csv", "val": "val.csv", "labels": labels}
        state["config"]["optim"]["objective"] = objective
        folder.save(state, best=False)
        files.append(folder.last)
    for order in (files, files[::-1]):
        with pytest.raises(UserError, match="gives several labels an image, the other one: evaluate them one by one"):
            evaluated(*order, "--data", table_data, "--crop-size", 16)


def test_which_images_are_the_same(tmp_path):
    """Those of equal names are not, where they hold something else, or nothing tells, or labels group them otherwise."""

    def folders(name: str, shades: tuple[int, ...], suffix: str = "png") -> DatasetIndex:
        for i, shade in enumerate(shades):
            (folder := tmp_path / name / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("L", (9 + i, 9) if suffix == "png" else (9, 9), shade).save(folder / f"{i}.{suffix}")
        return scan_classes(tmp_path / name)

    first, copy = folders("first", (0, 1, 2, 3)), folders("copy", (0, 1, 2, 3))
    assert hold_the_same(first, copy) and hold_the_same(first, dataclasses.replace(first, classes=("x", "y")))
    assert hold_the_same(first, dataclasses.replace(first, labels=1 - first.labels, classes=("class1", "class0")))
    assert not hold_the_same(first, dataclasses.replace(first, labels=np.array([0, 1, 0, 1])))
    assert not hold_the_same(first, dataclasses.replace(first, labels=np.zeros(4, np.int64)))
    assert not hold_the_same(first, dataclasses.replace(copy, lengths=copy.lengths + 1))
    alike = [folders(name, (0, 1), "bmp") for name in ("third", "fourth")]
    assert hold_the_same(alike[0], alike[0]) and not hold_the_same(*alike)


def test_other_sets_that_a_run_validated_on_are_found_in_the_folder_and_no_other_is_taken(
    image_folders, table_data, tmp_path, capfd
):
    root, classes = tmp_path / "folders", ("class0", "class1", "class2")
    for split, name in (("train", "train"), ("val", "images/val")):
        shutil.copytree(image_folders / split, root / name)

    def names(folder: Path, labels: str | None = None, **fields: object) -> list[str]:
        return list(open_images(DataConfig(dir=str(folder), **fields), labels, classes).names)

    of_val = names(image_folders / "val")
    assert names(root, val="images/val") == of_val and "images/val is taken" in capfd.readouterr().err
    shutil.move(root / "images" / "val", root / "valid")
    assert names(root) == of_val and "valid is taken" in capfd.readouterr().err
    for val in ("valid", str(root / "valid"), "../valid", "val.csv", str(table_data / "val.csv")):
        assert names(root / "train", val=val) == names(image_folders / "train")  # class folders, as they were given
    assert "taken" not in capfd.readouterr().err
    shutil.move(root / "valid", root / "val")
    assert names(root) == of_val and "taken" not in capfd.readouterr().err
    (table_data / "val.txt").write_text("".join(f"class{i % 3}\n" for i in range(48)))
    assert len(names(table_data, val="pictures", val_labels="val.txt")) == 48  # flat, with its labels
    (table_data / "val.csv").unlink()
    why = "the class 'pictures' .*; the run had its images from the table val.csv, which is not in .*/data: give that table,"
    with pytest.raises(UserError, match=why):
        names(table_data, train="train.csv", val="val.csv")
    with pytest.raises(UserError, match="from the table train.csv: give .*/data/train.csv as --data$"):
        names(table_data, train="train.csv", holdout=9)


def test_images_that_were_trained_on_are_named_and_those_held_out_can_be_taken(
    image_folders, checkpoint, tmp_path, monkeypatch, capfd, user_error
):
    data = tmp_path / "data"
    shutil.copytree(image_folders / "train", data / "training")  # a name that a run finds by itself

    def said(*words: object) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["evaluate", *map(str, words)])
        main()
        return capfd.readouterr()

    def saved(name: str, **fields: object) -> Path:
        state = load_checkpoint(checkpoint)
        state["config"]["data"] |= {"dir": str(data), "loader": "reference", **fields}
        state["config"]["train"]["precision"] = "bf16"
        if fields.get("holdout"):
            parts = open_datasets(from_stored(state["config"], name).data, None, progress=False)
            validated = parts[1].fingerprint
            state["conditions"] = {"fingerprint": fingerprint_of(*parts), "val_fingerprint": validated, "ranks": 1}
        progress = Progress()
        progress.finish_epoch({"raw": Score(7, 3, None, 1.0)})
        state["progress"], state["config"]["optim"]["epochs"] = progress.state_dict(), 4
        (tmp_path / name).mkdir()
        folder = CheckpointFolder(tmp_path / name)
        folder.save(state, best=True)
        return folder.best

    plain, holding = saved("plain"), saved("holding", holdout=7)
    shutil.copytree(image_folders / "val", data / "val")
    warned = f"was trained on the images in {data}/training"
    capfd.readouterr()
    out, err = said(plain, "--data", data / "training", "--report", tmp_path / "report")
    assert f"{warned}: new images usually have a higher error" in err
    line = f"trained on the images in {data}/training: new images usually have a higher error"
    assert line in out and all(line in (tmp_path / "report" / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "trained on" not in said(plain, "--data", data).err
    assert f"{warned} (but for 7; --data {data} --held-out" in said(holding, "--data", data / "training").err
    out, err = said(holding, "--data", data, "--held-out")
    assert "of 7 wrong" in out and "trained on" not in err
    said(holding, "--data", data, "--held-out", "--json", tmp_path / "json")
    (result,) = json.loads((tmp_path / "json").read_text())["evaluations"]
    assert result["data"] == f"{data}/training, held out of its images"
    chosen = "of its run's epochs these images found this one the best: new images usually have a worse result\n"
    assert chosen in out
    converted = tmp_path / "converted.safetensors"
    write_safetensors(read_weights(holding), converted)
    assert chosen in said(converted, "--data", data, "--held-out").out
    assert chosen not in said(holding, "--data", data).out
    in_bf16 = (
        "its run was validated on these images in bf16, so that a few answers may differ (--precision bf16 computes as"
    )
    assert in_bf16 in out
    assert in_bf16 not in said(holding, "--data", data, "--held-out", "--precision", "bf16").out
    assert in_bf16 not in said(holding, "--data", data).out
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    assert "of 7 wrong" in said(holding, "--data", moved, "--held-out").out
    shutil.copyfile(next((moved / "training" / "class0").iterdir()), moved / "training" / "class0" / "new.jpg")
    complaint = "moved/training does not hold the images that the run of .* had, so that it may have trained on"
    with pytest.raises(UserError, match=complaint):
        said(holding, "--data", moved, "--held-out")
    other = saved("other", holdout=7, train="val", val="training")
    with pytest.raises(UserError, match="are not for the same images"):
        said(holding, other, "--data", data, "--held-out")
    complaint = r"held no training images out \(data.holdout\)"
    assert re.search(complaint, user_error(main, plain, "--data", data, "--held-out"))


@pytest.mark.parametrize("labels", ["single", "multi"])
def test_images_that_were_trained_on_are_found_by_what_they_hold(
    image_folders, checkpoint, table_data, tmp_path, monkeypatch, labels
):
    """In tables, as a copy under other names, and whatever the run's table says of splits; not what was held out."""
    weights = read_weights(checkpoint)

    def run(**fields: object) -> Weights:
        data = dataclasses.replace(weights.config.data, dir=str(table_data), labels=labels, **fields)
        parts = open_datasets(data, tmp_path / "run" / "index", progress=False)  # which keeps the index
        objective = {"single": "cross_entropy", "multi": "binary_cross_entropy"}[labels]
        optim = dataclasses.replace(weights.config.optim, objective=objective)
        config = dataclasses.replace(weights.config, data=data, optim=optim)
        return dataclasses.replace(
            weights,
            origin=str(tmp_path / "run" / "checkpoints" / "best.pt"),
            config=config,
            fingerprint=fingerprint_of(*parts),
            val_fingerprint=parts[1].fingerprint,
        )

    def told(of: Weights, images: Path) -> str:
        folder, table = (table_data, str(images)) if labels == "multi" else (images, None)
        data = dataclasses.replace(of.data, dir=str(folder))
        return trained_on(Candidate("", "", of, data, open_images(data, table, of.classes), 0))

    apart = run(train="train.csv", val="val.csv")
    for of in (apart, run(train="all.csv", val="all.csv")):
        seen = r"images in .*, at least 32 of \d+( and 32 of 32 taken evenly)?, as .*/train-image\d+.jpg: new images .*"
        assert re.fullmatch(seen, told(of, table_data / "train.csv"))
        assert (
            told(of, table_data / "val.csv") == told(of, table_data / "all.csv") == ""
        )  # of that its validation lines
    if labels == "multi":
        return
    copy = Path(shutil.copytree(image_folders / "train", tmp_path / "copy"))
    for number, file in enumerate(sorted(copy.rglob("*.jpg"))):
        file.rename(file.with_name(f"{number}.jpg"))
    assert told(apart, copy).startswith(f"images in {copy}, ")
    held_out = run(train="train.csv", holdout=36)
    assert ", at least 1 of 37 and 1 of 32 taken evenly, as" in told(held_out, table_data / "train.csv")

    state = load_checkpoint(checkpoint)
    state["config"] = dataclasses.asdict(apart.config)
    state["conditions"] = {"fingerprint": apart.fingerprint, "val_fingerprint": apart.val_fingerprint, "ranks": 1}
    (tmp_path / "first" / "checkpoints").mkdir(parents=True)
    first = CheckpointFolder(tmp_path / "first" / "checkpoints")
    first.save(state, best=True)
    other = run(train="val.csv", val="train.csv")

    def begun_with(digest: str) -> Weights:
        model = dataclasses.replace(other.config.model, weights=str(tmp_path / "first"), weights_sha256=digest)
        return dataclasses.replace(other, config=dataclasses.replace(other.config, model=model))

    told_so = told(begun_with(checksum(first.best).upper()), copy)
    assert (
        f": so were the weights that it began with, {first.best}; new images" in told_so and "at least 32 of" in told_so
    )
    assert told(begun_with("0" * 64), copy) == told(other, copy) == ""  # another file now, or none
    with monkeypatch.context() as patch:
        patch.setattr(
            "tools.support.evaluated_images.weights_file", lambda path: (tmp_path / ("x" * 300)).resolve(True)
        )
        assert told(begun_with(checksum(first.best)), copy) == ""  # OSError: of another user's folder, too

    long = dataclasses.replace(other.config, optim=dataclasses.replace(other.config.optim, epochs=4))
    some = open_images(dataclasses.replace(long.data, dir=str(copy)), None, other.classes).take(np.arange(0, 37, 2))
    best = dataclasses.replace(other, config=long, epochs=2, best_epoch=2)
    chosen = chosen_by(Candidate("", "", best, best.data, some, 0))
    assert chosen.startswith(f"images in {copy}, at least 19 of 19, as {copy}/")
    holding = run(train="train.csv", holdout=9)
    half = dataclasses.replace(best, config=dataclasses.replace(holding.config, optim=long.optim))
    half = dataclasses.replace(half, fingerprint=holding.fingerprint, val_fingerprint=holding.val_fingerprint)
    whole = open_images(dataclasses.replace(long.data, dir=str(copy)), None, other.classes)
    assert chosen_by(Candidate("", "", half, half.data, whole, 0)).startswith(f"images in {copy}, at least ")
    then, since = ", if they were there then", f" (the images of the run of {best.origin} have changed since)"
    assert then not in chosen
    changed = dataclasses.replace(best, val_fingerprint="of other images, which lay there then")
    told_so = chosen_by(Candidate("", "", changed, changed.data, some, 0))
    assert "at least 19 of 19, as" in told_so and told_so.endswith(then + since)
    of_before = dataclasses.replace(best, val_fingerprint=None)
    assert chosen_by(Candidate("", "", of_before, of_before.data, some, 0)).endswith(then)
    changed = dataclasses.replace(apart, fingerprint="of others")
    assert f"{then}{since}: new images" in told(changed, copy)
    grown = dataclasses.replace(half, fingerprint="of others", val_fingerprint="of others")  # others are held out now
    assert chosen_by(Candidate("", "", grown, grown.data, whole, 0)).endswith(f"{then} and held out{since}")
    assert f"{then} and not held out{since}: new images" in told(grown, copy)

    def trained(of: Weights, labels: np.ndarray) -> str:
        return trained_on(Candidate("", "", of, of.data, dataclasses.replace(some, labels=labels), 0))

    every, one = (some.labels + 1) % len(some.classes), some.labels.copy()
    one[0] = every[0]
    assert trained(apart, every).endswith("(19 of these 19 with another class there): they make the error too high")
    assert "(1 of these 19 with another class there): those of the same class make the error too low" in trained(
        apart, one
    )
    assert trained(changed, every).endswith(
        f"{since}: new images usually have a higher error"
    )  # labels may have changed
    assert trained(begun_with(checksum(first.best)), every).endswith("new images usually have a higher error")
    with_other_names = {"classes": ("x", "y", "z"), "run_classes": apart.classes}
    renamed = dataclasses.replace(apart, **with_other_names)
    called = dataclasses.replace(some, classes=renamed.classes)
    seen = trained_on(Candidate("", "", renamed, renamed.data, called, 0))
    assert "at least 19 of 19, as" in seen and "with another class" not in seen
    assert chosen_by(Candidate("", "", dataclasses.replace(best, **with_other_names), best.data, called, 0)) == chosen
    last = dataclasses.replace(best, epochs=3)
    assert chosen_by(Candidate("", "", last, last.data, some, 0)) == ""
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "CHEAP", 99)
        assert told(apart, copy) == ""  # to read so long an index takes longer than the warning is worth
    (table_data / ".train.csv.index.jsonl").unlink()
    assert told(apart, copy) == ""  # to index them anew could take an hour


def test_mirror_images_that_a_network_was_not_trained_on_are_told(
    image_folders, checkpoint, tmp_path, monkeypatch, capfd
):
    state = load_checkpoint(checkpoint)
    state["config"]["data"]["hflip"] = False
    CheckpointFolder(tmp_path).save(state, best=True)
    without, few = tmp_path / "best.pt", tmp_path / "few"
    (few / "class0").mkdir(parents=True)
    picture = shutil.copy(next((image_folders / "val" / "class0").iterdir()), few / "class0")
    line = f"{without} was trained without mirror images .data.hflip false.*: %s takes the centre crop alone"

    def said(command, *words: object) -> str:
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        command()
        return capfd.readouterr().err

    for command, rest in ((main, ["--data", few]), (predict.main, [picture])):
        assert len(re.findall(line % "--crops 1", said(command, without, *rest, "--crops", 10))) == 1
        assert "mirror" not in said(command, without, *rest) + said(command, checkpoint, *rest, "--crops", 10)
    with pytest.warns(UserWarning, match=line % "crops=1"):
        of_ten = api.evaluate(without, few, crops=10)
    assert of_ten.losses == api.evaluate(checkpoint, few, crops=10).losses  # a warning alone


def test_images_and_precision_as_the_command_line_says(image_folders, checkpoint, tmp_path, evaluated):
    words = ["--crop-size", 24, "--resize-size", 28, "--mean", "0.5", "--std", "0.2,0.3,0.4", "--precision", "bf16"]
    evaluated(checkpoint, "--data", image_folders, *words, "--report", tmp_path)
    (result,) = json.loads((tmp_path / "report.json").read_text())["evaluations"]
    assert (result["crop_size"], result["resize_size"], result["precision"]) == (24, 28, "bf16")
    assert result["dense_block"] == "eager"  # as the run has chosen for bf16
    weights = read_weights(checkpoint)
    data = DataConfig(crop_size=24, resize_size=28, mean=(0.5,) * 3, std=(0.2, 0.3, 0.4))
    loader = EvaluationLoader(scan_classes(image_folders / "val"), data, SHARD, batch_size=11, crops=1)
    exact = evaluate(weights.network, loader, ALONE, keep_logits=True).logits
    ours = np.load(tmp_path / f"{result['name']}.npy")
    assert 1e-5 < np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()  # bf16 has 8 bits


def test_intervals_and_comparisons_are_the_textbooks():
    low, high = wilson_interval(10, 50)
    assert (low, high) == pytest.approx((11.244, 33.037), abs=1e-3)  # R's binom.confint(10, 50, methods="wilson")
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(100)
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)  # two tails of the binomial distribution


def test_real_labels_judge_by_any_label_and_pass_over_images_without(tmp_path):
    labels = json.loads(Path(timm.data.__file__).with_name("_info").joinpath("imagenet_real_labels.json").read_text())
    without = next(i for i, right in enumerate(labels) if not right)
    several = [i for i, right in enumerate(labels) if len(right) > 1][:3]
    numbers = [i + 1 for i in (*several, without)]
    answers = [labels[several[0]][0], max(labels[several[1]]) - 1000, labels[several[2]][-1], 7]
    index = dataclasses.replace(
        index_of([(9, 9)] * 4),
        names=tuple(f"n01/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers),
        classes=imagenet_ids(),
    )
    top5 = np.array(answers)[:, None] + np.arange(5)
    zeros = np.zeros(4, np.float32)
    evaluation = Evaluation(Score(4, 0, 0, 0.0), top5, zeros, zeros, None, 0)
    assert real_labels_score(evaluation, index)["images"] == 3
    assert real_labels_score(evaluation, index)["top1_error"] == pytest.approx(100 / 3)
    assert real_labels_score(evaluation, dataclasses.replace(index, classes=("a",) * 1000)) is None


def labelled(images: int, classes: tuple[str, ...], present: int):
    """An index of images of the first `present` classes, which exist nowhere."""
    return dataclasses.replace(index_of([(9, 9)] * images), labels=np.arange(images) % present, classes=classes)


def test_published_errors_stand_beside_networks_of_imagenet():
    weights = Weights("x", torch.nn.Identity(), Config(), imagenet_ids(), None)
    validation = labelled(50_000, imagenet_ids(), 1000)
    assert published_errors(weights, 1, validation, weights.data) == (
        [{"source": "the paper", "top1_error": 25.02, "top5_error": 7.71}], "",
    )  # fmt: skip
    rows, _ = published_errors(weights, 10, validation, weights.data)
    assert rows == [{"source": "the paper", "top1_error": 23.61, "top5_error": 6.66}]
    # With another filter the paper's figure is of something else; with torchvision's it is torchvision's that is not.
    (row,), _ = published_errors(weights, 1, validation, DataConfig(interpolation="pil-bilinear"))
    assert row == {"source": "torchvision's weights", "top1_error": 25.566, "top5_error": 8.028}
    for other in (DataConfig(interpolation="pil-bicubic"), DataConfig(resize_size=288)):
        rows, note = published_errors(weights, 1, validation, other)
        prepared = "torch7-bicubic resize to 256, crop 224 or pil-bilinear resize to 256, crop 224"
        assert rows == [] and note == f"no published error is shown: those of this network are with {prepared}"
    others = dataclasses.replace(weights, classes=("a", "b"))
    assert published_errors(others, 1, labelled(9, ("a", "b"), 2), others.data) == ([], "")


def test_torchvisions_errors_are_those_of_its_package():
    for name, (top1, top5) in TORCHVISION_ON_IMAGENET.items():
        found = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta["_metrics"]["ImageNet-1K"]
        assert (found["acc@1"], found["acc@5"]) == pytest.approx((100 - top1, 100 - top5))


def test_the_papers_errors_stand_beside_no_other_data():
    """A configuration of the paper's on ImageNet, trained on own folders or with another filter."""
    config = load_config(REPOSITORY / "configs" / "densenet169.yaml")
    assert published_errors_hold(config, 1000, (1_281_167, 50_000))
    assert published_errors_hold(load_config(REPOSITORY / "configs" / "fashion-mnist.yaml"), 10, (60_000, 10_000))
    assert not published_errors_hold(config, 10, (900, 100)) and not published_errors_hold(config, 1000, (1000, 50_000))
    prepared = dataclasses.replace(config, data=dataclasses.replace(config.data, interpolation="pil-bilinear"))
    assert not published_errors_hold(prepared, 1000, (1_281_167, 50_000))
    theirs = load_config(REPOSITORY / "configs" / "paddleclas" / "densenet169.yaml")  # whose errors are not the paper's
    assert published_errors_hold(theirs, 1000, (1_281_167, 50_000))
    held_out = dataclasses.replace(theirs, data=dataclasses.replace(theirs.data, holdout=9))
    assert published_errors_hold(held_out, 1000, (1_281_158, 9))
    for images in ((900, 100), (1_281_158, 9), None):
        assert not published_errors_hold(theirs, 1000, images)
        weights = Weights("x", torch.nn.Identity(), theirs, ("a", "b"), 4)
        assert published_errors(weights, 1, labelled(3000, ("a", "b"), 2), weights.data) == ([], "")
    for classes in (("a", "b"), tuple(map(str, range(1000)))):
        weights = Weights("x", torch.nn.Identity(), config, classes, 4)
        assert published_errors(weights, 1, labelled(3000, classes, len(classes)), weights.data) == ([], "")
    for name, (top1, _) in DENSENETS_ON_IMAGENET[1].items():
        assert TOP1_ON_IMAGENET[name] == top1


def test_the_recipe_is_told_of_the_papers_data_alone(tmp_path):
    config = load_config(REPOSITORY / "configs" / "densenet169.yaml", {"optim.lr": 0.2, "optim.nesterov": False})
    run = tmp_path / "run"
    weights = Weights(f"{run}/checkpoints/best.pt", torch.nn.Identity(), config, imagenet_ids(), 4)
    assert re.fullmatch(r"2 of \d\d parts differ from the paper", recipe_line(weights))
    run.mkdir()
    (run / "audit.md").touch()
    assert recipe_line(weights).endswith(f"differ from the paper: {run}/audit.md")
    for change in ({"classes": ("a", "b")}, {"classes": tuple(map(str, range(1000)))}, {"microbatches": None}):
        assert recipe_line(dataclasses.replace(weights, **change)) is None
    statistics, decayed = ((0, (64, 64)),), (10, 10)
    whole = Measured((1_281_167, 50_000), 1000, statistics, 143, 1.0, "0.9", (1e-4,), decayed, skipped_steps=2)
    measured = dataclasses.replace(weights, measured=whole)  # what no configuration says, as the run's audit.md has it
    assert recipe_line(measured).startswith("3 of ") and "steps left out (2; paper 0)" in measured.audit
    assert recipe_line(dataclasses.replace(weights, measured=dataclasses.replace(whole, images=(900, 100)))) is None


@pytest.mark.parametrize(
    ("overrides", "classes", "images", "same"),
    [
        ({}, 1000, (1_281_167, 50_000), True),
        ({"data.holdout": 10_000}, 1000, (1_271_167, 10_000), True),
        ({}, 1000, (1_281_167, 10_000), False),
        ({}, 100, (1_281_167, 50_000), False),
        ({"data.loader": "synthetic"}, 1000, (1_281_167, 50_000), False),
        ({"data.dataset": "cifar10", "model.name": "densenet_bc100_k12"}, 10, (50_000, 10_000), True),
        ({"data.dataset": "fashion-mnist", "model.name": "densenet_bc100_k12"}, 10, (60_000, 10_000), False),
        ({"model.name": "densenet_bc100_k12"}, 10, (900, 100), False),
        ({"model.name": "densenet_bc100_k12"}, 10, None, False),
        ({"model.name": "densenet_bc100_k12", "data.mean": C10.data["mean"]}, 10, None, True),
    ],
)
def test_whose_data_are_the_papers(overrides, classes, images, same):
    assert is_papers_data(load_config(REPOSITORY / "configs" / "densenet121.yaml", overrides), classes, images) == same


IMAGENET = "no published error is shown: those of this network are for 50,000 images of all 1000 classes"


@pytest.mark.parametrize(
    ("dataset", "images", "present", "note"),
    [
        ("imagenet", 50_000, 999, IMAGENET),
        ("imagenet", 7_500, 200, IMAGENET),  # as ImageNet-A
        ("imagenet", 10_000, 1000, IMAGENET),  # as ImageNetV2
        ("svhn", 26_032, 10, ""),
        (
            "svhn",
            10_000,
            10,
            "no published error is shown: those of this network are for 26,032 images of all 10 classes",
        ),
        (
            "svhn",
            26_032,
            9,
            "no published error is shown: those of this network are for 26,032 images of all 10 classes",
        ),
        ("images", 123, 10, ""),
        ("images", 123, 9, "no published error is shown: those of this network are for all 10 classes"),
    ],
)
def test_no_published_error_stands_beside_other_images(dataset, images, present, note):
    classes = imagenet_ids() if dataset == "imagenet" else tuple("abcdefghij")
    tree = {"published": {"source": "someone", "top1": 12.5}, "data": {"dataset": dataset}}
    if dataset == "imagenet":
        tree["data"] = {}
    weights = Weights("x", torch.nn.Identity(), from_dict(tree, "test"), classes, None)
    rows, said = published_errors(weights, 1, labelled(images, classes, present), weights.data)
    assert said == note and bool(rows) == (note == "")


def test_a_published_error_stands_beside_as_many_images_as_its_configuration_says():
    classes = tuple("abcdefghij")
    config = from_dict({"published": {"source": "someone", "top1": 12.5, "images": [50_000, 10_000]}}, "test")
    statistics, decayed = ((0, (64, 64)),), (10, 10)
    measured = Measured((50_000, 10_000), 10, statistics, 64, 1.0, "0.9", (1e-4,), decayed)
    weights = Weights("x", torch.nn.Identity(), config, classes, 4, measured=measured)
    rows, note = published_errors(weights, 1, labelled(10_000, classes, 10), config.data)
    assert rows == [{"source": "someone", "top1_error": 12.5, "top5_error": None}] and note == ""
    rows, note = published_errors(weights, 1, labelled(2_000, classes, 10), config.data)
    assert rows == [] and note.endswith("those of this network are for 10,000 images of all 10 classes")


def test_classes_are_matched_by_letters_and_digits(image_folders):
    index = scan_classes(image_folders / "val")
    assert index.with_classes(("Class-2", "CLASS 0", "class1")).labels.tolist() == [(k + 1) % 3 for k in index.labels]
    with pytest.raises(UserError, match="the class 'class0' is none of the network's"):
        index.with_classes(("class-0", "Class0", "class1", "class2"))  # which of the two?
    with pytest.raises(UserError, match="which are numbers .*--classes FILE"):
        index.with_classes(("0", "1", "2"))
    twins = dataclasses.replace(index, classes=("a b", "a_b", "c"))
    with pytest.raises(UserError, match="the class 'a b' is none of the network's"):
        twins.with_classes(("ab", "c", "d"))
