"""How runs are doing: from their own records, and from SLURM where it knows the job. No accounting is needed."""

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.records import Job, read_events, read_job
from pipeline.config import Config, load_stored_config
from pipeline.errors import UserError
from pipeline.run_dir import epochs_done, read_records

Queue = dict[str, tuple[str, str, str]]  # state, nodes and reason of SLURM's jobs, by id

LOG_LINES = 5
AUROC_COLUMN = 8  # is shown where a run has one
ENDED = ("done", "stopped", "cancelled", "gone")
# Of SLURM's states; in all others the job may still run, as when it is suspended.
FINAL_STATES = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip


@dataclass(frozen=True)
class Status:
    """One run, as `status` shows it: `epoch` epochs and `step` steps are done; errors in percent, times in seconds.

    Of images with several labels each there is a mean AUROC, from 0 to 1, and no error; of others the reverse.
    """

    run_dir: Path
    job: Job
    state: str
    nodes: str
    attempts: int
    epoch: int
    epochs: int
    step: int
    top1_error: float | None
    top5_error: float | None
    mean_auroc: float | None
    images_per_second: float | None
    remaining: float | None
    reason: str


def runs_below(folder: Path) -> list[Path]:
    """The runs in a folder, or the folder itself if it is a run.

    Raises:
        UserError: there is none.
    """
    found = [folder] if (folder / "job.json").exists() else sorted(file.parent for file in folder.glob("*/job.json"))
    if not found:
        raise UserError(f"{folder} is no run that python -m launch has started, nor a folder of such runs")
    return found


def read_status(run_dir: Path, queue: Queue) -> Status:
    """Put together what is known of a run.

    Args:
        queue: state, nodes and reason of SLURM's jobs; see `slurm_queue`.
    """
    job, events, config = read_job(run_dir), read_events(run_dir), load_stored_config(run_dir / "submitted.yaml")
    records = read_records(run_dir)
    attempts = [event for event in events if event["event"] == "start"]
    state, nodes, reason = _state(run_dir, job, events, queue)
    validation: dict[str, Any] = next((r for r in reversed(records) if "val/loss" in r), {})
    speeds = [r["speed/images_per_second"] for r in records[-20:] if r.get("speed/images_per_second")]
    speed = sorted(speeds)[len(speeds) // 2] if speeds else None
    return Status(
        run_dir=run_dir,
        job=job,
        state=state,
        nodes=nodes or (attempts[-1]["machines"] if attempts else ""),
        attempts=len(attempts),
        epoch=int(epochs_done(validation)) if validation else 0,
        epochs=config.optim.epochs,
        step=records[-1]["step"] if records else 0,
        top1_error=validation.get("val/top1_error"),
        top5_error=validation.get("val/top5_error"),
        mean_auroc=validation.get("val/mean_auroc"),
        images_per_second=speed,
        remaining=_remaining(config, records, speed),
        reason=reason,
    )


def slurm_queue() -> Queue:
    """State, nodes and reason of this user's jobs in SLURM's queue, by job id; empty where there is no SLURM."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%N|%r", "--states=all"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"squeue does not answer: {' '.join(done.stderr.split())}")
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {job: (state, nodes, reason) for job, state, nodes, reason in rows}


def to_text(statuses: list[Status]) -> str:
    """A table, and below it what failing ranks said last."""
    head = (
        "run", "job", "state", "attempts", "epochs done", "step", "top-1 error %", "top-5 error %", "mean AUROC", "images/s",
        "remaining", "nodes",
    )  # fmt: skip
    rows = [head, *(_row(status) for status in statuses)]
    if all(status.mean_auroc is None for status in statuses):
        rows = [row[:AUROC_COLUMN] + row[AUROC_COLUMN + 1 :] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for status in statuses:
        if status.reason:
            lines.append(f"{status.run_dir}: {status.reason}")
        if status.state == "stopped":
            lines += [f"    {line}" for line in last_words(status.job)]
    return "\n".join(lines)


def logs_of(job: Job) -> dict[int, Path]:
    """The log of each rank, by rank."""
    folder, name = Path(job.folder), job.id
    found = {}
    for rank in range(job.ranks):
        for file in (folder / name / f"{name}_{rank}_log.out", folder / f"{name}_{rank}_log.out"):
            if file.exists():
                found[rank] = file
    return found


def last_words(job: Job) -> list[str]:
    """The last lines of the first rank whose log says that something is wrong, else of rank 0."""
    logs = logs_of(job)
    tails = {rank: file.read_text(errors="replace").splitlines()[-50:] for rank, file in logs.items()}
    wrong = [rank for rank, lines in tails.items() if any(line.startswith(("error:", "Traceback")) for line in lines)]
    rank = wrong[0] if wrong else 0
    return [f"rank {rank}: {line}" for line in tails.get(rank, [])[-LOG_LINES:]]


def _row(status: Status) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        str(status.run_dir), status.job.id, status.state, str(status.attempts), f"{status.epoch}/{status.epochs}",
        str(status.step), number(status.top1_error, ".2f"), number(status.top5_error, ".2f"),
        number(status.mean_auroc, ".4f"), number(status.images_per_second, ".1f"),
        "-" if status.remaining is None else duration(status.remaining),
        status.nodes or "-",
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Days and hours, hours and minutes, or minutes."""
    minutes = round(seconds / 60)
    if minutes >= 1440:
        return f"{minutes // 1440} d {minutes % 1440 // 60} h"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _state(run_dir: Path, job: Job, events: list[dict[str, Any]], queue: Queue) -> tuple[str, str, str]:
    """State, nodes and reason: SLURM's word for a job that it has, else the run's own."""
    last = events[-1] if events else {}
    ended = last.get("event") == "end"
    why = f"{last['why']}{last['message'] and ': ' + last['message'].splitlines()[-1]}" if ended else ""
    if job.kind == "slurm" and job.id in queue and queue[job.id][0] not in FINAL_STATES:
        state, nodes, reason = queue[job.id]
        return state.lower(), nodes, reason if state == "PENDING" else ""
    if ended and last["what"] in ("done", "stopped"):
        return last["what"], "", "" if last["what"] == "done" else why
    if any(event["event"] == "cancel" and event["job"] == job.id for event in events):
        return "cancelled", "", ""
    if job.kind == "local" and job.host == socket.gethostname() and _alive(int(job.id), run_dir):
        return "running", "", ""
    if last.get("event") == "submit":
        return "submitted", "", ""
    return "gone", "", "the job ended without a word; python -m launch resume RUN goes on"


def _alive(pid: int, run_dir: Path) -> bool:
    """Whether this process is the controller of this run: another may have its number by now."""
    if not Path("/proc/self").exists():  # not Linux
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return True
    try:
        return os.fsencode(os.path.abspath(run_dir)) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _remaining(config: Config, records: list[dict[str, Any]], speed: float | None) -> float | None:
    """Seconds until the end at the present speed, validation not counted."""
    if not speed or not records:
        return None
    ends = [(r["step"], epochs_done(r)) for r in records if "val/loss" in r]
    if not ends:
        return None
    steps_per_epoch = ends[-1][0] / ends[-1][1]
    steps = config.optim.epochs * steps_per_epoch - records[-1]["step"]
    return steps * config.optim.batch_size / speed
