"""Command-line arguments that name weights and how their images are prepared, and reading what they name."""

import dataclasses
import itertools
import sys
import typing
from argparse import Namespace
from pathlib import Path

from pipeline.command import ArgumentParser
from pipeline.config import Interpolation
from pipeline.config_file import from_dict
from pipeline.errors import UserError
from pipeline.followers import resize_with
from pipeline.preprocessing import PREPROCESSING, assumption, mirrored_views
from pipeline.weights import Weights, read_weights


def add_weights_arguments(parser: ArgumentParser, several: bool = False) -> None:
    """Add the arguments that `read_weights_of` uses."""
    text = "a run's directory (its best checkpoint), a checkpoint, or a .safetensors, .pth or .pt file from elsewhere"
    parser.add_argument("weights", nargs="+" if several else None, metavar="WEIGHTS", help=text)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="network of weights from elsewhere, such as timm:resnet50 [recognised if it is one of the paper's]",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="class names, one a line, in the order of the outputs [the weights' own, or ImageNet's]",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        default=None,
        help="use the exponential moving average of the weights, where a file holds one beside them [of a checkpoint what "
        "best.pt is chosen by, train.best_by; of a file from elsewhere its state_dict]",
    )
    parser.add_argument(
        "--no-ema", dest="ema", action="store_false", default=None, help="use the raw weights, where a file holds both"
    )


def add_preprocessing_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that say how images are prepared, in place of what the weights say or of what is assumed."""
    parser.add_argument(
        "--interpolation", choices=typing.get_args(Interpolation), help="filter of the resize [the weights' own]"
    )
    parser.add_argument(
        "--resize-size",
        type=int,
        metavar="PIXELS",
        help="short side of the resized image [the weights' own, or in its ratio to --crop-size]",
    )
    parser.add_argument("--crop-size", type=int, metavar="PIXELS", help="side of the crop [the weights' own]")
    parser.add_argument(
        "--mean", type=_numbers, metavar="R,G,B", help="mean for the normalisation, each in [0, 1] [the weights' own]"
    )
    parser.add_argument(
        "--std", type=_numbers, metavar="R,G,B", help="standard deviation for the normalisation [the weights' own]"
    )


def read_weights_of(options: Namespace, file: str) -> Weights:
    """Read one of the files that the command line names, and report what is assumed of how its images are prepared, and
    views that its network does not know."""
    names = None
    if options.classes:
        try:
            lines = Path(options.classes).read_text(encoding="utf-8-sig").splitlines()
            names = tuple(line.strip() for line in lines if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --classes {options.classes}: {error}") from None
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(f"--classes {options.classes} has '{twice}' twice: give each output a name of its own")
    weights = _prepared_as_given(read_weights(file, options.model, names, options.ema), options)
    warn_of_assumption(file, weights, "--" if hasattr(options, "mean") else "")
    if text := mirrored_views(file, weights.config, getattr(options, "crops", 1), "--crops 1"):
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return weights


def warn_of_assumption(file: str, weights: Weights, prefix: str = "") -> None:
    """Report on stderr what is assumed of how the images of weights are prepared; `prefix` as of `assumption`."""
    config = dataclasses.replace(weights.config, data=weights.data)
    if text := assumption(file, config, weights.assumed, prefix):
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _prepared_as_given(weights: Weights, options: Namespace) -> Weights:
    """The weights with the options of `add_preprocessing_arguments`."""
    given = {name: value for name in PREPROCESSING if (value := getattr(options, name, None)) is not None}
    own = weights.config.data
    if "crop_size" in given and "resize_size" not in given:  # as in a run's configuration
        given["resize_size"] = resize_with(given["crop_size"], own.crop_size, own.resize_size)
    for name in {"mean", "std"} & given.keys():
        if len(given[name]) == 1 and own.channels == 3:
            given[name] = given[name] * 3
    tree = dataclasses.asdict(weights.config)
    tree["data"] |= given
    data = from_dict(tree, "the command line").data
    assumed = tuple(name for name in weights.assumed if name not in given)
    return dataclasses.replace(weights, given={name: getattr(data, name) for name in given}, assumed=assumed)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def names_of_files(files: list[str]) -> list[str]:
    """A name for each file: its own, of a run's checkpoints with the run's before it; numbered if that is not enough."""
    names: list[str] = []
    for path in (Path(file).resolve() for file in files):
        name = f"{path.parent.parent.name}-{path.stem}" if path.parent.name == "checkpoints" else path.stem
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        names.append(name if name not in names else next(free for free in numbered if free not in names))
    return names
