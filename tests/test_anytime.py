"""Early exits in use: budgets against a loop over images by the paper's description, and the commands."""

import dataclasses
import json
import math
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import index_of, small_config, with_random_norms, write_class_folders

from pipeline.budget import BUDGETS, answers_of, classify, leaves_at, shares, thresholds
from pipeline.checkpoint import CheckpointFolder, load_checkpoint
from pipeline.class_names import imagenet_ids
from pipeline.config import DataConfig, ModelConfig
from pipeline.data.dataset import fingerprint_of, open_datasets
from pipeline.data.loader import EvaluationLoader, Shard
from pipeline.distributed import init_distributed
from pipeline.errors import UserError
from pipeline.external_weights import _name_of_msdnet
from pipeline.models import create_model
from pipeline.models.early_exits import OneExit
from pipeline.models.folding import fold_norms
from pipeline.weights import Weights, read_weights, write_safetensors
from pipeline.words import counted
from tools.anytime import compare_with_others, published_on_imagenet, read_other
from tools.anytime import main as anytime
from tools.convert import main as convert
from tools.evaluate import main as evaluate
from tools.export import main as export
from tools.predict import main as predict
from tools.support.anytime_report import comparisons, result_to_text
from tools.support.facts import exit_costs, multiply_accumulates, network_without_weights
from tools.support.speed import percent_apart, seconds_by_round

pytestmark = pytest.mark.slow  # for the most part

