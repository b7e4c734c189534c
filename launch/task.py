"""Training as one rank of a job: find the other ranks, and train."""

import json
import signal
import socket
import time
from pathlib import Path

from launch.records import Attempt, slurm_attempt
from pipeline.command import exit_on_user_error
from pipeline.errors import UserError
from pipeline.preemption import exit_when_asked
from pipeline.run_dir import replace_file

PATIENCE = 300  # seconds for rank 0's address to show in the folder that all share


class TrainingTask:
    """Pickled when a job is submitted. A job that is requeued runs it again, and training resumes by itself."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> None:
        # submitit answers the signals of a scheduler. Here the training does, between two steps, and on all ranks.
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        exit_when_asked()
        exit_on_user_error(self._train)

    def _train(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        attempt = slurm_attempt(self.folder)
        environment = TorchDistributedEnvironment()
        address = _meet(attempt.run_dir, attempt.name, environment.rank, environment.master_addr)
        environment.master_addr, environment.master_port = address
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        train(attempt)


def train(attempt: Attempt) -> None:
    """Train as the rank that torchrun's variables in the environment name."""
    from pipeline.config_file import load_stored_config
    from pipeline.trainer import fit

    fit(load_stored_config(attempt.config))


def _meet(run_dir: Path, attempt: str, rank: int, host: str) -> tuple[str, int]:
    """Host and port of rank 0: one that is free when it starts, which the others read from the run's directory."""
    file = run_dir / "address.json"
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        replace_file(file, json.dumps({"start": attempt, "host": host, "port": port}))
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            address = json.loads(file.read_text())
        except (OSError, ValueError):
            address = {}
        if address.get("start") == attempt:
            return address["host"], address["port"]
        time.sleep(0.2)
    raise UserError(
        f"rank 0 has not written {file} within {PATIENCE} s: set --run_dir to a folder that all nodes share, if they do not"
    )
