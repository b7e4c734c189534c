"""G1: a step beside torchvision's in float64, and in each precision."""

import torch
from torch import Tensor

from pipeline.models import triton_block
from pipeline.precision import set_tf32
from tools.support.gpu_checks.check import Finding, Setting, require
from tools.support.gpu_checks.networks import (
    FLOAT32,
    FLOAT64,
    SHALLOW,
    TIMES_EAGER,
    WRONG,
    as_asked,
    blocks_for,
    deterministic_cudnn,
    distance,
    exact_step,
    laid_out,
    layouts_of,
    own_network,
    sizes,
    some_images,
    step,
    worst,
)


def float64_as_torchvision(setting: Setting) -> Finding:
    """Logits, gradients and statistics in float64 are torchvision's, in both layouts, and gradients lie as parameters."""
    import torchvision

    spec = sizes(setting)
    reference = torchvision.models.DenseNet(
        spec["growth_rate"], spec["blocks"], spec["stem_channels"], num_classes=10
    ).to(setting.device)
    reference.load_state_dict(own_network(setting, "eager").state_dict())
    images, labels = some_images(setting)
    expected = step(reference.double(), (images.double(), labels))
    found = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        for dense_block in ("eager", "memory_efficient", *([] if setting.on_gpu else ["fused"])):
            network = own_network(setting, dense_block).double().to(memory_format=layout)
            actual = step(network, (images.double().contiguous(memory_format=layout), labels))
            as_asked(network)
            for what, tensors in expected.items():
                far = worst(actual[what], tensors)
                require(far <= FLOAT64, f"{dense_block}, {layout}: {what} differ by {far:.1e}")
                found = max(found, far)
            for name, parameter in network.named_parameters():
                require(
                    lies_alike(parameter.grad, parameter),
                    f"{dense_block}, {layout}: the gradient of {name} lies otherwise than the parameter",
                )
    return Finding(f"at most {found:.1e} apart, relative, of {FLOAT64:.0e}", found)


def lies_alike(a: Tensor | None, b: Tensor) -> bool:
    """Whether the strides are the same, but for dimensions of size 1, where they mean nothing."""
    return a is not None and all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), b.shape, strict=True))


def checkpointing(setting: Setting) -> Finding:
    """Activation checkpointing changes no bit."""
    names = own_backends(setting)
    for dense_block in names:
        with deterministic_cudnn():
            plain, again = (
                step(own_network(setting, dense_block, activation_checkpointing=blocks), some_images(setting))
                for blocks in ("none", "all")
            )
        for what, tensors in plain.items():
            same = all(map(torch.equal, tensors, again[what]))
            require(same, f"{dense_block}: {what} are others with activation checkpointing")
    return Finding(f"the same bits: {', '.join(names)}")


def own_backends(setting: Setting) -> list[str]:
    """The backends for this device that can run here."""
    fast = "triton" if setting.on_gpu else "fused"
    can = fast == "fused" or not triton_block.refusal(setting.device)
    return ["memory_efficient", *([fast] if can else [])]


def low_precision(setting: Setting) -> Finding:
    """In each precision implementations are about as near to float64 as the modules are."""
    data = some_images(setting)
    depths: set[tuple[int, ...] | None] = {None, SHALLOW}
    exacts = {blocks: exact_step(setting, data, blocks) for blocks in depths}
    figures: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "tf32", "bf16", "fp16") if setting.on_gpu else ("fp32", "bf16", "fp16"):
        set_tf32(precision)
        blocks = blocks_for(precision)
        exact = exacts[blocks]
        figures[precision] = far = {}
        for dense_block in ("eager", *own_backends(setting)):
            if precision == "fp16" and dense_block == "fused":
                continue  # which has no fp16
            far[dense_block] = 0.0
            for layout in layouts_of(precision):
                network, batch = laid_out(own_network(setting, dense_block, blocks), data, layout)
                actual = step(network, batch, precision)
                as_asked(network)
                far[dense_block] = max(far[dense_block], distance(actual["gradients"], exact["gradients"]))
        most = FLOAT32 if precision == "fp32" else WRONG
        for name, value in far.items():
            limit = min(max(TIMES_EAGER * far["eager"], 1e-5), most)
            require(value <= limit, f"{name} in {precision}: gradients are {value:.1e} off, eager's {far['eager']:.1e}")
    texts = [
        f"{precision}: " + ", ".join(f"{name} {value:.1e}" for name, value in far.items())
        for precision, far in figures.items()
    ]
    return Finding(f"gradients against float64: {'; '.join(texts)}", figures)
