"""What an evaluation comes to: errors with their intervals, by class, beside published ones, and of several networks."""

import argparse
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.audit import (
    count_differences,
    is_papers_data,
    published_errors_hold,
)
from pipeline.class_names import imagenet_ids
from pipeline.config import DataConfig
from pipeline.data.index import DatasetIndex
from pipeline.evaluation import Evaluation
from pipeline.metrics import LabelScore, Score
from pipeline.paper import ON_IMAGENET, setting_for
from pipeline.preprocessing import PREPROCESSING
from pipeline.weights import Weights
from tools.support import published
from tools.support.calibration import calibration
from tools.support.candidate import Candidate
from tools.support.evaluated_images import where
from tools.support.facts import parameters
from tools.support.label_report import describe_labels
from tools.support.significance import mcnemar, wilson_interval

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")
CONFUSIONS = 20  # pairs of classes in the list of confusions


def describe(
    candidate: Candidate, evaluation: Evaluation, other: Evaluation | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is reported about one network except its seconds.

    Args:
        other: the answers among the other choice of outputs than --outputs; None if images of every class are there.
    """
    weights, data, index = candidate.weights, candidate.data, candidate.index
    config = weights.config
    no_answer = np.flatnonzero(evaluation.top5[:, 0] < 0)
    about = {
        "model": config.model.name,
        "note": weights.note,
        "sha256": candidate.sha256,
        "trained": weights.trained,
        "epochs": weights.epochs,
        "epochs_planned": None if weights.epochs is None else config.optim.epochs,
        "steps_of_next_epoch": weights.step,
        "best_epoch": weights.best_epoch,
        "parameters": parameters(weights.network),
        "multiply_accumulates": candidate.multiply_accumulates,
        "data": where(candidate, options.labels, options.held_out, options.split),
        "images": len(index),
        "classes": len(index.classes),
        "not_finite": evaluation.not_finite,
        "first_not_finite": index.location(int(no_answer[0])) if len(no_answer) else None,
        "crops": options.crops,
        "average": options.average,
        "precision": options.precision,
        **{name: getattr(data, name) for name in PREPROCESSING},
        "assumed": weights.assumed,
        "trained_on": candidate.seen,
        "chosen_by_these": weights.is_best and config.optim.epochs > 1 and index.fingerprint == weights.val_fingerprint,
        "chosen_by_some": candidate.chosen_by,
        "validated_in": config.train.precision if _validated(weights, index) and options.crops == 1 else None,
        "begun_with": config.model.weights_text if config.model.weights else None,
        "training": recipe_line(weights),
    }
    if index.several_labels:
        own = config.published
        same = published.prepared_as(data) == published.prepared_as(config.data)
        of_these = own.images[1:] in ((), (len(index),)) and not options.held_out
        known = own.auroc is not None and same and of_these
        published_auroc = [{"source": own.source or "published", "auroc": own.auroc}] if known else []
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


def _validated(weights: Weights, index: DatasetIndex) -> bool:
    """Whether the run judged these very weights, at the end of an epoch, on the images of an index, prepared likewise."""
    return (
        bool(weights.epochs) and not weights.step and not weights.given and index.fingerprint == weights.val_fingerprint
    )


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


def by_class(evaluation: Evaluation, index: DatasetIndex) -> dict[str, Any]:
    """Errors of each class that has images, their mean, and the most frequent confusions of two classes.

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
    shares = 100 * wrong[images > 0] / images[images > 0]
    return {
        "mean_class_error": float(shares.mean()),
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
    weights: Weights, crops: int, index: DatasetIndex, data: DataConfig
) -> tuple[list[dict[str, Any]], str]:
    """Published errors of this network, or why there is none to show beside these images.

    They are those in the run's configuration; on ImageNet also the paper's and torchvision's. They are of the whole test set:
    with another number of images, or without some of the classes, they are of something else; with another filter or size too.

    Args:
        data: how the images are prepared.
    """
    own, name, is_imagenet = weights.config.published, weights.config.model.name, weights.classes == imagenet_ids()
    suffix, nothing = "_10crop" if crops == 10 else "", (None, None)
    rows = []
    images_of_run = weights.measured.images if weights.measured else None
    if is_imagenet or published_errors_hold(
        weights.config, 0, images_of_run
    ):  # the paper's on ImageNet are of no other classes
        errors = getattr(own, f"top1{suffix}"), getattr(own, f"top5{suffix}")
        rows.append((own.source or "published", errors, published.prepared_as(weights.config.data)))
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
        if prepared == published.prepared_as(data)
    ]
    dataset = "imagenet" if is_imagenet else weights.config.data.dataset
    # Of other data sets it is known only if the configuration says it.
    images = published.TEST_IMAGES.get(dataset) or (own.images[1] if own.images[1:] else None)
    if known and not published.are_test_images(index, images):
        of_images = "" if images is None else f"{images:,} images of "
        every = f"all {len(index.classes)} classes"
        return [], f"no published error is shown: those of this network are for {of_images}{every}"
    if known and not found:
        filters = " or ".join(f"{resize} resize to {short}, crop {crop}" for _, _, (resize, short, crop) in known)
        return [], f"no published error is shown: those of this network are with {filters}"
    return found, ""


def recipe_line(weights: Weights) -> str | None:
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
