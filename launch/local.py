"""The local twin of a cluster: ranks as processes of this machine, attempted again as a SLURM job would be.

``python -m launch.local RUN_DIR FOLDER INDEX`` is the controller, one a run.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from launch.after import end
from launch.records import Attempt, read_submission
from launch.turns import gpus_for_part, has_turn, part_of, take_part
from pipeline.exits import EXIT_RESUME
from pipeline.machine import present_gpus, usable_cores

KILL_WAIT = 30  # least seconds between asking a rank to leave and killing it, as SLURM's


class Controller:
    """Starts the ranks of one run, and starts them again until `after.end` says that it is over."""

    def __init__(self, folder: Path, index: int):
        submission = read_submission(folder)
        self._folder, self._index, self._count = folder, index, submission["ranks"]
        self._parallel = min(submission["parallel"], len(submission["run_dirs"]))
        self._warn_after = submission["seconds"] - submission["warning"]
        self._grace = max(KILL_WAIT, submission["warning"])
        self._ranks: list[subprocess.Popen] = []
        self._cancelled = False

    def run(self) -> int:
        """Wait for its turn among the runs submitted together, and return the exit code of the last attempt."""
        signal.signal(signal.SIGTERM, self._cancel)
        while not self._cancelled and not has_turn(self._folder, self._index, self._parallel):
            time.sleep(0.5)
        if self._parallel > 1:
            self._keep_to_a_part()
        job, begin, number, code = str(os.getpid()), int(time.time()), 0, EXIT_RESUME
        while not self._cancelled:
            attempt = Attempt(self._folder, self._index, job, f"{job}-{begin}.{number}")
            code = self._attempt(attempt)
            what = end(attempt, code)
            if what != "again":
                return 0 if what == "done" else code
            number += 1
        return code

    def _keep_to_a_part(self) -> None:
        """Give the ranks a share of the cores, and of the GPUs, that no other run of the submission has."""
        while (taken := take_part(self._folder, self._parallel)) is None and not self._cancelled:
            time.sleep(0.5)
        if taken is None:
            return
        part, self._part_lock = taken
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, part_of(usable_cores(), part, self._parallel))
        if gpus := gpus_for_part(len(present_gpus()), part, self._parallel):
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus

    def _attempt(self, attempt: Attempt) -> int:
        """Run all ranks once; return 0, or how the first to fail has ended."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "launch.rank", attempt.folder, attempt.index, attempt.job, attempt.name]
        for rank in range(self._count):
            environment = {
                **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._count), "LOCAL_WORLD_SIZE": str(self._count),
                "LAUNCH_GRACE_SECONDS": str(self._grace),
            }  # fmt: skip
            words = [str(word) for word in command]
            with open(self._folder / f"{attempt.job}_{rank}_log.out", "ab") as log:
                self._ranks.append(subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT))
        code = first_failure(self._poll())
        asked_to_leave, warned, begin = False, False, time.monotonic()
        while code is None:
            time.sleep(0.1)
            if self._cancelled and not asked_to_leave:  # here, so that ranks that have just been started hear it too
                asked_to_leave = True
                self._signal(signal.SIGTERM)
            if not warned and time.monotonic() - begin > self._warn_after:
                warned = True
                self._signal(signal.SIGUSR2)
            code = first_failure(self._poll())
        self._leave(code)
        return code if code >= 0 else 128 - code

    def _leave(self, code: int) -> None:
        """Wait for the other ranks; they leave by themselves after an interruption, and must after a failure."""
        if code not in (0, EXIT_RESUME):
            self._signal(signal.SIGTERM)
        deadline = time.monotonic() + self._grace
        for process in self._ranks:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._ranks.clear()

    def _poll(self) -> list[int | None]:
        return [process.poll() for process in self._ranks]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._ranks:
            process.send_signal(number)

    def _cancel(self, *_: object) -> None:
        self._cancelled = True


def first_failure(codes: list[int | None]) -> int | None:
    """How the first rank to fail has ended, 0 if all have ended well, None if that is not yet known.

    Args:
        codes: exit code of each rank, or minus the number of the signal that ended it; None while it runs. Of those seen
            at once, a rank that lost contact to another, and leaves for that with code 75, was not the first.
    """
    failed = sorted((code for code in codes if code), key=lambda code: code == EXIT_RESUME)
    if failed:
        return failed[0]
    return 0 if all(code == 0 for code in codes) else None


if __name__ == "__main__":
    _, folder, index = sys.argv[1:]
    sys.exit(Controller(Path(folder), int(index)).run())
