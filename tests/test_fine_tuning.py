"""Runs that begin with given weights: what they take from them, what does not train, how fast what does, and resuming."""

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import REPOSITORY, run_module, small_config, with_random_norms, write_class_folders
from labelled_images import write_labelled_images
from safetensors.torch import load_file, save_file
from test_trainer import assert_equal_weights, comparable_records, last_state, records, weights
from torch import nn
from training_hooks import InterruptAfter, InterruptionError

from pipeline import api, start, trainer
from pipeline.config import OptimConfig
from pipeline.config_file import load_config, load_stored_config, to_yaml
from pipeline.distributed import init_distributed
from pipeline.errors import UserError
from pipeline.metrics import LabelScore
from pipeline.models import create_model
from pipeline.models.parts import classifier_of, freeze, parts_of
from pipeline.optim import create_optimizer, load_state, rates_of_parts
from pipeline.report import summary, warnings_of
from pipeline.run import Run
from pipeline.weights import read_weights, write_safetensors, write_torch
from tools import convert

pytestmark = pytest.mark.slow  # for the most part

MODEL = "densenet_bc22_k8"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A state dictionary of the small network with 5 outputs, as others save one, under a wrapper's names."""
    torch.manual_seed(7)
    network = with_random_norms(create_model(MODEL, 5))
    path = tmp_path_factory.mktemp("source") / "weights.pth"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()}}, path)
    return path


def state_of(source: Path) -> dict[str, torch.Tensor]:
    found = torch.load(source)["state_dict"]
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def run_of(config, **_):
    with init_distributed("cpu") as world:
        found = start.find_start(config)
        return Run(found.config, world, found)


def test_all_but_a_classifier_of_another_size_is_taken_and_said(source, tmp_path):
    config = small_config(tmp_path, model={"weights": str(source)})
    run, given = run_of(config), state_of(source)
    state = run.network.state_dict()
    for name, tensor in given.items():
        if not name.startswith("classifier."):
            assert torch.equal(state[name], tensor), name
    drawn = run_of(small_config(tmp_path)).network.state_dict()
    assert torch.equal(state["classifier.weight"], drawn["classifier.weight"])
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert run.config.model.weights_sha256 == digest
    said = run.description()
    assert f"begun with {source} (SHA-256 {digest})" in said and "drawn anew: 5 outputs there, 3 here" in said


def test_a_classifier_is_taken_only_if_its_classes_are_known_to_be_the_same(source, tmp_path, monkeypatch):
    """The file has five outputs, and so has the run: what its outputs mean the file does not say, once converted it does."""
    five = {"synthetic_classes": 5}
    unknown = run_of(small_config(tmp_path / "a", model={"weights": str(source)}, data=five))
    assert "classifier drawn anew: its classes are not known" in unknown.description()
    drawn = run_of(small_config(tmp_path / "b", data=five)).network.state_dict()
    assert torch.equal(unknown.network.state_dict()["classifier.weight"], drawn["classifier.weight"])

    for swapped, words in ((False, "classifier taken from them"), (True, "classifier drawn anew: other classes there")):
        names = list(unknown.conditions.classes)
        names[:2] = names[1::-1] if swapped else names[:2]
        named, file = tmp_path / f"{swapped}.safetensors", tmp_path / "names.txt"
        file.write_text("\n".join(names))
        monkeypatch.setattr("sys.argv", ["convert", str(source), str(named), "--model", MODEL, "--classes", str(file)])
        convert.main()
        run = run_of(small_config(tmp_path / f"{swapped}", model={"weights": str(named)}, data=five))
        assert words in run.description()
        same = torch.equal(run.network.state_dict()["classifier.weight"], state_of(source)["classifier.weight"])
        assert same != swapped


def test_a_classifier_of_other_classes_is_drawn_anew_though_its_size_is_right(tmp_path):
    shipped = REPOSITORY / "tools" / "weights" / "fashion-mnist.safetensors"
    write_class_folders(tmp_path / "train", 10, 20, size=(20, 20))
    data = {"dir": str(tmp_path), "loader": "reference", "holdout": 5, "from_weights": ["mean", "std"]}
    run = run_of(
        small_config(tmp_path / "run", model={"name": "densenet_bc100_k12", "weights": str(shipped)}, data=data)
    )
    assert "classifier drawn anew: other classes there, as 'T-shirt/top'" in run.description()
    assert run.config.data.mean == read_weights(shipped).config.data.mean != (0.485, 0.456, 0.406)


