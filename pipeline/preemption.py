"""Signals that ask a run to stop: while it starts they end it at once, while it trains it leaves with a checkpoint.

A command calls `exit_when_asked` before it imports anything slow. `PreemptionHandler`, which the trainer enters when
there is something to save, takes over. When that is left the command is about to end, and only Ctrl-C is heard. In a
program that calls ``trainer.fit`` without `exit_when_asked`, the program's own handlers count before and after.
"""

import os
import select
import signal
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NoReturn

from pipeline.exits import EXIT_KEYBOARD, EXIT_RESUME, launcher_speaks, open_closed_streams, record_for_torchrun
from pipeline.machine import ask_for_signal_when_parent_dies

# SIGTERM: torchrun, a scheduler's time limit or preemption; SIGUSR1, SIGUSR2: a scheduler's early warning; SIGHUP: the
# terminal has been closed; SIGINT: Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SIGNALS = (*STOP_SIGNALS, signal.SIGINT)

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None  # what signal.signal takes and returns

_phase: Literal["library", "starting", "training", "ending"] = "library"  # library: no command has called us
_received = 0  # number of the first signal that came
_writer: int | None = None  # where C code writes the signals that come, for the thread; None: nowhere


@dataclass(frozen=True)
class GracePeriod:
    """How long a rank that is asked to leave may take before it is killed.

    Attributes:
        remedy: how to make it longer.
    """

    seconds: float
    remedy: str


def exit_when_asked() -> None:
    """From here on a signal ends this process at once, with exit code 75 and one line, until training begins.

    For the first line of a command, in its main thread. Calling it again takes the signals back from other handlers.
    A thread ends the process, because the main thread may be in C code (an import, a rendezvous, a compiler) for long.
    """
    global _phase
    first, _phase = _phase == "library", "starting"
    for number in _heard():
        signal.signal(number, _note)  # a signal without a handler of Python's does not wake the thread
    if first:
        open_closed_streams()  # or the pipe would become the standard output
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun that is killed would leave its ranks behind
        ask_for_signal_when_parent_dies(signal.SIGTERM)
    _end_on(SIGNALS)
    if _received:  # before there was a pipe
        _end(signal.Signals(_received))


def ending() -> None:
    """Of a command that has its outcome: no launcher's signal may change it now, down to the process's last moment."""
    global _phase
    if _phase not in ("library", "ending"):
        _phase = "ending"
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        try:
            _end_on((signal.SIGINT,))
        except (OSError, RuntimeError):  # no descriptor or thread is left, which must not change the outcome
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def received() -> str:
    """Name of the first signal that this process was sent; empty if there was none."""
    return signal.Signals(_received).name if _received else ""


def grace_period() -> GracePeriod | None:
    """What is known of the launcher's limit; None if nothing is.

    It is for the case that the launcher itself is asked to end. After another rank has failed torchrun always waits 30 s.
    A ``torchrun --shutdown-timeout`` cannot be seen from a rank; its environment variable can.
    """
    if seconds := os.environ.get("LAUNCH_GRACE_SECONDS"):
        return GracePeriod(float(seconds), "give python -m launch more --warning-seconds")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")  # in the order in which torchrun takes them
    seconds = next((os.environ[name] for name in names if name in os.environ), "30")
    return GracePeriod(float(seconds), "start torchrun with TORCH_ELASTIC_SHUTDOWN_TIMEOUT set to more seconds")


class PreemptionHandler:
    """While it is entered, remembers the signal that asked for a stop; Ctrl-C a second time ends at once.

    Attributes:
        signal: number of the signal, 0 if there was none.
    """

    def __init__(self):
        self.signal = 0
        self._handlers: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "PreemptionHandler":
        global _phase
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            if _phase != "library":
                _phase = "training"
            self._handlers = {number: signal.signal(number, self._remember) for number in _heard()}
            if _phase == "training":
                _end_on(())
                self.signal = _received  # one that came too late for the thread
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            ending()

    def ask(self, number: int) -> None:
        """Ask for a stop, as this signal does."""
        _note(number, None)
        self.signal = self.signal or number

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(number)
        if number == signal.SIGHUP:
            leave_closed_outputs()


def _heard() -> list[signal.Signals]:
    """The signals that ask for a stop: not SIGHUP below nohup, which has it ignored, and none that a program's C code handles,
    whose handler could not be put back."""
    handlers = {n: signal.getsignal(n) for n in SIGNALS}
    return [n for n, own in handlers.items() if own is not None and (n != signal.SIGHUP or own != signal.SIG_IGN)]


def leave_closed_outputs() -> None:
    """Write nothing more to a terminal or pipe that has been closed: an error of print would come before the checkpoint."""
    with open(os.devnull, "wb") as nothing:
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) or _is_broken_pipe(descriptor):
                os.dup2(nothing.fileno(), descriptor)


def _is_broken_pipe(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _note(number: int, _: FrameType | None) -> None:
    global _received
    _received = _received or number


def _end_on(numbers: Sequence[int]) -> None:
    """From here on a thread ends the process on these signals, and on no others.

    Each phase has a pipe of its own: a thread that wakes late, on a busy machine, does not take a signal for a later phase's.
    """
    global _writer
    before, _writer = _writer, None
    if numbers:
        reader, _writer = os.pipe()
        os.set_blocking(_writer, False)
        signal.set_wakeup_fd(_writer, warn_on_full_buffer=False)  # before the thread runs: the pipe keeps what comes
        threading.Thread(target=_watch, args=(reader, _phase, numbers), name="signals", daemon=True).start()
    else:
        signal.set_wakeup_fd(-1)
    if before is not None:
        os.close(before)  # which ends the thread before


def _watch(reader: int, phase: str, numbers: Sequence[int]) -> None:
    """Read the signals that C code writes into the pipe, whatever the main thread does."""
    while came := os.read(reader, 64):
        for number in came:
            if number in numbers and _phase == phase:
                _end(signal.Signals(number))
    os.close(reader)


def _end(number: signal.Signals) -> NoReturn:
    if number == signal.SIGINT:
        os._exit(EXIT_KEYBOARD)
    error = f"rank {os.environ.get('RANK', '0')} leaves on {number.name} while starting"
    line = f"interrupted: {error}; start the same command again to go on\n"
    if not launcher_speaks():
        os.write(2, line.encode())  # the main thread may hold the lock of sys.stderr
    record_for_torchrun(error, EXIT_RESUME, signal=number.name, phase="starting")
    os._exit(EXIT_RESUME)
