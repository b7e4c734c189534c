"""How much each layer uses the maps of each earlier one: the paper's Figure 5 (Section 5, "Feature Reuse")."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.models.densenet import DenseNet

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
    """A heat map of each block, two in a row; each column's largest weight is 1.

    The letters stay legible where TensorBoard shows the picture at half its size.
    """
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(blocks) // 2)
    figure = Figure(figsize=(6.4, 1.6 + 2.8 * rows), layout="constrained")
    figure.suptitle(title, fontsize=14)
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for number, axes in enumerate(panels, start=1):
        if number > len(blocks):
            axes.axis("off")
            continue
        reuse = blocks[number - 1]
        size = len(reuse)
        image = axes.imshow(
            reuse / np.nanmax(reuse, axis=0), vmin=0, vmax=1, extent=(0.5, size + 0.5, size - 0.5, -0.5)
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=13)
        axes.axvspan(size - 0.5, size + 0.5, fill=False, linewidth=2)
        follower = "classifier" if number == len(blocks) else f"transition {number}"
        axes.set_title(f"block {number} (framed: {follower})", fontsize=13)
        if number + 2 > len(blocks):  # no panel is below it
            axes.set_xlabel("target layer", fontsize=14)
    figure.supylabel("source layer (0: the block's input)", fontsize=14)
    bar = figure.colorbar(image, ax=list(figure.axes), location="bottom", aspect=40, pad=0.02)
    bar.set_label("mean |weight|, of each target's largest", fontsize=14)
    bar.ax.tick_params(labelsize=13)
    return figure
