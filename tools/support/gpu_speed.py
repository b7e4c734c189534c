"""How fast training steps are on a GPU: `python -m tools.gpu`'s measurement."""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compilation import BY_TORCH, compile_network
from pipeline.cuda_graphs import ReplayedNetwork
from pipeline.distributed import is_usable
from pipeline.errors import UserError, first_line, is_out_of_memory
from pipeline.models import create_model, triton_block
from pipeline.models.densenet import DenseNet
from pipeline.precision import autocast, create_scaler, set_tf32

if TYPE_CHECKING:
    from pipeline.config import Compile

OURS = "eager", "memory_efficient", "fused", "triton"
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
COMPILATION = 150.0  # seconds that a compiled case must have left, as nothing ends a compilation; an estimate


class Case(NamedTuple):
    """What is measured: a network's training step."""

    implementation: str
    model: str
    precision: str
    memory_format: str
    batch_size: int
    size: int
    compile: "Compile" = "none"


def cases(device: torch.device) -> Iterator[Case]:
    """The most wanted first: time may not be enough for all."""
    if device.type == "cpu":
        yield Case("eager", "densenet_bc10_k3", "fp32", CONTIGUOUS, 2, 16)
        yield Case("fused", "densenet_bc10_k3", "fp32", CHANNELS_LAST, 2, 16)
        yield Case("fused", "densenet_bc10_k3", "fp32", CHANNELS_LAST, 8, 16)
        return
    kinds = [
        ("bf16", CHANNELS_LAST),
        ("fp32", CONTIGUOUS),
        ("fp16", CHANNELS_LAST),
        ("tf32", CHANNELS_LAST),
        ("fp32", CHANNELS_LAST),
    ]

    def of_kind(
        precision: str, layout: str, implementations: tuple[str, ...], mode: "Compile" = "none"
    ) -> Iterator[Case]:
        for batch_size in (256, 32):
            for implementation in implementations:
                yield Case(implementation, "densenet121", precision, layout, batch_size, 224, mode)

    yield from of_kind(*kinds[0], ("eager", "triton"), "graphs")
    yield from of_kind(*kinds[0], ("eager", "triton", "torchvision", "timm", "memory_efficient"))
    for batch_size in (256, 32):  # what a user of torchvision would do
        yield Case("torchvision", "densenet121", *kinds[0], batch_size, 224, "reduce-overhead")
    for kind in kinds[1:]:
        yield from of_kind(*kind, ("eager", "triton"), "graphs")
    for model in ("densenet169", "densenet201", "densenet161", "densenet264"):
        for batch_size in (32, 128):
            for implementation in ("eager", "triton"):
                yield Case(implementation, model, *kinds[0], batch_size, 224, "graphs")
    for kind in kinds[1:]:
        yield from of_kind(*kind, ("eager", "triton", "torchvision", "timm", "memory_efficient"))
    for kind in kinds[1:3]:
        for batch_size in (256, 32):
            yield Case("torchvision", "densenet121", *kind, batch_size, 224, "reduce-overhead")


def measure_speed(
    device: torch.device,
    deadline: float,
    after_each: Callable[[list[dict[str, Any]], dict[str, str]], None] = lambda rows, left_out: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each case that could be measured by `deadline` (of `time.monotonic`), and why others were not.

    Args:
        after_each: is called after each row with what there is.
    """
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    lost = ""
    for case in cases(device):
        needed = COMPILATION if case.compile in BY_TORCH else 0.0
        if lost or time.monotonic() + needed > deadline:
            left_out[str(tuple(case))] = lost or "no time was left"
            continue
        try:
            rows.append(measure(case, device, deadline))
            after_each(rows, left_out)
        except Exception as error:
            reason = "out of memory" if is_out_of_memory(error) else first_line(error)
            left_out[str(tuple(case))] = reason
            if not is_out_of_memory(error) and not is_usable(device):
                lost = f"the GPU could not be used any more after {tuple(case)}"
        if device.type == "cuda" and not lost:
            gc.collect()  # or what a case has held would be memory that the next one lacks
            torch.cuda.empty_cache()
    set_tf32("fp32")
    return rows, left_out


def measure(case: Case, device: torch.device, deadline: float) -> dict[str, Any]:
    """Time a case's training steps: a few that warm up, then some for a second and a half, or two on CPU."""
    step = training_step(case, device)
    for _ in range(5 if device.type == "cuda" else 1):
        step()
    if device.type == "cuda":  # not before: while cuDNN tries its kernels, it takes more memory than they need
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    launches = count_launches(step) if device.type == "cuda" else None
    seconds: list[float] = []
    until = min(deadline, time.monotonic() + 1.5)
    while len(seconds) < 2 or (device.type == "cuda" and time.monotonic() < until):
        wait(device)
        start = time.perf_counter()
        for _ in range(5 if device.type == "cuda" else 1):
            step()
        wait(device)
        seconds.append((time.perf_counter() - start) / (5 if device.type == "cuda" else 1))
    median = statistics.median(seconds)
    return {
        **case._asdict(),
        "images_per_s": case.batch_size / median,
        "seconds": median,
        "launches": launches,
        # Taken from the GPU: what a CUDA graph has for its replays does not count as allocated.
        "peak_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
    }


def training_step(case: Case, device: torch.device) -> Callable[[], None]:
    """Forward pass, cross entropy, backward pass and SGD."""
    set_tf32(case.precision)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.manual_seed(1)
    layout = getattr(torch, {CONTIGUOUS: "contiguous_format"}.get(case.memory_format, case.memory_format))
    bare = create(case, device).to(device).to(memory_format=layout).train()
    network = compile_network(bare, case.compile, case.batch_size, 1)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=device.type == "cuda"
    )
    scaler = create_scaler(case.precision, device)
    images = torch.randn(case.batch_size, 3, case.size, case.size).to(device).contiguous(memory_format=layout)
    labels = torch.zeros(case.batch_size, dtype=torch.long, device=device)
    if isinstance(network, ReplayedNetwork):
        with autocast(case.precision, device):
            network.capture(images)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(case.precision, device):
            loss: Tensor = F.cross_entropy(network(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if isinstance(bare, DenseNet) and bare.selection and bare.selection.method != case.implementation:
            raise UserError(f"{case.implementation} is not computed as asked: {bare.selection}")

    return step


def create(case: Case, device: torch.device) -> nn.Module:
    if case.implementation in OURS:
        if case.implementation == "triton" and (refusal := triton_block.refusal(device)):
            raise UserError(refusal)
        return create_model(case.model, dense_block=case.implementation)
    if importlib.util.find_spec(case.implementation) is None:
        raise UserError(f"{case.implementation} is not installed")
    if case.implementation == "timm":
        import timm

        return timm.create_model(case.model)
    import torchvision

    return getattr(torchvision.models, case.model)()


def count_launches(step: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that a step starts on the GPU, as torch's profiler sees them.

    None if it sees none: where counters of the GPU are not for every user, or another profiler has them.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or []) or None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
