"""What a run's directory tells of its job: ``job.json`` says which it is, ``starts.jsonl`` how each attempt at it went.

A job is attempted again after an interruption or a failure. Files and keys keep the names of earlier versions, so that
their runs are still read: ``start`` names an attempt, ``machines`` are its nodes.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run_dir import CONFIG, replace_file

CANCEL, NO_CANCEL = "cancel", "not cancelled"  # events: the second takes the first back
JOB_BEGAN = "LAUNCH_JOB_BEGAN"  # in the environment of a SLURM job: seconds since 1970
SUBMITTED = "submitted.yaml"  # in a run's directory: the configuration as it was submitted last


@dataclass(frozen=True)
class Job:
    """The job that trains a run.

    Attributes:
        id: SLURM's, ``ARRAY_TASK`` in an array; of a local job the process id of its controller.
        kind: "slurm" or "local".
        host: where it was submitted.
        folder: the submission's: code as it was then, and a log of each rank.
    """

    id: str
    kind: str
    host: str
    folder: str


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job at a run.

    Attributes:
        folder: the submission's.
        index: of the run among those submitted together.
        job: as `Job.id`.
        name: of this attempt among all of this run.
    """

    folder: Path
    index: int
    job: str
    name: str

    @property
    def run_dir(self) -> Path:
        return Path(read_submission(self.folder)["run_dirs"][self.index])

    @property
    def config(self) -> Path:
        """The configuration as it was submitted."""
        return config_file(self.folder, self.index)

    @property
    def number(self) -> int:
        """How many attempts there were of the job before."""
        return int(self.name.rpartition(".")[2])

    def word_file(self, rank: int) -> Path:
        """Where a rank leaves word of why it ended, unless it is killed; see `pipeline.exits.record_for_torchrun`."""
        return self.run_dir / "ends" / f"{self.name}.rank{rank}.json"

    def words(self) -> list[dict[str, Any]]:
        """The words that ranks have left, by rank."""
        words = []
        for rank in range(read_submission(self.folder)["ranks"]):
            with suppress(OSError, ValueError):  # it left none, or was killed as it wrote it
                words.append(json.loads(self.word_file(rank).read_text()))
        return words


def slurm_attempt(folder: Path) -> Attempt:
    """The attempt to which this process belongs, from SLURM's environment."""
    task, job = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ["SLURM_JOB_ID"]
    name = f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    if task is None:
        return Attempt(folder, 0, job, name)
    return Attempt(folder, int(task), f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}", name)


def write_submission(
    folder: Path, run_dirs: list[str], ranks: int, seconds: int, warning: int, failures: int, parallel: int = 1
) -> None:
    """Write what the ranks and what follows them need to know.

    Args:
        seconds: time limit of an attempt.
        warning: seconds before it at which the ranks are asked to leave.
        failures: in a row, without a new checkpoint, after which a run is not attempted again.
        parallel: of a local submission, how many of its runs train at once.
    """
    values = dict(
        run_dirs=run_dirs, ranks=ranks, seconds=seconds, warning=warning, failures=failures, parallel=parallel
    )
    (folder / "submission.json").write_text(json.dumps(values, indent=1) + "\n")


def read_submission(folder: Path) -> dict[str, Any]:
    """What `write_submission` wrote, by its arguments' names."""
    return json.loads((folder / "submission.json").read_text())


def config_file(folder: Path, index: int) -> Path:
    """The configuration of the run of this index."""
    return folder / "configs" / f"{index}.yaml"


def write_job(run_dir: Path, job: Job) -> None:
    replace_file(run_dir / "job.json", json.dumps(asdict(job), indent=1) + "\n")


def read_job(run_dir: Path) -> Job:
    """Read what `write_job` wrote.

    Raises:
        UserError: the run was not submitted with this package.
    """
    job = find_job(run_dir)
    if job is None:
        raise UserError(
            f"{run_dir} was not started by python -m launch (it has no job.json): look after it where it runs"
        )
    return job


def find_job(run_dir: Path) -> Job | None:
    """As `read_job`, or None for a run that something else has started, as torchrun.

    Raises:
        UserError: the file does not say what a job is, as one of another version.
    """
    try:
        known = json.loads((run_dir / "job.json").read_text())
        return Job(**{field.name: known[field.name] for field in fields(Job)})
    except OSError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{run_dir / 'job.json'} is damaged, or of another version ({error})") from None


def add_event(run_dir: Path, event: str, **values: Any) -> None:
    """Append a line to ``starts.jsonl``, after one that a crash has cut short a line of its own."""
    line = json.dumps({"event": event, "time": time.time(), **values}) + "\n"
    with open(run_dir / "starts.jsonl", "ab+") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else f"\n{line}"
        stream.write(line.encode())


def is_cancelled(events: list[dict[str, Any]], job: str) -> bool:
    """Whether ``python -m launch cancel`` has told this job to end, and has not failed to.

    Args:
        events: of `read_events`.
        job: as `Job.id`.
    """
    own = [event["event"] for event in events if event.get("job") == job]
    # A local job's number may come again.
    since = max((i for i, event in enumerate(own) if event == "submit"), default=0)
    words = [event for event in own[since:] if event in (CANCEL, NO_CANCEL)]
    return words[-1:] == [CANCEL]


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of ``starts.jsonl``; one cut short by a crash is passed over."""
    events = []
    file = run_dir / "starts.jsonl"
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def config_of(run_dir: Path, events: list[dict[str, Any]]) -> Path:
    """The configuration that a run goes on with: the one that was submitted last, unless the training has refused it or has
    written its own since.

    Args:
        events: of `read_events`.
    """
    accepted, submitted = run_dir / CONFIG, run_dir / SUBMITTED
    last = max((i for i, event in enumerate(events) if event["event"] == "submit"), default=None)
    if last is None or not submitted.exists() or not accepted.exists():
        return submitted if submitted.exists() else accepted
    refused = any(event["event"] == "end" and event.get("cause") == "mistake" for event in events[last:])
    return accepted if refused or accepted.stat().st_mtime >= submitted.stat().st_mtime else submitted
