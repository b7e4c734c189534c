"""Launching without SLURM: what is asked for, what follows an end, and the local twin, really run and struck."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest
from conftest import PATIENCE, REPOSITORY, override_flags, run_module, small_config
from test_trainer import assert_equal_weights, comparable_records, weights

from launch import after
from launch.__main__ import grid_values, leaving_nothing_if_refused, start
from launch.__main__ import main as launch
from launch.after import cause_of, decide, end
from launch.cluster import Cluster, add_flags, read_cluster
from launch.estimate import estimate
from launch.local import Controller, first_failure
from launch.names import USUAL, refuse_unknown_names
from launch.records import (
    JOB_BEGAN,
    Attempt,
    Job,
    add_event,
    config_file,
    read_events,
    read_job,
    slurm_attempt,
    write_job,
    write_submission,
)
from launch.status import read_status, to_text
from launch.submission import submit
from pipeline import trainer
from pipeline.checkpoint import CheckpointFolder, load_checkpoint
from pipeline.command import ArgumentParser
from pipeline.config_file import load_config, to_yaml
from pipeline.data.loader import IMAGE_PIPELINES
from pipeline.errors import UserError
from pipeline.models.zoo import DENSENETS, MSDNETS
from pipeline.objective import OBJECTIVES
from pipeline.optim import OPTIMIZERS
from pipeline.pace import VALIDATION_SPEED, duration
from pipeline.provenance import commit
from pipeline.run_dir import locked
from tools.lab.scaling import Machines, step_time


def cluster(*words: str) -> Cluster:
    parser = ArgumentParser()
    add_flags(parser)
    return read_cluster(parser.parse_args(words))


def test_a_sites_file_and_flags_that_win(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(
        "{partition: gpu, gpus_per_node: 8, cpus_per_task: 12, setup: [module load cuda], sbatch: {reservation: a}}"
    )
    asked = cluster("--cluster", str(site), "--nodes", "4", "--time", "1-12:30:01", "--sbatch", "exclusive=user")
    assert (asked.kind, asked.partition, asked.ranks_per_node, asked.ranks) == ("slurm", "gpu", 8, 32)
    assert asked.minutes == 36 * 60 + 31 and asked.setup == ("module load cuda",)
    assert asked.sbatch == {"reservation": "a", "exclusive": "user"}
    assert cluster("--cluster", "local", "--tasks-per-node", "3").ranks == 3
    for written, minutes in [("24:00:00", 1440), ("1:00:30", 61), ("0:30:00", 30), ("'2-00:00:00'", 2880)]:
        site.write_text(f"time: {written}")  # YAML 1.1 takes the first two for numbers of base 60
        assert cluster("--cluster", str(site)).minutes == minutes
    shipped = cluster("--cluster", str(REPOSITORY / "launch" / "site.example.yaml"), "--srun=--overlap", "--srun=-v")
    assert shipped.ranks == 8 and shipped.srun == ("--overlap", "-v")
    assert Cluster(**json.loads(json.dumps(dataclasses.asdict(shipped)))) == shipped  # as `resume` reads it


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes", "none"], "--nodes: a whole number is needed .*'none'"),
        (["--nodes", "0"], "--nodes: a number above 0 is needed .*'0'"),
        (["--time", "2 days"], "--time: .*HOURS:MINUTES:SECONDS.*'2 days'"),
        (["--cluster", "time.yaml"], "time.yaml: 'time': .*HOURS:MINUTES:SECONDS.*'90'"),
        (["--time", "0:02:00"], "warning_seconds 120 must be less than the time limit 0:02:00"),
        (["--sbatch", "exclusive"], "--sbatch exclusive: NAME=VALUE is needed"),
        (["--cluster", "nowhere.yaml"], "no cluster file nowhere.yaml: --cluster takes a file, local or slurm"),
        (["--cluster", "minutes.yaml"], "minutes.yaml: 'time': .*HOURS:MINUTES:SECONDS.*'4320'"),
        (
            ["--cluster", "local", "--setup", "module load cuda"],
            "--setup is for SLURM, and does nothing for processes of",
        ),
        (["--cluster", "local", "--cpus-per-task", "4"], "--cpus-per-task is for SLURM"),
        (
            ["--cluster", "local.yaml"],
            "local.yaml: 'setup' is for SLURM, and does nothing for processes of this machine",
        ),
        (["--mail-type", "FAIL"], "--mail-type does nothing without --mail-user"),
        (["--cluster", "site.yaml"], "site.yaml: 'partiton' is not a known key \\(did you mean 'partition'"),
    ],
)
def test_mistakes_name_the_flag_or_the_key(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("site.yaml").write_text("partiton: gpu")
    Path("time.yaml").write_text("time: 90")
    Path("local.yaml").write_text("{kind: local, setup: [module load cuda]}")
    Path("mail.yaml").write_text("mail_type: FAIL")  # a site's, for those who give --mail-user
    assert cluster("--cluster", "mail.yaml").mail_type == "FAIL"
    Path("minutes.yaml").write_text("time: 4320")  # three days, as sbatch takes it
    with pytest.raises(UserError, match=expected):
        cluster(*words)


SIGNALLED, LOST, BUG, MISTAKE = {"code": 75, "signal": "SIGTERM"}, {"code": 75, "signal": ""}, {"code": 1}, {"code": 2}


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (0, [], "complete"),
        (2, [MISTAKE, MISTAKE], "mistake"),
        (2, [], "mistake"),
        (137, [MISTAKE], "mistake"),  # the other was killed because this one had left
        (75, [SIGNALLED, SIGNALLED], "preempted"),
        (75, [SIGNALLED, LOST], "preempted"),
        (75, [LOST, LOST], "interrupted"),
        (137, [LOST, LOST], "failed"),  # killed, and what the others said then
        (137, [SIGNALLED], "failed"),  # as when srun ends the others
        (1, [BUG, LOST], "failed"),
        (143, [BUG], "failed"),
        (138, [], "interrupted"),  # all were struck before they had a handler
        (140, [], "interrupted"),
        (143, [], "interrupted"),
        (143, [SIGNALLED], "preempted"),  # one was
        (139, [], "failed"),
    ],
)
def test_why_an_attempt_ended(code, words, expected):
    assert cause_of(code, words, complete=False, limit_reached=False) == expected
    refused = expected == "mistake"  # what a complete run was asked besides needs a person
    assert cause_of(code, words, complete=True, limit_reached=False) == ("mistake" if refused else "complete")
    late = {"preempted": "time limit", "interrupted": "interrupted" if code == 75 else "time limit"}
    assert cause_of(code, words, complete=False, limit_reached=True) == late.get(expected, expected)


FAILED, PREEMPTED, LIMIT, CUT = "failed", "preempted", "time limit", "interrupted"


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([("complete", "a")], "done"),
        ([("mistake", "a")], "stopped"),
        ([(FAILED, "a")], "again"),
        ([(FAILED, "a"), (FAILED, "b"), (FAILED, "c")], "again"),
        ([(FAILED, "a"), (FAILED, "a"), (FAILED, "a")], "stopped"),
        ([(FAILED, "a"), (CUT, "a"), (FAILED, "a"), (LIMIT, "a"), (FAILED, "a")], "stopped"),
        ([(FAILED, None)] * 3, "stopped"),
        ([(FAILED, "a")] * 2, "again"),
        ([(FAILED, None), (FAILED, None), (PREEMPTED, None)], "again"),
        ([(PREEMPTED, None)] * 50, "again"),
        ([(PREEMPTED, None)] * 50 + [(CUT, None)], "again"),
        ([(CUT, "a")] * 9, "again"),
        ([(CUT, "a")] * 10, "stopped"),
        ([(LIMIT, None)] * 10, "stopped"),
        ([(CUT, "a")] * 9 + [(CUT, "b")], "again"),
    ],
)
def test_what_follows_an_end(ends, expected):
    *before, (cause, checkpoint) = ends
    assert decide(cause, 1, before, checkpoint, failures=3)[0] == expected


def submission(tmp_path: Path, seconds: int = 86400, warning: int = 120) -> Path:
    """A submission of one run of two ranks, in `tmp_path`/run."""
    folder, config = tmp_path / "jobs" / "one", small_config(tmp_path / "run")
    for made in (folder / "configs", tmp_path / "run" / "ends"):
        made.mkdir(parents=True)
    write_submission(folder, [config.run_dir], 2, seconds, warning, failures=3)
    config_file(folder, 0).write_text(to_yaml(config))
    return folder


def test_failures_before_a_run_was_submitted_again_do_not_count(tmp_path):
    folder, what = submission(tmp_path), []
    for job in ("1", "2", "2"):  # a process's number may come again
        add_event(tmp_path / "run", "submit", job=job, cluster={})
        for number in range(3):
            attempt = Attempt(folder, 0, job, f"{job}.{number}")
            add_event(attempt.run_dir, "start", start=attempt.name, job=job)
            what.append(end(attempt, 137))
    assert what == ["again", "again", "stopped"] * 3


@pytest.mark.parametrize(
    ("rank_code", "signal_name", "code", "ends_with", "requeued"),
    [(75, "SIGUSR2", 75, None, True), (2, "", 2, 2, False), (0, "", 0, None, False)],
)
def test_the_last_line_of_a_slurm_job_has_it_attempted_again(
    tmp_path, monkeypatch, rank_code, signal_name, code, ends_with, requeued
):
    """A program of scontrol's name notes what it is asked; tests/test_slurm.py asks a real one."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    run, folder = tmp_path / "run", tmp_path / "job"
    for made in (run / "ends", folder / "configs"):
        made.mkdir(parents=True)
    write_submission(folder, [str(run)], ranks=1, seconds=3600, warning=120, failures=3)
    config_file(folder, 0).write_text(to_yaml(small_config(run)))
    names = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    add_event(run, "submit", job="71")
    add_event(run, "start", start="71.1", job="71", machines="a")
    if rank_code:
        word = {"message": "why", "code": rank_code, "signal": signal_name}
        slurm_attempt(folder).word_file(0).write_text(json.dumps(word))
    monkeypatch.setattr("sys.argv", ["after", str(folder), str(code)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    if ends_with is None:
        after.main()
    else:
        with pytest.raises(SystemExit) as ended:
            after.main()
        assert ended.value.code == ends_with
    asked = tmp_path / "asked"
    assert asked.exists() == requeued and (not requeued or asked.read_text() == "requeue 71\n")
    assert read_events(run)[-1]["what"] == ("again" if requeued else "stopped" if code else "done")


def test_a_job_is_attempted_again_though_nothing_can_be_written_and_slurm_is_busy(tmp_path, monkeypatch, capsys):
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ntest $(wc -l < {tmp_path}/asked) = 3\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(after, "REQUEUE_WAITS", (0, 0, 0))
    folder = submission(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    slurm_attempt(folder).word_file(0).write_text(json.dumps(SIGNALLED))
    monkeypatch.setattr("sys.argv", ["after", str(folder), "75"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(after, "add_event", full)
    monkeypatch.setattr(after, "read_events", lambda _: (_ for _ in ()).throw(UserError("cannot read starts.jsonl")))
    after.main()
    assert (tmp_path / "asked").read_text() == "requeue 1\n" * 3
    assert capsys.readouterr().err.count("warning: ") == 3
    with pytest.raises(SystemExit, match="scontrol requeue 1 has failed: resume the run with python -m launch resume"):
        after.main()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "10")  # so many attempts are enough where nothing else counts them
    with pytest.raises(SystemExit, match="75"):
        after.main()


def test_a_word_cut_short_is_none(tmp_path):
    attempt = Attempt(submission(tmp_path), 0, "1", "1.0")
    attempt.word_file(0).write_text('{"message": "lea')
    attempt.word_file(1).write_text(json.dumps(SIGNALLED))
    assert attempt.words() == [SIGNALLED] and end(attempt, 75) == "again"


def test_a_complete_run_is_done_however_its_ranks_ended(tmp_path):
    """A signal or a crash may come after the last checkpoint. A file that does not tell is not believed."""
    attempt = Attempt(submission(tmp_path), 0, "1", "1.0")
    status = attempt.run_dir / "status.json"
    for text in ("{", "[]", '{"complete": true}', '{"epoch": 1, "complete": false}', '{"epoch": 1, "complete": true}'):
        status.write_text(text)  # the last: it was complete, and is now to train for 2 epochs
        assert end(attempt, 143) == "again"
    status.write_text('{"epoch": 2, "epochs": 2, "step": 0, "complete": true}')
    assert [end(attempt, code) for code in (75, 137, 143, 1)] == ["done"] * 4


def test_a_time_limit_that_is_too_short_for_a_start_is_named(tmp_path):
    attempt = Attempt(submission(tmp_path, seconds=150, warning=60), 0, "1", "1.0")
    (attempt.run_dir / "starts.jsonl").write_text(
        json.dumps({"event": "start", "time": time.time() - 100, "start": "1.0", "job": "1"}) + "\n"
    )
    attempt.word_file(0).write_text(json.dumps(SIGNALLED | {"phase": "starting"}))
    what = [end(attempt, 75) for _ in range(10)]
    assert what == ["again"] * 9 + ["stopped"]
    last = read_events(attempt.run_dir)[-1]
    assert last["cause"] == "time limit" and "10 attempts were interrupted before they could write" in last["why"]
    assert "time limit is 2 min with a warning 60 s before it, but a start takes more than 100 s" in last["why"]
    assert "give more --time" in last["why"]


def test_the_time_limit_counts_from_the_begin_of_the_job(tmp_path, monkeypatch):
    """And not from the announcement of its ranks, which the setup of a site may keep waiting."""
    attempt = Attempt(submission(tmp_path, seconds=900, warning=60), 0, "1", "1.0")
    add_event(attempt.run_dir, "start", start="1.0", job="1")
    attempt.word_file(0).write_text(json.dumps(SIGNALLED))
    end(attempt, 75)
    monkeypatch.setenv(JOB_BEGAN, str(int(time.time()) - 840))
    end(attempt, 75)
    assert [event["cause"] for event in read_events(attempt.run_dir)[-2:]] == ["preempted", "time limit"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([None, None], None),
        ([0, None], None),
        ([0, 0], 0),
        ([None, 75], 75),
        ([75, -9], -9),  # seen at once: rank 0 lost contact to rank 1
        ([1, None, 75], 1),
    ],
)
def test_the_first_failure_is_not_the_lowest_rank(codes, expected):
    assert first_failure(codes) == expected


@pytest.mark.parametrize("moment", ["before the first attempt", "between two attempts", "while ranks are started"])
def test_the_local_controller_loses_no_sigterm(tmp_path, monkeypatch, moment):
    folder, ends, started = submission(tmp_path), [], []
    controller = Controller(folder, 0)

    def strike():
        os.kill(os.getpid(), signal.SIGTERM)

    def end_of(attempt, code):
        ends.append(code)
        if moment == "between two attempts" and len(ends) == 2:
            strike()
        return "again"

    class Rank(subprocess.Popen):
        """Fails at once, or hears only what is sent to it."""

        def __init__(self, command, **options):
            struck = moment == "while ranks are started"
            super().__init__(["sleep", "600"] if struck else ["false"], **options)
            started.append(self)
            if struck and len(started) == 1:
                strike()

    monkeypatch.setattr("launch.local.end", end_of)
    monkeypatch.setattr("launch.local.subprocess.Popen", Rank)
    if moment == "before the first attempt":
        monkeypatch.setattr("launch.local.Attempt", None)  # which would have to be made
        controller._cancel()
    before = signal.getsignal(signal.SIGTERM)
    try:
        controller.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    attempts, code = {"before": (0, None), "between": (2, 1), "while": (1, 143)}[moment.split()[0]]
    assert ends == [code] * attempts and len(started) == 2 * attempts
    assert all(rank.poll() is not None for rank in started)


def test_an_estimate_counts_what_an_attempt_can_use():
    time_ = estimate((900, 300), epochs=10, images_per_second=10, limit=320, warning=20)
    assert (time_.epoch, time_.run, time_.epochs_per_attempt, time_.attempts) == (100, 1000, 3, 4)
    assert estimate((900, 300), 10, 1e6, limit=320, warning=20).epochs_per_attempt == 10  # there are no more
    assert estimate((900, 300), 0, 10, limit=320, warning=20).attempts == 1  # the last validation is left


def test_a_step_on_more_gpus_is_faster_but_less_efficient():
    machines = Machines(8, 200e9, 25e9, 1e-5, 0.02, 2000, 1e-9)
    times = [step_time(n, 256, 8_000_000, 1000, machines).total for n in (1, 2, 8, 64, 256)]
    assert times == sorted(times, reverse=True)
    assert all(256 * later > n * 0.02 for n, later in zip((1, 2, 8, 64, 256), times, strict=True))
    assert times[0] == pytest.approx(0.02 + 0.256, rel=0.05)


def local_words(config, *more: object) -> list[str]:
    varied = "optim.lr" if "--grid" in more else ""
    words = [
        "configs/demo.yaml",
        *override_flags(config, leave_out=varied),
        "--cluster",
        "local",
        "--tasks-per-node",
        2,
        *more,
    ]
    return [str(word) for word in words]


RESUMING = re.compile(r"^0: [-\d]+ [:\d]+ resuming at epoch", re.M)


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def stop_rank0(run: Path, file: str) -> int:
    """Stop rank 0 as soon as the run has this file, and return its process id: no rank gets any further."""
    wait_for(lambda: (run / file).exists())
    started = next(event for event in reversed(read_events(run)) if event["event"] == "start")
    os.kill(started["pid"], signal.SIGSTOP)
    return started["pid"]


def test_status_shows_the_mean_auroc_of_runs_on_several_labels(tmp_path):
    """In a column that is there if one of the runs has such a score."""
    scores = {"errors": {"top1_error": 12.5, "top5_error": 1.5}, "labels": {"mean_auroc": 0.87654}}
    for name, score in scores.items():
        config = small_config(tmp_path / name)
        run = Path(config.run_dir)
        run.mkdir()
        write_job(run, Job("7", "local", "elsewhere", str(tmp_path)))
        (run / "submitted.yaml").write_text(to_yaml(config))
        at = {"errors": {"epoch": 0}, "labels": {"epochs": 1.0}}[name]  # as earlier versions wrote it, and as it is now
        record = {"step": 4, **at, "val/loss": 1.0, **{f"val/{key}": value for key, value in score.items()}}
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    both = [read_status(tmp_path / name, {}) for name in scores]

    def table(statuses) -> list[dict[str, str]]:
        head, *rows = [re.split("  +", line) for line in to_text(statuses).splitlines()[: 1 + len(statuses)]]
        return [dict(zip(head, row, strict=True)) for row in rows]

    errors, labels = table(both)
    assert errors["epochs"] == labels["epochs"] == "1/2"
    judged = ("last top-1 error %", "best (epoch)", "last mean AUROC", "best AUROC (epoch)")
    assert [errors[title] for title in judged] == ["12.50", "12.50 (1)", "-", "-"]
    assert [labels[title] for title in judged] == ["-", "-", "0.8765", "0.8765 (1)"]
    for status, cells, others in zip(both, (errors, labels), (judged[2:], judged[:2]), strict=True):
        assert table([status]) == [{title: cell for title, cell in cells.items() if title not in others}]


@pytest.mark.slow
def test_the_local_twin_starts_a_struck_run_again_and_ends_as_torchrun_does(tmp_path):
    optim = {"epochs": 6, "milestones": [3]}
    twin, torchrun = (small_config(tmp_path / name, optim=optim) for name in ("twin", "torchrun"))
    done = run_module("pipeline.train", "configs/demo.yaml", *override_flags(torchrun), ranks=2)
    assert done.returncode == 0, done.stderr
    done = run_module("launch", *local_words(twin, "--train.checkpoint_every", 1))
    assert done.returncode == 0 and f"job {read_job(Path(twin.run_dir)).id}: {twin.run_dir}" in done.stdout, done.stderr
    run = Path(twin.run_dir)
    rank0 = stop_rank0(run, "checkpoints/previous.pt")
    code = Path(read_job(run).folder, "code")  # as it was submitted, whatever becomes of the checkout
    assert commit.__wrapped__(code / "pipeline") == commit(REPOSITORY / "pipeline")
    assert os.readlink(f"/proc/{rank0}/cwd") == str(code) and (code / "pipeline" / "trainer.py").exists()
    again = run_module("launch", *local_words(twin))
    assert again.returncode == 2 and "which is running: cancel it" in again.stderr
    os.kill(rank0, signal.SIGKILL)
    wait_for(lambda: read_events(run)[-1].get("what") == "done")
    assert [event["event"] for event in read_events(run)] == ["submit", "start", "end", "start", "end"]
    assert [event["cause"] for event in read_events(run) if event["event"] == "end"] == ["failed", "complete"]
    assert_equal_weights(weights(twin), weights(torchrun))
    assert comparable_records(twin) == comparable_records(torchrun)
    status = run_module("launch", "status", tmp_path).stdout
    assert " done " in status and "6/6" in status and "last top-1 error %" in status
    logs = run_module("launch", "logs", run).stdout
    assert RESUMING.search(logs) and "1: interrupted: rank 1 has lost contact" in logs


@pytest.mark.slow
def test_the_local_twin_is_cancelled_with_a_checkpoint_and_resumed(tmp_path):
    config = small_config(tmp_path / "run", optim={"epochs": 8, "milestones": [4]})
    run = Path(config.run_dir)
    assert run_module("launch", *local_words(config, "--train.checkpoint_every", 1)).returncode == 0
    rank0 = stop_rank0(run, "checkpoints/last.pt")
    assert "is told to end" in run_module("launch", "cancel", run).stdout
    os.kill(rank0, signal.SIGCONT)
    wait_for(lambda: read_events(run)[-1]["event"] == "end")
    assert read_events(run)[-1]["cause"] == "preempted"
    assert " cancelled " in run_module("launch", "status", run).stdout
    accepted = (run / "submitted.yaml").read_text()
    refused = run_module("launch", *local_words(config, "--optim.lr", 0.7, "--nodes", 2))
    assert refused.returncode == 2 and "--nodes must be 1" in refused.stderr
    assert run_module("launch", "resume", tmp_path).returncode == 0  # all in the folder
    wait_for(lambda: read_events(run)[-1].get("what") == "done")
    assert (run / "submitted.yaml").read_text() == accepted and len(list((tmp_path / "jobs").iterdir())) == 2
    assert "has ended already (done)" in run_module("launch", "cancel", tmp_path).stdout
    assert " done " in run_module("launch", "status", run).stdout
    assert RESUMING.search(run_module("launch", "logs", run).stdout)


SBATCH = """#!/bin/sh
echo 'sbatch: error: invalid partition specified: nowhere' >&2
exit 1
"""


@pytest.mark.parametrize("runs", [1, 2])
def test_a_refused_submission_leaves_nothing_and_changes_nothing(tmp_path, monkeypatch, runs):
    """A program of sbatch's name stands for a SLURM that refuses; tests/test_slurm.py asks a real one."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):  # without srun submitit submits no array
        (tmp_path / "bin" / name).write_text(SBATCH)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    configs = [small_config(tmp_path / "runs" / f"run{i}") for i in range(runs)]
    with pytest.raises(UserError, match="sbatch refuses the job: .*invalid partition"):
        submit(configs, Cluster(partition="nowhere"))
    assert not (tmp_path / "runs" / "jobs").exists() and not list((tmp_path / "runs").glob("run*"))
    before = Path(configs[0].run_dir, "submitted.yaml")
    before.parent.mkdir()
    before.write_text("as accepted")
    with pytest.raises(UserError, match="sbatch refuses"):
        submit(configs, Cluster(partition="nowhere"))
    assert [file.name for file in before.parent.iterdir()] == ["submitted.yaml"] and before.read_text() == "as accepted"


def test_a_place_that_cannot_be_written_is_found_before_a_job_is_there(tmp_path, monkeypatch):
    config = small_config(tmp_path / "run")
    monkeypatch.setattr("launch.submission._start_local", lambda *_: pytest.fail("started"))
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as other:  # to root every folder is open
        other.setattr("launch.submission.os.access", lambda path, _: str(path) != config.run_dir)
        with pytest.raises(
            UserError, match=f"cannot make or write {tmp_path}/run \\(Permission denied\\): set --run_dir"
        ):
            submit([config], Cluster(kind="local"))

    def full(source, target, **_):
        raise shutil.Error([(str(source), str(target), "[Errno 28] No space left on device")])

    monkeypatch.setattr("launch.submission.shutil.copytree", full)
    with pytest.raises(
        UserError, match=r"cannot write .*/jobs/\S+ \(\[Errno 28\] No space left on device\): make room there"
    ):
        submit([config], Cluster(kind="local"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_training_that_begins_while_images_are_indexed_is_not_submitted_a_second_time(tmp_path, monkeypatch):
    config = small_config(tmp_path / "run")
    words = ["configs/demo.yaml", *map(str, override_flags(config)), "--cluster", "local"]
    monkeypatch.setattr("launch.__main__.submit", lambda *_: pytest.fail("submitted"))
    with ExitStack() as other:
        monkeypatch.setattr("launch.__main__.describe", lambda *_: other.enter_context(locked(tmp_path / "run")))
        with pytest.raises(UserError, match=f"run is trained by process {os.getpid()} on .*wait for its end"):
            start(words)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {
            "lock",
            "checkpoints",
        }  # the other's, left alone


def test_a_job_whose_run_cannot_be_written_after_all_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launch.submission._start_local", lambda *_: ["4711"])
    monkeypatch.setattr("launch.submission.write_job", full)
    monkeypatch.setattr("launch.submission._start_local", lambda *_: ["4711", "4712"])
    told = rf"the jobs are submitted, but {tmp_path}/b cannot be written \(No space left on device\), .* 2 of them: end them"
    with (
        pytest.raises(UserError, match=f"{told} with kill 4711 4712"),
        leaving_nothing_if_refused([str(tmp_path / "a")]),
    ):
        submit([small_config(tmp_path / name) for name in "ab"], Cluster(kind="local"))
    assert (tmp_path / "a").is_dir()  # its job is there


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        (
            "--optim.optimizer",
            "adamv",
            r"optim.optimizer: there is no 'adamv' \(did you mean 'adamw'\?\); choose sgd, ",
        ),
        ("--optim.objective", "entropy", "optim.objective: there is no 'entropy'"),
        ("--model.name", "densenet123", "model.name: there is no network 'densenet123'"),
        ("--model.name", "densenet_bc41_k12", "model.name: .* its depth must be 4"),
        ("--model.dense_block", "fuse", r"model.dense_block: there is no 'fuse' \(did you mean 'fused'\?\)"),
        ("--data.loader", "nativ", r"data.loader: there is no 'nativ' \(did you mean 'native'\?\)"),
    ],
)
def test_a_name_that_the_job_would_not_know_is_refused_before_it_is_submitted(
    tmp_path, monkeypatch, flag, value, expected
):
    monkeypatch.chdir(REPOSITORY)
    words = ["configs/demo.yaml", "--cluster", "local", "--run_dir", str(tmp_path / "runs" / "a"), flag, value]
    with pytest.raises(UserError, match=expected):
        start(words)
    assert not (tmp_path / "runs").exists()


def test_usual_names_are_known_and_need_no_look(monkeypatch):
    registries = {
        "model.name": [*DENSENETS, *MSDNETS], "model.dense_block": ["auto", "eager"], "optim.optimizer": OPTIMIZERS,
        "optim.objective": OBJECTIVES, "data.loader": ["auto", *IMAGE_PIPELINES],
    }  # fmt: skip
    assert not [name for key, names in USUAL.items() for name in names if name not in registries[key]]
    monkeypatch.setattr("launch.names.refuse_what_registries_lack", lambda config: pytest.fail(config.model.name))
    refuse_unknown_names([load_config(file) for file in sorted(REPOSITORY.glob("configs/*.yaml"))])


def test_another_attempt_is_decided_on_whatever_the_setup_of_a_site_sets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    words = [str(word) for word in ["configs/demo.yaml", *override_flags(small_config(tmp_path / "run"))]]
    start([*words, "--dry-run", "--cluster", "slurm", "--setup", "set -euo pipefail"])
    shown = capsys.readouterr().out
    script = shown[shown.index("#!/bin/bash") :]
    code = tmp_path / "jobs" / "TIME" / "code" / "launch"
    code.mkdir(parents=True)
    (code / "after.py").write_text("import os, sys\nprint(sys.argv[2], float(os.environ['LAUNCH_JOB_BEGAN']) > 1e9)\n")
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 75\n")
    (tmp_path / "srun").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, **path})
    assert done.stdout == "75 True\n", done.stderr


def test_without_slurm_a_dry_run_shows_the_script_and_a_submission_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [str(word) for word in ["configs/demo.yaml", *override_flags(small_config(tmp_path / "a run"))]]
    start([*words, "--dry-run", "--nodes", "2", "--sbatch", "nice=10", "--setup", "module load cuda, now"])
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --nice=10\n" in text and "\nmodule load cuda, now\n" in text
    assert "--signal=USR2@120" in text and f" -m launch.rank {tmp_path}/jobs/TIME/%j" in text
    assert f" -m launch.after {tmp_path}/jobs/TIME $?" in text
    request = [
        "--nodes",
        "3",
        "--gpus-per-node",
        "4",
        "--cpus-per-task",
        "12",
        "--time",
        "08:00:00",
        "--partition",
        "gpu",
    ]
    other = ["--grid", "optim.lr=0.1,0.2", "--parallel", "1", "--account", "vision", "--optim.batch_size", "24"]
    one_less = override_flags(small_config(tmp_path / "a run"), leave_out="optim.lr")
    start(["configs/demo.yaml", *map(str, one_less), "--dry-run", *request, *other])
    lines = {line.removeprefix("#SBATCH --") for line in capsys.readouterr().out.splitlines() if "#SBATCH" in line}
    assert lines >= {
        "account=vision", "array=0-1%1", "cpus-per-task=12", "gpus-per-node=4", "nodes=3", "ntasks-per-node=4",
        "open-mode=append", "partition=gpu", "requeue", "signal=USR2@120", "time=480",
    }  # fmt: skip
    with pytest.raises(UserError, match="no SLURM on this machine .*--cluster local"):
        start(words)
    assert not list(tmp_path.iterdir())


def test_a_refusal_after_the_images_were_indexed_leaves_no_index(tmp_path, monkeypatch):
    """Where the cache cannot lie beside the images it lies in the run's directory."""
    monkeypatch.chdir(REPOSITORY)
    config = small_config(tmp_path / "run")

    def index(config, *_):
        cache = Path(config.run_dir, "index", "train.jsonl")
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.touch()
        return ""

    monkeypatch.setattr("launch.__main__.describe", index)
    monkeypatch.setattr("launch.__main__.submit", lambda *_: (_ for _ in ()).throw(UserError("refused")))
    with pytest.raises(UserError, match="refused"):
        start(local_words(config))
    assert not list(tmp_path.iterdir())
    (tmp_path / "run" / "index").mkdir(parents=True)  # what is there before stays
    with pytest.raises(UserError, match="refused"):
        start(local_words(config))
    assert (tmp_path / "run" / "index" / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lr=0.1,0.2", ["0.1", "0.2"]),
        ("data.hflip=true,false", ["true", "false"]),
        ("optim.milestones=[30,60],[20,40]", ["[30,60]", "[20,40]"]),
        ("optim.milestones=[30]", ["[30]"]),
        ("optim.milestones=[],[1]", ["[]", "[1]"]),
    ],
)
def test_the_values_of_a_grid(word, expected):
    assert [value for _, value in grid_values(word)] == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lr", "KEY=A,B is needed"),
        ("optim.lr=", "KEY=A,B is needed"),
        ("optim.lr=0.1,,0.2", "a value is empty or stands twice"),
        ("optim.lr=0.1,0.1", "a value is empty or stands twice"),
        ("optim.lr=[0.1],[0.2]", "optim.lr is no list; write its values without brackets"),
        (
            "optim.milestones=30,60",
            "is a list; write each value in brackets, as in --grid 'optim.milestones=\\[1,2\\],\\[3,4\\]'",
        ),
        ("optim.milestones=[30,60],20", "is a list; write each value in brackets"),
        ("optim.milestones=[30,[60]]", "is a list; write each value in brackets"),
        ("optim.lrr=0.1", "unknown argument --optim.lrr \\(did you mean '--optim.lr'"),
    ],
)
def test_a_grid_that_is_not_clear_is_refused(word, expected):
    with pytest.raises(UserError, match=expected):
        grid_values(word)


