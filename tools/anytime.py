"""What answers at any time, and for a budget, cost and are worth: ``python -m tools.anytime WEIGHTS --data DIR``.

WEIGHTS are of an MSDNet, a network with early exits. For each exit: its error, the multiply-accumulates up to it and measured
time. For budgets: an image leaves at the first exit that is sure enough of it; how sure an exit must be is chosen on held-out
images (those that the run held out of its training images, or --thresholds), for 39 wanted distributions over the exits;
reported are the error, the mean cost and the measured images/s when what has left is really computed no further, and what
stays waits until it fills a batch again. Images are prepared as in the evaluation of the run that trained the weights. No
GPU has run it.
"""

import dataclasses
import math
import statistics
import sys
import typing
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.budget import BUDGETS, Answers, answers_of, classify, leaves_at, shares, thresholds
from pipeline.class_names import imagenet_ids
from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import DataConfig, ModelConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader, Shard, choose_loader
from pipeline.distributed import World, init_distributed
from pipeline.errors import UserError
from pipeline.evaluation import check_image_size, evaluate
from pipeline.metrics import Score
from pipeline.models import create_model
from pipeline.models.folding import fold_norms, folded
from pipeline.models.msdnet import MSDNet
from pipeline.precision import set_tf32
from pipeline.weights import Weights, read_weights, weights_file
from tools.support import published
from tools.support.anytime_report import result_to_text, write_report
from tools.support.budgets import limits_of
from tools.support.candidate import Candidate
from tools.support.evaluated_images import open_images, trained_on
from tools.support.facts import exit_costs, multiply_accumulates, network_without_weights, on_meta, parameters
from tools.support.held_out import open_held_out
from tools.support.outputs import writable_folder
from tools.support.progress import Progress
from tools.support.significance import wilson_interval
from tools.support.speed import percent_apart, seconds_by_round
from tools.support.weights_arguments import add_weights_arguments, names_of_files, read_weights_of, warn_of_assumption

ALONE = 50  # images of which each is timed as a batch of its own
ROUNDING = 1e-9  # in percent: two errors that are the same count of images may differ in their last bits
ROUNDS = 5  # in each of which every implementation is timed once


@dataclass(frozen=True)
class Images:
    """What is evaluated: the test images, and those on which thresholds are chosen, if there are any."""

    test: DatasetIndex
    held_out: DatasetIndex | None
    seen: str  # of the test images those that the network was trained on, in words


@dataclass(frozen=True)
class Other:
    """A network that is shown beside.

    Attributes:
        error: top-1, in percent; of the test images where `measured`, else as it was given.
        network: to be timed; None if only its cost is shown.
        data: how its images are prepared.
    """

    name: str
    error: float
    measured: bool
    multiply_accumulates: int
    network: nn.Module | None
    data: DataConfig


def main() -> None:
    options = _parser().parse_args()
    weights = read_weights_of(options, options.weights)
    files = [str(weights_file(item)) if Path(item).exists() else item for item in (options.weights, *options.beside)]
    network, (name, *names_beside) = weights.network, names_of_files(files)
    if not isinstance(network, MSDNet):
        raise UserError(f"{options.weights} holds a {weights.config.model.name}, which has one exit: give an MSDNet's")
    data = dataclasses.replace(
        weights.config.data, dir=options.data, download=options.download, loader=options.loader, threads=0
    )
    if data.labels == "multi":
        raise UserError(f"{options.weights} gives several labels an image, and exits are compared by one: give another")
    check_image_size(network, data.crop_size, options.weights, data.channels)
    folder = writable_folder(options.report, "--report") if options.report else None
    set_tf32("fp32")
    with init_distributed(options.device) as world:
        if world.size > 1:
            raise UserError("tools.anytime measures time in one process: start it without torchrun")
        images = open_both(data, options.thresholds, weights)
        network = typing.cast("MSDNet", on_device(fold_norms(network), world))
        beside = zip(options.beside, names_beside, strict=True)
        others = [read_other(item, called, data, images.test, world, options) for item, called in beside]
        answers = answers_to(images.test, "test images", network, data, world, options)
        held_out = None
        if images.held_out:
            held_out = answers_to(images.held_out, "images for the thresholds", network, data, world, options)
        refuse_what_is_not_finite(options.weights, answers, held_out or ())
        result = describe(name, weights, data, images, answers, held_out)
        measure(result, network, others, images.test, data, world, options)
    compare_with_others(result)
    print(result_to_text(result), flush=True)
    if folder:
        write_report(folder, result, answers[0], images.test)


def on_device(network: nn.Module, world: World) -> nn.Module:
    return network.to(world.device).to(memory_format=torch.channels_last)


