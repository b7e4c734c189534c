"""tools.export: files that onnxruntime and torch.export load by themselves, for any batch, with PyTorch's logits."""

import json
import sys

import pytest
import torch
from conftest import run_module
from torch import nn

from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.weights import Weights, read_weights, write_safetensors
from tools import export

CLASSES = ("T-shirt/top", "Öl", "n01440764")
NAME = "densenet_bc22_k6"
DATA = DataConfig(crop_size=32, resize_size=36, interpolation="pil-bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
PREPROCESSING = {
    "resize_short_side": 36,
    "resize_filter": "bicubic with antialias, as Pillow's",
    "centre_crop": 32,
    "colors": "RGB, 0 to 1",
    "bits": 8,
    "exif_orientation": "ignored",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "assumed": [],
}


def trained(name: str, classes: int, side: int) -> nn.Module:
    """A network whose batch norms have statistics of their inputs."""
    torch.manual_seed(0)
    network = create_model(name, classes)
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, 3, side, side))
    return network.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    config = Config(model=ModelConfig(name=NAME, dense_block="memory_efficient"), data=DATA)
    write_safetensors(Weights("here", trained(NAME, len(CLASSES), 32), config, CLASSES, None), file)
    return file


@pytest.mark.slow
def test_onnx_runs_in_onnxruntime_with_any_batch(weights, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    done = run_module("tools.export", weights, tmp_path / "new" / "network.onnx")
    assert done.returncode == 0, done.stderr
    assert "logits of 1 and 3 images differ from PyTorch's by " in done.stdout and done.stdout.count("\n") == 1
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["network.onnx"]  # weights and all
    session = onnxruntime.InferenceSession(tmp_path / "new" / "network.onnx")
    assert [(end.name, end.shape[1:]) for end in session.get_inputs()] == [("images", [3, 32, 32])]
    assert [(end.name, end.shape[1:]) for end in session.get_outputs()] == [("logits", [len(CLASSES)])]
    network = read_weights(weights).network
    for batch_size in (1, 2, 7):
        images = torch.randn(batch_size, 3, 32, 32)
        (logits,) = session.run(None, {"images": images.numpy()})
        assert logits.shape == (batch_size, len(CLASSES))
        with torch.no_grad():
            assert (torch.from_numpy(logits) - network(images)).abs().max() < 1e-5
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["model"] == NAME
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["preprocessing"]) == PREPROCESSING


@pytest.mark.slow
def test_pt2_is_loaded_by_torch_export_with_any_batch(weights, tmp_path, monkeypatch):
    for package in export.ONNX_PACKAGES:  # which it does without
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("sys.argv", ["", str(weights), str(tmp_path / "network.pt2")])
    export.main()
    metadata = {"model": "", "classes": "", "preprocessing": ""}
    loaded = torch.export.load(tmp_path / "network.pt2", extra_files=metadata).module()
    network = read_weights(weights).network
    for batch_size in (1, 2, 7):
        images = torch.randn(batch_size, 3, 32, 32)
        with torch.no_grad():
            assert (loaded(images) - network(images)).abs().max() < 1e-5
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["preprocessing"]) == PREPROCESSING


@pytest.mark.slow
def test_densenet121_and_a_network_of_timm():
    pytest.importorskip("onnxruntime")
    for name, suffix in (("densenet121", ".onnx"), ("timm:resnet10t", ".pt2")):
        config = Config(model=ModelConfig(name=name), data=DataConfig(crop_size=64))
        weights = Weights("here", trained(name, 10, 64), config, tuple("0123456789"), None)
        content, difference = export.export(weights, suffix)
        assert len(content) > 4 * sum(parameter.numel() for parameter in weights.network.parameters())
        assert difference < 1e-5


@pytest.mark.slow
def test_nothing_is_written_that_computes_something_else(weights, tmp_path, monkeypatch):
    serialise, load = export.FORMATS[".pt2"]
    file = tmp_path / "network.pt2"
    monkeypatch.setattr("sys.argv", ["", str(weights), str(file)])
    for wrong in (2e-4, float("nan")):
        shifted = serialise, lambda content, wrong=wrong: lambda images: load(content)(images) + wrong
        monkeypatch.setitem(export.FORMATS, ".pt2", shifted)
        with pytest.raises(UserError, match="logits differ from PyTorch's by .* not written"):
            export.main()
        assert not file.exists()


class Choosy(nn.Module):
    """Does what no tracing can follow."""

    def forward(self, images):
        return images.mean(dim=(2, 3)) if images.sum() > 0 else images.amax(dim=(2, 3))


def test_mistakes_are_one_line(weights, tmp_path, monkeypatch):
    def refused(*words) -> str:
        monkeypatch.setattr("sys.argv", ["", *map(str, words)])
        with pytest.raises(UserError) as error:
            export.main()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "the name must end in .onnx or .pt2" in refused(weights, tmp_path / "network.pth")
    assert "cannot read the weights" in refused(tmp_path / "none.pt", tmp_path / "network.pt2")
    (tmp_path / "folder.pt2").mkdir()
    assert "folder.pt2: Is a directory" in refused(weights, tmp_path / "folder.pt2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refused(weights, tmp_path / "network.onnx")
    assert message == "ONNX needs onnxruntime: pip install -r requirements-dev.txt, or give an OUTPUT.pt2"
    with pytest.raises(UserError, match="timm:choosy cannot be exported to .pt2: ") as error:
        export.export(Weights("", Choosy(), Config(model=ModelConfig(name="timm:choosy")), (), None), ".pt2")
    assert "\n" not in str(error.value)
