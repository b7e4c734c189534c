"""Signals, hangs and changed conditions: a run leaves with a checkpoint, is ended with a reason, or is refused."""

import dataclasses
import errno
import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PATIENCE, REPOSITORY, override_flags, run_module, small_config
from test_trainer import (
    assert_equal_weights,
    assert_no_doubles_on_the_board,
    board_files_in_order,  # noqa: F401 - a fixture for every test
    comparable_records,
    last_state,
    records,
    weights,
)
from training_hooks import InterruptAfter, InterruptionError, SignalInStep

from pipeline import trainer
from pipeline.checkpoint import CheckpointFolder, load_checkpoint
from pipeline.errors import InterruptedRunError, StorageError, UserError
from pipeline.hooks import Hook, saving
from pipeline.hooks.saving import Saving
from pipeline.preemption import PreemptionHandler
from pipeline.resume import Conditions, check_same_run
from pipeline.run_dir import (
    checkpoint_checksum,
    io_as_user_error,
    is_complete,
    locked,
    make_run_dir,
    read_progress,
)
from pipeline.watchdog import Status, Watchdog, diagnose_stall

pytestmark = pytest.mark.slow  # for the most part

AGAIN = "; start the same command again to go on"
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    config = small_config(tmp_path_factory.mktemp("whole"), train={"eval_batch_size": 2})
    trainer.fit(config)
    return config


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [0, 2, 3, 4])
def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint_of_it(whole, tmp_path, number, step):
    """Four steps an epoch; without the signal only each epoch's end would be saved."""
    cut = small_config(tmp_path, train={"eval_batch_size": 2})
    handlers = [signal.getsignal(n) for n in SIGNALS]
    epoch, done = divmod(step + 1, 4) if step != 3 else (0, 4)
    with pytest.raises(
        InterruptedRunError, match=f"leaves at epoch {epoch + 1}/2, step {done}/4 of .* on {number.name}"
    ):
        trainer.fit(cut, hooks=[SignalInStep(step, number)])
    assert (last_state(cut)["progress"]["epoch"], last_state(cut)["progress"]["step"]) == (epoch, done)
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    trainer.fit(cut)
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert_equal_weights(weights(cut), weights(whole))
    assert comparable_records(cut) == comparable_records(whole)
    assert_no_doubles_on_the_board(cut)


def test_a_signal_during_validation_loses_no_training(whole, tmp_path):
    cut = small_config(tmp_path, train={"eval_batch_size": 2})

    class SignalInValidation(Hook):
        calls = 0

        def on_evaluation_batch(self, trainer):
            self.calls += 1
            if self.calls == 4:  # one before the first step, then one before each batch of the first validation
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match="epoch 1/2, step 4/4"):
        trainer.fit(cut, hooks=[SignalInValidation()])
    trainer.fit(cut)
    assert_equal_weights(weights(cut), weights(whole))
    assert last_state(cut)["progress"] == last_state(whole)["progress"]
    assert comparable_records(cut) == comparable_records(whole)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 30])
