"""What `launch status` and `launch logs` tell of runs, whoever has started them, and whose turn it is on this machine."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import REPOSITORY, override_flags, small_config

from launch.__main__ import look_after, start
from launch.cluster import Cluster
from launch.local import Controller
from launch.rank import main as start_rank
from launch.records import (
    CANCEL,
    Job,
    add_event,
    config_file,
    find_job,
    is_cancelled,
    read_events,
    write_job,
    write_submission,
)
from launch.status import logs_of, read_status, runs_below, to_text
from launch.turns import gpus_for_part, has_turn, part_of, take_part, take_turn
from pipeline import trainer
from pipeline.config_file import to_yaml
from pipeline.errors import InterruptedRunError, UserError
from pipeline.run_dir import locked

TIME = "2026-11-26 00:10:20 "
BEGIN = (
    f"{TIME}started: python -m pipeline.train a.yaml (process 7 on vm, 2 ranks)\n{TIME}epoch 1/2, step 2/4: loss 1\n"
)


def run_of_torchrun(run: Path, log: str | None) -> Path:
    """A run's directory after its first epoch, as a training leaves it that python -m launch has not started."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(small_config(run)))
    records = [
        {"step": 2, "epochs": 0.5, "speed/images_per_second": 40.0, "speed/remaining_seconds": 7300.0},
        {"step": 4, "epochs": 1.0, "val/loss": 1.0, "val/top1_error": 12.5, "val/top5_error": 1.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "status.json").write_text('{"epoch": 1, "epochs": 2, "step": 0, "complete": false}')
    if log is not None:
        (run / "log.txt").write_text(log)
    return run


@pytest.mark.parametrize(
    ("log", "state", "attempts", "reason"),
    [
        (f"{BEGIN}{TIME}ended\n", "done", 1, ""),
        (f"{BEGIN}{TIME}error: a.jpg is damaged\n", "stopped", 1, "a.jpg is damaged"),
        (f"{BEGIN}{TIME}rank 1: error: b.jpg is damaged\n", "stopped", 1, "b.jpg is damaged"),
        (f"{BEGIN}{TIME}interrupted: rank 0 leaves\n", "interrupted", 1, "rank 0 leaves"),
        (f"{BEGIN}{TIME}ended\n{BEGIN}", "gone", 2, "its process ended without a word"),
        (f"{BEGIN}{TIME}error: once\n{BEGIN}{TIME}ended\n", "done", 2, ""),
        (None, "gone", 0, "its process ended without a word"),
    ],
)
def test_the_state_of_a_run_that_torchrun_has_started(tmp_path, log, state, attempts, reason):
    run = run_of_torchrun(tmp_path / "runs" / "a", log)
    assert runs_below(tmp_path / "runs") == runs_below(run) == [run]
    status = read_status(run, {})
    assert (status.state, status.attempts, status.job) == (state, attempts, None) and status.reason.startswith(reason)
    assert (status.epoch, status.epochs, status.step) == (1, 2, 4)
    _, *cells = re.split("  +", to_text([status]).splitlines()[1])
    remaining = "0 s" if state == "done" else "2 h 2 min"
    assert cells == ["-", state, str(attempts), "1/2", "4", "12.50", "12.50 (1)", "40.0", remaining, "-"]


def test_errors_say_whose_they_are_and_the_speed_is_that_of_the_last_lines(tmp_path):
    """The best epoch is the first of the least error, as `best.pt` is; AUROC that is not defined (null) is passed over."""
    run = run_of_torchrun(tmp_path / "a", f"{BEGIN}{TIME}ended\n")
    speeds = [20.0, 21.0, 22.0, 100.0, 104.0, 90.0, 108.0]
    records = [{"step": i + 1, "epochs": 0.1, "speed/images_per_second": speed} for i, speed in enumerate(speeds)]
    errors, aurocs = [50.0, 43.33, 44.17, 43.33, 44.0], [None, 0.6, None, 0.9, None]
    for epochs, (error, auroc) in enumerate(zip(errors, aurocs, strict=True), start=1):
        records.append({"step": 9, "epochs": epochs, "val/loss": 1, "val/top1_error": error, "val/mean_auroc": auroc})

    def shown(count: int) -> list[str]:
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:count]))
        head, row = (re.split("  +", line) for line in to_text([read_status(run, {})]).splitlines())
        titles = ("last top-1 error %", "best (epoch)", "last mean AUROC", "best AUROC (epoch)", "images/s")
        return [dict(zip(head, row, strict=True)).get(title, "") for title in titles]

    assert shown(6) == ["-", "-", "", "", "90.0"]  # of 21, 22, 90, 100 and 104
    assert shown(8) == ["50.00", "50.00 (1)", "-", "-", "100.0"]
    assert shown(12) == ["44.00", "43.33 (2)", "-", "0.9000 (4)", "100.0"]
    records = records[:4]
    assert shown(4)[-1] == "21.5"  # of an even number the mean of the two in the middle


