"""Evaluate networks on labelled images: ``python -m tools.evaluate WEIGHTS ... --data DIR [--crops 10]``, also under torchrun.

WEIGHTS are runs' directories (their best checkpoint), checkpoints, or files of torchvision, timm or openmmlab. Images are
prepared (crop and resize size, resize filter, mean and standard deviation) as in the run that trained the weights; for
--model timm:NAME as timm's configuration says; for weights with torchvision's names as torchvision does; for other files of the
paper's networks as in the paper. Flags override each of these. Where a file does not say it, and is neither as torchvision
offers it nor of a network for which timm has one set of weights, a warning says what is assumed. Several WEIGHTS are compared
on the same images. Where images of some classes are missing, errors among all outputs and among those of the classes present
are both reported; --outputs says which of them all else is of.
"""

import argparse
import dataclasses
import json
import sys
import time
import typing
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.autotune import for_evaluation
from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import DataConfig, Precision
from pipeline.config_file import from_dict
from pipeline.data.dataset import DATASETS
from pipeline.data.loader import EvaluationLoader, Shard, choose_common_loader
from pipeline.distributed import World, init_distributed
from pipeline.errors import LocalUserError, UserError
from pipeline.evaluation import Average, Evaluation, check_image_size, evaluate
from pipeline.models.densenet import DenseNet
from pipeline.precision import autocast, set_tf32
from pipeline.provenance import provenance
from pipeline.weights import Weights, checksum, weights_file
from tools.support.candidate import Candidate
from tools.support.evaluated_images import are_same_images, chosen_by, hold_the_same, open_images, trained_on
from tools.support.evaluation_figures import compare, describe
from tools.support.evaluation_report import (
    comparisons_to_text,
    result_to_text,
    write_answers,
    write_report,
)
from tools.support.facts import multiply_accumulates, network_without_weights
from tools.support.held_out import open_held_out
from tools.support.output_subset import restrict_outputs
from tools.support.outputs import in_folder, writable_file, writable_folder
from tools.support.progress import Progress
from tools.support.weights_arguments import (
    add_preprocessing_arguments,
    add_weights_arguments,
    names_of_files,
    read_weights_of,
)

Outputs = Literal["all", "present"]


def main() -> None:
    options = _parser().parse_args()
    with init_distributed(options.device) as world:
        candidates = world.broadcast_from_rank0(lambda: open_candidates(options))
        results, evaluations, indexes, failures = [], [], [], []
        for candidate in candidates:
            try:
                result, evaluation = evaluate_one(candidate, options, world)
            except LocalUserError:
                raise
            except UserError as error:  # which every rank has: what is found of the others is kept
                failures.append(str(error))
                continue
            if world.is_main:
                print(result_to_text(result, named=len(candidates) > 1), flush=True)
                write_answers_of(candidate, evaluation, options)
            results.append(result)
            indexes.append(candidate.index)
            evaluations.append(dataclasses.replace(evaluation, logits=None))  # 200 MB each on ImageNet
        if world.is_main and results:
            summary = {
                "about": provenance(),
                "evaluations": results,
                "comparisons": compare(results, evaluations, indexes),
            }
            if len(results) > 1:
                print(comparisons_to_text(summary))
            if options.json:
                in_folder(Path(options.json)).write_text(json.dumps(summary, indent=2) + "\n")
            if options.report:
                write_report(Path(options.report), summary, evaluations, indexes)
        if failures:
            raise UserError("; ".join(failures))


def open_candidates(options: argparse.Namespace) -> list[Candidate]:
    """Read all weights and index the images, so that mistakes show before hours of work and not after them.

    Raises:
        UserError: as `read_weights` and `open_images`; the networks are not for the same images; a network cannot take images
            of this size; an output cannot be written.
    """
    for flag in ("json", "predictions"):
        if path := getattr(options, flag):
            writable_file(path, f"--{flag}")
    if options.report:
        writable_folder(options.report, "--report")
    if options.predictions and len(options.weights) > 1:
        raise UserError("--predictions is for one WEIGHTS: --report DIR writes a file of answers for each")
    candidates: list[Candidate] = []
    files = [str(weights_file(file)) for file in options.weights]
    for file, name in zip(files, names_of_files(files), strict=True):
        weights, sha256 = read_weights_of(options, file), checksum(file)
        data = data_config(weights, options)
        same = [c for c in candidates if are_same_images(c.data, data) and c.index.classes == weights.classes]
        if options.held_out:
            if options.labels:
                raise UserError("--held-out takes the labels that the run had: leave out --labels")
            if options.split:
                raise UserError("--held-out takes images of the training split: leave out --split")
            index = open_held_out(data, weights)
        else:
            index = same[0].index if same else open_images(data, options.labels, weights.classes, options.split)
        if candidates and index.several_labels != candidates[0].index.several_labels:
            raise UserError(
                f"one of {file} and {candidates[0].file} gives several labels an image, the other one: evaluate them one by one"
            )
        if candidates and not hold_the_same(index, candidates[0].index):
            raise UserError(
                f"{file} and {candidates[0].file} are not for the same images and labels, as far as can be told: evaluate them "
                "one by one"
            )
        check_image_size(weights.network, data.crop_size, name, data.channels)
        bare = network_without_weights(weights.config.model, len(weights.classes), data.channels)
        work = multiply_accumulates(bare, data.crop_size, data.channels)
        candidates.append(Candidate(file, name, weights, data, index, work, sha256=sha256))
        if not options.held_out and (seen := trained_on(candidates[-1])):
            candidates[-1] = dataclasses.replace(candidates[-1], seen=seen)
            print(f"warning: {name} was trained on {seen}", file=sys.stderr, flush=True)
        candidates[-1] = dataclasses.replace(candidates[-1], chosen_by=chosen_by(candidates[-1]))
    return candidates