def test_weights_that_have_trained_on_the_held_out_images_are_warned_of(tmp_path):
    for split in ("train", "val"):
        write_class_folders(tmp_path / split, 3, 8, size=(20, 20))

    def config_of(name: str, weights: str | None = None, **data):
        data = {"dir": str(tmp_path), "loader": "reference", **data}
        return small_config(tmp_path / name, model={"weights": weights}, data=data, optim={"epochs": 1})

    def doubts(weights: str, **data) -> list[str]:
        return [line for line in warnings_of(run_of(config_of("next", weights, **data)), None) if "held out" in line]

    trainer.fit(config_of("all"))
    trainer.fit(config_of("part", holdout=5))
    (line,) = doubts(str(tmp_path / "all"), holdout=5)
    assert line.startswith(f"the weights {tmp_path / 'all'} have trained on 5 of the 5 images that are held out: ")
    kept = tmp_path / "all.safetensors"
    write_safetensors(read_weights(tmp_path / "all"), kept)
    assert doubts(str(kept), holdout=4)
    assert not doubts(str(tmp_path / "part"), holdout=5) and not doubts(str(tmp_path / "all"))
    assert not doubts(str(tmp_path / "part"), holdout=3)
    (line,) = doubts(str(tmp_path / "part"), holdout=7)
    assert "have trained on 2 of the 7 images that are held out" in line


def test_a_run_that_draws_the_same_crops_again_as_the_one_its_weights_are_of_is_warned_of(tmp_path):
    for split in ("train", "val", "test"):
        write_class_folders(tmp_path / split, 3, 8, size=(20, 20), seed=len(split))

    def config_of(name: str, weights: str | None = None, seed: int = 1, **data):
        data = {"dir": str(tmp_path), "loader": "reference", **data}
        return small_config(tmp_path / name, seed=seed, model={"weights": weights}, data=data, optim={"epochs": 1})

    def doubts(weights: Path, **options) -> list[str]:
        return [
            line for line in warnings_of(run_of(config_of("next", str(weights), **options)), None) if "seed" in line
        ]

    trainer.fit(config_of("first"))
    weights = tmp_path / "first.safetensors"
    write_safetensors(read_weights(tmp_path / "first"), weights)
    for options in ({}, {"val": "test"}):  # the validation images do not matter
        (line,) = doubts(weights, **options)
        assert line.startswith(f"the weights {weights} are of a run on these training images with the same seed, 1: ")
    assert not doubts(weights, seed=2) and not doubts(weights, holdout=4) and not doubts(weights, train="test")


def test_what_is_assumed_of_weights_is_warned_of_and_not_called_their_sources(source, tmp_path, monkeypatch):
    fields = {"from_weights": ["crop_size", "resize_size", "mean", "std"]}
    config = small_config(tmp_path / "a", model={"weights": str(source)}, data=fields)
    run = run_of(config)
    assert run.config.data.crop_size == 32 and "taken over from their source" not in run.description()
    (said,) = (line for line in warnings_of(run, None) if "ASSUMED" in line)
    assert said.startswith(f"{source} does not say how its images are prepared. CIFAR's preparation is ASSUMED: ")
    assert "--data.resize_size 32 --data.crop_size 32 --data.mean 0.4914,0.4824,0.4467 --data.std 0.2471," in said
    assert "interpolation" not in said  # that is the configuration's own

    named = tmp_path / "named.pth"
    flags = ["--crop-size", "24", "--mean", "0.5", "--std", "0.2", "--interpolation", "pil-bicubic"]
    monkeypatch.setattr("sys.argv", ["convert", str(source), str(named), "--model", MODEL, *flags])
    convert.main()
    run = run_of(small_config(tmp_path / "b", model={"weights": str(named)}, data=fields))
    expected = "taken over from their source: crop_size 24, resize_size 24, mean 0.5,0.5,0.5, std 0.2,0.2,0.2"
    assert expected in run.description() and not [line for line in warnings_of(run, None) if "ASSUMED" in line]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_of_another_network_name_it(tmp_path, suffix):
    """By what the file says, or by its tensors."""
    shipped = REPOSITORY / "tools" / "weights" / "fashion-mnist.safetensors"
    torch.save(load_file(shipped), tmp_path / "bare.pth")
    file = shipped if suffix == "safetensors" else tmp_path / "bare.pth"
    expected = "another architecture: .*: they are of densenet_bc100_k12: give --model.name densenet_bc100_k12$"
    with pytest.raises(UserError, match=expected):
        run_of(small_config(tmp_path / "run", model={"name": "densenet121", "weights": str(file)}))


