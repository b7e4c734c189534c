"""How runs are doing, whoever started them: from their own records, and from SLURM where it knows the job.

No accounting is needed.
"""

import glob
import os
import shutil
import socket
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.log import attempts_in_log, exists, is_held_here, seen_elsewhere, state_by_log
from launch.records import SUBMITTED, Job, config_of, find_job, is_cancelled, read_events
from pipeline.config import Config
from pipeline.config_file import load_stored_config
from pipeline.errors import UserError
from pipeline.pace import WINDOWS, duration
from pipeline.run_dir import (
    CONFIG,
    LOG,
    RECORDS,
    epochs_done,
    has_checkpoint,
    is_complete,
    read_progress,
    read_records,
    traces_of_checkpoints,
)

# State, nodes and reason of this user's jobs in SLURM's queue, by id; None where there is no SLURM to ask.
Queue = dict[str, tuple[str, str, str]] | None

LOG_LINES = 5
OUR_RANK = "launch.rank"  # a word of the command of a rank that a job has started
ENDED = ("done", "stopped", "interrupted", "cancelled", "gone")
# Of SLURM's states; in all others the job may still run, as when it is suspended.
FINAL_STATES = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip


@dataclass(frozen=True)
class Measure:
    """What validations are judged by: its name in the records, and how the screen has it.

    Attributes:
        titles: of the columns for the last and for the best epoch.
    """

    key: str
    titles: tuple[str, str]
    form: str
    more_is_better: bool


ERROR = Measure("val/top1_error", ("last top-1 error %", "best (epoch)"), ".2f", more_is_better=False)
AUROC = Measure(  # from 0 to 1, of images with several labels
    "val/mean_auroc", ("last mean AUROC", "best AUROC (epoch)"), ".4f", more_is_better=True
)


@dataclass(frozen=True)
class Validations:
    """What a run's validations came to, by one measure.

    Attributes:
        last: of the last epoch that is validated.
        best: of the best epoch so far, and its number, counted from 1: that of ``best.pt``. None if no value is defined.
    """

    last: float | None
    best: tuple[float, int] | None


@dataclass(frozen=True)
class Status:
    """One run, as `status` shows it: `epoch` of `epochs` and `step` steps are done; times in seconds.

    There is no job if something else than python -m launch has started the run, as torchrun; `epochs` is None before the
    configuration is known. `validations` has what the run has recorded, `validated_on` the fingerprint of the images, None
    where the run has saved none. `steps_lost` says which steps a run that has ended will do again.
    """

    run_dir: Path
    job: Job | None
    state: str
    nodes: str
    attempts: int
    epoch: int
    epochs: int | None
    step: int
    validations: dict[Measure, Validations]
    validated_on: str | None
    images_per_second: float | None
    remaining: float | None
    reason: str
    steps_lost: str


def runs_below(folder: Path, of_grid: bool = False) -> list[Path]:
    """The runs in a folder, or the folder itself if it is a run. Folders that may not be entered are passed over.

    Args:
        of_grid: the base name of a grid stands for its runs, which are FOLDER-FIELDVALUE.

    Raises:
        UserError: there is none, or the folder cannot be read.
    """
    try:
        below = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    found = [folder] if _is_run(folder) else [path for path in below if _is_run(path)]
    named = sorted(path for path in folder.parent.glob(f"{glob.escape(folder.name)}-*") if _is_run(path))
    if not found and of_grid:
        found = named
    if not found and named:
        raise UserError(f"{folder} is no run's directory; of that name there are {', '.join(map(str, named))}")
    if not found:
        raise UserError(
            f"{folder} is no run's directory, nor a folder of runs: give a --run_dir, or the folder that holds it"
        )
    return found


def _is_run(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in ("job.json", LOG, RECORDS))


