"""What each rank of a job runs: find the other ranks, train, and leave word of how that ended."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from launch.records import add_event
from pipeline.config import load_stored_config
from pipeline.errors import UserError, exit_on_user_error

PATIENCE = 300  # seconds for rank 0's address to show in the folder that all share


class TrainingTask:
    """Pickled when a job is submitted. A job that is requeued runs it again, and training resumes by itself."""

    def __init__(self, run_dir: str):
        self.run_dir = run_dir

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        # submitit answers the signals of a scheduler. Here the training does, between two steps, and on all ranks.
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)
        start = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        environment = TorchDistributedEnvironment()
        address = _meet(Path(self.run_dir), start, environment.rank, environment.master_addr)
        environment.master_addr, environment.master_port = address
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        run_rank(Path(self.run_dir), start, os.environ["SLURM_JOB_NODELIST"])


def run_rank(run_dir: Path, start: str, machines: str) -> None:
    """Train as the rank that the environment names, and end the process with the command's exit code.

    Args:
        start: names this start of the job among all.
        machines: those of the job, for people.
    """
    if os.environ["RANK"] == "0":
        add_event(run_dir, "start", start=start, machines=machines, pid=os.getpid(), host=socket.gethostname())
    end = end_file(run_dir, start, int(os.environ["RANK"]))
    end.parent.mkdir(exist_ok=True)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(end)  # where the reason of a failure is written
    try:
        exit_on_user_error(lambda: _train(run_dir))
    except SystemExit as exit_:
        known = read_end(end) if end.exists() else {}
        end.write_text(json.dumps(known | {"code": exit_.code}))
        raise


def end_file(run_dir: Path, start: str, rank: int) -> Path:
    """Where a rank leaves word of its end, unless it is killed."""
    return run_dir / "ends" / f"{start}.rank{rank}.json"


def read_end(file: Path) -> dict[str, Any]:
    """What `end_file` holds: "message", and "code" but for a bug."""
    return json.loads(file.read_text())


def _train(run_dir: Path) -> None:
    from pipeline.trainer import fit

    fit(load_stored_config(run_dir / "submitted.yaml"))


def _meet(run_dir: Path, start: str, rank: int, host: str) -> tuple[str, int]:
    """Host and port of rank 0: one that is free when it starts, which the others read from the run's directory."""
    file = run_dir / "address.json"
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"start": start, "host": host, "port": port}))
        os.replace(temporary, file)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            address = json.loads(file.read_text())
        except (OSError, ValueError):
            address = {}
        if address.get("start") == start:
            return address["host"], address["port"]
        time.sleep(0.2)
    raise UserError(f"rank 0 has not written {file} within {PATIENCE} s: the machines do not share that folder")


if __name__ == "__main__":  # of the local twin, whose controller has said which rank this is
    run_rank(Path(sys.argv[1]), sys.argv[2], socket.gethostname())
