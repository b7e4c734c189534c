"""Our torchrun: real processes end in one line, with the exit code of the ranks."""

import re

import pytest
from conftest import run_module

pytestmark = pytest.mark.slow

# A rank in small: it imports no torch.
RANK = """
import os, signal, sys, time
from pathlib import Path
from pipeline.errors import InterruptedRunError, UserError, exit_on_user_error
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


def test_the_word_of_an_earlier_start_is_not_this_ones(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    for there in ("first", "second"):  # where ranks wait for each other
        (tmp_path / there).mkdir()
    words = ["pipeline.torchrun", "--log-dir", tmp_path / "logs", "--nproc-per-node=2", tmp_path / "rank.py"]
    assert run_module(*words, "mistake", tmp_path / "first").returncode == 2
    done = run_module(*words, "SIGINT", tmp_path / "second")
    assert done.returncode == 75 and done.stderr.startswith("interrupted: "), done.stderr
