"""Classify images: ``python -m tools.predict WEIGHTS IMAGE-OR-FOLDER ... [--top 5] [--crops 10] [--csv FILE]``.

Images are prepared as in the evaluation of the run that trained the weights. A folder stands for all images below it. An
MSDNet answers at its last exit, at another one (--exit), or at the first that is sure enough for a budget (--budget). Of a
network that gives several labels an image, each class has a probability of its own. With --csv the answers go into a file as
they are found, however many images there are, and a progress bar shows how far it is. A corrupt image ends it, or is named
and left out (--corrupt-images skip).
"""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import sys
import typing
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.budget import Budgeted
from pipeline.class_names import human_names
from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import CorruptImages, DataConfig
from pipeline.data.decoding import CorruptImageError, decode
from pipeline.data.folder import FolderSource
from pipeline.data.image_files import (
    ASK_FOR_UPRIGHT,
    LAST_THAT_STANDS,
    MAY_BE_TRANSPARENT,
    OPAQUE,
    ROTATED,
    PixelFormat,
    RefusedImageError,
    deep_mode,
    may_be_transparent,
    open_image,
    orientation,
    pixel_format,
    refused_depth,
)
from pipeline.data.index import DatasetIndex
from pipeline.data.loader import EvaluationLoader, Shard
from pipeline.data.scan import find_images as find_images_in
from pipeline.data.source import ImageIssue
from pipeline.distributed import World, init_distributed
from pipeline.errors import UserError
from pipeline.evaluation import check_image_size
from pipeline.machine import available_cores
from pipeline.models.early_exits import single_output
from pipeline.models.folding import folded
from pipeline.models.msdnet import MSDNet
from pipeline.precision import set_tf32
from pipeline.weights import Weights
from pipeline.words import counted
from tools.support.budgets import read_budget
from tools.support.outputs import ANY_NAME, in_folder, writable_file
from tools.support.weights_arguments import add_preprocessing_arguments, add_weights_arguments, read_weights_of

