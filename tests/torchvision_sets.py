"""Writes small data sets in the formats in which torchvision keeps CIFAR, SVHN and Fashion-MNIST."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision import datasets

IMAGES = {"train": 37, "test": 11, "extra": 9}


def pixels(size: int, channels: int, labels: np.ndarray, classes: int) -> np.ndarray:
    """(N, size, size, channels) noise whose brightness shows the class."""
    random = np.random.default_rng(len(labels) + size)
    noise = random.integers(0, 120, (len(labels), size, size, channels), np.uint8)
    return noise + (130 * (labels % classes) // classes).astype(np.uint8)[:, None, None, None]


def split_of(split: str, size: int, channels: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(IMAGES[split]) % classes
    return pixels(size, channels, labels, classes), labels


def write_fashion_mnist(root: Path) -> Path:
    """Ten classes of 28x28 gray images, of which 3 occur."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = split_of(split, 28, 1, 3)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images[..., 0]), (f"{prefix}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (raw / name).write_bytes(header + array.astype(np.uint8).tobytes())
    return root


def write_cifar(root: Path, patch: pytest.MonkeyPatch, classes: int) -> Path:
    """CIFAR-10 or CIFAR-100; torchvision's checksums are patched to these files'."""
    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    key = "labels" if classes == 10 else "fine_labels"
    entries = {}
    for split in ("train", "test"):
        images, labels = split_of(split, 32, 3, classes)
        entries[split] = {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), key: labels.tolist()}
    patch.setattr(kind, "train_list", [write("training", entries["train"])])
    patch.setattr(kind, "test_list", [write("testing", entries["test"])])
    names = [f"class {i}" for i in range(classes)]
    _, digest = write(kind.meta["filename"], {kind.meta["key"]: names})
    patch.setattr(kind, "meta", {**kind.meta, "md5": digest})
    return root


def write_svhn(root: Path, patch: pytest.MonkeyPatch) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split in ("train", "extra", "test"):
        images, labels = split_of(split, 32, 3, 10)
        file = root / datasets.SVHN.split_list[split][1]
        savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        entries[split] = [None, file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    patch.setattr(datasets.SVHN, "split_list", entries)
    return root
