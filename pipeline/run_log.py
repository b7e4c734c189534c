"""``log.txt`` in a run's directory: what rank 0 has printed, and how each attempt ended, whoever started it."""

import os
import shlex
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from pipeline.distributed import World, lost_contact_named
from pipeline.errors import InterruptedRunError, LocalUserError, UserError
from pipeline.run_dir import LOG, STARTED, locked, now
from pipeline.words import counted


@contextmanager
def occupied(run_dir: Path, world: World) -> Iterator[None]:
    """Make a run's directory, keep other runs out of it, and keep its log. Every rank must call this.

    Raises:
        UserError: see `locked`.
    """
    with ExitStack() as stack:
        world.broadcast_from_rank0(lambda: stack.enter_context(locked(run_dir)))
        stack.enter_context(logged(run_dir, world))
        yield


@contextmanager
def logged(run_dir: Path, world: World) -> Iterator[None]:
    """Write what this process prints into the run's log too, if it is rank 0, and why it ends, if no other rank knows it.

    Progress bars are left out. A log that cannot be written ends no run: checkpoints and records are what matters.
    """
    with ExitStack() as stack:
        log = _open(run_dir / LOG, stack) if world.is_main else None
        if world.is_main:
            who = f"process {os.getpid()} on {socket.gethostname()}, {counted(world.size, 'rank')}"
            _write(log, f"{now()} {STARTED} {shlex.join(sys.orig_argv)} ({who})\n")
            stack.enter_context(redirect_stdout(cast(TextIO, _Copied(sys.stdout, log))))
            stack.enter_context(redirect_stderr(cast(TextIO, _Copied(sys.stderr, log))))
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


def _open(file: Path, stack: ExitStack) -> TextIO | None:
    try:
        return stack.enter_context(open(file, "a"))
    except OSError:
        return None


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
    if log:
        with suppress(OSError):
            log.write(text)
            log.flush()


class _Copied:
    """A stream whose whole lines go into a log too."""

    def __init__(self, stream: TextIO, log: TextIO | None):
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text:  # a progress bar's
            _write(self._log, text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