def test_a_kill_while_a_run_saves_loses_nothing(whole, tmp_path, call):
    """At any call that makes a checkpoint, a record or the status safe: the first ones, and some of later saves."""
    cut = small_config(tmp_path, train={"eval_batch_size": 2})
    words = [*override_flags(cut), "--train.checkpoint_every", 1]
    assert run_module("tests.killed_while_saving", call, "configs/demo.yaml", *words).returncode == -signal.SIGKILL
    trainer.fit(cut)
    assert_equal_weights(weights(cut), weights(whole))
    assert comparable_records(cut) == comparable_records(whole)
    assert last_state(cut)["progress"] == last_state(whole)["progress"]
    assert is_complete(tmp_path, 2)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_status_is_of_the_checkpoint_that_is_there(whole, tmp_path):
    """A kill came before it was written, or an older checkpoint was put back: a run that is to go on is not called complete."""
    run = tmp_path / "run"
    shutil.copytree(whole.run_dir, run)
    config = dataclasses.replace(whole, run_dir=str(run))
    assert is_complete(run, 2)
    status, checkpoints = (run / "status.json").read_text(), run / "checkpoints"
    (run / "status.json").write_text(status.replace(checkpoint_checksum(run), "0" * 64))  # of the save before
    assert not is_complete(run, 2) and read_progress(run) == {}
    trainer.fit(config)
    assert (run / "status.json").read_text() == status and is_complete(run, 2)
    shutil.copy(checkpoints / "best.pt", checkpoints / "last.pt")  # of epoch 1
    assert not is_complete(run, 2)

    class StatusAtStart(Hook):
        def on_step_start(self, trainer):
            self.progress = getattr(self, "progress", read_progress(run))

    hook = StatusAtStart()
    trainer.fit(config, hooks=[hook])
    assert (hook.progress["epoch"], hook.progress["done_steps"], hook.progress["complete"]) == (1, 4, False)
    assert is_complete(run, 2)
    assert_equal_weights(weights(config), weights(whole))


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), PreemptionHandler() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def same_handlers():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_the_command_ends_with_one_line_and_code_75(tmp_path):
    config = small_config(tmp_path, optim={"epochs": 1000, "milestones": [1]})
    command = [sys.executable, "-m", "pipeline.train", "configs/demo.yaml", *override_flags(config)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "checkpoints" / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    refused = run_module("pipeline.train", "configs/demo.yaml", *override_flags(config))
    assert refused.returncode == 2
    assert f"{tmp_path} is in use by process {process.pid} on" in refused.stderr.strip().splitlines()[-1]
    process.terminate()
    _, complaint = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    (line,) = complaint.strip().splitlines()
    assert line.startswith("interrupted: rank 0 leaves at epoch") and line.endswith(
        "start the same command again to go on"
    )


def test_a_run_whose_terminal_is_closed_leaves_with_a_checkpoint(tmp_path):
    config = small_config(tmp_path, optim={"epochs": 1000, "milestones": [1]}, train={"checkpoint_every": 1})
    command = [sys.executable, "-m", "pipeline.train", "configs/demo.yaml", *override_flags(config)]
    here, terminal = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # as a login shell has it
    )
    os.close(terminal)
    last = tmp_path / "checkpoints" / "last.pt"
    while not last.exists():
        assert process.poll() is None
        os.read(here, 4096)
    os.close(here)
    assert process.wait(PATIENCE) == 75
    assert load_checkpoint(last)["progress"]["step"] + load_checkpoint(last)["progress"]["epoch"] > 0


def test_a_run_whose_terminal_goes_without_a_signal_goes_on(tmp_path):
    """As one in the background that the shell has disowned."""
    config = small_config(tmp_path, optim={"epochs": 12}, train={"checkpoint_every": 1})
    command = [sys.executable, "-m", "pipeline.train", "configs/demo.yaml", *override_flags(config)]
    here, terminal = pty.openpty()
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    while not (tmp_path / "checkpoints" / "last.pt").exists():
        assert process.poll() is None
        os.read(here, 4096)
    os.close(here)
    assert process.wait(PATIENCE) == 0
    log = (tmp_path / "log.txt").read_text()
    assert "last (epoch 12 of 12)" in log and log.endswith(" ended\n")


def test_below_nohup_a_hangup_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PreemptionHandler() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_a_programs_c_code_handles_is_left_to_it(monkeypatch):
    """As R does with SIGUSR1 where Python is embedded in it."""
    real = signal.getsignal
    before = real(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGUSR1 else real(n))
        with PreemptionHandler():
            assert real(signal.SIGUSR1) is before and real(signal.SIGUSR2) is not signal.SIG_DFL


def test_all_ranks_leave_where_another_node_seems_to_hold_the_run(tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", optim={"epochs": 1})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "lock").write_text("process 7 on a-node-that-is-lost\n")
        done = run_module("pipeline.train", "configs/demo.yaml", *override_flags(config), ranks=2)
    assert done.returncode == 75 and "lost contact" not in done.stderr
    assert done.stderr.count("is in use by process 7 on a-node-that-is-lost, perhaps on a lost node") == 2


def test_a_run_directory_has_one_user_at_a_time(tmp_path, monkeypatch):
    with locked(tmp_path / "run"), pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*--run_dir"):
        locked(tmp_path / "run").__enter__()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path / "run"), pytest.raises(UserError, match="is in use by"):  # as ever, of this node
        locked(tmp_path / "run").__enter__()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "lock").write_text("process 7 on a-node-that-is-lost\n")
        with pytest.raises(InterruptedRunError, match="process 7 on a-node-that-is-lost, perhaps on a lost node"):
            locked(tmp_path / "run").__enter__()
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"optimizer": "adamx"}},
        {"model": {"name": "densenet999"}},
        {"model": {"weights": "nowhere.pth"}},
        {"data": {"loader": "reference", "dir": "nowhere"}},
    ],
)
def test_a_mistake_before_there_is_a_run_leaves_nothing(tmp_path, sections):
    config = small_config(tmp_path / "runs" / "a", **sections)
    with pytest.raises(UserError):
        trainer.fit(config)
    assert not list(tmp_path.iterdir())
    own = tmp_path / "runs" / "a" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(UserError):
        trainer.fit(config)
    assert list(own.parent.iterdir()) == [own]


