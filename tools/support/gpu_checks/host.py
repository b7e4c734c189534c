"""G4: what a step asks of the host."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import triton_block
from pipeline.precision import autocast
from tools.support.gpu_checks.check import Finding, Setting, Skipped, require
from tools.support.gpu_checks.numerics import own_backends
from tools.support.gpu_checks.runs import a_run

WAITS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal", "aten.masked_select")


class Waits(TorchDispatchMode):
    """Counts operators that wait for the device."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += str(func.overloadpacket) in WAITS
        return func(*args, **(kwargs or {}))


def host_waits(setting: Setting) -> Finding:
    """No step of a run that is not logged waits for the device; on a GPU torch itself stops at one."""
    from pipeline.hooks import Hook

    class Watch(Hook):
        changes_network = False

        def __init__(self):
            self.steps = 0

        def on_step_start(self, trainer):
            run = trainer.run
            nth, last = run.done_steps + 1, run.progress.step + 1 == run.train_loader.steps_per_epoch
            self.watched = not last and nth % run.config.train.log_every != 0
            self.waits = Waits()
            if self.watched and setting.on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            elif self.watched:
                self.waits.__enter__()

        def on_step(self, trainer, result):
            if self.watched and setting.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            elif self.watched:
                self.waits.__exit__(None, None, None)
                require(not self.waits.found, f"a step waits for the device {self.waits.found} times")
            self.steps += self.watched

    names = ["eager", *own_backends(setting)]
    for name in names:
        watch = Watch()
        try:
            a_run(setting, f"waits-{name}", (watch,), model={"dense_block": name})
        finally:
            if setting.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        require(watch.steps > 0, "no step was watched")
    return Finding(f"none in {watch.steps} steps of {', '.join(names)}")


class Operators(TorchDispatchMode):
    """Counts torch's operators that make kernels."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outcome = func(*args, **(kwargs or {}))
        self.found += func.namespace == "aten" and not func.is_view and "empty" not in func.name()
        return outcome


def launches(setting: Setting) -> Finding:
    """A step launches at most twice as many kernels as it has operators under fake tensors."""
    from tools.support.fake_gpu import Launch, Step, run_step

    model, images, side = ("densenet121", 32, 224) if setting.on_gpu else ("densenet_bc10_k3", 4, 16)
    counted = {}
    for dense_block in ("eager", "triton"):
        operators, own = Operators(), list[Launch]()
        run_step(Step(model, dense_block, images, side, "bf16"), own.append, operators)
        counted[dense_block] = operators.found + len(own)
    text = ", ".join(f"{name} {count}" for name, count in counted.items())
    if not setting.on_gpu:
        raise Skipped(f"only a GPU launches kernels; operators of a step under fake tensors: {text}")
    from pipeline.models import create_model
    from tools.support.gpu_speed import count_launches

    measured = {}
    x = torch.randn(images, 3, side, side, device=setting.device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(images, dtype=torch.long, device=setting.device)
    for dense_block, count in counted.items():
        if dense_block == "triton" and triton_block.refusal(setting.device):
            continue
        network = create_model(model, dense_block=dense_block).to(setting.device).to(memory_format=torch.channels_last)
        take = functools.partial(bare_step, network, x, labels)
        take()
        launched = count_launches(take)
        if launched is None:
            raise Skipped(f"torch's profiler sees no kernels here; operators of a step under fake tensors: {text}")
        measured[dense_block] = launched
        require(count / 2 <= launched <= 2 * count, f"{dense_block}: {launched} launches, counted {count}")
    return Finding(f"measured {measured}; operators under fake tensors: {text}", measured)


def bare_step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What `run_step` counts: a forward and a backward pass in bf16."""
    network.zero_grad()
    with autocast("bf16", images.device):
        logits = network(images)
    F.cross_entropy(logits.float(), labels).backward()
