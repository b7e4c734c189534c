"""Training passes over whole batches as CUDA graphs: the host starts one graph in place of some thousand kernels.

A forward pass is captured as it is computed, by modules or by a backend of the dense block, and so is its backward pass;
both are then replayed with the same kernels in the same order, and so to the same bits. Loss, reduction over the ranks and
optimiser stay outside.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from pipeline.errors import LocalUserError, first_line, is_out_of_memory

# Passes that are computed before one is captured. Kernels are compiled, chosen and loaded in them, which they cannot be in a
# capture.
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
    images, and of a size that was not captured. What Python does in the network's forward pass is not done again in a replay:
    nothing may change the network's modules, nor where its parameters lie.

    What else a pass depends on, that are grad mode, autocast, and whether gradients of the images are wanted, is looked at.

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
        self._images, self._graphs = images, dict[Any, _Graphs]()
        self._selections = dict[Any, Any]()  # what computes the blocks in a replay, if the network says it
        self._trained = list[nn.Parameter]()  # to walk the modules for them takes as long as to start a graph
        self._pool: Any = None

    def forward(self, x: Tensor) -> Any:
        trains = self.network.training and torch.is_grad_enabled() and not x.requires_grad
        kind = _kind(x)
        graphs = self._graphs.get(kind) if self.enabled and trains else None
        if graphs is None:
            return self.network(x)
        if kind in self._selections:
            self.network.selection = self._selections[kind]
        return _Replay.apply(graphs, x, *self._trained)

    def capture(self, x: Tensor) -> None:
        """Capture training passes over batches like this one, whose numbers do not matter, if they are whole ones.

        The network is left as it is. Meanwhile no other thread may use the GPU: DALI's ended a capture on an H200.

        Raises:
            LocalUserError: the passes cannot be captured.
        """
        if not self.enabled or len(x) != self._images or _kind(x) in self._graphs:
            return
        images = x.detach().clone()
        # In the parameters' place, of which DDP keeps what belongs to another stream than that of the capture.
        parameters = {name: p.detach().requires_grad_() for name, p in _trained(self.network).items()}
        self._trained = list(_trained(self.network).values())
        try:
            self._compute(images, parameters)
            self._graphs[_kind(x)] = self._captured(images, parameters)
            if hasattr(self.network, "selection"):
                self._selections[_kind(x)] = self.network.selection
        except Exception as error:
            raise _refusal(error) from None

    def _compute(self, images: Tensor, parameters: dict[str, Tensor]) -> None:
        """Some passes, of which nothing stays."""
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        try:
            with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
                for _ in range(BEFORE_CAPTURE):
                    logits = functional_call(self.network, parameters, (images,))
                    torch.autograd.grad(logits, [*parameters.values()], torch.zeros_like(logits))
        finally:
            for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _captured(self, images: Tensor, parameters: dict[str, Tensor]) -> _Graphs:
        """A pass forward and backward over images like these; nothing is computed."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # for all sizes: no two of them are in use at once
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, as NCCL's, may go on meanwhile. Weights that autocast has cast before would not be cast again in a
        # replay.
        how: dict[str, Any] = dict(pool=self._pool, capture_error_mode="thread_local")
        device, stream = images.device.type, torch.cuda.current_stream(images.device)
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        torch.clear_autocast_cache()
        with torch.cuda.stream(stream):  # to which torch does not return from a failed capture
            with torch.cuda.graph(forward, **how), torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
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


def _refusal(error: Exception) -> Exception:
    """What to raise for a capture that has failed: the lack of memory itself, or a line with the reason and what to do.

    The process cannot go on without graphs: torch takes the capture for unfinished, and would keep memory for it.
    """
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:  # the end of a failed capture fails, too
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, Exception) and is_out_of_memory(cause):
            return cause
    reason = first_line(causes[-1])
    return LocalUserError(
        f"a training step could not be captured as a CUDA graph ({reason}): start the same command again with "
        "--train.compile none"
    )


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What passes over two batches must have in common."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    steps = tuple(step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1)  # else it means nothing
    return tuple(x.shape), x.dtype, steps, autocast


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