def open_both(data: DataConfig, thresholds_from: str | None, weights: Weights) -> Images:
    """The test images, and the images on which thresholds are chosen: of --thresholds, or held out as in training.

    Raises:
        UserError: images are missing, of other classes, or not the run's.
    """
    classes = weights.classes
    test = open_images(data, None, classes)
    seen = trained_on(Candidate(weights.origin, "", weights, data, test, 0))
    if seen:
        _warn(f"the network was trained on {seen}")
    if not thresholds_from:
        return Images(test, held_out_of_run(data, weights) if data.holdout else None, seen)
    folder = dataclasses.replace(data, dir=thresholds_from)
    chosen_on = open_images(folder, None, classes)
    if chosen_on.fingerprint == test.fingerprint:
        _warn("the images of --thresholds are those of --data: the budgets' errors are too low for new images")
    elif known := trained_on(Candidate(weights.origin, "", weights, folder, chosen_on, 0)):
        _warn(
            f"--thresholds: the network was trained on {known}; it is surer of images that it has seen, so that new ones "
            "leave later than a budget wants, and cost more"
        )
    return Images(test, chosen_on, seen)


def held_out_of_run(data: DataConfig, weights: Weights) -> DatasetIndex:
    """What the run held out of its training images, where it had them, or in `data.dir`.

    Raises:
        UserError: they are in neither.
    """
    folders = list(dict.fromkeys((weights.config.data.dir, data.dir)))
    for folder in folders:
        try:
            # What was there for the run is not fetched anew.
            download = data.download and folder == data.dir
            return open_held_out(dataclasses.replace(data, dir=folder, download=download), weights)
        except UserError as error:
            why = error
    raise UserError(
        f"the images that the run of {weights.origin} held out are not in {' nor in '.join(folders)} ({why}): give images for "
        "the thresholds as --thresholds DIR"
    )


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def loader_of(index: DatasetIndex, data: DataConfig, world: World, options: Namespace) -> EvaluationLoader:
    shard = Shard(world.rank, world.size, world.device, world.cores)
    return EvaluationLoader(index, data, shard, batch_size=options.batch_size, crops=1)


def answers_to(
    index: DatasetIndex, what: str, network: MSDNet, data: DataConfig, world: World, options: Namespace
) -> tuple[Answers, Answers]:
    """See `answers_of`; shows how far it is."""
    loader = loader_of(index, data, world, options)
    progress = Progress(what, loader.rounds, "batches")
    answers = answers_of(network, loader, progress.advance)
    progress.close()
    return answers


def read_other(item: str, called: str, data: DataConfig, test: DatasetIndex, world: World, options: Namespace) -> Other:
    """A network that --beside names: a file of weights, which is evaluated and called so, or NAME=ERROR.

    Raises:
        UserError: it is neither, or not for these classes.
    """
    name, _, error = item.partition("=")
    if error and not Path(item).exists():
        try:
            value = float(error)
        except ValueError:
            raise UserError(f"--beside {item}: '{error}' is no error in percent: give WEIGHTS or NAME=ERROR") from None
        classes, channels = len(test.classes), data.channels
        network = on_device(folded(create_model(name, classes, in_channels=channels).eval()), world)
        check_image_size(network, data.crop_size, name, channels)
        bare = network_without_weights(ModelConfig(name=name), classes, channels)
        work = multiply_accumulates(bare, data.crop_size, channels)
        return Other(name, value, False, work, network, data)
    weights = read_weights(item)
    warn_of_assumption(item, weights)
    if weights.classes != test.classes:
        raise UserError(f"--beside {item} is for other classes than {options.weights}")
    own = dataclasses.replace(weights.config.data, loader=options.loader, threads=0)
    # The index of the images is of one kind.
    if (own.exif_orientation, own.depth) != (data.exif_orientation, data.depth):
        raise UserError(
            f"--beside {item} and {options.weights} have been trained with another data.exif_orientation or data.depth: "
            "evaluate them apart, with tools.evaluate"
        )
    network = on_device(folded(weights.network), world)
    bare = network_without_weights(weights.config.model, len(test.classes), own.channels)
    work = multiply_accumulates(bare, own.crop_size, own.channels)
    loader = loader_of(test, own, world, options)
    progress = Progress(f"test images, {item}", loader.rounds, "batches")
    score = evaluate(network, loader, world, between_batches=progress.advance).score
    progress.close()
    assert isinstance(score, Score)
    about = f"{weights.config.model.name}{', average of its weights' if weights.averaged else ''}"
    return Other(f"{called} ({about})", score.top1_error, True, work, network, own)