@pytest.mark.slow
def test_errors_of_different_images_are_told_apart(tmp_path):
    """By what the runs themselves have saved."""
    small = {"epochs": 1}
    for name, images in (("a", 12), ("b", 16), ("c", 12)):
        trainer.fit(small_config(tmp_path / name, data={"synthetic_images": 4 * images}, optim=small))
    a, b, c = (read_status(tmp_path / name, {}) for name in "abc")
    assert "same images" not in to_text([a, c])
    *_, line = to_text([a, b, c]).splitlines()
    assert line.endswith(f", and errors compare within a group only: {a.run_dir}, {c.run_dir} | {b.run_dir}")


def test_the_last_minute_is_not_told_to_the_second(tmp_path):
    """What is left then is validation and saving, and the last log line may be old."""
    run = run_of_torchrun(tmp_path / "a", BEGIN)
    (run / "metrics.jsonl").write_text(
        '{"step": 4, "epochs": 1, "speed/images_per_second": 9, "speed/remaining_seconds": 0.2}\n'
    )
    assert "  < 1 min  " in to_text([read_status(run, {})])


def test_a_run_that_trains_now_is_running(tmp_path):
    run = run_of_torchrun(tmp_path / "a", BEGIN)
    with locked(run):
        assert read_status(run, {}).state == "running"
    (run / "lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")  # which is not training there
    assert read_status(run, {}).state == "gone"
    (run / "lock").write_text("process 1 on elsewhere")
    status = read_status(run, {})
    assert (status.state, status.nodes) == (
        "running",
        "elsewhere",
    ) and "seen from here by its files alone" in status.reason
    os.utime(run / "log.txt", (0, 0))
    os.utime(run / "metrics.jsonl", (0, 0))
    assert read_status(run, {}).state == "gone"


@pytest.mark.parametrize("starter", ["torchrun", "launch"])
def test_a_complete_run_is_done_whatever_it_refused_later(tmp_path, starter):
    refusal = "the data in b were others"
    run = run_of_torchrun(tmp_path / "a", f"{BEGIN}{TIME}ended\n{BEGIN}{TIME}error: {refusal}\n")
    if starter == "launch":
        write_job(run, Job("7", "slurm", "elsewhere", str(tmp_path)))
        add_event(run, "submit", job="7", cluster={})
        add_event(run, "start", start="7.0", job="7", machines="node1")
        ended = {"what": "stopped", "why": "needs a person", "message": refusal, "cause": "mistake"}
        add_event(run, "end", start="7.0", job="7", **ended)
        (run / "submitted.yaml").write_text(to_yaml(small_config(run, optim={"epochs": 9})))  # which it refused
    assert read_status(run, {}).state == "stopped"
    (run / "status.json").write_text('{"epoch": 2, "epochs": 2, "step": 0, "done_steps": 8, "complete": true}')
    status = read_status(run, {})
    assert (status.state, status.epochs, status.remaining, status.step) == ("done", 2, 0.0, 8)
    assert "it is complete; a later start was stopped" in status.reason and status.reason.endswith(refusal)
    (run / "config.yaml").write_text(to_yaml(small_config(run, optim={"epochs": 9})))  # accepted: there is more to do
    assert read_status(run, {}).state == "stopped"


def test_an_interrupted_run_shows_the_steps_of_its_checkpoint(tmp_path):
    """Which lies between two records. A damaged file, or one of an earlier version, says nothing."""
    run = run_of_torchrun(tmp_path / "a", f"{BEGIN}{TIME}interrupted: rank 0 leaves\n")
    for text, step in (('{"epoch": 1, "done_steps": 7}', 7), ('{"done_steps": 3}', 4), ("[]", 4), ("{", 4), ("{}", 4)):
        (run / "status.json").write_text(text)
        assert read_status(run, {}).step == step


