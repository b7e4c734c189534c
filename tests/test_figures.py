"""tools.figures makes its pictures from real run directories, and the facts that it draws are right."""

import dataclasses
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torchvision_sets
from conftest import REPOSITORY, run_module, small_config, write_class_folders
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import trainer
from pipeline.checkpoint import load_checkpoint
from pipeline.config import DataConfig
from pipeline.config_file import load_config, load_stored_config
from pipeline.data.scan import scan_classes
from pipeline.models import create_model
from tools.figures import (
    Run,
    comparable,
    draw_curves,
    draw_imagenet,
    draw_small_images,
    main,
    names_of,
    read_run,
    run_dirs_of,
    runs_in,
    told_apart,
    validation_of,
)
from tools.support.facts import multiply_accumulates, on_meta, parameters

# Billions of multiply-accumulates of convolutions and linear layers at 224 and at 32 pixels.
WORK = {
    "densenet121": (224, 2.834), "densenet161": (224, 7.728), "densenet169": (224, 3.360), "densenet201": (224, 4.291),
    "densenet264": (224, 5.752), "densenet40_k12": (32, 0.265), "densenet100_k12": (32, 1.770),
    "densenet100_k24": (32, 6.890), "densenet_bc100_k12": (32, 0.288), "densenet_bc250_k24": (32, 5.419),
    "densenet_bc190_k40": (32, 9.302),
}  # fmt: skip

pytestmark = pytest.mark.slow  # for the most part


@pytest.mark.parametrize("name", WORK)
def test_multiply_accumulates_are_the_papers(name):
    size, expected = WORK[name]
    network = on_meta(create_model, name, 1000 if size == 224 else 10, dense_block="eager")
    assert multiply_accumulates(network, size) / 1e9 == pytest.approx(expected, abs=1e-3)


def points(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(map(float, xy)) for xy in line.get_xydata()] for line in axes.lines}


@pytest.mark.slow
def test_pictures_of_runs_and_of_a_checkpoint(tmp_path, monkeypatch):
    torchvision_sets.write_cifar(tmp_path / "cifar", monkeypatch, 10)
    data = {"dataset": "cifar10", "dir": str(tmp_path / "cifar"), "loader": "auto", "train_crop": "random_crop"}
    runs = tmp_path / "runs"
    trainer.fit(small_config(runs / "densenet121"))
    trainer.fit(small_config(runs / "cifar", data=data, published={"source": "someone", "top1": 5.0}))

    checkpoint = runs / "cifar" / "checkpoints" / "best.pt"
    done = run_module("tools.figures", runs, checkpoint, "--output", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    files = {file.name for file in (tmp_path / "figures").iterdir()}
    assert files == {
        "curves.png",
        "parameters.png",
        "reuse-cifar-last.png",
        "reuse-densenet121-last.png",
        "reuse-cifar-best.png",
    }
    for file in files:
        Image.open(tmp_path / "figures" / file).verify()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "cifar").symlink_to(runs / "cifar")
    shutil.copytree(runs / "cifar", tmp_path / "again" / "cifar")
    found = [str(path) for path in (tmp_path / "others", runs, checkpoint, tmp_path / "again", runs / "cifar")]
    names = list(names_of(run_dirs_of(found)))
    assert names == [f"{tmp_path}/others/cifar", "densenet121", f"{tmp_path}/again/cifar"]  # each once, and told apart

    found = [read_run(run) for run in runs_in(runs)]
    assert [(run.name, run.data) for run in found] == [("cifar", "C10+"), ("densenet121", "synthetic images")]
    lines = [json.loads(line) for line in (runs / "cifar" / "metrics.jsonl").read_text().splitlines()]
    own = parameters(create_model("densenet_bc22_k8", 10)) / 1e6
    panel = points(draw_small_images(found).axes[0])
    errors = [r["val/top1_error"] for r in lines if "val/loss" in r]
    best = load_checkpoint(checkpoint)["progress"]  # whose weights tools.evaluate takes of the run
    label = f"ours: cifar, best epoch ({best['best_epoch'] + 1} of 2), 11 images of the test set of cifar10"  # not its 10,000
    assert panel[label] == [(own, best["best_top1_error"])]
    assert best["best_top1_error"] == min(errors)
    assert (0.769162, 4.51) in panel["DenseNet-BC, paper"] and (1.019722, 5.24) in panel["DenseNet, paper"]

    axes, by_work = draw_imagenet(found).axes  # among them a run that is called as one of the paper's networks
    assert points(axes)[found[1].label][0][1] == found[1].error
    curves = points(draw_curves(found).axes[0])
    assert [y for _, y in curves["cifar"]] == errors
    assert {y for _, y in curves["someone: 5.0 %"]} == {5.0}
    assert (7.978856, 25.02) in points(axes)["DenseNet, paper"]
    work = {error: x for x, error in points(by_work)["DenseNet, paper"]}
    assert work[25.02] == pytest.approx(WORK["densenet121"][1], abs=1e-3)
    ((own_work, _),) = points(by_work)[found[1].label]  # a small network at its 16 pixels
    assert own_work == pytest.approx(multiply_accumulates(found[1].network(), 16) / 1e9)
    assert points(axes)["ResNet, fb.resnet.torch"][1] == (25.557032, 24.01)


