"""torch.compile of a training network: whole batches are compiled, the last and smaller one of an epoch is not.

CUDA graphs (reduce-overhead, max-autotune) have not been run on a GPU yet; the tests compile on CPU.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Compile

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def compile_network(network: nn.Module, mode: "Compile", images: int, accumulation: int) -> nn.Module:
    """Return the network, compiled unless `mode` is "none"; parameters and buffers are shared.

    Args:
        mode: torch.compile's.
        images: of a whole batch, the only number that is compiled for.
        accumulation: gradient accumulation steps.

    Raises:
        UserError: gradients are accumulated in CUDA graphs, each of which would overwrite the gradients of the one before.
    """
    if mode == "none":
        return network
    refuse_graphs(mode, accumulation)
    return WholeBatchesCompiled(network, mode, images)


def refuse_graphs(mode: "Compile", accumulation: int) -> None:
    """Stop a run whose gradients cannot be accumulated as it is compiled.

    Raises:
        UserError: as `compile_network`.
    """
    if mode in CUDA_GRAPHS and accumulation > 1:
        raise UserError(
            f"train.compile {mode} uses CUDA graphs, which cannot accumulate gradients over {accumulation} passes: "
            "choose optim.grad_accum_steps 1 or train.compile default"
        )


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
