"""Fields that nothing reads, as long as their part is off, are refused where somebody gives them, and pass elsewhere."""

import dataclasses

import pytest
import yaml

from pipeline.audit import audit
from pipeline.config_file import from_stored, load_config, to_yaml
from pipeline.data.arrays import CLASSES_OF_TORCHVISION
from pipeline.data.loader import IMAGE_PIPELINES
from pipeline.errors import UserError
from pipeline.optim import TIMM
from pipeline.parsing import flatten
from pipeline.resume import Conditions, check_same_run
from pipeline.unused import IN_MEMORY, LOADERS_OF_FILES, SWITCHES, WITHOUT_NESTEROV

BCE = {"optim.objective": "binary_cross_entropy", "optim.bce_target_threshold": 0.2}
ERASING, RANDOM_CROP = {"data.random_erasing": 0.25}, {"data.train_crop": "random_crop"}
ADAMW, CIFAR = {"optim.optimizer": "adamw"}, {"data.dataset": "cifar10"}
# key, another value than the default, what switches it off where the default does not, what switches it on.
CASES = [
    ("model.weights_sha256", "abc", {}, {"model.weights": "a.pth"}),
    ("data.from_weights", ["mean"], {}, {"model.weights": "a.pth"}),
    ("data.train", "other", CIFAR, {}),
    ("data.val", "other", CIFAR, {}),
    ("data.val_labels", "labels.txt", {"data.loader": "synthetic"}, {}),
    ("data.download", True, {}, CIFAR),
    ("train.best_by", "raw", {}, {"train.ema_decay": 0.9}),
    ("data.exif_orientation", True, {"data.loader": "synthetic"}, {}),
    ("data.synthetic_images", 9, {}, {"data.loader": "synthetic"}),
    ("data.synthetic_classes", 9, {}, {"data.loader": "synthetic"}),
    ("data.hw_decoder_load", 0.5, {"data.loader": "native"}, {"data.loader": "dali"}),
    ("data.mix_prob", 0.5, {}, {"data.mixup_alpha": 0.1}),
    ("data.mix_switch_prob", 0.9, {"data.mixup_alpha": 0.1}, {"data.mixup_alpha": 0.1, "data.cutmix_alpha": 1.0}),
    ("data.padding", 3, {}, RANDOM_CROP),
    ("data.scale", [0.5, 1.0], RANDOM_CROP, {}),
    ("data.ratio", [0.5, 1.0], RANDOM_CROP, {}),
    ("data.randaugment_ops", 1, {"data.auto_augment": "trivialaugment"}, {"data.auto_augment": "randaugment"}),
    ("data.randaugment_magnitude", 5, {}, {"data.auto_augment": "randaugment-timm"}),
    ("data.randaugment_magnitude_std", 0.5, {"data.auto_augment": "randaugment"}, {"data.auto_augment": "randaugment-timm"}),
    ("data.warp_interpolation", "nearest", {}, {"data.auto_augment": "trivialaugment"}),
    ("data.erasing_scale", [0.1, 0.2], {}, ERASING),
    ("data.erasing_ratio", [0.5, 2.0], {}, ERASING),
    ("data.erasing_fill", "noise", {}, ERASING),
    ("optim.momentum", 0.8, ADAMW, {"optim.optimizer": "lars"}),
    ("optim.nesterov", False, ADAMW, {}),
    ("optim.fused", False, ADAMW, {}),
    ("optim.decay_norms", False, {"optim.weight_decay": 0}, {}),
    ("optim.milestones", [3], {"optim.schedule": "cosine"}, {}),
    ("optim.lr_gamma", 0.2, {"optim.schedule": "one_cycle"}, {}),
    ("optim.min_lr", 1e-5, {}, {"optim.schedule": "polynomial"}),
    ("optim.poly_power", 2.0, {"optim.schedule": "cosine"}, {"optim.schedule": "polynomial"}),
    ("optim.bce_target_threshold", 0.2, {}, {"optim.objective": "binary_cross_entropy"}),
]  # fmt: skip


def nested(fields: dict) -> dict:
    tree: dict = {}
    for key, value in fields.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def file_of(tmp_path, fields):
    (file := tmp_path / "mine.yaml").write_text(yaml.safe_dump(nested(fields)))
    return file


def test_every_such_field_has_a_case():
    assert sorted(case[0] for case in CASES) == sorted(key for switch in SWITCHES for key in switch.fields)


