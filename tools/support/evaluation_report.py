"""The results of tools/evaluate.py as text, Markdown, JSON and an HTML page with pictures."""

import base64
import csv
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.decoding import decode
from pipeline.data.image_files import PixelFormat, deep_mode
from pipeline.data.index import DatasetIndex
from pipeline.data.reader import Reader
from pipeline.evaluation import Evaluation
from tools.support.label_report import label_lines, label_overview, label_table, write_label_answers
from tools.support.markdown import table
from tools.support.outputs import ANY_NAME

WORST = 24  # mistakes shown as pictures
THUMBNAIL = 160  # pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
.mistakes { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 170px } img { max-width: 100% }
figcaption { font-size: 12px; overflow-wrap: anywhere }
"""


def result_to_text(result: dict[str, Any]) -> str:
    """What the command prints about one network."""
    return "\n".join(_lines(result))


def comparisons_to_text(summary: dict[str, Any]) -> str:
    """What the command prints about several networks together."""
    return "\n".join(["", *table(*_overview(summary["evaluations"]), 2), *map(_comparison, summary["comparisons"])])


def write_report(
    folder: Path, summary: dict[str, Any], evaluations: list[Evaluation], indexes: list[DatasetIndex]
) -> None:
    """Write report.json, report.md and report.html."""
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "report.md").write_text(to_markdown(summary), **ANY_NAME)
    (folder / "report.html").write_text(to_html(summary, evaluations, indexes), **ANY_NAME)
    print(f"report: {folder / 'report.html'}")


def _overview(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row for each network and for each of its published errors."""
    if _several_labels(results[0]):
        return label_overview(results)
    rows = []
    for r in results:
        size = [f"{r['parameters'] / 1e6:.2f}", f"{r['multiply_accumulates'] / 1e9:.2f}"]
        real = f"{r['real']['top1_error']:.2f}" if r["real"] else ""
        own = [_with_interval(r[f"top{k}_error"], r[f"top{k}_interval"]) for k in (1, 5)]
        rows.append([r["name"], r["model"], *size, *own, real])
        for p in r["published"]:
            top5 = "" if p["top5_error"] is None else f"{p['top5_error']:.2f}"
            rows.append([f"  {p['source']}", r["model"], *size, f"{p['top1_error']:.2f}", top5, ""])
    titles = [
        "weights",
        "model",
        "M params",
        "GMACs",
        "top-1 error, % (95 %)",
        "top-5 error, % (95 %)",
        "ReaL error, %",
    ]
    return titles, rows


def to_markdown(summary: dict[str, Any]) -> str:
    first = summary["evaluations"][0]
    lines = [
        "# Evaluation",
        "",
        f"{first['images']:,} images of {first['data']}.",
        "",
        *table(*_overview(summary["evaluations"]), 2),
        "",
    ]
    lines += [f"- {_comparison(row)}" for row in summary["comparisons"]]
    for result in summary["evaluations"]:
        lines += ["", f"## {result['name']}", "", *(f"- {line}" for line in _lines(result)), "", "### Classes", ""]
        if _several_labels(result):
            lines += table(*label_table(result), 1)
            continue
        lines += [*table(*_class_table(result), 1), "", "### Most frequent confusions", ""]
        lines += table(*_confusion_table(result), 2)
    return "\n".join(lines) + "\n"


def to_html(summary: dict[str, Any], evaluations: list[Evaluation], indexes: list[DatasetIndex]) -> str:
    """One HTML page with its pictures embedded."""
    parts = ["<h1>Evaluation</h1>", _html_table(*_overview(summary["evaluations"]))]
    parts += [f"<p>{html.escape(_comparison(row))}</p>" for row in summary["comparisons"]]
    for result, evaluation, index in zip(summary["evaluations"], evaluations, indexes, strict=True):
        parts.append(f"<h2>{html.escape(result['name'])}</h2>")
        parts += [f"<p>{html.escape(line)}</p>" for line in _lines(result)]
        if _several_labels(result):
            parts += ["<h3>Classes</h3>", _html_table(*label_table(result))]
            continue
        parts += ["<h3>Worst mistakes</h3>", f'<div class="mistakes">{_pictures(evaluation, index)}</div>']
        parts += ["<h3>Most frequent confusions</h3>", _html_table(*_confusion_table(result))]
        parts += ["<h3>Classes</h3>", _html_table(*_class_table(result))]
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(parts)}</html>\n'


def write_answers(file: Path, evaluation: Evaluation, index: DatasetIndex) -> None:
    """One CSV line an image: file, its class, the probability of the first answer, the loss, and the answers in order.

    Answers that are not finite have no names, and the probability nan. Of several labels an image: `write_label_answers`.
    """
    if index.several_labels:
        write_label_answers(file, evaluation, index)
        return
    with open(file, "w", newline="", **ANY_NAME) as stream:
        writer = csv.writer(stream)
        answers = [f"answer{i + 1}" for i in range(evaluation.top5.shape[1])]
        writer.writerow(["file", "class", "probability", "loss", *answers])
        columns = (index.names, index.labels, evaluation.probability, evaluation.losses, evaluation.top5)
        for name, label, probability, loss, top5 in zip(*columns, strict=True):
            named = [index.classes[k] if k >= 0 else "" for k in top5]
            sure = f"{probability:.6f}" if named[0] else "nan"
            writer.writerow([name, index.classes[label], sure, f"{loss:.6f}", *named])


