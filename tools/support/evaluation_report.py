"""The results of tools/evaluate.py as text, Markdown, JSON and an HTML page (report_page.py)."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.class_names import short_names
from pipeline.data.index import DatasetIndex
from pipeline.evaluation import Evaluation
from pipeline.metrics import accuracy
from pipeline.parsing import value_text
from pipeline.words import counted
from tools.support.facts import billions, millions
from tools.support.label_report import label_lines, label_overview, label_table, write_label_answers
from tools.support.markdown import table
from tools.support.outputs import ANY_NAME, in_folder
from tools.support.report_page import (
    Page,
    Thumbnails,
    class_errors,
    class_table,
    confusions,
    only_wrong,
    reliability,
    surest_mistakes,
)


def result_to_text(result: dict[str, Any], named: bool = False) -> str:
    """What the command prints about one network; `named` where it is one of several."""
    name = [f"{result['name']}:"] if named else []
    which = ", ".join(filter(None, (result["trained"], result["note"])))
    return "\n".join([*name, *([f"{result['weights']}: {which}"] if which else []), *_lines(result)])


def comparisons_to_text(summary: dict[str, Any]) -> str:
    """What the command prints about several networks together."""
    return "\n".join(["", *table(*_overview(summary["evaluations"]), 2), *map(_comparison, summary["comparisons"])])


def write_report(
    folder: Path, summary: dict[str, Any], evaluations: list[Evaluation], indexes: list[DatasetIndex]
) -> None:
    """Write report.json, report.md and report.html."""
    in_folder(folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    summary, indexes = in_english(summary, indexes)
    (folder / "report.md").write_text(to_markdown(summary), **ANY_NAME)
    (folder / "report.html").write_text(to_html(summary, evaluations, indexes), **ANY_NAME)
    print(f"report: {folder / 'report.html'}")


def in_english(summary: dict[str, Any], indexes: list[DatasetIndex]) -> tuple[dict[str, Any], list[DatasetIndex]]:
    """The same with names in place of the ids of ImageNet's classes, as pages show them."""
    results, renamed = [], []
    for result, index in zip(summary["evaluations"], indexes, strict=True):
        names = short_names(index.classes)
        called = dict(zip(index.classes, names, strict=True))
        tables = {
            table: [
                {**row, **{key: called[row[key]] for key in ("class", "answer") if key in row}} for row in result[table]
            ]
            for table in ("by_class", "confusions")
            if table in result
        }
        results.append(result | tables)
        renamed.append(dataclasses.replace(index, classes=tuple(names)))
    return summary | {"evaluations": results}, renamed


