"""G3: whole runs: cut and resumed, in each precision, out of range and out of memory."""

import io
import os
import signal
from contextlib import redirect_stderr
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.command import exit_on_user_error
from pipeline.errors import is_out_of_memory
from pipeline.precision import autocast, create_scaler
from tools.support.gpu_checks.check import Finding, Setting, require
from tools.support.gpu_checks.networks import own_network, some_images


def a_run(setting: Setting, name: str, hooks: tuple[Any, ...] = (), **sections: dict[str, Any]) -> Any:
    """Train a tiny network on generated images; return its progress."""
    from pipeline.config_file import from_dict
    from pipeline.trainer import fit

    tree: dict[str, Any] = {
        "run_dir": str(setting.folder / name),
        "model": {"name": "densenet_bc10_k3", "dense_block": "eager"},  # named, so that nothing is measured first
        "data": {
            "loader": "synthetic", "crop_size": 16, "resize_size": 16, "synthetic_images": 30, "synthetic_classes": 3
        },
        "optim": {"epochs": 1, "batch_size": 8, "milestones": []},
        "train": {
            "log_every": 2,
            "device": setting.device.type,
            "pictures_every": 0,
            "memory_format": "channels_last",
            "compile": "none",
        },
    }  # fmt: skip
    for section, fields in sections.items():
        tree[section] = {**tree[section], **fields}
    return fit(from_dict(tree, name), hooks)


def resumed(setting: Setting, name: str = "synthetic", **sections: dict[str, Any]) -> Finding:
    """SIGTERM ends a run so that its command ends with 75; resumed, it has the bits of a run that was not cut."""
    from pipeline.errors import InterruptedRunError
    from pipeline.hooks import Hook

    class Keep(Hook):
        changes_network = False

        def __init__(self, cut: bool = False):
            self.cut, self.state = cut, dict[str, Tensor]()

        def on_step(self, trainer, result):
            if self.cut and trainer.run.done_steps == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_end(self, trainer):
            self.state = {name: t.cpu().clone() for name, t in trainer.run.network.state_dict().items()}

    whole, cut, rest = Keep(), Keep(cut=True), Keep()
    options = {"train": {"deterministic": setting.on_gpu}, **sections}
    a_run(setting, f"{name}-whole", (whole,), **options)
    code = None
    with redirect_stderr(io.StringIO()):
        try:
            a_run(setting, f"{name}-cut", (cut,), **options)
        except InterruptedRunError as error:
            code = ended_with(error)
    require(code == 75, f"SIGTERM ends a run with {code}")
    a_run(setting, f"{name}-cut", (rest,), **options)
    differing = [name for name, tensor in whole.state.items() if not torch.equal(tensor, rest.state[name])]
    require(not differing, f"a resumed run has other bits in {', '.join(differing[:3])}")
    require(any(not torch.equal(t, cut.state[name]) for name, t in whole.state.items()), "the run was not cut")
    return Finding("exit code 75; resumed with the same bits")


def ended_with(error: Exception) -> Any:
    """The exit code of a command whose work raises this."""

    def work() -> None:
        raise error

    try:
        exit_on_user_error(work)
    except SystemExit as end:
        return end.code
    return None


def precisions(setting: Setting) -> Finding:
    """`fit` trains in each precision, with gradient accumulation, to finite weights."""
    from pipeline.hooks import Hook

    class Finite(Hook):
        def on_epoch(self, trainer, result):
            tensors = trainer.run.network.state_dict().values()
            require(all(bool(tensor.isfinite().all()) for tensor in tensors), "a weight is not finite")

    names = ("fp32", "tf32", "bf16", "fp16") if setting.on_gpu else ("fp32", "bf16", "fp16")
    for precision in names:
        options: dict[str, dict[str, Any]] = {"train": {"precision": precision}, "optim": {"grad_accum_steps": 2}}
        progress = a_run(setting, precision, (Finite(),), **options)
        require(progress.epoch == 1, f"{precision}: the run did not end")
    return Finding(", ".join(names))


def overflow(setting: Setting) -> Finding:
    """A step of fp16 whose scaled loss overflows is left out, and the next one with a lower scale is taken."""
    scaler = create_scaler("fp16", setting.device)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60, "backoff_factor": 2.0**-50})
    network = own_network(setting, "eager")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images, labels = some_images(setting)
    moved = []
    for _ in range(2):
        before = network.classifier.weight.detach().clone()
        optimizer.zero_grad()
        with autocast("fp16", setting.device):
            loss = F.cross_entropy(network(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, network.classifier.weight))
    require(moved == [False, True], f"the two steps moved the weights: {moved}")
    return Finding(f"left out once; the scale fell to {scaler.get_scale():.0f}")


def out_of_memory(setting: Setting) -> Finding:
    """Too little memory is one line with what to lower, and exit code 2."""
    try:
        torch.empty(2**50, device=setting.device)
    except Exception as error:
        require(is_out_of_memory(error), f"it is not taken for lack of memory: {error}")
        said = io.StringIO()
        with redirect_stderr(said):
            code = ended_with(error)
        lines = said.getvalue().splitlines()
        require(code == 2 and len(lines) == 1 and "lower the batch size" in lines[0], f"code {code}: {lines}")
        return Finding(f"exit code 2; {lines[0][:60]}...")
    raise AssertionError("a petabyte could be had")
