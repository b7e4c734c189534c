"""Training passes over whole batches as CUDA graphs: the host starts one graph in place of some thousand kernels.

A forward pass is captured as it is computed, by modules or by a backend of the dense block, and so is its backward pass;
both are then replayed with the same kernels in the same order, and so to the same bits. Loss, reduction over the ranks and
optimiser stay outside.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call

# Whole batches of a size that are computed before one is captured. Kernels are compiled, chosen and loaded in them, which
# they cannot be in a capture.
BEFORE_CAPTURE = 2


@dataclass(frozen=True)
class _Graphs:
    """A captured pass forward and one backward, and the tensors that they read and write."""

    forward: Any
    backward: Any
    images: Tensor
    logits: Tensor
    logits_gradient: Tensor
    gradients: list[Tensor]


class ReplayedNetwork(nn.Module):
    """A network whose training passes over whole batches are replayed as CUDA graphs. Shape: that of the network.

    Parameters and buffers are the network's. All else calls the network itself: evaluation, batches of another number of
    images, and the first whole batches of each image size. What Python does in the network's forward pass is not done again
    in a replay: nothing may change the network's modules, nor where its parameters lie.

    The gradients of a replay lie where those of the one before lay: they must be used before the next backward pass, and
    cannot be accumulated.

    Attributes:
        enabled: else nothing is replayed.
    """

    def __init__(self, network: nn.Module, images: int):
        """
        Args:
            images: of a whole batch.
        """
        super().__init__()
        self.network, self.enabled = network, True
        self._images = images
        self._seen, self._graphs = Counter[Any](), dict[Any, _Graphs]()
        self._pool: Any = None

    def forward(self, x: Tensor) -> Any:
        if not (self.enabled and self.network.training and torch.is_grad_enabled()) or len(x) != self._images:
            return self.network(x)
        kind = tuple(x.shape), x.dtype, x.stride()
        if kind not in self._graphs:
            if self._seen[kind] < BEFORE_CAPTURE:
                self._seen[kind] += 1
                return self.network(x)
            self._graphs[kind] = self._capture(x)
        return _Replay.apply(self._graphs[kind], x, *_trained(self.network).values())

    def _capture(self, x: Tensor) -> _Graphs:
        """Capture a pass forward and backward over images like these; nothing is computed."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # for all sizes: no two of them are in use at once
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        images = x.detach().clone()
        # In the parameters' place, of which DDP keeps what belongs to another stream than that of the capture.
        parameters = {name: p.detach().requires_grad_() for name, p in _trained(self.network).items()}
        # Other threads, which load images, may allocate memory meanwhile. Weights that autocast has cast before would not be
        # cast again in a replay.
        how: dict[str, Any] = dict(pool=self._pool, capture_error_mode="thread_local")
        device, kind = x.device.type, torch.get_autocast_dtype(x.device.type)
        enabled = torch.is_autocast_enabled(device)
        torch.clear_autocast_cache()
        with torch.cuda.graph(forward, **how), torch.autocast(device, kind, enabled=enabled, cache_enabled=False):
            logits = functional_call(self.network, parameters, (images,))
        gradient = torch.empty_like(logits)
        with torch.cuda.graph(backward, **how):
            gradients = torch.autograd.grad(logits, [*parameters.values()], gradient)
        return _Graphs(forward, backward, images, logits.detach(), gradient, list(gradients))


class _Replay(Function):
    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.graphs = graphs
        graphs.images.copy_(x)
        graphs.forward.replay()
        return graphs.logits.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        graphs = ctx.graphs
        graphs.logits_gradient.copy_(gradient)
        graphs.backward.replay()
        return None, None, *(tensor.detach() for tensor in graphs.gradients)


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