NAME, CLASSES = "msdnet_cifar_budget_3", ("class0", "class1", "class2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 training images, of which a run holds 9 out, and 12 for validation."""
    root = tmp_path_factory.mktemp("anytime")
    write_class_folders(root / "train", 3, 24, size=(20, 22))
    write_class_folders(root / "val", 3, 12, size=(20, 22), seed=1000)
    return root


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    torch.manual_seed(0)
    network = with_random_norms(create_model(NAME, num_classes=3))
    section = {"dir": str(data), "crop_size": 16, "resize_size": 18, "loader": "reference", "holdout": 9}
    config = small_config("unused", model={"name": NAME}, data=section)
    folder = CheckpointFolder(tmp_path_factory.mktemp("checkpoint"))
    state = {"model": network.state_dict(), "config": dataclasses.asdict(config), "classes": list(CLASSES)}
    conditions = {"fingerprint": fingerprint_of(*open_datasets(config.data, None, progress=False)), "ranks": 1}
    folder.save({**state, "conditions": conditions}, best=True)
    return folder.best


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process, with few budgets and one measurement; return what it prints.

    It says at each step how far it is; `progress` receives those lines.
    """
    monkeypatch.setattr("tools.anytime.BUDGETS", (0.3, 1.0, 1.7))
    monkeypatch.setattr("tools.anytime.ROUNDS", 1)

    for name in ("FIRST", "EVERY"):
        monkeypatch.setattr(f"tools.support.progress.{name}", 0.0)

    def run(main, *words: object, progress: list[str] | None = None) -> str:
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        capsys.readouterr()
        main()
        said = capsys.readouterr()
        if progress is not None:
            progress += said.err.splitlines()
        return said.out

    return run


def by_loops(held_out: np.ndarray, test: np.ndarray, q: float) -> tuple[list, list]:
    """Thresholds and exits, image by image, by the paper's description."""
    exits, images = held_out.shape
    total = sum(q ** (k + 1) for k in range(exits))
    left, limits = set(range(images)), []
    for k in range(exits - 1):
        wanted = math.floor(images * q ** (k + 1) / total)
        ranked = sorted((held_out[k, i] for i in left), reverse=True)
        limit = ranked[wanted - 1] if wanted else math.inf
        limits.append(limit)
        left -= {i for i in left if held_out[k, i] >= limit}
    limits.append(0.0)
    return limits, [next(k for k in range(exits) if test[k, i] >= limits[k]) for i in range(test.shape[1])]


def test_thresholds_and_exits_are_those_of_a_loop_over_images():
    generator = np.random.default_rng(0)
    held_out, test = generator.random((4, 101)).astype(np.float32), generator.random((4, 53)).astype(np.float32)
    assert len(BUDGETS) == 39 and BUDGETS[0] == 0.05 and BUDGETS[-1] == 1.95
    for q in BUDGETS:
        limits, at = by_loops(held_out, test, q)
        found = thresholds(held_out, shares(q, 4))
        assert found.tolist() == pytest.approx(limits, rel=1e-7)
        assert leaves_at(test, found).tolist() == at
    # On the images that the thresholds are chosen on, the wanted share leaves at each exit.
    at = leaves_at(held_out, thresholds(held_out, shares(1.3, 4)))
    wanted = shares(1.3, 4)
    assert np.bincount(at, minlength=4)[:3].tolist() == np.floor(101 * wanted[:3]).tolist()


def test_equal_confidences_leave_together_and_the_rest_need_not_suffice():
    held_out = np.array([[0.9, 0.9, 0.9, 0.5], [0.8, 0.7, 0.6, 0.4], [0.1, 0.2, 0.3, 0.4]])
    limits = thresholds(held_out, np.array([0.25, 0.5, 0.25]))
    assert limits.tolist() == [0.9, 0.4, 0]
    assert leaves_at(held_out, limits).tolist() == [0, 0, 0, 1]
    assert thresholds(held_out, np.array([0.1, 0.1, 0.8])).tolist() == [math.inf, math.inf, 0]


@torch.inference_mode()
def of_each_exit(network, images) -> torch.Tensor:
    """(3, n, classes): what each of three exits says of all images."""
    return torch.stack([output.float().softmax(1) for output in network(images)])


def test_a_batch_shrinks_at_each_exit_and_answers_as_if_it_did_not():
    torch.manual_seed(1)
    network = with_random_norms(create_model(NAME, num_classes=5)).double().eval()
    images = torch.randn(12, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    probabilities = of_each_exit(network, images)
    confidence = probabilities.amax(2).numpy()
    limits = thresholds(confidence, shares(1.0, 3))
    at = leaves_at(confidence, limits)
    assert np.bincount(at).tolist() == [4, 4, 4]
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, given, maps: seen.append([len(x) for x in maps]))
    answered, left = classify(network, [images], limits)
    assert seen == [[12] * 3, [8] * 2, [4]]  # what has left is computed no further
    assert left.tolist() == at.tolist()
    torch.testing.assert_close(answered, probabilities[at, torch.arange(12)].float(), rtol=1e-6, atol=1e-7)
    assert len(classify(network, [images], np.zeros(3))[0]) == 12 and len(seen) == 4  # all leave at the first exit


def test_images_that_stay_wait_for_others_and_are_answered_as_by_themselves():
    torch.manual_seed(2)
    network = with_random_norms(create_model(NAME, num_classes=5)).double().eval()
    images = torch.randn(23, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    limits = thresholds(of_each_exit(network, images).amax(2).numpy(), shares(1.0, 3))
    one_by_one = [classify(network, [image], limits) for image in images.split(1)]
    seen = []
    for k, block in enumerate(network.blocks):
        block.register_forward_hook(lambda module, given, maps, k=k: seen.append((k, len(maps[0]))))
    answered, left = classify(network, images.split(4), limits, together=5)
    assert left.tolist() == [int(at) for _, at in one_by_one] and len(set(left.tolist())) == 3
    torch.testing.assert_close(answered, torch.cat([found for found, _ in one_by_one]), rtol=1e-6, atol=1e-7)
    for k in (1, 2):
        sizes = [n for block, n in seen if block == k]
        assert min(sizes[:-1]) >= 5 and sum(sizes) == int((left >= k).sum())  # the last ones go on at the end


def test_folded_norms_answer_the_same():
    torch.manual_seed(0)
    network = with_random_norms(create_model(NAME, num_classes=5)).double().eval()
    folded, images = fold_norms(network), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert not [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for a, b in zip(network(images), folded(images), strict=True):
            assert (a - b).abs().max() <= 1e-12 * a.abs().max()
        for k in range(3):
            assert torch.equal(network.first_exits(k + 1)(images)[k], OneExit(network, k + 1)(images))


def test_times_of_rounds_and_how_far_they_lie_apart(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)) ** 2)
    taken = seconds_by_round({"a": list, "b": list}, rounds=2)
    assert taken == {"a": [5.0, 13.0], "b": [9.0, 17.0]}  # after a round that does not count
    assert percent_apart(taken.values()) == pytest.approx(50 * (13 / 5 + 17 / 9 - 2))
    assert percent_apart([[2.0, 3.0, 2.5], [1.0, 1.0, 1.0], [1.0, 4.0, 2.0]]) == pytest.approx(50)


def test_the_command_tells_errors_costs_and_times(data, checkpoint, run, tmp_path):
    other = f"densenet_bc10_k4={50.0}"
    said = run(anytime, checkpoint, "--data", data, "--loader", "reference", "--timed-images", 1, "--batch-size", 5,
               "--report", tmp_path, "--beside", other, "densenet_bc10_k2=0", progress=(progress := []))  # fmt: skip
    assert [line.rpartition(", about ")[0] for line in progress[:3]] == [
        "test images: 1 of 3 batches", "test images: 2 of 3 batches", "images for the thresholds: 1 of 2 batches",
    ]  # fmt: skip
    assert all(re.fullmatch(r"times of .*: \d+ of 26 measurements, about .* left", line) for line in progress[3:])
    assert len(progress) == 3 + 25  # of the last part nothing is left
    report = json.loads((tmp_path / "report.json").read_text())
    for spread, far in ((19.4, False), (33.3, True)):  # of the times, in percent
        text = result_to_text(report | {"time_spread": spread})
        assert ("\ntimes of the same work lie 33 % apart (a busy machine, or few" in text) == far
    weights = read_weights(checkpoint)
    parts = open_datasets(weights.config.data, tmp_path, progress=False)
    test = open_datasets(dataclasses.replace(weights.config.data, holdout=0), tmp_path, progress=False)[1]
    shard = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=1)
    own, held_out = (
        answers_of(weights.network, EvaluationLoader(index, weights.config.data, shard, batch_size=4, crops=1))
        for index in (test, parts[1])
    )
    assert report["images"] == 12 and report["held_out"]["images"] == 9 == len(parts[1])
    assert "9 held-out images for the thresholds" in said
    work = [row["multiply_accumulates"] for row in report["exits"]]
    for k, row in enumerate(report["exits"]):
        assert row["top1_wrong"] == (own[0].classes[k] != test.labels).sum()
        assert row["summed_top1_error"] == pytest.approx(100 * (own[1].classes[k] != test.labels).mean())
        assert row["images_per_second"] > 0 < row["ms_alone"]
    assert f"time: 1 image, cpu, {counted(torch.get_num_threads(), 'thread')}, median of 1 round, 0 % apart\n" in said
    assert [row["q"] for row in report["budgets"]] == [0.3, 1.0, 1.7]
    for row in report["budgets"]:
        for figures, test_answers, chosen in ((row, own[0], held_out[0]), (row["summed"], own[1], held_out[1])):
            limits, at = by_loops(chosen.confidence, test_answers.confidence, row["q"])
            assert [np.inf if t is None else t for t in figures["thresholds"]] == pytest.approx(limits, rel=1e-5)
            assert figures["shares"] == pytest.approx([at.count(k) / 12 for k in range(3)])
            assert figures["multiply_accumulates"] == pytest.approx(np.mean([work[k] for k in at]))
            wrong = sum(test_answers.classes[k, i] != test.labels[i] for i, k in enumerate(at))
            assert figures["top1_wrong"] == wrong
    easy, hard = report["beside"]
    assert (easy["name"], easy["top1_error"], easy["measured"]) == ("densenet_bc10_k4", 50.0, False)
    as_good = [b["multiply_accumulates"] for b in report["budgets"] if b["top1_error"] <= 50]
    assert (easy["as_good"]["multiply_accumulates"] == min(as_good)) if as_good else easy["as_good"] is None
    assert hard["as_good"] is None and "densenet_bc10_k2: no budget reaches its error of 0.00 %" in said
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert all(
            title in text for title in ("Answers at any time", "Budgets", "Other networks", "Easy and hard images")
        )
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("error.png", "easy-and-hard.png"))
    _, at = by_loops(held_out[0].confidence, own[0].confidence, 1.0)
    right = [own[0].classes[k, i] == test.labels[i] for i, k in enumerate(at)]
    shown = [sum(r and k == exit for r, k in zip(right, at, strict=True)) for exit in (0, max(at))]
    assert text.count("<figcaption>") == sum(shown)  # pictures that a narrow page wraps, each with its class

    # The same budget classifies files, at its dearest and at its cheapest.
    dearest = max(report["budgets"], key=lambda b: b["multiply_accumulates"])
    words = ("--loader", "reference", "--top", 1, "--json", tmp_path / "answers.json")
    run(predict, checkpoint, data / "val", *words, "--budget", 1000, "--thresholds", tmp_path)
    answered = json.loads((tmp_path / "answers.json").read_text())
    at = leaves_at(own[0].confidence, np.array([np.inf if t is None else t for t in dearest["thresholds"]]))
    expected = {test.location(i): own[0].confidence[at[i], i] for i in range(12)}
    assert len(answered) == 12
    for answer in answered:
        assert answer["answers"][0]["probability"] == pytest.approx(expected[answer["file"]], rel=1e-4)
    (tmp_path / "other.json").write_text(json.dumps({**report, "model": "msdnet_imagenet_4"}))
    with pytest.raises(UserError, match="other.json is of msdnet_imagenet_4 at .* and what answers is"):
        run(predict, checkpoint, data / "val", *words, "--budget", 1000, "--thresholds", tmp_path / "other.json")
    run(predict, checkpoint, data / "val", *words, "--exit", 2)
    for answer in json.loads((tmp_path / "answers.json").read_text()):
        i = next(i for i in range(12) if test.location(i) == answer["file"])
        assert answer["answers"][0]["probability"] == pytest.approx(own[0].confidence[1, i], rel=1e-4)
    said = run(evaluate, checkpoint, "--data", data, "--dataset", "images", "--loader", "reference", "--batch-size", 5,
               progress=(progress := []))  # fmt: skip
    assert len(progress) == 2 and progress[0].startswith("best: 1 of 3 batches, about")
    assert f"; {report['exits'][-1]['top1_wrong']} of 12 wrong" in said  # the last exit's errors


