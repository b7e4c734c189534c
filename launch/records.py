"""What a run's directory tells of its job: ``job.json`` says which it is, ``starts.jsonl`` how each attempt at it went.

A job is attempted again after an interruption or a failure. Files and keys keep the names of earlier versions, so that
their runs are still read: ``start`` names an attempt, ``machines`` are its nodes.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


@dataclass(frozen=True)
class Job:
    """The job that trains a run.

    Attributes:
        id: SLURM's, ``ARRAY_TASK`` in an array; of a local job the process id of its controller.
        kind: "slurm" or "local".
        host: where it was submitted.
        folder: the submission's: code as it was then, and a log of each rank.
        ranks: number of ranks.
        failures: failures in a row without a new checkpoint after which it is not attempted again.
    """

    id: str
    kind: str
    host: str
    folder: str
    ranks: int
    failures: int


def write_job(run_dir: Path, job: Job) -> None:
    replace_text(run_dir / "job.json", json.dumps(asdict(job), indent=1) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Write a file so that whoever reads it meanwhile gets the old or the new text."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def read_job(run_dir: Path) -> Job:
    """Read what `write_job` wrote.

    Raises:
        UserError: the run was not submitted with this package.
    """
    try:
        return Job(**json.loads((run_dir / "job.json").read_text()))
    except OSError:
        raise UserError(f"{run_dir} was not started by python -m launch (it has no job.json)") from None


def add_event(run_dir: Path, event: str, **values: Any) -> None:
    """Append a line to ``starts.jsonl``."""
    with open(run_dir / "starts.jsonl", "a") as stream:
        stream.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of ``starts.jsonl``; one cut short by a crash is passed over."""
    events = []
    file = run_dir / "starts.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
