"""What a run is: frozen dataclasses, filled from a YAML file and from the command line.

Every field can be given in the file (``optim: {lr: 0.2}``) and on the command line (``--optim.lr 0.2``,
which wins). Both are validated by the same types; a mistake is one line naming the key or the flag.
"""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from pipeline.errors import ArgumentParser, UserError, did_you_mean

_STRICT_KEYS = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the lower limit comes first")
    return limits


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rgb = tuple[float, float, float]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
Resize = Literal["torch", "pil-bilinear", "pil-bicubic"]
Loader = Literal["auto", "dali", "reference", "synthetic"]
Dataset = Literal["images", "cifar10", "cifar100", "svhn", "fashion-mnist"]
TrainingCrop = Literal["area", "pad"]
CorruptImages = Literal["stop", "skip"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
DenseBlock = Literal["auto", "plain", "lean", "fused"]
Recompute = Literal["none", "first", "all"]


@dataclass(frozen=True, config=_STRICT_KEYS)
class ModelConfig:
    name: str = "densenet121"
    """A network of pipeline/models/zoo.py, or timm:NAME."""
    dropout: Fraction = 0.0
    """Probability of dropping a unit after every convolution but the first (the paper: 0.2 without augmentation)."""
    dense_block: DenseBlock = "auto"
    """How our DenseNets compute. plain: module by module; lean: shared statistics, less memory; fused: C++ kernels for
    CPU; auto: fused where it can be, else plain. All give the same result up to rounding."""
    recompute: Recompute = "none"
    """Blocks whose bottlenecks lean and fused compute again in the backward pass, for less memory."""


@dataclass(frozen=True, config=_STRICT_KEYS)
class DataConfig:
    dir: str = "data/imagenet"
    """Folder of the data set."""
    dataset: Dataset = "images"
    """images: files of images, see data.train; else a data set of that name as torchvision keeps it in data.dir."""
    download: bool = False
    """Have torchvision fetch its data set if data.dir lacks it."""
    train: str = "train"
    """Training images, relative to data.dir: CLASS/IMAGE in a folder or tar, or ILSVRC2012_img_train.tar as it is."""
    val: str = "val"
    """Validation images, likewise; or without classes together with data.val_labels, as ILSVRC2012_img_val.tar."""
    val_labels: str | None = None
    """Labels of a flat validation set: a line 'CLASS' for each file in sorted order, lines 'FILE CLASS', or ImageNet's
    development kit (.tar.gz)."""
    loader: Loader = "auto"
    """auto: DALI where it is installed, else reference (PIL). synthetic: generated images, no files."""
    holdout: NonNegative = 0
    """Training images that are held out and validated on in place of data.val: the same whatever the seed."""
    corrupt_images: CorruptImages = "stop"
    """What an image that does not decode does to training. stop: ends it; skip: another of its batch stands in, without
    counting. Evaluation always ends, because an error is over all images."""
    crop_size: Positive = 224
    """Side of the square that the network sees, in pixels."""
    resize_size: Positive = 256
    """Short side to which an image is resized before the evaluation crops, and the training crop "pad", in pixels."""
    resize: Resize = "torch"
    """Resize filter. torch: the paper's (Catmull-Rom, align-corners, no antialias); pil-*: Pillow's, with antialias."""
    training_crop: TrainingCrop = "area"
    """area: a random area and aspect, resized to crop_size (the paper on ImageNet); pad: a random place in the image of
    resize_size with data.padding around it (the paper on CIFAR)."""
    padding: NonNegative = 4
    """Pixels on each side around an image for the training crop "pad"; of the mean colour, so that they become 0."""
    crop_area: PositiveRange = (0.08, 1.0)
    """Range of a random crop's area as a fraction of the image's."""
    crop_aspect: PositiveRange = (3 / 4, 4 / 3)
    """Range of a random crop's aspect ratio."""
    mirror: bool = True
    """Mirror half of the training images."""
    color_jitter: Fraction = 0.4
    """Brightness, contrast and saturation factors are drawn from 1 -+ this; 0 turns the jitter off."""
    lighting: NonNegativeFloat = 0.1
    """Standard deviation of the PCA lighting noise; 0 turns it off."""
    mean: Rgb = (0.485, 0.456, 0.406)
    """Mean that is subtracted from each colour, in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Standard deviation by which each colour is divided."""
    threads: NonNegative = 0
    """Loader threads of each rank; 0: the machine's cores divided among its ranks."""
    synthetic_images: Positive = 1024
    """Number of training images of the synthetic loader (validation: a quarter)."""
    synthetic_classes: Positive = 10
    """Number of classes of the synthetic loader."""

    @model_validator(mode="after")
    def _crop_fits(self) -> "DataConfig":
        if self.resize_size < self.crop_size:
            raise ValueError(f"resize_size ({self.resize_size}) must be at least crop_size ({self.crop_size})")
        return self

    @model_validator(mode="after")
    def _dataset_has_a_loader(self) -> "DataConfig":
        if self.dataset != "images" and self.loader == "synthetic":
            raise ValueError(f"dataset {self.dataset} has images of its own: loader cannot be synthetic")
        if self.dataset != "images" and self.val_labels:
            raise ValueError(f"dataset {self.dataset} has labels of its own: val_labels is for images")
        return self


@dataclass(frozen=True, config=_STRICT_KEYS)
class OptimConfig:
    epochs: Positive = 90
    """Passes over the training set."""
    batch_size: Positive = 256
    """Images of one optimiser step, over all ranks."""
    accumulation: Positive = 1
    """Forward and backward passes of a rank for one optimiser step."""
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    """Learning rate after warm-up."""
    momentum: Fraction = 0.9
    """SGD momentum, without dampening."""
    nesterov: bool = True
    """Nesterov momentum."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty on every parameter, batch-norm and biases included."""
    schedule: Literal["step", "cosine"] = "step"
    """step: lr times lr_drop at each milestone (the paper); cosine: to zero over all epochs."""
    milestones: tuple[NonNegative, ...] = (30, 60)
    """Epochs, counted from 0, at whose start the step schedule drops the learning rate."""
    lr_drop: PositiveFloat = 0.1
    """Factor of each drop of the step schedule."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the learning rate rises linearly from 0 (the paper: none)."""
    label_smoothing: Fraction = 0.0
    """Label smoothing (the paper: none)."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "OptimConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self


@dataclass(frozen=True, config=_STRICT_KEYS)
class TrainConfig:
    device: Device = "auto"
    """auto: CUDA where there is a GPU."""
    precision: Precision = "fp32"
    """fp32 (the paper), tf32, or autocast to bf16 or fp16 (with loss scaling)."""
    channels_last: bool = True
    """Keep feature maps in NHWC order."""
    compile: bool = False
    """Compile the network with torch.compile."""
    eval_batch_size: Positive = 64
    """Images a rank evaluates at once."""
    log_every: Positive = 20
    """Steps between two log lines."""
    reuse_every: NonNegative = 10
    """Epochs between two pictures of feature reuse (the paper's Figure 5) in TensorBoard; 0: none."""
    checkpoint_every: NonNegative = 0
    """Steps between two checkpoints within an epoch; 0: no such rule."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Minutes between two checkpoints within an epoch; 0: no such rule."""
    hang_seconds: Annotated[int, Field(ge=5)] = 600
    """Seconds without progress after which a run ends and names the rank that the others wait for; more than a step, a
    save or torch.compile takes."""
    elastic: bool = False
    """Let a checkpoint go on with another number of ranks or accumulation: the same batches and augmentation, but
    other batch-norm statistics."""


@dataclass(frozen=True, config=_STRICT_KEYS)
class PublishedConfig:
    """Errors in percent that the paper (or the named source) reports, shown beside the run's own."""

    source: str | None = None
    """Where the figures are from."""
    top1: float | None = None
    """Single-crop top-1 error."""
    top5: float | None = None
    """Single-crop top-5 error."""
    top1_10crop: float | None = None
    """Ten-crop top-1 error."""
    top5_10crop: float | None = None
    """Ten-crop top-5 error."""


@dataclass(frozen=True, config=_STRICT_KEYS)
class Config:
    run_dir: str = ""
    """Folder of the run; a run resumes from what is there. Default: runs/NAME-OF-THE-CONFIG-FILE."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Seed of everything random: initial weights, sample order, augmentation, dropout."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    published: PublishedConfig = PublishedConfig()


_ADAPTER = TypeAdapter(Config)


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"optim.lr": 0.1, ...}``, every leaf of a configuration as `dataclasses.asdict` gives it."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(_ADAPTER.dump_python(config, mode="json"), sort_keys=False)


def from_dict(tree: dict[str, Any], origin: str) -> Config:
    """Build a `Config` from nested dictionaries; `origin` (a file's name) begins the error line."""
    return _validate(tree, lambda key: f"{origin}: '{key}'")


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file and put `overrides` (``{"optim.lr": 0.2}``) over it.

    The file's published errors do not hold for another network or data set.

    Raises:
        UserError: the file is missing or no mapping, a key is unknown, or a value is not of the field's type.
    """
    overrides = overrides or {}
    tree = _read_yaml(Path(path))
    network = tree.get("model", {}).get("name", ModelConfig.name)
    dataset = tree.get("data", {}).get("dataset", DataConfig.dataset)
    if overrides.get("model.name", network) != network or overrides.get("data.dataset", dataset) != dataset:
        tree.pop("published", None)
    for key, value in overrides.items():
        section, _, field = key.rpartition(".")
        target = tree.setdefault(section, {}) if section else tree
        target[field] = value
    config = _validate(tree, lambda key: f"--{key}" if key in overrides else f"{path}: '{key}'")
    return config if config.run_dir else dataclasses.replace(config, run_dir=f"runs/{Path(path).stem}")


def parse_command_line(
    arguments: list[str], program: str, description: str, options: dict[str, dict[str, Any]] | None = None
) -> tuple[Config, argparse.Namespace]:
    """Parse ``CONFIG.yaml [--section.field VALUE ...]``.

    Args:
        arguments: the words after the program's name.
        options: further flags of this program, name -> what `argparse` wants to know of it.

    Returns:
        The configuration, and a namespace with the options.
    """
    usage = "%(prog)s CONFIG.yaml [--section.field VALUE ...]"
    parser = ArgumentParser(prog=program, usage=usage, description=description)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    for name, details in (options or {}).items():
        parser.add_argument(f"--{name}", **details)
    fields = {}
    for title, owner, prefix in _sections():
        group = parser.add_argument_group(title)
        for name, info in owner.__pydantic_fields__.items():
            if dataclasses.is_dataclass(info.annotation):
                continue
            key = prefix + name
            fields[key] = info
            default = info.default if info.default not in ("", None) else "none"
            text = f"{info.description} [{default}]".replace("%", "%%")
            group.add_argument(
                f"--{key}", dest=key, metavar=_type_name(info.annotation), default=argparse.SUPPRESS, help=text
            )
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(
            f"unknown argument {flag}{did_you_mean(flag, [f'--{key}' for key in fields])}; --help lists all"
        )
    overrides = {key: _from_text(getattr(namespace, key), fields[key]) for key in fields if hasattr(namespace, key)}
    return load_config(namespace.config, overrides), namespace


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that gives a key twice, of which YAML would keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _sections() -> list[tuple[str, type, str]]:
    """(title, dataclass, prefix of its keys) for the top level and each section."""
    sections: list[tuple[str, type, str]] = [("run", Config, "")]
    for name, info in Config.__pydantic_fields__.items():
        if dataclasses.is_dataclass(info.annotation):
            sections.append((name, info.annotation, f"{name}."))
    return sections


def _known_keys(section: str) -> list[str]:
    return [
        prefix + name for _, owner, prefix in _sections() if prefix == section for name in owner.__pydantic_fields__
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _UniqueKeys)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:  # a key given twice included
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of sections, as in configs/densenet121.yaml")
    for title, _, prefix in _sections()[1:]:
        if not isinstance(tree.get(title, {}), dict):
            raise UserError(f"{path}: '{title}' must be a mapping of fields, such as {_known_keys(prefix)[0]}")
    return tree


def _validate(tree: dict[str, Any], where: typing.Callable[[str], str]) -> Config:
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as failure:
        error = failure.errors()[0]
        names = [str(part) for part in error["loc"]]
        key = ".".join(names[:2] if names[0] in {title for title, _, _ in _sections()} else names[:1])
        if error["type"] == "unexpected_keyword_argument":
            section = key.rpartition(".")[0]
            known = _known_keys(f"{section}." if section else "")
            raise UserError(f"{where(key)} is not a known key{did_you_mean(key, known)}") from None
        if error["type"] == "value_error":  # of a check above, which names the values
            raise UserError(f"{where(key)}: {error['ctx']['error']}") from None
        raise UserError(f"{where(key)}: {error['msg']} (got {error['input']!r})") from None


def _is_tuple(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple


def _from_text(text: str, field: Any) -> Any:
    """A command-line word as a value that the field's type can validate."""
    if _is_tuple(field.annotation):
        return [part.strip() for part in text.strip("[]() ").split(",") if part.strip()]
    if isinstance(field.annotation, types.UnionType) and text.lower() in ("none", "null"):
        return None
    return text


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "{" + ",".join(typing.get_args(annotation)) + "}"
    if typing.get_origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if isinstance(annotation, types.UnionType):
        return _type_name(typing.get_args(annotation)[0]).upper()
    if _is_tuple(annotation):
        return ",".join(_type_name(part) for part in typing.get_args(annotation) if part is not ...) + (
            ",..." if ... in typing.get_args(annotation) else ""
        )
    return annotation.__name__.upper()
