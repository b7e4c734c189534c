import dataclasses

import pytest
import torch
import torchvision
from conftest import REPOSITORY
from torch import nn

from pipeline.audit import (
    audit,
    differences,
    in_one_line,
    statistics_text,
    to_markdown,
)
from pipeline.config_file import from_dict, load_config
from pipeline.measured import (
    Measured,
    decayed_parameters,
    has_batch_norms,
    initial_spread,
    momentum_text,
    weight_decay_factors,
)
from pipeline.models import zoo
from pipeline.paper import CIFAR_NETWORKS, IMAGENET_NETWORKS
from pipeline.parsing import flatten
from tools.audit import main

DENSENET121 = REPOSITORY / "configs" / "densenet121.yaml"


@pytest.mark.parametrize("name", ["121", "161", "169", "201", "264"])
def test_imagenet_configs_are_the_papers_but_for_what_the_ranks_force(name):
    config = load_config(REPOSITORY / "configs" / f"densenet{name}.yaml")
    assert differences(audit(config, microbatches=4)) == []
    (forced,) = differences(audit(config, microbatches=32))
    assert (forced.part, forced.paper, forced.here) == ("images in a batch-norm statistic", "64", "8")


DEPARTURES = [
    ("model.name", "timm:resnet50"), ("model.dropout", 0.2), ("optim.epochs", 100), ("optim.batch_size", 512),
    ("optim.lr", 0.2), ("optim.momentum", 0.8), ("optim.nesterov", False), ("optim.weight_decay", 5e-5),
    ("optim.schedule", "cosine"), ("optim.milestones", (30, 61)), ("optim.milestones", (30,)), ("optim.lr_gamma", 0.2),
    ("optim.warmup_epochs", 5), ("optim.label_smoothing", 0.1), ("train.precision", "bf16"),
    ("data.scale", (0.25, 1)), ("data.ratio", (0.5, 2)), ("data.crop_size", 192), ("data.resize_size", 232),
    ("data.interpolation", "pil-bilinear"), ("data.color_jitter", 0), ("data.pca_noise", 0), ("data.hflip", False),
    ("data.mean", (0.5, 0.5, 0.5)), ("data.std", (0.5, 0.5, 0.5)), ("data.loader", "synthetic"),
    ("data.corrupt_images", "skip"), ("model.weights", "weights.pt"), ("model.freeze", 1), ("optim.head_lr", 0.2),
    ("optim.layer_decay", 0.5), ("optim.class_weights", "balanced"), ("data.sampling", "balanced"),
    ("data.cutout", 16), ("data.random_erasing", 0.25), ("data.auto_augment", "trivialaugment"),
    ("data.train_crop_size", (192,)), ("data.aug_repeats", 3), ("model.drop_path", 0.1),
    ("data.mixup_alpha", 0.1), ("data.cutmix_alpha", 1.0), ("optim.objective", "binary_cross_entropy"),
    ("train.ema_decay", 0.999), ("optim.optimizer", "lamb"), ("optim.decay_norms", False), ("optim.clip_grad_norm", 1.0),
    ("data.exif_orientation", True),
]  # fmt: skip


