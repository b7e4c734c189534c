"""Launching without SLURM: what is asked for, what follows an end, and the local twin, really run and struck."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, override_flags, run_module, small_config
from test_trainer import assert_equal_weights, comparable_records, weights

from launch.__main__ import grid_values, read_config, start
from launch.after import cause_of, decide, end
from launch.cluster import Cluster, add_flags, read_cluster
from launch.estimate import estimate
from launch.local import Controller, first_failure
from launch.records import Attempt, add_event, config_file, read_events, read_job, write_submission
from launch.submission import submit
from pipeline.config import load_stored_config, to_yaml
from pipeline.errors import ArgumentParser, UserError
from tools.scaling import Machines, step_time


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
        site.write_text(f"time: {written}")  # YAML takes the first two for numbers of base 60
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
        (["--cluster", "site.yaml"], "site.yaml: 'partiton' is not a known key \\(did you mean 'partition'"),
    ],
)
def test_mistakes_name_the_flag_or_the_key(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("site.yaml").write_text("partiton: gpu")
    Path("time.yaml").write_text("time: 90")
    with pytest.raises(UserError, match=expected):
        cluster(*words)


SIGNALLED, LOST, BUG, MISTAKE = {"code": 75, "signal": "SIGTERM"}, {"code": 75, "signal": ""}, {"code": 1}, {"code": 2}


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (0, [], "complete"),
        (2, [MISTAKE, MISTAKE], "mistake"),
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
    assert cause_of(code, words, complete=True, limit_reached=False) == "complete"
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
    for job in ("1", "2"):
        for number in range(3):
            attempt = Attempt(folder, 0, job, f"{job}.{number}")
            add_event(attempt.run_dir, "start", start=attempt.name, job=job)
            what.append(end(attempt, 137))
    assert what == ["again", "again", "stopped"] * 2


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


def test_a_step_on_more_gpus_is_faster_but_less_efficient():
    machines = Machines(8, 200e9, 25e9, 1e-5, 0.02, 2000, 1e-9)
    times = [step_time(n, 256, 8_000_000, 1000, machines).total for n in (1, 2, 8, 64, 256)]
    assert times == sorted(times, reverse=True)
    assert all(256 * later > n * 0.02 for n, later in zip((1, 2, 8, 64, 256), times, strict=True))
    assert times[0] == pytest.approx(0.02 + 0.256, rel=0.05)


def local_words(config, *more: object) -> list[str]:
    words = ["configs/demo.yaml", *override_flags(config), "--cluster", "local", "--tasks-per-node", 2, *more]
    return [str(word) for word in words]


def wait_for(condition, patience: float = 120) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_local_twin_starts_a_struck_run_again_and_ends_as_torchrun_does(tmp_path):
    optim = {"epochs": 6, "milestones": [3]}
    twin, torchrun = (small_config(tmp_path / name, optim=optim) for name in ("twin", "torchrun"))
    done = run_module("pipeline.train", "configs/demo.yaml", *override_flags(torchrun), ranks=2)
    assert done.returncode == 0, done.stderr
    done = run_module("launch", *local_words(twin, "--train.checkpoint_every", 1))
    assert done.returncode == 0 and f"job {read_job(Path(twin.run_dir)).id}: {twin.run_dir}" in done.stdout, done.stderr
    run = Path(twin.run_dir)
    wait_for(lambda: (run / "checkpoints" / "previous.pt").exists())
    again = run_module("launch", *local_words(twin))
    assert again.returncode == 2 and "which is running: cancel it" in again.stderr
    started = next(event for event in read_events(run) if event["event"] == "start")
    os.kill(started["pid"], signal.SIGKILL)
    wait_for(lambda: read_events(run)[-1].get("what") == "done")
    assert [event["event"] for event in read_events(run)] == ["submit", "start", "end", "start", "end"]
    assert_equal_weights(weights(twin), weights(torchrun))
    assert comparable_records(twin) == comparable_records(torchrun)
    status = run_module("launch", "status", tmp_path)
    assert " done " in status.stdout and "6/6" in status.stdout
    logs = run_module("launch", "logs", run).stdout
    assert "0: resuming at" in logs and "1: interrupted: rank 1 has lost contact" in logs


def test_the_local_twin_is_cancelled_with_a_checkpoint_and_resumed(tmp_path):
    config = small_config(tmp_path / "run", optim={"epochs": 40, "milestones": [20]})
    run = Path(config.run_dir)
    assert run_module("launch", *local_words(config)).returncode == 0
    wait_for(lambda: (run / "checkpoints" / "last.pt").exists())
    assert "is told to end" in run_module("launch", "cancel", run).stdout
    wait_for(lambda: read_events(run)[-1]["event"] == "end")
    assert " cancelled " in run_module("launch", "status", run).stdout
    assert run_module("launch", "resume", tmp_path).returncode == 0  # all in the folder
    wait_for(lambda: read_events(run)[-1].get("what") == "done")
    assert "has ended already (done)" in run_module("launch", "cancel", tmp_path).stdout
    assert " done " in run_module("launch", "status", run).stdout
    assert "0: resuming at" in run_module("launch", "logs", run).stdout


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
    assert f"{tmp_path}/run-lr0.2: densenet_bc40_k12, 46 training and 11 validation images, 3 classes" in text
    assert (
        "batch 12 = 1 nodes x 2 ranks x 1 accumulation steps x 6 images" in text
        and "4 steps an epoch, 2 epochs" in text
    )
    assert "at 20 images/s" in text and "1 attempts" in text
    assert not list(tmp_path.glob("*/job.json"))
    start(["configs/densenet169.yaml", *local_words(config, "--dry-run")])
    assert f"{tmp_path}/run/densenet169: " in capsys.readouterr().out
    with pytest.raises(UserError, match="batch_size 12 cannot be split over 1 nodes x 5 ranks.*multiple of 5"):
        start(local_words(config, "--dry-run", "--tasks-per-node", 5))
    with pytest.raises(UserError, match="--nodes must be 1"):
        start(local_words(config, "--nodes", 2, "--optim.batch_size", 12))
    assert not (tmp_path / "run" / "job.json").exists() and not (tmp_path / "jobs").exists()
    with pytest.raises(UserError, match="did you mean '--optim.lr'"):
        start(local_words(config, "--dry-run", "--optim.lrr", 1))
