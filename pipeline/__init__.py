"""DenseNet training at ImageNet scale: data, models, trainer and evaluation."""

import os
from typing import TYPE_CHECKING, Any

from pipeline.nvjpeg import load_nvjpeg

if TYPE_CHECKING:
    from pipeline.api import create_model, evaluate, fit, load_config

# GNU's OpenMP, which reads this when torch is loaded, has waiting threads spin for a long while. With another busy thread
# on the machine, such as a loader's, each parallel region then waits for the scheduler: a step takes ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

load_nvjpeg()  # before timm or torchvision, which bring an older one

__all__ = ["create_model", "evaluate", "fit", "load_config"]


def __getattr__(name: str) -> Any:
    """The functions of api.py, whose imports take seconds, when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    from pipeline import api

    return getattr(api, name)
