"""The folder of a run: made, checked, and used by one process at a time."""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import InterruptedRunError, StorageError, UserError
from pipeline.paths import is_present

CONFIG = "config.yaml"  # as the run was started last
RECORDS = "metrics.jsonl"
STATUS = "status.json"  # how far the run is, written with each checkpoint
LAST_CHECKPOINTS = ("last.pt", "previous.pt")  # in the order in which a run resumes from them
CHECKSUM_LENGTH = 64  # SHA-256 in hexadecimal digits, at the end of a checkpoint
LOG = "log.txt"  # what rank 0 has printed; see run_log.py
# What a start makes before there is a run, and what tells that there is one, or that a job of it was submitted.
PREPARATIONS = ("lock", LOG, "index", "checkpoints")
SIGNS_OF_A_RUN = {CONFIG, RECORDS, "starts.jsonl"}
# Of open(): file names in a text may be of any encoding.
ANY_TEXT: dict[str, Any] = dict(encoding="utf-8", errors="backslashreplace")
STARTED, ENDED = "started:", ("ended", "error:", "interrupted:")  # after the time, in an attempt's first and last line


def now() -> str:
    """The local time, as the lines of a log have it."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` so far; one that is being written, was cut short, damaged or is
    of another program is passed over."""
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


def read_progress(run_dir: Path) -> dict[str, Any]:
    """What ``status.json`` says of a run's last checkpoint.

    Empty if there is none, if it was damaged, or if it is of another checkpoint than the one that is there: it is about
    to be written, a kill came before that, or somebody has put an older checkpoint back.
    """
    with suppress(OSError, ValueError):
        progress = json.loads((run_dir / STATUS).read_text())
        if (
            isinstance(progress, dict)
            and progress.get("checkpoint", checksum := checkpoint_checksum(run_dir)) == checksum
        ):
            return progress
    return {}


def checkpoint_checksum(run_dir: Path) -> str:
    """The last characters of the file that a run resumes from, which are its checksum; empty if there is none."""
    for name in LAST_CHECKPOINTS:
        with suppress(FileNotFoundError), open(run_dir / "checkpoints" / name, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - CHECKSUM_LENGTH))
            return file.read().decode(errors="replace")
    return ""


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is one to resume from, be it damaged."""
    return any((run_dir / "checkpoints" / name).exists() for name in LAST_CHECKPOINTS)


def traces_of_checkpoints(run_dir: Path) -> list[str]:
    """What shows that a run has saved a checkpoint, but for those to resume from."""
    folder = run_dir / "checkpoints"
    traces = [file.name for file in (folder / "best.pt", run_dir / STATUS) if is_present(file)]
    traces += sorted(file.name for file in folder.glob("*.damaged*"))
    if any("val/loss" in record for record in read_records(run_dir)):  # a checkpoint is saved before
        traces.append(RECORDS)
    return traces


def is_complete(run_dir: Path, epochs: int | None) -> bool:
    """Whether a run's last checkpoint is of its end, however it was started and whatever it refused since.

    Args:
        epochs: that its configuration asks for now, which may be more than when it ended; None for as many as then.
    """
    progress = read_progress(run_dir)
    return progress.get("complete") is True and (epochs is None or progress.get("epoch", 0) >= epochs)


def why_no_best(run_dir: Path) -> str:
    """Why a run has no best checkpoint, and what to take instead; empty if the folder is no run's."""
    if not any((run_dir / name).exists() for name in SIGNS_OF_A_RUN | {LOG}):
        return ""
    last = run_dir / "checkpoints" / "last.pt"
    if not last.exists():
        return f"the run in {run_dir} has saved no checkpoint yet: wait for the end of its first epoch"
    if read_progress(run_dir).get("epoch"):
        return f"the run in {run_dir} has lost its checkpoints/best.pt: give {last}, its last checkpoint"
    return f"no epoch of the run in {run_dir} is validated yet: wait for the end of the first one, or give {last}"


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    is_ours = isinstance(record, dict) and isinstance(record.get("step"), int) and {"epochs", "epoch"} & record.keys()
    return record if is_ours else {}


