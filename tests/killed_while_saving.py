"""``python -m tests.killed_while_saving NUMBER FLAGS``: trains, and is killed at call NUMBER of what makes a file safe.

Those calls are os.fsync, before which a new file then loses half of its bytes as when the machine crashes, and os.replace.
"""

import os
import signal
import sys

from pipeline.train import main

calls_left = int(sys.argv.pop(1))
fsync, replace = os.fsync, os.replace


def strike() -> None:
    global calls_left
    calls_left -= 1
    if calls_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def struck_fsync(descriptor: int) -> None:
    if calls_left == 1 and os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp"):
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
    strike()
    fsync(descriptor)


def struck_replace(source: str, target: str) -> None:
    strike()
    replace(source, target)


os.fsync, os.replace = struck_fsync, struck_replace
main()
