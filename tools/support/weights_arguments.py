"""Command-line arguments that name weights, and reading what they name."""

import itertools
from argparse import Namespace
from pathlib import Path

from pipeline.errors import ArgumentParser, UserError
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


def read_weights_of(options: Namespace, file: str) -> Weights:
    """Read one of the files that the command line names."""
    names = None
    if options.classes:
        try:
            names = tuple(line.strip() for line in Path(options.classes).read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --classes {options.classes}: {error}") from None
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(f"--classes {options.classes} has '{twice}' twice: give each output a name of its own")
    return read_weights(file, options.model, names, options.ema)


def short_names(files: list[str]) -> list[str]:
    """A name for each file: its own, of a run's checkpoints with the run's before it; numbered if that is not enough."""
    names: list[str] = []
    for path in (Path(file).resolve() for file in files):
        name = f"{path.parent.parent.name}-{path.stem}" if path.parent.name == "checkpoints" else path.stem
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        names.append(name if name not in names else next(free for free in numbered if free not in names))
    return names
