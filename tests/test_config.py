import dataclasses
import re

import pytest
import yaml
from conftest import REPOSITORY, override_flags

from pipeline.cautions import poor_split
from pipeline.command import ArgumentParser
from pipeline.config_file import from_dict, load_config, load_stored_config, parse_command_line, to_yaml
from pipeline.errors import UserError
from pipeline.parsing import flatten, text_to_read, value_text

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
    assert (optim.weight_decay, optim.schedule, optim.milestones, optim.lr_gamma) == (1e-4, "step", (30, 60), 0.1)
    assert (optim.warmup_epochs, optim.label_smoothing, config.train.precision) == (0, 0, "fp32")
    assert config.published.top1 is not None


def test_every_field_can_be_overridden_on_the_command_line():
    config = parse(
        "--optim.lr", "2e-1", "--optim.milestones", "3,4", "--data.hflip", "false", "--data.mean", "0.5,0.5,0.5",
        "--published.top1", "none", "--seed", "7", "--run_dir", "somewhere",
    )  # fmt: skip
    assert (config.optim.lr, config.optim.milestones, config.data.hflip) == (0.2, (3, 4), False)
    assert (config.data.mean, config.published.top1, config.seed) == ((0.5, 0.5, 0.5), None, 7)
    assert config.run_dir == "somewhere"
    assert (
        parse("--optim.milestones", "none", "--data.train_crop_size", "none").optim.milestones == ()
    )  # as refusals say it
    assert parse(*override_flags(config)) == config


