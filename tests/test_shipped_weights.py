"""The trained network of this repository, evaluated on the embedded images: a known answer."""

import json
import re

import pytest
import torch
from conftest import REPOSITORY, run_module

from pipeline.weights import read_weights, write_torch
from tools.demo import ARCHIVE, unpack

WEIGHTS = REPOSITORY / "tools" / "weights" / "fashion-mnist.safetensors"
WRONG = 109  # of the 2,000 test images
ROUNDING = 2  # images whose two most probable classes are so near that another machine may order them otherwise


@pytest.mark.slow
def test_the_trained_network_is_as_good_as_the_readme_says(tmp_path):
    unpack(ARCHIVE, tmp_path / "images")
    words = ["--data", tmp_path / "images", "--dataset", "images", "--json", tmp_path / "result.json"]
    done = run_module("tools.evaluate", WEIGHTS, *words)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "result.json").read_text())["evaluations"]
    assert result["images"] == 2000 and result["classes_present"] == 10
    assert abs(result["top1_wrong"] - WRONG) <= ROUNDING
    hardest = sorted(result["by_class"], key=lambda row: row["top1_error"])[-3:]
    assert {row["class"] for row in hardest} == {"Pullover", "Shirt", "T-shirt/top"}


def test_the_lines_that_load_it_in_torchvision(tmp_path, monkeypatch):
    """Those on the page, with the README's file."""
    weights = read_weights(WEIGHTS)
    write_torch(weights, tmp_path / "densenet.pth")
    page = (REPOSITORY / "tools" / "README.md").read_text()
    (lines,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(lines, names)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(names["network"].eval()(images), weights.network(images), rtol=1e-4, atol=1e-4)
