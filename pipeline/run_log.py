"""``log.txt`` in a run's directory: what rank 0 has printed, and how each attempt ended, whoever started it."""

import errno
import io
import os
import shlex
import socket
import stat
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from pipeline.distributed import World, lost_contact_named
from pipeline.errors import InterruptedRunError, LocalUserError, UserError
from pipeline.preemption import leave_closed_outputs
from pipeline.run_dir import ANY_TEXT, LOG, STARTED, locked, now
from pipeline.words import counted


@contextmanager
def occupied(run_dir: Path, world: World) -> Iterator[None]:
    """Make a run's directory, keep other runs out of it, and keep its log. Every rank must call this.

    Raises:
        UserError, InterruptedRunError: see `locked`.
    """
    with ExitStack() as stack:
        world.broadcast_from_rank0(lambda: stack.enter_context(locked(run_dir)))
        stack.enter_context(logged(run_dir, world))
        yield


@contextmanager
def logged(run_dir: Path, world: World) -> Iterator[None]:
    """Write what this process prints into the run's log too, if it is rank 0, and why it ends, if no other rank knows it.

    Progress bars are left out. A log or an output that cannot be written ends no run: checkpoints and records are what matters.
    Only a closed pipe is told, as whoever has closed it may have wanted no more.
    """
    with ExitStack() as stack:
        log = _open(run_dir / LOG, stack) if world.is_main else None
        if world.is_main:
            who = f"process {os.getpid()} on {socket.gethostname()}, {counted(world.size, 'rank')}"
            _write(log, f"{now()} {STARTED} {shlex.join(sys.orig_argv)} ({who})\n")
            for name in ("stdout", "stderr"):
                _copy(name, log, stack)
        try:
            with lost_contact_named(world):
                yield
        except BaseException as error:
            if world.is_main or not _is_known_to_rank0(error):
                log = log or _open(run_dir / LOG, stack)  # not before: a start that is refused leaves no log
                if not isinstance(error, UserError | InterruptedRunError | KeyboardInterrupt):
                    _write(log, "".join(traceback.format_exception(error)))
                _write(log, f"{now()} {'' if world.is_main else f'rank {world.rank}: '}{_end_of(error)}\n")
            raise
        if world.is_main:
            _write(log, f"{now()} ended\n")


def _copy(name: str, log: TextIO | None, stack: ExitStack) -> None:
    """Copy a standard stream into the log, until the run ends, or somebody has put another in its place."""
    before = getattr(sys, name)
    copied = _Copied(before or io.StringIO(), log)  # None in a program that was started with it closed

    def put_back() -> None:
        if getattr(sys, name) is copied:
            setattr(sys, name, before)

    setattr(sys, name, copied)
    stack.callback(put_back)


def _open(file: Path, stack: ExitStack) -> TextIO | None:
    try:
        log = open(file, "a", **ANY_TEXT)  # noqa: SIM115 - closed below
    except OSError:
        return None
    stack.callback(_close, log)
    return log


def _close(log: TextIO) -> None:
    with suppress(OSError):  # what it holds for a disk that is full
        log.close()


def _is_known_to_rank0(error: BaseException) -> bool:
    """Whether all ranks have this error, or this rank has lost another whose own word counts."""
    return isinstance(error, UserError | InterruptedRunError) and not isinstance(error, LocalUserError)


def _end_of(error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, InterruptedRunError | KeyboardInterrupt):
        return f"interrupted: {str(error) or 'by Ctrl-C, without a checkpoint'}"
    return f"error: {type(error).__name__}: {error}"


def _write(log: TextIO | None, text: str) -> None:
    if log and not log.closed:
        with suppress(OSError):
            log.write(text)
            log.flush()


@contextmanager
def _unwritten_at_worst(stream: TextIO) -> Iterator[None]:
    """A terminal that was closed without SIGHUP, as for a job that the shell has disowned, or a full disk, raises nothing."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno == errno.EIO and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
            leave_closed_outputs()


class _Copied:
    """A stream whose whole lines go into a log too, as long as that is open: a program may keep this longer than the run."""

    def __init__(self, stream: TextIO, log: TextIO | None):
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text:  # a progress bar's
            _write(self._log, text)
        with _unwritten_at_worst(self._stream):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _unwritten_at_worst(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
