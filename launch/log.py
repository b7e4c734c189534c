"""What a run's own log and lock tell of it, whoever has started it."""

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from pipeline.pace import duration
from pipeline.run_dir import ENDED, LOG, RECORDS, STARTED

SIGN_OF_LIFE = 900  # seconds since a run on another machine has last written, within which it is taken to be running
_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?:rank \d+: )?")


def state_by_log(run_dir: Path) -> tuple[str, str, str]:
    """State, nodes and reason of a run that is no job of ours."""
    if is_held_here(run_dir):
        return "running", socket.gethostname(), ""
    attempts = attempts_in_log(run_dir)
    ends = [end for line in (attempts[-1] if attempts else []) if (end := _end_in(line))]
    # A rank's mistake is why the others have lost contact to it.
    end = next((end for end in ends if end.startswith("error:")), ends[-1] if ends else "")
    if end == "ended":
        return "done", "", ""
    if end:
        kind, _, why = end.partition(": ")
        return ("stopped" if kind == "error" else "interrupted"), "", why
    return seen_elsewhere(run_dir) or (
        "gone", "", "its process ended without a word, as a killed one does; start the same command again to go on",
    )  # fmt: skip


def seen_elsewhere(run_dir: Path) -> tuple[str, str, str] | None:
    """State, nodes and reason of a run that another machine seems to train, by what it writes; None if none does."""
    host, silent = lock_of(run_dir)[1], _silent_seconds(run_dir)
    if host in ("", socket.gethostname()) or silent >= SIGN_OF_LIFE:
        return None
    return "running", host, f"seen from here by its files alone, last written {duration(silent)} ago"


def attempts_in_log(run_dir: Path) -> list[list[str]]:
    """The lines of each attempt in the run's log; none of a version that kept no log."""
    attempts: list[list[str]] = []
    with suppress(OSError):
        for line in (run_dir / LOG).read_text(errors="replace").splitlines():
            if _LINE.match(line) and _LINE.sub("", line).startswith(STARTED):
                attempts.append([])
            if attempts:
                attempts[-1].append(line)
    return attempts


def _end_in(line: str) -> str:
    """How an attempt ended, if a line of the log says so, else nothing."""
    text = _LINE.sub("", line)
    return text if text != line and text.startswith(ENDED) else ""


def lock_of(run_dir: Path) -> tuple[int, str]:
    """Process and host that a run's lock names; 0 and nothing if it does not."""
    with suppress(OSError):
        if found := re.fullmatch(r"process (\d+) on (\S+)", (run_dir / "lock").read_text().strip()):
            return int(found[1]), found[2]
    return 0, ""


def is_held_here(run_dir: Path) -> bool:
    """Whether a process of this machine trains in a run's directory now."""
    pid, host = lock_of(run_dir)
    return host == socket.gethostname() and _has_open(pid, run_dir / "lock")


def _silent_seconds(run_dir: Path) -> float:
    """Since a run has last written."""
    written = [file.stat().st_mtime for name in (LOG, RECORDS) if (file := run_dir / name).exists()]
    return time.time() - max(written, default=0)


def _has_open(pid: int, file: Path) -> bool:
    """Whether this process has the file open: another may have its number by now."""
    descriptors = Path(f"/proc/{pid}/fd")
    if not Path("/proc/self").exists():  # not Linux
        return exists(pid)
    try:
        return any(os.path.realpath(fd) == os.path.realpath(file) for fd in descriptors.iterdir())
    except PermissionError:  # another user's
        return exists(pid)
    except OSError:
        return False


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True
