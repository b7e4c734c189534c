"""Ends of an attempt: the job is attempted again, or not.

``python -m launch.after FOLDER CODE`` is the last line of a SLURM job's script, on the job's first node: FOLDER is the
submission's, CODE how the ranks ended. What SLURM itself requeues (a lost node, a preemption that leaves no time) does
not come here.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from launch.records import JOB_BEGAN, Attempt, add_event, is_cancelled, read_events, read_submission, slurm_attempt
from pipeline.config_file import load_stored_config
from pipeline.errors import UserError
from pipeline.exits import EXIT_RESUME, EXIT_USER_ERROR
from pipeline.preemption import STOP_SIGNALS
from pipeline.run_dir import is_complete
from pipeline.words import counted

IDLE_ATTEMPTS = 10  # interruptions in a row without a new checkpoint: something keeps the run from getting anywhere
REQUEUE_WAITS = (0, 5, 15, 30, 60, 120, 240)  # seconds before each request, which a busy controller may not answer
EARLY = 60  # seconds by which SLURM may give its warning before it is due
KILLED_BY_SIGNAL = tuple(128 + number for number in STOP_SIGNALS)  # a rank that had no handler yet

# complete: nothing is left to do. mistake: a person must act. preempted: a signal that was not the time limit's, of which
# any number may come. time limit: its warning. interrupted: another end that the run can go on from, such as a rank that
# has lost contact to another. failed: all else.
Cause = Literal["complete", "mistake", "preempted", "time limit", "interrupted", "failed"]


def cause_of(code: int, words: list[dict[str, Any]], complete: bool, limit_reached: bool) -> Cause:
    """Why an attempt ended.

    Args:
        code: of all ranks together, which may be that of one that was killed after another had failed.
        words: what ranks left word of; see `Attempt.words`.
        complete: the run's last checkpoint is of its end.
        limit_reached: so much time had passed that the warning before the time limit was due.
    """
    codes = [word.get("code") for word in words]
    # Of a complete run too, whose new configuration it refuses; the rank may have found no room for its word.
    if code == EXIT_USER_ERROR or (code != 0 and EXIT_USER_ERROR in codes):
        return "mistake"
    if code == 0 or complete:
        return "complete"
    if code not in (EXIT_RESUME, *KILLED_BY_SIGNAL) or any(other != EXIT_RESUME for other in codes):
        return "failed"
    if limit_reached and (code != EXIT_RESUME or any(word.get("signal") for word in words)):
        return "time limit"
    return "preempted" if any(word.get("signal") for word in words) else "interrupted"


def decide(
    cause: Cause, code: int, before: list[tuple[Cause, str | None]], checkpoint: str | None, failures: int
) -> tuple[str, str]:
    """What follows an end, ("done", "stopped" or "again"), and why.

    Args:
        before: of the earlier attempts of this job: why each ended, and what names the checkpoint that it left.
        checkpoint: what names the run's newest checkpoint.
        failures: failures in a row without a new checkpoint after which there is no further attempt.
    """
    if cause == "complete":
        return "done", "complete"
    if cause == "mistake":
        return "stopped", "needs a person"
    ends = [*before, (cause, checkpoint)]
    if cause == "failed":
        if _stands_still([end for end in ends if end[0] == "failed"], failures):
            return "stopped", f"{counted(failures, 'failure')} in a row without a new checkpoint"
        return "again", f"failed with exit code {code}"
    if cause != "preempted" and _stands_still([end for end in ends if end[0] != "preempted"], IDLE_ATTEMPTS):
        return "stopped", f"{IDLE_ATTEMPTS} attempts were interrupted before they could write a checkpoint"
    return "again", {"preempted": "interrupted by a signal", "time limit": "warned of the time limit"}.get(cause, cause)


def _stands_still(ends: list[tuple[Cause, str | None]], attempts: int) -> bool:
    """Whether the last so many have left the same checkpoint."""
    return len(ends) >= attempts and len({checkpoint for _, checkpoint in ends[-attempts:]}) == 1


def end(attempt: Attempt, code: int) -> str:
    """Record the end of an attempt, and return what follows."""
    run_dir, submission, events = attempt.run_dir, read_submission(attempt.folder), []
    with _told():  # what cannot be read or written just now keeps no job from its next attempt
        events = read_events(run_dir)
    words, checkpoint = attempt.words(), _name_of(run_dir / "checkpoints" / "last.pt")
    announced = (e["time"] for e in events if e["event"] == "start" and e["start"] == attempt.name)
    # The time limit counts from the job's begin, which is long before the announcement where `setup` copies data.
    took = time.time() - float(os.environ.get(JOB_BEGAN) or next(announced, time.time()))
    limit, warning = submission["seconds"], submission["warning"]
    cause = cause_of(code, words, _is_complete(attempt), took >= limit - warning - EARLY)
    submitted = max((i for i, e in enumerate(events) if e["event"] == "submit" and e["job"] == attempt.job), default=0)
    ends = [e for e in events[submitted:] if e["event"] == "end" and e.get("job") == attempt.job]
    before = [(e["cause"], e["checkpoint"]) for e in ends]
    what, why = decide(cause, code, before, checkpoint, submission["failures"])
    if cause == "time limit" and (not words or any(word.get("phase") == "starting" for word in words)):
        why += (
            f": the time limit is {limit / 60:.0f} min with a warning {warning} s before it, but a start takes more than "
            f"{took:.0f} s before its first step: give more --time"
        )
    said = [word["message"] for word in words if word.get("message") and word.get("code") != EXIT_RESUME]
    with _told():
        add_event(
            run_dir, "end", start=attempt.name, job=attempt.job, code=code, cause=cause, checkpoint=checkpoint,
            what=what, why=why, message=said[0] if said else "",
        )  # fmt: skip
        return what
    return what if attempt.number < IDLE_ATTEMPTS else "stopped"  # nothing else counts the attempts


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)


def _is_complete(attempt: Attempt) -> bool:
    """Whether the last checkpoint is of the end; no if that is not known.

    A run whose configuration now asks for more epochs than that checkpoint's is not.
    """
    try:
        return is_complete(attempt.run_dir, load_stored_config(attempt.config).optim.epochs)
    except UserError:
        return False


def _name_of(checkpoint: Path) -> str | None:
    """What differs from checkpoint to checkpoint."""
    try:
        status = checkpoint.stat()
    except OSError:
        return None
    return f"{status.st_ino} {status.st_mtime_ns}"


def _requeue(job: str) -> None:
    """Ask SLURM for another attempt, again for some minutes where its controller does not answer."""
    for wait in REQUEUE_WAITS:
        time.sleep(wait)
        if subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0:
            return
    sys.exit(f"error: scontrol requeue {job} has failed: resume the run with python -m launch resume")


def main() -> None:
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # a scheduler that is impatient must not leave the run without its next
    attempt, code = slurm_attempt(Path(sys.argv[1])), int(sys.argv[2])
    what = "again" if attempt.number < IDLE_ATTEMPTS else "stopped"
    with _told():
        what = end(attempt, code)
    events = []
    with _told():
        events = read_events(attempt.run_dir)
    if what == "again" and not is_cancelled(events, attempt.job):
        _requeue(attempt.job)
    elif what != "done":
        sys.exit(code)


if __name__ == "__main__":
    main()