def test_a_run_that_lost_steps_says_which_it_will_do_again(tmp_path):
    """A kill comes after the last checkpoint, or before the first; what has saved as it left has lost nothing. Nothing is said
    where checkpoints were lost or are not known: a start may refuse."""
    run = run_of_torchrun(tmp_path / "a", BEGIN)
    (run / "status.json").unlink()
    assert not read_status(run, {}).steps_lost  # an epoch's record says that there was a checkpoint
    (run / "metrics.jsonl").write_text('{"step": 4, "epochs": 0.5, "speed/images_per_second": 9}\n')
    for said in ('{"epoch": 0, "epochs": 2, "step": 3}', '{"epoch": 0, "epochs": 2, "done_steps": 3}'):
        (run / "status.json").write_text(said)
        assert not read_status(run, {}).steps_lost  # so does this
    (run / "status.json").unlink()
    assert read_status(run, {}).steps_lost == "it had saved no checkpoint, so that a start does all its steps again"
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.pt").write_bytes(b"of an epoch")
    assert not read_status(run, {}).steps_lost
    (run / "checkpoints" / "last.pt").write_bytes(b"of its third step")
    (run / "status.json").write_text('{"epoch": 0, "epochs": 2, "done_steps": 3}')
    again = "its last checkpoint is of step 3, so that a start does those after it again"
    assert read_status(run, {}).steps_lost == again and to_text([read_status(run, {})]).endswith(f"{run}: {again}")
    with locked(run):
        assert not read_status(run, {}).steps_lost  # it trains
    for text in ('{"epoch": 1, "epochs": 2, "done_steps": 4}', "{"):  # nothing lost; not known
        (run / "status.json").write_text(text)
        assert not read_status(run, {}).steps_lost


def test_a_run_that_failed_before_it_was_described_is_listed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.txt").write_text(f"{BEGIN}{TIME}error: no data\n")
    status = read_status(tmp_path / "a", {})
    assert status.epochs is None and " 0/- " in to_text([status]) and to_text([status]).endswith("a: no data")


def test_what_is_no_run_is_refused_and_a_run_of_torchrun_is_not_cancelled(tmp_path):
    with pytest.raises(UserError, match="no run's directory, nor a folder of runs"):
        runs_below(tmp_path)
    run = run_of_torchrun(tmp_path / "a", BEGIN)
    for verb in ("cancel", "resume"):
        with pytest.raises(UserError, match="not started by python -m launch|was never submitted .*: its own command"):
            look_after(verb, [str(run)])


def test_a_grids_base_name_stands_for_its_runs_where_nothing_is_changed(tmp_path, capsys):
    for name in ("grid-lr0.1", "grid-lr0.2", "grids-lr0.1"):
        run_of_torchrun(tmp_path / name, f"{BEGIN}{TIME}ended\n")
    (tmp_path / "grid-notes").mkdir()
    look_after("status", [str(tmp_path / "grid")])
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 3 and "/grid-lr0.1 " in said and "/grid-lr0.2 " in said
    again = os.path.relpath(tmp_path / "grid-lr0.1")
    look_after("status", [str(tmp_path / "grids-lr0.1"), str(tmp_path), again])
    rows = capsys.readouterr().out.splitlines()[1:]  # each run once
    assert [row.split()[0].rsplit("/")[-1] for row in rows] == ["grids-lr0.1", "grid-lr0.1", "grid-lr0.2"]
    look_after("logs", [str(tmp_path / "grid")])
    assert "grid-lr0.2 log: 2026" in capsys.readouterr().out
    for folder in ("x", "y"):
        run_of_torchrun(tmp_path / folder / "job", f"{BEGIN}{TIME}ended\n")
    look_after("logs", [str(tmp_path / "x" / "job"), str(tmp_path / "y")])
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {
        f"{tmp_path}/x/job",
        f"{tmp_path}/y/job",
    }
    for verb in ("cancel", "resume"):  # a name that is one by mistake must not end another's run
        with pytest.raises(UserError, match=r"grid is no run's directory; of that name there are \S+0.1, \S+0.2$"):
            look_after(verb, [str(tmp_path / "grid")])