@pytest.mark.slow
def test_errors_that_are_not_of_test_images_are_called_so(tmp_path, monkeypatch):
    torchvision_sets.write_svhn(tmp_path / "svhn", monkeypatch)
    data = {
        "dataset": "svhn",
        "dir": str(tmp_path / "svhn"),
        "loader": "auto",
        "train_crop": "random_crop",
        "holdout": 4,
    }
    trainer.fit(small_config(tmp_path / "held", data=data, published={"top1": 5.0}))
    trainer.fit(small_config(tmp_path / "drawn"))
    held, drawn = read_run(tmp_path / "held"), read_run(tmp_path / "drawn")
    assert (held.data, drawn.data) == ("SVHN", "synthetic images")
    assert re.fullmatch(
        r"ours: held, best epoch \([12] of 2\), 4 of the 46 training images of svhn, held out", held.label
    )
    assert "published: 5.0 % (test images)" in points(draw_curves([held]).axes[0])
    panels = {axes.get_title(): points(axes) for axes in draw_small_images([held, drawn]).axes}
    assert panels["SVHN"][held.label][0][1] == held.error == min(r["val/top1_error"] for r in held.epochs)
    assert drawn.label in panels["synthetic images\n11 synthetic images"]


def test_whose_data_are_imagenets():
    cifar = load_config(REPOSITORY / "configs" / "cifar10-jpeg.yaml")  # class folders, with CIFAR's mean
    files = (REPOSITORY / "configs" / name for name in ("densenet121.yaml", "msdnet/imagenet_4.yaml"))
    imagenet, msdnet = map(load_config, files)
    own = dataclasses.replace(imagenet, data=dataclasses.replace(imagenet.data, dir="/pets"))
    for config, classes, images, name in (
        (cifar, 10, [50000, 10000], "images in cifar10"), (cifar, 10, None, "images in cifar10"),
        (imagenet, 1000, [1281167, 50000], "ImageNet"), (imagenet, 1000, None, "ImageNet"),
        (msdnet, 1000, [1231167, 50000], "ImageNet"), (own, 1000, [9000, 900], "images in pets"),
    ):  # fmt: skip
        found = Run("a", config, classes, [], "", images).data
        assert found == name


def run_of(name: str, errors: list[float], data: dict | None = None, **sections: dict) -> Run:
    """A run that has been trained for so many epochs, as its directory would tell."""
    config = small_config(name, data=data or {}, **sections)
    epochs = [
        {"epochs": i + 1, "val/loss": 1.0, "val/top1_error": error, "epoch/train_top1_error": error / 2}
        for i, error in enumerate(errors)
    ]
    return Run(name, config, 10, epochs)


def test_a_run_is_shown_after_its_best_epoch_and_the_legend_says_so(tmp_path):
    cifar = {"dataset": "cifar10", "loader": "auto", "train_crop": "random_crop"}
    for planned, words in ((4, "2 of 4"), (9, "2 of 4 so far, 9 planned")):
        run = run_of("a", [50.0, 43.33, 43.33, 44.17], cifar, optim={"epochs": planned, "milestones": [2]})
        (panel,) = draw_small_images([run]).axes
        ((_, error),) = points(panel)[f"ours: a, best epoch ({words})"]
        assert run.error == error == 43.33


