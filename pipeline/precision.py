"""The precisions that training and evaluation compute in. CUDA's have not been run on a GPU yet."""

from typing import Any

import torch

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_tf32(precision: str) -> None:
    """Let float32 convolutions use TF32 on GPUs only for "tf32": PyTorch's default is to."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


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
