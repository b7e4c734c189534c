"""torchvision's data sets in memory: the same plans, loaders, training and evaluation as files of images."""

import dataclasses
import functools
import gzip
import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision_sets
from conftest import REPOSITORY, run_module, small_config
from PIL import Image
from torchvision import datasets
from training_hooks import InterruptAfter, InterruptionError

from pipeline import trainer
from pipeline.checkpoint import load_checkpoint
from pipeline.config import DataConfig
from pipeline.data import arrays, native
from pipeline.data.arrays import ArraySource, index_arrays, read_arrays
from pipeline.data.dataset import open_datasets
from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader
from pipeline.data.plan import training_plans
from pipeline.data.scan import scan_classes
from pipeline.errors import UserError
from tools import evaluate

CPU = Shard(rank=0, ranks=1, device=torch.device("cpu"), threads=2)
FASHION = {
    "dataset": "fashion-mnist", "loader": "auto", "crop_size": 28, "resize_size": 28, "train_crop": "random_crop",
    "color_jitter": 0, "pca_noise": 0, "mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4],
}  # fmt: skip


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    return torchvision_sets.write_fashion_mnist(tmp_path_factory.mktemp("fashion"))


def data_config(root, **fields) -> DataConfig:
    return small_config(root, data={**FASHION, "dir": str(root), **fields}).data


@pytest.mark.parametrize(
    ("dataset", "classes"), [("cifar10", 10), ("cifar100", 100), ("svhn", 10), ("fashion-mnist", 10)]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_labels_and_classes_are_torchvisions(tmp_path, monkeypatch, dataset, classes, split):
    """Read back through DALI, without augmentation, and compared with what was written."""
    size, channels, present = (28, 1, 3) if dataset == "fashion-mnist" else (32, 3, classes)
    if dataset == "fashion-mnist":
        torchvision_sets.write_fashion_mnist(tmp_path)
    elif dataset == "svhn":
        torchvision_sets.write_svhn(tmp_path, monkeypatch)
    else:
        torchvision_sets.write_cifar(tmp_path, monkeypatch, classes)
    parts = ("train", "extra") if (dataset, split) == ("svhn", "train") else (split,)
    written = [torchvision_sets.split_of(part, size, channels, present) for part in parts]
    images, labels = (np.concatenate([part[i] for part in written]) for i in (0, 1))

    index = index_arrays(ArraySource(dataset, str(tmp_path), split))
    np.testing.assert_array_equal(index.labels, labels)
    assert len(index.classes) == classes and index.sizes.tolist() == [[size, size]] * len(labels)
    config = dataclasses.replace(
        data_config(tmp_path), crop_size=size, resize_size=size, mean=(0, 0, 0), std=(1, 1, 1), dataset=dataset
    )
    for batch in EvaluationLoader(index, config, CPU, batch_size=16, crops=1).batches():
        expected = np.broadcast_to(images[batch.ids] / 255, (len(batch.ids), size, size, 3))
        np.testing.assert_allclose(batch.images.permute(0, 2, 3, 1), expected, atol=1e-6)
        np.testing.assert_array_equal(batch.labels, labels[batch.ids])


@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
@pytest.mark.parametrize("resize", ["torch7-bicubic", "pil-bilinear"])
def test_padded_crops_are_the_torch_codes(fashion, loader, resize):
    """Normalise, pad with zeros, cut anywhere, mirror: fb.resnet.torch datasets/cifar10.lua, in float64."""
    config = data_config(fashion, loader=loader, interpolation=resize, padding=3)
    index = index_arrays(ArraySource("fashion-mnist", str(fashion), "train"))
    images, _ = torchvision_sets.split_of("train", 28, 1, 3)
    options = dict(seed=1, batch_size=8, accumulation=1)
    batches = TrainingLoader(index, config, CPU, **options).batches(epoch=0)
    plans = training_plans(index, config, epoch=0, first_step=0, rank=0, ranks=1, **options)
    places = set()
    for batch, plan in zip(batches, plans, strict=True):
        for i, image_id in enumerate(batch.ids):
            image = (np.repeat(images[image_id] / 255, 3, axis=2) - config.mean) / config.std
            padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
            top, left = plan.offsets[i, 0] + 3
            expected = padded[top : top + 28, left : left + 28]
            expected = expected[:, ::-1] if plan.hflip[i, 0] else expected
            np.testing.assert_allclose(batch.images[i].permute(1, 2, 0), expected, atol=2e-6)
            places.add((top, left, bool(plan.hflip[i, 0])))
    assert len(places) > 20


@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_padding_without_augmentation_is_the_image(fashion, loader):
    config = data_config(fashion, loader=loader, padding=0, hflip=False)
    index = index_arrays(ArraySource("fashion-mnist", str(fashion), "train"))
    (batch,) = TrainingLoader(index, config, CPU, seed=1, batch_size=37, accumulation=1).batches(epoch=0)
    evaluated = next(EvaluationLoader(index, config, CPU, batch_size=37, crops=1).batches())
    assert torch.equal(batch.images, evaluated.images[batch.ids])


def test_class_folders_of_small_images_go_the_same_way(tmp_path, fashion):
    """CIFAR as PNG files gives the very batches that it gives as arrays."""
    images, labels = torchvision_sets.split_of("train", 28, 1, 3)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / f"{label}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{i:04d}.png")
    files, config = scan_classes(tmp_path), data_config(fashion, padding=2)
    order = np.array([int(name[2:6]) for name in files.names])
    arrays = index_arrays(ArraySource("fashion-mnist", str(fashion), "train")).take(order)
    options = dict(seed=1, batch_size=10, accumulation=1)
    both = [TrainingLoader(index, config, CPU, **options).batches(epoch=0) for index in (files, arrays)]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("dataset", ["fashion-mnist", "cifar10"])