def test_without_held_out_images_there_are_no_budgets_unless_others_are_given(data, checkpoint, run, tmp_path):
    weights = read_weights(checkpoint)
    plain = dataclasses.replace(weights, config=dataclasses.replace(
        weights.config, data=dataclasses.replace(weights.config.data, holdout=0)
    ))  # fmt: skip
    write_safetensors(plain, tmp_path / "w.safetensors")
    words = (tmp_path / "w.safetensors", "--data", data, "--loader", "reference", "--timed-images", 1)
    said = run(anytime, *words)
    assert "no budgets: the run held no training images out: give --thresholds DIR" in said
    warned = []
    said = run(anytime, *words, "--thresholds", data / "val", progress=warned)
    assert f"12 images of {data / 'val'} for the thresholds" in said
    (line,) = [line for line in warned if line.startswith("warning: ")]
    assert line.endswith("of --thresholds are those of --data: the budgets' errors are too low for new images")
    run(anytime, *words, "--thresholds", data / "train", progress=(warned := []))
    (line,) = [line for line in warned if line.startswith("warning: ")]
    assert line.startswith(f"warning: --thresholds: the network was trained on the images in {data / 'train'}: ")


def test_held_out_images_are_the_runs_own_whatever_is_tested(data, checkpoint, run, tmp_path):
    write_class_folders(tmp_path / "others", 3, 7, size=(20, 22), seed=5)
    words = ("--loader", "reference", "--timed-images", 3)
    run(anytime, checkpoint, "--data", tmp_path / "others", *words, "--report", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["images"], report["held_out"]["images"], report["batch_size"]) == (7, 9, 3)
    assert report["trained_on"] == ""
    warned = []
    run(anytime, checkpoint, "--data", data / "train", *words, "--report", tmp_path / "report", progress=warned)
    (line,) = [line for line in warned if line.startswith("warning: ")]
    assert f"was trained on the images in {data / 'train'}" in line and line.endswith("usually have a higher error")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["trained_on"] in line and report["trained_on"] in (tmp_path / "report" / "report.html").read_text()
    moved = tmp_path / "moved"
    data.rename(moved)  # of a run whose images have moved, --data may be the new place
    try:
        assert "9 held-out images for the thresholds" in run(anytime, checkpoint, "--data", moved, *words)
        with pytest.raises(UserError) as refused:
            run(anytime, checkpoint, "--data", tmp_path / "others", *words)
        assert f"held out are not in {data} nor in {tmp_path / 'others'} (" in str(refused.value)
        assert str(refused.value).endswith("give images for the thresholds as --thresholds DIR")
    finally:
        moved.rename(data)


