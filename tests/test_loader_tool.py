"""The loader benchmark as a user runs it: its files, its tolerances, and its error messages."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import index_of, photo
from PIL import Image

from pipeline.command import exit_on_user_error
from pipeline.config import DataConfig
from pipeline.data.color import apply_colors
from pipeline.data.loader import Shard, create_image_pipeline
from pipeline.data.plan import training_plans
from pipeline.data.scan import scan_classes
from tools.lab.loader import (
    BASELINE,
    BASELINE_ONE_CROP,
    BOUND,
    NATIVE,
    REGIONS,
    STAGES,
    TORCHVISION,
    Differences,
    clamped_colors,
    frame_widths,
    main,
    unnormalised,
)

SETTINGS = ["--images", "6", "--repeats", "1", "--threads", "1", "--batch-size", "3"]


def run(monkeypatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["loader", *map(str, words)])
    exit_on_user_error(main)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A data set with a train/ folder of 8 JPEGs in 2 classes."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(8):
        folder = root / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(i, 80 + 10 * i, 120 - 5 * i).save(folder / f"{i}.jpg", quality=90)
    (root / "config.yaml").write_text("data: {crop_size: 56, resize_size: 64}\n")
    return root


@pytest.fixture(scope="module")
def results(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "results"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, photos, "--config", photos / "config.yaml", "--output", output, *SETTINGS)
    return output


@pytest.mark.slow
def test_the_files_can_be_read(results):
    found = json.loads((results / "loader.json").read_text())
    assert found["images"]["count"] == 6 and found["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    speed = {line["loader"]: line for line in found["speed"]}
    assert speed[BASELINE]["ratio"] == 1 and BOUND in speed and all(line["images_per_s"] > 0 for line in speed.values())
    assert [(line["loader"], line["stage"]) for line in found["stages"]] == [
        (loader, stage) for loader, stages in STAGES.items() for stage in stages
    ]
    assert sum(line["share"] for line in found["stages"]) == pytest.approx(len(STAGES))
    assert speed[BASELINE_ONE_CROP]["ratio"] == 1 and f"{REGIONS}, {NATIVE}" in speed
    tables = [line for line in (results / "loader.md").read_text().splitlines() if line.startswith("|")]
    assert len(tables) == 3 * 2 + len(found["fidelity"]) + len(found["speed"]) + len(found["stages"])
    for name in ("loader.png", "contact-sheet.png"):
        with Image.open(results / name) as image:
            assert np.asarray(image.convert("L")).std() > 10


@pytest.mark.slow
def test_the_image_pipelines_are_within_their_tolerances(results):
    rows = json.loads((results / "loader.json").read_text())["fidelity"]
    ours = {line["operator"]: line for line in rows if line["image_pipeline"].startswith("DALI")}
    assert ours["decode"]["max"] == 0
    assert ours["horizontal flip"]["max"] < 0.02  # the resize flips too, and so rounds differently
    assert (
        ours["crop and resize, torch7-bicubic"]["mean"] < 0.05 and ours["crop and resize, pil-bilinear"]["mean"] < 0.3
    )
    assert ours["colour map"]["max"] < 0.01 and ours["training transform"]["mean"] < 0.1
    assert ours["evaluation, 1 crop"]["mean"] < 0.05 and ours["evaluation, 10 crops"]["mean"] < 0.05
    exact = {line["operator"]: line for line in rows if line["image_pipeline"] == NATIVE}
    assert exact["crop and resize, torch7-bicubic"]["max"] < 1e-3 and exact["training transform"]["max"] < 1e-3
    assert exact["crop and resize, pil-bilinear"]["max"] == exact["crop and resize, pil-bicubic"]["max"] == 0
    assert exact["horizontal flip"]["max"] < 1e-3 and exact["colour map"]["max"] < 1e-3
    theirs = {line["operator"]: line for line in rows if line["image_pipeline"] == TORCHVISION}
    # On Pillow images torchvision's resize is Pillow's, and neither is the paper's.
    assert (
        theirs["crop and resize, pil-bicubic"]["max"] == 0 and theirs["crop and resize, torch7-bicubic"]["mean"] > 0.5
    )


def test_torchvisions_colors_have_the_plans_factors():
    """On images that nothing clamps, its operators differ from the plan's map by their rounding only."""
    config = DataConfig(crop_size=16)
    options = dict(seed=5, epoch=0, first_step=0, batch_size=9, rank=0, ranks=1, accumulation=1)
    (plan,) = training_plans(index_of([(40, 40)] * 9), config, **options)
    pixels = torch.randint(70, 120, (9, 1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    actual = unnormalised(clamped_colors(pixels, plan, config), config)
    expected = unnormalised(apply_colors(pixels, plan, torch.device("cpu")), config)
    assert (actual - expected).abs().max() < 4


def test_differences_tell_the_frame_from_the_interior():
    differences, image = Differences(), torch.zeros(2, 12, 12, 3)
    image[:, 0, 0], image[:, 5, 5] = 3.0, 1.0
    differences.add(image, torch.zeros_like(image))
    assert differences.result() == pytest.approx(
        {"mean": 4 / 144, "max": 3, "interior_mean": 1 / 16, "interior_max": 1, "frame_mean": 3 / 128, "frame_max": 3}
    )


def test_the_frame_follows_the_crop(tmp_path):
    """A crop of 8 pixels that becomes 224: what differs at its edge lies in the frame, which is 32 pixels wide."""
    (tmp_path / "a").mkdir()
    photo(3, 60, 60).save(tmp_path / "a" / "a.png")
    index, config = scan_classes(tmp_path), DataConfig(color_jitter=0, pca_noise=0)
    options = dict(seed=5, epoch=0, first_step=0, batch_size=1, rank=0, ranks=1, accumulation=1)
    (drawn,) = training_plans(index, config, **options)
    changes = {"crop_boxes": [[9, 20, 8, 9]], "sizes": [[224, 224]], "offsets": [[[0, 0]]]}
    plan = dataclasses.replace(drawn, **{name: np.array(value, np.int32) for name, value in changes.items()})
    assert frame_widths(plan) == [32] and frame_widths(drawn)[0] < 8
    shard = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=1)
    results = []
    for name in ("dali", "reference"):
        image_pipeline = create_image_pipeline(index, dataclasses.replace(config, loader=name), shard, 1, views=1)
        results.append(next(iter(image_pipeline.run([plan])))[1][0])
    narrow, wide = Differences(), Differences()
    narrow.add(*results)
    wide.add(*results, frame_widths(plan))
    assert narrow.result()["interior_max"] > 0.5 and wide.result()["interior_max"] < 0.1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["{photos}/nowhere"], "nowhere"),
        (["{photos}", "--images", "0"], "--images: a positive number is needed (got '0')"),
        (["{photos}", "--repeats", "many"], "--repeats: a positive number is needed (got 'many')"),
        (["{photos}", "--interpolation", "lanczos"], "--interpolation: invalid choice: 'lanczos'"),
        (["{photos}", "--config", "{photos}/none.yaml"], "none.yaml: No such file"),
        (["{photos}", "--output", "{photos}/config.yaml/results"], "cannot write into --output"),
        ([], "DIR"),
    ],
)
def test_a_mistake_is_one_line(photos, tmp_path, monkeypatch, capfd, words, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *(word.format(photos=photos) for word in words))
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and complaint in lines[0], lines