TABLE2 = sorted((REPOSITORY / "configs" / "table2").glob("*.yaml"))
DEPARTURES_OF_TABLE2 = [
    ("data.dataset", "fashion-mnist"), ("data.train_crop", "random_resized_crop"), ("data.padding", 3), ("data.holdout", 1),
    ("data.hflip", False), ("model.dropout", 0.2), ("optim.milestones", (149, 224)), ("data.std", (1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("path", TABLE2, ids=lambda path: path.stem)
def test_table2_configs_are_the_papers(monkeypatch, capsys, path):
    monkeypatch.setattr("sys.argv", ["audit", str(path)])
    main()
    assert (
        "on 1 rank beside" in (printed := capsys.readouterr().out) and "The same as the paper in every part." in printed
    )


@pytest.mark.parametrize("path", TABLE2, ids=lambda path: path.stem)
def test_class_folders_of_small_images_are_compared_with_the_set_that_they_hold(path):
    config = load_config(path, {"data.dataset": "images"})
    (only,) = differences(audit(config, microbatches=1))
    assert (only.part, only.here) == ("data set", "images")


def test_names_of_networks_are_the_zoos():
    assert set(CIFAR_NETWORKS) == set(zoo.CIFAR_NETWORKS) and set(IMAGENET_NETWORKS) < set(zoo.DENSENETS)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [(DENSENET121, *departure) for departure in DEPARTURES]
    + [(REPOSITORY / "configs/table2/densenet_bc100_k12_c10+.yaml", *departure) for departure in DEPARTURES_OF_TABLE2],
    ids=lambda value: value.stem if hasattr(value, "stem") else str(value),
)
def test_every_departure_is_noticed(file, key, value):
    section, field = key.split(".")
    tree = dataclasses.asdict(load_config(file))
    tree[section][field] = value
    odd = differences(audit(from_dict(tree, "test"), microbatches=4 if file == DENSENET121 else 1))
    assert odd and all(finding.effect for finding in odd)


MEASURED = Measured(
    images=(1_281_167, 50_000),
    classes=1000,
    statistics=((0, (64, 64)),),
    last_batch=143,
    spread=1.0,
    weights=10**6,
    momentum="0.9, Nesterov",
    weight_decay=(1e-4,),
    decayed=(364, 364),
)


@pytest.mark.parametrize(
    ("change", "part", "here"),
    [
        ({"images": (1_281_167, 5)}, "training and validation images", "1281167, 5"),
        ({"classes": 3}, "classes", "3"),
        ({"statistics": ((0, (5, 6)),)}, "images in a batch-norm statistic", "5 or 6"),
        (
            {"statistics": ((0, (64, 64)), (59, (16, 16)))},
            "images in a batch-norm statistic",
            "64, 16 from epoch 60 on",
        ),
        (  # resumed twice, the second time on as many ranks
            {"statistics": ((0, (64, 64)), (2, (64, 64)), (3, (32, 32)), (7, (32, 32)), (9, (64, 64)))},
            "images in a batch-norm statistic",
            "64, 32 from epoch 4 on, 64 from epoch 10 on",
        ),
        ({"last_batch": 0}, "last, smaller batch of an epoch", "0 of its 143 images"),
        ({"spread": 0.7}, "initial weights of convolutions: standard deviation", "0.7 sqrt(2 / fan-out)"),
        ({"changed": ("optim.clip from 1 to 2",)}, "fields changed on the way", "optim.clip from 1 to 2"),
        ({"skipped_steps": 2}, "steps left out", "2"),
        ({"momentum": "0.9"}, "momentum", "0.9"),
        ({"weight_decay": (1e-4, 5e-4)}, "weight decay", "0.0001, 0.0005"),
        ({"decayed": (121, 364)}, "weight decay applies to", "121 of 364 tensors"),
    ],
)
def test_what_really_trains_is_audited(change, part, here):
    config = load_config(DENSENET121)
    assert differences(audit(config, 4, MEASURED)) == []
    (only,) = differences(audit(config, 4, dataclasses.replace(MEASURED, **change)))
    assert (only.part, only.here) == (part, here)


C10 = REPOSITORY / "configs/table2/densenet_bc100_k12_c10+.yaml"
PADDING, CROP = "training crop: pixels of padding", "training crop"


@pytest.mark.parametrize(
    ("file", "change", "gone"),
    [
        (C10, {"data.train_crop": "random_resized_crop"}, {PADDING}),
        (
            DENSENET121,
            {"data.train_crop": "random_crop"},
            {"training crop: scale (area)", "training crop: aspect ratio"},
        ),
        (
            DENSENET121,
            {"data.loader": "synthetic"},
            {
                "data set", CROP, "training crop: scale (area)", "training crop: aspect ratio", "evaluation: short side",
                "resize filter, training and evaluation", "corrupt training images",
            },
        ),
        (DENSENET121, {"optim.schedule": "one_cycle"}, {"warm-up epochs"}),
        (DENSENET121, {"data.dataset": "cifar10", "model.name": "densenet40_k12"}, {"corrupt training images"}),
    ],
)  # fmt: skip
def test_a_part_that_is_off_has_no_row_and_counts_as_nothing(file, change, gone):
    """What nothing reads is not the same as the paper's, whatever the configuration says of it."""
    before, after = (audit(load_config(file, fields), 4) for fields in ({}, change))
    assert gone.isdisjoint(row.part for row in after)
    assert gone <= {row.part for row in before}
    assert differences(after)  # what switched it off is still told


def test_what_no_layer_and_no_step_has_is_no_part():
    config = load_config(DENSENET121)
    for without, part in (
        ({"batch_norms": False}, "images in a batch-norm statistic"),
        ({"images": (256 * 5000, 50_000), "last_batch": 256}, "last, smaller batch of an epoch"),
    ):
        rows = [audit(config, 4, dataclasses.replace(MEASURED, **values)) for values in ({}, without)]
        assert [part in {row.part for row in found} for found in rows] == [True, False]
    assert [has_batch_norms(network) for network in (nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.ReLU()))] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("changed", "part", "here"),
    [
        (
            ("optim.lr from 0.5 to 0.1 after 3 steps",),
            "learning rate",
            "0.1 (optim.lr, before its drops) at the end; changed on the way, see below",
        ),
        (
            ("optim.milestones from 10, 20 to 30, 60 after 3 steps", "optim.epochs from 30 to 90 after 3 steps"),
            "learning-rate schedule",
            "times 0.1 after epochs 30, 60 of 90 at the end; changed on the way, see below",
        ),
    ],
)
def test_a_schedule_that_was_changed_on_the_way_is_not_the_papers(changed, part, here):
    """Though the last values, which the configuration has, are."""
    audited = audit(load_config(DENSENET121), 4, dataclasses.replace(MEASURED, changed=changed))
    found = {row.part: row.here for row in differences(audited)}
    assert found == {part: here, "fields changed on the way": ", ".join(changed)}


