"""How a training network's passes over whole batches are started: as they are, compiled by torch.compile, or as CUDA graphs.

The last and smaller batch of an epoch is always computed as it is.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.cuda_graphs import ReplayedNetwork
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Compile

BY_TORCH = ("default", "reduce-overhead", "max-autotune")  # modes of torch.compile
CUDA_GRAPHS = ("graphs", "reduce-overhead", "max-autotune")


def compile_network(network: nn.Module, mode: "Compile", images: int, accumulation: int) -> nn.Module:
    """Return the network as it is trained; parameters and buffers are shared.

    Args:
        mode: "none" changes nothing; "graphs" replays it as CUDA graphs; others are torch.compile's. What "auto" means is known
            by now (autotune.py).
        images: of a whole batch, the only number that is compiled for.
        accumulation: gradient accumulation steps.

    Raises:
        UserError: as `refuse_graphs`.
    """
    if mode == "none":
        return network
    refuse_graphs(mode, accumulation)
    return ReplayedNetwork(network, images) if mode == "graphs" else WholeBatchesCompiled(network, mode, images)


def refuse_graphs(mode: "Compile", accumulation: int) -> None:
    """Stop a run that CUDA graphs cannot train.

    Raises:
        UserError: gradients are accumulated, and each graph would overwrite the gradients of the one before.
    """
    if mode in CUDA_GRAPHS and accumulation > 1:
        raise UserError(
            f"train.compile {mode} uses CUDA graphs, which cannot accumulate gradients over {accumulation} passes: "
            "choose optim.grad_accum_steps 1, train.compile default or none"
        )


def refuse_graphs_elsewhere(mode: "Compile", exits: int, device: torch.device) -> None:
    """Stop a run that asks for graphs of what cannot be captured.

    Args:
        exits: how many answers the network gives to an image.

    Raises:
        UserError: the network has several answers to an image, or there is no GPU.
    """
    if mode == "graphs" and device.type != "cuda":
        raise UserError(
            f"train.compile graphs: CUDA graphs need a GPU, and this run is on '{device.type}'; choose auto"
        )
    if mode == "graphs" and exits > 1:
        raise UserError("train.compile graphs: a network with several exits cannot be captured; choose auto")


def in_words(mode: "Compile") -> str:
    """How passes are started, to stand behind who computes them; empty for those that are started as they are."""
    return {"none": "", "graphs": "in CUDA graphs"}.get(mode, f"compiled ({mode})")


class WholeBatchesCompiled(nn.Module):
    """Shape: that of the network."""

    def __init__(self, network: nn.Module, mode: "Compile", images: int):
        super().__init__()
        self.network, self._images = network, images
        # In a tuple it is no submodule: DDP would find each parameter twice.
        self._compiled: tuple[Any, ...] = (torch.compile(network, mode=mode, dynamic=False),)
        self._in_graphs = mode in CUDA_GRAPHS

    def forward(self, x: Tensor) -> Any:
        if len(x) != self._images:
            return self.network(x)
        if self._in_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what an earlier step gave may be overwritten
        return self._compiled[0](x)
