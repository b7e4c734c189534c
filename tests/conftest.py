"""Shared fixtures: folders of generated JPEGs, configurations, and processes under torchrun; cores and order of the tests."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import PATIENCE, REPOSITORY, Template
from PIL import Image

from pipeline.command import exit_on_user_error
from pipeline.config import Config
from pipeline.config_file import from_dict
from pipeline.cpp import CppUnavailableError, find_compiler
from pipeline.data.index import DatasetIndex
from pipeline.data.synthetic import synthetic_index
from pipeline.parsing import flatten


def pytest_configure():
    """Keep each of pytest-xdist's workers, and the processes that it starts, to a core of its own.

    This comes before torch is loaded, which then uses one thread: with tiny networks several threads mostly wait for each
    other. A test of several threads sets their number.

    The tests, and what they start, see no GPU: many start more ranks than a machine has GPUs, and compare bits. And they hear
    SIGHUP, which nohup has its children ignore.

    Most of what loads and computes on CPU is C++: without a compiler too little would be left.
    """
    try:
        find_compiler()
    except CppUnavailableError as error:
        pytest.exit(f"the tests need a C++ compiler ({error}): install g++ or clang++", returncode=2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items):
    """Run the fast tests first, so that a mistake shows soon."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def restored_threads():
    """Give the next test as many of torch's threads as this one found."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before:
        sys.modules["torch"].set_num_threads(before)


def photo(seed: int, height: int, width: int) -> Image.Image:
    """A random image with the spectrum of a photograph (amplitude 1/f)."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    shared = random.normal(size=(height, width, 1))
    noise = np.fft.fft2(0.8 * shared + 0.4 * random.normal(size=(height, width, 3)), axes=(0, 1))
    pixels = np.fft.ifft2(noise / frequency[..., None], axes=(0, 1)).real
    pixels = 128 + 60 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_class_folders(root: Path, classes: int, images: int, size: tuple[int, int] = (40, 48), seed: int = 0) -> Path:
    """`classes` folders that share `images` JPEG files; an image's class shows in its brightness."""
    for i in range(images):
        folder = root / f"class{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = size[0] + i % 7, size[1] + i % 5
        image = photo(seed + i, height, width).point(lambda value, i=i: value // 2 + 120 * (i % classes) // classes)
        image.save(folder / f"image{i:04d}.jpg", quality=90)
    return root


def index_of(sizes: list[tuple[int, int]]) -> DatasetIndex:
    """An index of images of these sizes (height, width) that exist nowhere."""
    return dataclasses.replace(synthetic_index(len(sizes), 1, 1, "sizes"), sizes=np.array(sizes, np.int32))


def with_random_norms(network):
    """Batch norms as no initialisation gives them: gammas of both signs, running statistics far from 0 and 1."""
    from torch import nn  # not before pipeline, which sets up torch's threads

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory) -> Path:
    """A data set of 3 classes: 37 training and 11 validation images."""
    root = tmp_path_factory.mktemp("images")
    write_class_folders(root / "train", 3, 37)
    write_class_folders(root / "val", 3, 11, seed=1000)
    return root


def small_config(run_dir: Path, **sections: dict) -> Config:
    """A network and a synthetic data set that train a step in a fraction of a second."""
    tree = {
        "run_dir": str(run_dir),
        "model": {"name": "densenet_bc22_k8"},
        "data": {
            "loader": "synthetic",
            "crop_size": 16,
            "resize_size": 16,
            "synthetic_images": 46,
            "synthetic_classes": 3,
        },
        "optim": {"epochs": 2, "batch_size": 12},
        "train": {"log_every": 2, "device": "cpu", "pictures_every": 0},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields} if isinstance(fields, dict) else fields
    if tree["data"]["loader"] != "synthetic":
        tree["data"] = {name: value for name, value in tree["data"].items() if not name.startswith("synthetic_")}
    if tree["optim"].get("schedule", "step") == "step":
        tree["optim"].setdefault("milestones", [1] if tree["optim"]["epochs"] > 1 else [])
    return from_dict(tree, "test")


TEMPLATE = Template()


def pytest_sessionfinish():
    TEMPLATE.close()


def run_module(*arguments: object, ranks: int = 1, cores: int | None = None) -> subprocess.CompletedProcess:
    """Run ``python -m ARGUMENTS`` in the repository, as several ranks if asked, on so many of this test's CPU cores."""
    return TEMPLATE.run([str(argument) for argument in arguments], ranks, cores)


def run_torchrun(*arguments: object, ranks: int) -> subprocess.CompletedProcess:
    """Run ``torchrun -m ARGUMENTS`` in the repository, as a user does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture
def user_error(monkeypatch, capfd):
    """Run a command's main with these words; return the one line that it must end with, on stderr and with exit code 2."""

    def run(main: Callable[[], object], *words: object, silent: bool = False) -> str:
        """`silent`: it must have printed nothing before, so that no work was done for nothing."""
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(main)
        said = capfd.readouterr()
        complaint = said.err.splitlines()
        assert end.value.code == 2 and len(complaint) == 1 and complaint[0].startswith("error: "), complaint
        assert not (silent and said.out)
        return complaint[0]

    return run


def override_flags(config: Config, leave_out: str = "") -> list[str]:
    """The command-line words that turn the defaults into `config`, but for one field."""
    words = []
    for key, value in flatten(dataclasses.asdict(config)).items():
        if key == leave_out:
            continue
        if key in ("train.change", "data.from_weights"):  # words of their own
            words += [word for field in value for word in (f"--{key}", field)]
        else:
            words += [f"--{key}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words
