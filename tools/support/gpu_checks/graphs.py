"""G6: CUDA graphs and torch.compile."""

import functools
import itertools
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.compilation import compile_network
from pipeline.models import triton_block
from pipeline.precision import autocast, create_scaler
from tools.support.gpu_checks.check import Finding, Setting, Skipped, require
from tools.support.gpu_checks.networks import (
    FLOAT32,
    SHALLOW,
    answers,
    as_asked,
    deterministic_cudnn,
    distance,
    own_network,
    some_images,
    step,
)
from tools.support.gpu_checks.runs import a_run


def compiled(setting: Setting) -> Finding:
    """torch.compile's network gives the modules' gradients, leaves the last, smaller batch alone and compiles little."""
    from torch._dynamo.utils import counters

    images, labels = some_images(setting)
    small = images[:-1], labels[:-1]
    # Inductor takes minutes on CPU: there the graph is traced, and called as it is.
    traced = functools.partial(torch.compile, backend="eager")
    far = 0.0
    for mode in ("default", "reduce-overhead") if setting.on_gpu else ("default",):
        torch.compiler.reset()
        counters.clear()
        with nullcontext() if setting.on_gpu else mock.patch.object(torch, "compile", traced):
            network = compile_network(own_network(setting, "auto", SHALLOW), mode, len(images), 1)
        reference = own_network(setting, "eager", SHALLOW)
        graphs = 0
        for batch in ((images, labels), small, (images, labels)):
            actual, expected = step(network, batch), step(reference, batch)
            far = max(far, distance(actual["gradients"], expected["gradients"]))
            require(far < FLOAT32, f"{mode}: gradients differ by {far:.1e}")
            now = counters["stats"]["unique_graphs"]
            require(1 <= now <= 3 and now == (graphs or now), f"{mode}: {graphs} graphs, then {now} were compiled")
            graphs = now
    return Finding(f"gradients {far:.1e} from the modules'" + ("" if setting.on_gpu else "; traced, not compiled"))


def cuda_graphs(setting: Setting) -> Finding:
    """Steps replayed as CUDA graphs have the bits of steps that are not, on all that a run may do between them."""
    if not setting.on_gpu:
        raise Skipped("there are none on CPU")
    blocks = ["eager", *([] if triton_block.refusal(setting.device) else ["triton"])]
    cases = [*itertools.product(blocks, ("fp32", "bf16"), (False, True)), ("memory_efficient", "bf16", False)]
    for dense_block, precision, parallel in cases:
        deep = precision == "bf16" and parallel == (dense_block == "triton")  # one of each: a few layers show as much
        take = functools.partial(graph_steps, setting, dense_block, precision, parallel, None if deep else SHALLOW)
        plain, replayed = take("none"), take("graphs")
        if differing := sum(not torch.equal(*pair) for pair in zip(plain, replayed, strict=True)):
            chance = sum(not torch.equal(*pair) for pair in zip(plain, take("none"), strict=True))
            name = f"{dense_block} in {precision}{' with DDP' if parallel else ''}"
            raise AssertionError(
                f"{name}: {differing} of {len(plain)} tensors have other bits than without graphs, where {chance} have other "
                "bits in a second run"
            )
    names = ", ".join([*blocks, "memory_efficient"])
    return Finding(f"the same bits in {len(SIDES)} steps of {names} in fp32 and bf16, with DDP too")


SIDES = 160, 160, 160, 160, 128, 128, 128, 160, 128, 160
"""Of the images in steps of `graph_steps`: two sizes are captured, whose graphs share their memory and take turns."""


