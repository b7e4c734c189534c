"""A training step on a GPU that is not there: torch's fake tensors on device "cuda", and the launches of own kernels.

Nothing is computed. Autograd's engine wants a real device for each gradient, so `gradients` walks the graph in its place.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from pipeline.models import create_model, triton_block
from pipeline.models.backends import BACKENDS
from pipeline.models.densenet import DenseNet
from pipeline.precision import autocast, set_tf32

PRECISIONS = "fp32", "tf32", "bf16", "fp16"


class Launch(NamedTuple):
    """A launch of a kernel of triton_kernels.py, as `triton_block.launch` was asked for it."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


class Step(NamedTuple):
    """What a training step is of."""

    model: str
    dense_block: str
    batch_size: int
    size: int
    precision: str
    architecture: int = 90


@contextmanager
def launches_seen(on_launch: Callable[[Launch], None], architecture: int) -> Iterator[None]:
    """While it is entered, own kernels are launched as on a GPU of an architecture, which starts nothing."""

    def record(
        kernel: str, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any
    ) -> None:
        on_launch(Launch(kernel, grid, arguments, constants, warps, stages))

    with (
        mock.patch.object(triton_block, "launch", record),
        mock.patch.object(triton_block, "architecture", lambda device: architecture),
    ):
        yield


def run_step(step: Step, on_launch: Callable[[Launch], None], mode: Any = None) -> None:
    """Forward and backward pass of a network from its first convolution to the loss, on a fake GPU.

    Args:
        on_launch: is called at each launch of an own kernel.
        mode: a dispatch mode that sees torch's own operators.
    """

    with (
        FakeTensorMode(),
        launches_seen(on_launch, step.architecture),
        mock.patch.object(torch.autograd, "grad", gradients),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda: True),
        # Without a card torch does not know what cuDNN does: it answers in the order of the maps that it gets.
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", lambda *_: torch.channels_last),
        _tf32(step.precision),
    ):
        with torch.device("cuda"):
            network = create_model(step.model, dense_block=step.dense_block).train()
            shape = (step.batch_size, 3, step.size, step.size)
            images = torch.empty(shape, memory_format=torch.channels_last)
            labels = torch.zeros(step.batch_size, dtype=torch.long)
        assert isinstance(network, DenseNet)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # `Module.to` cannot change fake parameters
                module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=torch.channels_last))
        with mode or nullcontext():
            with autocast(step.precision, images.device):
                if step.dense_block == "eager":
                    logits = network(images)
                else:
                    logits = network.classifier(network._by_stages(images, BACKENDS[step.dense_block]))
            loss = F.cross_entropy(logits.float(), labels)
            gradients(loss, list(network.parameters()))


@contextmanager
def _tf32(precision: str) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    set_tf32(precision)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def gradients(
    outputs: Tensor, inputs: Tensor | Sequence[Tensor], grad_outputs: Tensor | None = None, **_: Any
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` without autograd's engine: first derivatives, with regard to tensors that do not depend on
    each other.

    Raises:
        KeyError: an input has no gradient.
    """
    edges = [get_gradient_edge(tensor) for tensor in ([inputs] if isinstance(inputs, Tensor) else inputs)]
    ends = {edge.node for edge in edges}
    root = get_gradient_edge(outputs)
    waiting: Counter[Any] = Counter()
    known, ahead = {root.node}, [root.node]
    while ahead:
        node = ahead.pop()
        for following, _position in () if node in ends else node.next_functions:
            if following is not None:
                waiting[following] += 1
                if following not in known:
                    known.add(following)
                    ahead.append(following)
    first = torch.ones_like(outputs) if grad_outputs is None else grad_outputs
    arrived: dict[Any, dict[int, Tensor]] = {root.node: {root.output_nr: first}}
    ready: list[Any] = [root.node]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            if node in ends or type(node).__name__ == "AccumulateGrad":
                continue
            own = arrived.pop(node, {})
            values = [own.get(position) for position in range(max(own, default=0) + 1)]
            results: Sequence[Tensor | None]
            if isinstance(node, BackwardCFunction):  # its inputs that are no tensors have no edge, and None as gradient
                results = [gradient for gradient in node.apply(*values) if gradient is not None]
            else:
                result = node(*values)
                results = result if isinstance(result, tuple) else (result,)
            for (following, position), gradient in zip(node.next_functions, results, strict=True):
                if following is None:
                    continue
                if gradient is not None:
                    shape = following._input_metadata[position].shape
                    gradient = (
                        gradient if gradient.shape == shape else gradient.sum_to_size(shape)
                    )  # as the engine does
                    slots = arrived.setdefault(following, {})
                    slots[position] = slots[position] + gradient if position in slots else gradient
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
    return tuple(arrived[edge.node][edge.output_nr] for edge in edges)
