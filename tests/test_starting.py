"""Signals before training begins and after it has ended, and standard streams that are closed: real processes, struck."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import PATIENCE, REPOSITORY, override_flags, run_module, small_config

from pipeline.checkpoint import load_checkpoint
from pipeline.distributed import World, lost_contact_named
from pipeline.errors import LocalUserError, LostContactError
from pipeline.preemption import SIGNALS, GracePeriod, PreemptionHandler, grace_period, received
from pipeline.run_dir import read_records

pytestmark = pytest.mark.slow  # for the most part


def start_training(tmp_path: Path, **environment: str) -> subprocess.Popen:
    words = ["-m", "pipeline.train", "configs/demo.yaml", *override_flags(small_config(tmp_path / "run"))]
    error_file = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "word.json")}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **error_file, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_left_at_once(process: subprocess.Popen, number: signal.Signals, rank: int, word: Path) -> None:
    output, complaint = process.communicate(timeout=PATIENCE)
    assert output == ""
    if number == signal.SIGINT:
        assert process.returncode == 130 and complaint == ""
        return
    assert process.returncode == 75, complaint
    error = f"rank {rank} leaves on {number.name} while starting"
    assert complaint == f"interrupted: {error}; start the same command again to go on\n"
    said = json.loads(word.read_text())
    assert said.pop("timestamp") <= time.time()
    assert said == {"message": error, "code": 75, "signal": number.name, "phase": "starting"}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_modules_are_imported(tmp_path, number):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pydantic.py").write_text(
        f"import time\nopen({str(tmp_path / 'importing')!r}, 'w').close()\ntime.sleep(36000)\n"
    )
    process = start_training(tmp_path, PYTHONPATH=f"{tmp_path / 'modules'}:{REPOSITORY}")
    while not (tmp_path / "importing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    assert_left_at_once(process, number, 0, tmp_path / "word.json")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT])
def test_a_signal_while_a_rank_waits_for_the_others(tmp_path, number):
    """It waits in C++, where no handler of Python's is called."""
    with socket.create_server(("127.0.0.1", 0)) as rank0:
        rank0.settimeout(PATIENCE)
        names = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        process = start_training(tmp_path, MASTER_PORT=str(rank0.getsockname()[1]), **names)
        with rank0.accept()[0]:
            process.send_signal(number)
            assert_left_at_once(process, number, 1, tmp_path / "word.json")


STRIKES_ITSELF = """
import atexit, os, signal
from pipeline.command import exit_on_user_error
from pipeline.errors import InterruptedRunError, UserError
from pipeline.preemption import STOP_SIGNALS, PreemptionHandler, exit_when_asked

def strike():
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)

def main():
    with PreemptionHandler() as handler:
        strike()
        assert handler.signal in STOP_SIGNALS
        {inside}
    strike()
    {after}

class Last:
    # Strikes when modules are taken down, after Python has given back its handlers.
    def __del__(self, kill=os.kill, process=os.getpid(), numbers=STOP_SIGNALS):
        for number in numbers:
            kill(process, number)

exit_when_asked()
last = Last()
atexit.register(strike)
exit_on_user_error(main)
"""


@pytest.mark.parametrize(
    ("inside", "after", "code", "says"),
    [
        ("pass", "pass", 0, ""),
        ("pass", "raise UserError('a mistake')", 2, "error: a mistake"),
        ("raise UserError('a mistake')", "pass", 2, "error: a mistake"),
        (
            "raise InterruptedRunError('leaves')",
            "pass",
            75,
            "interrupted: leaves; start the same command again to go on",
        ),
        ("pass", "os.kill(os.getpid(), signal.SIGINT); signal.pause()", 130, ""),
    ],
)
def test_a_signal_after_training_changes_no_exit_code(tmp_path, inside, after, code, says):
    (tmp_path / "command.py").write_text(STRIKES_ITSELF.format(inside=inside, after=after))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_ERROR_FILE": str(tmp_path / "word")}
    done = subprocess.run(
        [sys.executable, tmp_path / "command.py"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr.strip()) == (code, says)
    assert (tmp_path / "word").exists() == (code in (2, 75))


BUSY = """
import os, signal, sys, time
from pipeline.command import exit_on_user_error
from pipeline.errors import InterruptedRunError
from pipeline.preemption import PreemptionHandler, exit_when_asked

def main():
    sys.setswitchinterval(1000)  # the thread that reads signals has to wait, as on a busy machine
    if {early}:
        os.kill(os.getpid(), signal.SIGINT)
    try:
        with PreemptionHandler() as handler:
            if not {early}:
                os.kill(os.getpid(), signal.SIGINT)
            raise InterruptedRunError(f"leaves on {{signal.Signals(handler.signal).name}}")
    finally:
        time.sleep(1)  # and now it runs

exit_when_asked()
exit_on_user_error(main)
"""


@pytest.mark.parametrize("early", [False, True])
def test_a_signal_that_training_has_heard_is_not_taken_for_one_after_it(tmp_path, early):
    (tmp_path / "command.py").write_text(BUSY.format(early=early))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, tmp_path / "command.py"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 75, done.stderr
    assert done.stderr == "interrupted: leaves on SIGINT; start the same command again to go on\n"


FIRST_MOMENT = """
import os, signal, threading, time
from pipeline import preemption

def striking(real):
    def call(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)
    return call

{where} = striking({where})
preemption.exit_when_asked()
time.sleep({patience})
"""


@pytest.mark.parametrize("where", ["os.pipe", "threading.Thread.start"])
def test_a_signal_in_the_first_moment_is_heard(tmp_path, where):
    (tmp_path / "command.py").write_text(FIRST_MOMENT.format(where=where, patience=PATIENCE))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, tmp_path / "command.py"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 75 and "leaves on SIGTERM while starting" in done.stderr


EXHAUSTED = """
import os, resource, threading
from pipeline.command import exit_on_user_error
from pipeline.errors import UserError
from pipeline.preemption import PreemptionHandler, exit_when_asked

def main():
    with PreemptionHandler():
        {exhaust}
        raise UserError("a mistake")

def no_thread(self):
    raise RuntimeError("can't start new thread")

exit_when_asked()
exit_on_user_error(main)
"""


@pytest.mark.parametrize(
    "exhaust", ["resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))", "threading.Thread.start = no_thread"]
)
def test_an_outcome_survives_that_no_descriptor_or_thread_is_left(tmp_path, exhaust):
    (tmp_path / "command.py").write_text(EXHAUSTED.format(exhaust=exhaust))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, tmp_path / "command.py"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr.strip()) == (2, "error: a mistake")