BATCH_SIZE = 32
AT_ONCE = 4096  # images that are indexed together
DOES_NOT_DECODE = "does not decode"
HEADER_THREADS = 16  # reading headers waits for the disk


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.predict", description=__doc__)
    add_weights_arguments(parser)
    add_preprocessing_arguments(parser)
    parser.add_argument("paths", nargs="+", metavar="IMAGE-OR-FOLDER", help="image files and folders of images")
    parser.add_argument("--top", type=positive_integer, metavar="N", default=5, help="predictions per image [5]")
    parser.add_argument(
        "--exit", type=positive_integer, metavar="K", help="exit of an MSDNet that answers, counted from 1 [the last]"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="MILLION",
        help="million multiply-accumulates that an MSDNet may take in the mean: images leave early by the thresholds of DIR",
    )
    parser.add_argument(
        "--thresholds", metavar="DIR", help="the report of tools.anytime, for --budget: its folder, or its report.json"
    )
    parser.add_argument(
        "--exif-orientation",
        action=argparse.BooleanOptionalAction,
        help="turn images as their EXIF data say [as the run did]",
    )
    parser.add_argument("--crops", type=int, choices=(1, 10), default=1, help="views of each image [1]")
    parser.add_argument(
        "--loader", choices=("auto", "native", "dali", "reference"), default="auto", help="image loader [auto]"
    )
    parser.add_argument(
        "--corrupt-images",
        choices=typing.get_args(CorruptImages),
        default="stop",
        help="stop at an image that does not decode, or name it, leave it out and go on [stop]",
    )
    parser.add_argument("--json", metavar="FILE", help="write the predictions as JSON")
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="write a CSV line an image as it is found, and print none: for any number of images",
    )
    options = parser.parse_args()
    for flag in ("json", "csv"):
        if getattr(options, flag):
            writable_file(getattr(options, flag), f"--{flag}")
    weights = read_weights_of(options, options.weights)
    if weights.note:
        print(f"{options.weights}: {weights.note}", file=sys.stderr)
    answering = network_of(weights, options)
    # Only the preparation of images is taken from the run, not its data set and its number of threads.
    data = dataclasses.replace(weights.data, dataset="images", loader=options.loader, threads=0)
    if options.exif_orientation is not None:
        data = dataclasses.replace(data, exif_orientation=options.exif_orientation)
    files, classes = find_images(options.paths), weights.classes
    names = human_names(classes)
    top, several = min(options.top, len(classes)), data.labels == "multi"
    set_tf32("fp32")
    answers = []
    with init_distributed() as world, ExitStack() as stack:
        network = answering.to(world.device).to(memory_format=torch.channels_last)
        check_image_size(network, data.crop_size, options.weights, data.channels)
        rows = None
        if options.csv:
            rows = csv.writer(stack.enter_context(open(in_folder(Path(options.csv)), "w", newline="", **ANY_NAME)))
            rows.writerow(["file", *(classes if several else _titles(top, bool(names)))])
        bar = stack.enter_context(
            tqdm(total=len(files), unit=" images", leave=False, disable=None if options.csv else True)
        )
        how = Reading(options.crops, options.exif_orientation is None, options.corrupt_images)
        answered = 0
        for file, probabilities in predict_all(network, files, classes, data, how, world):
            bar.update()
            if probabilities is None:
                continue
            if not probabilities.isfinite().all():
                raise UserError(f"{options.weights}: the answers are not finite: damaged weights")
            answered += 1
            best = probabilities.topk(top)
            found = [
                {"class": classes[i], "name": names.get(classes[i]), "probability": probability}
                for probability, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            if options.json:
                answers.append({"file": file, "answers": found})
            if rows and several:
                rows.writerow([file, *(f"{probability:.6f}" for probability in probabilities.tolist())])
            elif rows:
                named = [(a["class"], *([a["name"] or ""] * bool(names)), f"{a['probability']:.6f}") for a in found]
                rows.writerow([file, *itertools.chain.from_iterable(named)])
            else:
                lines = [f"  {100 * a['probability']:6.2f} %  {a['class']}  {a['name'] or ''}".rstrip() for a in found]
                print("\n".join([file, *lines]), flush=True)
    if not answered:
        raise UserError(f"no image decodes ({len(files):,} given): give others")
    left_out = f", {counted(len(files) - answered, 'corrupt one')} left out" if answered < len(files) else ""
    if options.csv:
        print(f"{options.csv}: {counted(answered, 'image')}{left_out}")
    elif left_out:
        print(f"{counted(answered, 'image')}{left_out}", file=sys.stderr)
    if options.json:
        in_folder(Path(options.json)).write_text(json.dumps(answers, indent=2) + "\n")


def network_of(weights: Weights, options: Namespace) -> nn.Module:
    """What answers: the network, one of its exits, or exits within a budget.

    Raises:
        UserError: there is no such exit; or the flags do not go together.
    """
    if options.budget is None and not options.thresholds:
        return single_output(folded(weights.network), options.exit, options.weights)
    if options.budget is None or not options.thresholds or options.exit:
        raise UserError("--budget MILLION and --thresholds DIR go together, without --exit")
    network = folded(weights.network)
    if not isinstance(network, MSDNet):
        raise UserError(f"--budget: {options.weights} has one exit: leave it out")
    if weights.config.data.labels == "multi":
        raise UserError(
            f"--budget: {options.weights} gives several labels an image, and thresholds are of one: leave it out"
        )
    model, size = weights.config.model.name, weights.data.crop_size
    limits = read_budget(Path(options.thresholds), options.budget, model, size)
    if len(limits) != network.exits:
        raise UserError(
            f"--thresholds {options.thresholds} is of {len(limits)} exits, {options.weights} has {network.exits}"
        )
    if options.crops > 1:
        raise UserError("--budget is for one crop: leave out --crops")
    return Budgeted(network, limits)


def _titles(top: int, named: bool) -> list[str]:
    """Titles of the answers' columns; with one for English names only where classes have them."""
    columns = ("class", "name", "probability") if named else ("class", "probability")
    return [f"{what}{k}" for k in range(1, top + 1) for what in columns]


def find_images(paths: list[str]) -> list[str]:
    """The files of `paths` and, in sorted order, the images in those that are folders.

    Raises:
        UserError: a path does not exist, or is a folder without images.
    """
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"there is no image or folder {path}")
        found = find_images_in(path) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"{path} holds no images: give a folder that does")
        files += found
    return files