def _overview(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row for each network and for each of its published errors."""
    if _several_labels(results[0]):
        return label_overview(results)
    rows, any_real = [], any(r["real"] for r in results)
    shown = (1, 5) if any(r["top5_error"] is not None for r in results) else (1,)
    for r in results:
        size = [millions(r["parameters"]), billions(r["multiply_accumulates"])]
        real = [f"{r['real']['top1_error']:.2f}" if r["real"] else ""] if any_real else []
        own = [_with_interval(r[f"top{k}_error"], r[f"top{k}_interval"]) for k in shown]
        rows.append([r["name"], r["model"], *size, *own, *real])
        for p in r["published"]:
            theirs = ["" if p[f"top{k}_error"] is None else f"{p[f'top{k}_error']:.2f}" for k in shown]
            rows.append([f"  {p['source']}", r["model"], *size, *theirs, *[""][: len(real)]])
    titles = [
        "weights",
        "model",
        "M params",
        "GMACs",
        *(f"top-{k} error, % (95 %)" for k in shown),
        *(["ReaL error, %"] if any_real else []),
    ]
    return titles, rows


def to_markdown(summary: dict[str, Any]) -> str:
    first = summary["evaluations"][0]
    lines = [
        "# Evaluation",
        "",
        f"{counted(first['images'], 'image')} of {first['data']}.",
        "",
        *(f"- {name}: {text}" for name, text in summary["about"].items()),
        "",
        *table(*_overview(summary["evaluations"]), 2),
        "",
    ]
    lines += [f"- {_comparison(row)}" for row in summary["comparisons"]]
    for result in summary["evaluations"]:
        known = [f"{name}: {text}" for name, text in _origin(result).items()] + _lines(result)
        if not _several_labels(result) and result["calibration"]["ece"] is not None:
            known.append(f"expected calibration error {result['calibration']['ece']:.2f} %")
        lines += ["", f"## {result['name']}", "", *(f"- {line}" for line in known), "", "### Classes", ""]
        if _several_labels(result):
            lines += table(*label_table(result), 1)
            continue
        lines += [*table(*_class_table(result), 1), "", "### Most frequent confusions", ""]
        lines += table(*_confusion_table(result), 2)
    return "\n".join(lines) + "\n"


def to_html(summary: dict[str, Any], evaluations: list[Evaluation], indexes: list[DatasetIndex]) -> str:
    """One HTML page with its pictures embedded."""
    results, first = summary["evaluations"], summary["evaluations"][0]
    page, thumbnails = Page("Evaluation"), Thumbnails(indexes[0])
    page.facts({"data": f"{counted(first['images'], 'image')} of {first['data']}"})
    page.table(_overview(results), names=2)
    page.facts(summary["about"])
    for row in summary["comparisons"]:
        _add_comparison(page, row, results, evaluations, indexes, thumbnails)
    for result, evaluation, index in zip(results, evaluations, indexes, strict=True):
        page.heading(2, result["name"])
        page.facts(_origin(result))
        page.lines(_lines(result))
        if _several_labels(result):
            page.heading(3, "Classes")
            page.sortable(label_table(result), texts={0})
            continue
        page.side_by_side(confusions(evaluation, index), reliability(result["calibration"]))
        shown = surest_mistakes(evaluation, index, thumbnails)
        page.heading(3, f"The {len(shown)} surest of {result['top1_wrong']:,} mistakes" if shown else "No mistakes")
        page.gallery(shown)
        page.heading(3, "Most frequent confusions")
        page.sortable(_confusion_table(result), texts={0, 1})
        page.heading(3, "Classes")
        classes = class_table(result, evaluation, index)
        page.sortable(classes, texts={0, len(classes[0]) - 1})
    return page.text()


def _add_comparison(
    page: Page,
    row: dict[str, Any],
    results: list[dict[str, Any]],
    evaluations: list[Evaluation],
    indexes: list[DatasetIndex],
    thumbnails: Thumbnails,
) -> None:
    """What two networks disagree on."""
    known = {r["name"]: (r["name"], e, i) for r, e, i in zip(results, evaluations, indexes, strict=True)}
    a, b = known[row["a"]], known[row["b"]]
    page.heading(2, f"{row['a']} and {row['b']}")
    page.lines([_comparison(row)])
    for wrong, right, number in ((a, b, row["only_a_wrong"]), (b, a, row["only_b_wrong"])):
        shown = only_wrong(wrong, right, thumbnails)
        part = f"the {len(shown)} surest of " if len(shown) < number else ""
        page.heading(3, f"Only {wrong[0]} is wrong: {part}{counted(number, 'image')}")
        page.gallery(shown)


def write_answers(file: Path, evaluation: Evaluation, index: DatasetIndex) -> None:
    """One CSV line an image: file, its class, the loss, the first answer and its probability, and the other answers in order.

    Answers that are not finite have no names, and the probability nan. Of several labels an image: `write_label_answers`.
    """
    if index.several_labels:
        write_label_answers(file, evaluation, index)
        return
    with open(file, "w", newline="", **ANY_NAME) as stream:
        writer = csv.writer(stream)
        others = [f"answer{i + 1}" for i in range(1, evaluation.top5.shape[1])]
        writer.writerow(["file", "class", "loss", "answer1", "probability1", *others])
        columns = (index.names, index.labels, evaluation.probability, evaluation.losses, evaluation.top5)
        for name, label, probability, loss, top5 in zip(*columns, strict=True):
            named = [index.classes[k] if k >= 0 else "" for k in top5]
            sure = f"{probability:.6f}" if named[0] else "nan"
            writer.writerow([name, index.classes[label], f"{loss:.6f}", named[0], sure, *named[1:]])


def _origin(r: dict[str, Any]) -> dict[str, str]:
    """Where a network's weights come from."""
    return {
        "file": f"{r['weights']} (SHA-256 {r['sha256'][:16]}...)",
        "model": f"{r['model']}, {r['parameters']:,} parameters",
        "trained up to": r["trained"] or "not recorded in the file",
        **({"weights": r["note"]} if r["note"] else {}),
    }


def _several_labels(result: dict[str, Any]) -> bool:
    return "mean_auroc" in result


def _lines(r: dict[str, Any]) -> list[str]:
    views = "1 crop" if r["crops"] == 1 else f"10 crops ({r['average']} averaged)"
    lines = [
        f"{r['model']}, {views}, {r['interpolation']} resize to {r['resize_size']}, crop {r['crop_size']}, "
        f"mean {_of_colors(r['mean'])}, std {_of_colors(r['std'])}, {r['loader']} loader, "
        f"{r['precision']}, {counted(r['ranks'], 'rank')}, {counted(r['images'], 'image')} in {r['seconds']:,.1f} s",
    ]
    if r["assumed"]:
        lines.append(f"assumed, as the file does not say it: {', '.join(r['assumed'])}")
    lines += label_lines(r) if _several_labels(r) else _error_lines(r)
    if r["not_finite"]:
        lines.append(
            f"the answers to {counted(r['not_finite'], 'image')} are not finite and count as wrong (the first: "
            f"{r['first_not_finite']}): damaged weights, or numbers too large for --precision"
        )
    if r["trained_on"]:
        lines.append(f"trained on {r['trained_on']}")
    if r["chosen_by_these"]:
        lines.append("of its run's epochs these images found this one the best: new images usually have a worse result")
    if r["chosen_by_some"]:
        lines.append(
            f"its run's best epoch was chosen by {r['chosen_by_some']}: new images usually have a worse result"
        )
    if r["validated_in"] in ("bf16", "fp16") and r["validated_in"] != r["precision"]:
        lines.append(
            f"its run was validated on these images in {r['validated_in']}, so that a few answers may differ "
            f"(--precision {r['validated_in']} computes as it did)"
        )
    if r["begun_with"]:
        lines.append(f"begun with {r['begun_with']}")
    if r["training"]:
        lines.append(f"recipe: {r['training']}")
    return lines


def _of_colors(numbers: Sequence[float]) -> str:
    """A mean or standard deviation in as few numbers as say it."""
    return value_text(tuple(numbers) if len(set(numbers)) > 1 else numbers[0])


def _error_lines(r: dict[str, Any]) -> list[str]:
    lines = []
    for k in (1, 5):
        if (error := r[f"top{k}_error"]) is not None:
            low, high = r[f"top{k}_interval"]
            lines.append(
                f"top-{k} error {error:.2f} %  (accuracy {accuracy(error):.2f} %; {r[f'top{k}_wrong']} of {r['images']} wrong; "
                f"Wilson's 95 % interval {low:.2f} to {high:.2f})"
            )
    sizes = [row["images"] for row in r["by_class"]]
    if max(sizes) > min(sizes):
        frequent = 100 * (sum(sizes) - max(sizes)) / sum(sizes)
        lines.append(
            f"mean error of a class {r['mean_class_error']:.2f} %, however many images each has ({min(sizes):,} to "
            f"{max(sizes):,}); the most frequent class as every answer has a top-1 error of {frequent:.2f} %"
        )
    if r["real"]:
        images = counted(r["real"]["images"], "image")
        lines.append(f"top-1 error {r['real']['top1_error']:.2f} % by the ReaL labels of {images}")
    if other := r["other_outputs"]:
        top5 = "" if other["top5_error"] is None else f", top-5 error {other['top5_error']:.2f} %"
        lines.append(
            f"images of {r['classes_present']} of the {r['classes']} classes: the network chose among {_outputs(r)}; among "
            f"{_outputs(other)} top-1 error {other['top1_error']:.2f} %{top5} "
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
    return (
        f"all {number} outputs" if result["outputs"] == "all" else f"the {counted(number, 'output')} of those classes"
    )


def _comparison(row: dict[str, Any]) -> str:
    return (
        f"{row['a']} and {row['b']}: {counted(row['only_a_wrong'], 'image')} that only the first gets wrong, "
        f"{row['only_b_wrong']} that only the second does; p = {row['p']:.2g} that equally good networks differ so much "
        "or more (McNemar's exact test)"
    )


def _with_interval(error: float | None, interval: tuple[float, float] | None) -> str:
    return "" if error is None or interval is None else f"{error:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def _class_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    worst_first = sorted(result["by_class"], key=lambda row: -row["top1_error"])
    shown = class_errors(result)
    rows = [[row["class"], str(row["images"]), *(f"{row[key]:.2f}" for key in shown)] for row in worst_first]
    return ["class", "images", *shown.values()], rows


def _confusion_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return ["true class", "predicted class", "images"], [
        [r["class"], r["answer"], str(r["images"])] for r in result["confusions"]
    ]
