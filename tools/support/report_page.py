"""The results of tools/evaluate.py as one HTML page: pictures embedded, nothing loaded from elsewhere."""

import base64
import html
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.decoding import decode
from pipeline.data.image_files import PixelFormat, deep_mode
from pipeline.data.index import DatasetIndex
from pipeline.data.reader import Reader
from pipeline.evaluation import Evaluation
from pipeline.pictures import percent_text
from pipeline.words import counted
from tools.support.confusion import between_groups, confusion_matrix, group_classes

WORST = 24  # mistakes shown as pictures
DIFFERING = 12  # images shown on which one of two networks is wrong, of each of the two
THUMBNAIL = 160  # pixels
NAMED = 3  # classes that stand for a group
NUMBER_AND_UNIT, NO_BREAK = re.compile(r"(?<=\d) (?=%|s$)"), "\N{NO-BREAK SPACE}"
NAME = 24  # letters of a network's name below a picture

Table = tuple[list[str], list[list[str]]]  # titles and rows


class Page:
    """Collects the page's parts in their order."""

    def __init__(self, title: str):
        self._title, self._parts = title, [f"<h1>{html.escape(title)}</h1>"]

    def text(self) -> str:
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_beside('report_page.css')}</style>"
        )
        body = f"<main>{''.join(self._parts)}</main><script>{_beside('report_page.js')}</script>"
        return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'

    def heading(self, level: int, text: str) -> None:
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>\n")

    def lines(self, lines: list[str]) -> None:
        self._parts += [f"<p>{NUMBER_AND_UNIT.sub(NO_BREAK, html.escape(line))}</p>\n" for line in lines]

    def facts(self, facts: dict[str, str]) -> None:
        """What is known, by what it is."""
        rows = [f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()]
        self._parts.append(f"<dl>{''.join(rows)}</dl>\n")

    def table(self, table: Table, names: int = 1) -> None:
        """A table that becomes a list of cards where the page is narrow; its first `names` columns are no numbers."""
        titles, rows = table
        head = "".join(f"<th{_right(i >= names)}>{html.escape(title)}</th>" for i, title in enumerate(titles))
        body = ""
        for row in rows:
            cells = zip(titles, row, strict=True)
            body += f"<tr>{''.join(_card_cell(i >= names, *cell) for i, cell in enumerate(cells))}</tr>\n"
        self._parts.append(f'<table class="cards"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n')

    def sortable(self, table: Table, texts: set[int]) -> None:
        """A table that a click on a column's title sorts by it.

        Args:
            texts: positions of the columns that hold no numbers.
        """
        titles, rows = table
        head = "".join(
            f'<th{_right(i not in texts)} data-kind="{"text" if i in texts else "number"}">'
            f'<button type="button">{html.escape(title)}</button></th>'
            for i, title in enumerate(titles)
        )
        body = "\n".join(
            f"<tr>{''.join(f'<td{_right(i not in texts)}>{html.escape(c)}</td>' for i, c in enumerate(row))}</tr>"
            for row in rows
        )
        self._parts.append(
            f'<div class="tall"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
        )

    def gallery(self, figures: list[str]) -> None:
        self._parts.append(f'<div class="gallery">{"".join(figures)}</div>\n')

    def side_by_side(self, *blocks: str) -> None:
        self._parts.append(f'<div class="pair">{"".join(f"<section>{block}</section>" for block in blocks)}</div>\n')

    def add(self, block: str) -> None:
        self._parts.append(block)


class Thumbnails:
    """The images of an index as parts of a page; of several networks they are the same."""

    def __init__(self, index: DatasetIndex):
        self._index, self._reader = index, Reader(index)
        self._source = cache(self._encoded)

    def figure(self, i: int, captions: list[tuple[str, str]]) -> str:
        """Image `i` in a frame, with lines below it: what a line is and its text; the file's name is the last."""
        lines = "".join(
            f"<span><b>{html.escape(name)}</b> {html.escape(text)}</span>" for name, text in captions if text
        )
        name = self._index.names[i]
        words = html.escape("; ".join(f"{name} {text}" for name, text in captions), quote=True)
        source, small = self._source(i)
        image = f'<img src="{source}" alt="{words}"{small}>'
        return (
            f'<figure><div class="frame">{image}</div><figcaption>{lines}<span class="file">{html.escape(name)}</span>'
            "</figcaption></figure>\n"
        )

    def _encoded(self, i: int) -> tuple[str, str]:
        """The image as a link that holds it, and an attribute where it has so few pixels that they are to be seen."""
        image = picture(self._index, self._reader, i)
        small = ' class="pixels"' if max(image.size) < THUMBNAIL // 2 else ""
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}", small