def read_status(run_dir: Path, queue: Queue) -> Status:
    """Put together what is known of a run.

    Args:
        queue: see `slurm_queue`.
    """
    job, records, progress = find_job(run_dir), read_records(run_dir), read_progress(run_dir)
    accepted, trouble = _config_in(run_dir / CONFIG)
    submitted, other_trouble = _config_in(run_dir / SUBMITTED)
    events = read_events(run_dir) if job else []
    goes_on_as_submitted = job is not None and config_of(run_dir, events).name == SUBMITTED
    config = (submitted if goes_on_as_submitted else accepted) or submitted or accepted
    attempts = [event for event in events if event["event"] == "start"]
    state, nodes, reason = _state_of_job(run_dir, job, events, queue) if job else state_by_log(run_dir)
    if job and state in ENDED and is_held_here(run_dir):  # something else than its job trains it
        state, nodes, reason = "running", socket.gethostname(), ""
    if state in ENDED and state != "done" and is_complete(run_dir, config.optim.epochs if config else None):
        reason = f"it is complete; a later start was stopped: {reason}" if state == "stopped" else ""
        state, nodes = "done", ""
    recorded = records[-1]["step"] if records else 0
    validated = [record for record in records if "val/loss" in record]
    logged = [record for record in records if record.get("speed/images_per_second")][-WINDOWS:]
    # The median: a change shows within three lines, and one odd line does not.
    speeds = [record["speed/images_per_second"] for record in logged]
    remaining = [record["speed/remaining_seconds"] for record in logged if "speed/remaining_seconds" in record]
    before = not logged or logged[-1]["step"] <= progress.get("done_steps", 0)  # the last checkpoint
    if config and before and progress.get("epochs", config.optim.epochs) != config.optim.epochs:
        remaining = []  # they are to another end
    return Status(
        run_dir=run_dir,
        job=job,
        state=state,
        nodes=nodes or (attempts[-1]["machines"] if attempts else ""),
        attempts=len(attempts) if job else len(attempts_in_log(run_dir)),
        epoch=int(epochs_done(validated[-1])) if validated else 0,
        epochs=config.optim.epochs if config else None,
        # Steps are recorded every few; an interruption leaves its checkpoint in between.
        step=max(recorded, progress.get("done_steps", 0)),
        validations={m: _validations(validated, m) for m in (ERROR, AUROC) if any(m.key in r for r in validated)},
        validated_on=progress.get("validation_images"),
        images_per_second=statistics.median(speeds) if speeds else None,
        remaining=0.0 if state == "done" else remaining[-1] if remaining else None,
        reason=reason or trouble or other_trouble,
        steps_lost=_steps_lost(run_dir, recorded, progress) if state in ENDED and state != "done" else "",
    )


def _steps_lost(run_dir: Path, recorded: int, progress: dict[str, Any]) -> str:
    """Which steps a run that has ended will do again, as its checkpoints, if they are whole, are of an earlier one; empty if
    there are none, or if that is not known."""
    if not has_checkpoint(run_dir):
        new = recorded and not traces_of_checkpoints(run_dir)
        return "it had saved no checkpoint, so that a start does all its steps again" if new else ""
    saved = progress.get("done_steps", recorded)  # not known where status.json is of another checkpoint
    if saved >= recorded:
        return ""
    return f"its last checkpoint is of step {saved}, so that a start does those after it again"


def _validations(records: list[dict[str, Any]], measure: Measure) -> Validations:
    """Of the records of a run's epochs; the best one as the run chooses it, of equal ones the first."""
    values = [(record.get(measure.key), int(epochs_done(record))) for record in records]
    known = [(value, epoch) for value, epoch in values if value is not None]  # a value that is not finite is null
    sign = -1 if measure.more_is_better else 1
    return Validations(values[-1][0], min(known, key=lambda pair: sign * pair[0], default=None))


def _config_in(file: Path) -> tuple[Config | None, str]:
    """The configuration, if there is one, and why it cannot be read, as one of a later version."""
    try:
        return (load_stored_config(file) if file.exists() else None), ""
    except UserError as error:
        return None, str(error)