ORPHAN = """
import os, sys, time
from pathlib import Path
from pipeline.preemption import exit_when_asked

exit_when_asked()
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep({patience})  # imports torch
"""


def test_a_rank_whose_torchrun_is_killed_while_it_starts_leaves_too(tmp_path):
    (tmp_path / "rank.py").write_text(ORPHAN.format(patience=PATIENCE))
    word = tmp_path / "word.json"
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_ERROR_FILE": str(word)
    }  # fmt: skip
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'rank.py')!r}, sys.argv[1]])"
    with subprocess.Popen([sys.executable, "-c", launcher, str(tmp_path / "pid")], env=environment) as process:
        end = time.monotonic() + PATIENCE
        while not ((file := tmp_path / "pid").exists() and file.read_text()):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.kill()
    while not (word.exists() and word.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "leaves on SIGTERM while starting" in word.read_text()


@pytest.mark.parametrize("failure", [None, ValueError])
def test_a_program_keeps_its_own_handlers(failure):
    """Whoever calls `trainer.fit` as a library goes on living, and must not be deaf then."""
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with PreemptionHandler() as handler:
            os.kill(os.getpid(), signal.SIGTERM)
            if failure:
                raise failure
    except ValueError:
        pass
    assert handler.signal == signal.SIGTERM and received()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with PreemptionHandler() as handler:
        assert handler.signal == 0


@pytest.mark.parametrize(
    ("environment", "seconds", "remedy"),
    [
        ({}, None, ""),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, None, ""),
        ({"TORCHELASTIC_RUN_ID": "1"}, 30, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
        ({"TORCHELASTIC_RUN_ID": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
        ({"LAUNCH_GRACE_SECONDS": "120", "SLURM_JOB_ID": "1"}, 120, "--warning-seconds"),
    ],
)
def test_how_long_a_launcher_waits_before_it_kills(monkeypatch, environment, seconds, remedy):
    for name in (
        "TORCHELASTIC_RUN_ID",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        "PET_SHUTDOWN_TIMEOUT",
        "LAUNCH_GRACE_SECONDS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    known = grace_period()
    assert known is None if seconds is None else isinstance(known, GracePeriod)
    if known:
        assert known.seconds == seconds and remedy in known.remedy


def test_torchruns_limit_reaches_its_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "77")
    monkeypatch.chdir(tmp_path)
    Path("tells.py").write_text(
        "from pipeline.preemption import grace_period\nprint(grace_period().seconds, flush=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "tells.py"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "77.0\n", done.stderr


@pytest.mark.parametrize("closed", [">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(tmp_path, closed):
    """Else the first files that the run opens would be the standard streams, and receive what is printed."""
    config = small_config(tmp_path / "run", optim={"epochs": 1})
    words = ["-m", "pipeline.train", "configs/demo.yaml", *override_flags(config)]
    shell = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(shell, cwd=REPOSITORY, env=environment, timeout=PATIENCE).returncode == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["progress"]["epoch"] == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(read_records(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "lock").read_text().startswith("process ")
    mistaken = [*shell, "--data.dir", tmp_path / "nowhere", "--data.loader", "reference"]
    assert subprocess.run(mistaken, cwd=REPOSITORY, env=environment, timeout=PATIENCE).returncode == 2


def test_a_mistake_is_said_by_a_rank_without_a_world(monkeypatch):
    """RANK may be left over in a shell: nobody else would say it."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    done = run_module("pipeline.train", "nowhere.yaml")
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr


SHARED_MEMORY = (
    "NCCL error in: NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \nLast error:\n"
    "Error while creating shared memory segment /dev/shm/nccl-Yx (size 33030528), error: No space left on device (28)"
)
GONE = "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.28.9"


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (
            SHARED_MEMORY,
            LocalUserError,
            r"NCCL fails on rank 1: Error while creating shared memory .*: start the container with",
        ),
        (GONE, LostContactError, "rank 1 has lost contact to another rank, .*remote process exited"),
        (f"{GONE}: out of memory", dist.DistBackendError, "out of memory"),
    ],
)
def test_what_nccl_says_of_this_rank_is_not_the_end_of_another(text, kind, said):
    """As torch raises it; no GPU has."""
    with pytest.raises(kind, match=said), lost_contact_named(World(1, 1, 2, 2, torch.device("cpu"))):
        raise dist.DistBackendError(text)