def test_another_msdnet_is_timed_with_folded_norms_as_the_first_is(data, checkpoint, tmp_path):
    own, options = read_weights(checkpoint).config.data, Namespace(weights="a", loader="reference", batch_size=5)
    test = open_datasets(dataclasses.replace(own, holdout=0), tmp_path, progress=False)[1]
    with init_distributed("cpu") as world:
        for item in (str(checkpoint), f"{NAME}=50"):
            other = read_other(item, "b", own, test, world, options)
            assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in other.network.modules()), item


def test_gray_images_are_counted_with_one_channel(data, run, tmp_path):
    torch.manual_seed(0)
    network = with_random_norms(create_model(NAME, num_classes=3, in_channels=1)).eval()
    section = {"dir": str(data), "crop_size": 16, "resize_size": 18, "loader": "reference", "channels": 1}
    config = small_config("unused", model={"name": NAME}, data=section)
    file = tmp_path / "gray.v1.safetensors"
    write_safetensors(Weights(str(file), network, config, CLASSES, 1), file)
    words = ("--data", data, "--thresholds", data / "val", "--loader", "reference", "--timed-images", 1)
    run(anytime, file, *words, "--report", tmp_path, "--beside", "densenet_bc10_k4=50")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in network.parameters()) and report["name"] == "gray.v1"
    costs = [row["multiply_accumulates"] for row in report["exits"]]
    whole = multiply_accumulates(network_without_weights(config.model, 3, 1), 16, 1)
    assert costs == [cost.multiply_accumulates for cost in exit_costs(network, 16, 1)] and costs[-1] == whole
    beside = network_without_weights(ModelConfig(name="densenet_bc10_k4"), 3, 1)
    assert report["beside"][0]["multiply_accumulates"] == multiply_accumulates(beside, 16, 1)