def test_a_name_without_a_run_hides_no_other_and_changes_none(tmp_path, capsys, monkeypatch):
    run = run_of_torchrun(tmp_path / "a", f"{BEGIN}{TIME}ended\n")
    names = [str(tmp_path / "b"), str(run), str(tmp_path / "c")]
    for verb, row in (("status", f"\n{run} "), ("logs", "log: 2026")):
        with pytest.raises(UserError, match="c is no run's directory"):
            look_after(verb, names)
        said = capsys.readouterr()
        assert row in said.out and said.err.startswith(f"error: {tmp_path / 'b'} is no run's directory")
    monkeypatch.setattr("launch.__main__.resume_all", lambda runs: pytest.fail("resumed"))
    with pytest.raises(UserError, match="c is no run's directory"):
        look_after("resume", names)


def submitted(run: Path, kind: str = "local", host: str | None = None, cluster: Cluster | None = None, **job) -> Path:
    """A run that was submitted, and of which nothing more is known."""
    run.mkdir(parents=True, exist_ok=True)
    host = os.uname().nodename if host is None else host
    write_job(run, Job(**{"id": str(os.getpid()), "kind": kind, "host": host, "folder": ""} | job))
    (run / "submitted.yaml").write_text(to_yaml(small_config(run)))
    add_event(
        run, "submit", job=job.get("id", str(os.getpid())), cluster=dataclasses.asdict(cluster or Cluster(kind=kind))
    )
    return run


def test_a_job_that_waited_and_has_gone_is_not_waited_for_nor_another_process_signalled(tmp_path, capsys, monkeypatch):
    """As after a reboot, when its number may be another process's: here that of the tests."""
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signalled"))
    run = submitted(tmp_path / "a")
    assert read_status(run, None).state == "gone"
    look_after("cancel", [str(run)])
    assert "has ended already (gone)" in capsys.readouterr().out
    with (
        locked(run),
        pytest.raises(UserError, match=rf"its job \d+ has gone: kill {os.getpid()} ends it with"),
    ):
        look_after("cancel", [str(run)])  # trained by hand


def test_a_queue_that_does_not_answer_makes_no_job_gone(tmp_path, monkeypatch, capsys):
    """As while SLURM's controller restarts: a job that waits since long ago would be submitted a second time."""
    run = submitted(tmp_path / "a", kind="slurm", id="7")
    add_event(run, "start", start="7.0", job="7")
    add_event(run, "end", start="7.0", job="7", what="again", why="warned of the time limit", message="")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho unable to contact slurm controller >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("launch.__main__.submit", lambda *_: pytest.fail("submitted"))
    other = run_of_torchrun(tmp_path / "b", f"{BEGIN}{TIME}ended\n")
    for verb in ("status", "cancel", "resume"):
        with pytest.raises(UserError, match="squeue does not answer: unable to contact slurm controller"):
            look_after(verb, [str(run), *([str(other)] if verb == "status" else [])])
    assert re.search(rf"{other} +- +done", capsys.readouterr().out)  # of which SLURM knows nothing
    assert read_events(run)[-1]["event"] == "end"


def test_a_cancel_is_of_the_submission_it_was_said_to(tmp_path):
    """Numbers of processes come again, from container to container above all."""
    run = submitted(tmp_path / "a", id="17")
    add_event(run, CANCEL, job="17")
    assert is_cancelled(read_events(run), "17")
    submitted(run, id="17")
    assert not is_cancelled(read_events(run), "17")


