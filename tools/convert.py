"""Convert weights for torchvision, timm and others: ``python -m tools.convert WEIGHTS OUTPUT.safetensors``.

Reads checkpoints of this project and weights of torchvision, timm, openmmlab and ports of the Torch code. The output has
torchvision's parameter names; tools/README.md says which networks torchvision and timm have too. Its metadata, which this
project's commands read, says how images are prepared, what the classes are called and how the training differed from the
paper's. An OUTPUT.pth is a state dictionary for torch.load, with the same metadata. With --card FILE all that is written as a
model card too. Where a file does not say how images are prepared, flags say it.
"""

from pipeline.command import ArgumentParser, exit_on_user_error
from pipeline.errors import UserError
from pipeline.weights import Weights, write_safetensors, write_torch
from pipeline.words import counted
from tools.support.facts import parameters
from tools.support.model_card import model_card
from tools.support.outputs import ANY_NAME, in_folder, writable_file
from tools.support.weights_arguments import add_preprocessing_arguments, add_weights_arguments, read_weights_of

WRITERS = {".safetensors": write_safetensors, ".pth": write_torch}


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.convert", description=__doc__)
    add_weights_arguments(parser)
    add_preprocessing_arguments(parser)
    parser.add_argument("output", metavar="OUTPUT", help="a file that ends in .safetensors or .pth")
    parser.add_argument("--card", metavar="FILE", help="write a model card (Markdown)")
    options = parser.parse_args()
    output = writable_file(options.output, "OUTPUT", WRITERS)
    card = writable_file(options.card, "--card") if options.card else None
    weights = read_weights_of(options, options.weights)
    if weights.given and weights.microbatches is not None:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in weights.given)
        raise UserError(f"{options.weights} says how the images of its run were prepared: leave out {flags}")
    WRITERS[output.suffix](weights, output)
    if card:
        in_folder(card).write_text(model_card(weights, output), **ANY_NAME)
    print(f"{describe(weights)}: {output}")


def describe(weights: Weights) -> str:
    note = f" ({weights.note})" if weights.note else ""
    classes = counted(len(weights.classes), "class", "classes")
    return f"{weights.config.model.name}, {parameters(weights.network):,} parameters, {classes}{note}"


if __name__ == "__main__":
    exit_on_user_error(main)