def test_the_papers_errors_stand_beside_all_of_imagenets_validation_images_alone(run, tmp_path):
    def index(images: int, present: int, classes: tuple[str, ...] = ()):
        classes = classes or imagenet_ids()
        return dataclasses.replace(index_of([(9, 9)] * images), labels=np.arange(images) % present, classes=classes)

    for test, data in (
        (index(10_000, 1000), DataConfig()),  # as ImageNetV2
        (index(50_000, 999), DataConfig()),
        (index(50_000, 1000, tuple(map(str, range(1000)))), DataConfig()),
        (index(50_000, 1000), DataConfig(crop_size=192)),
        (index(50_000, 1000), DataConfig(interpolation="pil-bilinear")),
    ):
        assert published_on_imagenet(test, data) == []
    rows = {row["name"]: row["top1_error"] for row in published_on_imagenet(index(50_000, 1000), DataConfig())}
    assert (rows["densenet121"], rows["resnet50"]) == (25.02, 24.01)

    # A network of ImageNet's classes on images of three of them, as Imagenette.
    write_class_folders(tmp_path / "data", 3, 6, size=(20, 22))
    for folder, name in zip(sorted((tmp_path / "data").iterdir()), imagenet_ids(), strict=False):
        folder.rename(folder.with_name(name))
    network = with_random_norms(create_model(NAME, num_classes=1000)).eval()
    data = {"dir": str(tmp_path / "data"), "crop_size": 16, "resize_size": 18, "loader": "reference"}
    config = small_config("unused", model={"name": NAME}, data=data)
    write_safetensors(Weights("here", network, config, imagenet_ids(), 1), tmp_path / "w.safetensors")
    words = ("--data", tmp_path / "data", "--loader", "reference", "--timed-images", 1, "--report", tmp_path)
    assert "densenet121" not in run(anytime, tmp_path / "w.safetensors", *words)
    assert json.loads((tmp_path / "report.json").read_text())["beside"] == []


def test_a_budget_with_as_many_errors_is_as_good():
    """However the two percentages were rounded."""
    odd = next(n for n in range(10_000) if 100 * n / 10_000 > 100 * (1 - (10_000 - n) / 10_000))
    budget = {"q": 1.0, "top1_error": 100 * odd / 10_000, "multiply_accumulates": 5.0, "images_per_second": 2.0}
    other = {"top1_error": 100 * (1 - (10_000 - odd) / 10_000), "multiply_accumulates": 10, "images_per_second": None}
    compare_with_others({"budgets": [budget], "beside": [other]})
    assert other["as_good"]["work_ratio"] == 2


