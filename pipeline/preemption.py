"""Signals that ask a run to stop: it does so between two steps, with a checkpoint."""

import signal
import threading
from types import FrameType

# SIGTERM: torchrun, a scheduler's time limit or preemption; SIGUSR1, SIGUSR2: a scheduler's early warning; SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class PreemptionHandler:
    """While it is entered, remembers the signal that asked for a stop; Ctrl-C a second time ends at once.

    Attributes:
        signal: number of the signal, 0 if there was none.
    """

    def __init__(self):
        self.signal = 0
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self._handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            # A process that leaves with its own exit code must not die of a launcher that asks once more.
            leaves = failure is not None and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaves else handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