def evaluate_one(candidate: Candidate, options: argparse.Namespace, world: World) -> tuple[dict[str, Any], Evaluation]:
    """Evaluate one network; return its results (complete on rank 0) and its predictions.

    Raises:
        UserError: none of its predictions is finite.
    """
    weights, index = candidate.weights, candidate.index
    shard = Shard(world.rank, world.size, world.device, world.cores)
    loader_name, _ = choose_common_loader(candidate.data, world.device, world.gather)
    data = dataclasses.replace(candidate.data, loader=loader_name)
    loader = EvaluationLoader(index, data, shard, batch_size=options.batch_size, crops=options.crops)
    network, layout = for_evaluation(weights.network, weights.tuning, options.precision, world.device)
    if options.compile:
        network.compile()
    set_tf32(options.precision)
    present = np.arange(len(index.classes)) if index.several_labels else np.unique(index.labels)
    keep_logits = bool(options.report) or index.several_labels or len(present) < len(index.classes)
    start = time.perf_counter()
    with autocast(options.precision, world.device):
        progress = Progress(candidate.name, loader.rounds, "batches", shown=world.is_main)
        evaluation = evaluate(
            network, loader, world, options.average, progress.advance, keep_logits, memory_format=layout
        )
        progress.close()
    seconds = time.perf_counter() - start
    if evaluation.not_finite == len(index):
        raise UserError(
            f"{candidate.file}: the answers are not finite: damaged weights, or numbers too large for --precision"
        )
    result: dict[str, Any] = {}
    if world.is_main:
        other = None
        if len(present) < len(index.classes):
            both = evaluation, restrict_outputs(evaluation, index.labels, present)
            evaluation, other = both if options.outputs == "all" else both[::-1]
        result = describe(candidate, evaluation, other, options)
    about = {"name": candidate.name, "weights": candidate.file, "ranks": world.size, "loader": loader_name}
    if isinstance(network, DenseNet):
        about["dense_block"] = str(network.selection)
    return about | {"seconds": seconds} | result, evaluation


def write_answers_of(candidate: Candidate, evaluation: Evaluation, options: argparse.Namespace) -> None:
    """The files of each image's answers and logits that were asked for."""
    if options.predictions:
        write_answers(in_folder(Path(options.predictions)), evaluation, candidate.index)
    if options.report and evaluation.logits is not None:
        np.save(in_folder(Path(options.report, f"{candidate.name}.npy")), evaluation.logits)
        write_answers(Path(options.report, f"{candidate.name}.csv"), evaluation, candidate.index)


def data_config(weights: Weights, options: argparse.Namespace) -> DataConfig:
    """Which images are evaluated, and how they are read and prepared."""
    names = ("dataset", "depth", "exif_orientation", "loader", "threads")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    tree = dataclasses.asdict(dataclasses.replace(weights.config, data=weights.data))
    tree["data"] |= {"dir": options.data, "download": options.download, "threads": 0, **given}
    return from_dict(tree, "the command line").data


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.evaluate", description=__doc__)
    add_weights_arguments(parser, several=True)
    add_preprocessing_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="DIR",
        required=True,
        help="folder of class folders, a table, an archive or shards; or a data set with val/, or the run's data.val, in it",
    )
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="evaluate, of the training images in DIR, those that the run held out (data.holdout)",
    )
    parser.add_argument("--dataset", choices=DATASETS, help="kind of data set in DIR [the run's]")
    parser.add_argument(
        "--download",
        action="store_true",
        help="download the data set into DIR if it is one of torchvision's and not there",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="label file, if DIR is a folder of images without class folders; table of images in DIR; CSV, if an image has "
        "several labels; relative to the working directory or to DIR",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="lines of a table that says which split each is for: val, test or another name that it has [val, else test or "
        "another that is not for training]",
    )
    parser.add_argument(
        "--outputs",
        choices=typing.get_args(Outputs),
        default="all",
        help="outputs among which the network chooses if DIR lacks some classes: all, or those of the classes present, as "
        "ImageNet-A and ImageNet-R want it [all]",
    )
    parser.add_argument("--crops", type=int, choices=(1, 10), default=1, help="views of each image [1]")
    parser.add_argument(
        "--average",
        choices=typing.get_args(Average),
        default="logits",
        help="what is averaged over ten crops; the paper's code averages logits [logits]",
    )
    parser.add_argument("--depth", type=int, choices=(8, 16), help="bits of a gray pixel [the run's]")
    parser.add_argument(
        "--exif-orientation",
        action=argparse.BooleanOptionalAction,
        help="turn images as their EXIF data say [as the run did]",
    )
    parser.add_argument(
        "--batch-size", type=positive_integer, metavar="N", default=32, help="images per batch and rank [32]"
    )
    parser.add_argument(
        "--precision",
        choices=typing.get_args(Precision),
        default="fp32",
        help="of the network; bf16 and fp16 by autocast [fp32]",
    )
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument(
        "--loader", choices=("auto", "native", "dali", "reference"), default="auto", help="image loader [auto]"
    )
    parser.add_argument(
        "--threads", type=positive_integer, metavar="N", help="loader threads per rank [its share of the cores]"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of each rank [auto]")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="write a CSV file with the top-5 predictions of each image, or the probabilities of several labels",
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write a report: HTML page with the worst mistakes, Markdown, JSON, and each image's predictions and logits",
    )
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