def _several_labels(result: dict[str, Any]) -> bool:
    return "mean_auroc" in result


def _lines(r: dict[str, Any]) -> list[str]:
    views = "1 crop" if r["crops"] == 1 else f"10 crops ({r['average']} averaged)"
    lines = [
        f"{r['model']}, {views}, {r['interpolation']} resize to {r['resize_size']}, crop {r['crop_size']}, "
        f"{r['loader']} loader, "
        f"{r['precision']}, {r['ranks']} rank{'s' if r['ranks'] > 1 else ''}, {r['images_per_second']:.1f} images/s",
    ]
    lines += label_lines(r) if _several_labels(r) else _error_lines(r)
    if r["not_finite"]:
        lines.append(
            f"the answers to {r['not_finite']} images are not finite and count as wrong (the first: {r['first_not_finite']}): "
            "damaged weights, or numbers too large for --precision"
        )
    if r["begun_with"]:
        lines.append(f"begun with {r['begun_with']}")
    if r["training"]:
        lines.append(f"training: {r['training']}")
    return [f"{r['weights']}: {r['note']}", *lines] if r["note"] else lines


def _error_lines(r: dict[str, Any]) -> list[str]:
    lines = [
        *(
            f"top-{k} error {r[f'top{k}_error']:.2f} %  ({r[f'top{k}_wrong']} of {r['images']} wrong; 95 % interval "
            f"{r[f'top{k}_interval'][0]:.2f} to {r[f'top{k}_interval'][1]:.2f})"
            for k in (1, 5)
        ),
    ]
    if r["real"]:
        lines.append(f"top-1 error {r['real']['top1_error']:.2f} % by the ReaL labels of {r['real']['images']} images")
    if other := r["other_outputs"]:
        lines.append(
            f"images of {r['classes_present']} of the {r['classes']} classes: the network chose among {_outputs(r)}; among "
            f"{_outputs(other)} top-1 error {other['top1_error']:.2f} %, top-5 error {other['top5_error']:.2f} % "
            f"(--outputs {other['outputs']})"
        )
    for p in r["published"]:
        top5 = "" if p["top5_error"] is None else f", top-5 error {p['top5_error']} %"
        lines.append(f"{p['source']}: top-1 error {p['top1_error']} %{top5}")
    if r["published_note"]:
        lines.append(r["published_note"])
    return lines


def _outputs(result: dict[str, Any]) -> str:
    number = result["outputs_used"]
    return f"all {number} outputs" if result["outputs"] == "all" else f"the {number} outputs of those classes"


def _comparison(row: dict[str, Any]) -> str:
    return (
        f"{row['a']} and {row['b']}: {row['only_a_wrong']} images that only the first gets wrong, {row['only_b_wrong']} that "
        f"only the second does; p = {row['p']:.2g} that equally good networks differ so much (McNemar)"
    )


def _with_interval(error: float, interval: tuple[float, float]) -> str:
    return f"{error:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def _class_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    worst_first = sorted(result["by_class"], key=lambda row: -row["top1_error"])
    rows = [
        [row["class"], str(row["images"]), f"{row['top1_error']:.2f}", f"{row['top5_error']:.2f}"]
        for row in worst_first
    ]
    return ["class", "images", "top-1 error, %", "top-5 error, %"], rows


def _confusion_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return ["true class", "predicted class", "images"], [
        [r["class"], r["answer"], str(r["images"])] for r in result["confusions"]
    ]


def _html_table(titles: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(titles, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _picture(content: np.ndarray, location: str, turned: bool) -> Image.Image:
    with Image.open(io.BytesIO(content.data)) as header:
        deep = deep_mode(header).startswith("I")
    image = decode(content, location, PixelFormat(16 if deep else 8, turned))
    return image.convert("L") if deep else image


def _pictures(evaluation: Evaluation, index: DatasetIndex) -> str:
    """The wrong predictions with the highest probability. Where an answer is not finite nothing is predicted."""
    answers = evaluation.top5[:, 0]
    wrong = np.flatnonzero((answers != index.labels) & (answers >= 0))
    surest = wrong[np.argsort(-evaluation.probability[wrong], kind="stable")][:WORST]
    reader, parts = Reader(index), []
    for i in surest.tolist():
        image = _picture(reader.read(i), index.location(i), index.turned is not None and bool(index.turned[i]))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85)
        source = base64.b64encode(jpeg.getvalue()).decode()
        answer, label = index.classes[evaluation.top5[i, 0]], index.classes[index.labels[i]]
        predicted = f"predicted: {html.escape(answer)} ({100 * evaluation.probability[i]:.0f} %)"
        parts.append(
            f'<figure><img src="data:image/jpeg;base64,{source}" alt=""><figcaption>{predicted}<br>'
            f"true: {html.escape(label)}<br>{html.escape(index.names[i])}</figcaption></figure>"
        )
    return "\n".join(parts)
