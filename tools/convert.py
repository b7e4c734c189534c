"""Weights of any origin as one file for all: ``python -m tools.convert WEIGHTS OUTPUT.safetensors``.

Reads checkpoints of this project and the weights of torchvision, timm, openmmlab and ports of the Torch code. The file has
torchvision's names, which torchvision and timm load as they are, and as metadata how images are prepared, the class names
and how the training differed from the paper's. An OUTPUT.pth is a bare state dictionary for torch.load.
"""

import itertools
from argparse import Namespace
from pathlib import Path

from pipeline.errors import ArgumentParser, UserError, exit_on_user_error
from pipeline.weights import Weights, read_weights, write_safetensors, write_torch
from tools.facts import parameters
from tools.measuring import writable_file

WRITERS = {".safetensors": write_safetensors, ".pth": write_torch}


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.convert", description=__doc__)
    add_weights_arguments(parser)
    parser.add_argument("output", metavar="OUTPUT", help="a file that ends in .safetensors or .pth")
    options = parser.parse_args()
    output = writable_file(options.output, "OUTPUT", WRITERS)
    weights = read_weights_of(options, options.weights)
    WRITERS[output.suffix](weights, output)
    print(f"{describe(weights)}: {output}")


def add_weights_arguments(parser: ArgumentParser, several: bool = False) -> None:
    """Add what `read_weights_of` reads."""
    text = "a checkpoint, or a .safetensors, .pth or .pt file of anyone"
    parser.add_argument("weights", nargs="+" if several else None, metavar="WEIGHTS", help=text)
    parser.add_argument(
        "--model", metavar="NAME", help="network of external weights, as timm:resnet50 [found if it is the paper's]"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="names of the outputs, one a line [the file's, or ImageNet's]"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the running average of the weights, if an external file has it"
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


def describe(weights: Weights) -> str:
    note = f" ({weights.note})" if weights.note else ""
    return (
        f"{weights.config.model.name}, {parameters(weights.network):,} parameters, {len(weights.classes)} classes{note}"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