def test_rows_say_what_comes_true_in_the_run():
    """Epochs count from 1; an average's decay grows to what is asked for only with the steps; one rank has no fewer to take."""
    config = load_config(DENSENET121)
    sizes = dataclasses.replace(config.data, train_crop_size=(128, 160, 192), train_crop_milestones=(30, 60))
    config = dataclasses.replace(
        config, data=sizes, train=dataclasses.replace(config.train, ema_decay=0.99),
        optim=dataclasses.replace(config.optim, batch_size=32),
    )  # fmt: skip
    measured = dataclasses.replace(MEASURED, greatest_decay=0.9189, statistics=((0, (32, 32)),))
    found = {row.part: row for row in audit(config, 1, measured)}
    assert found["training crop size"].here == "128, 160 from epoch 31 on, 192 from epoch 61 on"
    assert found["moving average of the weights"].here.startswith("decay 0.99 (at most 0.919 in the run's steps), best")
    assert found["images in a batch-norm statistic"].effect == "noisier statistics: use a larger optim.batch_size"
    halves = {row.part: row for row in audit(config, 2, dataclasses.replace(MEASURED, statistics=((0, (16, 16)),)))}
    assert halves["images in a batch-norm statistic"].effect.endswith("use fewer ranks or fewer optim.grad_accum_steps")
    assert "at most" not in halves["moving average of the weights"].here


@pytest.mark.parametrize(
    ("asked", "reached", "shown"),
    [
        (0.9999, 0.9982, "0.9982"),
        (0.99999, 0.99989996, "0.9999"),
        (0.9999, 0.99989996, "0.99989996"),
        (0.9, 8 / 17, "0.48"),
        (0.9, 0.1, "0.1"),
    ],
)
def test_a_decay_that_is_not_reached_is_rounded_to_a_bound_below_the_one_asked_for(asked, reached, shown):
    config = load_config(DENSENET121, {"train.ema_decay": asked})
    rows = audit(config, 4, dataclasses.replace(MEASURED, greatest_decay=reached))
    (here,) = [row.here for row in rows if row.part == "moving average of the weights"]
    assert here.startswith(f"decay {asked} (at most {shown} in the run's steps), ")
    assert reached <= float(shown) < asked


