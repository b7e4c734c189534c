"""The page of tools.evaluate --report: its numbers against other computations, and what a browser is given."""

import collections
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipeline.data.index import DatasetIndex
from pipeline.data.scan import scan_classes
from pipeline.evaluation import Evaluation
from pipeline.metrics import Score
from tools.support.calibration import BINS, calibration
from tools.support.confusion import GROUPS, between_groups, confusion_matrix, group_classes
from tools.support.evaluation_figures import by_class, compare, errors
from tools.support.evaluation_report import to_html, write_report

VOID = {"meta", "img"}


class Elements(HTMLParser):
    """Every element with its attributes and its own text; a tag that is not closed in its place is an error."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, dict, list[str]]] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))
        if tag not in VOID:
            self._open.append(self.found[-1])

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for element in self._open:
            element[2].append(data)

    def texts(self, tag: str, of: str = "") -> list[str]:
        """What stands in each such element, or in those of a class."""
        return ["".join(text) for name, about, text in self.found if name == tag and of in about.get("class", "")]


def test_the_calibration_error_is_that_of_a_plain_count():
    random = np.random.default_rng(0)
    probability = np.concatenate([random.beta(5, 1, 4000), [0.0, 1.0, np.nan]]).astype(np.float32)
    correct = random.random(len(probability)) < 0.8 * probability
    found = calibration(probability, correct)
    error, kept = 0.0, [(float(p), bool(c)) for p, c in zip(probability, correct, strict=True) if not math.isnan(p)]
    for b in range(BINS):
        inside = [(p, c) for p, c in kept if b < BINS * p <= b + 1 or (b == 0 and p == 0)]
        row = found["bins"][b]
        assert (row["low"], row["high"], row["images"]) == (b / BINS, (b + 1) / BINS, len(inside))
        if inside:
            accuracy = sum(c for _, c in inside) / len(inside)
            mean = math.fsum(p for p, _ in inside) / len(inside)
            assert (row["accuracy"], row["probability"]) == pytest.approx((accuracy, mean), abs=1e-12)
            error += len(inside) / len(kept) * abs(accuracy - mean)
    assert found["images"] == len(kept) == 4002 and found["ece"] == pytest.approx(100 * error, abs=1e-9)
    assert found["ece"] == pytest.approx(100 * 0.2 * np.nanmean(probability), abs=2)  # it says 1 where 0.8 is right
    assert calibration(np.array([0.75] * 4), np.array([1, 1, 1, 0], bool))["ece"] == 0
    assert calibration(np.array([np.nan]), np.array([False]))["ece"] is None


def test_many_classes_stand_in_groups_of_those_that_are_confused():
    """100 classes in 20 families of 5, which their numbers do not show; most mistakes stay in the family."""
    random = np.random.default_rng(1)
    family = random.permutation(np.arange(100) // 5)
    labels = np.repeat(np.arange(100), 30)
    answers = labels.copy()
    for i in np.flatnonzero(random.random(len(labels)) < 0.3):
        near = np.flatnonzero(family == family[labels[i]])
        answers[i] = random.choice(near) if random.random() < 0.9 else random.integers(100)
    answers[::50] = -1  # no finite answer
    matrix = confusion_matrix(labels, answers, 103)  # three classes that occur nowhere
    pairs = collections.Counter((int(a), int(b)) for a, b in zip(labels, answers, strict=True) if b >= 0)
    assert {(int(a), int(b)): int(matrix[a, b]) for a, b in zip(*matrix.nonzero(), strict=True)} == pairs
    groups = group_classes(matrix)
    assert len(groups) == GROUPS and sorted(np.concatenate(groups).tolist()) == list(range(100))
    assert {len(group) for group in groups} <= {3, 4, 5, 6, 7}
    of = {int(k): g for g, group in enumerate(groups) for k in group}
    counted = np.zeros((GROUPS, GROUPS), int)
    for (a, b), number in pairs.items():
        counted[of[a], of[b]] += number
    np.testing.assert_array_equal(between_groups(matrix, groups), counted)
    mistakes = {pair: number for pair, number in pairs.items() if pair[0] != pair[1]}
    within = sum(number for (a, b), number in mistakes.items() if of[a] == of[b])
    assert within > 0.8 * sum(mistakes.values())  # by chance: 0.05
    few = group_classes(confusion_matrix(labels[labels < 7], labels[labels < 7], 103))
    assert [group.tolist() for group in few] == [[k] for k in range(7)]


@pytest.fixture
def images(tmp_path) -> DatasetIndex:
    """40 small images in 4 classes, of which one needs care."""
    for i in range(40):
        folder = tmp_path / "images" / ("coat", "bag & box", "a very long name of a class", "dress")[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i % 3 * 90, 30), (i, 99, 0)).save(folder / f"{i:03d}.png")
    return scan_classes(tmp_path / "images")


def evaluated(index: DatasetIndex, seed: int, name: str) -> tuple[dict, Evaluation]:
    """Answers that are drawn, and what the report says of them beside constant words."""
    random = np.random.default_rng(seed)
    top5 = np.stack([random.permutation(4) for _ in range(len(index))])
    easy = random.random(len(index)) < 0.5
    top5[easy, 0], top5[easy, 1:] = index.labels[easy], -2
    top5[3], probability = -1, random.uniform(0.3, 1, len(index)).astype(np.float32)
    probability[3] = np.nan
    correct = top5 == index.labels[:, None]
    score = Score(len(index), int(correct[:, 0].sum()), int(correct.any(axis=1).sum()), 1.0)
    evaluation = Evaluation(score, top5, probability, np.ones(len(index), np.float32), None, 1)
    result = {
        "name": name, "weights": f"{name}.pt", "sha256": "ab" * 32, "trained": "epoch 3 of 8", "note": "",
        "model": "m", "parameters": 1234567, "multiply_accumulates": 10**9, "data": index.root, "images": len(index),
        "classes": 4, "classes_present": 4, "other_outputs": None, "not_finite": 1, "first_not_finite": "x", "crops": 1,
        "average": "logits", "precision": "fp32", "interpolation": "pil-bicubic", "resize_size": 9, "crop_size": 9,
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2), "assumed": ("mean", "std"),
        "loader": "dali", "real": None, "published": [], "published_note": "", "begun_with": None, "training": None,
        "ranks": 1, "seconds": 1.0, "chosen_by_these": False, "chosen_by_some": "images in D, at least 2 of 9, as D/a.jpg",
        "validated_in": "bf16",
        "trained_on": "", "calibration": calibration(probability, correct[:, 0]),
    }  # fmt: skip
    return result | errors(score) | by_class(evaluation, index), evaluation


def test_the_page_has_what_is_known_and_nothing_from_elsewhere(images):
    results, evaluations = zip(*(evaluated(images, seed, f"net{seed}") for seed in (0, 1)), strict=True)
    indexes = [images, images]
    about = {"command": "python -m x <y>", "date": "2026-01-02", "hardware": "a machine"}
    summary = {
        "about": about,
        "evaluations": list(results),
        "comparisons": compare(list(results), list(evaluations), indexes),
    }
    text = to_html(summary, list(evaluations), indexes)
    page = Elements(text)
    sources = [
        about[key] for _, about, _ in page.found for key in ("src", "href", "srcset", "data", "action") if key in about
    ]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"https?:|@import|url\(", text) and not {"link", "iframe"} & {tag for tag, _, _ in page.found}
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=False))
    assert facts["data"] == f"40 images of {images.root}"
    assert (facts["command"], facts["date"], facts["hardware"]) == ("python -m x <y>", "2026-01-02", "a machine")
    assert "net0.pt (SHA-256 abababababababab...)" in page.texts("dd") and "epoch 3 of 8" in page.texts("dd")
    assert "ReaL error, %" not in page.texts("th")  # of which there is none here
    assert (
        "epoch was chosen by images in D, at least 2 of 9, as D/a.jpg: new images usually have a worse result" in text
    )
    assert "validated on these images in bf16, so that a few answers may differ (--precision bf16 computes as" in text
    assert "mean 0.4,0.5,0.6, std 0.2," in text and "assumed, as the file does not say it: mean, std" in text

    for number, (result, evaluation) in enumerate(zip(results, evaluations, strict=True)):
        answers = evaluation.top5[:, 0]
        pairs = collections.Counter(
            (images.classes[a], images.classes[b]) for a, b in zip(images.labels, answers, strict=True) if b >= 0
        )
        said = re.compile(r"true (.*), predicted (.*): (\d+) images?, ([\d.]+) %")
        cells = [found.groups() for title in page.texts("title") if (found := said.fullmatch(title))][16 * number :][
            :16
        ]
        assert {(a, b): int(n) for a, b, n, _ in cells if int(n)} == pairs and len(cells) == 16
        for a, b, n, share in cells:
            of = sum(m for (true, _), m in pairs.items() if true == a)
            assert float(share) == pytest.approx(100 * int(n) / of, abs=0.05), (a, b)
        assert f"Expected calibration error {result['calibration']['ece']:.2f} % (15 bins)" in text

    captions = page.texts("figcaption")
    wrong = [evaluation.top5[:, 0] != images.labels for evaluation in evaluations]
    name = dict(zip(("net0", "net1"), wrong, strict=True))
    for a, b in (("net0", "net1"), ("net1", "net0")):
        only = {images.names[i] for i in np.flatnonzero(name[a] & ~name[b])}
        shown = [c for c in captions if c.startswith(f"{a} ") and f"{b} " in c]
        files = [next(n for n in images.names if c.endswith(n)) for c in shown]
        assert len(files) == len(set(files)) == min(len(only), 12) and set(files) <= only
        part = "the 12 surest of " if len(only) > 12 else ""
        assert f"Only {a} is wrong: {part}{len(only)} images" in page.texts("h3")
        for caption, file in zip(shown, files, strict=True):
            true = images.classes[images.labels[images.names.index(file)]]
            assert f"true {true}" in caption and (f"{b} {true} (" in caption)
    own = [c for c in captions if c.startswith("predicted ")]
    assert len(own) == sum(
        min(int((w & (e.top5[:, 0] >= 0)).sum()), 24) for w, e in zip(wrong, evaluations, strict=True)
    )


def test_the_table_of_classes_can_be_sorted(images):
    result, evaluation = evaluated(images, 0, "net")
    page = Elements(to_html({"about": {}, "evaluations": [result], "comparisons": []}, [evaluation], [images]))
    kinds = [about["data-kind"] for tag, about, _ in page.found if tag == "th" and "data-kind" in about]
    assert kinds[-5:] == ["text", "number", "number", "number", "text"]
    cells = [text for text, (tag, about, _) in zip(page.texts("td"), [e for e in page.found if e[0] == "td"], strict=True)
             if "data-title" not in about][-20:]  # fmt: skip
    rows = [cells[i : i + 5] for i in range(0, 20, 5)]
    errors_shown = [float(row[2]) for row in rows]
    assert errors_shown == sorted(errors_shown, reverse=True)
    for name, number, error, _, instead in rows:
        own = images.labels == images.classes.index(name)
        answers = evaluation.top5[own, 0]
        assert (int(number), float(error)) == (10, 100 * np.mean(answers != images.classes.index(name)))
        others = collections.Counter(images.classes[k] for k in answers if k >= 0 and images.classes[k] != name)
        assert int(instead.rpartition("(")[2][:-1]) == max(others.values())
        assert others[instead.rpartition(" (")[0]] == max(others.values())


def test_imagenets_ids_are_given_their_names_and_the_data_stay_as_they_are(images, tmp_path):
    """Two of the classes share their first name, so that the id tells them apart."""
    ids = ("n02012849", "n03126707", "n01440764", "dress")
    index = dataclasses.replace(images, classes=ids)
    result, evaluation = evaluated(index, 0, "net")
    assert {row["class"] for row in result["by_class"]} == set(ids)
    write_report(tmp_path, {"about": {}, "evaluations": [result], "comparisons": []}, [evaluation], [index])
    page = Elements((tmp_path / "report.html").read_text())
    called = {"crane (n02012849)", "crane (n03126707)", "tench", "dress"}
    assert called <= set(page.texts("td")) and not set(ids[:3]) & set(page.texts("td"))
    assert any("true tench" in caption for caption in page.texts("figcaption"))
    assert any(title.startswith("true crane (n03126707), predicted tench: ") for title in page.texts("title"))
    assert "| tench" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["evaluations"] == json.loads(json.dumps([result]))


def test_long_names_of_networks_are_shortened_only_where_they_stay_different(images):
    for names, shown in (
        (("first-" + "x" * 40, "second-" + "x" * 40), ("first-" + "x" * 17, "second-" + "x" * 16)),
        (("x" * 40 + "-first", "x" * 40 + "-second"), ("x" * 40 + "-first", "x" * 40 + "-second")),
    ):
        results, evaluations = zip(*(evaluated(images, seed, name) for seed, name in enumerate(names)), strict=True)
        rows = compare(list(results), list(evaluations), [images, images])
        summary = {"about": {}, "evaluations": list(results), "comparisons": rows}
        captions = Elements(to_html(summary, list(evaluations), [images, images])).texts("figcaption")
        both = [caption for caption in captions if not caption.startswith("predicted")]
        assert both and all(all(name in caption for name in shown) for caption in both)
        assert ("\u2026" in both[0]) == (names != shown)
