"""Evaluate networks on labelled images: ``python -m tools.evaluate WEIGHTS ... --data DIR [--crops 10]``, also under torchrun.

WEIGHTS are runs' directories (their best checkpoint), checkpoints, or files of torchvision, timm or openmmlab. Images are
prepared (crop and resize size, resize filter, mean and standard deviation) as in the run that trained the weights; for
--model timm:NAME as timm's configuration says; for weights with torchvision's names as torchvision does; for other files of the
paper's networks as in the paper. Flags override each of these. Where a file does not say it, and is none of torchvision's or
timm's for ImageNet, a warning says what is assumed. Several WEIGHTS are compared on the same images. Where images of
some classes are missing, errors among all outputs and among those of the classes present are both reported; --outputs says
which of them all else is of.
"""

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
import typing
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.audit import (
    ON_IMAGENET,
    count_differences,
    is_papers_data,
    origin_text,
    published_errors_hold,
    setting_for,
)
from pipeline.autotune import for_evaluation
from pipeline.class_names import imagenet_ids
from pipeline.config import DataConfig, Precision, from_dict
from pipeline.data.checks import same_images
from pipeline.data.dataset import DATASETS, known_training_images, to_evaluate
from pipeline.data.image_files import pixel_format
from pipeline.data.index import DatasetIndex, known_cache, scan_classes, scan_flat, scan_label_table
from pipeline.data.loader import EvaluationLoader, Shard, choose_common_loader
from pipeline.data.splits import find_splits, find_validation
from pipeline.data.table import PARQUET, SUFFIXES, TableSource
from pipeline.distributed import World, init_distributed
from pipeline.errors import ArgumentParser, UserError, exit_on_user_error, positive_integer
from pipeline.evaluation import Average, Evaluation, check_image_size, evaluate
from pipeline.metrics import LabelScore, Score
from pipeline.models.densenet import DenseNet
from pipeline.precision import autocast, memory_format, set_tf32
from pipeline.preprocessing import PREPROCESSING
from pipeline.provenance import provenance
from pipeline.weights import Weights, weights_file
from tools.support import published
from tools.support.calibration import calibration
from tools.support.evaluation_report import comparisons_to_text, result_to_text, write_answers, write_report
from tools.support.facts import multiply_accumulates, network_without_weights, parameters
from tools.support.held_out import open_held_out
from tools.support.label_files import find_label_file
from tools.support.label_report import describe_labels
from tools.support.output_subset import restrict_outputs
from tools.support.outputs import in_folder, writable_file, writable_folder
from tools.support.progress import Progress
from tools.support.significance import mcnemar, wilson_interval
from tools.support.weights_arguments import (
    add_preprocessing_arguments,
    add_weights_arguments,
    names_of_files,
    read_weights_of,
)

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")
Outputs = Literal["all", "present"]
CONFUSIONS = 20  # pairs of classes in the list of confusions


@dataclass(frozen=True)
class Candidate:
    """A file of weights, ready to be evaluated."""

    file: str
    name: str
    weights: Weights
    data: DataConfig
    index: DatasetIndex
    multiply_accumulates: int


def main() -> None:
    options = _parser().parse_args()
    with init_distributed(options.device) as world:
        candidates = world.broadcast_from_rank0(lambda: open_candidates(options))
        results, evaluations = [], []
        for candidate in candidates:
            result, evaluation = evaluate_one(candidate, options, world)
            if world.is_main:
                print(result_to_text(result, named=len(candidates) > 1), flush=True)
                write_answers_of(candidate, evaluation, options)
            results.append(result)
            evaluations.append(dataclasses.replace(evaluation, logits=None))  # 200 MB each on ImageNet
        if world.is_main:
            indexes = [candidate.index for candidate in candidates]
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
        weights = read_weights_of(options, file)
        data = data_config(weights, options)
        same = [c for c in candidates if _same_images(c.data, data) and c.index.classes == weights.classes]
        if options.held_out:
            if options.labels:
                raise UserError("--held-out takes the labels that the run had: leave out --labels")
            index = open_held_out(data, weights)
        else:
            index = same[0].index if same else open_images(data, options.labels, weights.classes)
        if candidates and index.names != candidates[0].index.names:
            raise UserError(f"{file} and {candidates[0].file} are not for the same images: evaluate them one by one")
        check_image_size(weights.network, data.crop_size, name, data.channels)
        bare = network_without_weights(weights.config.model, len(weights.classes), data.channels)
        work = multiply_accumulates(bare, data.crop_size, data.channels)
        candidates.append(Candidate(file, name, weights, data, index, work))
        if not options.held_out and (seen := trained_on(candidates[-1])):
            warn = f"warning: {name} was trained on {seen}: of new images the error will be higher"
            print(warn, file=sys.stderr, flush=True)
    return candidates


