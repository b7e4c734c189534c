"""Evaluate a network: ``python -m tools.evaluate WEIGHTS --data DIR [--crops 10]``, also under torchrun.

Everything about the images (crop and resize sizes, resize filter, mean and standard deviation) is as the
weights' run had it unless given here.
"""

import argparse
import csv
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config, DataConfig, Dataset, from_dict
from pipeline.data.arrays import index_arrays
from pipeline.data.index import ArraySource, DatasetIndex, scan_classes, scan_flat
from pipeline.data.loader import EvaluationLoader, Share, choose_loader
from pipeline.distributed import World, join_world, set_precision
from pipeline.errors import ArgumentParser, LocalUserError, UserError, exit_on_user_error, positive_integer
from pipeline.evaluate import Evaluation, evaluate
from pipeline.weights import Weights
from tools.convert import add_weights_arguments, read_weights_of


def main() -> None:
    options = _parser().parse_args()
    with join_world(options.device) as world:
        weights = world.from_main(lambda: read_weights_of(options))
        if weights.note and world.is_main:
            print(f"{options.weights}: {weights.note}")
        if world.is_main:
            _check_writable(options.json, options.predictions)
        data = _data_config(weights.config, options)
        network = weights.network.to(world.device, memory_format=torch.channels_last)
        set_precision("fp32")

        index = world.from_main(lambda: open_images(data, options.labels, weights.classes))
        share = Share(world.rank, world.size, world.device, world.cores)
        loader = EvaluationLoader(index, data, share, batch_size=options.batch_size, crops=options.crops)
        evaluation = evaluate(network, loader, world, options.average)
        if world.is_main:
            report(evaluation, weights, data, index, options, world)


def open_images(data: DataConfig, labels_file: str | None, classes: tuple[str, ...]) -> DatasetIndex:
    """Index `data.dir`, a folder or tar archive: by class, a data set with classes under val/, or flat with a label file; or
    the test images of one of torchvision's data sets."""
    folder = Path(data.dir)
    if data.dataset != "images":
        if labels_file:
            raise UserError(
                f"--labels is for image files, and {data.dataset} has labels of its own: give --dataset images"
            )
        return index_arrays(ArraySource(data.dataset, data.dir, "test")).with_classes(classes)
    if labels_file:
        return scan_flat(folder, labels_file, classes, progress=True)
    if (folder / "val").is_dir() and "val" not in classes:
        folder = folder / "val"
    return scan_classes(folder, progress=True).with_classes(classes)


def report(
    evaluation: Evaluation,
    weights: Weights,
    data: DataConfig,
    index: DatasetIndex,
    options: argparse.Namespace,
    world: World,
) -> None:
    """Print the errors, and write the files that were asked for."""
    score, config, published = evaluation.score, weights.config, weights.config.published
    suffix = "_10crop" if options.crops == 10 else ""
    result: dict[str, Any] = {
        "weights": options.weights,
        "model": config.model.name,
        "data": index.root,
        "images": score.images,
        "classes": len(index.classes),
        "classes_present": len(set(index.labels.tolist())),
        "crops": options.crops,
        "average": options.average,
        "resize": data.resize,
        "resize_size": data.resize_size,
        "crop_size": data.crop_size,
        "loader": choose_loader(data),
        "top1_error": score.top1_error,
        "top5_error": score.top5_error,
        "top1_wrong": score.images - score.top1_right,
        "top5_wrong": score.images - score.top5_right,
        "loss": score.loss,
        "published": {
            "source": published.source,
            "top1_error": getattr(published, "top1" + suffix),
            "top5_error": getattr(published, "top5" + suffix),
        },
    }
    views = "1 crop" if options.crops == 1 else f"10 crops ({options.average} averaged)"
    print(
        f"{config.model.name}, {views}, {data.resize} resize to {data.resize_size}, crop {data.crop_size}, "
        f"{result['loader']} loader, {world.size} rank{'s' if world.size > 1 else ''}\n"
        f"top-1 error {score.top1_error:.2f} %  ({result['top1_wrong']} of {score.images} wrong)\n"
        f"top-5 error {score.top5_error:.2f} %  ({result['top5_wrong']} of {score.images} wrong)"
    )
    if result["classes_present"] < len(index.classes):
        print(f"images of {result['classes_present']} of the {len(index.classes)} classes")
    if result["published"]["top1_error"] is not None:
        print(f"{published.source or 'published'}: top-1 error {result['published']['top1_error']} %")
    if weights.audit:
        print(f"training: {weights.audit}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    if options.predictions:
        _write_predictions(Path(options.predictions), evaluation, index)


def _write_predictions(file: Path, evaluation: Evaluation, index: DatasetIndex) -> None:
    """One CSV line an image: file, its class, the probability of the first answer, and the answers in order."""
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "class", "probability", *(f"answer{i + 1}" for i in range(evaluation.top5.shape[1]))])
        for path, label, probability, top5 in zip(
            index.names, index.labels, evaluation.probability, evaluation.top5, strict=True
        ):
            answers = [index.classes[k] for k in top5]
            writer.writerow([path, index.classes[label], f"{probability:.6f}", *answers])


def _data_config(config: Config, options: argparse.Namespace) -> DataConfig:
    names = ("dataset", "resize", "resize_size", "crop_size", "loader", "threads")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    tree = dataclasses.asdict(config)
    tree["data"] |= {"dir": options.data, **given}
    return from_dict(tree, "the command line").data


def _check_writable(*paths: str | None) -> None:
    """Refuse output files that cannot be written before the work, not after it."""
    for path in filter(None, paths):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            open(path, "a").close()
        except OSError as error:
            raise LocalUserError(f"cannot write {path}: {error.strerror}") from None


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.evaluate", description=__doc__)
    add_weights_arguments(parser)
    parser.add_argument("--data", metavar="DIR", required=True, help="class folders, or a data set with val/ in it")
    parser.add_argument("--dataset", choices=typing.get_args(Dataset), help="what DIR holds [as the run's data.dir]")
    parser.add_argument("--labels", metavar="FILE", help="label file, if DIR is a flat folder of images")
    parser.add_argument("--crops", type=int, choices=(1, 10), default=1, help="views of each image [1]")
    parser.add_argument(
        "--average",
        choices=("logits", "softmax"),
        default="logits",
        help="over ten crops; the paper's code: logits [logits]",
    )
    parser.add_argument("--resize", choices=("torch", "pil-bilinear", "pil-bicubic"), help="resize filter [the run's]")
    parser.add_argument("--resize-size", type=int, metavar="PIXELS", help="short side after the resize [the run's]")
    parser.add_argument("--crop-size", type=int, metavar="PIXELS", help="side of a crop [the run's]")
    parser.add_argument(
        "--batch-size", type=positive_integer, metavar="N", default=32, help="images at once on each rank [32]"
    )
    parser.add_argument("--loader", choices=("auto", "dali", "reference"), default="auto", help="[auto]")
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="loader threads of each rank [all cores]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--predictions", metavar="FILE", help="write each image's predicted classes as CSV")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
