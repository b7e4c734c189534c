"""Names that configurations had in earlier versions, and what other training scripts call our fields.

Files that a run has stored are read under their old names. In a user's file and on the command line an old name is
refused with the new one, until the next release.
"""

from collections.abc import Mapping
from typing import Any

KEYS = {
    "model.recompute": "model.activation_checkpointing",
    "data.resize": "data.interpolation",
    "data.training_crop": "data.train_crop",
    "data.crop_area": "data.scale",
    "data.crop_aspect": "data.ratio",
    "data.mirror": "data.hflip",
    "data.lighting": "data.pca_noise",
    "optim.accumulation": "optim.grad_accum_steps",
    "optim.lr_drop": "optim.lr_gamma",
    "train.hang_seconds": "train.heartbeat_timeout",
    "train.channels_last": "train.memory_format",
    "train.elastic": "train.allow_world_size_change",
    "train.reuse_every": "train.pictures_every",
}

VALUES = {  # truth values as YAML has them
    "model.dense_block": {"plain": "eager", "lean": "memory_efficient"},
    "data.interpolation": {"torch": "torch7-bicubic"},
    "data.train_crop": {"area": "random_resized_crop", "pad": "random_crop"},
    "train.compile": {"true": "default", "false": "none"},
    "train.memory_format": {"true": "channels_last", "false": "contiguous"},
}

# Flags and keys of timm, torchvision's references and others, with what to use here.
ELSEWHERE = {
    "learning_rate": "--optim.lr",
    "batch": "--optim.batch_size",
    "arch": "--model.name",
    "model": "--model.name",
    "pretrained": "--model.weights",
    "initial_checkpoint": "--model.weights",
    "finetune": "--model.weights",
    "workers": "--data.threads",
    "num_workers": "--data.threads",
    "wd": "--optim.weight_decay",
    "opt": "--optim.optimizer",
    "sched": "--optim.schedule",
    "lr_scheduler": "--optim.schedule",
    "lr_step_size": "--optim.milestones",
    "decay_epochs": "--optim.milestones",
    "img_size": "--data.crop_size",
    "input_size": "--data.crop_size",
    "train_crop_size": "--data.train_crop_size",
    "val_crop_size": "--data.crop_size",
    "val_resize_size": "--data.resize_size",
    "init": "--model.weights",
    "gpus": "start one process a GPU: torchrun --nproc-per-node N -m pipeline.train, or python -m launch --gpus-per-node N",
    "amp": "--train.precision bf16",
    "data": "--data.dir",
    "data_path": "--data.dir",
    "data_dir": "--data.dir",
    "output": "--run_dir",
    "output_dir": "--run_dir",
    "resume": "a run resumes by itself: start the same command again",
    "aa": "--data.auto_augment",
    "ra_reps": "--data.aug_repeats",
    "reprob": "--data.random_erasing",
    "random_erase": "--data.random_erasing",
    "grad_clip": "--optim.clip_grad_norm",
    "clip_grad": "--optim.clip_grad_norm",
    "mixup": "--data.mixup_alpha",
    "cutmix": "--data.cutmix_alpha",
    "mixup_prob": "--data.mix_prob",
    "mixup_switch_prob": "--data.mix_switch_prob",
    "smoothing": "--optim.label_smoothing",
    "bce_loss": "--optim.objective binary_cross_entropy",
    "bce_target_thresh": "--optim.bce_target_threshold",
    "model_ema": "--train.ema_decay",
    "model_ema_decay": "--train.ema_decay",
    "loss": "--optim.objective, one of pipeline/objective.py",
}


def upgrade(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration, nested dictionaries, under today's names and values."""
    new: dict[str, Any] = {}
    for section, fields in tree.items():
        if not isinstance(fields, dict):
            new[section] = fields
            continue
        new[section] = {}
        for name, value in fields.items():
            key = KEYS.get(f"{section}.{name}", f"{section}.{name}")
            new[section][key.partition(".")[2]] = value_of_today(VALUES.get(key, {}), value) or value
    return new


def value_of_today(values: Mapping[str, str], value: Any) -> str | None:
    """The new name of a value that `values` has; None if it has none."""
    text = str(value).lower() if isinstance(value, bool) else value
    return values.get(text) if isinstance(text, str) else None
