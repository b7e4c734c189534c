"""Is a run the paper's? Each part of the paper's setting (paper.py) beside what a configuration does."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from pipeline.config import Config, DataConfig, OptimConfig
from pipeline.measured import Measured
from pipeline.paper import BATCH_NORM_IMAGES, IMAGENET, INTERPOLATION, ON_IMAGENET, TOP1_ON_IMAGENET, setting_for
from pipeline.parsing import flatten
from pipeline.unused import IN_MEMORY, unused_fields
from pipeline.words import agreed, counted, sizes_text

# Top-1 accuracy of the same ported weights of DenseNet-121/169/201/161, as torchvision, timm and openmixup evaluate
# them and as the paper reports.
RESIZE_EFFECT = (
    "known: top-1 accuracy of DenseNet-121 is 74.43 with pil-bilinear, 74.75 with pil-bicubic, 74.96 without antialias, "
    "74.98 in the paper"
)
SPREAD_TOLERANCE = 0.02  # of drawn weights, from their distribution's; of few weights 4 standard errors, which are more
UNKNOWN = "effect not measured here"
# What decides how the learning rate runs from its first value on.
OF_THE_SCHEDULE = {
    f"optim.{field}" for field in ("epochs", "milestones", "schedule", "lr_gamma", "min_lr", "poly_power")
}
# What no image shows where images are generated: they have the size of a crop, and no crop is cut from them.
NOT_OF_SYNTHETIC = {
    f"data.{field}"
    for field in (
        "dataset",
        "train_crop",
        "padding",
        "scale",
        "ratio",
        "resize_size",
        "interpolation",
        "corrupt_images",
    )
}


@dataclass(frozen=True)
class AuditRow:
    """One part of the setting. `effect` says what a difference is known to matter; empty where there is none."""

    part: str
    paper: str
    here: str
    same: bool
    effect: str


def audit(config: Config, microbatches: int, measured: Measured | None = None) -> list[AuditRow]:
    """Compare a run with the paper, in the parts that do something in the run: of one that is off there is no row.

    Args:
        microbatches: ranks times gradient accumulation steps, into which a batch is cut; a batch-norm statistic sees one.
        measured: of the objects that train; without it only what the configuration says is compared.
    """
    setting, optim, data = setting_for(config), config.optim, config.data
    off = unused_fields(flatten(asdict(config))) | (NOT_OF_SYNTHETIC if data.loader == "synthetic" else set())
    rows: list[AuditRow] = []

    def compare(part: str, paper: Any, here: Any, effect: str = UNKNOWN, same: bool | None = None) -> None:
        same = here == paper if same is None else same
        texts = _text(paper), _text(here)
        if not same and texts[0] == texts[1]:  # rounding hides the difference
            texts = _text(paper, exact=True), _text(here, exact=True)
        rows.append(AuditRow(part, *texts, same, "" if same else effect))

    name = config.model.name
    compare("network", f"one of {setting.paper}'s", name, "another network", name in setting.networks)
    if config.model.weights:
        compare("initial weights", "drawn", config.model.weights_text, "fine-tuned: errors cannot be compared")
    elif measured:
        error = 1 / math.sqrt(2 * measured.weights) if measured.weights else 0.0  # of a standard deviation, relative
        usual = abs(measured.spread - 1) < max(SPREAD_TOLERANCE, 4 * error)
        spread = "sqrt(2 / fan-out)" if usual else f"{measured.spread:.3g} sqrt(2 / fan-out)"
        compare("initial weights of convolutions: standard deviation", "sqrt(2 / fan-out)", spread)
    if config.model.freeze is not None:
        compare("parts that do not train", "none", frozen_text(config.model.freeze))
    compare("dropout", setting.dropout, config.model.dropout, "the paper uses 0.2 where it does not augment")
    if config.model.drop_path:
        compare("stochastic depth", 0.0, config.model.drop_path)

    compare("epochs", setting.epochs, optim.epochs)
    compare(
        "batch", setting.batch, optim.batch_size, "changes the noise of the gradient: the learning rate belongs to it"
    )
    each = optim.batch_size // microbatches
    statistics = measured.statistics if measured else ((0, (each, each)),)
    if not measured or measured.batch_norms:
        compare(
            "images in a batch-norm statistic",
            BATCH_NORM_IMAGES,
            statistics_text(statistics),
            _statistics_advice(statistics[-1][1][0], optim.batch_size),
            same=all(sizes == (BATCH_NORM_IMAGES, BATCH_NORM_IMAGES) for _, sizes in statistics),
        )
    if measured:
        last = (measured.images[0] - 1) % optim.batch_size + 1
        kept = "kept" if measured.last_batch == last else f"{measured.last_batch} of its {last} images"
        if not last == measured.last_batch == optim.batch_size:
            compare("last, smaller batch of an epoch", "kept", kept)
    # Fields of which the configuration has the last value alone.
    changed = {text.split()[0] for text in measured.changed} if measured else set()
    at_the_end = " at the end; changed on the way, see below"
    if "optim.lr" in changed:
        compare("learning rate", 0.1, f"{_text(optim.lr)} (optim.lr, before its drops){at_the_end}", same=False)
    else:
        compare("learning rate", 0.1, optim.lr)
    if optim.head_lr is not None:
        compare("learning rate of the classifier", 0.1, optim.head_lr)
    if optim.layer_decay != 1:
        compare("learning rate from part to part", "the same", f"times {optim.layer_decay} towards the images")
    paper_drops = _text(tuple(round(drop * setting.epochs) for drop in setting.drops))
    own_drops = tuple(sorted(milestone / optim.epochs for milestone in optim.milestones))
    by_steps = f"times {optim.lr_gamma} after epochs {_text(optim.milestones)} of {optim.epochs}"
    otherwise = bool(changed & OF_THE_SCHEDULE)
    compare(
        "learning-rate schedule",
        f"times 0.1 after epochs {paper_drops} of {setting.epochs}",
        (by_steps if optim.schedule == "step" else _curve_text(optim)) + at_the_end * otherwise,
        same=optim.schedule == "step" and optim.lr_gamma == 0.1 and _near(setting.drops, own_drops) and not otherwise,
    )
    if optim.schedule != "one_cycle":  # which has a warm-up of its own
        compare("warm-up epochs", 0.0, optim.warmup_epochs)
    configured = f"{optim.momentum}{', Nesterov' if optim.nesterov else ''}"
    if optim.optimizer != "sgd":
        configured = f"as timm's {optim.optimizer} has it"
        compare("optimiser", "sgd", optim.optimizer)
    compare("momentum", "0.9, Nesterov", measured.momentum if measured else configured)
    factors = measured.weight_decay if measured else (optim.weight_decay,)
    compare("weight decay", 1e-4, factors[0] if len(factors) == 1 else factors)
    if measured:
        some, every = measured.decayed
        compare(
            "weight decay applies to",
            "every parameter",
            "every parameter" if some == every else f"{some} of {every} tensors",
        )
    elif not optim.decay_norms:
        compare("weight decay applies to", "every parameter", "neither norms nor biases")
    if optim.clip_grad_norm:
        compare("norm to which gradients are clipped", "none", optim.clip_grad_norm)
    compare("label smoothing", 0.0, optim.label_smoothing)
    if decay := config.train.ema_decay:
        greatest = measured.greatest_decay if measured else None
        most = f" (at most {_decay_text(greatest, decay)} in the run's steps)" if greatest else ""
        by = f"best epoch by the {config.train.best_by} weights"
        compare("moving average of the weights", "none", f"decay {decay}{most}, {by}")
    if data.labels != "single":
        compare(
            "labels of an image", "one", "any number, binary cross-entropy", "another task: errors cannot be compared"
        )
    if optim.class_weights:
        compare("weights of classes in the loss", "equal", optim.class_weights)
    if data.mixes:
        compare("mixed training images", "none", _mixing_text(data))
    if data.labels == "single" and optim.objective != "cross_entropy":
        threshold = (
            "" if optim.bce_target_threshold is None else f", targets above {optim.bce_target_threshold} count as 1"
        )
        compare("loss", "cross_entropy", f"{optim.objective}{threshold}")
    if data.sampling != "shuffle":
        compare("images of an epoch", "each once", "equally many of each class")
    compare("precision", "fp32", config.train.precision)

    real = data.loader != "synthetic"
    compare("images", "real", "real" if real else "synthetic", "no result on synthetic images is one", real)
    if measured:
        compare("training and validation images", setting.images, measured.images, "another data set")
        compare("classes", setting.classes, measured.classes, "another task: errors cannot be compared")
    if data.channels != 3:
        compare("channels of an image", "3", "1 (gray)", "another task: errors cannot be compared")
    if data.depth != 8:
        compare("bits of a pixel's colour", 8, data.depth, "another task: errors cannot be compared")
    if data.exif_orientation:
        compare("images that EXIF data say to turn", "as stored", "turned")
    for field, paper in setting.data.items():
        here = getattr(data, field)
        if f"data.{field}" not in off:
            compare(_LABELS[field], paper, here, same=_near(paper, here))
    if setting in ON_IMAGENET and "data.interpolation" not in off:
        # DALI repeats the edge of a crop that it enlarges where Torch7 extrapolates: tools.lab.loader shows by how little.
        compare("resize filter, training and evaluation", INTERPOLATION, data.interpolation, RESIZE_EFFECT)
    if data.train_crop_size:
        paper_size = setting.data["crop_size"]
        compare("training crop size", paper_size, data.train_sizes_text, same=data.train_sizes == (paper_size,))
    if data.aug_repeats > 1:
        compare("draws of an image in an epoch", 1, f"{data.aug_repeats}, of a part of the images")
    if data.auto_augment != "none":
        compare("RandAugment, TrivialAugment", "none", _auto_augment_text(data))
    if data.cutout:
        compare("cutout", "none", f"{data.cutout} pixels")
    if data.random_erasing:
        box = f"area {_text(data.erasing_scale)}, aspect ratio {_text(data.erasing_ratio)}, filled with {data.erasing_fill}"
        compare("random erasing", "none", f"probability {data.random_erasing:g}, {box}")
    if measured:
        compare(
            "fields changed on the way", "none", ", ".join(measured.changed) or "none", "another recipe from there on"
        )
        if measured.skipped_steps is not None:
            compare("steps left out", 0, measured.skipped_steps, "their loss or gradient was not finite")
    if data.dataset not in IN_MEMORY and "data.corrupt_images" not in off:
        compare(
            "corrupt training images", "none", "none" if data.corrupt_images == "stop" else "left out", "fewer images"
        )
    return rows


def frozen_text(freeze: int) -> str:
    """The parts that ``model.freeze`` keeps as they are."""
    blocks = " and block 1 with its transition" if freeze == 1 else f" and blocks 1 to {freeze} with their transitions"
    return f"the stem{blocks if freeze else ''}"


def differences(rows: list[AuditRow]) -> list[AuditRow]:
    """The rows in which a run is not the paper's."""
    return [row for row in rows if not row.same]


