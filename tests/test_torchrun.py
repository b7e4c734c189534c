"""Our torchrun: real processes end in one line, with the exit code of the ranks."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, REPOSITORY, override_flags, run_module, run_torchrun, small_config

from launch.status import read_status
from pipeline.config_file import to_yaml
from pipeline.run_dir import read_progress
from pipeline.weights import read_weights

pytestmark = pytest.mark.slow

# A rank in small: it imports no torch.
RANK = """
import os, signal, sys, time
from pathlib import Path
from pipeline.command import exit_on_user_error
from pipeline.errors import InterruptedRunError, UserError
from pipeline.preemption import PreemptionHandler, exit_when_asked

what, folder, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]

def main():
    with PreemptionHandler() as handler:
        (folder / rank).touch()
        while not (folder / "0").exists() or not (folder / "1").exists():
            time.sleep(0.01)
        if what == "mistake":
            raise UserError("there is no data: set data.dir")
        if what == "killed" and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if what.startswith("SIG") and rank == "0":
            os.kill(os.getppid(), signal.Signals[what])
        while not handler.signal:
            time.sleep(0.01)
        raise InterruptedRunError(f"rank {rank} leaves on {signal.Signals(handler.signal).name}")

exit_when_asked()
exit_on_user_error(main)
"""


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("mistake", 2, "error: there is no data: set data.dir"),
        ("SIGINT", 75, "interrupted: rank [01] leaves on SIGINT; start the same command again to go on"),
        ("killed", 137, "interrupted: rank 1 was ended by SIGKILL, often for lack of memory; start the same command again to "
         "go on"),
    ],
)  # fmt: skip
def test_a_run_ends_in_one_line(tmp_path, what, code, line):
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "there").mkdir()
    done = run_module("pipeline.torchrun", "--nproc-per-node=2", tmp_path / "rank.py", what, tmp_path / "there")
    assert done.returncode == code and re.fullmatch(line, done.stderr.strip()), (done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--nproc-per-node", "two", "x.py"], "error: torchrun: .*two"),
        (["--nnodes", "1:2:3", "x.py"], "error: torchrun: .*1:2:3 .*"),
    ],
)
def test_a_mistake_in_torchruns_own_words_is_one_line(words, line):
    done = run_module("pipeline.torchrun", *words)
    assert done.returncode == 2 and re.fullmatch(line, done.stderr.strip()), done.stderr


def test_a_rank_that_is_killed_makes_no_mistake_of_the_others(tmp_path):
    """The log and `launch status` tell of an interruption, after which the same command goes on."""
    config = small_config(tmp_path / "run", optim={"epochs": 500})
    words = ["configs/demo.yaml", *override_flags(config)]
    command = [
        sys.executable,
        "-m",
        "pipeline.torchrun",
        "--nproc-per-node=2",
        "-m",
        "pipeline.train",
        *map(str, words),
    ]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as launcher:
        begun, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
        while not begun.exists() or not begun.stat().st_size:
            assert launcher.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        ranks = [
            pid for pid in children_of(launcher.pid) if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")
        ]
        os.kill(ranks[0], signal.SIGKILL)
        said = launcher.communicate(timeout=PATIENCE)[1]
    assert launcher.returncode == 137 and "interrupted: rank 1 was ended by SIGKILL" in said
    status = read_status(tmp_path / "run", None)
    assert status.state == "interrupted" and "has lost contact to another rank" in status.reason
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Traceback" not in log and "error:" not in log


def children_of(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def test_the_word_of_an_earlier_start_is_not_this_ones(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    for there in ("first", "second"):  # where ranks wait for each other
        (tmp_path / there).mkdir()
    words = ["pipeline.torchrun", "--log-dir", tmp_path / "logs", "--nproc-per-node=2", tmp_path / "rank.py"]
    assert run_module(*words, "mistake", tmp_path / "first").returncode == 2
    done = run_module(*words, "SIGINT", tmp_path / "second")
    assert done.returncode == 75 and done.stderr.startswith("interrupted: "), done.stderr


def test_the_word_of_an_earlier_attempt_is_not_the_last_ones(tmp_path):
    """--max-restarts: the first attempt leaves a word, the second is killed."""
    (tmp_path / "rank.py").write_text(
        "import os, signal\n"
        "from pipeline.exits import record_for_torchrun\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    record_for_torchrun('a first mistake', 2)\n"
        "    raise SystemExit(2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_module("pipeline.torchrun", "--nproc-per-node=1", "--max-restarts=1", tmp_path / "rank.py")
    assert done.returncode == 137 and "rank 0 was ended by SIGKILL" in done.stderr, done.stderr


def test_the_line_that_nobody_reads_changes_no_exit_code(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "there").mkdir()
    command = [sys.executable, "-m", "pipeline.torchrun", "--nproc-per-node=2", str(tmp_path / "rank.py")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*command, "SIGINT", tmp_path / "there"], cwd=REPOSITORY, env=environment, stderr=writer, timeout=PATIENCE
    )
    os.close(writer)
    assert done.returncode == 75


def test_a_log_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = run_module("pipeline.torchrun", "--log-dir", tmp_path / "file", "--nproc-per-node=1", "x.py")
    assert done.returncode == 2 and re.fullmatch("error: torchrun: .*/file'\n", done.stderr)


@pytest.mark.parametrize("asked", [0, 1])
def test_two_launchers_are_one_run_that_a_signal_to_either_ends_and_both_resume(tmp_path, asked):
    """As on two machines without SLURM, here on one: the bits are those of one launcher with two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}")
    config = small_config(tmp_path / "two", optim={"epochs": 20})
    with ExitStack() as stack:

        def train() -> subprocess.Popen:
            words = ["-m", "pipeline.torchrun", *group, "-m", "pipeline.train", "configs/demo.yaml"]
            command = [sys.executable, *words, *map(str, override_flags(config))]
            launcher = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(launcher)
            stack.callback(launcher.kill)
            return launcher

        launchers = [train(), train()]
        begun, end = tmp_path / "two" / "metrics.jsonl", time.monotonic() + PATIENCE
        while not begun.exists() or not begun.stat().st_size:
            assert all(launcher.poll() is None for launcher in launchers) and time.monotonic() < end
            time.sleep(0.05)
        launchers[asked].terminate()
        said = [launcher.communicate(timeout=PATIENCE)[1] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [75, 75], said
        assert all(text.splitlines()[-1].startswith("interrupted: ") for text in said), said
        assert 0 < read_progress(tmp_path / "two")["done_steps"] < 80
        for launcher in [train(), train()]:
            said = launcher.communicate(timeout=PATIENCE)[1]
            assert launcher.returncode == 0, said
    assert read_progress(tmp_path / "two")["done_steps"] == 80
    if asked:  # once is enough
        one = small_config(tmp_path / "one", optim={"epochs": 20})
        run_module("pipeline.train", "configs/demo.yaml", *override_flags(one), ranks=2)
        expected, found = (read_weights(tmp_path / name / "checkpoints" / "last.pt") for name in ("one", "two"))
        for name, tensor in expected.network.state_dict().items():
            assert torch.equal(tensor, found.network.state_dict()[name]), name


def test_launchers_that_do_not_find_each_other_are_told_in_one_line(tmp_path):
    group = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=nowhere.invalid:29500")
    done = run_module("pipeline.torchrun", *group, "--rdzv-conf=read_timeout=1", "x.py")
    line = done.stderr.splitlines()[-1]  # torch's C++ has warned of the name before
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "do not find each other" in line and "start 2 of them, with the same --rdzv-endpoint nowhere.invalid" in line


def test_a_program_under_torchrun_may_train_twice(tmp_path):
    """In the same processes, whose ranks meet again in torchrun's store."""
    files = []
    for name in ("first", "second"):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(to_yaml(small_config(tmp_path / name, optim={"epochs": 1})))
    done = run_torchrun("tests.training_on_ranks", *files, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last (epoch 1 of 1)") == 2
