"""The results of tools/anytime.py as text, Markdown, JSON, figures and an HTML page."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pipeline.budget import Answers, leaves_at
from pipeline.class_names import short_names
from pipeline.data.index import DatasetIndex
from pipeline.data.reader import Reader
from pipeline.words import counted, drawable
from tools.support.budgets import limits_of
from tools.support.markdown import table
from tools.support.outputs import ANY_NAME, in_folder
from tools.support.report_page import Page, Thumbnails, picture

Table = tuple[list[str], list[list[str]]]
Shown = list[tuple[str, list[int]]]  # titles with positions of images

SHOWN = 12  # images that left at an exit
EVEN = 1.0  # q of the budget by which they are shown: equally many leave at each exit
FAR_APART = 20.0  # percent between the times of the rounds, from which on that is said before all else
WORDS = {True: "measured", False: "as given"}


def result_to_text(result: dict[str, Any]) -> str:
    """What the command prints."""
    return "\n".join(_sections(result, heading=""))


def write_report(folder: Path, result: dict[str, Any], answers: Answers, index: DatasetIndex) -> None:
    """Write report.json, report.md, report.html and their pictures.

    Args:
        answers: of each exit by itself, to the images of `index`.
    """
    in_folder(folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    pictures = {"error.png": ("Error against cost", draw_curves(result))}
    shown: Shown = []
    budget = next((b for b in result["budgets"] if b["q"] == EVEN), None)
    if budget:
        at = leaves_at(answers.confidence, limits_of(budget))
        right = answers.classes[at, np.arange(len(at))] == index.labels
        shown = easy_and_hard(at, right, index.labels)
        pictures["easy-and-hard.png"] = ("Easy and hard images", draw_easy_and_hard(shown, index))
    for name, (_, figure) in pictures.items():
        figure.savefig(folder / name, dpi=110)
    lines = ["# Answers at any time", "", *_sections(result, heading="## ")]
    for name, (title, _) in pictures.items():
        lines += ["", f"## {title}", "", f"![{title}]({name})"]
    (folder / "report.md").write_text("\n".join(lines) + "\n", **ANY_NAME)
    curves = (folder / "error.png").read_bytes()
    (folder / "report.html").write_text(_html(result, curves, shown, index), **ANY_NAME)
    print(f"report: {folder / 'report.html'}")


def draw_curves(result: dict[str, Any]) -> Figure:
    """Top-1 error against multiply-accumulates and against measured images/s: exits, budgets and other networks."""
    figure = Figure(figsize=(6.5, 9), layout="constrained")  # one above the other, so that a narrow page shows them too
    by_work, by_speed = figure.subplots(2, 1)
    for axes, key in ((by_work, "multiply_accumulates"), (by_speed, "images_per_second")):
        scale = 1e6 if axes is by_work else 1
        _line(axes, result["exits"], key, scale, "o-", "#0072b2", "exits, at any time")
        _line(axes, result["budgets"], key, scale, ".-", "#d55e00", "budgets")
        if axes is by_work:
            summed = [budget["summed"] for budget in result["budgets"]]
            _line(axes, summed, key, scale, ".--", "#009e73", "budgets, summed softmax")
        for number, row in enumerate(
            result["beside"], start=1
        ):  # its number stands where its name would cover the lines
            if row[key] is not None:
                name = f"{row['name']}{'' if row['measured'] else ', error as published or given'}"
                marker = {"marker": f"${number}$", "markersize": 5 + 4 * len(str(number)), "markeredgewidth": 0}
                axes.plot(row[key] / scale, row["top1_error"], ls="", color="black", label=drawable(name), **marker)
        axes.set_ylabel("top-1 error, %")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # also where the axis spans less than a power of ten
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        axes.margins(x=0.1, y=0.1)
    by_work.set(xlabel="million multiply-accumulates an image", title=result["model"])
    speed = f"images/s in batches of {result['batch_size']} ({result['device']}, {_threads(result)})"
    by_speed.set(xlabel=speed, title="measured: more to the right is faster")
    figure.legend(*by_work.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return figure


def easy_and_hard(at: np.ndarray, right: np.ndarray, labels: np.ndarray) -> Shown:
    """Images that are answered right at the first exit, and such as are answered right at the last one.

    Args:
        at: (N) the exit, from 0, at which each image left.
        right: (N) whether the answer was right.
    """
    shown = []
    for exit, words in ((0, "first"), (at.max(initial=0), "last")):
        found = np.flatnonzero(right & (at == exit))
        found = found[np.argsort(labels[found], kind="stable")]  # so that all classes are shown
        chosen = found[np.linspace(0, len(found) - 1, min(SHOWN, len(found))).astype(np.int64)]
        shown.append((f"answered right at the {words} exit ({counted(len(found), 'image')})", chosen.tolist()))
    return shown


def draw_easy_and_hard(shown: Shown, index: DatasetIndex) -> Figure:
    figure = Figure(figsize=(SHOWN, 3.2), layout="constrained")
    parts, reader = figure.subfigures(2, 1, squeeze=False)[:, 0], Reader(index)
    for part, (title, chosen) in zip(parts, shown, strict=True):
        part.suptitle(title, fontsize=9)
        for axes, i in zip(part.subplots(1, SHOWN), [*chosen, *[None] * (SHOWN - len(chosen))], strict=True):
            axes.set_axis_off()
            if i is not None:
                axes.imshow(np.asarray(picture(index, reader, i).convert("RGB")))
                axes.set_title(drawable(index.classes[index.labels[i]][:14]), fontsize=7)
    return figure


def _line(axes: Axes, rows: list[dict[str, Any]], key: str, scale: float, style: str, color: str, label: str) -> None:
    points = sorted((row[key] / scale, row["top1_error"]) for row in rows)
    if points:
        axes.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=5)


def _sections(r: dict[str, Any], heading: str) -> list[str]:
    lines = _head(r)
    for title, columns in _tables(r):
        lines += ["", f"{heading}{title}", "", *table(*columns, names=1)]
    if not r["budgets"]:
        why = (
            "the run held no training images out: give --thresholds DIR: other images of the same kind, not trained on"
        )
        lines += ["", f"no budgets: {why}"]
    lines += ["", *comparisons(r)]
    return lines


def _about(r: dict[str, Any]) -> str:
    chosen = r["held_out"]
    which = "held-out images" if chosen and chosen["by_the_run"] else f"images of {chosen['data']}" if chosen else ""
    held_out = f", {chosen['images']:,} {which} for the thresholds" if chosen else ""
    which_weights = ", ".join(filter(None, (r["trained"], r["note"]))) or "training not recorded in the file"
    return (
        f"{r['name']}: {which_weights}\n"
        f"{r['model']}, {r['parameters']:,} parameters, {r['images']:,} images of {r['data']}{held_out}, "
        f"crop {r['crop_size']}, {r['loader']} loader; time: {counted(r['timed_images'], 'image')}, {r['device']}, "
        f"{_threads(r)}, median of {counted(r['timed_rounds'], 'round')}, {r['time_spread']:.0f} % apart"
    )


def _head(r: dict[str, Any]) -> list[str]:
    """What must be known before the numbers are read."""
    lines = [_about(r)]
    if r["trained_on"]:
        lines.append(f"trained on {r['trained_on']}")
    if r["time_spread"] >= FAR_APART:
        lines.append(
            f"times of the same work lie {r['time_spread']:.0f} % apart (a busy machine, or few --timed-images): smaller "
            "differences of speed may be chance"
        )
    if r["training"]:
        lines.append(f"training: {r['training']}")
    return lines


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
            _speed(row["images_per_second"]),
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
                _speed(b["images_per_second"]),
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
                "" if row["images_per_second"] is None else _speed(row["images_per_second"]),
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


def _speed(images_per_second: float) -> str:
    """Three significant digits, as more are noise."""
    digits = max(0, 2 - math.floor(math.log10(images_per_second)))
    return f"{float(f'{images_per_second:.3g}'):,.{digits}f}"


def comparisons(r: dict[str, Any]) -> list[str]:
    """What the cheapest budget as good as each other network takes beside it, a line each."""
    return [line for row in r["beside"] if (line := _comparison(row, r["budgets"], r["time_spread"]))]


def _comparison(row: dict[str, Any], budgets: list[dict[str, Any]], time_spread: float) -> str:
    if not budgets:
        return ""
    if row["as_good"] is None:
        least = min(budget["top1_error"] for budget in budgets)
        return f"{row['name']}: no budget reaches its error of {row['top1_error']:.2f} %; the least is {least:.2f} %"
    best = row["as_good"]
    chance = f" (of times that lie {time_spread:.0f} % apart)" if time_spread >= FAR_APART else ""
    speed = "" if best["speed_ratio"] is None else f" and {best['speed_ratio']:.2f} times the images/s{chance}"
    return (
        f"{row['name']}: the cheapest budget that is as good (q {best['q']:.2f}, error {best['top1_error']:.2f} %) takes "
        f"{1 / best['work_ratio']:.2f} times the multiply-accumulates{speed}"
    )


def _html(result: dict[str, Any], curves: bytes, shown: Shown, index: DatasetIndex) -> str:
    """One page with its pictures embedded.

    Args:
        curves: a PNG file.
    """
    page = Page("Answers at any time")
    page.lines(_head(result))
    page.lines(comparisons(result))
    page.heading(2, "Error against cost")
    source = base64.b64encode(curves).decode()
    page.add(f'<img style="max-width: 100%" src="data:image/png;base64,{source}" alt="error against cost">')
    if shown:
        page.heading(2, "Easy and hard images")
    thumbnails, names = Thumbnails(index), short_names(index.classes)
    for title, chosen in shown:
        page.heading(3, title[0].upper() + title[1:])
        page.gallery([thumbnails.figure(i, [("true", names[index.labels[i]])]) for i in chosen])
    for title, rows in _tables(result):
        page.heading(2, title)
        if title == "Budgets":  # there are many, which scroll in a frame
            page.sortable(rows, texts={1})
        else:
            page.table(rows)
    return page.text()
