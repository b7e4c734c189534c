"""The folder of a run: made, checked, and used by one process at a time."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

RECORDS = "metrics.jsonl"
STATUS = "status.json"  # how far the run is, written with each checkpoint


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` so far; one that is being written, was cut short or damaged is passed over."""
    file = run_dir / RECORDS
    try:
        lines = file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    return [record for line in lines if (record := _record(line))]


def epochs_done(record: dict[str, Any]) -> float:
    """Epochs that were done when a line of ``metrics.jsonl`` was written, of which the last may be a part.

    Earlier versions wrote ``epoch``, the number from 0 of the epoch at whose end, or in which, the line was written.
    """
    return record["epochs"] if "epochs" in record else record["epoch"] + 1


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def make_run_dir(run_dir: Path) -> None:
    """Make the folder.

    Raises:
        UserError: that is not allowed, or nothing can be written there.
    """
    with io_as_user_error(run_dir):
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run_dir / "lock").touch()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it while this is entered, and until this process has ended.

    Raises:
        UserError: another process is training there, or `make_run_dir` failed.
    """
    make_run_dir(run_dir)
    with io_as_user_error(run_dir):
        file = open(run_dir / "lock", "r+")  # noqa: SIM115 - closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir} is in use by {file.read().strip() or 'another run'}: wait for its end, or set --run_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        with io_as_user_error(run_dir):
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def write_text(file: Path, text: str) -> None:
    """Write a small file of the run; `UserError` if that fails."""
    with io_as_user_error(file.parent):
        file.write_text(text)


def replace_text(file: Path, text: str) -> None:
    """Write a small file of the run so that others read it whole or as it was; `UserError` if that fails."""
    temporary = file.with_suffix(".tmp")
    with io_as_user_error(file.parent):
        try:
            temporary.write_text(text)
            os.replace(temporary, file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def io_as_user_error(run_dir: Path) -> Iterator[None]:
    """Turn the failure to write into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the run directory {run_dir} ({error.strerror}): make room, or set --run_dir; "
            "the checkpoints in it are whole"
        ) from None
