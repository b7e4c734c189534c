"""What the tools that measure shard: the machine's description, Markdown tables, and where results go."""

import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.machine import available_cores


def describe_machine(packages: list[str]) -> dict[str, Any]:
    """The machine, how busy it is, and the versions of Python and of these packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
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


def table(titles: list[str], rows: list[list[str]], names: int) -> list[str]:
    """Lines of a Markdown table whose first `names` columns are text and the others numbers."""
    rows = [[" ".join(cell.split("\n")).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    rule = ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [cell.ljust(width) for cell, width in zip(line[:names], widths[:names], strict=True)]
        + [cell.rjust(width) for cell, width in zip(line[names:], widths[names:], strict=True)]
        for line in (titles, rule, *rows)
    ]
    return [f"| {' | '.join(line)} |" for line in aligned]


def writable_folder(path: str, flag: str = "--output") -> Path:
    """Make the folder of a flag, and refuse it before the work if nothing can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(f"cannot write into {flag} {path}: {error.strerror}") from None


def writable_file(path: str, flag: str, suffixes: Collection[str] = ()) -> Path:
    """Make the folder of a flag's file, and refuse the file before the work if it cannot be written or ends otherwise.

    Args:
        suffixes: those that it may end in, any if there are none.
    """
    file = Path(path)
    if suffixes and file.suffix not in suffixes:
        raise UserError(f"{flag} {path}: the name must end in {' or '.join(suffixes)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        open(file, "a").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"cannot write {flag} {path}: {error.strerror}") from None
    return file