def test_a_double_correction_for_rare_classes_is_warned_of(tmp_path):
    for class_weights, sampling, warned in (
        ("balanced", "balanced", 1),
        ("balanced", "shuffle", 0),
        (None, "balanced", 0),
    ):
        config = small_config(tmp_path, optim={"class_weights": class_weights}, data={"sampling": sampling})
        lines = [line for line in warnings_of(run_of(config), None) if "correct for rare classes twice" in line]
        assert len(lines) == warned, (class_weights, sampling)


def test_a_warm_up_that_takes_the_whole_run_is_warned_of(tmp_path):
    """As that of a recipe for many epochs does in a short run."""
    for epochs, warned in ((2, 1), (5, 1), (6, 0)):
        config = small_config(tmp_path, optim={"epochs": epochs, "warmup_epochs": 5})
        lines = [line for line in warnings_of(run_of(config), None) if "never falls" in line]
        assert len(lines) == warned, epochs


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("features.norm5.bias"), "1 of the network's [0-9]+ tensors is not there"),
        (lambda state: state.update(extra=torch.zeros(3)), "1 is left over, as 'extra'"),
        (lambda state: state.update({"features.conv0.weight": torch.zeros(16, 2, 3, 3)}), "has another shape"),
        (lambda state: state.pop("classifier.weight"), "no classifier"),
    ],
)
def test_all_else_must_fit(source, tmp_path, change, expected):
    state = state_of(source)
    change(state)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=expected):
        trainer.fit(small_config(tmp_path / "run", model={"weights": str(tmp_path / "odd.pth")}))
    assert not [*(tmp_path / "run").rglob("*.pt")]


def test_a_missing_file_and_another_checksum_are_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"cannot read the weights .*nowhere\.pth: No such file"):
        run_of(small_config(tmp_path, model={"weights": str(tmp_path / "nowhere.pth")}))
    with pytest.raises(UserError, match=r"has the SHA-256 [0-9a-f]{64}, and model\.weights_sha256 is abc"):
        run_of(small_config(tmp_path, model={"weights": str(source), "weights_sha256": "abc"}))