@pytest.mark.parametrize(
    ("spread", "said"), [(19.9, "1.50 times the images/s"), (87.4, "(of times that lie 87 % apart)")]
)
def test_a_speed_that_chance_may_have_made_says_so_where_it_stands(spread, said):
    best = {"q": 1.0, "top1_error": 5.0, "work_ratio": 2.0, "speed_ratio": 1.5}
    row = {"name": "other", "top1_error": 5.0, "as_good": best}
    (line,) = comparisons({"beside": [row], "budgets": [best], "time_spread": spread})
    assert line.endswith(said)


def test_an_exit_is_exported(checkpoint, run, tmp_path):
    assert "differ from PyTorch's by" in run(export, checkpoint, tmp_path / "first.pt2", "--exit", 1)
    network, images = read_weights(checkpoint).network, torch.randn(4, 3, 16, 16)
    loaded = torch.export.load(tmp_path / "first.pt2").module()
    torch.testing.assert_close(loaded(images), network(images)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["msdnet_cifar_2", "msdnet_cifar_budget_3"])
def test_a_checkpoint_of_the_port_is_recognised_by_its_names(run, tmp_path, name):
    """It was saved by nn.DataParallel, beside other things, as kalviny/MSDNet-PyTorch's main.py does."""
    torch.manual_seed(0)
    network = with_random_norms(create_model(name, num_classes=100))
    state = {f"module.{entry}": tensor for entry, tensor in network.state_dict().items()}
    torch.save({"epoch": 1, "arch": "msdnet", "best_prec1": 1.0, "state_dict": state}, tmp_path / "port.pth.tar")
    assert run(convert, tmp_path / "port.pth.tar", tmp_path / "ours.safetensors").startswith(f"{name}, ")
    read = read_weights(tmp_path / "ours.safetensors")
    assert read.config.data.mean == (0.5071, 0.4867, 0.4408)  # CIFAR-100's
    for entry, tensor in read.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[entry]), entry


def test_the_networks_for_imagenet_are_recognised_too():
    with torch.device("meta"):
        names = list(create_model("msdnet_imagenet_2").state_dict())
    assert _name_of_msdnet(names) == "msdnet_imagenet_2" and _name_of_msdnet(["features.conv0.weight"]) is None


def test_what_cannot_be_is_refused_in_one_line(data, checkpoint, user_error, tmp_path):
    densenet = create_model("densenet_bc22_k8", num_classes=3)
    folder = CheckpointFolder(tmp_path)
    config = dataclasses.asdict(small_config("unused"))
    folder.save({"model": densenet.state_dict(), "config": config, "classes": list(CLASSES)}, best=True)
    state = load_checkpoint(checkpoint)
    state["config"]["data"]["exif_orientation"] = True
    (tmp_path / "turned").mkdir()
    CheckpointFolder(tmp_path / "turned").save(state, best=True)
    turned = tmp_path / "turned" / "best.pt"
    (tmp_path / "report.json").write_text(
        json.dumps({"budgets": [{"multiply_accumulates": 5e6, "thresholds": [0, 0]}]})
    )
    report = ("--thresholds", tmp_path / "report.json")
    for main, words, expected in (
        (anytime, (folder.best, "--data", data), "holds a densenet_bc22_k8, which has one exit: give an MSDNet's"),
        (anytime, (checkpoint, "--data", data, "--beside", "densenet121=x"), "'x' is no error in percent"),
        (anytime, (checkpoint, "--data", data, "--beside", turned), "another data.exif_orientation or data.depth: evaluate"),
        (predict, (checkpoint, data, "--exit", 4), "has 3 exits: choose 1 to 3"),
        (predict, (folder.best, data, "--exit", 2), "has one output: leave it out"),
        (predict, (checkpoint, data, "--budget", 5), "--budget MILLION and --thresholds DIR go together"),
        (predict, (checkpoint, data, "--budget", 5, *report), "is of 2 exits, "),
        (predict, (checkpoint, data, "--budget", 4, *report), "--budget 4: the least of "),
        (predict, (folder.best, data, "--budget", 5, *report), "--budget: .* has one exit"),
        (predict, (checkpoint, data, "--budget", 5, "--thresholds", checkpoint), "holds no budgets: give the report.json"),
    ):  # fmt: skip
        assert re.search(expected, user_error(main, *words))