@pytest.mark.parametrize(("key", "value", "off", "on"), CASES, ids=[case[0] for case in CASES])
def test_a_field_without_its_part_is_refused_where_it_is_given(tmp_path, key, value, off, on):
    needs = next(switch.needs for switch in SWITCHES if key in switch.fields)
    advice = f" does nothing without {needs}: set that, or leave {key} out"
    empty, given = file_of(tmp_path, {}), {key: value}
    with pytest.raises(UserError) as said:
        load_config(empty, {**off, **given})
    assert str(said.value) == f"--{key}{advice}"
    load_config(empty, {**on, **given})
    default = flatten(dataclasses.asdict(load_config(empty)))[key]
    load_config(empty, {**off, key: default})
    file = file_of(tmp_path, {**off, **given})
    with pytest.raises(UserError) as said:
        load_config(file)
    assert str(said.value) == f"{file}: '{key}'{advice}"


def test_the_command_line_may_switch_a_part_of_the_file_off_or_on(tmp_path):
    file = file_of(tmp_path, {**ERASING, "data.erasing_fill": "noise"})
    config = load_config(file, {"data.random_erasing": "0"})
    assert (config.data.random_erasing, config.data.erasing_fill) == (0, "noise")
    assert from_stored(yaml.safe_load(to_yaml(config)), "stored") == config  # such a run resumes
    (stored := tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(stored) == config  # and can be run again from what it stored
    assert load_config(stored, {"model.name": "densenet169"}).data == config.data
    with pytest.raises(UserError, match="--data.erasing_fill does nothing"):
        load_config(stored, {"data.erasing_fill": "noise"})
    assert load_config(file_of(tmp_path, {"data.erasing_fill": "noise"}), ERASING).data.erasing_fill == "noise"
    with pytest.raises(UserError, match="--data.erasing_ratio does nothing"):
        load_config(file, {"data.random_erasing": "0", "data.erasing_ratio": ["0.5", "2"]})


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        (BCE, {"optim.objective": "cross_entropy", "optim.label_smoothing": "0.1"}),
        ({"optim.schedule": "cosine", "optim.min_lr": 1e-3}, {"optim.schedule": "step", "optim.lr": "1e-4"}),
        ({}, {"optim.optimizer": "lars", "optim.momentum": "0"}),
    ],
)
def test_a_field_that_does_nothing_contradicts_no_other(tmp_path, fields, flags):
    load_config(file_of(tmp_path, fields), flags)


def test_a_run_resumes_without_what_did_nothing(tmp_path):
    """As runs of before may have it; with its part on it counts."""
    now = Conditions(classes=["a"], fingerprint="f", images=[1, 1], loader="native", ranks=1)
    file, odd = file_of(tmp_path, {}), {"optim": {"milestones": (10, 20)}, "data": {"erasing_fill": "noise"}}
    state = {"optimizer": {}, "scaler": {}, "progress": {"epoch": 0}, "conditions": dataclasses.asdict(now)}

    def changed(flags):
        config = load_config(file, flags)
        stored = dataclasses.asdict(config)
        return check_same_run(
            state | {"config": {k: stored[k] | odd.get(k, {}) for k in ("optim", "data")}}, config, now
        )

    assert changed({"optim.schedule": "cosine"}) == {}
    with pytest.raises(
        UserError,
        match=r"optim.milestones was 10,20 and is now 30,60; put it back",
    ):
        changed({})
    with pytest.raises(UserError, match=r"data.erasing_fill was noise and is now zero"):
        changed({**ERASING, "optim.schedule": "cosine"})


def test_the_audit_leaves_out_what_does_nothing(tmp_path):
    fields = {"optim.schedule": "polynomial", "optim.poly_power": 2.0, "optim.min_lr": 1e-3}
    fields |= {"data.auto_augment": "randaugment-timm", "data.randaugment_magnitude_std": 0.5}
    file = file_of(tmp_path, fields)
    for flags, here in (
        ({}, {"polynomial of power 2.0 over 90 epochs, down to 0.001", "randaugment-timm, 2 operations, magnitude 9, "
              "with standard deviation 0.5, bilinear"}),
        ({"optim.schedule": "one_cycle", "data.auto_augment": "randaugment"},
         {"one_cycle over 90 epochs", "randaugment, 2 operations, magnitude 9, bilinear"}),
    ):  # fmt: skip
        assert here <= {row.here for row in audit(load_config(file, flags), 4)}


def test_names_are_those_of_the_registries():
    assert set(IN_MEMORY) == set(CLASSES_OF_TORCHVISION)
    assert set(LOADERS_OF_FILES) == {"auto", *IMAGE_PIPELINES} - {"synthetic"}
    assert set(WITHOUT_NESTEROV) == set(TIMM)
