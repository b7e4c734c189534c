"""Fields that do something only while another switches their part on.

To give one while the part is off is a mistake that nothing else would show. A value that is the default passes; so does what a
file gives beside the switch that the command line then turns off, and a file of all fields, as a run stores it: it says what
the run had, not what somebody asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Fields = Mapping[str, Any]

# Names that are known here; an addition of a user's to a registry may read what it wants.
IN_MEMORY = ("cifar10", "cifar100", "svhn", "fashion-mnist")
LOADERS_OF_FILES = ("auto", "native", "dali", "reference")
# timm's optimisers take no Nesterov momentum from here, and of these none at all.
WITHOUT_MOMENTUM = ("adabelief", "adamw", "adan", "adopt", "lamb", "lambc", "lion", "nadamw")
WITHOUT_NESTEROV = (*WITHOUT_MOMENTUM, "larc", "lars", "madgrad", "rmsproptf")


@dataclass(frozen=True)
class Switch:
    """What some fields need.

    Attributes:
        fields: their keys.
        needs: what switches them on, for messages.
        on: whether it is there, among all fields by key.
    """

    fields: tuple[str, ...]
    needs: str
    on: Callable[[Fields], bool]


def _one_of(key: str, *values: str) -> tuple[str, Callable[[Fields], bool]]:
    return f"{key} {' or '.join(values)}", lambda fields: fields[key] in values


def _above_0(key: str) -> tuple[str, Callable[[Fields], bool]]:
    return f"{key} above 0", lambda fields: bool(fields[key])


SWITCHES = (
    Switch(("model.weights_sha256", "data.from_weights"), "model.weights", lambda f: bool(f["model.weights"])),
    Switch(
        ("data.train", "data.val", "data.val_labels", "data.exif_orientation"),
        "data.dataset images and a loader of files",
        lambda f: f["data.dataset"] not in IN_MEMORY and f["data.loader"] != "synthetic",
    ),
    Switch(
        ("data.download",), "data.dataset cifar10 or another of torchvision's", lambda f: f["data.dataset"] != "images"
    ),
    Switch(("train.best_by",), *_above_0("train.ema_decay")),
    Switch(
        ("data.synthetic_images", "data.synthetic_classes"),
        "data.loader synthetic",
        lambda f: f["data.loader"] not in LOADERS_OF_FILES,
    ),
    Switch(
        ("data.hw_decoder_load",),
        "data.loader dali, or auto for files of images",
        lambda f: f["data.loader"] == "dali" or (f["data.loader"] == "auto" and f["data.dataset"] not in IN_MEMORY),
    ),
    Switch(
        ("data.mix_prob",),
        "data.mixup_alpha or data.cutmix_alpha above 0",
        lambda f: bool(f["data.mixup_alpha"] or f["data.cutmix_alpha"]),
    ),
    Switch(
        ("data.mix_switch_prob",),
        "data.mixup_alpha and data.cutmix_alpha above 0",
        lambda f: bool(f["data.mixup_alpha"] and f["data.cutmix_alpha"]),
    ),
    Switch(("data.padding",), *_one_of("data.train_crop", "random_crop")),
    Switch(("data.scale", "data.ratio"), *_one_of("data.train_crop", "random_resized_crop")),
    Switch(
        ("data.randaugment_ops", "data.randaugment_magnitude"),
        *_one_of("data.auto_augment", "randaugment", "randaugment-timm"),
    ),
    Switch(("data.randaugment_magnitude_std",), *_one_of("data.auto_augment", "randaugment-timm")),
    Switch(
        ("data.warp_interpolation",),
        *_one_of("data.auto_augment", "randaugment", "randaugment-timm", "trivialaugment"),
    ),
    Switch(("data.erasing_scale", "data.erasing_ratio", "data.erasing_fill"), *_above_0("data.random_erasing")),
    Switch(
        ("optim.momentum",),
        "an optim.optimizer that has momentum, as sgd",
        lambda f: f["optim.optimizer"] not in WITHOUT_MOMENTUM,
    ),
    Switch(
        ("optim.nesterov", "optim.fused"), "optim.optimizer sgd", lambda f: f["optim.optimizer"] not in WITHOUT_NESTEROV
    ),
    Switch(("optim.decay_norms",), *_above_0("optim.weight_decay")),
    Switch(("optim.milestones", "optim.lr_gamma"), *_one_of("optim.schedule", "step")),
    Switch(("optim.min_lr",), *_one_of("optim.schedule", "cosine", "polynomial")),
    Switch(("optim.poly_power",), *_one_of("optim.schedule", "polynomial")),
    Switch(
        ("optim.bce_target_threshold",),
        "optim.objective binary_cross_entropy",
        lambda f: f["optim.objective"] != "cross_entropy",
    ),
)


def unused_fields(resolved: Fields) -> set[str]:
    """The keys of all fields that do nothing in a run with these fields."""
    return {key for switch in SWITCHES if not switch.on(resolved) for key in switch.fields}


def unused_field(defaults: Fields, file: Fields, overrides: Fields, resolved: Fields) -> tuple[str, str] | None:
    """A field that the file or the command line gives and nothing reads, with what it needs; None if there is none.

    Args:
        defaults: all fields, by key.
        file: those that the file gives, not checked.
        overrides: those that the command line gives, over them.
        resolved: all fields of the run.
    """
    alone = {**defaults, **file}
    stored = all(key in file for key in defaults if not key.startswith("published."))
    for switch in SWITCHES:
        if switch.on(resolved):
            continue
        for key in switch.fields:
            by_flag, by_file = key in overrides, key in file and not stored and not switch.on(alone)
            if (by_flag or by_file) and resolved[key] != defaults[key]:
                return key, switch.needs
    return None


def unused_in_all(key: str, defaults: Fields, runs: Sequence[Fields]) -> str | None:
    """What a field needs that does nothing in any of the runs, each with all its fields by key; None if it does something."""
    switch = next((switch for switch in SWITCHES if key in switch.fields), None)
    if switch and not any(switch.on(fields) or fields[key] == defaults[key] for fields in runs):
        return switch.needs
    return None