@dataclass(frozen=True)
class Reading:
    """How images are read and what is said of them.

    Attributes:
        crops: views of each image.
        tell_rotated: name on stderr the first image that EXIF data say to turn, where images are read as stored. The first that
            may have transparent pixels is always named.
        corrupt_images: stop at an image that does not decode, or name it on stderr and skip it.
    """

    crops: int = 1
    tell_rotated: bool = True
    corrupt_images: CorruptImages = "stop"


@dataclass(frozen=True)
class _Header:
    """What the header of an image file says: (height, width) as it is read, its length in bytes, EXIF's orientation, and what
    is odd about it."""

    size: tuple[int, int]
    length: int
    orientation: int
    issues: list[ImageIssue]


def _read_header(file: str, read_as: PixelFormat) -> _Header:
    """Open an image file and read no more than its header.

    Raises:
        RefusedImageError: it is no image, or has more than 16 bits a colour.
        UserError: it cannot be read, or the network is for images of other depth.
    """
    try:
        with open(file, "rb") as stream:
            image = open_image(stream, file)
            if refused := refused_depth(deep_mode(image), read_as.depth):
                raise UserError(f"{file} {refused[0]} ({deep_mode(image)}), and the network is for others: convert it")
            turn = orientation(image)
            lies = read_as.exif_orientation and turn > LAST_THAT_STANDS
            size = (image.width, image.height) if lies else (image.height, image.width)
            issues = [ImageIssue(file, MAY_BE_TRANSPARENT, OPAQUE)] if may_be_transparent(image) else []
            if turn != 1 and not read_as.exif_orientation:
                issues.append(ImageIssue(file, ROTATED, ASK_FOR_UPRIGHT))
            return _Header(size, os.fstat(stream.fileno()).st_size, turn, issues)
    except OSError as error:
        raise UserError(f"cannot read the image {file}: {error.strerror}") from None


def index_files(
    files: list[str], classes: tuple[str, ...], read_as: PixelFormat
) -> tuple[DatasetIndex, list[ImageIssue], list[tuple[str, RefusedImageError]]]:
    """An index of single image files, whose labels are all 0 and whose fingerprint is empty; what is odd about them; and the
    files that are no images, which the index does not have.

    Raises:
        UserError: a file cannot be read, or is an image that the network is not for.
    """

    def header_or_error(file: str) -> _Header | RefusedImageError:
        try:
            return _read_header(file, read_as)
        except RefusedImageError as error:
            if not error.corrupt:
                raise
            return error

    names, headers, refused = [], [], []
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        for file, header in zip(files, pool.map(header_or_error, files), strict=True):
            if isinstance(header, RefusedImageError):
                refused.append((file, header))
            else:
                names.append(file)
                headers.append(header)
    nothing = np.zeros(len(names), np.int64)
    index = DatasetIndex(
        names=tuple(names),
        labels=nothing,
        sizes=np.array([header.size for header in headers], np.int32).reshape(-1, 2),
        classes=classes,
        fingerprint="",
        offsets=nothing,
        lengths=np.array([header.length for header in headers], np.int64),
        source=FolderSource(""),
        turned=np.array([read_as.exif_orientation and header.orientation != 1 for header in headers], bool),
    )
    return index, [issue for header in headers for issue in header.issues], refused