def test_of_a_run_that_averages_its_weights_the_legends_say_whose_error_it_is():
    for best_by in ("ema", "raw"):
        run = run_of("a", [40.0, 30.0], train={"ema_decay": 0.9, "best_by": best_by})
        assert f"a ({best_by} weights)" in points(draw_curves([run]).axes[0])
        assert f"ours: a ({best_by} weights), best epoch (2 of 2)" in points(draw_small_images([run]).axes[0])
        (many,) = [name for name in points(draw_small_images([run] * 11).axes[0]) if name.startswith("ours: 11")]
        assert many.endswith(f"the best a ({best_by} weights)")


def test_runs_on_other_images_stand_apart_and_no_colour_is_there_twice():
    """Two runs on the same images that lie in two places, one on a part of them, three that hold out; and ten together."""
    data = DataConfig(dir="a", loader="reference")
    assert validation_of(data, [37, 11]) == "11 images of a/val"
    held_out = dataclasses.replace(data, holdout=9)
    assert validation_of(held_out, [28, 9]) == "9 of the 37 training images of a/train, held out"
    moved = dataclasses.replace(data, dir="b")
    runs = [
        dataclasses.replace(
            run_of(f"run{i}", [40.0 - i], {"holdout": of.holdout}),
            validation=validation_of(of, images),
            fingerprint=content,
        )
        for i, (of, images, content) in enumerate(
            [
                (data, [37, 11], "1"),
                (moved, [37, 11], "1"),
                (data, [37, 5], "2"),
                *[(held_out, [28, 9], "3")] * 3,
                (held_out, [20, 9], "4"),
            ]
        )
    ]
    panels = draw_curves(told_apart(runs)).axes
    own = [[line for line in axes.lines if not line.get_label().startswith("_")] for axes in panels]
    assert [[line.get_label() for line in lines] for lines in own] == [
        ["run0", "run1"],
        ["run2"],
        ["run3", "run4", "run5"],
        ["run6"],
    ]
    words = ["11 images of a/val", "5 images of a/val", "9 of the 37 training", "9 of the 29 training"]
    for axes, on in zip(panels, words, strict=True):
        assert axes.get_title().startswith(
            f"Validation (solid, filled) and training (dashed, hollow)\nvalidated on {on}"
        )
    colors = [line.get_color() for lines in own for line in lines]
    assert len(set(colors)) == len(colors) == 7
    ten = [
        run_of(f"r{i}", [9.0 + i], {"dataset": "cifar10", "loader": "auto", "train_crop": "random_crop"})
        for i in range(10)
    ]
    (curves,), (sizes,) = draw_curves(ten).axes, draw_small_images(ten).axes
    assert len({line.get_color() for line in curves.lines}) == 10
    looks = [line.get_color() for line in sizes.lines if line.get_label()[0] != "_"]
    assert (
        len(set(looks)) == len(looks) == 4
    )  # three series of the paper's leave room for seven runs: these are one series
    held = dataclasses.replace(ten[3], validation="5 of the 9 training images of cifar10, held out")
    for runs, on in ((ten, ""), ([held, *ten], ", on different images"), ([held] * 10, f", {held.validation}")):
        labels = [line.get_label() for line in draw_small_images(runs).axes[0].lines]
        assert any(
            re.fullmatch(rf"ours: \d+ runs after their best epochs, the best r\d{on}", label) for label in labels
        )
    seven = draw_small_images(ten[:7]).axes[0]
    looks = [line.get_color() for line in seven.lines if line.get_label()[0] != "_"]
    assert len(set(looks)) == len(looks) == 10