def test_the_ranks_of_a_cancelled_job_that_slurm_requeues_leave_at_once(tmp_path, monkeypatch):
    """When it was cancelled it had no ranks that a signal could reach."""
    run, folder = submitted(tmp_path / "a", kind="slurm", id="7"), tmp_path / "jobs" / "1"
    folder.mkdir(parents=True)
    write_submission(folder, [str(run)], ranks=1, seconds=600, warning=60, failures=3)
    monkeypatch.setattr("sys.argv", ["rank", str(folder / "7")])
    for name, value in dict(
        SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_JOB_NODELIST="a", SLURM_RESTART_COUNT="1"
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    trained = []
    monkeypatch.setattr("submitit.core.submission.process_job", trained.append)
    start_rank()
    assert len(trained) == 1
    add_event(run, CANCEL, job="7")
    with pytest.raises(InterruptedRunError, match="job 7 was cancelled before its ranks began"):
        start_rank()
    assert len(trained) == 1


def test_a_cancel_that_fails_does_not_end_the_run_later(tmp_path, monkeypatch):
    run = submitted(tmp_path / "a", kind="slurm", id="7")
    (scancel := tmp_path / "scancel").write_text("#!/bin/sh\necho access denied >&2\nexit 1\n")
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("launch.__main__.slurm_queue", lambda: {"7": ("RUNNING", "a", "")})
    with pytest.raises(UserError, match="a goes on: scancel 7: access denied"):
        look_after("cancel", [str(run)])
    assert not is_cancelled(read_events(run), "7") and read_status(run, {}).state == "gone"
    assert read_status(run, None).state == "submitted"  # as before
    scancel.write_text("#!/bin/sh\n")
    look_after("cancel", [str(run)])
    assert is_cancelled(read_events(run), "7") and read_status(run, {}).state == "cancelled"

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("launch.__main__.add_event", refused)  # of a colleague's run; to root every file is open
    with pytest.raises(UserError, match=r"a cannot be written \(Permission denied\): its owner can cancel it"):
        look_after("cancel", [str(run)])


def test_a_job_of_an_earlier_version_is_known(tmp_path):
    (tmp_path / "job.json").write_text(
        '{"id": "7", "kind": "slurm", "host": "a", "folder": "b", "ranks": 4, "failures": 3}'
    )
    assert find_job(tmp_path) == Job("7", "slurm", "a", "b")
    (tmp_path / "job.json").write_text('{"id": "7"}')
    with pytest.raises(UserError, match="is damaged, or of another version"):
        find_job(tmp_path)


def test_an_event_after_one_that_a_crash_has_cut_short_is_kept(tmp_path):
    add_event(tmp_path, "start", job="1")
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"event": "en')
    for event in ("submit", "start"):
        add_event(tmp_path, event, job="2")
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "submit", "start"]
    assert (tmp_path / "starts.jsonl").read_text().count("\n") == 4


def test_the_mistake_of_a_rank_is_why_the_others_have_lost_contact_to_it(tmp_path):
    ends = (
        f"{TIME}rank 1: error: a.jpg is damaged: mend it\n{TIME}interrupted: rank 0 has lost contact to another rank\n"
    )
    status = read_status(run_of_torchrun(tmp_path / "run", f"{BEGIN}{ends}"), None)
    assert (status.state, status.reason) == ("stopped", "a.jpg is damaged: mend it")


def test_a_run_is_known_by_whatever_link_leads_to_it(tmp_path):
    """Its controller was given another path."""
    run = tmp_path / "scratch" / "a"
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    with subprocess.Popen([sys.executable, "-c", "input()", str(run)], stdin=subprocess.PIPE) as controller:
        submitted(run, id=str(controller.pid))
        assert read_status(tmp_path / "runs" / "a", None).state == read_status(run, None).state == "pending"
        controller.communicate(b"\n")
    assert read_status(tmp_path / "runs" / "a", None).state == "gone"


def test_a_job_that_cannot_be_seen_from_here_is_not_called_gone(tmp_path, monkeypatch):
    run, slurms = submitted(tmp_path / "a", host="elsewhere"), submitted(tmp_path / "b", kind="slurm", id="7")
    states = [(read_status(run, None).state), *(read_status(slurms, queue).state for queue in (None, {}))]
    assert states == ["submitted", "submitted", "gone"]
    assert read_status(slurms, {"7": ("CANCELLED", "", "")}).state == "cancelled"
    monkeypatch.setattr("launch.__main__.slurm_queue", lambda: None)
    monkeypatch.setattr("launch.__main__.submit", lambda *_: pytest.fail("submitted"))
    for trained in (run, slurms):
        add_event(trained, "start", start="7.0", job="7", machines="elsewhere")
        (trained / "lock").write_text("process 1 on elsewhere\n")
        (trained / "log.txt").write_text(BEGIN)
        status = read_status(trained, None)
        assert (status.state, status.nodes) == ("running", "elsewhere") and "by its files alone" in status.reason
        with pytest.raises(UserError, match=r"which is running \(seen from here .*\): cancel it"):
            look_after("resume", [str(trained)])
    assert read_status(slurms, {}).state == "gone"  # the queue would know it
    monkeypatch.setattr(os, "getuid", lambda: 4711)  # but not of another user
    assert read_status(slurms, {}).state == "running"
    with pytest.raises(UserError, match="no SLURM on this machine: cancel it where there is"):
        monkeypatch.setenv("PATH", str(tmp_path))
        look_after("cancel", [str(slurms)])


