"""tools.predict gives the probabilities that the Torch code's transforms and torchvision's give, image by image."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch7
from conftest import photo, run_module
from PIL import Image
from torch import nn
from torchvision import transforms

from pipeline.class_names import human_names, imagenet_ids, short_names
from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.data.image_files import ASK_FOR_UPRIGHT, OPAQUE
from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.weights import Weights, read_weights, write_safetensors
from tools import predict

CLASSES = ("n01440764", "sparrow", "n99999999", "oak")
MODEL = "densenet_bc22_k6"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several sizes, some in folders below, with a text beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b" / "deep").mkdir(parents=True)
    for i, name in enumerate(("c.jpg", "a.JPEG", "b/d.png", "b/deep/e.jpg")):
        photo(i, 48 + 9 * i, 70 - 8 * i).point(lambda value, i=i: value // 2 + 30 * i).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


IN_ORDER = ("a.JPEG", "b/d.png", "b/deep/e.jpg", "c.jpg")


def views_of(file, resize: str, crops: int) -> torch.Tensor:
    """(crops, 3, 32, 32) float64, without anything of pipeline/data."""
    image = Image.open(file).convert("RGB")
    if resize == "torch7-bicubic":
        pixels = np.asarray(image, np.float64) / 255
        pixels = torch7.scale(pixels, *torch7.short_side_to(*pixels.shape[:2], 36))
        views = torch7.ten_crop(pixels, 32) if crops == 10 else [torch7.centre_crop(pixels, 32)]
        views = [torch7.normalise(view, MEAN, STD) for view in views]
        return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    kernel = {
        "pil-bilinear": transforms.InterpolationMode.BILINEAR,
        "pil-bicubic": transforms.InterpolationMode.BICUBIC,
    }
    steps = [transforms.Resize(36, kernel[resize]), transforms.CenterCrop(32), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(image)[None].double()


@pytest.fixture(scope="module")
def network(folder) -> nn.Module:
    """A network whose logits have mean 0 and deviation 3 over the images."""
    torch.manual_seed(0)
    network = create_model(MODEL, len(CLASSES))
    views = torch.cat([views_of(folder / name, "torch7-bicubic", 1) for name in IN_ORDER]).float()
    with torch.no_grad():
        for _ in range(20):
            network.train()(views)
        logits = network.eval()(views)
        network.classifier.weight.mul_(3 / logits.std(dim=0)[:, None])
        network.classifier.bias.copy_(-3 * logits.mean(dim=0) / logits.std(dim=0))
    return network


def weights_file(path, network: nn.Module, resize: str):
    """As of a run on other data in memory, whose loader and padding mean nothing here."""
    data = DataConfig(
        dataset="cifar10",
        train_crop="random_crop",
        crop_size=32,
        resize_size=36,
        interpolation=resize,
        mean=MEAN,
        std=STD,
    )
    config = Config(model=ModelConfig(name=MODEL), data=data)
    write_safetensors(Weights("here", network, config, CLASSES, None), path)
    return path


def answers_of(monkeypatch, tmp_path, *words) -> list[dict]:
    monkeypatch.setattr("sys.argv", ["tools.predict", *map(str, words), "--json", str(tmp_path / "out.json")])
    predict.main()
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize(
    ("resize", "crops"), [("torch7-bicubic", 1), ("torch7-bicubic", 10), ("pil-bilinear", 1), ("pil-bicubic", 1)]
)
def test_probabilities_are_those_of_an_independent_computation(monkeypatch, tmp_path, folder, network, resize, crops):
    weights = weights_file(tmp_path / "w.safetensors", network, resize)
    words = (weights, folder, "--crops", crops, "--top", 9)
    answers = answers_of(monkeypatch, tmp_path, *words, "--loader", "reference")
    by_default = answers_of(monkeypatch, tmp_path, *words)
    assert [entry["file"] for entry in answers] == [str(folder / name) for name in IN_ORDER]
    double = create_model(MODEL, len(CLASSES), dense_block="eager").double().eval()
    double.load_state_dict(network.state_dict())
    firsts = set()
    for entry, other in zip(answers, by_default, strict=True):
        with torch.no_grad():
            expected = double(views_of(entry["file"], resize, crops)).mean(dim=0).softmax(dim=0)
        order = expected.argsort(descending=True).tolist()
        assert [answer["class"] for answer in entry["answers"]] == [CLASSES[i] for i in order]
        ours = [answer["probability"] for answer in entry["answers"]]
        assert ours == pytest.approx(expected[order].tolist(), abs=1e-5)
        assert other["file"] == entry["file"]  # DALI's pixels are not Pillow's to the bit
        probabilities = {answer["class"]: answer["probability"] for answer in other["answers"]}
        assert [probabilities[CLASSES[i]] for i in order] == pytest.approx(ours, abs=0.05)
        firsts.add(order[0])
    assert len(firsts) > 1


@pytest.fixture
def weights(tmp_path, network):
    return weights_file(tmp_path / "w.safetensors", network, "pil-bilinear")


@pytest.mark.slow
def test_files_come_in_their_order_and_wordnets_ids_with_their_names(folder, weights, tmp_path):
    files = [folder / "c.jpg", folder / "b", folder / "c.jpg"]
    done = run_module("tools.predict", weights, *files, "--top", 3, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    expected = [str(folder / name) for name in ("c.jpg", "b/d.png", "b/deep/e.jpg", "c.jpg")]
    assert lines[::4] == expected and len(lines) == 16 and lines[:4] == lines[12:]
    answers = json.loads((tmp_path / "out.json").read_text())
    assert [entry["file"] for entry in answers] == expected
    names = {"n01440764": "tench, Tinca tinca"}
    for i, entry in enumerate(answers):
        assert len(entry["answers"]) == 3
        for line, answer in zip(lines[4 * i + 1 : 4 * i + 4], entry["answers"], strict=True):
            assert answer["name"] == names.get(answer["class"])  # WordNet knows no n99999999
            probability = f"{100 * answer['probability']:6.2f} %"
            assert line == "  ".join(["", probability, answer["class"], answer["name"] or ""]).rstrip()


@pytest.mark.slow
def test_a_csv_file_holds_the_same_answers_however_many_images_are_known_at_once(
    monkeypatch, capsys, folder, weights, tmp_path
):
    expected = answers_of(monkeypatch, tmp_path, weights, folder, "--top", 2)
    monkeypatch.setattr(predict, "AT_ONCE", 3)
    capsys.readouterr()
    again = answers_of(monkeypatch, tmp_path, weights, folder, "--top", 2, "--csv", tmp_path / "new" / "out.csv")
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'out.csv'}: 4 images\n"
    with open(tmp_path / "new" / "out.csv", newline="") as stream:
        titles, *rows = csv.reader(stream)
    assert titles == ["file", "class1", "name1", "probability1", "class2", "name2", "probability2"]
    for row, entry, other in zip(rows, expected, again, strict=True):
        cells = [cell for a in other["answers"] for cell in (a["class"], a["name"] or "", f"{a['probability']:.6f}")]
        assert row == [other["file"], *cells] and other["file"] == entry["file"]
        for a, b in zip(
            other["answers"], entry["answers"], strict=True
        ):  # a product's rounding may go by the batch's size
            assert a == b | {"probability": pytest.approx(b["probability"], rel=1e-5)}


@pytest.mark.slow
@pytest.mark.parametrize(("at_once", "batch"), [(predict.AT_ONCE, 32), (predict.AT_ONCE, 1), (2, 1)])
def test_corrupt_images_are_named_and_left_out_where_asked(
    monkeypatch, capsys, folder, weights, tmp_path, at_once, batch
):
    """One that no header is read from, and two that end too early; the answers to the others are as without them."""
    monkeypatch.setattr(predict, "AT_ONCE", at_once)
    monkeypatch.setattr(predict, "BATCH_SIZE", batch)  # of 1: some are answered before the first corrupt one
    shutil.copytree(folder, tmp_path / "in", ignore=shutil.ignore_patterns("notes.txt"))
    whole = (folder / "c.jpg").read_bytes()
    for name in ("b/cut.jpg", "z.jpg"):
        (tmp_path / "in" / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "ad.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"ad.jpg is not an image .*or leave out all such images with --corrupt-images"):
        answers_of(monkeypatch, tmp_path, weights, tmp_path / "in")
    with pytest.raises(UserError, match=r"b/cut.jpg does not decode \(.*\): repair or remove it, or leave out"):
        answers_of(monkeypatch, tmp_path, weights, tmp_path / "in" / "b")
    expected = answers_of(monkeypatch, tmp_path, weights, folder)
    capsys.readouterr()
    options = ("--corrupt-images", "skip", "--csv", tmp_path / "out.csv")
    answers = answers_of(monkeypatch, tmp_path, weights, tmp_path / "in", *options)
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/out.csv: 4 images, 3 corrupt ones left out\n"
    assert [line.split(" (")[0] for line in sorted(err.splitlines())] == [
        f"warning: {tmp_path}/in/ad.jpg is not an image that can be read",
        f"warning: {tmp_path}/in/b/cut.jpg does not decode",
        f"warning: {tmp_path}/in/z.jpg does not decode",
    ]
    assert all(line.endswith("): left out") for line in err.splitlines())
    assert [os.path.relpath(answer["file"], tmp_path / "in") for answer in answers] == list(IN_ORDER)
    for answer, other in zip(answers, expected, strict=True):
        for one, as_before in zip(answer["answers"], other["answers"], strict=True):
            assert one == {**as_before, "probability": pytest.approx(as_before["probability"], rel=1e-4)}
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5
    for name in ("z.jpg", "ad.jpg"):
        with pytest.raises(UserError, match=r"no image decodes \(1 given\): give others"):
            answers_of(monkeypatch, tmp_path, weights, tmp_path / "in" / name, "--corrupt-images", "skip")
    words = (weights, tmp_path / "in" / "b", tmp_path / "in" / "z.jpg", "--corrupt-images", "skip")
    assert len(answers_of(monkeypatch, tmp_path, *words)) == 2
    assert capsys.readouterr().err.endswith("left out\n2 images, 2 corrupt ones left out\n")


def test_all_of_imagenets_classes_have_names():
    assert len(human_names(imagenet_ids())) == 1000
    assert human_names(("bag", "n123", "shirt")) == {}
    short = short_names([*imagenet_ids(), "bag", "n99999999"])
    assert len(set(short)) == 1002 and short[0] == "tench" and short[-2:] == ["bag", "n99999999"]
    assert {"crane (n02012849)", "crane (n03126707)"} <= set(short)  # the bird and the machine


@pytest.mark.slow
def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path, folder, weights):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    whole = (folder / "c.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "deep.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "empty.jpg")
    for words, expected in (
        ((weights, "none.jpg"), "there is no image or folder none.jpg"),
        ((weights, tmp_path / "empty.jpg"), "there is no image or folder"),
        ((weights, tmp_path / "empty"), "empty holds no images: give a folder"),
        ((weights, folder / "notes.txt"), "notes.txt is not an image that can be read"),
        ((weights, folder / "c.jpg", tmp_path / "text.jpg"), "text.jpg is not an image that can be read"),
        ((weights, tmp_path / "cut.jpg"), "cut.jpg does not decode"),
        ((weights, tmp_path / "deep.png"), "deep.png has more than 8 bits a colour"),
        ((weights, folder / "c.jpg", "--top", "0"), "a positive number is needed"),
        ((weights,), "IMAGE-OR-FOLDER"),
        ((folder / "c.jpg", folder / "c.jpg"), "c.jpg is no file of weights"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            answers_of(monkeypatch, tmp_path, *words)
        assert "\n" not in str(error.value)
    done = run_module("tools.predict", weights, folder / "c.jpg", "--json", "/dev/full")
    assert (
        done.returncode == 2 and done.stderr == "error: cannot write: No space left on device: make room on that disk\n"
    )
    damaged = read_weights(weights)
    damaged.network.classifier.bias.data[0] = torch.nan
    write_safetensors(damaged, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match="damaged.safetensors: the answers are not finite"):
        answers_of(monkeypatch, tmp_path, tmp_path / "damaged.safetensors", folder / "c.jpg")
    monkeypatch.setattr("sys.argv", ["", str(weights), str(folder), "--json", str(tmp_path / "empty")])
    capsys.readouterr()
    with pytest.raises(UserError, match="cannot write --json .*empty: Is a directory"):
        predict.main()
    assert capsys.readouterr().out == ""  # before the work


def test_a_csv_file_has_a_column_of_names_only_where_classes_have_them(tmp_path, weights, monkeypatch):
    (tmp_path / "names").write_text("\n".join(f"kind {i}" for i in range(len(CLASSES))))
    photo(0, 40, 40).save(tmp_path / "a.jpg")
    options = ("--top", 2, "--csv", tmp_path / "out.csv", "--classes", tmp_path / "names")
    answers_of(monkeypatch, tmp_path, weights, tmp_path / "a.jpg", *options)
    titles, row = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert titles == ["file", "class1", "probability1", "class2", "probability2"]
    assert row[1].startswith("kind ") and 0 < float(row[2]) <= 1 and len(row) == 5


def test_rotated_photos_and_transparent_images_are_named(tmp_path, weights, monkeypatch, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    photo(1, 40, 56).save(tmp_path / "stored.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "stored.jpg") as image:
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    words = (weights, tmp_path / "stored.jpg", tmp_path / "upright.png")
    lying, upright = answers_of(monkeypatch, tmp_path, *words)
    warning = f"warning: {tmp_path}/stored.jpg is rotated by EXIF (later ones are not named): {ASK_FOR_UPRIGHT}\n"
    assert capsys.readouterr().err == warning and lying["answers"] != upright["answers"]
    assert answers_of(monkeypatch, tmp_path, *words, "--no-exif-orientation") == [lying, upright]
    turned, same = answers_of(monkeypatch, tmp_path, *words, "--exif-orientation")
    assert not capsys.readouterr().err and same == upright
    photo(2, 40, 40).convert("RGBA").save(tmp_path / "icon.png")
    answers_of(monkeypatch, tmp_path, weights, tmp_path / "icon.png", "--no-exif-orientation")
    warning = f"warning: {tmp_path}/icon.png may have transparent pixels (later ones are not named): {OPAQUE}\n"
    assert capsys.readouterr().err == warning
    for one, other in zip(turned["answers"], same["answers"], strict=True):
        assert one["class"] == other["class"] and one["probability"] == pytest.approx(other["probability"], abs=1e-3)