def test_sets_of_images_are_told_apart_by_what_they_hold_and_named_as_they_were_found(tmp_path):
    """Four runs of folders with train and test: two on the same test images, one on others in their place, one moved."""
    folders = [tmp_path / name / "data" for name in "abc"]
    for seed, folder in enumerate(folders):
        write_class_folders(folder / "train", 2, 4 + 2 * seed, size=(16, 16), seed=100 * seed)
        write_class_folders(folder / "test", 2, 3, size=(16, 16), seed=7 if seed < 2 else 8)
    once = {"optim": {"epochs": 1, "milestones": [], "batch_size": 4}}
    configs = [
        small_config(tmp_path / "runs" / folder.parent.name, data={"dir": str(folder), "loader": "native"}, **once)
        for folder in folders
    ]
    for config in configs:
        trainer.fit(config)
    stored = load_stored_config(tmp_path / "runs" / "a" / "config.yaml")
    assert stored == dataclasses.replace(configs[0], data=dataclasses.replace(configs[0].data, val="test"))
    (text,) = EventAccumulator(configs[0].run_dir).Reload().Tensors("config/text_summary")
    assert b"val: test" in text.tensor_proto.string_val[0]
    trainer.fit(stored)  # resumes: it is complete

    a, b, c = (read_run(Path(config.run_dir)) for config in configs)
    assert a.validation == f"3 images of {folders[0]}/test" and a.fingerprint != b.fingerprint  # trained on others
    assert a.val_fingerprint == scan_classes(folders[1] / "test").fingerprint
    same = a.validation
    c = dataclasses.replace(c, validation=same)  # other images that took the place of those
    before = [dataclasses.replace(run, name=f"before-{run.name}", val_fingerprint=None) for run in (b, c)]
    runs = told_apart([a, dataclasses.replace(a, name="again"), b, c, *before])  # half of those on the first set: a's
    of_ab, of_c = (f"{same} (content {run.val_fingerprint[:8]})" for run in (a, c))
    assert [run.validation for run in runs] == [of_ab, of_ab, of_ab, of_c, of_ab, of_c]
    assert {run.validation for run in told_apart([a, b, *before[:1]])} == {b.validation}  # where most of them lay
    assert [run.validation for run in told_apart([a, b])] == [same, same]
    small, large = told_apart([a, b])
    data = {"dir": str(folders[1]), "loader": "native"}
    large = dataclasses.replace(large, config=small_config("b", model={"name": "densenet_bc16_k4"}, data=data))
    assert len(comparable([small, large])) == 2  # of one set of images, in whatever folder
    (panel,) = [axes for axes in draw_small_images([small, large]).axes if axes.axison]
    assert "".join(panel.get_title().split()) == "".join(same.split())
    alone = told_apart([before[0], c])  # nothing says that they are of one set
    assert len({run.validation for run in alone}) == 2
    titles = [axes.get_title().replace("\n", " ") for axes in draw_curves(runs).axes]
    assert [title.split("(content ")[1] for title in titles] == [of[-9:] for of in (of_ab, of_c)]


def drawn(figure, tmp_path) -> list:
    """The figure's panels, after it has been drawn."""
    figure.savefig(tmp_path / "figure.png")
    return [axes for axes in figure.axes if axes.axison]


def test_curves_of_one_epoch_have_a_point_and_a_whole_tick(tmp_path):
    (axes,) = drawn(draw_curves([run_of("short", [40.0])]), tmp_path)
    low, high = axes.get_xlim()
    assert low < 1 < high and [tick for tick in axes.get_xticks() if low < tick < high] == [1]
    (line,) = (line for line in axes.lines if line.get_label() == "short")
    assert line.get_marker() == "o" and list(line.get_xdata()) == [1]
    low, high = axes.get_ylim()
    assert 0 < low < 20 and 40 < high < 60  # training 20, validation 40: the axis is theirs


def test_any_name_is_drawn_as_it_is(tmp_path):
    names = ("_baseline", "$5_$10", os.fsdecode(b"d\xe9but"))
    runs = [dataclasses.replace(run_of(name, [40.0, 30.0]), validation=f"9 images of {name}") for name in names]
    panels = drawn(draw_curves(runs), tmp_path)
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels]
    assert legends == [["\u200b_baseline"], [r"\$5_\$10"], [r"d\udce9but"]]
    assert r"9 images of \$5_\$10" in panels[1].get_title()
    drawn(draw_small_images(runs), tmp_path)


def test_runs_whose_training_errors_do_not_compare_with_validation_are_marked():
    runs = [run_of("a", [9.0]), run_of("b", [9.0], {"sampling": "balanced"}), run_of("c", [8.0], {"mixup_alpha": 0.2})]
    (axes,) = draw_curves(runs).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b *", "c *"]
    note = "* trains on mixed images or balanced classes: its two curves do not compare"
    assert axes.get_title().splitlines()[-1] == note
    assert note not in draw_curves(runs[:1]).axes[0].get_title()
    many = draw_curves(runs * 5).axes[0]  # of so many runs training is not drawn
    assert note not in many.get_title() and "b" in {text.get_text() for text in many.get_legend().get_texts()}


