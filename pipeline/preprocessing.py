"""How images are prepared for a network's weights, where their file says it and where it does not."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from pipeline.config import Config, DataConfig
from pipeline.errors import UserError
from pipeline.models.zoo import cifar_densenet
from pipeline.paper import C10, C100
from pipeline.parsing import value_text

PREPROCESSING = ("resize_size", "crop_size", "interpolation", "mean", "std")  # fields that say how images are prepared
# So called in the files that torchvision offers. Saved again by torchvision, or by timm, which prepares images otherwise, it is
# "norm1".
OFFERED_BY_TORCHVISION = re.compile(r"\bfeatures\.denseblock1\.denselayer1\.norm\.1\.")
TORCHVISIONS_NAME = re.compile(r"\bfeatures\.denseblock1\.denselayer1\.norm\.?1\.")


def mirrored_views(origin: str, config: Config, crops: int, remedy: str) -> str:
    """A line where views are mirror images for a network whose run has mirrored none; empty where that is not so.

    Args:
        origin: the file of the weights.
        config: the run's.
        crops: views of an image.
        remedy: how the caller is asked for one crop.
    """
    if crops == 1 or config.data.hflip:
        return ""
    return (
        f"{origin} was trained without mirror images (data.hflip false), and ten crops are five of the image and five of "
        f"its mirror image: {remedy} takes the centre crop alone"
    )


def assumption(origin: str, config: Config, assumed: Collection[str], prefix: str = "") -> str:
    """A line on what is assumed of how images are prepared, as the flags that say otherwise; empty if nothing is.

    Args:
        origin: the file that does not say it.
        config: has the network and the assumed values.
        assumed: fields of `PREPROCESSING`.
        prefix: of the caller's flags for them, "--" or "--data."; empty if it has none, so that a file must say it.
    """
    if not assumed:
        return ""
    flags = {name: name if prefix == "--data." else name.replace("_", "-") for name in assumed}
    values = " ".join(
        f"{prefix or '--'}{flag} {value_text(getattr(config.data, name))}" for name, flag in flags.items()
    )
    network = config.model.name
    is_torchvisions = config.data.interpolation == "pil-bilinear"
    of_imagenet = "CIFAR's" if _is_for_cifar(network) else "torchvision's" if is_torchvisions else "the paper's"
    whose = "timm's" if network.startswith("timm:") else of_imagenet
    remedy = (
        "give the right ones" if prefix else "python -m tools.convert with the right ones writes a file that says it"
    )
    return (
        f"{origin} does not say how its images are prepared. {whose} preparation is ASSUMED: {values} (if it was another, "
        f"{remedy})"
    )


def for_channels(data: DataConfig, channels: int) -> DataConfig:
    """How images are prepared where they have another number of channels than those that this is for."""
    fields: dict[str, Any] = {name: of_channels(getattr(data, name), channels) for name in ("mean", "std")}
    return dataclasses.replace(data, **fields | {"channels": channels})


def of_channels(numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A mean or standard deviation for another number of channels; a gray image has all colours alike."""
    if len(numbers) == channels:
        return numbers
    return numbers * 3 if channels == 3 else (round(sum(numbers) / len(numbers), 6),)


def preprocessing_of(
    name: str, network: nn.Module, outputs: int, tensors: Iterable[str] = ()
) -> tuple[DataConfig, tuple[str, ...]]:
    """How images are prepared for a network's published weights: as the paper does; as torchvision does, whose filter is
    another, where the tensors are called as in its files; or as timm's configuration says.

    Args:
        outputs: of the classifier in the file.
        tensors: names of the tensors in it.

    Returns:
        It, and the fields of `PREPROCESSING` that are assumed: none of the files that torchvision offers, nor of a network of
        which timm has one set of weights, with as many classes as theirs; else all, as those who trained the weights may have
        prepared images otherwise.

    Raises:
        UserError: timm prepares them in a way that this project does not.
    """
    if _is_for_cifar(name):
        setting = C100 if outputs == 100 else C10
        data = DataConfig(crop_size=32, resize_size=32, mean=setting.data["mean"], std=setting.data["std"])
        return data, PREPROCESSING
    if name.startswith("timm:"):
        about = timm_config(network)
        import timm  # takes seconds to import, and has made the network

        one_set = len(timm.list_models(f"{about['architecture']}.*", pretrained=True)) == 1
        known, data = one_set and outputs == about["num_classes"], preprocessing_of_timm(name, about)
    else:
        names = tuple(tensors)
        is_torchvisions = any(TORCHVISIONS_NAME.search(name) for name in names)
        data = DataConfig(interpolation="pil-bilinear") if is_torchvisions else DataConfig()
        known = outputs == 1000 and any(OFFERED_BY_TORCHVISION.search(name) for name in names)
    return data, () if known else PREPROCESSING


def _is_for_cifar(name: str) -> bool:
    """Whether a network is one for small images."""
    return name.startswith("msdnet_cifar") or cifar_densenet(name) is not None


def preprocessing_of_timm(name: str, about: Mapping[str, Any]) -> DataConfig:
    """As `preprocessing_of`, from timm's description of a network or of its weights."""
    _, height, width = about["input_size"]
    if about.get("crop_mode", "center") != "center" or height != width or about["crop_pct"] > 1:
        raise UserError(
            f"{name} wants images of {height} x {width} pixels, crop mode {about.get('crop_mode')} and crop_pct "
            f"{about['crop_pct']}: only square centre crops are known here"
        )
    return DataConfig(
        crop_size=height,
        resize_size=int(height / about["crop_pct"]),
        interpolation="pil-bilinear" if about["interpolation"] == "bilinear" else "pil-bicubic",
        mean=about["mean"],
        std=about["std"],
    )


def timm_config(network: nn.Module) -> dict[str, Any]:
    """timm's description of the weights that it has for one of its networks."""
    return vars(network)["pretrained_cfg"]
