"""The machine on which something was measured."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from pipeline.machine import available_cores, cpu_name


def describe_machine(packages: list[str]) -> dict[str, Any]:
    """The machine, how busy it is, and the versions of Python and of these packages."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def machine_line(machine: dict[str, Any]) -> str:
    """What `describe_machine` found, as one line of a report."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']:.1f}"
    return f"{hardware}, {machine['gpu'] or 'no GPU'}; {versions}."