def refuse_what_is_not_finite(file: str, *answers: tuple[Answers, ...]) -> None:
    if not all(np.isfinite(one.confidence).all() for both in answers for one in both):
        raise UserError(f"{file}: the answers are not finite: damaged weights")


def describe(
    name: str,
    weights: Weights,
    data: DataConfig,
    images: Images,
    answers: tuple[Answers, Answers],
    held_out: tuple[Answers, Answers] | None,
) -> dict[str, Any]:
    """All that is reported but for measured times."""
    network = network_without_weights(weights.config.model, len(weights.classes), data.channels)
    costs = exit_costs(typing.cast("MSDNet", network), data.crop_size, data.channels)
    work, labels = np.array([cost.multiply_accumulates for cost in costs]), images.test.labels
    own, together = answers
    return {
        "name": name,
        "model": weights.config.model.name,
        "trained": weights.trained,
        "note": weights.note,
        "parameters": parameters(network),
        "data": images.test.root,
        "images": len(images.test),
        "trained_on": images.seen,
        "held_out": images.held_out
        and {
            "data": images.held_out.root,
            "images": len(images.held_out),
            "by_the_run": images.held_out.whole is not None,
        },
        "crop_size": data.crop_size,
        "training": weights.audit,
        "exits": [
            {
                "exit": k + 1,
                "parameters": cost.parameters,
                "multiply_accumulates": cost.multiply_accumulates,
                **errors(own.classes[k] != labels),
                "summed_top1_error": 100 * float((together.classes[k] != labels).mean()),
            }
            for k, cost in enumerate(costs)
        ],
        "budgets": []
        if held_out is None
        else [
            {
                "q": q,
                **outcome(q, held_out[0], own, labels, work),
                "summed": outcome(q, held_out[1], together, labels, work),
            }
            for q in BUDGETS
        ],
    }


def outcome(q: float, held_out: Answers, test: Answers, labels: np.ndarray, work: np.ndarray) -> dict[str, Any]:
    """What a budget gives: thresholds from held-out images, and on the test images who leaves where, the error and the cost.

    Args:
        labels: (N) of the test images.
        work: (E) multiply-accumulates up to each exit.
    """
    limits = thresholds(held_out.confidence, shares(q, len(work)))
    at = leaves_at(test.confidence, limits)
    return {
        "thresholds": [limit if math.isfinite(limit) else None for limit in limits.tolist()],
        "shares": (np.bincount(at, minlength=len(work)) / len(at)).tolist(),
        "multiply_accumulates": float(work[at].mean()),
        **errors(test.classes[at, np.arange(len(at))] != labels),
    }


def errors(wrong: np.ndarray) -> dict[str, Any]:
    """Top-1 error in percent with its count and 95 % interval."""
    count = int(wrong.sum())
    return {
        "top1_error": 100 * count / len(wrong),
        "top1_wrong": count,
        "top1_interval": wilson_interval(count, len(wrong)),
    }


def measure(
    result: dict[str, Any],
    network: MSDNet,
    others: list[Other],
    test: DatasetIndex,
    data: DataConfig,
    world: World,
    options: Namespace,
) -> None:
    """Add measured times to the result: of each exit, of each budget, and of the other networks, all interleaved."""
    rows = np.unique(np.linspace(0, len(test) - 1, min(options.timed_images, len(test))).astype(np.int64))
    batches = timed_batches(test.take(rows), data, world, options)
    alone = [image for batch in batches for image in batch.split(1)][:ALONE]

    def run(answer: Callable[[Tensor], object], images: list[Tensor]) -> Callable[[], None]:
        return finished(lambda: [answer(batch) for batch in images])

    def finished(work: Callable[[], object]) -> Callable[[], None]:
        def once() -> None:
            work()
            if world.device.type == "cuda":
                torch.cuda.synchronize()

        return once

    def by_budget(limits: np.ndarray) -> Callable[[], object]:
        return lambda: classify(network, batches, limits, together=options.batch_size)

    work: dict[Any, Callable[[], None]] = {}
    for k in range(network.exits):
        until = network.first_exits(k + 1)
        work["exit", k] = run(until, batches)
        work["alone", k] = run(until, alone)
    for i, budget in enumerate(result["budgets"]):
        work["budget", i] = finished(by_budget(limits_of(budget)))
    for i, other in enumerate(others):
        if other.network is not None:
            own = batches if other.data is data else timed_batches(test.take(rows), other.data, world, options)
            work["other", i] = run(other.network, own)
            work["other alone", i] = run(other.network, [image for batch in own for image in batch.split(1)][:ALONE])
    with torch.inference_mode():
        progress = Progress("times of exits and budgets", len(work) * (1 + ROUNDS), "measurements")
        taken = seconds_by_round(work, ROUNDS, progress.advance)
        progress.close()
    seconds = {name: statistics.median(rounds) for name, rounds in taken.items()}
    apart = percent_apart(rounds for (kind, _), rounds in taken.items() if kind in ("exit", "budget", "other"))
    in_batches = min(options.batch_size, len(rows))
    result |= {"timed_images": len(rows), "batch_size": in_batches, "device": world.device.type}
    result |= {"timed_rounds": ROUNDS, "time_spread": apart}
    result |= {"threads": torch.get_num_threads(), "loader": choose_loader(data, world.device)}
    for k, row in enumerate(result["exits"]):
        row["images_per_second"] = len(rows) / seconds["exit", k]
        row["ms_alone"] = 1000 * seconds["alone", k] / len(alone)
    for i, row in enumerate(result["budgets"]):
        row["images_per_second"] = len(rows) / seconds["budget", i]
    result["beside"] = [
        {
            "name": other.name,
            "top1_error": other.error,
            "measured": other.measured,
            "multiply_accumulates": other.multiply_accumulates,
            "images_per_second": len(rows) / seconds["other", i],
            "ms_alone": 1000 * seconds["other alone", i] / len(alone),
        }
        for i, other in enumerate(others)
    ]
    result["beside"] += published_on_imagenet(test, data)


