import numpy as np
import pytest
import torch

from pipeline.feature_reuse import draw_reuse, feature_reuse
from pipeline.models import create_model


@pytest.mark.parametrize(("name", "stem"), [("densenet_bc22_k6", 12), ("densenet13_k5", 16)])
def test_reuse_is_the_mean_absolute_weight_of_each_source(name, stem):
    """Weights of both signs whose size is set source by source are found again."""
    network = create_model(name, num_classes=7)
    random = np.random.default_rng(0)
    expected, channels = [], stem
    growth = int(name.rpartition("k")[2])
    for i in (1, 2, 3):
        block = network.features.get_submodule(f"denseblock{i}")
        following = network.features.get_submodule(f"transition{i}").conv if i < 3 else network.classifier
        wanted = np.full((4, 4), np.nan, np.float32)
        for t, target in enumerate([layer.conv1 for layer in block] + [following]):
            starts = [0] + [channels + s * growth for s in range(t + 1)]
            for s in range(t + 1):
                size = random.uniform(0.1, 2)
                part = target.weight.data[:, starts[s] : starts[s + 1]]
                part.copy_(size * torch.randn(part.shape).sign())
                wanted[s, t] = size
        expected.append(wanted)
        channels = following.weight.shape[0]
    for actual, wanted in zip(feature_reuse(network), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5)


def test_the_picture_has_a_panel_for_each_block(tmp_path):
    blocks = feature_reuse(create_model("densenet121"))
    figure = draw_reuse(blocks, "a title")
    panels = [axes for axes in figure.axes if axes.get_title().startswith("block")]
    assert [axes.get_title() for axes in panels] == ["block 1", "block 2", "block 3", "block 4"]
    for reuse, axes in zip(blocks, panels, strict=True):
        layers = len(reuse) - 1
        picture = axes.images[0]
        np.testing.assert_allclose(picture.get_array().filled(np.nan), reuse / np.nanmax(reuse, axis=0))
        assert picture.get_extent() == [0.5, layers + 1.5, layers + 0.5, -0.5]  # targets from 1, sources from 0
    figure.savefig(tmp_path / "reuse.png")