def make_run_dir(run_dir: Path) -> None:
    """Make the folder.

    Raises:
        StorageError, UserError: nothing can be written there, which may pass, or not.
    """
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run_dir / "lock").touch()
    except OSError as error:
        if error.errno in StorageError.NUMBERS:
            raise StorageError(f"cannot make the run directory {run_dir} ({error.strerror})") from None
        raise UserError(
            f"cannot make the run directory {run_dir} ({error.strerror}): {_remedy(error)}set --run_dir"
        ) from None


class Before:
    """What there was of a run's directory before a start."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._names = _names_in(run_dir)
        self._new = [folder for folder in (run_dir, *run_dir.parents) if not os.path.lexists(folder)]

    def put_back(self) -> None:
        """Remove what the start has made, but for a run's directory, whose log tells of each start."""
        present = _names_in(self._run_dir)
        if present & SIGNS_OF_A_RUN or "checkpoints" in self._names:
            return
        for name in present & set(PREPARATIONS) - self._names:
            path = self._run_dir / name
            if name == "index":
                shutil.rmtree(path, ignore_errors=True)
                continue
            with suppress(OSError):  # somebody else has put something there
                path.rmdir() if path.is_dir() else path.unlink()
        for folder in self._new:
            with suppress(OSError):
                folder.rmdir()


def _names_in(folder: Path) -> set[str]:
    """Of what is there; none if it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it while this is entered.

    If a user's mistake ends this before there is a run, nothing of it is left.

    Raises:
        UserError: another process is training there.
        StorageError, UserError: as `make_run_dir`.
        InterruptedRunError: another process is training there, on another node than this attempt of a requeued job.
    """
    before = Before(run_dir)
    with _lock(run_dir) as file:
        with io_as_user_error(run_dir):
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        try:
            yield
        except UserError:
            before.put_back()
            raise


def _lock(run_dir: Path) -> TextIO:
    """The locked file of the directory, which is made. See `locked`."""
    path = run_dir / "lock"
    while True:
        make_run_dir(run_dir)
        try:
            file = open(path, "r+")  # noqa: SIM115 - closed here or by the caller
        except FileNotFoundError:  # a start that was refused has just put it away, here and below
            continue
        except OSError:
            with io_as_user_error(run_dir):
                raise
        try:
            _take(file, run_dir)
            with io_as_user_error(run_dir):
                if _is_at(file, path):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _take(file: TextIO, run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read().strip() or "another run"
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and not holder.endswith(f" on {socket.gethostname()}"):
            # Of a node that SLURM has given up, which is alive still or whose lock the file server keeps for a while.
            raise InterruptedRunError(f"{run_dir} is in use by {holder}, perhaps on a lost node") from None
        raise UserError(f"{run_dir} is in use by {holder}: wait for its end, or set --run_dir") from None
    except OSError:  # a file system without locks
        pass


def write_text(file: Path, text: str) -> None:
    """Write a small file of the run. Raises what `io_as_user_error` does."""
    with io_as_user_error(file.parent):
        file.write_text(text, **ANY_TEXT)


def replace_text(file: Path, text: str) -> None:
    """Write a small file of the run so that others read it whole or as it was. Raises what `io_as_user_error` does."""
    with io_as_user_error(file.parent):
        replace_file(file, text)


def replace_file(file: Path, text: str) -> None:
    """Write a small file so that others, and a start after a loss of power, read it whole or as it was.

    Raises:
        OSError: it is as it was.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with open(temporary, "w", **ANY_TEXT) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # or after a loss of power the name could stand for nothing
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def io_as_user_error(run_dir: Path) -> Iterator[None]:
    """Turn the failure to write into one line.

    Raises:
        StorageError: it may pass.
        UserError: it does not.
    """
    try:
        yield
    except OSError as error:
        kept = ""
        with suppress(OSError):
            kept = "; the checkpoints in it are whole" if any(run_dir.glob("checkpoints/*.pt")) else ""
        if error.errno in StorageError.NUMBERS:
            raise StorageError(f"cannot write the run directory {run_dir} ({error.strerror}){kept}") from None
        raise UserError(
            f"cannot write the run directory {run_dir} ({error.strerror}): {_remedy(error)}set --run_dir{kept}"
        ) from None


def _remedy(error: OSError) -> str:
    """What to do about a failure to write, where another directory is not all that helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room, or "
    return "make it writable, or " if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