def in_one_line(rows: list[AuditRow], paper: str = "the paper") -> str:
    """The verdict, naming what differs."""
    odd = [f"{row.part} ({row.here}; paper {row.paper})" for row in differences(rows)]
    return f"differs from {paper} in {', '.join(odd)}" if odd else f"{paper}'s recipe in every part"


def count_differences(rows: list[AuditRow], paper: str = "the paper") -> str:
    """The verdict, counting what differs."""
    odd = differences(rows)
    if not odd:
        return f"{paper}'s in every part"
    return f"{len(odd)} of {len(rows)} parts {agreed(len(odd), 'differs', 'differ')} from {paper}"


def is_papers_data(config: Config, classes: int, images: tuple[int, int] | None = None) -> bool:
    """Whether a run's data are those of the setting that it is compared with, as far as their numbers tell.

    Of other data no difference from the paper is worth telling unasked.

    Args:
        images: numbers of training and of validation images; None if they are not known, and the number of classes decides.
    """
    setting, data = setting_for(config), config.data
    if data.loader == "synthetic" or data.labels != "single" or classes != setting.classes:
        return False
    if data.dataset != "images":
        return data.dataset == setting.data["dataset"]
    if images is None:
        return setting in ON_IMAGENET or data.mean == setting.data["mean"]
    return _are_as_many(data, images, setting.images)