def picture(index: DatasetIndex, reader: Reader, i: int) -> Image.Image:
    """Image `i` as it can be shown; of 16 bits the upper ones."""
    turned, content = index.turned is not None and bool(index.turned[i]), reader.read(i)
    with Image.open(io.BytesIO(content.data)) as header:
        deep = deep_mode(header).startswith("I")
    image = decode(content, index.location(i), PixelFormat(16 if deep else 8, turned))
    return image.convert("L") if deep else image


def surest_mistakes(evaluation: Evaluation, index: DatasetIndex, thumbnails: Thumbnails) -> list[str]:
    """The wrong answers with the highest probability. Where an answer is not finite nothing is answered."""
    answers = evaluation.top5[:, 0]
    wrong = np.flatnonzero((answers != index.labels) & (answers >= 0))
    surest = wrong[np.argsort(-evaluation.probability[wrong], kind="stable")][:WORST]
    return [
        thumbnails.figure(i, [("predicted", _answer(evaluation, index, i)), ("true", index.classes[index.labels[i]])])
        for i in surest.tolist()
    ]


def only_wrong(
    wrong: tuple[str, Evaluation, DatasetIndex], right: tuple[str, Evaluation, DatasetIndex], thumbnails: Thumbnails
) -> list[str]:
    """Images that the first network gets wrong and the second does not, the surest of its answers first."""
    (name, evaluation, index), (other_name, other, other_index) = wrong, right
    if (short := _shortened(name, NAME)) != (other_short := _shortened(other_name, NAME)):
        name, other_name = short, other_short
    answers = evaluation.top5[:, 0]
    rows = np.flatnonzero((answers != index.labels) & (other.top5[:, 0] == other_index.labels))
    surest = rows[np.argsort(-np.nan_to_num(evaluation.probability[rows]), kind="stable")][:DIFFERING]
    return [
        thumbnails.figure(
            i,
            [
                (name, _answer(evaluation, index, i)),
                (other_name, _answer(other, other_index, i)),
                ("true", index.classes[index.labels[i]]),
            ],
        )
        for i in surest.tolist()
    ]


def class_table(result: dict[str, Any], evaluation: Evaluation, index: DatasetIndex) -> Table:
    """A row for each class that has images, the worst first, with the class that it is most often taken for."""
    matrix = confusion_matrix(index.labels, evaluation.top5[:, 0], len(index.classes)).tolil()
    matrix.setdiag(0)
    matrix = matrix.tocsr()
    shown = class_errors(result)
    number, rows = {name: k for k, name in enumerate(index.classes)}, []
    for row in sorted(result["by_class"], key=lambda row: -row["top1_error"]):
        instead = matrix[[number[row["class"]]]].toarray()[0]
        most = f"{index.classes[instead.argmax()]} ({instead.max()})" if instead.any() else ""
        rows.append([row["class"], str(row["images"]), *(f"{row[key]:.2f}" for key in shown), most])
    return ["class", "images", *shown.values(), "mostly taken for (images)"], rows


def class_errors(result: dict[str, Any]) -> dict[str, str]:
    """The errors of a class that say something, with their titles."""
    titles = {"top1_error": "top-1 error, %", "top5_error": "top-5 error, %"}
    return {key: title for key, title in titles.items() if result[key] is not None}


