"""Is a run what the source of its recipe did? The fields of published recipes, beside those of a configuration.

A configuration names its recipe in ``published.recipe``. What a recipe does not name must be as the defaults are.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.audit import UNKNOWN, AuditRow
from pipeline.config import Config
from pipeline.errors import UserError, look_up
from pipeline.parsing import flatten, value_text

# Fields that say where things are and how they are computed, and which network: a recipe is of none.
OUTSIDE = {
    "model.name", "model.dense_block", "model.activation_checkpointing", "model.weights_sha256", "data.dir", "data.train",
    "data.val", "data.val_labels", "data.download", "data.loader", "data.threads", "data.hw_decoder_load",
    "data.file_column", "data.label_column", "data.from_weights", "data.synthetic_images", "data.synthetic_classes",
    "optim.fused", "optim.grad_accum_steps",
}  # fmt: skip
OF_TRAINING = ("train.precision", "train.ema_decay")  # of that section, what shapes a result


@dataclass(frozen=True)
class Recipe:
    """A published recipe.

    Attributes:
        source: where it is from.
        ranks: into how many parts it divides a batch: GPUs times gradient accumulation steps.
        fields: the fields, by key, in which it is not the defaults.
        elsewhere: parts that no value of a field here is: what the source does, and the field that is in its place, or words
            where there is no field.
        batch_norms: whether its networks have any.
    """

    source: str
    ranks: int
    fields: Mapping[str, Any]
    elsewhere: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    batch_norms: bool = True


_FILTERS = ("Pillow's bicubic; in training bilinear or bicubic at random", "data.interpolation")
_MIXED = ("with the batch in reverse order, with one share", "data.mixup_alpha")
_CROPS = (
    "logarithm of the aspect uniform; else the center, squeezed",
    "aspect uniform, turned by chance; else the center, cut",
)
_WARPS = ("bilinear or bicubic at random", "data.warp_interpolation")
_LAST_BATCH = ("left out where it is not whole", "trained on")
_WARM_UP = ("from epoch to epoch; the cosine counts them", "optim.warmup_epochs")  # of timm's scheduler
# What the recipes of timm's script have in common.
_OF_TIMM = {
    "data.resize_size": 235,
    "data.auto_augment": "randaugment-timm",
    "data.randaugment_magnitude": 7,
    "data.randaugment_magnitude_std": 0.5,
    "data.color_jitter": 0.0,
    "data.pca_noise": 0.0,
    "data.cutmix_alpha": 1.0,
    "optim.decay_norms": False,
    "optim.schedule": "cosine",
    "optim.min_lr": 1e-6,
    "train.precision": "fp16",
}
_STRIKES_BACK = {
    **_OF_TIMM,
    "optim.batch_size": 2048,
    "optim.objective": "binary_cross_entropy",
    "optim.bce_target_threshold": 0.2,
    "optim.optimizer": "lamb",
    "optim.lr": 5e-3,
    "optim.weight_decay": 0.02,
}


def _strikes_back(procedure: str, fields: Mapping[str, Any]) -> Recipe:
    """A procedure of "ResNet strikes back" (Wightman et al. 2021), Table 2."""
    return Recipe(
        source=f"ResNet strikes back {procedure}",
        ranks=4,
        fields={**_STRIKES_BACK, **fields},
        elsewhere={
            "resize filter": _FILTERS,
            "training crop": _CROPS,
            "warp filter": _WARPS,
            "last batch": _LAST_BATCH,
            "mixup": (f"alpha {fields.get('data.mixup_alpha', 0.1)}, {_MIXED[0]}", _MIXED[1]),
            "warm-up epochs": (f"5, {_WARM_UP[0]}", _WARM_UP[1]),
        },
    )


RECIPES: dict[str, Recipe] = {
    "paddleclas": Recipe(
        source="PaddleClas",
        ranks=4,
        fields={
            "optim.epochs": 120,
            "optim.milestones": (30, 60, 90),
            "optim.nesterov": False,
            "data.color_jitter": 0.0,
            "data.pca_noise": 0.0,
        },
        elsewhere={
            "resize filter": ("OpenCV's bilinear, without antialias", "data.interpolation"),
            "training crop": ("one draw, its area cut off at what fits", "ten tries, else the center"),
            "initial weights": ("normal, variance 2 / inputs", "normal, variance 2 / outputs"),
        },
    ),
    "rsb-a1": _strikes_back(
        "A1",
        {
            "model.drop_path": 0.05,
            "data.aug_repeats": 3,
            "data.mixup_alpha": 0.2,
            "optim.epochs": 600,
            "optim.weight_decay": 0.01,
            "optim.label_smoothing": 0.1,
            "optim.bce_target_threshold": None,  # one would undo the smoothing
        },
    ),
    "rsb-a2": _strikes_back("A2", {"model.drop_path": 0.05, "data.aug_repeats": 3, "optim.epochs": 300}),
    "rsb-a3": _strikes_back(
        "A3",
        {"data.train_crop_size": (160,), "data.randaugment_magnitude": 6, "optim.epochs": 100, "optim.lr": 8e-3},
    ),
    "rdnet": Recipe(
        source="DenseNets Reloaded",
        ranks=8,  # 4 GPUs, 2 accumulation steps
        fields={
            **_OF_TIMM,
            "model.drop_path": 0.15,
            "data.resize_size": 248,
            "data.randaugment_magnitude": 9,
            "data.random_erasing": 0.25,
            "data.erasing_fill": "noise",
            "optim.epochs": 300,
            "optim.batch_size": 512,
            "optim.optimizer": "adamw",
            "optim.lr": 1e-3,
            "optim.weight_decay": 0.05,
            "optim.label_smoothing": 0.1,
        },
        elsewhere={
            "resize filter": _FILTERS,
            "training crop": _CROPS,
            "warp filter": _WARPS,
            "last batch": _LAST_BATCH,
            "random erasing": ("0.25, after mixing", "data.random_erasing"),
            "mixup": (f"alpha 0.8, {_MIXED[0]}", _MIXED[1]),
            "warm-up epochs": (f"20, from 0.0001 {_WARM_UP[0]}", _WARM_UP[1]),
        },
        batch_norms=False,
    ),
}


def recipe_of(config: Config) -> Recipe:
    """The recipe that a configuration names.

    Raises:
        UserError: it names none, or one that is not known.
    """
    if not config.published.recipe:
        raise UserError(f"the configuration names no recipe: set published.recipe to one of {', '.join(RECIPES)}")
    return look_up(RECIPES, config.published.recipe, "published.recipe")


def audit_recipe(config: Config, ranks: int) -> list[AuditRow]:
    """Compare a run on so many ranks with the recipe that it names, field by field."""
    recipe, here = recipe_of(config), flatten(dataclasses.asdict(config))
    theirs = flatten(dataclasses.asdict(Config())) | dict(recipe.fields)
    said_elsewhere = {key for _, key in recipe.elsewhere.values()}
    rows: list[AuditRow] = []

    def compare(part: str, source: Any, own: Any) -> None:
        rows.append(
            AuditRow(part, value_text(source), value_text(own), source == own, "" if source == own else UNKNOWN)
        )

    for key, value in theirs.items():
        shapes_a_result = key.startswith(("model.", "data.", "optim.")) or key in OF_TRAINING
        if shapes_a_result and key not in OUTSIDE | said_elsewhere:
            compare(key, value, here[key])
    if recipe.batch_norms:
        microbatches = ranks * config.optim.grad_accum_steps
        statistic = theirs["optim.batch_size"] // recipe.ranks
        compare("images in a batch-norm statistic", statistic, config.optim.batch_size // microbatches)
    for part, (does, key) in recipe.elsewhere.items():
        compare(part, does, here.get(key, key))
    return rows
