"""Export a network to ONNX or torch.export: ``python -m tools.export WEIGHTS OUTPUT.onnx`` (or ``OUTPUT.pt2``).

The exported network is in evaluation mode and takes float32 images of shape (N, C, S, S), prepared as its metadata says, for
any N; C is 3, or 1 of a network for gray images; S is the crop size. Of an MSDNet one exit is exported, the
last unless --exit says otherwise. The metadata also holds the class names, whether the weights are a moving average of a run's,
and whether probabilities are the softmax of the logits or, of several labels an image, their sigmoid. The file is loaded again
and compared with PyTorch, and written only if the logits agree.
"""

import dataclasses
import io
import json
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.errors import UserError, first_line
from pipeline.models.densenet import DenseNet
from pipeline.models.early_exits import single_output
from pipeline.weights import Weights
from tools.support.outputs import in_folder, writable_file
from tools.support.weights_arguments import add_preprocessing_arguments, add_weights_arguments, read_weights_of

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # largest difference of logits; relative to the largest logit if that exceeds 1
BATCH_SIZES = (1, 3)  # compared with PyTorch; the network is traced with another one
FILTERS = {
    "torch7-bicubic": "Catmull-Rom, corners aligned, no antialias",
    "pil-bilinear": "bilinear with antialias, as Pillow's",
    "pil-bicubic": "bicubic with antialias, as Pillow's",
}

Run = Callable[[Tensor], Tensor]


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.export", description=__doc__)
    add_weights_arguments(parser)
    add_preprocessing_arguments(parser)
    parser.add_argument(
        "--exit", type=positive_integer, metavar="K", help="exit of an MSDNet, counted from 1 [the last]"
    )
    parser.add_argument("output", metavar="OUTPUT", help="a file that ends in .onnx or .pt2")
    options = parser.parse_args()
    output = writable_file(options.output, "OUTPUT", FORMATS)
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if output.suffix == ".onnx" and missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install -r requirements-dev.txt, or give an OUTPUT.pt2")
    weights = read_weights_of(options, options.weights)
    weights = dataclasses.replace(weights, network=single_output(weights.network, options.exit, options.weights))
    content, difference = export(weights, output.suffix)
    in_folder(output).write_bytes(content)
    note = f" ({weights.note})" if weights.note else ""
    print(
        f"{output}{note}: logits of {' and '.join(map(str, BATCH_SIZES))} images differ from PyTorch's by {difference:.1e}"
    )


def export(weights: Weights, suffix: str) -> tuple[bytes, float]:
    """Return the content of a file of this suffix, and the largest difference of its logits from PyTorch's.

    Raises:
        UserError: the network cannot be traced, or the file computes something else.
    """
    network, data, (serialise, load) = weights.network, weights.data, FORMATS[suffix]
    shape = (data.channels, data.crop_size, data.crop_size)
    if isinstance(network, DenseNet):
        network.dense_block = "eager"
    try:
        program = torch.export.export(network, (torch.randn(2, *shape),), dynamic_shapes=({0: Dim("batch")},))
        content = serialise(program, metadata_of(weights))
    except RuntimeError as error:  # torch.export and torch.onnx cannot trace some of timm's networks
        raise UserError(f"{weights.config.model.name} cannot be exported to {suffix}: {first_line(error)}") from None
    try:
        run = load(content)
    except Exception as error:  # onnxruntime's exceptions have no common base
        reason = " ".join(str(error).split())
        raise UserError(f"{weights.config.model.name} as {suffix} cannot be loaded ({reason}): not written") from None
    return content, compare(network, run, shape)


@torch.no_grad()
def compare(network: nn.Module, run: Run, shape: tuple[int, int, int]) -> float:
    """Largest difference of `run` from the network on random images of a shape (C, H, W).

    Raises:
        UserError: it is above `TOLERANCE`.
    """
    largest = 0.0
    for batch_size in BATCH_SIZES:
        images = torch.randn(batch_size, *shape)
        expected = network(images)
        difference = (run(images) - expected).abs().max().item()
        allowed = TOLERANCE * max(1, expected.abs().max().item())
        if not difference <= allowed:  # nor NaN
            raise UserError(
                f"the exported network's logits differ from PyTorch's by {difference:.2g}, above {allowed:.2g}: not written"
            )
        largest = max(largest, difference)
    return largest


def metadata_of(weights: Weights) -> dict[str, str]:
    """The metadata of an exported file: the network's name and, as JSON, the preparation of images and the class names."""
    data = weights.data
    preparation = {
        "resize_short_side": data.resize_size,
        "resize_filter": FILTERS[data.interpolation],
        "centre_crop": data.crop_size,
        "colors": "RGB, 0 to 1" if data.channels == 3 else "gray (0.299 R + 0.587 G + 0.114 B), 0 to 1",
        "bits": data.depth,
        "exif_orientation": "applied" if data.exif_orientation else "ignored",
        "mean": data.mean,
        "std": data.std,
        "assumed": weights.assumed,  # fields of a configuration's data section
    }
    return {
        "model": weights.config.model.name,
        "preprocessing": json.dumps(preparation),
        "classes": json.dumps(weights.classes),
        "averaged": json.dumps(weights.averaged),
        "probabilities": "softmax" if data.labels == "single" else "sigmoid",
    }


def serialise_onnx(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
    )
    assert onnx_program is not None  # it is None only without dynamo
    onnx_program.model.metadata_props.update(metadata)
    return onnx_program.model_proto.SerializeToString()


def load_onnx(content: bytes) -> Run:
    import onnxruntime  # an optional dependency

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def serialise_pt2(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=metadata)
    return buffer.getvalue()


def load_pt2(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


FORMATS = {".onnx": (serialise_onnx, load_onnx), ".pt2": (serialise_pt2, load_pt2)}


if __name__ == "__main__":
    exit_on_user_error(main)