def test_published_errors_are_of_the_files_network_and_data():
    file = REPOSITORY / "configs" / "fashion-mnist.yaml"
    same = {"model.name": "densenet_bc100_k12", "data.dataset": "fashion-mnist"}
    assert load_config(file, same).published.top1 == 4.6
    assert load_config(file, {"model.name": "densenet_bc22_k8"}).published.top1 is None
    assert load_config(file, {"data.dataset": "cifar10", "published.top1": 4.5}).published.top1 == 4.5
    assert load_config(DENSENET121, {"data.dataset": "images"}).published.top1 == 25.02
    assert load_config(DENSENET121, {"data.dataset": "cifar10"}).published.source is None
    assert load_config(DENSENET121, {"data.crop_size": 224, "data.resize_size": 256}).published.top1 == 25.02
    assert load_config(DENSENET121, {"data.crop_size": 192}).published.top1 is None
    assert parse("--data.crop_size", "224").published.top1 == 25.02  # a word, as a command line gives it
    assert parse("--data.crop_size", "192").published.top1 is None
    paddle = REPOSITORY / "configs" / "paddleclas" / "densenet121.yaml"
    kept = load_config(paddle, {"data.crop_size": 192}).published
    assert (kept.recipe, kept.top1, kept.images) == ("paddleclas", None, ())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optim.lrr", "1"], "unknown argument --optim.lrr (did you mean '--optim.lr'?)"),
        (["--optim.lr", "fast"], "--optim.lr: a number is needed (got 'fast')"),
        (["--optim.lr", "-1"], "--optim.lr: a number above 0.0 is needed"),
        (["--optim.lr", "nan"], "--optim.lr: a finite number is needed"),
        (["--optim.lr"], "--optim.lr: expected one argument"),
        (
            ["--data.interpolation", "lanczos"],
            "--data.interpolation: choose 'torch7-bicubic', 'pil-bilinear' or 'pil-bicubic'",
        ),
        (["--data.scale", "1,0.5"], "--data.scale: the lower limit comes first"),
        (
            ["--data.crop_size", "300", "--data.resize_size", "256"],
            "resize_size (256) must be at least crop_size (300)",
        ),
        (["--optim.momentum", "0"], "nesterov needs momentum"),
        (["--data.mean", "1,2"], "'data' with --data.mean: mean has 2 of them, and channels is 3: give three numbers"),
        (["--data.mean", "0.5"], "'data' with --data.mean: mean has 1 of them, and channels is 3: give three numbers"),
        (
            ["--data.channels", "1", "--data.std", "1,1,1"],
            "'data' with --data.channels: mean has 3 of them, and channels is 1: give one number",
        ),
        (["--data.mean", "1,2,3,4"], "--data.mean: some values are needed, such as 0.485,0.456,0.406 (got"),
        (["--data.depth", "16"], "depth 16 is for gray images, as Pillow reads colours with 8 bits: set channels 1"),
        (["--data.channels", "2"], "--data.channels: choose 1 or 3 (got 2)"),
        (["--data.hflip", "maybe"], "--data.hflip: true or false is needed (got 'maybe')"),
        (["--data.hflip", "b.yaml"], "argument --data.hflip: 'b.yaml' is no value of it: give b.yaml before the flags"),
        (["--optim.lr", "-1e-3"], "--optim.lr: a number above 0.0 is needed (got '-1e-3')"),
        (["--optim.milestones", "-1,2"], "--optim.milestones: at least 0 is needed (got '-1')"),
        (["--optim.epochs", "1.5"], "--optim.epochs: a whole number is needed"),
        (["--train.change", "lr"], "densenet121.yaml with --train.change: train.change: there is no field 'lr'"),
        (
            ["--data.train", "X", "--train.change", "lr"],
            "yaml with --train.change: train.change: there is no field 'lr'",
        ),
        (["--optim.epochs", "0"], "--optim.epochs: a number above 0 is needed"),
        (["--optim.momentum", "1"], "--optim.momentum: a number below 1.0 is needed"),
        (["--data.mirror", "false"], "--data.mirror is now called --data.hflip"),
        (["--data.train_crop", "area"], "--data.train_crop: 'area' is now called 'random_resized_crop'"),
        (["--optim.milestones", "1.5"], "--optim.milestones: a whole number is needed (got '1.5')"),
        (["--optim.batch_size", "x", "--optim.large_batch"], "--optim.batch_size: a whole number is needed (got 'x')"),
        (["--train.compile", "true"], "--train.compile: 'true' is now called 'default'"),
        (["--train.compile", "false"], "--train.compile: 'false' is now called 'none'"),
        (["--train.channels_last", "false"], "--train.channels_last is now called --train.memory_format"),
        (["--lr", "1"], "unknown argument --lr (did you mean '--optim.lr'?)"),
        (["--learning-rate", "1"], "unknown argument --learning-rate: use --optim.lr"),
        (["--resume"], "unknown argument --resume: a run resumes by itself: start the same command again"),
        (["--colour", "1"], "unknown argument --colour; --help lists all"),
        (["more.yaml"], "'more.yaml' belongs to no argument"),
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
        ("optim.lr: 1", "'optim.lr' is not a key of the top level: write 'lr' below 'optim:'"),
        ("optm: {lr: 1}", "'optm' is not a known key (did you mean 'optim'?)"),
        ("optim: {lr: fast}", "'optim.lr': a number is needed"),
        ("seed: true", "'seed': a number is needed, not true"),
        ("optim: {batch_size: yes}", "'optim.batch_size': a number is needed, not true"),
        ("optim: {lr: on}", "'optim.lr': a number is needed, not true"),
        ("data: {mean: [true, 0, 0]}", "'data.mean': a number is needed, not true"),
        ("optim: {accumulation: 2}", "'optim.accumulation' is now called 'optim.grad_accum_steps'"),
        ("train: {compile: true}", "'train.compile': 'true' is now called 'default'"),
        ("model: {dense_block: lean}", "'model.dense_block': 'lean' is now called 'memory_efficient'"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("1: 2", "must be a mapping"),
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


def test_paths_take_the_home_folder_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = tmp_path / "mine.yaml"
    path.write_text("run_dir: $SCRATCH/run\ndata: {dir: ~/images, val_labels: $HOME/labels.txt}")
    config = load_config(path)
    assert (config.run_dir, config.data.dir) == ("/scratch/me/run", "/home/me/images")
    assert config.data.val_labels == "/home/me/labels.txt"
    assert parse("--data.dir=~/images").data.dir == "/home/me/images"  # which no shell expands
    options = ArgumentParser()
    options.add_argument("--report")
    options.add_argument("weights")
    said = options.parse_args(["--report=~/report", "~/a.pth"])
    assert (said.report, said.weights) == ("/home/me/report", "/home/me/a.pth")


def test_a_flag_of_a_truth_value_stands_for_true():
    cifar = ("--data.dataset", "cifar10")
    assert (
        parse("--data.download", *cifar).data.download and not parse("--data.download", "false", *cifar).data.download
    )
    assert parse("--train.compile").train.compile == "default"  # it was one, and has other values today


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("", "--optim.epochs 20", (20, (6, 13))),
        ("", "--optim.milestones 1/3,2/3", (90, (30, 60))),
        ("", "--optim.milestones 1/3,0.75,19 --optim.epochs 20", (20, (6, 15, 19))),
        ("", "--optim.epochs 2", (2, (1,))),  # the first drop would come before the first epoch
        ("", "--optim.epochs 1", (1, ())),
        ("epochs: 300, milestones: [150, 225]", "--optim.epochs 40", (40, (20, 30))),
        ("epochs: 40", "--optim.epochs 20", (20, (6, 13))),
        ("milestones: [1/2]", "--optim.epochs 20", (20, (10,))),
        ("epochs: 300, milestones: [1/2, 3/4]", "--optim.epochs 2", (2, (1,))),  # as whole epochs do, above
        ("epochs: 300, milestones: [1/2, 3/4]", "--optim.epochs 1", (1, ())),
        ("", "--optim.epochs 1 --optim.milestones 0,1/2", (1, (0,))),  # a whole number is as it is meant
        ("epochs: 300, milestones: [150, 225]", "--optim.epochs 300", (300, (150, 225))),
        ("epochs: 14, schedule: cosine", "--optim.epochs 20", (20, (30, 60))),  # which it does not look at
        ("", "--optim.epochs 120 --train.change optim.epochs", (120, (40, 80))),  # a new run, which has nothing to keep
        ("", "--optim.epochs 120 --train.change optim.lr", (120, (40, 80))),
    ],
)
def test_drops_of_the_learning_rate_follow_the_epochs(tmp_path, text, words, expected):
    (tmp_path / "mine.yaml").write_text(f"optim: {{{text}}}")
    config, _ = parse_command_line([str(tmp_path / "mine.yaml"), *words.split()], "train", "")
    assert (config.optim.epochs, config.optim.milestones) == expected
    assert from_dict(yaml.safe_load(to_yaml(config)), "round trip") == config


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("", "--data.crop_size 64", (64, 73)),
        ("", "--data.crop_size 448", (448, 512)),
        ("", "--data.crop_size 64 --data.resize_size 256", (64, 256)),
        ("", "--data.resize_size 288", (224, 288)),
        ("crop_size: 32, resize_size: 32", "--data.crop_size 48", (48, 48)),
        ("crop_size: 28, resize_size: 32", "--data.crop_size 56", (56, 64)),
        ("crop_size: 64", "", (64, 73)),
        ("crop_size: 64", "--data.resize_size 64", (64, 64)),
    ],
)
def test_the_resize_size_follows_the_crop_size(tmp_path, text, words, expected):
    (tmp_path / "mine.yaml").write_text(f"data: {{{text}}}")
    config, _ = parse_command_line([str(tmp_path / "mine.yaml"), *words.split()], "train", "")
    assert (config.data.crop_size, config.data.resize_size) == expected