@pytest.mark.parametrize("interpolation", ["torch7-bicubic", "pil-bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_native_takes_pixels_in_memory_without_python_and_to_the_same_bits(
    tmp_path, monkeypatch, dataset, interpolation, channels
):
    """Gray and coloured, cut from a resized image and at random; Python's way is that of every other image in no file."""
    if dataset == "fashion-mnist":
        torchvision_sets.write_fashion_mnist(tmp_path)
    else:
        torchvision_sets.write_cifar(tmp_path, monkeypatch, 10)
    numbers = {"mean": (0.3,), "std": (0.2,)} if channels == 1 else {}
    for fields in ({}, {"train_crop": "random_resized_crop", "resize_size": 33, "crop_size": 24}):
        config = data_config(
            tmp_path,
            loader="native",
            dataset=dataset,
            interpolation=interpolation,
            channels=channels,
            **numbers,
            **fields,
        )
        index = index_arrays(ArraySource(dataset, str(tmp_path), "train"))
        plans = list(
            training_plans(index, config, seed=1, epoch=0, first_step=0, batch_size=9, rank=0, ranks=1, accumulation=1)
        )
        loaded = {}
        for way in ("memory", "python"):
            with monkeypatch.context() as patch:
                pipeline = native.NativePipeline(index, config, threads=2, views=1)
                if way == "memory":
                    patch.setattr(ArraySource, "open", None)
                else:
                    pipeline._array = None
                loaded[way] = [images.clone() for _, images in pipeline.run_with_colors(plans)]
        assert len(loaded["memory"]) == len(plans) > 2
        assert all(torch.equal(a, b) for a, b in zip(loaded["memory"], loaded["python"], strict=True))


@pytest.mark.parametrize("other", ["fewer", "smaller"])
def test_a_machine_with_other_images_than_those_indexed_is_told(tmp_path, monkeypatch, other):
    """C++ would read what lies beyond them."""
    torchvision_sets.write_fashion_mnist(tmp_path)
    config = data_config(tmp_path, loader="native")
    index = index_arrays(ArraySource("fashion-mnist", str(tmp_path), "train"))
    there = read_arrays(index.source)
    pixels = there.pixels[:-1] if other == "fewer" else np.ascontiguousarray(there.pixels[:, :-4])
    monkeypatch.setattr(arrays, "read_arrays", lambda source: dataclasses.replace(there, pixels=pixels))
    with pytest.raises(
        UserError, match=rf"in {tmp_path} are not those that were indexed \({len(pixels)} of .* every machine"
    ):
        native.NativePipeline(index, config, threads=2, views=1)


@pytest.mark.parametrize("loader", ["auto", "synthetic"])
def test_images_held_out_are_the_validation_set(fashion, loader):
    dataset = "fashion-mnist" if loader == "auto" else "images"
    config = data_config(fashion, holdout=7, loader=loader, dataset=dataset, synthetic_images=37)
    whole, _ = open_datasets(dataclasses.replace(config, holdout=0), fashion, progress=False)
    train, val = open_datasets(config, fashion, progress=False)
    assert len(train) == 30 and len(val) == 7
    assert sorted([*train.names, *val.names]) == sorted(whole.names)
    label_of = dict(zip(whole.names, whole.labels, strict=True))
    assert [label_of[name] for name in val.names] == val.labels.tolist()
    assert len({whole.fingerprint, train.fingerprint, val.fingerprint}) == 3
    with pytest.raises(UserError, match="data.holdout 37 leaves none of the 37"):
        open_datasets(dataclasses.replace(config, holdout=37), fashion, progress=False)


@pytest.mark.slow
def test_training_resumes_with_the_same_bits_and_evaluates_on_the_test_images(tmp_path, fashion, monkeypatch):
    def config(name):
        data = {**FASHION, "dir": str(fashion), "holdout": 5}
        optim = {"epochs": 2, "batch_size": 8, "milestones": []}
        return small_config(tmp_path / name, data=data, optim=optim, train={"checkpoint_every": 1})

    whole = trainer.fit(config("whole"))

    with pytest.raises(InterruptionError):
        trainer.fit(config("cut"), hooks=[InterruptAfter(2)])
    assert trainer.fit(config("cut")) == whole
    a, b = (load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)

    command = ("tools.evaluate", tmp_path / "whole" / "checkpoints" / "last.pt", "--data", fashion)
    for ranks in (1, 2):
        done = run_module(*command, "--json", tmp_path / f"{ranks}.json", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text())["evaluations"][0] for ranks in (1, 2))
    assert one["by_class"] == two["by_class"] and one["top1_wrong"] == two["top1_wrong"]
    assert one["images"] == 11 and one["classes"] == 10 and one["classes_present"] == 3


