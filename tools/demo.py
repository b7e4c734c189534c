"""Train and evaluate a small network: ``python -m tools.demo [--section.field VALUE ...]``.

Unpacks the embedded images, trains configs/demo.yaml with two processes, evaluates the saved checkpoint with one and
with ten crops, and prints a table of the errors. Flags override fields of the configuration.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pipeline.command import exit_on_user_error
from pipeline.config_file import parse_command_line
from pipeline.errors import UserError
from tools.support.torchrun import torchrun

CONFIG = "configs/demo.yaml"
ARCHIVE = Path(__file__).parent / "demo_data" / "fashion-mnist.tar.xz"
PROCESSES = 2


def main() -> None:
    config, _ = parse_command_line([CONFIG, *sys.argv[1:]], "python -m tools.demo", __doc__)
    data = Path(config.data.dir)
    if not data.exists():
        unpack(ARCHIVE, data)
    device = _device(config.train.device)
    _run(torchrun(PROCESSES, "pipeline.train", CONFIG, *sys.argv[1:], "--train.device", device))
    checkpoint = Path(config.run_dir, "checkpoints", "best.pt")
    results = [_evaluate(checkpoint, data, crops, device) for crops in (1, 10)]

    print(f"\n{config.model.name} on {results[0]['images']} validation images of {data}, {checkpoint}:\n")
    print("crops   top-1 error   top-5 error")
    for result in results:
        errors = ("-" if result[key] is None else f"{result[key]:.2f} %" for key in ("top1_error", "top5_error"))
        print(f"{result['crops']:5d}   {'   '.join(f'{error:>11}' for error in errors)}")
    print(f"\nWatch it: {Path(sys.executable).parent / 'tensorboard'} --logdir {Path(config.run_dir).parent}")


def _device(asked: str) -> str:
    """The device for --train.device auto: GPUs only if there is one for each process."""
    import torch  # after the command line is known to be right: it takes seconds

    enough = torch.cuda.device_count() >= PROCESSES
    return asked if asked != "auto" else "cuda" if enough else "cpu"


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the images into `folder`, which appears only when it is complete."""
    print(f"unpacking {archive.name} into {folder}", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            with tarfile.open(archive) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extractall(temporary, filter="data")
                else:  # Debian 12's Python 3.11.2
                    tar.extractall(temporary)
            (content,) = Path(temporary).iterdir()
            content.rename(folder)
    except OSError as error:
        raise UserError(f"cannot unpack the images into {folder} ({error.strerror}): set --data.dir") from None


def _evaluate(checkpoint: Path, data: Path, crops: int, device: str) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        arguments = [checkpoint, "--data", data, "--crops", crops, "--device", device, "--json", file.name]
        _run(torchrun(PROCESSES, "tools.evaluate", *arguments))
        return json.load(file)["evaluations"][0]


def _run(command: list[str]) -> None:
    """Run a command with its output on the terminal; end with its exit code if it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # torchrun would warn that it sets just this
    code = subprocess.run(command, env=environment).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    exit_on_user_error(main)