def test_a_run_that_was_moved_is_resumed_where_it_is_and_turns_are_kept(tmp_path, monkeypatch):
    groups = []
    monkeypatch.setattr("launch.__main__.submit", lambda configs, _: groups.append(configs) or [])
    monkeypatch.setattr("launch.__main__.report", lambda *_: None)
    monkeypatch.setattr("launch.__main__.slurm_queue", lambda: {})
    for name, parallel in (("a", 2), ("b", 2), ("c", None)):
        submitted(tmp_path / "before" / name, kind="slurm", id=name, cluster=Cluster(parallel=parallel))
    (tmp_path / "before").rename(tmp_path / "now")
    look_after("resume", [str(tmp_path / "now")])
    assert [[config.run_dir for config in configs] for configs in groups] == [
        [str(tmp_path / "now" / "a"), str(tmp_path / "now" / "b")],
        [str(tmp_path / "now" / "c")],
    ]


def test_what_was_submitted_last_is_resumed_unless_the_training_has_refused_it(tmp_path, monkeypatch):
    groups = []
    monkeypatch.setattr("launch.__main__.submit", lambda configs, _: groups.append(configs) or [])
    monkeypatch.setattr("launch.__main__.report", lambda *_: None)
    run = submitted(tmp_path / "a")
    (run / "config.yaml").write_text(to_yaml(small_config(run)))
    os.utime(run / "config.yaml", (0, 0))  # of the attempts before
    (run / "submitted.yaml").write_text(to_yaml(small_config(run, optim={"epochs": 9})))
    (run / "status.json").write_text('{"epoch": 2, "epochs": 2, "step": 0, "done_steps": 8, "complete": true}')
    line = '{"step": 8, "epochs": 2, "speed/images_per_second": 9, "speed/remaining_seconds": 0.2}\n'
    (run / "metrics.jsonl").write_text(line)
    status = read_status(run, None)
    assert (status.epochs, status.remaining) == (9, None)  # the time that was left was to another end
    look_after("resume", [str(run)])
    add_event(run, "start", start="1.0", job="1", machines="a")
    add_event(run, "end", start="1.0", job="1", what="again", why="", message="", cause="failed")
    look_after("resume", [str(run)])  # it died before the training had accepted it
    add_event(run, "end", start="1.0", job="1", what="stopped", why="", message="", cause="mistake")
    look_after("resume", [str(run)])  # refused: the run is as it was, complete
    assert [[config.optim.epochs for config in configs] for configs in groups] == [[9], [9]]
    os.utime(run / "config.yaml")  # accepted
    assert read_status(run, None).epochs == 2


def test_what_cannot_be_read_of_one_run_hides_no_other(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        run_of_torchrun(tmp_path / name, f"{BEGIN}{TIME}ended\n")
    (tmp_path / "a" / "config.yaml").write_text("model: {colour: red}\n")  # of a later version
    (tmp_path / "b" / "metrics.jsonl").write_text('{"loss": 1.5}\n{"step": 1, "val/loss": 1.5}\n')  # of another program
    (tmp_path / "lost+found").mkdir()
    real = os.stat

    def refusing(path, *arguments, **options):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(tmp_path / "lost+found" / "")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refusing)
    submitted(tmp_path / "c")
    (tmp_path / "c" / "job.json").write_text('{"id": "7", "color": "red"}')
    with pytest.raises(UserError, match="c/job.json is damaged, or of another version"):
        look_after("status", [str(tmp_path)])
    _, a, b, reason = capsys.readouterr().out.splitlines()
    assert a.split()[2] == b.split()[2] == "done" and reason.startswith(f"{tmp_path / 'a'}: ") and "colour" in reason