def test_measured_is_what_trains():
    network = zoo.create_model("densenet_bc40_k12", 10)
    assert initial_spread(network)[0] == pytest.approx(1, abs=0.02)
    assert initial_spread(torchvision.models.densenet121(weights=None))[0] < 0.8  # drawn by fan-in
    groups = [
        {"params": list(network.features.parameters())},
        {"params": list(network.classifier.parameters()), "weight_decay": 0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.8, weight_decay=1e-4)
    assert (momentum_text(optimizer), weight_decay_factors(optimizer)) == ("0.8", (1e-4,))
    optimizer.param_groups[1].update(momentum=0.9, nesterov=True, dampening=0.1, weight_decay=2.0)
    assert momentum_text(optimizer) == "0.8 and 0.9, Nesterov, dampening 0.1"
    assert weight_decay_factors(optimizer) == (1e-4, 2.0)
    optimizer.param_groups[1]["weight_decay"] = 0
    some, every = decayed_parameters(optimizer)
    assert every - some == 2 and every == len(list(network.parameters()))


def test_a_difference_that_rounding_hides_is_shown_in_full():
    config = load_config(DENSENET121, {"optim.lr": "0.1000001"})
    (row,) = differences(audit(config, 4))
    assert (row.paper, row.here) == ("0.1", "0.1000001")


def test_the_order_of_milestones_does_not_matter():
    assert differences(audit(load_config(DENSENET121, {"optim.milestones": (60, 30)}), 4)) == []


def test_every_field_that_shapes_a_result_is_audited():
    """A new field of these sections must either be audited or be named here."""
    harmless = {
        "data.dir", "data.train", "data.val", "data.val_labels", "data.threads", "data.synthetic_images",
        "data.synthetic_classes", "data.download", "data.hw_decoder_load", "data.file_column", "data.label_column",
        "optim.fused", "optim.min_lr", "optim.poly_power", "optim.grad_accum_steps", "model.dense_block",
        "model.activation_checkpointing", "model.weights_sha256", "data.from_weights",
        "data.erasing_scale", "data.erasing_ratio", "data.erasing_fill",  # in the row of data.random_erasing
        "data.train_crop_milestones",  # in the row of data.train_crop_size
        "data.randaugment_ops", "data.randaugment_magnitude", "data.randaugment_magnitude_std",
        "data.warp_interpolation",  # in the row of data.auto_augment
        "data.mix_prob", "data.mix_switch_prob",  # in the row of data.mixup_alpha
        "optim.bce_target_threshold",  # in the row of optim.objective
        "data.labels",  # which optim.objective belongs to: test_label_table.py
        "optim.large_batch",  # what it changes, optim.lr and warmup_epochs, is audited
        "data.channels", "data.depth",  # with other means: test_gray_images.py
    }  # fmt: skip
    audited = {key for key, _ in DEPARTURES + DEPARTURES_OF_TABLE2}
    fields = {
        key
        for key in flatten(dataclasses.asdict(load_config(DENSENET121)))
        if key.split(".")[0] in ("model", "data", "optim")
    }
    assert fields == audited - {"train.precision", "train.ema_decay"} | harmless


def test_the_command_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["audit", str(DENSENET121), "--ranks", "8", "--data.interpolation", "pil-bilinear"])
    main()
    printed = capsys.readouterr().out
    assert "Differs from the paper in 2 of" in printed and "| DIFFERS | known: top-1 accuracy" in printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1


def test_a_statistic_that_changes_within_an_epoch_says_so():
    parts = ((0.0, (64, 64)), (1.25, (32, 32)), (2.0, (16, 16)))
    assert statistics_text(parts) == "64, 32 from within epoch 2 on, 16 from epoch 3 on"


def test_ranks_that_cannot_share_a_batch_are_refused(user_error):
    for ranks in (3, 512):
        assert f"256 cannot be split evenly over {ranks} ranks" in user_error(main, DENSENET121, "--ranks", ranks)


def test_the_verdict_in_one_line_names_what_differs():
    rows = audit(load_config(DENSENET121), microbatches=8)
    assert in_one_line(rows) == "differs from the paper in images in a batch-norm statistic (32; paper 64)"
    assert "The same as the paper" in to_markdown(audit(load_config(DENSENET121), microbatches=4), "title")


def test_a_path_with_a_bar_stays_in_its_cell():
    config = load_config(DENSENET121, {"model.weights": "a|b.pth", "model.weights_sha256": "0" * 64})
    (row,) = (line for line in to_markdown(audit(config, microbatches=4), "title").splitlines() if "a\\|b.pth" in line)
    assert row.count("|") - row.count("\\|") == 6


@pytest.mark.parametrize(("weights", "same"), [(2_400, True), (10**6, False), (None, False)])
def test_few_weights_may_be_further_from_their_distribution(weights, same):
    """The deviation of 2,400 normal numbers scatters by 1.4 %; files of before do not say how many there were."""
    measured = dataclasses.replace(MEASURED, spread=0.956, weights=weights)
    rows = audit(load_config(DENSENET121), 4, measured)
    (row,) = [row for row in rows if row.part.startswith("initial weights of convolutions")]
    assert row.same == same