def cached(folder: Path, monkeypatch, name: str, network: nn.Module) -> Path:
    """timm's cache as huggingface_hub lays it out, with weights of this name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    repository = folder / f"models--timm--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(network.state_dict(), snapshot / "model.safetensors", metadata={"format": "pt"})
    return snapshot / "model.safetensors"


def test_weights_of_timms_cache_bring_their_image_size_and_normalisation(tmp_path, monkeypatch):
    name = "test_resnet.r160_in1k"
    network = with_random_norms(timm.create_model("test_resnet"))
    file = cached(tmp_path / "cache", monkeypatch, name, network)
    tree = "model: {name: timm:test_resnet, weights: 'timm:test_resnet.r160_in1k'}\ndata: {loader: synthetic, std: [1, 1, 1]}\n"
    (tmp_path / "run.yaml").write_text(f"run_dir: {tmp_path / 'run'}\n{tree}optim: {{epochs: 1, batch_size: 512}}\n")
    config = load_config(tmp_path / "run.yaml", {"data.interpolation": "pil-bicubic", "train.device": "cpu"})
    assert config.data.from_weights == ("channels", "crop_size", "resize_size")
    run = run_of(config)
    assert (run.config.data.crop_size, run.config.data.resize_size) == (160, 168)  # 160 / 0.95
    assert run.config.data.std == (1, 1, 1) and run.config.data.interpolation == "pil-bicubic"  # as given
    assert run.config.model.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for entry, tensor in network.state_dict().items():
        assert entry.startswith("fc.") or torch.equal(run.network.state_dict()[entry], tensor), entry
    assert "taken over from their source: channels 3, crop_size 160, resize_size 168" in run.description()
    (tmp_path / "again.yaml").write_text(to_yaml(run.config))  # as a run writes it, with what was taken over
    again = load_config(tmp_path / "again.yaml", {"run_dir": str(tmp_path / "next"), "data.crop_size": 96})
    assert again.data.from_weights == ("channels",)
    assert (run_of(again).config.data.crop_size, run_of(again).config.data.resize_size) == (96, 101)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "timm:densenet121.ra_in1k",
            r"not in timm's cache: fetch it .*timm.create_model\('densenet121.ra_in1k', pretrained",
        ),
        ("timm:densenet121", r"\(timm:NAME.TAG\): choose timm:densenet121.ra_in1k, timm:densenet121.tv_in1k, or give"),
        ("timm:densenet121.imagenet", "choose timm:densenet121.ra_in1k"),
        ("timm:dense.tag", "it has none for 'dense', or give a file"),
    ],
)
def test_weights_that_timm_does_not_have_here(tmp_path, monkeypatch, name, expected):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=expected):
        run_of(small_config(tmp_path, model={"name": "densenet121", "weights": name}))


def test_parts_of_our_networks_are_those_of_timms():
    ours, theirs = create_model("densenet121", 3), timm.create_model("densenet121", num_classes=3)
    assert parts_of(ours, "ours") == parts_of(theirs, "theirs")
    assert classifier_of(ours) == classifier_of(theirs) == ("classifier",)
    assert classifier_of(timm.create_model("test_resnet")) == ("fc",)


@pytest.mark.parametrize(("blocks", "last"), [(0, "features.conv0.weight"), (2, "features.transition2.conv.weight")])
def test_what_is_frozen(blocks, last):
    network = create_model(MODEL, 3)
    modules = freeze(network, blocks, MODEL)
    still = [name for name, p in network.named_parameters() if not p.requires_grad]
    names = [name for name, _ in network.named_parameters()]
    assert still == names[: names.index(last) + 1]
    network.train()
    for module in modules:
        module.eval()
    norms = {name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training}
    assert norms == {name.removesuffix(".weight") for name in still if "norm" in name and name.endswith("weight")}
    with pytest.raises(UserError, match="model.freeze is 4, and densenet_bc22_k8 has 3 blocks: choose 0 to 3"):
        freeze(network, 4, MODEL)


FINE_TUNING = {
    "model": {"freeze": 1, "dropout": 0.2},
    "optim": {"head_lr": 0.5, "layer_decay": 0.5, "class_weights": "balanced", "schedule": "cosine"},
    "data": {"sampling": "balanced"},
    "train": {"checkpoint_every": 1},
}


def fine_tuning(folder: Path, source: Path):
    return small_config(folder, **{**FINE_TUNING, "model": {**FINE_TUNING["model"], "weights": str(source)}})


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    config = fine_tuning(tmp_path_factory.mktemp("whole"), source)
    trainer.fit(config)
    return config


def test_what_is_frozen_keeps_its_bits_and_all_else_trains(whole, source):
    given, trained = state_of(source), weights(whole)
    part = parts_of(create_model(MODEL, 3), MODEL)
    for name, tensor in trained.items():
        if not name.startswith("classifier."):
            assert torch.equal(tensor, given[name]) == (part[name] <= 1), name


def test_a_run_that_resumes_needs_its_file_no_more_and_ends_with_the_same_bits(whole, source, tmp_path):
    copy = tmp_path / "copy.pth"
    copy.write_bytes(source.read_bytes())
    config = fine_tuning(tmp_path / "run", copy)
    with pytest.raises(InterruptionError):
        trainer.fit(config, hooks=[InterruptAfter(3)])
    copy.unlink()
    trainer.fit(config)
    assert_equal_weights(weights(config), weights(whole))
    assert comparable_records(config) == comparable_records(whole)
    stored = load_stored_config(tmp_path / "run" / "config.yaml")
    assert stored.model.weights_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()


def test_two_ranks_begin_alike_and_resume_with_the_same_bits(source, tmp_path):
    """On images with several labels, whose scores rank 0 computes for both."""
    images = write_labelled_images(tmp_path / "images")
    tables = {"labels": "multi", "train": "train.csv", "val": "val.csv"}
    sections = {
        **FINE_TUNING,
        "model": {**FINE_TUNING["model"], "weights": str(source)},
        "data": {"dir": str(images), "loader": "reference", **tables},
        "optim": {**FINE_TUNING["optim"], "objective": "binary_cross_entropy", "lr": 0.01, "head_lr": 0.05},
    }
    configs = [small_config(tmp_path / name, **sections) for name in ("whole", "cut")]
    files = [tmp_path / "whole.yaml", tmp_path / "cut.yaml"]
    for file, config in zip(files, configs, strict=True):
        file.write_text(to_yaml(config))
    result = run_module("tests.fine_tuning_on_ranks", *files, ranks=2)
    assert result.returncode == 0, result.stderr
    whole, cut = map(weights, configs)
    assert_equal_weights(whole, cut)
    assert last_state(configs[1])["conditions"]["ranks"] == 2
    assert comparable_records(configs[0]) == comparable_records(configs[1])
    given, part = state_of(source), parts_of(create_model(MODEL, 3), MODEL)
    assert all(torch.equal(whole[name], given[name]) == (part[name] <= 1) for name in given if "classifier" not in name)
    alone = api.evaluate(tmp_path / "whole/checkpoints/last.pt", images, labels=images / "val.csv", device="cpu").score
    assert isinstance(alone, LabelScore) and alone.mean is not None
    last = [record for record in records(configs[0]) if "val/loss" in record][-1]
    assert last["val/mean_auroc"] == pytest.approx(alone.mean.auroc, abs=1e-9)
    assert last["val/loss"] == pytest.approx(alone.loss, rel=1e-5)


def test_the_record_names_the_file(whole, source, tmp_path, monkeypatch, capsys):
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for name in ("config.yaml", "audit.md"):
        text = Path(whole.run_dir, name).read_text()
        assert digest in text and str(source) in text
    with init_distributed("cpu") as world:
        found = start.find_start(whole)
        run = Run(found.config, world, found)
        run.load_state_dict(found.checkpoint.state)
    assert f"begun with {source} (SHA-256 {digest})" in summary(run)
    audit = Path(whole.run_dir, "audit.md").read_text()
    for words in ("the stem and block 1", "times 0.5 towards the images", "balanced", "equally many of each class"):
        assert words in audit
    last = Path(whole.run_dir, "checkpoints", "last.pt")
    write_safetensors(read_weights(last), tmp_path / "out.safetensors")
    again = read_weights(tmp_path / "out.safetensors")
    assert again.config.model.weights_sha256 == digest and digest in (again.audit or "")
    card, out = tmp_path / "card.md", tmp_path / "again.safetensors"
    monkeypatch.setattr("sys.argv", ["convert", str(last), str(out), "--card", str(card)])
    convert.main()
    text = card.read_text()
    assert f"| begun with    | {source} (SHA-256 {digest}) " in text
    odd = re.findall(r"^\| (.*?) +\| .* \| DIFFERS \| ", audit, re.M)
    (training,) = re.findall(r"^\| training +\| (.*?) +\|$", text, re.M)
    assert len(odd) > 10 and all(f"{part} (" in training for part in odd) and training.count("; paper ") == len(odd)
    assert training == again.audit and f"Differs from the paper in {len(odd)} of " in audit
    assert "| outputs       | 3 classes, one label an image" in text
    assert re.search(r"\| trained on    \| 46 images; validated on 11 images +\|", text)
    assert "mean 0.485, 0.456, 0.406" in text and "centre crop 16 pixels" in text and ", ".join(again.classes) in text


def test_each_part_has_its_learning_rate_and_other_groups_resume():
    network = create_model(MODEL, 3)
    config = OptimConfig(lr=0.2, head_lr=1.0, layer_decay=0.5)
    optimizer = create_optimizer(network, config)
    rates = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    part = parts_of(network, MODEL)
    for name, parameter in network.named_parameters():
        expected = 5 if name.startswith("classifier.") else 0.5 ** (4 - part[name])
        assert rates[id(parameter)] == pytest.approx(expected), name
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [*map(id, network.parameters())]

    plain = create_optimizer(network, OptimConfig(lr=0.2))
    sum(p.sum() for p in network.parameters()).backward()
    plain.step()
    load_state(optimizer, network, plain.state_dict())
    for parameter in network.parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], plain.state[parameter]["momentum_buffer"])
    assert len(optimizer.param_groups) > 1 and optimizer.param_groups[-1]["lr_scale"] == 5


def test_the_log_names_the_rates_that_differ(whole):
    """Of a cosine schedule, with a frozen stem and first block: of the parts that train the first is two before the last."""
    text = (Path(whole.run_dir) / "log.txt").read_text()
    found = re.findall(r", lr ([\d.e-]+) \(classifier ([\d.e-]+), first trained part ([\d.e-]+)\), ", text)
    assert len(found) == len(re.findall(r": loss .*, lr ", text)) > 1
    for rate, head, first in ((float(word) for word in words) for words in found):
        assert head == pytest.approx(5 * rate, rel=1e-3) and first == pytest.approx(rate / 4, rel=1e-3)
    network = create_model(MODEL, 3)
    for config, named in (
        (OptimConfig(), {}),
        (OptimConfig(lr=0.2, head_lr=0.2), {}),
        (OptimConfig(lr=0.2, head_lr=1.0), {"classifier": 0.05}),
        (OptimConfig(lr=0.2, layer_decay=0.5), {"first trained part": 0.01 / 16}),
    ):
        assert rates_of_parts(create_optimizer(network, config), config, 0.01) == pytest.approx(named)


def test_parts_may_thaw_on_purpose(whole, source, tmp_path):
    config = fine_tuning(tmp_path, source)
    with pytest.raises(InterruptionError):
        trainer.fit(config, hooks=[InterruptAfter(4)])
    thawed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, freeze=None),
        optim=dataclasses.replace(config.optim, layer_decay=1.0),
    )
    with pytest.raises(UserError, match=r"model\.freeze was 1 and is now none; optim\.layer_decay was 0\.5"):
        trainer.fit(thawed)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=None, weights_sha256=None))
    with pytest.raises(UserError, match=r"model\.weights was .*weights\.pth and is now none"):
        trainer.fit(other)
    asked = dataclasses.replace(config.train, change=("model.weights",))
    with pytest.raises(UserError, match=r"a run with another model\.weights is another run"):
        trainer.fit(dataclasses.replace(other, train=asked))
    allowed = dataclasses.replace(thawed.train, change=("model.freeze", "optim.layer_decay"))
    trainer.fit(dataclasses.replace(thawed, train=allowed))
    trained = weights(config)
    assert not torch.equal(trained["features.conv0.weight"], state_of(source)["features.conv0.weight"])
    assert trained["features.denseblock1.denselayer1.norm1.num_batches_tracked"] == 4


def test_fine_tuned_weights_go_to_torchvision_and_timm(tmp_path):
    """From torchvision's random weights of 1000 classes to 3 of our own, and out again."""
    torch.manual_seed(1)
    torch.save(torchvision.models.densenet121(weights=None).state_dict(), tmp_path / "in.pth")
    config = small_config(
        tmp_path / "run",
        model={"name": "densenet121", "weights": str(tmp_path / "in.pth"), "freeze": 3},
        data={"crop_size": 64, "resize_size": 64, "synthetic_images": 8},
        optim={"epochs": 1, "batch_size": 4, "head_lr": 0.01},
    )
    trainer.fit(config)
    found = read_weights(tmp_path / "run" / "checkpoints" / "last.pt")
    write_safetensors(found, tmp_path / "out.safetensors")
    write_torch(found, tmp_path / "out.pth")
    images = torch.randn(2, 3, 64, 64)
    theirs = torchvision.models.densenet121(weights=None, num_classes=3)
    theirs.load_state_dict(torch.load(tmp_path / "out.pth"))
    of_timm = timm.create_model("densenet121", num_classes=3, checkpoint_path=str(tmp_path / "out.safetensors"))
    with torch.no_grad():
        expected = found.network(images)
        for network in (theirs, of_timm):
            torch.testing.assert_close(network.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_networks_of_timm_are_fine_tuned_and_frozen(tmp_path):
    torch.manual_seed(2)
    network = timm.create_model("test_resnet", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "in.pth")
    config = small_config(
        tmp_path / "run",
        model={"name": "timm:test_resnet", "weights": str(tmp_path / "in.pth"), "freeze": 1},
        data={"crop_size": 32, "resize_size": 32},
        optim={"epochs": 1, "layer_decay": 0.7},
    )
    trainer.fit(config)
    part, trained = parts_of(network, "timm:test_resnet"), weights(config)
    for name, tensor in network.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(trained[name], tensor) == (part[name] <= 1), name


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "configs" / "finetune").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_examples_are_ready_to_train(tmp_path, file):
    """A dry run of each, with weights and images made for it, small ones."""
    torch.save(torchvision.models.densenet121(weights=None).state_dict(), tmp_path / "in.pth")
    fields = {"data.dir": str(tmp_path), "model.weights": str(tmp_path / "in.pth"), "run_dir": str(tmp_path / "run")}
    if load_config(file).data.labels == "multi":
        write_labelled_images(tmp_path, images=20, training=14)
        (tmp_path / "train.csv").rename(tmp_path / "train_val.csv")
        (tmp_path / "val.csv").rename(tmp_path / "test.csv")
    else:
        for split in ("train", "val"):
            write_class_folders(tmp_path / split, 3, 9)
    said = trainer.dry_run(
        load_config(file, fields | {"optim.batch_size": 2, "data.threads": 1, "train.device": "cpu"})
    )
    assert "densenet121: " in said and "drawn anew: 1000 outputs there, 3 here" in said
    assert not [*(tmp_path / "run").rglob("*.pt")]
