"""The local twin of a cluster: ranks as processes of this machine, started again as a SLURM job would be.

``python -m launch.local RUN_DIR FOLDER RANKS SECONDS WARNING`` is the controller, one a run.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from launch.after import end
from pipeline.errors import EXIT_RESUME

KILL_WAIT = 30  # seconds between asking a rank to leave and killing it, as SLURM's


class Controller:
    """Starts the ranks of one run, and starts them again until `after.end` says that it is over."""

    def __init__(self, run_dir: Path, folder: Path, ranks: int, seconds: float, warning: float):
        self._run_dir, self._folder, self._count = run_dir, folder, ranks
        self._seconds, self._warning = seconds, warning
        self._ranks: list[subprocess.Popen] = []
        self._cancelled = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._cancel)
        number = 0
        while True:
            code = self._start(f"{os.getpid()}.{number}")
            what = end(self._run_dir, code)
            if what != "again" or self._cancelled:
                return code
            number += 1

    def _start(self, start: str) -> int:
        """Run all ranks once; return 0, or how the first to fail has ended."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self._count):
            environment = {
                **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._count), "LOCAL_WORLD_SIZE": str(self._count),
            }  # fmt: skip
            command = [sys.executable, "-m", "launch.task", str(self._run_dir), start]
            with open(self._folder / f"{os.getpid()}_{rank}_log.out", "ab") as log:
                self._ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        code, warned, begin = None, False, time.monotonic()
        while code is None:
            time.sleep(0.1)
            codes = [process.poll() for process in self._ranks]
            failed = [c for c in codes if c]
            code = failed[0] if failed else 0 if all(c == 0 for c in codes) else None
            if not warned and time.monotonic() - begin > self._seconds - self._warning:
                warned = True
                self._signal(signal.SIGUSR2)
        self._leave(code)
        return code if code >= 0 else 128 - code

    def _leave(self, code: int) -> None:
        """Wait for the other ranks; they leave by themselves after an interruption, and must after a failure."""
        if code not in (0, EXIT_RESUME):
            self._signal(signal.SIGTERM)
        deadline = time.monotonic() + KILL_WAIT
        for process in self._ranks:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._ranks.clear()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._ranks:
            process.send_signal(number)

    def _cancel(self, *_: object) -> None:
        self._cancelled = True
        self._signal(signal.SIGTERM)


if __name__ == "__main__":
    run_dir, folder, ranks, *times = sys.argv[1:]
    sys.exit(Controller(Path(run_dir), Path(folder), int(ranks), *map(float, times)).run())