def predict_all(
    network: nn.Module, files: list[str], classes: tuple[str, ...], data: DataConfig, how: Reading, world: World
) -> Iterator[tuple[str, Tensor | None]]:
    """`predict` for any number of image files, of which some thousand are known at a time; None for one that is skipped.

    Raises:
        UserError: as `index_files`; or an image is corrupt, and such are not skipped.
    """
    told = set() if how.tell_rotated else {ROTATED}
    for start in range(0, len(files), AT_ONCE):
        index, odd, refused = index_files(files[start : start + AT_ONCE], classes, pixel_format(data))
        for file, no_image in refused:
            yield _skipped(file, no_image.fault, no_image.detail, how)
        for issue in odd:
            if issue.fault not in told:
                told.add(issue.fault)
                first = f"{issue.location} {issue.fault} (later ones are not named): {issue.outcome}"
                tqdm.write(f"warning: {first}", file=sys.stderr)
        answered, all_decode = 0, True
        try:
            for answer in predict(network, index, data, how.crops, world):
                answered += 1
                yield answer
        except CorruptImageError as error:
            if how.corrupt_images == "stop":
                raise _refusal(error.location, DOES_NOT_DECODE, error.reason) from None
            all_decode = False
        if not all_decode:  # out of `except`, which would keep the first loader
            rest = index.take(np.arange(answered, len(index)))
            errors = decoding_errors(rest, pixel_format(data))
            for corrupt in filter(None, errors):
                yield _skipped(corrupt.location, DOES_NOT_DECODE, corrupt.reason, how)
            sound = np.flatnonzero([corrupt is None for corrupt in errors])
            try:
                yield from predict(network, rest.take(sound), data, how.crops, world)
            except CorruptImageError as error:  # it has changed since
                raise _refusal(error.location, DOES_NOT_DECODE, error.reason) from None


def _skipped(file: str, fault: str, detail: str, how: Reading) -> tuple[str, None]:
    """Name a corrupt image that is skipped; the answer to it, which is none.

    Raises:
        UserError: such images are not skipped.
    """
    if how.corrupt_images == "stop":
        raise _refusal(file, fault, detail)
    tqdm.write(f"warning: {file} {fault} ({detail}): left out", file=sys.stderr)
    return file, None


def _refusal(file: str, fault: str, detail: str) -> UserError:
    return UserError(
        f"{file} {fault} ({detail}): repair or remove it, or leave out all such images with --corrupt-images skip"
    )


def decoding_errors(index: DatasetIndex, read_as: PixelFormat) -> list[CorruptImageError | None]:
    """Why each image of an index does not decode; None for those that do.

    Raises:
        UserError: a file cannot be read.
    """

    def error_of(i: int) -> CorruptImageError | None:
        try:
            with index.open(i) as stream:
                content = np.frombuffer(stream.read(), np.uint8)
            decode(content, index.location(i), read_as)
        except CorruptImageError as error:
            return error
        except OSError as error:
            raise UserError(f"cannot read the image {index.location(i)}: {error.strerror}") from None
        return None

    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(error_of, range(len(index))))


@torch.inference_mode()
def predict(
    network: nn.Module, index: DatasetIndex, data: DataConfig, crops: int, world: World
) -> Iterator[tuple[str, Tensor]]:
    """Yield each file of the index with its (classes) probabilities on the CPU; of ten crops the logits are averaged.

    Of several labels an image (``data.labels: multi``) each probability is the sigmoid of its logit, else all are a softmax.
    """
    shard = Shard(0, 1, world.device, world.cores)
    loader = EvaluationLoader(index, data, shard, batch_size=BATCH_SIZE, crops=crops)
    for batch in loader.batches():
        logits = network(batch.images).float().unflatten(0, (-1, batch.views)).mean(dim=1)
        of_batch = logits.sigmoid() if data.labels == "multi" else logits.softmax(dim=1)
        for i, probabilities in zip(batch.ids.tolist(), of_batch.cpu(), strict=True):
            yield index.location(i), probabilities


if __name__ == "__main__":
    exit_on_user_error(main)