def test_curves_of_sixty_runs_show_the_best(tmp_path):
    errors = {f"run{i}": [60.0, 50.0, 30.0 + (i * 7) % 60 / 10] for i in range(60)}
    runs = [run_of(name, values, published={"source": "someone", "top1": 20.0}) for name, values in errors.items()]
    (axes,) = drawn(draw_curves(runs), tmp_path)
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == [*sorted(errors, key=lambda name: errors[name][-1])[:7], "someone: 20.0 %"]
    assert len([line for line in axes.lines if line.get_label().startswith("_")]) == 53
    assert {tick % 1 for tick in axes.get_xticks()} == {0}
    for images, shown in (([8, 2], True), ([9, 2], False), (None, False)):  # of whichever images the figure is
        of = dataclasses.replace(run_of("of", [30.0], published={"top1": 20.0, "images": [8, 2]}), images=images)
        assert ("published: 20.0 %" in points(draw_curves([of]).axes[0])) == shown
    long = run_of("long", [50.0] * 300)
    (line,) = (line for line in draw_curves([long]).axes[0].lines if line.get_label() == "long")
    assert line.get_markevery() == 10  # not a marker beside the other


def test_panels_are_of_the_users_data_and_hold_every_name(tmp_path):
    cifar = {"dataset": "cifar10", "loader": "auto", "train_crop": "random_crop"}
    own = [run_of(f"a run with a long name {i}", [20.0 + i]) for i in range(3)]
    for runs, titles in (
        (own, ["synthetic images"]),
        ([*own, run_of("small", [5.0], cifar)], ["synthetic images", "C10+"]),
        ([run_of(f"r{i}", [5.0 + i / 9], cifar) for i in range(60)], ["C10+"]),
    ):
        panels = drawn(draw_small_images(runs), tmp_path)
        assert [axes.get_title() for axes in panels] == titles
        for axes in panels:
            frame = axes.get_window_extent()
            names = {name: name.get_window_extent() for name in axes.texts}
            assert not any(a.overlaps(b) for a, b in itertools.combinations(names.values(), 2))
            assert axes.get_legend().get_window_extent().y1 < frame.y0  # where it hides no point
            looks = [
                (line.get_color(), line.get_marker()) for line in axes.lines if line.get_label().startswith("ours")
            ]
            assert len(set(looks)) == len(looks)
            for name, box in names.items():
                assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, name
            assert axes.get_xlim()[0] == 0 and len(axes.get_legend().get_texts()) <= 6
    assert points(panels[0])["ours: 60 runs after their best epochs, the best r0"][0][1] == 5.0
    assert comparable(own) == [] and comparable([*own, *runs]) == runs  # one network, and no other to set it beside
    larger = run_of("larger", [9.0], model={"name": "densenet_bc10_k4"})
    assert comparable([*own, larger]) == [*own, larger]


def test_several_labels_have_a_panel_of_their_own(tmp_path):
    several = run_of("labels", [], {"labels": "multi", "loader": "auto"}, optim={"objective": "binary_cross_entropy"})
    records = [{"epochs": 1, "val/mean_auroc": 0.7}, {"epochs": 2, "val/mean_auroc": None}]
    labels = dataclasses.replace(several, epochs=records)
    first, second = drawn(draw_curves([labels, run_of("one", [30.0])]), tmp_path)
    assert (first.get_ylabel(), second.get_ylabel()) == ("top-1 error, %", "mean AUROC")
    titles = [axes.get_title().splitlines()[0] for axes in (first, second)]
    assert titles == ["Validation (solid, filled) and training (dashed, hollow)", "Validation"]
    assert points(second)["labels"][0] == (1, 0.7) and list(points(first)) == ["one", "_one, training"]


def test_damaged_records_are_passed_over(tmp_path):
    trainer.fit(small_config(tmp_path / "run"))
    whole = read_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as records:
        records.write(b'x}\n[1]\n\xff\x00\x00{"step": 1}\n{"step": 9, "val/top1')
    assert read_run(tmp_path / "run").epochs == whole.epochs


def test_mistakes_are_one_line(tmp_path, user_error):
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "log.txt").touch()
    for path, expected in (
        (tmp_path, "holds no run"),
        (tmp_path / "none.pt", "cannot read the weights"),
        (tmp_path / "begun", "has saved no checkpoint yet: wait"),
    ):
        assert expected in user_error(main, path, "--output", tmp_path / "figures")
