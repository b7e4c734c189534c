"""Where a result comes from: the command, the code, the versions and the hardware behind it."""

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from pipeline.machine import available_cores, cpu_name
from pipeline.words import counted

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "timm", "numpy", "pillow")
COPY_OF = "COPY_OF"  # the file with the commit in a copy of this folder, as a submitted job has one


def provenance() -> dict[str, str]:
    """What is known of this process, by what it is: "command", "date", "commit", "versions" and "hardware"."""
    return {
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(Path(__file__).parent),
        "versions": versions(),
        "hardware": f"{socket.gethostname()}: {hardware()}",
    }


@cache
def commit(folder: Path) -> str:
    """The commit of the code in `folder`, or of what it is a copy of, with "-dirty" where tracked files were changed since."""
    with suppress(OSError):
        return (folder / COPY_OF).read_text()
    git = ["git", "-C", str(folder)]
    tracked = [*git, "ls-files", "--error-unmatch", "."]  # else it is installed below another project's repository
    described = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # it is only read
    try:
        for words in (tracked, described):
            told = subprocess.run(words, capture_output=True, text=True, timeout=20, env=environment)
            if told.returncode:
                return "unknown (no git repository)"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no git)"
    return told.stdout.strip()


@cache
def versions() -> str:
    """Python's version and those of the packages that a result may depend on."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # not every installation has all of them
            continue
    return ", ".join(found)


def hardware() -> str:
    """The processor with the cores that this process may use, the memory, and the GPUs."""
    import torch  # not above: `launch`, which needs none, asks for the commit

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    named = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    return f"{cpu_name()}, {counted(available_cores(), 'core')}, {memory:.0f} GiB of memory, {named}"
