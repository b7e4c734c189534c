"""What tools/lab/benchmark.py measured: its arithmetic, Markdown and plots."""

import re
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.models.zoo import DENSENETS
from tools.lab.machine import machine_line
from tools.support.markdown import table

BASELINE, COMPILED = "torchvision NCHW", "torchvision compiled"
TITLES = {"step": "Training steps", "inference": "Inference"}

Point = tuple[int, list[dict[str, Any]]]  # a depth or batch size, and the rows measured there


def summarise(rows: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """Add what follows from the samples: medians, and ratios to the fastest peer and to the baseline's memory.

    A ratio of speeds is the median over the repetitions, each of which compares what ran side by side.
    """
    medians = {row["implementation"]: statistics.median(row["seconds"]) for row in rows}
    best = min((row for row in rows if row["peer"]), key=lambda row: medians[row["implementation"]])
    (baseline,) = (row["memory_bytes"] for row in rows if row["implementation"] == BASELINE)
    return [
        row
        | {
            "median_s": medians[row["implementation"]],
            "images_per_s": batch_size / medians[row["implementation"]],
            "ratio": statistics.median(b / s for b, s in zip(best["seconds"], row["seconds"], strict=True)),
            "best_peer": row is best,
            "memory_ratio": row["memory_bytes"] / baseline,
        }
        for row in rows
    ]


def report(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    what = "step" if results["task"] == "step" else "pass"
    titles = [
        "implementation",
        "images/s",
        f"s per {what}",
        "speed ratio",
        "memory, MiB",
        "memory ratio",
        "first call, s",
    ]
    lines = [
        f"# {TITLES[results['task']]}",
        "",
        machine_line(results["machine"]),
        f"On {results['device']}: medians of {results['repeats']} interleaved repetitions; ratios to the fastest peer's "
        f"speed (higher is better) and to the memory of {BASELINE} (lower is better). The first call compiles what has "
        f"to be compiled. The memory of {COMPILED} includes its compiler's.",
    ]
    for measured in results["tables"]:
        rows = [
            [
                row["implementation"] + ", the fastest peer" * row["best_peer"],
                f"{row['images_per_s']:.1f}",
                f"{row['median_s']:.3f}",
                f"{row['ratio']:.2f}",
                f"{row['memory_bytes'] / 2**20:.0f}",
                f"{row['memory_ratio']:.2f}",
                f"{row['first_call_s']:.1f}",
            ]
            for row in measured["rows"]
        ]
        lines += ["", f"## {title(measured)}", "", *table(titles, rows, 1)]
        for reason in dict.fromkeys(measured["left_out"].values()):
            names = "; ".join(name for name, its_reason in measured["left_out"].items() if its_reason == reason)
            lines += ["", f"Left out: {names} ({reason})."]
    return "\n".join(lines)


def where(results: dict[str, Any]) -> str:
    """What stands over a picture, which may be seen alone."""
    return f"{machine_line(results['machine'])} On {results['device']}."


def title(measured: dict[str, Any]) -> str:
    return f"{measured['model']}, batch {measured['batch_size']}, {measured['size']} px, {measured['precision']}"


def plot_implementations(results: dict[str, Any], file: Path) -> None:
    """Bars of images per second and of memory, two panels a table."""
    tables = results["tables"]
    heights = [1 + 0.3 * len(measured["rows"]) for measured in tables]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    grid = figure.subplots(len(tables), 2, sharey="row", squeeze=False, height_ratios=heights)
    for measured, (speed, memory) in zip(tables, grid, strict=True):
        rows = measured["rows"]
        names, colors = (
            [row["implementation"] for row in rows],
            ["tab:gray" if row["peer"] else "tab:blue" for row in rows],
        )
        for axes, values, label, digits in (
            (speed, [row["images_per_s"] for row in rows], "images/s", 1),
            (memory, [row["memory_bytes"] / 2**20 for row in rows], "memory, MiB", 0),
        ):
            axes.bar_label(axes.barh(names, values, color=colors), fmt=f"%.{digits}f", padding=4)
            axes.margins(x=0.15)
            axes.set_xlabel(label)
        speed.invert_yaxis()
        speed.set_title(title(measured), loc="left")
    figure.suptitle(where(results), fontsize=9)
    figure.savefig(file, dpi=120)


def plot_growth(results: dict[str, Any], file: Path) -> bool:
    """Lines of time and memory over the batch and over the depth. Returns whether there was anything to draw."""
    series = growth(results["tables"])
    if not series:
        file.unlink(missing_ok=True)  # an earlier benchmark's
        return False
    figure = Figure(figsize=(13, 4 * len(series)), layout="constrained")
    grid = figure.subplots(len(series), 2, squeeze=False)
    for (what, unit, points), (time, memory) in zip(series, grid, strict=True):
        draw_lines(time, points, "median_s", 1)
        draw_lines(memory, points, "memory_bytes", 2**20)
        time.set_title(what, loc="left")
        time.set(xlabel=unit, ylabel=f"seconds per {'step' if results['task'] == 'step' else 'pass'}")
        memory.set(xlabel=unit, ylabel="memory, MiB")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle(where(results), fontsize=9)
    figure.savefig(file, dpi=120)
    return True


def growth(tables: list[dict[str, Any]]) -> list[tuple[str, str, list[Point]]]:
    """What to draw lines of: a title, what x is, and the rows measured at each x.

    Depths are joined where the networks have the same growth rate.
    """
    batches: dict[str, list[Point]] = {}
    depths: dict[str, list[Point]] = {}
    for measured in tables:
        spec, rest = DENSENETS[measured["model"]], f"{measured['size']} px, {measured['precision']}"
        family = f"DenseNets with k = {spec['growth_rate']}, batch {measured['batch_size']}, {rest}"
        depth = int(re.findall(r"\d+", measured["model"])[0])
        batches.setdefault(f"{measured['model']}, {rest}", []).append((measured["batch_size"], measured["rows"]))
        depths.setdefault(family, []).append((depth, measured["rows"]))
    return [
        (what, x, sorted(points, key=lambda point: point[0]))
        for x, groups in (("batch size", batches), ("depth", depths))
        for what, points in groups.items()
        if len(points) > 1
    ]


def draw_lines(axes: Axes, points: list[Point], key: str, unit: int) -> None:
    """A line for each implementation; the peers' are gray and dashed."""
    peers = {row["implementation"]: row["peer"] for _, rows in points for row in rows}
    for i, (name, peer) in enumerate(peers.items()):
        found = [(x, row[key] / unit) for x, rows in points for row in rows if row["implementation"] == name]
        style: dict[str, Any] = dict(color=f"{0.3 + 0.1 * i:.1f}", linestyle="--") if peer else {}
        axes.plot(*zip(*found, strict=True), marker="osv^DxP*<>h"[i % 11], label=name, **style)
    axes.set_xticks([x for x, _ in points])
    axes.set_ylim(bottom=0)
