"""The results of tools/anytime.py as text, Markdown, JSON, figures and an HTML page."""

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.budget import Answers, leaves_at
from pipeline.data.decoding import decode
from pipeline.data.index import DatasetIndex
from pipeline.data.reader import Reader
from pipeline.words import counted
from tools.support.budgets import limits_of
from tools.support.markdown import table
from tools.support.outputs import ANY_NAME
from tools.support.report_page import Page

Table = tuple[list[str], list[list[str]]]

SHOWN = 12  # images that left at an exit
EVEN = 1.0  # q of the budget by which they are shown: equally many leave at each exit
WORDS = {True: "measured", False: "as given"}


def result_to_text(result: dict[str, Any]) -> str:
    """What the command prints."""
    return "\n".join(_sections(result, heading=""))


def write_report(folder: Path, result: dict[str, Any], answers: Answers, index: DatasetIndex) -> None:
    """Write report.json, report.md, report.html and their pictures.

    Args:
        answers: of each exit by itself, to the images of `index`.
    """
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    pictures = {"error.png": ("Error against cost", draw_curves(result))}
    budget = next((b for b in result["budgets"] if b["q"] == EVEN), None)
    if budget:
        at = leaves_at(answers.confidence, limits_of(budget))
        right = answers.classes[at, np.arange(len(at))] == index.labels
        pictures["easy-and-hard.png"] = ("Easy and hard images", draw_easy_and_hard(at, right, index))
    for name, (_, picture) in pictures.items():
        picture.savefig(folder / name, dpi=110)
    lines = ["# Answers at any time", "", *_sections(result, heading="## ")]
    for name, (title, _) in pictures.items():
        lines += ["", f"## {title}", "", f"![{title}]({name})"]
    (folder / "report.md").write_text("\n".join(lines) + "\n", **ANY_NAME)
    (folder / "report.html").write_text(_html(folder, result, pictures), **ANY_NAME)
    print(f"report: {folder / 'report.html'}")