def test_a_grid_makes_a_run_of_each_combination(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    configs = []
    monkeypatch.setattr("launch.__main__.describe", lambda config, *_: configs.append(config))
    grid = [
        "--grid",
        "optim.milestones=[30,60],[20,40]",
        "--grid",
        "train.compile=default,none",
        "--train.deterministic",
    ]
    start(["configs/densenet121.yaml", "--cluster", "local", "--run_dir", str(tmp_path / "run"), "--dry-run", *grid])
    assert [(c.optim.milestones, c.train.compile) for c in configs] == [
        ((30, 60), "default"), ((30, 60), "none"), ((20, 40), "default"), ((20, 40), "none"),
    ]  # fmt: skip
    assert configs[1].run_dir == f"{tmp_path}/run-milestones30-60-compilenone" and configs[0].train.deterministic
    both = ["configs/demo.yaml", "--nodes", "1", "configs/densenet169.yaml", "--run_dir", str(tmp_path / "both")]
    start(["--optim.lr", "0.3", *both, "--dry-run"])
    assert [(Path(c.run_dir).name, c.optim.lr) for c in configs[4:]] == [("demo", 0.3), ("densenet169", 0.3)]


def test_a_submission_is_of_what_is_left_and_refused_before_it_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    config = small_config(tmp_path / "run", optim={"epochs": 1, "milestones": []})
    trainer.fit(config)
    longer = small_config(
        tmp_path / "run", optim={"epochs": 3, "milestones": []}, train={"allow_world_size_change": True}
    )
    dry = ["--dry-run", "--images-per-second", "0.01"]
    with pytest.raises(UserError, match="optim.epochs was 1 and is now 3; .*--train.change optim.epochs"):
        start(local_words(longer, *dry))
    capsys.readouterr()
    start(local_words(longer, *dry, "--train.change", "optim.epochs"))
    text = capsys.readouterr().out
    assert "resumes after 1 of 3 epochs\n" in text
    seconds = 2 * (46 + 11 / VALIDATION_SPEED) / 0.02
    assert f" {duration(seconds)} in all" in text
    start(local_words(small_config(tmp_path / "new", train={"ema_decay": 0.9}), *dry))  # which validates twice
    twice = duration(2 * (46 + 2 * 11 / VALIDATION_SPEED) / 0.02)
    assert f" {twice} in all" in capsys.readouterr().out and twice != duration(seconds)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    state = load_checkpoint(folder.last)
    state["progress"] |= {"step": 2}  # of four
    folder.save(state, best=False)
    start(local_words(longer, *dry, "--train.change", "optim.epochs"))
    assert "resumes after 1.5 of 3 epochs\n" in capsys.readouterr().out
    folder.save(state | {"progress": state["progress"] | {"epoch": 2, "step": 4}}, best=False)
    start(local_words(longer, *dry, "--train.change", "optim.epochs"))
    text = capsys.readouterr().out
    assert "resumes after 3 of 3 epochs\n" in text and ", 1 attempt, 0 s in all" in text  # but for a validation
    folder.save({key: value for key, value in state.items() if key != "conditions"}, best=False)
    with pytest.raises(UserError, match="its checkpoint holds a network but no training; put it back"):
        start(local_words(longer, *dry))


def test_a_flag_must_do_something_in_one_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    configs = []
    monkeypatch.setattr("launch.__main__.describe", lambda config, *_: configs.append(config))
    words = ["configs/densenet121.yaml", "--cluster", "local", "--run_dir", str(tmp_path / "run"), "--dry-run"]
    start([*words, "--data.erasing_fill", "noise", "--grid", "data.random_erasing=0,0.25"])
    assert [(c.data.random_erasing, c.data.erasing_fill) for c in configs] == [(0, "noise"), (0.25, "noise")]
    start([*words, "configs/fashion-mnist.yaml", "--data.padding", "2"])
    assert [c.data.padding for c in configs[2:]] == [2, 2]
    advice = "--data.erasing_fill does nothing without data.random_erasing above 0: set that"
    for grid in (["--grid", "optim.lr=0.1,0.2", "--data.erasing_fill", "noise"], ["--grid", "data.erasing_fill=noise"]):
        with pytest.raises(UserError, match=advice):
            start([*words, *grid])


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (
            ["--grid", "optim.lr=0.1", "--grid", "optim.lr=0.2"],
            "optim.lr is given twice: give all its values to one --grid",
        ),
        (["--grid", "optim.lr=0.1,0.2", "--optim.lr", "0.5"], "optim.lr is given twice"),
        *(
            (["--images-per-second", text], "a number of 0.01 or more is needed")
            for text in ("inf", "nan", "0", "-5", "x")
        ),
    ],
)
def test_words_that_contradict_each_other_or_mean_nothing_are_refused(tmp_path, monkeypatch, words, advice, user_error):
    monkeypatch.chdir(REPOSITORY)
    given = words if words[0] == "--grid" else [f"{words[0]}={words[1]}"]  # -5 by itself would be a flag
    begin = ["configs/densenet121.yaml", "--cluster", "local", "--run_dir", tmp_path / "run", "--dry-run"]
    assert advice in user_error(launch, *begin, *given)