def test_a_directory_where_something_trains_takes_no_job(tmp_path):
    run = run_of_torchrun(tmp_path / "a", BEGIN)
    words = ["configs/demo.yaml", "--cluster", "local", "--run_dir", str(run), "--data.loader", "synthetic"]
    with (
        locked(run),
        pytest.raises(UserError, match=rf"a is trained by process {os.getpid()} on \S+: wait for its end"),
    ):
        start([*words, "--data.dataset", "images"])


def test_resume_starts_no_job_for_a_complete_run(tmp_path, capsys, monkeypatch):
    submitted = []
    monkeypatch.setattr("launch.__main__.submit", lambda configs, _: submitted.extend(configs) or [])
    monkeypatch.setattr("launch.__main__.report", lambda *_: None)
    for name, complete in (("whole", "true"), ("part", "false")):
        run = run_of_torchrun(tmp_path / name, f"{BEGIN}{TIME}ended\n")
        write_job(run, Job("7", "local", "elsewhere", str(tmp_path)))
        (run / "submitted.yaml").write_text(to_yaml(small_config(run)))
        add_event(run, "submit", job="7", cluster=dataclasses.asdict(Cluster(kind="local")))
        add_event(run, "cancel", job="7")
        (run / "status.json").write_text(f'{{"epoch": 2, "epochs": 2, "step": 0, "complete": {complete}}}')
    look_after("resume", [str(tmp_path)])
    assert [config.run_dir for config in submitted] == [str(tmp_path / "part")]
    said = capsys.readouterr().out
    line = f"{tmp_path / 'whole'}: is complete (2 epochs), and nothing is left to train"
    assert line in said and "part" not in said
    submitted.clear()
    part, never = tmp_path / "part", run_of_torchrun(tmp_path / "never", BEGIN)
    look_after("resume", [os.path.relpath(part), str(part), str(tmp_path / "whole" / ".." / "part")])
    assert len(submitted) == 1  # two jobs would train in one directory
    with pytest.raises(UserError, match="never"):
        look_after("resume", [str(part), str(never)])

    # The same configuration submitted again is complete too, with more epochs it is not; another one is refused, and no other
    # run of the command with it.
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("launch.__main__.describe", lambda *_: "")
    words = ["configs/demo.yaml", *override_flags(small_config(tmp_path / "whole")), "--cluster", "local"]
    for more in ((), ("--data.dir", "/elsewhere", "--train.log_every", "7"), ("--optim.epochs", "3")):
        submitted.clear()
        start([*words, *more])
        assert len(submitted) == ("3" in more)
        assert (line in capsys.readouterr().out) == ("3" not in more)
    submitted.clear()
    others = {
        ("--optim.epochs", "1"): "optim.epochs was 2 and is now 1",
        ("--model.name", "densenet121"): "model.name was densenet_bc22_k8 and is now densenet121",
        ("--model.weights", "w.pth"): f"model.weights was none and is now {REPOSITORY / 'w.pth'}",
        ("--optim.lr", "0.3"): "optim.lr was 0.1 and is now 0.3",
    }
    for more, change in others.items():
        told = f"{tmp_path / 'whole'} is complete (2 epochs) as another run than this one ({change}"
        with pytest.raises(UserError, match=re.escape(told)):
            start([*words, *more])
    (tmp_path / "grid-lr0.3").symlink_to(tmp_path / "whole")
    words[words.index("--run_dir") + 1] = str(tmp_path / "grid")
    i = words.index("--optim.lr") if "--optim.lr" in words else len(words)
    start([*words[:i], *words[i + 2 :], "--grid", "optim.lr=0.3,0.4"])
    assert [config.optim.lr for config in submitted] == [
        0.4
    ] and "optim.lr was 0.1 and is now 0.3" in capsys.readouterr().err