def draw_curves(result: dict[str, Any]) -> Figure:
    """Top-1 error against multiply-accumulates and against measured images/s: exits, budgets and other networks."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    by_work, by_speed = figure.subplots(1, 2)
    for axes, key in ((by_work, "multiply_accumulates"), (by_speed, "images_per_second")):
        scale = 1e6 if axes is by_work else 1
        _line(axes, result["exits"], key, scale, "o-", "exits, at any time")
        _line(axes, result["budgets"], key, scale, ".-", "budgets")
        if axes is by_work:
            summed = [budget["summed"] for budget in result["budgets"]]
            _line(axes, summed, key, scale, ".--", "budgets, summed softmax")
        for row in result["beside"]:
            if row[key] is not None:
                axes.plot(row[key] / scale, row["top1_error"], "*" if row["measured"] else "^", color="black")
                axes.annotate(
                    row["name"],
                    (row[key] / scale, row["top1_error"]),
                    textcoords="offset points",
                    xytext=(5, 5),
                    fontsize=7,
                )
        axes.set_ylabel("top-1 error, %")
        axes.set_xscale("log")
        axes.margins(x=0.1, y=0.1)
        axes.legend()
    by_work.set(xlabel="million multiply-accumulates an image", title=result["model"])
    speed = f"images/s in batches of {result['batch_size']} ({result['device']}, {_threads(result)})"
    by_speed.set(xlabel=speed, title="measured")
    return figure


def draw_easy_and_hard(at: np.ndarray, right: np.ndarray, index: DatasetIndex) -> Figure:
    """Images that are answered right at the first exit, and such as are answered right at the last one.

    Args:
        at: (N) the exit, from 0, at which each image left.
        right: (N) whether the answer was right.
    """
    figure = Figure(figsize=(SHOWN, 3.2), layout="constrained")
    parts, reader = figure.subfigures(2, 1, squeeze=False)[:, 0], Reader(index)
    for part, exit, words in zip(parts, (0, at.max(initial=0)), ("first", "last"), strict=True):
        found = np.flatnonzero(right & (at == exit))
        found = found[np.argsort(index.labels[found], kind="stable")]  # so that all classes are shown
        chosen = found[np.linspace(0, len(found) - 1, min(SHOWN, len(found))).astype(np.int64)]
        part.suptitle(f"answered right at the {words} exit ({len(found):,} images)", fontsize=9)
        for axes, i in zip(part.subplots(1, SHOWN), [*chosen.tolist(), *[None] * (SHOWN - len(chosen))], strict=True):
            axes.set_axis_off()
            if i is not None:
                axes.imshow(np.asarray(decode(reader.read(i), index.location(i))))
                axes.set_title(index.classes[index.labels[i]][:14], fontsize=7)
    return figure


def _line(axes: Axes, rows: list[dict[str, Any]], key: str, scale: float, style: str, label: str) -> None:
    points = sorted((row[key] / scale, row["top1_error"]) for row in rows)
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)


def _sections(r: dict[str, Any], heading: str) -> list[str]:
    lines = [_about(r)]
    lines += [f"training: {r['training']}"] if r["training"] else []
    for title, columns in _tables(r):
        lines += ["", f"{heading}{title}", "", *table(*columns, names=1)]
    if not r["budgets"]:
        lines += ["", "no budgets: the run held no training images out: give --thresholds DIR, images of the same kind"]
    lines += ["", *filter(None, (_comparison(row, r["budgets"]) for row in r["beside"]))]
    return lines


def _about(r: dict[str, Any]) -> str:
    held_out = f", {r['held_out']['images']:,} held-out images for the thresholds" if r["held_out"] else ""
    return (
        f"{r['model']}, {r['parameters']:,} parameters, {r['images']:,} images of {r['data']}{held_out}, "
        f"crop {r['crop_size']}, {r['loader']} loader; time: {r['timed_images']} images, {r['device']}, {_threads(r)}"
    )


def _threads(r: dict[str, Any]) -> str:
    return counted(r["threads"], "thread")


def _tables(r: dict[str, Any]) -> list[tuple[str, Table]]:
    batches = f"images/s, batches of {r['batch_size']}"
    exits = [
        [
            str(row["exit"]),
            f"{row['multiply_accumulates'] / 1e6:,.2f}",
            _with_interval(row),
            f"{row['summed_top1_error']:.2f}",
            f"{row['images_per_second']:,.1f}",
            f"{row['ms_alone']:.2f}",
        ]
        for row in r["exits"]
    ]
    titles = ["exit", "million MACs", "top-1 error, % (95 %)", "summed softmax, %", batches, "ms, an image alone"]
    found = [("Answers at any time", (titles, exits))]
    if r["budgets"]:
        rows = [
            [
                f"{b['q']:.2f}",
                " ".join(f"{100 * share:.0f}" for share in b["shares"]),
                f"{b['multiply_accumulates'] / 1e6:,.2f}",
                _with_interval(b),
                f"{b['images_per_second']:,.1f}",
                f"{b['summed']['multiply_accumulates'] / 1e6:,.2f}",
                f"{b['summed']['top1_error']:.2f}",
            ]
            for b in r["budgets"]
        ]
        titles = ["q", "% leave at exit 1, 2, ...", "mean million MACs", "top-1 error, % (95 %)", batches]
        found.append(("Budgets", ([*titles, "summed softmax: million MACs", "error, %"], rows)))
    if r["beside"]:
        rows = [
            [
                row["name"],
                f"{row['multiply_accumulates'] / 1e6:,.2f}",
                f"{row['top1_error']:.2f} ({WORDS[row['measured']]})",
                "" if row["images_per_second"] is None else f"{row['images_per_second']:,.1f}",
                "" if row["ms_alone"] is None else f"{row['ms_alone']:.2f}",
            ]
            for row in r["beside"]
        ]
        found.append(
            ("Other networks", (["network", "million MACs", "top-1 error, %", batches, "ms, an image alone"], rows))
        )
    return found


def _with_interval(row: dict[str, Any]) -> str:
    low, high = row["top1_interval"]
    return f"{row['top1_error']:.2f} ({low:.2f} to {high:.2f})"


def _comparison(row: dict[str, Any], budgets: list[dict[str, Any]]) -> str:
    if not budgets:
        return ""
    if row["as_good"] is None:
        least = min(budget["top1_error"] for budget in budgets)
        return f"{row['name']}: no budget reaches its error of {row['top1_error']:.2f} %; the least is {least:.2f} %"
    best = row["as_good"]
    speed = "" if best["speed_ratio"] is None else f" and {best['speed_ratio']:.2f} times the images/s"
    return (
        f"{row['name']}: the cheapest budget that is as good (q {best['q']:.2f}, error {best['top1_error']:.2f} %) takes "
        f"{1 / best['work_ratio']:.2f} times the multiply-accumulates{speed}"
    )


def _html(folder: Path, result: dict[str, Any], pictures: dict[str, tuple[str, Figure]]) -> str:
    page = Page("Answers at any time")
    page.lines([_about(result), *([f"training: {result['training']}"] if result["training"] else [])])
    for name, (title, _) in pictures.items():
        source = base64.b64encode((folder / name).read_bytes()).decode()
        page.heading(2, title)
        page.add(f'<img style="max-width: 100%" src="data:image/png;base64,{source}" alt="{html.escape(title)}">')
    for title, rows in _tables(result):
        page.heading(2, title)
        page.table(rows)
    page.lines([line for row in result["beside"] if (line := _comparison(row, result["budgets"]))])
    return page.text()
