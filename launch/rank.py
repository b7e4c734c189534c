"""The command of each rank of a job. It hears signals before it imports what takes its time.

``python -m launch.rank FOLDER/%j`` below srun, where FOLDER is the submission's, and ``python -m launch.rank FOLDER INDEX
JOB NAME`` below the local twin of a cluster, which has set torchrun's variables; see `launch.records.Attempt`.
"""

import os
import socket
import sys
from pathlib import Path

from launch.records import Attempt, add_event, is_cancelled, read_events, slurm_attempt
from pipeline.command import exit_on_user_error
from pipeline.errors import InterruptedRunError
from pipeline.preemption import exit_when_asked


def main() -> None:
    if len(sys.argv) == 2:
        from submitit.core.submission import process_job

        rank, attempt = os.environ["SLURM_PROCID"], slurm_attempt(Path(sys.argv[1]).parent)
        _announce(attempt, int(rank), os.environ["SLURM_JOB_NODELIST"])
        _leave_if_cancelled(attempt)
        process_job(sys.argv[1])
    else:
        from launch.task import train

        folder, index, job, name = sys.argv[1:]
        attempt = Attempt(Path(folder), int(index), job, name)
        _announce(attempt, int(os.environ["RANK"]), socket.gethostname())
        train(attempt)


def _announce(attempt: Attempt, rank: int, nodes: str) -> None:
    """Record that the attempt begins, and say where this rank is to leave word of its end."""
    word = attempt.word_file(rank)
    word.parent.mkdir(exist_ok=True)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(word)
    if rank == 0:
        values = dict(job=attempt.job, machines=nodes, pid=os.getpid(), host=socket.gethostname())
        add_event(attempt.run_dir, "start", start=attempt.name, **values)


def _leave_if_cancelled(attempt: Attempt) -> None:
    """Of a job that SLURM has requeued: it may have been told to end when it had no ranks that a signal could reach."""
    if is_cancelled(read_events(attempt.run_dir), attempt.job):
        raise InterruptedRunError(f"job {attempt.job} was cancelled before its ranks began")


if __name__ == "__main__":
    exit_when_asked()
    os.environ.setdefault("RANK", os.environ.get("SLURM_PROCID", "0"))  # who speaks, before the ranks have met
    exit_on_user_error(main)