def _same_images(a: DataConfig, b: DataConfig) -> bool:
    fields = (
        "dataset",
        "train",
        "val",
        "val_labels",
        "depth",
        "exif_orientation",
        "labels",
        "file_column",
        "label_column",
    )
    return all(getattr(a, field) == getattr(b, field) for field in fields)


def trained_on(candidate: Candidate) -> str:
    """Which of the images the network was trained on, in words; empty if none of those that are looked at.

    They are all of them where they lie where the run's training images lay; else a few are compared with those, as long as
    these are there and it is cheap (`known_training_images`).
    """
    weights, index = candidate.weights, candidate.index
    run, same = weights.config.data, ""
    if run.dataset != "images" or run.loader == "synthetic" or candidate.data.dataset != "images":
        return ""
    with redirect_stderr(io.StringIO()), suppress(UserError):  # the run has said where it found them; they may be gone
        run = find_splits(run)
        listed = isinstance(index.source, TableSource) or index.several_labels  # perhaps the lines of another split
        if not listed and os.path.realpath(index.root) == os.path.realpath(os.path.join(run.dir, run.train)):
            held = (
                f" (but for {run.holdout:,}; --data {run.dir} --held-out evaluates those alone)" if run.holdout else ""
            )
            return f"the images in {index.root}{held}"
        train = known_training_images(run, Path(weights.origin).parent.parent / "index")
        same = same_images(train, index) if train else ""
    return same and f"images in {index.root}, {same}"


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
    network = for_evaluation(weights.network, weights.tuning, options.precision, world.device)
    if options.compile:
        network.compile()
    set_tf32(options.precision)
    present = np.arange(len(index.classes)) if index.several_labels else np.unique(index.labels)
    keep_logits = bool(options.report) or index.several_labels or len(present) < len(index.classes)
    start = time.perf_counter()
    with autocast(options.precision, world.device):
        layout = memory_format("auto", options.precision, world.device)
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


def open_images(data: DataConfig, labels_file: str | None, classes: tuple[str, ...]) -> DatasetIndex:
    """Index `data.dir`, one of `sources.SOURCES`: by class, a data set with a validation set in it, or flat with a label file;
    or the test images of one of torchvision's data sets.

    The validation set in a folder is what the run has as data.val, or would find there; it is reported if it is not ``val``.
    """
    folder, read_as = Path(data.dir), pixel_format(data)
    labels_file = find_label_file(labels_file, folder)
    if data.dataset != "images":
        if labels_file:
            raise UserError(
                f"--labels is for image files, and {data.dataset} has labels of its own: give --dataset images"
            )
        return DATASETS[data.dataset](data, "val", classes, folder, True).with_classes(classes)
    place = folder
    if not labels_file and (own := own_validation_set(data, classes)):
        place = folder / own
        if own != "val":
            print(f"of {folder} {own} is taken (data.val)", file=sys.stderr, flush=True)
        labels = place if data.labels == "multi" else folder / data.val_labels if data.val_labels else None
        labels_file = str(labels) if labels and labels.exists() else None
    if data.labels == "multi":
        if not labels_file:
            raise UserError("the network gives several labels an image: give the CSV file of them as --labels")
        cache = known_cache(Path(labels_file))
        return scan_label_table(folder, labels_file, classes, cache, True, read_as, split="val")
    cache = known_cache(place)
    if labels_file:
        return scan_flat(place, labels_file, classes, cache, True, read_as)
    source = to_evaluate(place, data, folder if place != folder else None)
    try:
        index = scan_classes(source, cache, progress=True, pixel_format=read_as, labels_field="--labels")
        return index.with_classes(classes)
    except UserError as error:
        tables = [name for name in (data.val, data.train) if Path(name).suffix.lower() in (*SUFFIXES, PARQUET)]
        if tables and place == folder and folder.is_dir():
            there = (folder / tables[0]).exists()
            why = f"the run had its images from the table {tables[0]}" + (
                "" if there else f", which is not in {folder}"
            )
            given = folder / tables[0] if there else "that table, or another,"
            raise UserError(f"{error}; {why}: give {given} as --data") from None
        raise