@pytest.mark.parametrize(
    ("words", "device"),
    [
        (["--gpus-per-node", "2"], "cuda"),
        (["--tasks-per-node", "2"], "auto"),
        (["--gpus-per-node", "2", "--train.device", "cpu"], "cpu"),
    ],
)
def test_a_job_on_gpus_does_not_train_on_cpu(tmp_path, monkeypatch, words, device):
    devices = []
    monkeypatch.setattr("launch.__main__.describe", lambda config, *_: devices.append(config.train.device))
    monkeypatch.chdir(REPOSITORY)
    start(["configs/densenet121.yaml", "--cluster", "local", "--run_dir", str(tmp_path), "--dry-run", *words])
    assert devices == [device]


def test_a_dry_run_says_what_a_run_would_be_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    config = small_config(tmp_path / "run")
    start(local_words(config, "--dry-run", "--images-per-second", "10", "--grid", "optim.lr=0.1,0.2"))
    text = capsys.readouterr().out
    assert f"{tmp_path}/run-lr0.2: densenet_bc22_k8, 46 training and 11 validation images, 3 classes" in text
    assert "batch 12 = 1 node x 2 ranks x 1 accumulation step x 6 images" in text
    assert "4 steps an epoch, the last one of 10 images (5 at once), 2 epochs" in text
    assert "at 20 images/s" in text and "1 attempt" in text
    assert "other than the defaults: model.name densenet_bc22_k8, data.dir " in text
    assert "data.loader synthetic, data.crop_size 16, data.resize_size 16, " in text
    assert "optim.epochs 2, optim.batch_size 12, optim.lr 0.2, optim.milestones 1, " in text
    assert "2 processes of this machine for each run; 1 of 2 runs at a time (--parallel)" in text
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.glob("*/job.json"))

    class Still(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 1)

    monkeypatch.setattr("launch.description.datetime", Still)
    slow = local_words(config, "--dry-run", "--images-per-second", "0.01", "--grid", "optim.lr=0.1,0.2,0.3")
    for more, turns in (([], 2), (["--parallel", "2"], 1)):
        start([*slow, *more])
        said = re.findall(r" in all, (begins in .+, )?ends not before (\S+ \S+)", capsys.readouterr().out)
        begins = [bool(waits) for waits, _ in said]
        assert begins == [False, not more, True] and len({end for _, end in said}) == turns + 1
    start(local_words(config, "--dry-run", "--optim.milestones", "10"))
    assert (
        "warning: the learning rate never drops after epoch 10: the run has optim.epochs 2" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="12 cannot be split evenly over 1 node x 2 ranks .* pairs .* a multiple of 8"):
        start(local_words(config, "--dry-run", "--data.mixup_alpha", "0.2", "--optim.grad_accum_steps", "2"))
    for key, file in (("model.weights", "typo.pth"), ("optim.class_weights", "weights.txt")):
        with pytest.raises(UserError, match=f"{key}: there is no file {REPOSITORY}/{file}: correct its path"):
            start(local_words(config, "--dry-run", f"--{key}", file))
    start(["configs/densenet169.yaml", *local_words(config, "--dry-run")])
    assert f"{tmp_path}/run/densenet169: " in capsys.readouterr().out
    start(
        ["configs/densenet169.yaml", "--data.loader", "synthetic", "--dry-run", "--nodes", "4", "--gpus-per-node", "8"]
    )
    text = capsys.readouterr().out
    assert "warning: batch 256 on 32 ranks leaves each rank 8 images" in text
    assert "other than the defaults: model.name densenet169, " in text and "published." not in text
    with pytest.raises(UserError, match="batch_size 12 cannot be split evenly over 1 node x 5 ranks.*multiple of 5"):
        start(local_words(config, "--dry-run", "--tasks-per-node", 5))
    with pytest.raises(UserError, match="--nodes must be 1"):
        start(local_words(config, "--nodes", 2, "--optim.batch_size", 12))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    shared = local_words(config, "--dry-run", "--gpus-per-node", "2", "--grid", "optim.lr=0.1,0.2,0.3")
    with pytest.raises(
        UserError, match="--parallel 3 leaves a run 1 of this machine's 4 GPUs, .* 2: --parallel 2 at most"
    ):
        start([*shared, "--parallel", "3"])
    with pytest.raises(UserError, match="--parallel 5 leaves a run 1 of this machine's 4 GPUs"):
        start([*shared[:-1], "optim.lr=0.1,0.2,0.3,0.4,0.5", "--parallel", "5"])
    assert not (tmp_path / "run" / "job.json").exists() and not (tmp_path / "jobs").exists()
    for wrong, meant in [("--optim.lrr", "--optim.lr"), ("--partiton", "--partition"), ("--clustr", "--cluster")]:
        with pytest.raises(UserError, match=f"unknown argument {wrong} .did you mean '{meant}'"):
            start(local_words(config, "--dry-run", wrong, 1))
    with pytest.raises(UserError, match="unknown argument --kind"):
        start(local_words(config, "--kind", "local"))