def test_the_classifiers_rate_follows_the_batch_too(tmp_path):
    file = REPOSITORY / "configs" / "finetune" / "own-folders.yaml"
    plain = load_config(file).optim
    large = load_config(file, {"optim.batch_size": 4 * plain.batch_size, "optim.large_batch": True}).optim
    assert (large.lr, large.head_lr) == (4 * plain.lr, 4 * plain.head_lr)
    given = load_config(file, {"optim.batch_size": 256, "optim.large_batch": True, "optim.head_lr": 0.3}).optim
    assert given.head_lr == 0.3 and given.lr > plain.lr


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("", "--optim.batch_size 1024 --optim.large_batch", (0.4, 5)),
        ("batch_size: 1024", "--optim.large_batch", (0.4, 5)),
        ("batch_size: 1024, large_batch: true", "--optim.batch_size 2048", (0.8, 5)),
        ("batch_size: 1024, large_batch: y", "", (0.4, 5)),
        ("", "--optim.batch_size 1024 --optim.large_batch t", (0.4, 5)),
        ("batch_size: 64, lr: 0.2", "--optim.batch_size 256 --optim.large_batch", (0.8, 5)),
        ("", "--optim.batch_size 1024 --optim.large_batch --optim.lr 0.3 --optim.warmup_epochs 2", (0.3, 2)),
        ("", "--optim.large_batch --optim.epochs 6", (0.1, 1.2)),
        ("", "--optim.large_batch --optim.batch_size 512 --optim.schedule one_cycle", (0.2, 0)),  # has its own
        ("", "--optim.batch_size 1024", (0.1, 0)),
        ("large_batch: true", "--optim.batch_size 1024 --optim.large_batch false", (0.1, 0)),
    ],
)
def test_one_flag_is_the_recipe_of_large_batches(tmp_path, text, words, expected):
    """Goyal et al. 2017: the learning rate in proportion to the batch, and five epochs of warm-up."""
    (tmp_path / "mine.yaml").write_text(f"optim: {{{text}}}")
    config, _ = parse_command_line([str(tmp_path / "mine.yaml"), *words.split()], "train", "")
    assert (config.optim.lr, config.optim.warmup_epochs) == pytest.approx(expected)
    (tmp_path / "stored.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "stored.yaml") == config


def test_an_empty_file_is_no_run_of_defaults(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="config.yaml is empty: put a copy of it back"):
        load_stored_config(tmp_path / "config.yaml")


def test_a_number_with_zeros_before_it_is_decimal_in_a_file_as_on_the_command_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("{seed: 010, optim: {epochs: 0100, weight_decay: 0, batch_size: 0x10}}")
    config, _ = parse_command_line([str(tmp_path / "mine.yaml"), "--optim.warmup_epochs", "05"], "train", "")
    assert (config.seed, config.optim.epochs, config.optim.warmup_epochs) == (10, 100, 5)
    assert (config.optim.weight_decay, config.optim.batch_size) == (0, 16)


def test_values_are_shown_without_the_last_digits_of_arithmetic():
    values = (0.1 * 66 / 256, 1.0, 1e-5, True)
    assert text_to_read(values) == "0.02578125,1.0,1e-05,true"
    assert value_text(values) == "0.025781250000000002,1.0,1e-05,true"  # which a command line gives back


def test_many_ranks_with_few_images_each_are_told_the_way_out():
    assert poor_split(256, 4, 1) == poor_split(256, 16, 1) == poor_split(1024, 32, 1) == poor_split(8, 2, 1) == ""
    line = poor_split(256, 32, 1)
    assert (
        "batch 256 on 32 ranks leaves each rank 8 images at once, all that a batch norm sees" in line
        and "\n" not in line
    )
    assert "--optim.batch_size 1024 --optim.large_batch gives each 32 images" in line
    assert "16 ranks x 2 accumulation steps leaves each rank 8 images at once" in poor_split(256, 16, 2)


def test_stored_configurations_are_read_under_their_old_names(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "run_dir: r\nmodel: {dense_block: plain, recompute: first}\ndata: {mirror: false, resize: torch, training_crop: pad}\n"
        "optim: {accumulation: 2}\ntrain: {elastic: true, hang_seconds: 9, compile: true, channels_last: false}\n"
    )
    config = load_stored_config(path)
    assert (config.model.dense_block, config.model.activation_checkpointing) == ("eager", "first")
    assert (config.data.hflip, config.data.interpolation, config.data.train_crop) == (
        False, "torch7-bicubic", "random_crop",
    )  # fmt: skip
    assert (config.optim.grad_accum_steps, config.train.heartbeat_timeout) == (2, 9)
    assert config.train.allow_world_size_change
    assert (config.train.compile, config.train.memory_format) == ("default", "contiguous")
    with pytest.raises(UserError, match=r"config.yaml: 'model.dense_block': 'plain' is now called 'eager'"):
        load_config(path)


def test_help_lists_every_field_with_its_text(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for key in flatten(dataclasses.asdict(load_config(DENSENET121))):
        assert re.search(rf"--{re.escape(key)} [^ ]+ (?!--)[^-].{{15}}", text), key  # its value's kind, and a text
    assert "Learning rate after warm-up. [0.1]" in text
