"""G0: what is installed, and that precision means what it says."""

import importlib
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

from pipeline.precision import set_tf32
from tools.support.gpu_checks.check import Finding, Setting, require
from tools.support.gpu_checks.networks import worst

LOWEST_TORCH = 2, 11


def versions(setting: Setting) -> Finding:
    """What is installed; torch is not too old, and the device is there."""
    names = "torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "nvidia-nvjpeg", "pydantic", "submitit"
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    require(release >= LOWEST_TORCH, f"torch {torch.__version__} is older than {'.'.join(map(str, LOWEST_TORCH))}")
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
        found |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory, "driver": driver[0] if driver else None,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return Finding(", ".join(f"{name} {version or 'missing'}" for name, version in found.items()), found)


def tf32_flags(setting: Setting) -> Finding:
    """Matrix products in fp32 are none of TF32's, whatever the variable of NVIDIA's containers says."""
    errors = {}
    for value in ("0", "1"):
        if setting.on_gpu:  # torch reads the variable once
            errors[value] = product_error_apart("cuda", value)
        else:
            torch.backends.cuda.matmul.allow_tf32 = value == "1"  # what the variable does
            errors[value] = product_error("cpu")
            require(not torch.backends.cuda.matmul.allow_tf32, "set_tf32 leaves TF32 on for matrix products")
    require(max(errors.values()) < 1e-5, f"a product in fp32 is off by {max(errors.values()):.1e}: TF32 is on")
    return Finding(f"a product in fp32 is off by {max(errors.values()):.1e} with the variable 0 and 1", errors)


def product_error_apart(device: str, variable: str) -> float:
    """`product_error` of a process that begins with NVIDIA's variable."""
    script = f"from {__name__} import product_error; print(product_error({device!r}))"
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": variable}
    command = [sys.executable, "-c", script]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(outcome.stdout.split()[-1])


def product_error(device: str) -> float:
    """How far a matrix product in fp32 is from float64's, relative, after `set_tf32`."""
    set_tf32("fp32")
    a = torch.randn(256, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    return worst([a.float() @ a.float()], [a.float().double() @ a.float().double()])


def nvjpeg(setting: Setting) -> Finding:
    """DALI gets the nvJPEG of requirements.txt, though torchvision brings another."""
    from pipeline.nvjpeg import installed_nvjpeg, load_nvjpeg, nvjpeg_of_process

    load_nvjpeg()
    import torchvision  # noqa: F401 - after it

    found, installed = nvjpeg_of_process(), installed_nvjpeg()
    require(found is not None, "none loads")
    path, version = found or ("", "")
    require(installed in (None, path), f"nvJPEG {version} ({path}) would decode, not {installed}")
    return Finding(f"nvJPEG {version} ({path})")
