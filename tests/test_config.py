import dataclasses

import pytest
import yaml
from conftest import REPOSITORY, override_flags

from pipeline.config import flatten, from_dict, load_config, parse_command_line, to_yaml
from pipeline.errors import UserError

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
DENSENET121 = str(REPOSITORY / "configs" / "densenet121.yaml")


def parse(*words: str):
    return parse_command_line([DENSENET121, *words], "train", "")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path):
    config = load_config(path)
    assert config.run_dir == f"runs/{path.stem}"
    assert from_dict(yaml.safe_load(to_yaml(config)), "round trip") == config


@pytest.mark.parametrize("name", ["121", "161", "169", "201", "264"])
def test_imagenet_configs_are_the_papers_recipe(name):
    config = load_config(REPOSITORY / "configs" / f"densenet{name}.yaml")
    assert config.model.name == f"densenet{name}"
    optim = config.optim
    assert (optim.epochs, optim.batch_size, optim.lr, optim.momentum, optim.nesterov) == (90, 256, 0.1, 0.9, True)
    assert (optim.weight_decay, optim.schedule, optim.milestones, optim.lr_drop) == (1e-4, "step", (30, 60), 0.1)
    assert (optim.warmup_epochs, optim.label_smoothing, config.train.precision) == (0, 0, "fp32")
    assert config.published.top1 is not None


def test_every_field_can_be_overridden_on_the_command_line():
    config = parse(
        "--optim.lr", "2e-1", "--optim.milestones", "3,4", "--data.mirror", "false", "--data.mean", "0.5,0.5,0.5",
        "--published.top1", "none", "--seed", "7", "--run_dir", "somewhere",
    )  # fmt: skip
    assert (config.optim.lr, config.optim.milestones, config.data.mirror) == (0.2, (3, 4), False)
    assert (config.data.mean, config.published.top1, config.seed) == ((0.5, 0.5, 0.5), None, 7)
    assert config.run_dir == "somewhere"
    assert parse(*override_flags(config)) == config


def test_published_errors_are_of_the_files_network_and_data():
    file = REPOSITORY / "configs" / "fashion-mnist.yaml"
    same = {"model.name": "densenet_bc100_k12", "data.dataset": "fashion-mnist"}
    assert load_config(file, same).published.top1 == 4.6
    assert load_config(file, {"model.name": "densenet_bc22_k8"}).published.top1 is None
    assert load_config(file, {"data.dataset": "cifar10", "published.top1": 4.5}).published.top1 == 4.5
    assert load_config(DENSENET121, {"data.dataset": "images"}).published.top1 == 25.02
    assert load_config(DENSENET121, {"data.dataset": "cifar10"}).published.source is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optim.lrr", "1"], "unknown argument --optim.lrr (did you mean '--optim.lr'?)"),
        (["--optim.lr", "fast"], "--optim.lr: Input should be a valid number"),
        (["--optim.lr", "-1"], "--optim.lr: Input should be greater than 0"),
        (["--optim.lr", "nan"], "--optim.lr: Input should be"),
        (["--optim.lr"], "--optim.lr: expected one argument"),
        (["--data.resize", "lanczos"], "--data.resize: Input should be 'torch', 'pil-bilinear' or 'pil-bicubic'"),
        (["--data.crop_area", "1,0.5"], "--data.crop_area: the lower limit comes first"),
        (["--data.crop_size", "300"], "resize_size (256) must be at least crop_size (300)"),
        (["--optim.momentum", "0"], "nesterov needs momentum"),
        (["--data.mean", "1,2"], "--data.mean"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words, expected):
    with pytest.raises(UserError) as failure:
        parse(*words)
    assert expected in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lrr: 1}", "'optim.lrr' is not a known key (did you mean 'optim.lr'?)"),
        ("optm: {lr: 1}", "'optm' is not a known key (did you mean 'optim'?)"),
        ("optim: {lr: fast}", "'optim.lr': Input should be a valid number"),
        ("optim: 3", "'optim' must be a mapping"),
        ("- 1", "must be a mapping"),
        ("optim: {", "is not valid YAML"),
    ],
)
def test_mistakes_in_the_file_are_one_line_that_names_it(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as failure:
        load_config(path)
    assert expected in str(failure.value) and str(path) in str(failure.value) and "\n" not in str(failure.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_help_lists_every_field_with_its_text(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for key in flatten(dataclasses.asdict(load_config(DENSENET121))):
        assert f"--{key} " in text
    assert "Learning rate after warm-up. [0.1]" in text
