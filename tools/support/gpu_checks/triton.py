"""G8: the Triton kernels."""

import os
import shutil
import subprocess
import sys
import time
from typing import Any

import torch

from pipeline.models import triton_block
from pipeline.models.densenet import DenseNet
from pipeline.precision import set_tf32
from tools.support.gpu_checks.check import Finding, Setting, Skipped, require
from tools.support.gpu_checks.networks import (
    SHALLOW,
    TIMES_EAGER,
    WRONG,
    answers,
    as_asked,
    blocks_for,
    deterministic_cudnn,
    distance,
    exact_step,
    own_network,
    some_images,
    step,
)


def triton_kernels(setting: Setting) -> Finding:
    """The Triton kernels run, are as near to float64 as the modules, and give the same bits twice."""
    if not setting.on_gpu:
        from tools.support.fake_gpu import Launch, Step, run_step

        own = list[Launch]()
        run_step(Step("densenet_bc10_k3", "triton", 4, 16, "bf16"), own.append)
        require(bool(own), "a step under fake tensors launches no kernel")
        raise Skipped(f"they run on a GPU only; a step under fake tensors launches {len(own)}")
    refusal = triton_block.refusal(setting.device)
    if refusal:
        raise Skipped(refusal)
    return triton_beside_modules(setting, ("fp32", "tf32", "bf16", "fp16"))


def triton_beside_modules(setting: Setting, precisions: tuple[str, ...]) -> Finding:
    """The kernels' logits, gradients, statistics and answers in evaluation are as near to float64 as the modules'."""
    data = some_images(setting)
    data = data[0].contiguous(memory_format=torch.channels_last), data[1]
    depths: set[tuple[int, ...] | None] = {None, SHALLOW}
    exacts = {blocks: exact_step(setting, data, blocks) for blocks in depths}
    figures: dict[str, Any] = {}
    for precision in precisions:
        set_tf32(precision)
        blocks = blocks_for(precision)

        def network(dense_block: str, blocks: tuple[int, ...] | None = blocks) -> DenseNet:
            return own_network(setting, dense_block, blocks).to(memory_format=torch.channels_last)

        with deterministic_cudnn():
            found = []
            for dense_block in ("triton", "triton", "eager"):
                own = network(dense_block)
                found.append(step(own, data, precision))
                as_asked(own)
                found[-1]["answers"] = [answers(own, data[0], precision)]
                as_asked(own)
        first, again, eager = found
        same = all(all(map(torch.equal, first[what], again[what])) for what in first)
        require(same, f"{precision}: two steps have other bits")
        for what, tensors in exacts[blocks].items():
            own_far, eager_far = distance(first[what], tensors), distance(eager[what], tensors)
            limit = min(max(TIMES_EAGER * eager_far, 1e-5), WRONG)
            require(own_far <= limit, f"{precision}: {what} are {own_far:.1e} off, eager's {eager_far:.1e}")
            figures[f"{precision} {what}"] = {"triton": own_far, "eager": eager_far}
    return Finding(
        ", ".join(f"{what} {far['triton']:.1e} (eager {far['eager']:.1e})" for what, far in figures.items()), figures
    )


def sanitizer(setting: Setting) -> Finding:
    """compute-sanitizer finds no fault in the Triton kernels' memory accesses."""
    if not setting.on_gpu:
        raise Skipped("it is for a GPU's kernels")
    if shutil.which("compute-sanitizer") is None:
        raise Skipped("compute-sanitizer is not installed")
    if refusal := triton_block.refusal(setting.device):
        raise Skipped(refusal)
    script = (
        "import torch; from pipeline.models import create_model; "
        "m = create_model('densenet_bc10_k8', 3, dense_block='triton').cuda(); "
        "m(torch.randn(3, 3, 19, 17).cuda()).sum().backward(); torch.cuda.synchronize(); print(m.selection)"
    )
    # Calls of the API that fail, as torch's and cuDNN's questions to the driver may, are no faults of kernels.
    command = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, "-c", script]
    # Each tensor by itself: within one of torch's blocks of memory an access beyond a tensor's end is none beyond the block's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left = max(1.0, setting.deadline - time.monotonic())
    try:
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        raise Skipped(f"it took more than {left:.0f} s: give more --minutes") from None
    require(outcome.returncode == 0, (outcome.stdout + outcome.stderr)[-300:])
    require("triton" in outcome.stdout, "the modules were called")
    return Finding("no fault")