def test_threads_that_ask_at_once_read_the_files_once(fashion, monkeypatch):
    """Each rank but the first begins so, and would have as many copies as threads."""
    source = index_arrays(ArraySource("fashion-mnist", str(fashion), "train")).source
    read_arrays.cache_clear()
    reads, real = [], arrays._read_part

    def slowly(*words):
        reads.append(words)
        time.sleep(0.2)
        return real(*words)

    monkeypatch.setattr(arrays, "_read_part", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = [stream.read() for stream in pool.map(lambda i: source.open("", i, 0), range(4))]
    assert len(reads) == 1 and len(set(found)) == 4


def test_mistakes_are_one_line(tmp_path, fashion):
    with pytest.raises(UserError, match="cannot read the test images of cifar10 in .*data.download"):
        index_arrays(ArraySource("cifar10", str(tmp_path), "test"))
    with pytest.raises(UserError, match="loader cannot be synthetic"):
        data_config(fashion, loader="synthetic")
    with pytest.raises(UserError, match="val_labels is for images"):
        data_config(fashion, val_labels="x.txt")
    torchvision_sets.write_fashion_mnist(tmp_path)
    few, strange = b"\0\0\x08\x01\0\0\0\x02\1\2", b"\0\0\x08\x01\0\0\0\x0b" + b"\x4d" * 11
    for damage in (b"", b"\0\0", b"\0\0\x08\x01\0\0\0\x0b12", few, strange):
        (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(damage)
        expected = (
            "are damaged: 11 images, (2|11) labels" if damage in (few, strange) else "cannot read the test images"
        )
        with pytest.raises(UserError, match=expected):
            index_arrays(ArraySource("fashion-mnist", str(tmp_path), "test"))


def test_evaluation_fetches_the_images_that_it_lacks(tmp_path, monkeypatch):
    """From a server on this machine in place of torchvision's mirror."""
    raw = torchvision_sets.write_fashion_mnist(tmp_path / "there") / "FashionMNIST" / "raw"
    resources = []
    for file in sorted(raw.iterdir()):
        packed = raw / f"{file.name}.gz"
        packed.write_bytes(gzip.compress(file.read_bytes()))
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    weights = REPOSITORY / "tools" / "weights" / "fashion-mnist.safetensors"
    words = [str(weights), "--data", str(tmp_path / "here")]
    with pytest.raises(UserError, match="in training --data.download true, .*in the tools --download, "):
        evaluate.open_candidates(evaluate._parser().parse_args(words))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=raw)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
        (candidate,) = evaluate.open_candidates(evaluate._parser().parse_args([*words, "--download"]))
        server.shutdown()
    assert len(candidate.index) == torchvision_sets.IMAGES["test"]
