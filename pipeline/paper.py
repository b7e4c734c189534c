"""What the paper did on each kind of data: the setting that a run is compared with.

Sources: the paper's Sections 3, 4.1 and 4.2, and the Torch code that it names (fb.resnet.torch, liuzhuang13/DenseNet). Runs of
an MSDNet are compared with the MSDNet paper (Huang et al. 2018) and its Torch code (gaohuang/MSDNet).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import Config

IMAGENET_NETWORKS = {"densenet121", "densenet161", "densenet169", "densenet201", "densenet264"}
CIFAR_NETWORKS = {
    "densenet40_k12", "densenet100_k12", "densenet100_k24", "densenet_bc100_k12", "densenet_bc250_k24", "densenet_bc190_k40",
}  # fmt: skip
INTERPOLATION = "torch7-bicubic"
# Single-crop top-1 errors in percent on ImageNet's validation images: the paper's Table 3, of 161 the authors' Torch code.
TOP1_ON_IMAGENET = {
    "densenet121": 25.02, "densenet169": 23.80, "densenet201": 22.58, "densenet264": 22.15, "densenet161": 22.20,
}  # fmt: skip
BATCH_NORM_IMAGES = 64  # 256 on four GPUs, or 64 on one


@dataclass(frozen=True)
class PaperSetting:
    """What the paper did on one kind of data, where the kinds differ."""

    name: str
    networks: Collection[str]
    dropout: float
    ranks: int  # GPUs of the Torch code, which divide the batch
    epochs: int
    batch: int
    drops: tuple[float, ...]  # of the learning rate, as fractions of the epochs
    data: dict[str, Any]  # fields of the data section
    images: tuple[int, int]  # training and validation
    classes: int
    paper: str = "the paper"  # of whom the setting is


IMAGENET = PaperSetting(
    name="ImageNet",
    networks=IMAGENET_NETWORKS,
    dropout=0.0,
    ranks=4,
    epochs=90,
    batch=256,
    drops=(1 / 3, 2 / 3),
    data={
        "dataset": "images",
        "holdout": 0,
        "train_crop": "random_resized_crop",
        "scale": (0.08, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "crop_size": 224,
        "resize_size": 256,
        "hflip": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "color_jitter": 0.4,
        "pca_noise": 0.1,
    },
    images=(1_281_167, 50_000),
    classes=1000,
)


def _cifar(
    name: str,
    dataset: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    holdout: int = 0,
    images: tuple[int, int] = (50_000, 10_000),
    classes: int = 10,
) -> tuple[PaperSetting, PaperSetting]:
    """A small data set without augmentation, and with it (Section 4.1 and 4.2)."""
    data = {"dataset": dataset, "holdout": holdout, "mean": mean, "std": std}
    size = {"crop_size": 32, "resize_size": 32, "color_jitter": 0.0, "pca_noise": 0.0, "train_crop": "random_crop"}
    plain = PaperSetting(
        name=name,
        networks=CIFAR_NETWORKS,
        dropout=0.2,
        ranks=1,
        epochs=300,
        batch=64,
        drops=(1 / 2, 3 / 4),
        data={**data, **size, "padding": 0, "hflip": False},
        images=images,
        classes=classes,
    )
    return plain, replace(plain, name=f"{name}+", dropout=0.0, data={**data, **size, "padding": 4, "hflip": True})


# Mean and standard deviation as fb.resnet.torch has them, in 1/255: datasets/cifar10.lua and cifar100.lua.
C10, C10_PLUS = _cifar("C10", "cifar10", (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616))
C100, C100_PLUS = _cifar("C100", "cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), classes=100)
# Pixels are divided by 255 and no more; the best epoch is chosen on 6,000 training images.
SVHN = replace(
    _cifar("SVHN", "svhn", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), holdout=6000, images=(598_388, 6_000))[0], epochs=40
)


MSDNET_PAPER = "the MSDNet paper"
_MSDNET_SMALL = tuple(
    replace(setting, networks=networks, data={**setting.data, "holdout": holdout}, images=images, paper=MSDNET_PAPER)
    for networks, holdout, images in (
        ({"msdnet_cifar_7", "msdnet_cifar_10"}, 0, (50_000, 10_000)),
        ({"msdnet_cifar_budget_5", "msdnet_cifar_budget_7"}, 5000, (45_000, 5000)),  # held out for the thresholds
    )
    for setting in (C10_PLUS, C100_PLUS)
)
MSDNET_IMAGENET = replace(
    IMAGENET,
    networks={"msdnet_imagenet_4", "msdnet_imagenet_6", "msdnet_imagenet_7"},
    data={**IMAGENET.data, "holdout": 50_000},
    images=(1_231_167, 50_000),
    paper=MSDNET_PAPER,
)
ON_IMAGENET = (IMAGENET, MSDNET_IMAGENET)


def setting_for(config: Config) -> PaperSetting:
    """The paper's setting that a configuration is nearest to, by its data set and augmentation.

    Folders of images are ImageNet's, but those for a network of small images are the data set's whose mean is subtracted.
    """
    data = config.data
    if config.model.name.startswith("msdnet_"):
        return _msdnet_setting(config)
    augmented = data.hflip or data.train_crop == "random_resized_crop" or data.padding > 0
    small = (C10_PLUS, C100_PLUS, SVHN) if augmented else (C10, C100, SVHN)
    if data.dataset != "images":
        named = [setting for setting in small if setting.data["dataset"] == data.dataset]
    elif re.fullmatch(r"densenet.*_k\d+", config.model.name):
        named = [setting for setting in small if setting.data["mean"] == data.mean]
    else:
        return IMAGENET
    return named[0] if named else small[0]


def _msdnet_setting(config: Config) -> PaperSetting:
    """As `setting_for`; the networks for answers at any time and those for a budget differ in what is held out."""
    if config.model.name.startswith("msdnet_imagenet_"):
        return MSDNET_IMAGENET
    budget, data = config.model.name.startswith("msdnet_cifar_budget_"), config.data
    small = _MSDNET_SMALL[2:] if budget else _MSDNET_SMALL[:2]
    return next((s for s in small if data.dataset == s.data["dataset"] or data.mean == s.data["mean"]), small[0])