def confusions(evaluation: Evaluation, index: DatasetIndex) -> str:
    """The confusion matrix as a picture, of groups of classes where there are many, with the groups' classes below."""
    matrix = confusion_matrix(index.labels, evaluation.top5[:, 0], len(index.classes))
    groups = group_classes(matrix)
    counts = between_groups(matrix, groups)
    members = [[index.classes[k] for k in group] for group in groups]
    if all(len(names) == 1 for names in members):
        names = [names[0] for names in members]
        words, listed = "Images by true class and answer.", ""
    else:
        names = [f"{i}. {', '.join(names[:NAMED])} ..." for i, names in enumerate(members, start=1)]
        mistakes = int(counts.sum() - matrix.diagonal().sum())
        within = int(np.trace(counts) - matrix.diagonal().sum())
        share = f"{100 * within / mistakes:.0f} % of the {mistakes:,} mistakes" if mistakes else "no mistake"
        words = (
            f"{sum(map(len, members)):,} classes in {len(groups)} groups of those that are confused with each other: "
            f"{share} stay within a group, which is the diagonal with the right answers."
        )
        items = "".join(f"<li>{html.escape(', '.join(names))}</li>" for names in members)
        listed = f"<details><summary>the classes of each group</summary><ol>{items}</ol></details>"
    return f"<h3>Confusion matrix</h3><p>{words} {_colors(counts)}</p>{_matrix_picture(counts, names)}{listed}"


def _shares(counts: np.ndarray) -> tuple[np.ndarray, float]:
    """Each count's share of its row, and the largest share beside the diagonal."""
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return rates, float((rates * (1 - np.eye(len(counts)))).max(initial=0))


def _colors(counts: np.ndarray) -> str:
    """What the colours say: the diagonal and the rest have scales of their own, as mistakes are few."""
    _, worst = _shares(counts)
    mistakes = f", red beside it at {100 * worst:.1f} %, the largest share there" if worst else ""
    return f"Colours are shares of a row: blue on the diagonal is full at 100 %{mistakes}."


def reliability(figures: dict[str, Any]) -> str:
    """The reliability diagram of what `calibration` found."""
    if figures["ece"] is None:
        return "<h3>Reliability</h3><p>No answer is finite.</p>"
    filled = [b for b in figures["bins"] if b["images"]]
    sure = sum(b["probability"] * b["images"] for b in filled) / figures["images"]
    right = sum(b["accuracy"] * b["images"] for b in filled) / figures["images"]
    words = (
        f"Expected calibration error {figures['ece']:.2f} % ({len(figures['bins'])} bins): on average an answer has "
        f"probability {100 * sure:.2f} %, and {100 * right:.2f} % are right. Bars below the line: the network is too sure."
    )
    return f"<h3>Reliability</h3><p>{words}</p>{_reliability_picture(figures)}"


def _answer(evaluation: Evaluation, index: DatasetIndex, i: int) -> str:
    answer = int(evaluation.top5[i, 0])
    if answer < 0:
        return "no finite answer"
    return f"{index.classes[answer]} ({percent_text(evaluation.probability[i]).replace(' ', chr(0xA0))})"