def own_validation_set(data: DataConfig, classes: tuple[str, ...]) -> str:
    """What in the folder `data.dir` is evaluated, relative to it; empty if all of it is."""
    own = find_validation(data)
    if os.path.isabs(own) or os.pardir in Path(own).parts:  # not in it, whatever is given as --data
        own = ""
    if data.labels == "multi":
        return own if own and (Path(data.dir) / own).is_file() else ""
    if not own and (Path(data.dir) / "val").is_dir():
        own = "val"
    return "" if own.split(os.sep)[0] in classes else own


def describe(
    candidate: Candidate, evaluation: Evaluation, other: Evaluation | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is reported about one network except its speed.

    Args:
        other: the answers among the other choice of outputs than --outputs; None if images of every class are there.
    """
    weights, data, index = candidate.weights, candidate.data, candidate.index
    config = weights.config
    no_answer = np.flatnonzero(evaluation.top5[:, 0] < 0)
    about = {
        "model": config.model.name,
        "note": weights.note,
        "sha256": checksum(candidate.file),
        "trained": weights.trained,
        "epochs": weights.epochs,
        "epochs_planned": config.optim.epochs,
        "step": weights.step,
        "best_epoch": weights.best_epoch,
        "parameters": parameters(weights.network),
        "multiply_accumulates": candidate.multiply_accumulates,
        "data": where(index),
        "images": len(index),
        "classes": len(index.classes),
        "not_finite": evaluation.not_finite,
        "first_not_finite": index.location(int(no_answer[0])) if len(no_answer) else None,
        "crops": options.crops,
        "average": options.average,
        "precision": options.precision,
        **{name: getattr(data, name) for name in PREPROCESSING},
        "assumed": weights.assumed,
        "chosen_by_these": weights.is_best and config.optim.epochs > 1 and index.fingerprint == weights.val_fingerprint,
        "begun_with": origin_text(config.model) if config.model.weights else None,
        "training": recipe_of(weights),
    }
    if index.several_labels:
        own = config.published
        published_auroc = (
            [] if own.auroc is None or options.held_out else [{"source": own.source or "published", "auroc": own.auroc}]
        )
        return about | describe_labels(evaluation, index) | {"published": published_auroc}
    score, other_score = evaluation.score, other and other.score
    assert isinstance(score, Score) and not isinstance(other_score, LabelScore)
    loss = float(evaluation.losses.mean(dtype=np.float64))  # of the answers, which are the last exit's
    counts = {"all": len(index.classes), "present": len(set(index.labels.tolist()))}
    unused = "present" if options.outputs == "all" else "all"
    published_rows, published_note = published_errors(weights, options.crops, index, data)
    if options.held_out:
        published_rows, published_note = [], ""  # they are of test images
    return {
        **about,
        "classes_present": counts["present"],
        "outputs": options.outputs,
        "outputs_used": counts[options.outputs],
        "other_outputs": other_score and {"outputs": unused, "outputs_used": counts[unused], **errors(other_score)},
        **errors(score),
        "loss": loss if math.isfinite(loss) else None,
        "calibration": calibration(evaluation.probability, evaluation.top5[:, 0] == index.labels),
        "real": real_labels_score(evaluation, index),
        "published": published_rows,
        "published_note": published_note,
        **by_class(evaluation, index),
    }


def where(index: DatasetIndex) -> str:
    """Where the images are; of a table with splits also which of them is taken."""
    of_split = isinstance(index.source, TableSource) and index.source.columns.split
    return f"{index.root}, its validation split" if of_split else index.root


def checksum(file: str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def errors(score: Score) -> dict[str, Any]:
    """Errors in percent, with counts and intervals; None for those of the first five answers where they say nothing."""
    wrong = {"top1": score.images - score.top1_correct}
    if score.top5_correct is not None:
        wrong["top5"] = score.images - score.top5_correct
    return {
        "top1_error": score.top1_error,
        "top5_error": score.top5_error,
        "top1_wrong": wrong["top1"],
        "top5_wrong": wrong.get("top5"),
        "top1_interval": wilson_interval(wrong["top1"], score.images),
        "top5_interval": wilson_interval(wrong["top5"], score.images) if "top5" in wrong else None,
    }


def by_class(evaluation: Evaluation, index: DatasetIndex) -> dict[str, list[dict[str, Any]]]:
    """Errors of each class that has images, and the most frequent confusions of two classes.

    The true class of a confusion has images; the predicted one may be any of the outputs used.
    """
    labels, answers, names = index.labels, evaluation.top5[:, 0], index.classes
    counts5 = isinstance(evaluation.score, Score) and evaluation.score.top5_correct is not None
    images = np.bincount(labels, minlength=len(names))
    wrong = np.bincount(labels[answers != labels], minlength=len(names))
    wrong5 = np.bincount(labels[(evaluation.top5 != labels[:, None]).all(axis=1)], minlength=len(names))
    confused = (answers != labels) & (answers >= 0)  # where an answer is not finite there is none
    pairs, counts = np.unique(np.stack([labels, answers])[:, confused], axis=1, return_counts=True)
    most_frequent = np.argsort(-counts, kind="stable")[:CONFUSIONS]
    return {
        "by_class": [
            {
                "class": names[k],
                "images": int(images[k]),
                "top1_error": 100 * wrong[k] / images[k],
                "top5_error": 100 * wrong5[k] / images[k] if counts5 else None,
            }
            for k in np.flatnonzero(images).tolist()
        ],
        "confusions": [
            {"class": names[pairs[0, i]], "answer": names[pairs[1, i]], "images": int(counts[i])} for i in most_frequent
        ],
    }


def real_labels_score(evaluation: Evaluation, index: DatasetIndex) -> dict[str, Any] | None:
    """Top-1 error by the ReaL labels (Beyer et al. 2020): an image has any number of correct labels, or none and is left out.

    Returns None unless these are ImageNet's validation images under their original file names.
    """
    numbers = [int(found[1]) for name in index.names if (found := VALIDATION_NAME.search(name))]
    if len(numbers) < len(index.names) or index.classes != imagenet_ids():
        return None
    import timm.data  # takes seconds to import

    labels = json.loads(Path(timm.data.__file__).with_name("_info").joinpath("imagenet_real_labels.json").read_text())
    judged = [
        (answer in right)
        for number, answer in zip(numbers, evaluation.top5[:, 0].tolist(), strict=True)
        if (right := labels[number - 1])
    ]
    wrong = len(judged) - sum(judged)
    if not judged:
        return None
    return {
        "images": len(judged),
        "top1_error": 100 * wrong / len(judged),
        "interval": wilson_interval(wrong, len(judged)),
    }


def published_errors(
    weights: Weights, crops: int, index: DatasetIndex, data: DataConfig | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Published errors of this network, or why there is none to show beside these images.

    They are those in the run's configuration; on ImageNet also the paper's and torchvision's. They are of the whole test set:
    with another number of images, or without some of the classes, they are of something else; with another filter or size too.

    Args:
        data: how the images are prepared; None for as the weights say.
    """
    own, name, is_imagenet = weights.config.published, weights.config.model.name, weights.classes == imagenet_ids()
    suffix, nothing = "_10crop" if crops == 10 else "", (None, None)
    rows = []
    if is_imagenet or published_errors_hold(
        weights.config, classes=0
    ):  # the paper's on ImageNet are of no other classes
        errors = getattr(own, f"top1{suffix}"), getattr(own, f"top5{suffix}")
        rows.append((own.source or "published", errors, _prepared(weights.config.data)))
    if is_imagenet and own.source is None:
        rows.append(
            ("the paper", published.DENSENETS_ON_IMAGENET[crops].get(name, nothing), published.PREPARED_IN_THE_PAPER)
        )
    if is_imagenet and crops == 1:
        theirs = published.TORCHVISION_ON_IMAGENET.get(name, nothing)
        rows.append(("torchvision's weights", theirs, published.PREPARED_BY_TORCHVISION))
    known = [row for row in rows if row[1][0] is not None]
    found = [
        {"source": source, "top1_error": top1, "top5_error": top5}
        for source, (top1, top5), prepared in known
        if prepared == _prepared(data or weights.config.data)
    ]
    dataset = "imagenet" if is_imagenet else weights.config.data.dataset
    images = published.TEST_IMAGES.get(dataset)  # of other data sets it is not known
    present, classes = len(set(index.labels.tolist())), len(weights.classes)
    if known and not (present == classes and images in (None, len(index))):
        of_images = "" if images is None else f"{images:,} images of "
        return [], f"no published error is shown: those of this network are for {of_images}all {classes} classes"
    if known and not found:
        filters = " or ".join(f"{resize} resize to {short}, crop {crop}" for _, _, (resize, short, crop) in known)
        return [], f"no published error is shown: those of this network are with {filters}"
    return found, ""


def _prepared(data: DataConfig) -> tuple[str, int, int]:
    return data.interpolation, data.resize_size, data.crop_size


def recipe_of(weights: Weights) -> str | None:
    """How many parts of the training differed from the paper's, and where they stand; None if its data were others, or if that
    is not known."""
    rows, images = weights.audit_rows, weights.measured.images if weights.measured else None
    if rows is None or not is_papers_data(weights.config, len(weights.classes), images):
        return None
    if setting_for(weights.config) in ON_IMAGENET and weights.classes != imagenet_ids():
        return None
    text = count_differences(rows, setting_for(weights.config).paper)
    file = Path(weights.origin).parent.parent / "audit.md"  # of a run's checkpoint
    return f"{text}: {file}" if file.exists() else text


def compare(
    results: list[dict[str, Any]], evaluations: list[Evaluation], indexes: list[DatasetIndex]
) -> list[dict[str, Any]]:
    """Compare each pair of networks on the same images, where each image has one class."""
    rows: list[dict[str, Any]] = []
    if indexes[0].several_labels:
        return rows
    for a, b in itertools.combinations(range(len(results)), 2):
        wrong = [evaluations[i].top5[:, 0] != indexes[i].labels for i in (a, b)]
        only_a, only_b = int((wrong[0] & ~wrong[1]).sum()), int((wrong[1] & ~wrong[0]).sum())
        rows.append(
            {
                "a": results[a]["name"],
                "b": results[b]["name"],
                "only_a_wrong": only_a,
                "only_b_wrong": only_b,
                "p": mcnemar(only_a, only_b),
            }
        )
    return rows


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
        help="label file, if DIR is a folder of images without class folders; CSV, if an image has several labels; relative to "
        "the working directory or to DIR",
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
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="loader threads per rank [all cores]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of each rank [auto]")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--predictions", metavar="FILE", help="write a CSV file with the top-5 predictions of each image"
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write a report: HTML page with the worst mistakes, Markdown, JSON, and each image's predictions and logits",
    )
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