def slurm_queue() -> Queue:
    """Ask SLURM."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%N|%r", "--states=all"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"squeue does not answer: {' '.join(done.stderr.split())}")
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {job: (state, nodes, reason) for job, state, nodes, reason in rows}


def to_text(statuses: list[Status]) -> str:
    """A table, and below it what failing ranks said last."""
    measures = [m for m in (ERROR, AUROC) if any(m in status.validations for status in statuses)] or [ERROR]
    judged = (title for measure in measures for title in measure.titles)
    head = ("run", "job", "state", "attempts", "epochs", "step", *judged, "images/s", "remaining", "nodes")
    rows = [head, *(_row(status, measures) for status in statuses)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for status in statuses:
        if status.reason:
            lines.append(f"{status.run_dir}: {status.reason}")
        if status.steps_lost:
            lines.append(f"{status.run_dir}: {status.steps_lost}")
        if status.state == "stopped" and status.job:
            lines += [f"    {line}" for line in last_words(status.job)]
    sets: dict[str, list[str]] = {}
    for status in statuses:
        if status.validations and status.validated_on:
            sets.setdefault(status.validated_on, []).append(str(status.run_dir))
    if len(sets) > 1:
        groups = " | ".join(", ".join(runs) for runs in sets.values())
        lines.append(f"not all are validated on the same images, and errors compare within a group only: {groups}")
    return "\n".join(lines)


def logs_of(run_dir: Path) -> list[tuple[str, Path]]:
    """The logs of a run in the order of its submissions, each with the rank whose it is.

    A job's ranks have one each, for all attempts. What something else has started is in the run's own log alone.
    """
    job = find_job(run_dir)
    submitted = [event for event in read_events(run_dir) if event["event"] == "submit" and "folder" in event]
    jobs = [(event["job"], Path(event["folder"])) for event in submitted]
    if job and (job.id, Path(job.folder)) not in jobs:  # of a version that did not note the folder
        jobs.append((job.id, Path(job.folder)))
    found = [(str(rank), file) for name, folder in jobs for rank, file in _rank_logs(name, folder).items()]
    by_hand = any(OUR_RANK not in attempt[0].split() for attempt in attempts_in_log(run_dir))
    own = [("log", run_dir / LOG)] if by_hand else []
    return own + found


def _rank_logs(job: str, folder: Path) -> dict[int, Path]:
    """By rank, in order."""
    files = [*folder.glob(f"{job}/{job}_*_log.out"), *folder.glob(f"{job}_*_log.out")]
    return dict(sorted((int(file.name.removeprefix(f"{job}_").removesuffix("_log.out")), file) for file in files))


def last_words(job: Job) -> list[str]:
    """The last lines of the first rank whose log says that something is wrong, else of rank 0."""
    logs = _rank_logs(job.id, Path(job.folder))
    tails = {rank: file.read_text(errors="replace").splitlines()[-50:] for rank, file in logs.items()}
    wrong = [rank for rank, lines in tails.items() if any(line.startswith(("error:", "Traceback")) for line in lines)]
    rank = wrong[0] if wrong else 0
    return [f"rank {rank}: {line}" for line in tails.get(rank, [])[-LOG_LINES:]]


def _row(status: Status, measures: list[Measure]) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    judged: list[str] = []
    for measure in measures:
        found = status.validations.get(measure, Validations(None, None))
        best = f"{found.best[0]:{measure.form}} ({found.best[1]})" if found.best else "-"
        judged += [number(found.last, measure.form), best]
    return (
        str(status.run_dir), status.job.id if status.job else "-", status.state, str(status.attempts),
        f"{status.epoch}/{number(status.epochs, 'd')}",
        str(status.step), *judged, number(status.images_per_second, ".1f"),
        _remaining(status),
        status.nodes or "-",
    )  # fmt: skip


def _remaining(status: Status) -> str:
    """The time to the run's end as its last log line had it, which may be a minute ago."""
    if status.remaining is None:
        return "-"
    return "< 1 min" if status.state != "done" and status.remaining < 60 else duration(status.remaining)


def _state_of_job(run_dir: Path, job: Job, events: list[dict[str, Any]], queue: Queue) -> tuple[str, str, str]:
    """State, nodes and reason: SLURM's word for a job that it has, else the run's own."""
    own = [event for event in events if event["event"] in ("submit", "start", "end")]
    last = own[-1] if own else {}
    ended = last.get("event") == "end"
    why = f"{last['why']}{last['message'] and ': ' + last['message'].splitlines()[-1]}" if ended else ""
    state, nodes, reason = (queue or {}).get(job.id, ("", "", "")) if job.kind == "slurm" else ("", "", "")
    if job.kind == "slurm" and is_waiting_or_running(job, queue):
        return state.lower(), nodes, reason if state == "PENDING" else ""
    if ended and last["what"] in ("done", "stopped"):
        return last["what"], "", "" if last["what"] == "done" else why
    if state == "CANCELLED" or is_cancelled(events, job.id):
        return "cancelled", "", ""
    waits = last.get("event") == "submit"
    if is_alive(job, run_dir):
        return ("pending", "", "waits for the runs submitted before it (--parallel)") if waits else ("running", "", "")
    if not _is_known_here(job, run_dir, queue):
        if waits:
            return "submitted", "", ""
        if seen := seen_elsewhere(run_dir):
            return seen
    return "gone", "", "the job ended without a word; python -m launch resume RUN goes on"


def _is_known_here(job: Job, run_dir: Path, queue: Queue) -> bool:
    """Whether a job that there is would be known: it is of this machine, or in the queue as this user's."""
    if job.kind == "local":
        return job.host == socket.gethostname()
    return queue is not None and (run_dir / "job.json").stat().st_uid == os.getuid()


def is_waiting_or_running(job: Job, queue: Queue) -> bool:
    """Whether a SLURM job is in the queue, and has not ended there."""
    return job.id in (queue or {}) and (queue or {})[job.id][0] not in FINAL_STATES


def is_alive(job: Job, run_dir: Path) -> bool:
    """Whether a local job's controller runs on this machine."""
    return job.kind == "local" and job.host == socket.gethostname() and _alive(int(job.id), run_dir)


def _alive(pid: int, run_dir: Path) -> bool:
    """Whether this process is the controller of this run, whatever links lead to it: another may have its number by now."""
    if not Path("/proc/self").exists():  # not Linux
        return exists(pid)
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.path.realpath(os.fsencode(run_dir)) in map(os.path.realpath, filter(None, words))