def graph_steps(
    setting: Setting, dense_block: str, precision: str, parallel: bool, blocks: tuple[int, ...] | None, mode: Any
) -> list[Tensor]:
    """Logits, gradients and answers of training steps, one of fewer images, and the network after them.

    Args:
        parallel: with DDP, in a world of one.
        blocks: the network's layers, if not all.
        mode: of train.compile.
    """
    if parallel:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=setting.device)
    try:
        generator, seen = torch.Generator().manual_seed(3), list[Tensor]()
        dropout = 0.2 if dense_block == "eager" else 0.0
        bare = own_network(setting, dense_block, blocks, dropout=dropout).to(memory_format=torch.channels_last)
        compiled = network = compile_network(bare, mode, 8, 1)
        if parallel:
            network = DistributedDataParallel(network, [setting.device], gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        scaler = create_scaler(precision, setting.device)
        for i, side in enumerate(SIDES):
            images = torch.randn(7 if i == 3 else 8, 3, side, side, generator=generator).to(setting.device)
            labels = torch.randint(10, (len(images),), generator=generator).to(setting.device)
            images = images.contiguous(memory_format=torch.channels_last)
            bare.train()
            with deterministic_cudnn():
                if mode == "graphs":
                    with autocast(precision, setting.device):
                        compiled.capture(images)  # type: ignore[operator]
                torch.manual_seed(i)
                with autocast(precision, setting.device):
                    logits = network(images)
                scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
                scaler.step(optimizer)
                scaler.update()
                seen += [logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
                optimizer.zero_grad()
                if mode == "none":  # a replay selects nothing
                    as_asked(bare)
                seen.append(answers(bare, images, precision))
        if mode == "graphs":
            require(len(compiled._graphs) == 2, f"{len(compiled._graphs)} sizes were captured")  # type: ignore
        return seen + [tensor.clone() for tensor in bare.state_dict().values()]
    finally:
        if parallel:
            dist.destroy_process_group()


def runs_in_graphs(setting: Setting) -> Finding:
    """`fit` in CUDA graphs ends with the bits of one without: with all that it may do between replays, and in two sizes."""
    from pipeline.hooks import Hook

    class Keep(Hook):
        changes_network = False

        def __init__(self):
            self.graphs, self.state = 0, dict[str, Tensor]()

        def on_end(self, trainer):
            run = trainer.run
            self.graphs = len(getattr(run.compiled, "_graphs", ()))
            for kind, network in run.validated.items():
                self.state |= {f"{kind} {name}": t.cpu().clone() for name, t in network.state_dict().items()}

    # Of so many images an epoch makes five whole batches, or one.
    images, graphs = (46, "graphs") if setting.on_gpu else (14, "none")
    plain: dict[str, Any] = {"data": {"synthetic_images": images}, "train": {"deterministic": setting.on_gpu}}
    everything: dict[str, Any] = {
        "model": {"dropout": 0.1},
        "data": {
            **plain["data"], "mixup_alpha": 0.2, "random_erasing": 0.5,
            "train_crop_size": [12, 16], "train_crop_milestones": [1],
        },
        "optim": {"epochs": 2, "clip_grad_norm": 1.0, "class_weights": "balanced"},
        "train": {**plain["train"], "precision": "fp16", "not_finite": "skip", "ema_decay": 0.9},
    }  # fmt: skip
    replays, replay = Counter[str](), torch.cuda.CUDAGraph.replay
    for name, sections, sizes in (("plain", plain, 1), ("everything", everything, 2)):
        without, replayed = Keep(), Keep()

        def counted(graph: Any, name: str = name) -> None:
            replays[name] += 1
            replay(graph)

        for folder, mode, keep in (("without", "none", without), ("replayed", graphs, replayed)):
            train = {**sections["train"], "compile": mode}
            with mock.patch.object(torch.cuda.CUDAGraph, "replay", counted):
                a_run(setting, f"{name}-{folder}", (keep,), **{**sections, "train": train})
        require(not setting.on_gpu or replayed.graphs == sizes, f"{name}: {replayed.graphs} sizes were captured")
        passes = 2 * sizes * (images // 8)  # each size has an epoch
        require(
            not setting.on_gpu or replays[name] == passes, f"{name}: {replays[name]} of {passes} passes were replayed"
        )
        differing = [key for key, tensor in without.state.items() if not torch.equal(tensor, replayed.state[key])]
        require(not differing, f"{name}: other bits in {', '.join(differing[:3])}")
    return Finding("the same bits" + ("" if setting.on_gpu else "; without graphs, of which there are none on CPU"))
