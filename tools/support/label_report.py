"""What tools/evaluate.py says of networks for images with several labels each: AUROC and average precision of each class."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.index import DatasetIndex
from pipeline.evaluation import Evaluation
from pipeline.metrics import LabelScore
from pipeline.ranking import mean_average_precision_interval, no_interval_text
from pipeline.words import counted
from tools.support.facts import billions, millions
from tools.support.outputs import ANY_NAME


def describe_labels(evaluation: Evaluation, index: DatasetIndex) -> dict[str, Any]:
    """The figures of one network, as JSON has them: None where one is not defined.

    Args:
        evaluation: with its logits.
    """
    score, logits = evaluation.score, evaluation.logits
    assert isinstance(score, LabelScore) and score.mean is not None and logits is not None
    return {
        "label_error": score.label_error,
        "loss": _number(score.loss),
        "classes_ranked": score.mean.classes,
        "mean_auroc": _number(score.mean.auroc),
        "mean_auroc_interval": _interval(score.mean.auroc_interval),
        "mean_auroc_single": [score.classes[k] for k in score.mean.single],
        "mean_average_precision": _number(score.mean.average_precision),
        "mean_average_precision_interval": _interval(mean_average_precision_interval(logits, index.labels)),
        "by_class": [
            {
                "class": name,
                "positives": ranking.positives,
                "negatives": ranking.negatives,
                "auroc": _number(ranking.auroc),
                "auroc_interval": _interval(ranking.auroc_interval),
                "average_precision": _number(ranking.average_precision),
                "average_precision_interval": _interval(ranking.average_precision_interval),
            }
            for name, ranking in zip(score.classes, score.rankings, strict=True)
        ],
    }


def label_lines(r: dict[str, Any]) -> list[str]:
    """What is printed of one network's figures."""
    of = (
        ""
        if r["classes_ranked"] == r["classes"]
        else f", over the {r['classes_ranked']} classes with both kinds of images"
    )
    single = r["mean_auroc_single"]
    words = f", {no_interval_text(single)}" if single else ", 95 % interval" if r["mean_auroc_interval"] else ""
    lines = [
        f"mean AUROC {with_interval(r['mean_auroc'], r['mean_auroc_interval'])}{words}{of}",
        f"mean average precision {with_interval(r['mean_average_precision'], r['mean_average_precision_interval'])}",
        f"label error {r['label_error']:.2f} % (at probability 0.5) of {counted(r['images'], 'image')} x "
        f"{counted(r['classes'], 'label')}",
    ]
    lines += [f"{p['source']}: mean AUROC {p['auroc']}" for p in r["published"]]
    return lines


def label_overview(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row for each network and for each published figure."""
    rows = []
    for r in results:
        size = [millions(r["parameters"]), billions(r["multiply_accumulates"])]
        auroc = with_interval(r["mean_auroc"], r["mean_auroc_interval"])
        precision = with_interval(r["mean_average_precision"], r["mean_average_precision_interval"])
        rows.append([r["name"], r["model"], *size, auroc, precision])
        rows += [[f"  {p['source']}", r["model"], *size, f"{p['auroc']}", ""] for p in r["published"]]
    return ["weights", "model", "M params", "GMACs", "mean AUROC (95 %)", "mean average precision (95 %)"], rows


def label_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row for each class, the worst AUROC first."""
    worst_first = sorted(result["by_class"], key=lambda row: math.inf if row["auroc"] is None else row["auroc"])
    rows = [
        [
            row["class"],
            str(row["positives"]),
            str(row["negatives"]),
            with_interval(row["auroc"], row["auroc_interval"]),
            with_interval(row["average_precision"], row["average_precision_interval"]),
        ]
        for row in worst_first
    ]
    return ["class", "images with it", "without", "AUROC (95 %)", "average precision (95 %)"], rows


def write_label_answers(file: Path, evaluation: Evaluation, index: DatasetIndex) -> None:
    """One CSV line an image: file, its labels between |, the loss, and the probability of each class."""
    assert evaluation.logits is not None
    probabilities = 1 / (1 + np.exp(-evaluation.logits.astype(np.float64)))
    with open(file, "w", newline="", **ANY_NAME) as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "labels", "loss", *index.classes])
        for name, labels, loss, row in zip(index.names, index.labels, evaluation.losses, probabilities, strict=True):
            names = "|".join(index.classes[k] for k in np.flatnonzero(labels))
            writer.writerow([name, names, f"{loss:.6f}", *(f"{p:.6f}" for p in row)])


def with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    """A figure from 0 to 1 with its interval, where they are defined."""
    if value is None:
        return "not defined"
    return f"{value:.4f}" if interval is None else f"{value:.4f} ({interval[0]:.4f} to {interval[1]:.4f})"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(interval: tuple[float, float]) -> tuple[float, float] | None:
    return interval if all(map(math.isfinite, interval)) else None
