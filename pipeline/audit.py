"""Is a run the paper's? Each part of the paper's setting beside what a configuration does.

Sources: the paper's Sections 3, 4.1 and 4.2, and the Torch code that it names (fb.resnet.torch, liuzhuang13/DenseNet).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import Config, Dataset

IMAGENET_NETWORKS = {"densenet121", "densenet161", "densenet169", "densenet201", "densenet264"}
CIFAR_NETWORKS = {
    "densenet40_k12", "densenet100_k12", "densenet100_k24", "densenet_bc100_k12", "densenet_bc250_k24", "densenet_bc190_k40",
}  # fmt: skip

# Top-1 accuracy of the same ported weights of DenseNet-121/169/201/161, as torchvision, timm and openmixup evaluate
# them and as the paper reports.
RESIZE_EFFECT = (
    "known: top-1 accuracy of DenseNet-121 is 74.43 with pil-bilinear, 74.75 with pil-bicubic, 74.96 without antialias, "
    "74.98 in the paper"
)
BATCH_NORM_IMAGES = 64  # 256 on four GPUs, or 64 on one
UNKNOWN = "effect not measured here"


@dataclass(frozen=True)
class AuditRow:
    """One part of the setting. `effect` says what a difference is known to matter; empty where there is none."""

    part: str
    paper: str
    here: str
    same: bool
    effect: str


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
)


def _cifar(
    name: str, dataset: Dataset, mean: tuple[float, float, float], std: tuple[float, float, float], holdout: int = 0
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
    )
    return plain, replace(plain, name=f"{name}+", dropout=0.0, data={**data, **size, "padding": 4, "hflip": True})


# Mean and standard deviation as fb.resnet.torch has them, in 1/255: datasets/cifar10.lua and cifar100.lua.
C10, C10_PLUS = _cifar("C10", "cifar10", (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616))
C100, C100_PLUS = _cifar("C100", "cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
# Pixels are divided by 255 and no more; the best epoch is chosen on 6,000 training images.
SVHN = replace(_cifar("SVHN", "svhn", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), holdout=6000)[0], epochs=40)


def setting_for(config: Config) -> PaperSetting:
    """The paper's setting that a configuration is nearest to, by its data set and augmentation.

    Folders of images are ImageNet's, but those for a network of small images are the data set's whose mean is subtracted.
    """
    data = config.data
    augmented = data.hflip or data.train_crop == "random_resized_crop" or data.padding > 0
    small = (C10_PLUS, C100_PLUS, SVHN) if augmented else (C10, C100, SVHN)
    if data.dataset != "images":
        named = [setting for setting in small if setting.data["dataset"] == data.dataset]
    elif re.fullmatch(r"densenet.*_k\d+", config.model.name):
        named = [setting for setting in small if setting.data["mean"] == data.mean]
    else:
        return IMAGENET
    return named[0] if named else small[0]


def audit(config: Config, parts: int) -> list[AuditRow]:
    """Compare a configuration with the paper.

    Args:
        parts: ranks times accumulation, into which a batch is cut; a batch-norm statistic sees one part.
    """
    setting, optim, data = setting_for(config), config.optim, config.data
    rows: list[AuditRow] = []

    def compare(part: str, paper: Any, here: Any, effect: str = UNKNOWN, same: bool | None = None) -> None:
        same = here == paper if same is None else same
        rows.append(AuditRow(part, _text(paper), _text(here), same, "" if same else effect))

    name = config.model.name
    compare("network", "one of the paper's", name, "another network", name in setting.networks)
    init = "N(0, sqrt(2 / fan-out))" if not name.startswith("timm:") else "timm's"
    compare("initial weights of convolutions", "N(0, sqrt(2 / fan-out))", init)
    compare("dropout", setting.dropout, config.model.dropout, "the paper uses 0.2 where it does not augment")

    compare("epochs", setting.epochs, optim.epochs)
    compare(
        "batch", setting.batch, optim.batch_size, "changes the noise of the gradient: the learning rate belongs to it"
    )
    compare(
        "images in a batch-norm statistic",
        BATCH_NORM_IMAGES,
        optim.batch_size // parts,
        "forced by the number of ranks: use as many as make it equal, or optim.grad_accum_steps",
    )
    compare("last, smaller batch of an epoch", "kept, mean over its images", "kept, mean over its images")
    compare("learning rate", 0.1, optim.lr)
    paper_drops = _text(tuple(round(drop * setting.epochs) for drop in setting.drops))
    own_drops = tuple(milestone / optim.epochs for milestone in optim.milestones)
    by_steps = f"times {optim.lr_gamma} at epochs {_text(optim.milestones)} of {optim.epochs}"
    compare(
        "learning-rate schedule",
        f"times 0.1 at epochs {paper_drops} of {setting.epochs}",
        by_steps if optim.schedule == "step" else f"{optim.schedule} over {optim.epochs} epochs",
        same=optim.schedule == "step" and optim.lr_gamma == 0.1 and _near(setting.drops, own_drops),
    )
    compare("warm-up epochs", 0.0, optim.warmup_epochs)
    compare("momentum", "0.9, Nesterov", f"{optim.momentum}{', Nesterov' if optim.nesterov else ''}")
    compare("weight decay", 1e-4, optim.weight_decay)
    compare("weight decay applies to", "every parameter", "every parameter")
    compare("label smoothing", 0.0, optim.label_smoothing)
    compare("precision", "fp32", config.train.precision)

    real = data.loader != "synthetic"
    compare(
        "images", "photographs", "photographs" if real else "synthetic", "no result on synthetic images is one", real
    )
    for field, paper in setting.data.items():
        here = getattr(data, field)
        compare(_LABELS[field], paper, here, same=_near(paper, here))
    if setting is IMAGENET:
        # DALI repeats the edge of a crop that it enlarges where Torch7 extrapolates: tools.lab.loader shows by how little.
        compare("resize filter, training and evaluation", "torch7-bicubic", data.interpolation, RESIZE_EFFECT)
    return rows


def differences(rows: list[AuditRow]) -> list[AuditRow]:
    """The rows in which a run is not the paper's."""
    return [finding for finding in rows if not finding.same]


