"""How much each layer uses the maps of each earlier one: the paper's Figure 5 (Section 5, "Feature Reuse")."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.models.densenet import DenseNet
from pipeline.words import drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def feature_reuse(network: DenseNet) -> list[np.ndarray]:
    """Mean absolute weight by source and target, of each dense block.

    Returns:
        For a block of L layers (L + 1, L + 1) float32: row 0 is the block's input and row s layer s, column t - 1 is layer t
        and the last one what follows the block, a transition or the classifier. NaN where the target comes before the source.
    """
    blocks = []
    for i in range(1, network.block_count + 1):
        layers = list(network.get_submodule(f"features.denseblock{i}").children())
        follower = f"features.transition{i}.conv" if i < network.block_count else "classifier"
        targets = [
            *(layer.get_parameter("conv1.weight") for layer in layers),
            network.get_parameter(f"{follower}.weight"),
        ]
        into = layers[0].get_parameter("norm1.weight").numel()
        growth = targets[-1].shape[1] - into
        sources = [into] + [growth // len(layers)] * len(layers)
        reuse = np.full((len(layers) + 1, len(layers) + 1), np.nan, np.float32)
        for t, weight in enumerate(targets):
            by_map = weight.abs().transpose(0, 1).flatten(1).float().mean(dim=1)
            reuse[: t + 1, t] = [part.mean().item() for part in by_map.split(sources[: t + 1])]
        blocks.append(reuse)
    return blocks


def draw_reuse(blocks: list[np.ndarray], title: str) -> "Figure":
    """A heat map of each block; each column's largest weight is 1.

    Half as high as it is wide, with large letters: they stay legible on TensorBoard's cards, which halve the picture.
    """
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    figure.suptitle(drawable(title), fontsize=16)
    panels = figure.subplots(1, len(blocks), squeeze=False)[0]
    for number, (reuse, axes) in enumerate(zip(blocks, panels, strict=True), start=1):
        size = len(reuse)
        extent = (0.5, size + 0.5, size - 0.5, -0.5)
        image = axes.imshow(reuse / np.nanmax(reuse, axis=0), vmin=0, vmax=1, extent=extent, aspect="auto")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=13)
        axes.axvspan(size - 0.5, size + 0.5, fill=False, linewidth=2)
        axes.set_title(f"block {number}", fontsize=15)
    panels[0].set_ylabel("source layer, 0: input", fontsize=14)
    figure.supxlabel("target layer; framed: the transition or classifier after the block", fontsize=14)
    bar = figure.colorbar(image, ax=list(panels), aspect=15, pad=0.02)
    bar.set_label("mean |weight| /\nits target's largest", fontsize=13)
    bar.ax.tick_params(labelsize=13)
    return figure