def test_a_mistake_stands_in_the_log_of_a_run_or_a_job_that_is_there(tmp_path):
    run, job = tmp_path / "run", tmp_path / "job"
    trainer.fit(small_config(run, optim={"epochs": 1}))
    job.mkdir()
    (job / "starts.jsonl").write_text("{}\n")
    for folder in (run, job):
        with pytest.raises(UserError, match="adamx"):
            trainer.fit(small_config(folder, optim={"epochs": 1, "optimizer": "adamx"}))
        assert re.search(r" error: .*adamx", (folder / "log.txt").read_text())


def test_a_lock_that_a_refused_start_has_put_away_keeps_nobody_out(tmp_path, monkeypatch):
    """Its file was open here already when it went."""
    real, gone = fcntl.flock, []

    def late(file, how):
        if not gone:
            gone.append(shutil.rmtree(tmp_path / "run"))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").exists()
        with pytest.raises(UserError, match="is in use by"):
            locked(tmp_path / "run").__enter__()


@pytest.mark.parametrize(
    ("number", "checkpoints", "remedy"),
    [
        (errno.ENOSPC, True, "make room, or set --run_dir; the checkpoints in it are whole"),
        (errno.EACCES, False, "make it writable, or set --run_dir"),
        (errno.ENOTDIR, False, "set --run_dir"),
    ],
)
def test_a_directory_that_cannot_be_written_gets_the_advice_that_helps(tmp_path, number, checkpoints, remedy):
    if checkpoints:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.pt").touch()
    message = f"cannot write the run directory {tmp_path} ({os.strerror(number)}): {remedy}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"), io_as_user_error(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(StorageError, match="cannot write the run directory .*Stale"), io_as_user_error(tmp_path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with pytest.raises(UserError, match=r"^cannot make the run directory /proc/x \(.*\): set --run_dir$"):
        make_run_dir(Path("/proc/x"))


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    saved = []
    real = Saving.save
    monkeypatch.setattr(
        Saving, "save", lambda self, trainer, best: saved.append(trainer.run.progress.step) or real(self, trainer, best)
    )
    trainer.fit(small_config(tmp_path / "often", optim={"epochs": 1}, train={"checkpoint_minutes": 1e-9}))
    assert saved == [1, 2, 3, 4, 0]
    saved.clear()
    trainer.fit(small_config(tmp_path / "never", optim={"epochs": 1}, train={"checkpoint_minutes": 0}))
    assert saved == [4, 0]


class LateAgreement:
    """As `Agreement` of several ranks: the answer is of the call before."""

    def __init__(self, world):
        self.before = [0, 0]

    def exchange(self, values):
        self.before, before = list(values), self.before
        return before


def test_checkpoints_by_the_clock_are_written_once_though_ranks_agree_a_step_later(tmp_path, monkeypatch):
    saved, clock = [], [0.0]

    class Clock(Hook):
        def on_step_start(self, trainer):
            clock[0] += 24  # seconds

    monkeypatch.setattr(saving, "Agreement", LateAgreement)
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Saving, "save", lambda self, trainer, best: saved.append(trainer.run.progress.step))
    config = small_config(
        tmp_path, data={"synthetic_images": 120}, optim={"epochs": 1}, train={"checkpoint_minutes": 1}
    )
    trainer.fit(config, hooks=[Clock()])
    assert saved == [4, 7, 10, 0]  # asked for at steps 3, 6 and 9; and the epoch's end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, None])
def test_a_run_whose_reader_goes_away_leaves_with_a_checkpoint(tmp_path, number):
    """As Ctrl-C does to ``train | tee log``: both get the signal, and the step's line has no reader; or as ``train | head``."""
    config = small_config(tmp_path, optim={"epochs": 1000, "milestones": [1]}, train={"log_every": 1})
    command = [sys.executable, "-m", "pipeline.train", "configs/demo.yaml", *override_flags(config)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    while not checkpoints.last.exists():
        process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    done = checkpoints.find()[0].state["progress"]  # the one before, where a save was just renaming the files
    process.stdout.close()
    if number:
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    complaint = process.stderr.read().decode()
    (line,) = complaint.strip().splitlines()
    assert process.wait(PATIENCE) == 75 and line.startswith("interrupted: rank 0 leaves at epoch"), complaint
    assert line == (tmp_path / "log.txt").read_text().splitlines()[-1].split(" ", 2)[2] + AGAIN
    left = load_checkpoint(checkpoints.last)["progress"]
    before, after = ((progress["epoch"], progress["step"]) for progress in (done, left))
    # A signal may come when nothing is new since the last checkpoint; a line that has no reader comes after a step.
    assert after >= before if number else after > before and "on SIGPIPE;" in line


HANGS = """
import sys, threading, time
from pipeline.distributed import init_distributed
from pipeline.watchdog import Watchdog
with init_distributed("cpu") as world, Watchdog(world, patience=15) as watchdog:
    for step in range(4):
        watchdog.beat(f"step {step}")
        time.sleep(1)
    if world.rank == world.size - 1:
        time.sleep(36000)
    time.sleep(5)  # of two ranks the one that hangs is surely the first to be silent for so long
    watchdog.beat("waiting for all")
    world.all_reduce_max([1])
"""


def test_a_run_is_watched_from_its_first_step_on(tmp_path, monkeypatch):
    watched = []

    class Watched(Watchdog):
        def __enter__(self):
            watched.append(self._limit)
            return super().__enter__()

    monkeypatch.setattr(trainer, "Watchdog", Watched)
    trainer.fit(small_config(tmp_path, optim={"epochs": 1}, train={"heartbeat_timeout": 1234}))
    assert watched == [1234]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_hangs_is_named_and_ends_in_time(tmp_path, ranks):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *launcher, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == (75 if ranks == 1 else 1)
    assert f"rank {ranks - 1}: no progress for 15 s in 'step 3'" in done.stderr and "hangs.py" in done.stderr
    if ranks == 2:
        assert "rank 1 (process" in done.stderr and "is behind, in 'step 3'" in done.stderr
        assert "exitcode  : 75" in done.stderr


def test_a_rank_that_hangs_ends_though_nobody_reads_what_it_says(tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    process = subprocess.Popen([sys.executable, tmp_path / "hangs.py"], env=environment, stderr=subprocess.PIPE)
    process.stderr.close()
    assert process.wait(PATIENCE) == 75 and "no progress for 15 s" in (tmp_path / "error.json").read_text()


def test_blame():
    def status(beats: int, ticks: int = 5) -> Status:
        return Status(ticks, beats, f"step {beats}", "node1", 1000 + beats)

    before = [status(7), status(7), status(6), status(7)]
    after = [status(7, 8), status(7, 8), status(6, 8), status(7, 8)]
    assert diagnose_stall(before, after, reader=0) == "rank 2 (process 1006 on node1) is behind, in 'step 6'"
    after[3] = before[3]
    assert "rank 3 (process 1007 on node1) does not respond, last seen in 'step 7'" in diagnose_stall(
        before, after, reader=0
    )
    assert diagnose_stall(before[:2], after[:2], reader=0) == "no rank is behind another"
    assert diagnose_stall([], [], reader=0) == "no rank is behind another"


SAME = {"classes": ["cat", "dog"], "fingerprint": "a" * 64, "images": [10, 4], "loader": "dali", "ranks": 2}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"classes": ["cat", "dgo"]}, "classes were 2 with 'dog' in place 1 and are now 2 with 'dgo'"),
        ({"classes": ["cat", "dog", "eel"]}, "classes were 2 with 'none' in place 2 and are now 3 with 'eel'"),
        (
            {"fingerprint": "b" * 64},
            "were 10 \\+ 4 images with the fingerprint aaaaaaaaaaaa and are now .* bbbbbbbbbbbb",
        ),
        ({"loader": "reference"}, "data.loader was dali and is now reference"),
        (
            {"ranks": 3},
            "a batch was 2 ranks x 1 accumulation step "
            "and is now 3 ranks x 1 accumulation step; .*--train.allow_world_size_change",
        ),
    ],
)
def test_changed_conditions_are_refused_with_both_values(tmp_path, change, expected):
    config = small_config(tmp_path)
    trainer.fit(config)
    state = load_checkpoint(tmp_path / "checkpoints" / "last.pt") | {"conditions": SAME}
    check_same_run(state, config, Conditions(**SAME))
    with pytest.raises(UserError, match=expected):
        check_same_run(state, config, Conditions(**(SAME | change)))


def test_another_number_of_ranks_goes_on_in_mid_epoch_on_request(tmp_path):
    config = small_config(tmp_path, optim={"epochs": 1}, train={"checkpoint_every": 1})
    with pytest.raises(InterruptionError):
        trainer.fit(config, hooks=[InterruptAfter(3)])
    words = ["configs/demo.yaml", *override_flags(config)]
    refused = run_module("pipeline.train", *words, ranks=2)
    assert (
        refused.returncode == 2
        and "a batch was 1 rank x 1 accumulation step and is now 2 ranks x 1 accumulation step" in refused.stderr
    )
    done = run_module("pipeline.train", *words, "--train.allow_world_size_change", "true", ranks=2)
    assert done.returncode == 0, done.stderr
    said = "from epoch 1 on (after 3 steps of the run), a batch is 2 ranks x 1 accumulation step; before, 1 rank x 1"
    assert said in done.stdout
    assert [record["step"] for record in records(config)] == [2, 4, 4]
    assert records(config)[-1]["epoch/skipped_images"] == 0  # one rank's sums and two ranks' are all 46 images