def _matrix_picture(counts: np.ndarray, names: list[str]) -> str:
    """An SVG picture: blue for what is on the diagonal, red beside it."""
    size = len(counts)
    cell, left, top, letters = (34, 112, 100, 11) if size <= 12 else (24, 166, 136, 10)
    axis = 16  # of which this is for the axes' titles
    rates, worst = _shares(counts)
    width, height = left + cell * size + 2, top + cell * size + 2
    kind, least = (
        ("matrix", width * 3 // 4) if size <= 12 else ("large matrix", width * 6 // 7)
    )  # narrower it is scrolled
    parts = [f'<svg class="{kind}" viewBox="0 0 {width} {height}" style="min-width:{least}px" role="img">']
    parts.append("<title>confusion matrix</title>")
    middle, place = cell * size / 2, f'text-anchor="middle" font-size="{letters}" font-weight="600"'
    parts.append(f'<text x="{left + middle}" y="{letters}" {place}>predicted</text>')
    parts.append(f'<text transform="translate({letters} {top + middle}) rotate(-90)" {place}>true</text>')
    for k, name in enumerate(names):
        short = html.escape(_shortened(name, (left - axis - 10) * 1.7 / letters))
        y, x = top + cell * k + cell / 2 + letters / 3, left + cell * k + cell / 2 + letters / 3
        full = f"<title>{html.escape(name)}</title>"
        parts.append(f'<text x="{left - 6}" y="{y:.1f}" text-anchor="end" font-size="{letters}">{short}{full}</text>')
        across = html.escape(_shortened(name, (top - axis - 6) * 1.7 / letters))
        turned = f'transform="translate({x:.1f} {top - 6}) rotate(-90)"'
        parts.append(f'<text {turned} font-size="{letters}">{across}{full}</text>')
    for r in range(size):
        for c in range(size):
            share = rates[r, c] if r == c or not worst else rates[r, c] / worst
            color = _mixed((36, 92, 160) if r == c else (190, 40, 40), share)
            x, y = left + cell * c, top + cell * r
            words = f"true {names[r]}, predicted {names[c]}: {counted(int(counts[r, c]), 'image')}, {100 * rates[r, c]:.1f} %"
            title = f"<title>{html.escape(words)}</title>"
            parts.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{color}">{title}</rect>')
            if counts[r, c]:
                number = str(counts[r, c])
                fits = min(letters, 1.6 * cell / len(number))
                ink = "#fff" if share > 0.5 else "#222"
                place = f'x="{x + cell / 2}" y="{y + cell / 2 + fits / 3:.1f}" text-anchor="middle"'
                parts.append(f'<text {place} font-size="{fits:.1f}" fill="{ink}" pointer-events="none">{number}</text>')
    parts.append(
        f'<rect x="{left}" y="{top}" width="{cell * size}" height="{cell * size}" fill="none" stroke="#888"/></svg>'
    )
    return f'<div class="wide">{"".join(parts)}</div>'


def _reliability_picture(figures: dict[str, Any]) -> str:
    """An SVG picture: accuracy over probability by bins, and below it how many images each bin has."""
    side, left, low = 260, 40, 60  # of the diagram; of the numbers beside it; of the bars of images below it
    base, most = 10 + side, max(b["images"] for b in figures["bins"])
    foot = base + 30 + low
    parts = [
        f'<svg class="reliability" viewBox="0 0 {left + side + 14} {foot + 34}" role="img"><title>reliability</title>'
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y, x = base - side * share, left + side * share
        parts.append(f'<line x1="{left}" x2="{left + side}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end" font-size="11">{100 * share:.0f}</text>')
        parts.append(f'<text x="{x}" y="{base + 15}" text-anchor="middle" font-size="11">{100 * share:.0f}</text>')
    for b in (b for b in figures["bins"] if b["images"]):
        x, width = left + side * b["low"], side * (b["high"] - b["low"]) - 1
        tall, many = side * b["accuracy"], max(low * b["images"] / most, 0.5)
        words = (
            f"{100 * b['low']:.0f} to {100 * b['high']:.0f} %: {counted(b['images'], 'image')}, mean probability "
            f"{100 * b['probability']:.1f} %, {100 * b['accuracy']:.1f} % right"
        )
        title = f"<title>{words}</title>"
        for y, h, fill in ((base - tall, tall, "#9dbbdd"), (foot - many, many, "#999")):
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{h:.1f}" fill="{fill}">{title}</rect>'
            )
    parts.append(f'<line x1="{left}" y1="{base}" x2="{left + side}" y2="{base - side}" ')
    parts.append('stroke="#222" stroke-width="1.5" stroke-dasharray="5 4"/>')
    parts.append(
        f'<text x="12" y="{base - side / 2}" transform="rotate(-90 12 {base - side / 2})" text-anchor="middle" '
    )
    parts.append('font-size="11">right answers, %</text>')
    parts.append(f'<line x1="{left}" x2="{left + side}" y1="{foot}" y2="{foot}" stroke="#888"/>')
    middle = left + side / 2
    parts.append(f'<text x="{middle}" y="{foot + 15}" text-anchor="middle" font-size="11">probability of the answer, %')
    parts.append(f'</text><text x="{middle}" y="{foot + 29}" text-anchor="middle" font-size="11">')
    parts.append(f"gray: images in each bin, {most:,} at most</text></svg>")
    return "".join(parts)


def _card_cell(number: bool, title: str, text: str) -> str:
    """A cell that carries its column's title for the narrow page; an empty one is left out there."""
    empty = "" if text else ' data-empty=""'
    return f'<td{_right(number)} data-title="{html.escape(title, quote=True)}"{empty}>{html.escape(text)}</td>'


def _right(number: bool) -> str:
    return ' class="number"' if number else ""


def _mixed(color: tuple[int, int, int], share: float) -> str:
    """The share of a colour, the rest white."""
    return f"rgb({','.join(str(round(255 + (part - 255) * min(share, 1))) for part in color)})"


def _shortened(text: str, letters: float) -> str:
    return text if len(text) <= letters else f"{text[: max(int(letters) - 1, 1)]}\u2026"


@cache
def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text()
