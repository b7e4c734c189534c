"""Runs the project's commands in processes of their own, each forked from one that has imported torch.

A start costs a tenth of a second then and not four. What differs from a user's start: the slow modules are there already,
and several ranks get torchrun's variables without torchrun, of which `conftest.run_torchrun` shows the real thing.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PATIENCE = 1800  # seconds for what takes a few, on a machine that has much else to do
SLOW_MODULES = (
    "pipeline.trainer",
    "pipeline.data.dali",
    "pipeline.weights",
    "timm",
    "torchvision",
    "matplotlib.figure",
)


class Template:
    """A process with the slow modules. It forks one for each command, which never sees another command's traces."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def run(self, words: list[str], ranks: int, cores: int | None) -> subprocess.CompletedProcess:
        """Run ``python WORDS`` as so many ranks; the exit code is the first failed rank's, and the others are ended then.

        Raises:
            subprocess.TimeoutExpired: they were killed.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            request = dict(words=words, ranks=ranks, cores=cores, folder=folder, environment=dict(os.environ))
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code = json.loads(self._process.stdout.readline())
            output, complaint = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        if code is None:
            raise subprocess.TimeoutExpired(words, PATIENCE, output, complaint)
        return subprocess.CompletedProcess(words, code, output, complaint)

    def close(self) -> None:
        if self._process:
            self._process.communicate()


def _serve() -> dict | None:
    """Answer requests with exit codes until there are no more: None. In a forked process, return what it is to run."""
    for line in sys.stdin:
        request = json.loads(line)
        port = _free_port()
        children = set()
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                _become(request, rank, port)
                return request
            children.add(pid)
        print(json.dumps(_wait(children)), flush=True)
    return None


def _become(request: dict, rank: int, port: int) -> None:
    """Turn the forked process into what a shell would have started."""
    for descriptor, name, mode in ((0, os.devnull, "rb"), (1, "stdout", "ab"), (2, "stderr", "ab")):
        with open(Path(request["folder"], name), mode) as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0)  # noqa: SIM115 - it has read ahead in the template
    os.environ.clear()
    os.environ.update(request["environment"], PYTHONPATH=str(REPOSITORY))
    if request["ranks"] > 1:
        size = str(request["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if request["ranks"] > 1 or request["cores"]:
        sys.modules["torch"].set_num_threads(request["cores"] or 1)
    if request["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["cores"]])


def _wait(children: set[int]) -> int | None:
    end, code = time.monotonic() + PATIENCE, 0
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > end:
                _send(children, signal.SIGKILL)
                end = math.inf
                code = code or None
            time.sleep(0.01)
            continue
        children.discard(pid)
        if code == 0 and (code := os.waitstatus_to_exitcode(status)):
            _send(children, signal.SIGTERM)
            end = time.monotonic() + 30  # as torchrun does
    return code


def _send(children: set[int], number: signal.Signals) -> None:
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)
    for module in SLOW_MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or each fork would copy all pages as it collects garbage
    if command := _serve():
        sys.argv = command["words"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