def test_logs_are_of_all_submissions_in_order(tmp_path, capsys):
    run = run_of_torchrun(tmp_path / "run", f"{BEGIN}{TIME}ended\n")
    assert logs_of(run) == [("log", run / "log.txt")]
    for job, folder in (("9", "first"), ("4_1", "second")):
        (tmp_path / folder).mkdir()
        for rank in (0, 1):
            (tmp_path / folder / f"{job}_{rank}_log.out").write_text(f"{folder} {rank}\n")
        write_job(run, Job(job, "local", "vm", str(tmp_path / folder)))
        add_event(run, "submit", job=job, folder=str(tmp_path / folder), cluster=dataclasses.asdict(Cluster()))
        add_event(run, "start", start=f"{job}.0", job=job)
    assert [(whose, file.parent.name) for whose, file in logs_of(run)] == [
        ("log", run.name), ("0", "first"), ("1", "first"), ("0", "second"), ("1", "second"),
    ]  # fmt: skip
    look_after("logs", [str(run)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("log: 2026") and said[-4:] == ["0: first 0", "1: first 1", "0: second 0", "1: second 1"]
    (run / "log.txt").write_text(BEGIN.replace("pipeline.train", "launch.rank"))  # what the job's own logs have too
    assert ("log", run / "log.txt") not in logs_of(run)


def test_runs_take_turns_in_their_order(tmp_path):
    streams = [take_turn(tmp_path, index) for index in range(4)]
    assert [has_turn(tmp_path, index, parallel=1) for index in range(4)] == [True, False, False, False]
    assert [has_turn(tmp_path, index, parallel=2) for index in range(4)] == [True, True, False, False]
    streams[1].close()  # it has ended
    assert [has_turn(tmp_path, index, parallel=2) for index in range(4)] == [True, True, True, False]
    with subprocess.Popen(["sleep", "600"], pass_fds=[streams[0].fileno()]) as heir:
        streams[0].close()
        assert not has_turn(tmp_path, 2, parallel=1)
        heir.kill()  # a controller that dies passes its turn on
        heir.wait()
    assert has_turn(tmp_path, 2, parallel=1) and not has_turn(tmp_path, 3, parallel=1)


def test_runs_that_train_at_once_share_the_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [part_of(range(7), part, 2) for part in range(2)] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [part_of([4], part, 3) for part in range(3)] == [[4]] * 3 and part_of([], 0, 2) == []
    assert [gpus_for_part(4, part, 2) for part in range(2)] == ["0,1", "2,3"]
    assert [gpus_for_part(2, part, 3) for part in range(3)] == ["0", "0", "1"] and gpus_for_part(0, 0, 2) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a,7")
    assert [gpus_for_part(8, part, 3) for part in range(3)] == ["5", "GPU-a", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_for_part(8, 0, 2) is None

    monkeypatch.setattr("launch.local.usable_cores", lambda: [0, 1, 2, 3])
    kept = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: kept.append(cores))
    write_submission(tmp_path, ["a", "b", "c"], 1, 86400, 120, failures=3, parallel=2)
    controllers = [Controller(tmp_path, index) for index in range(3)]
    for controller in controllers[:2]:
        controller._keep_to_a_part()
    assert take_part(tmp_path, 2) is None
    controllers[0]._part_lock.close()  # as when the run has ended
    controllers[2]._keep_to_a_part()
    assert kept == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_controller_waits_for_its_turn(tmp_path, monkeypatch, cancelled):
    folder, configs = tmp_path / "jobs" / "one", [small_config(tmp_path / f"run{i}") for i in range(2)]
    (folder / "configs").mkdir(parents=True)
    write_submission(folder, [config.run_dir for config in configs], 1, 86400, 120, failures=3)
    for index, config in enumerate(configs):
        (Path(config.run_dir) / "ends").mkdir(parents=True)
        config_file(folder, index).write_text(to_yaml(config))
    first, released, started = take_turn(folder, 0), threading.Event(), []
    take_turn(folder, 1).close()
    controller = Controller(folder, 1)

    class Rank(subprocess.Popen):
        def __init__(self, command, **options):
            started.append(released.is_set())
            super().__init__(["true"], **options)

    def release():
        if cancelled:
            controller._cancel()
            return
        released.set()
        first.close()

    monkeypatch.setattr("launch.local.signal.signal", lambda *_: None)
    monkeypatch.setattr("launch.local.end", lambda attempt, code: "done")
    monkeypatch.setattr("launch.local.subprocess.Popen", Rank)
    timer = threading.Timer(0.2, release)
    timer.start()
    controller.run()
    timer.join()
    assert started == ([] if cancelled else [True])