def _are_as_many(data: DataConfig, images: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether a run has as many training and validation images, or holds the latter out of as many training images."""
    return images == others or (data.holdout > 0 and sum(images) == others[0])


def published_errors_hold(config: Config, classes: int, images: tuple[int, int] | None = None) -> bool:
    """Whether the errors that a configuration quotes may stand beside the run's: where it names numbers of images, only if
    the run has as many; the paper's on ImageNet only if the images are ImageNet's and are prepared for evaluation as there.

    Args: see `is_papers_data`.
    """
    data, paper, top1 = config.data, IMAGENET.data, config.published.top1
    if config.published.images and not (images and _are_as_many(data, images, config.published.images)):
        return False
    if data.dataset != "images" or top1 is None or top1 != TOP1_ON_IMAGENET.get(config.model.name):
        return True
    same = data.interpolation == INTERPOLATION and all(
        getattr(data, name) == paper[name] for name in ("crop_size", "resize_size")
    )
    return same and is_papers_data(config, classes, images)


def to_markdown(rows: list[AuditRow], title: str, notes: Sequence[str] = (), other: str = "the paper") -> str:
    """A heading, the verdict, a table, and a list of notes."""
    odd = differences(rows)
    verdict = (
        f"The same as {other} in every part."
        if not odd
        else f"Differs from {other} in {len(odd)} of {len(rows)} parts."
    )
    header = ("part", other, "here", "", "what a difference matters")
    cells = [tuple(map(in_cell, (r.part, r.paper, r.here, "same" if r.same else "DIFFERS", r.effect))) for r in rows]
    widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
    lines = [_row(header, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join([f"# {title}", "", verdict, "", *lines, *(_row(row, widths) for row in cells), *_list(notes), ""])


_LABELS: dict[str, str] = {
    "dataset": "data set",
    "holdout": "training images held out for validation",
    "train_crop": "training crop",
    "padding": "training crop: pixels of padding",
    "hflip": "horizontal flip",
    "scale": "training crop: scale (area)",
    "ratio": "training crop: aspect ratio",
    "crop_size": "crop size",
    "resize_size": "evaluation: short side",
    "mean": "mean that is subtracted",
    "std": "standard deviation that divides",
    "color_jitter": "brightness, contrast, saturation",
    "pca_noise": "PCA noise",
}


def _auto_augment_text(data: DataConfig) -> str:
    """The policy of data.auto_augment, with what belongs to it."""
    about: list[str] = [data.auto_augment]
    if data.auto_augment != "trivialaugment":
        about += [f"{data.randaugment_ops} operations", f"magnitude {data.randaugment_magnitude}"]
    if data.auto_augment == "randaugment-timm" and data.randaugment_magnitude_std:
        about.append(f"with standard deviation {data.randaugment_magnitude_std:g}")
    return ", ".join([*about, data.warp_interpolation])


def _near(a: Any, b: Any) -> bool:
    if isinstance(a, str):
        return a == b
    a, b = (value if isinstance(value, tuple) else (value,) for value in (a, b))
    return len(a) == len(b) and all(abs(x - y) < 1e-6 for x, y in zip(a, b, strict=True))


def _curve_text(optim: OptimConfig) -> str:
    """A schedule without milestones in a few words."""
    power = f" of power {optim.poly_power}" if optim.schedule == "polynomial" and optim.poly_power != 1 else ""
    floor = f", down to {optim.min_lr}" if optim.schedule != "one_cycle" and optim.min_lr else ""
    return f"{optim.schedule}{power} over {counted(optim.epochs, 'epoch')}{floor}"


def _mixing_text(data: DataConfig) -> str:
    """Mixup and cutmix in a few words."""
    kinds = [f"{name} {alpha}" for name, alpha in (("mixup", data.mixup_alpha), ("cutmix", data.cutmix_alpha)) if alpha]
    switch = f", cutmix with probability {data.mix_switch_prob}" if len(kinds) == 2 else ""
    return f"{' and '.join(kinds)} with probability {data.mix_prob}{switch}"


def _text(value: Any, exact: bool = False) -> str:
    if isinstance(value, tuple):
        return ", ".join(_text(part, exact) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) and not exact else str(value)


def _decay_text(reached: float, asked: float) -> str:
    """A decay below that which was asked for, rounded up to two significant digits of its distance to 1, or to as many as
    keep it below."""
    distance = 1 - Decimal(str(reached))
    rounded = (
        float(1 - distance.quantize(Decimal(1).scaleb(distance.adjusted() - digits), ROUND_FLOOR))
        for digits in itertools.count(1)
    )
    return str(next(decay for decay in rounded if decay < asked))


def _statistics_advice(images: int, batch_size: int) -> str:
    """What to do about so many images in a batch-norm statistic."""
    if images >= BATCH_NORM_IMAGES:
        return "use more ranks or more optim.grad_accum_steps"
    if images == batch_size:  # which nothing divides
        return "noisier statistics: use a larger optim.batch_size"
    return "noisier statistics: use fewer ranks or fewer optim.grad_accum_steps"


def statistics_text(statistics: tuple[tuple[float, tuple[int, int]], ...]) -> str:
    """The images in a batch-norm statistic: of each part of a run that has other ones than the part before."""
    texts, before = [], None
    for epoch, sizes in statistics:
        if sizes == before:
            continue
        before = sizes
        size = sizes_text(sizes)
        within = "" if epoch == int(epoch) else "within "
        texts.append(f"{size} from {within}epoch {int(epoch) + 1} on" if epoch else size)
    return ", ".join(texts)


def in_cell(text: str) -> str:
    """A text in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _list(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {note}" for note in notes)] if notes else []


def _row(cells: Sequence[str], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
