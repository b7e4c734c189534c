"""The networks that the checks compute with, and how far apart two results are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.densenet import DenseNet
from pipeline.precision import autocast
from tools.support.gpu_checks.check import Setting, require

FLOAT64 = 1e-10  # relative, of each tensor; see `worst`
FLOAT32 = 3e-2  # relative, of all gradients as one: DenseNet-121 multiplies float32's rounding to 0.006 to 0.02, TF32's to 0.4
WRONG = 0.9  # what has nothing to do with the right result is farther away; what is all zeros is 1 away
TIMES_EAGER = 2.0  # how many times as far from float64 as the modules an implementation may be
# Layers of the network that is compiled, where each takes seconds; and of what is computed in fewer bits than float32's, whose
# rounding DenseNet-121 multiplies until its gradients are as far from float64's as chance is.
SHALLOW: tuple[int, ...] = 2, 1, 1, 1


def sizes(setting: Setting) -> dict[str, Any]:
    """DenseNet-121's on a GPU, a tiny network's on CPU."""
    blocks = (6, 12, 24, 16) if setting.on_gpu else (2, 1, 1, 1)
    rate = 32 if setting.on_gpu else 4
    return dict(growth_rate=rate, blocks=blocks, stem_channels=2 * rate)


def own_network(setting: Setting, dense_block: str, blocks: tuple[int, ...] | None = None, **options: Any) -> DenseNet:
    """The same weights at each call: norms far from what they are drawn as."""
    spec = sizes(setting)
    torch.manual_seed(1)
    network = DenseNet(
        spec["growth_rate"], blocks or spec["blocks"], "imagenet", spec["stem_channels"], num_classes=10,
        dense_block=dense_block, **options,
    )  # fmt: skip
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network.to(setting.device)


def some_images(setting: Setting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images, side = (8, 224) if setting.on_gpu else (4, 64)
    x = torch.randn(images, 3, side, side, generator=generator)
    return x.to(setting.device), torch.randint(10, (images,), generator=generator).to(setting.device)


def step(network: nn.Module, data: tuple[Tensor, Tensor], precision: str = "fp32") -> dict[str, list[Tensor]]:
    """Logits, gradients and running statistics of a forward and backward pass in training."""
    images, labels = data
    network.train().zero_grad()
    with autocast(precision, images.device):
        logits = network(images)
    F.cross_entropy(logits.double(), labels).backward()
    return {
        "logits": [logits.detach()],
        "gradients": [p.grad.clone() for p in network.parameters() if p.grad is not None],
        "statistics": [buffer.clone() for buffer in network.buffers() if buffer.is_floating_point()],
    }


def layouts_of(precision: str) -> tuple[torch.memory_format, ...]:
    """The memory formats that a run may have in a precision."""
    return (torch.contiguous_format, torch.channels_last) if precision == "fp32" else (torch.channels_last,)


def blocks_for(precision: str) -> tuple[int, ...] | None:
    """The layers of a network whose gradients in a precision say something of who has computed them."""
    return None if precision == "fp32" else SHALLOW


def exact_step(
    setting: Setting, data: tuple[Tensor, Tensor], blocks: tuple[int, ...] | None
) -> dict[str, list[Tensor]]:
    """What the modules give in float64."""
    network = own_network(setting, "eager", blocks).double()
    batch = data[0].double(), data[1]
    return step(network, batch) | {"answers": [answers(network, batch[0], "fp32")]}


def answers(network: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Logits in evaluation."""
    network.eval()
    with torch.no_grad(), autocast(precision, images.device):
        return network(images)


def laid_out(
    network: DenseNet, data: tuple[Tensor, Tensor], layout: torch.memory_format
) -> tuple[DenseNet, tuple[Tensor, Tensor]]:
    return network.to(memory_format=layout), (data[0].contiguous(memory_format=layout), data[1])


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The greatest relative distance of two tensors; one that is next to nothing is taken for a thousandth of the largest.

    The gradient of the first norm's weight is such a one, as the next norm undoes what it does.
    """
    least = 1e-3 * max(e.double().norm().item() for e in expected)
    pairs = zip(actual, expected, strict=True)
    return max(((a.double() - e.double()).norm() / e.double().norm().clamp(min=least)).item() for a, e in pairs)


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The relative distance of all tensors as one."""
    return worst(*([torch.cat([t.double().flatten() for t in tensors])] for tensors in (actual, expected)))


def deterministic_cudnn() -> Any:
    """While it is entered, cuDNN gives the same bits each time."""
    tf32 = torch.backends.cudnn.allow_tf32
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)


def as_asked(network: DenseNet) -> None:
    selection = network.selection
    require(selection is not None and selection.method == network.dense_block, f"{network.dense_block}: {selection}")
