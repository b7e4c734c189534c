"""The precisions that training and evaluation compute in. CUDA's have not been run on a GPU yet."""

import torch

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_tf32(precision: str) -> None:
    """Let float32 convolutions use TF32 on GPUs only for "tf32": PyTorch's default is to."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a network computes in `precision`."""
    dtype = AUTOCAST_TYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def create_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which does something for fp16 alone: its gradients would vanish."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
