"""Ends of a job: start it again, or not.

``python -m launch.after FOLDER CODE`` is the last line of a SLURM job's script, on the job's first machine: FOLDER is the
submission's, CODE how the ranks ended. What SLURM itself requeues (a lost machine, a preemption that leaves no time)
does not come here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch.records import add_event, read_events, read_job
from launch.task import end_file, read_end
from pipeline.errors import EXIT_RESUME, EXIT_USER_ERROR

IDLE_STARTS = 10  # interruptions in a row without a new checkpoint: a start takes longer than its time limit


def decide(
    code: int, rank_codes: list[int | None], ends: list[tuple[int, str | None]], failures: int
) -> tuple[str, str]:
    """What follows an end, ("done", "stopped" or "again"), and why.

    Args:
        code: of all ranks together, which may be that of one that was killed after another had failed.
        rank_codes: what ranks left word of.
        ends: code of each start since the run was submitted, this one included, and what names its newest checkpoint.
        failures: failures in a row without a new checkpoint after which there is no further start.
    """
    if code == 0:
        return "done", "complete"
    if EXIT_USER_ERROR in rank_codes:
        return "stopped", "needs a person"
    if code == EXIT_RESUME:
        if _stands_still(ends, IDLE_STARTS):
            return (
                "stopped",
                f"{IDLE_STARTS} starts were interrupted before they could write a checkpoint: give more --time",
            )
        return "again", "interrupted"
    if _stands_still([end for end in ends if end[0] != EXIT_RESUME], failures):
        return "stopped", f"{failures} starts have come no further than the same checkpoint"
    return "again", f"failed with exit code {code}"


def _stands_still(ends: list[tuple[int, str | None]], starts: int) -> bool:
    """Whether the last so many have left the same checkpoint."""
    return len(ends) >= starts and len({checkpoint for _, checkpoint in ends[-starts:]}) == 1


def end(run_dir: Path, code: int) -> str:
    """Record the end of a start, and return what follows."""
    job, events = read_job(run_dir), read_events(run_dir)
    started = next((event["start"] for event in reversed(events) if event["event"] == "start"), None)
    ends = [file for rank in range(job.ranks) if (file := end_file(run_dir, str(started), rank)).exists()]
    words = [read_end(file) for file in ends]
    checkpoint = _name_of(run_dir / "checkpoints" / "last.pt")
    submitted = max((i for i, event in enumerate(events) if event["event"] == "submit"), default=0)
    before = [(event["code"], event["checkpoint"]) for event in events[submitted:] if event["event"] == "end"]
    what, why = decide(code, [word.get("code") for word in words], [*before, (code, checkpoint)], job.failures)
    messages = [word["message"] for word in words if word.get("message") and word.get("code") != EXIT_RESUME]
    message = messages[0] if messages else ""
    add_event(run_dir, "end", start=started, code=code, checkpoint=checkpoint, what=what, why=why, message=message)
    return what


def _name_of(checkpoint: Path) -> str | None:
    """What differs from checkpoint to checkpoint."""
    try:
        status = checkpoint.stat()
    except OSError:
        return None
    return f"{status.st_ino} {status.st_mtime_ns}"


def main() -> None:
    folder, code = Path(sys.argv[1]), int(sys.argv[2])
    run_dirs = json.loads((folder / "runs.json").read_text())
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    run_dir = Path(run_dirs[int(task or 0)])
    job = os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    cancelled = any(event["event"] == "cancel" and event["job"] == job for event in read_events(run_dir))
    if end(run_dir, code) == "again" and not cancelled:
        subprocess.run(["scontrol", "requeue", job], check=True)
    elif code:
        sys.exit(code)


if __name__ == "__main__":
    main()
