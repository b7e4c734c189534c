"""The precisions that training and evaluation compute in, and torch's choice of kernels."""

import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pipeline.config import MemoryFormat

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_tf32(precision: str) -> None:
    """Let float32 convolutions use TF32 on GPUs only for "tf32": PyTorch's default is to.

    Matrix products never do, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says, which NVIDIA's containers set: colours are
    mapped by one, and the classifier is a small part of a step.
    """
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False


def choose_kernels(benchmark: bool, deterministic: bool) -> None:
    """Let cuDNN time its kernels, or restrict torch to those that give the same bits each time.

    Must be called before the first matrix product on a GPU.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS
    if deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports a compiler, for seconds
        torch.use_deterministic_algorithms(deterministic)
    # Filling memory that nobody has written costs time, and nothing of ours reads it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = benchmark and not deterministic  # timing may choose another kernel each time


def memory_format(name: "MemoryFormat", precision: str, device: torch.device) -> torch.memory_format:
    """The order of feature maps that ``train.memory_format`` means for a precision on a device."""
    if name == "auto":
        name = "contiguous" if device.type == "cuda" and precision == "fp32" else "channels_last"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def seed_device(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of this device; `torch.manual_seed` asks for all devices there are."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a network computes in `precision`."""
    dtype = AUTOCAST_TYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class Scaler(torch.amp.GradScaler):
    """Begins anew where the run that it resumes had no loss scaling."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            super().load_state_dict(state_dict)


def create_scaler(precision: str, device: torch.device) -> Scaler:
    """Loss scaling, which does something for fp16 alone: its gradients would vanish."""
    return Scaler(device.type, enabled=precision == "fp16")