def in_one_line(rows: list[AuditRow]) -> str:
    """The verdict, naming what differs."""
    odd = [f"{f.part} ({f.here}; paper {f.paper})" for f in differences(rows)]
    return f"differs from the paper in {', '.join(odd)}" if odd else "the paper's recipe in every part"


def to_markdown(rows: list[AuditRow], title: str) -> str:
    """A heading, the verdict, and a table."""
    odd = differences(rows)
    verdict = (
        "The same as the paper in every part."
        if not odd
        else f"Differs from the paper in {len(odd)} of {len(rows)} parts."
    )
    header = ("part", "the paper", "here", "", "what a difference matters")
    rows = [(f.part, f.paper, f.here, "same" if f.same else "DIFFERS", f.effect) for f in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [_row(header, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join([f"# {title}", "", verdict, "", *lines, *(_row(row, widths) for row in rows), ""])


_LABELS: dict[str, str] = {
    "dataset": "data set",
    "holdout": "training images held out for validation",
    "train_crop": "training crop",
    "padding": "training crop: pixels of padding",
    "hflip": "mirroring",
    "scale": "training crop: area",
    "ratio": "training crop: aspect",
    "crop_size": "crop size",
    "resize_size": "evaluation: short side",
    "mean": "mean that is subtracted",
    "std": "standard deviation that divides",
    "color_jitter": "brightness, contrast, saturation",
    "pca_noise": "PCA lighting",
}


def _near(a: Any, b: Any) -> bool:
    if isinstance(a, str):
        return a == b
    a, b = (value if isinstance(value, tuple) else (value,) for value in (a, b))
    return len(a) == len(b) and all(abs(x - y) < 1e-6 for x, y in zip(a, b, strict=True))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_text(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