def timed_batches(index: DatasetIndex, data: DataConfig, world: World, options: Namespace) -> list[Tensor]:
    """The images of an index in batches on the device, channels-last."""
    return [batch.images for batch in loader_of(index, data, world, options).batches()]


def published_on_imagenet(test: DatasetIndex, data: DataConfig) -> list[dict[str, Any]]:
    """The paper's DenseNets and fb.resnet.torch's ResNets: their errors and costs, without a measured time.

    None of them unless the test images are all of ImageNet's validation images, prepared as theirs were.
    """
    theirs = test.classes == imagenet_ids() and published.are_test_images(test, published.TEST_IMAGES["imagenet"])
    if not theirs or published.prepared_as(data) != published.PREPARED_IN_THE_PAPER:
        return []
    import torchvision  # takes seconds

    found = [
        (name, on_meta(create_model, name, dense_block="eager"), top1)
        for name, (top1, _) in published.DENSENETS_ON_IMAGENET[1].items()
    ]
    found += [
        (name, on_meta(getattr(torchvision.models, name)), top1) for name, top1 in published.RESNETS_ON_IMAGENET.items()
    ]
    return [
        {
            "name": name,
            "top1_error": error,
            "measured": False,
            "multiply_accumulates": multiply_accumulates(network, 224),
            "images_per_second": None,
            "ms_alone": None,
        }
        for name, network, error in found
    ]


def compare_with_others(result: dict[str, Any]) -> None:
    """Add to each other network the cheapest budget that makes no more errors than it, None if there is none."""
    for row in result["beside"]:
        as_good = [b for b in result["budgets"] if b["top1_error"] <= row["top1_error"] + ROUNDING]
        best = min(as_good, key=lambda b: b["multiply_accumulates"], default=None)
        row["as_good"] = best and {
            "q": best["q"],
            "top1_error": best["top1_error"],
            "multiply_accumulates": best["multiply_accumulates"],
            "images_per_second": best["images_per_second"],
            "work_ratio": row["multiply_accumulates"] / best["multiply_accumulates"],
            "speed_ratio": row["images_per_second"] and best["images_per_second"] / row["images_per_second"],
        }


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.anytime", description=__doc__)
    add_weights_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="DIR",
        required=True,
        help="the run's data.dir, where it held training images out; else a folder of class folders, or a data set with val/",
    )
    parser.add_argument("--download", action="store_true", help="download one of torchvision's data sets into DIR")
    parser.add_argument(
        "--thresholds",
        metavar="DIR",
        help="images that thresholds are chosen on [those that the run held out of its training images]",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="WEIGHTS-OR-NAME=ERROR",
        help="networks to show beside: files of weights, which are evaluated on the same images, or networks of the zoo or "
        "timm with their error in percent, as timm:resnet18=5.1",
    )
    parser.add_argument(
        "--timed-images",
        type=positive_integer,
        metavar="N",
        default=512,
        help="images that time is measured with [512]",
    )
    parser.add_argument("--batch-size", type=positive_integer, metavar="N", default=64, help="images per batch [64]")
    parser.add_argument(
        "--loader", choices=("auto", "native", "dali", "reference"), default="auto", help="image loader [auto]"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device [auto]")
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write a report: JSON, Markdown and an HTML page, a figure, and easy and hard images",
    )
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
